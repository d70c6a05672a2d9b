#include "genomics/fasta.h"

#include <algorithm>
#include <functional>
#include <string_view>
#include <utility>

#include "genomics/alphabet.h"
#include "genomics/byte_stream.h"
#include "genomics/read_ahead.h"
#include "kernels/error.h"

namespace coil {
namespace {

constexpr size_t kLongestName = 1 << 16;
constexpr bool is_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// A set of name hashes by open addressing, at most half full: 64 MiB at its largest.
class NameSet {
 public:
  bool insert(std::string_view name) {  // false: seen before
    if (2 * (count_ + 1) > slots_.size() && !grow()) return find(key_of(name)) == kEmpty;
    uint64_t& slot = find(key_of(name));
    if (slot != kEmpty) return false;
    slot = key_of(name);
    ++count_;
    return true;
  }
  void clear() {
    slots_.clear();
    count_ = 0;
  }

 private:
  static constexpr size_t kLargest = 1 << 23;
  static constexpr uint64_t kEmpty = 0;
  static uint64_t key_of(std::string_view name) {
    return std::max<uint64_t>(std::hash<std::string_view>()(name), 1);
  }
  uint64_t& find(uint64_t key) {
    size_t i = key & (slots_.size() - 1);
    while (slots_[i] != kEmpty && slots_[i] != key) i = (i + 1) & (slots_.size() - 1);
    return slots_[i];
  }
  bool grow() {
    if (slots_.size() == kLargest) return false;
    std::vector<uint64_t> old(std::max<size_t>(64, 2 * slots_.size()), kEmpty);
    old.swap(slots_);
    for (uint64_t key : old)
      if (key != kEmpty) find(key) = key;
    return true;
  }
  std::vector<uint64_t> slots_;
  size_t count_ = 0;
};

// By the begin of its text, decompressed.
FileKind kind_of(std::string_view text) {
  if (text.starts_with("BAM\1")) return FileKind::bam;
  if (text.starts_with("CRAM")) return FileKind::cram;
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  while (!text.empty() && is_space(text[0])) text.remove_prefix(1);
  if (text.starts_with('>')) return FileKind::fasta;
  for (std::string_view tag : {"@HD\t", "@SQ\t", "@RG\t", "@PG\t", "@CO\t"})
    if (text.starts_with(tag)) return FileKind::sam;
  if (text.starts_with('@')) return FileKind::fastq;
  // SAM without a header: eleven fields, the second (flag), fourth (position) and fifth (quality)
  // whole numbers.
  const std::string_view line = text.substr(0, text.find('\n'));
  std::vector<std::string_view> fields;
  for (size_t begin = 0; begin <= line.size() && fields.size() < 11;) {
    const size_t end = std::min(line.find('\t', begin), line.size());
    fields.push_back(line.substr(begin, end - begin));
    begin = end + 1;
  }
  const auto number = [](std::string_view field) {
    return !field.empty() &&
           std::all_of(field.begin(), field.end(), [](char c) { return c >= '0' && c <= '9'; });
  };
  const bool sam =
      fields.size() == 11 && number(fields[1]) && number(fields[3]) && number(fields[4]);
  return sam ? FileKind::sam : FileKind::unknown;
}

// The state machine. It stops in the middle of anything a block's end cuts: a header, a line, a run
// of qualities.
class FastaReader final : public Source {
 public:
  FastaReader(std::vector<std::string> paths, bool unique_names)
      : paths_(std::move(paths)), unique_names_(unique_names) {
    COIL_ASSERT(!paths_.empty());
  }

  bool next(Segment& segment) override {
    segment.codes.clear();
    segment.name.clear();
    segment.first = segment.last = false;
    segment.offset = 0;
    for (;;) {
      if (!stream_ && !open_next()) return false;
      if (rest_.empty() && (rest_ = stream_->block()).empty()) {
        if (end_of_file(segment)) return true;
        continue;
      }
      switch (state_) {
        case State::between:
          between();
          break;
        case State::name:
          read_name(segment);
          break;
        case State::description:
          skip_line(State::sequence);
          break;
        case State::sequence:
          if (read_sequence(segment)) return true;
          break;
        case State::plus:
          skip_line(State::quality);
          break;
        case State::quality:
          read_quality();
          break;
      }
    }
  }

  double fraction() const override {  // files count alike
    const double inside = stream_ ? stream_->fraction() : 0;
    const int64_t before = stream_ ? file_ : next_file_;
    return inside < 0 ? -1 : (static_cast<double>(before) + inside) / paths_.size();
  }

 private:
  enum class State : uint8_t { between, name, description, sequence, plus, quality };

  bool open_next() {
    if (next_file_ == static_cast<int64_t>(paths_.size())) return false;
    file_ = next_file_++;
    stream_ = std::make_unique<ByteStream>(paths_[file_]);
    state_ = State::between;
    rest_ = {};
    line_ = 1;
    records_ = 0;
    marker_ = 0;
    seen_.clear();
    return true;
  }

  const std::string& file_name() const { return stream_->name(); }

  // At a line's start, before a record.
  void between() {
    constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";
    if (marker_ == 0 && rest_.starts_with(kByteOrderMark))
      rest_.remove_prefix(kByteOrderMark.size());
    while (!rest_.empty() && is_space(rest_[0])) {
      line_ += rest_[0] == '\n';
      rest_.remove_prefix(1);
    }
    if (rest_.empty()) return;
    const char c = rest_[0];
    if (marker_ == 0) {
      const FileKind kind = kind_of(rest_);
      if (kind == FileKind::sam || kind == FileKind::bam || kind == FileKind::cram)
        throw Error(
            fmt::format("{}: SAM, BAM or CRAM, where FASTA or FASTQ was expected", file_name()),
            paths_[file_] == "-" ? "coil classify and score read it with --alignments"
                                 : "samtools fastq makes FASTQ of it");
      check(c == '>' || c == '@',
            "{}: line {} begins with {}; a FASTA ('>') or FASTQ ('@') header was expected",
            file_name(), line_, dna::describe(c));
      marker_ = c;
    }
    check(c == marker_, "{}: line {} begins with {}; the next header ('{}') was expected",
          file_name(), line_, dna::describe(c), marker_);
    rest_.remove_prefix(1);
    state_ = State::name;
    name_.clear();
  }

  void read_name(Segment& segment) {
    if (name_.empty())  // "> name" is common
      while (!rest_.empty() && (rest_[0] == ' ' || rest_[0] == '\t')) rest_.remove_prefix(1);
    const size_t end = std::find_if(rest_.begin(), rest_.end(), is_space) - rest_.begin();
    check_nul(rest_.substr(0, end));
    name_.append(rest_.substr(0, end));
    check(name_.size() <= kLongestName, "{}: the name in line {} is longer than {} bytes",
          file_name(), line_, kLongestName);
    rest_.remove_prefix(end);
    if (rest_.empty()) return;  // the name may go on in the next block
    begin_record(segment);
  }

  void begin_record(Segment& segment) {
    check(!name_.empty(), "{}: the record in line {} has no name", file_name(), line_);
    if (unique_names_ && marker_ == '>' && !seen_.insert(name_))
      throw Error(
          fmt::format("{}: line {}: a second record is named '{}'", file_name(), line_, name_),
          "`seqkit rename` makes names unique");
    segment.first = true;
    segment.name = name_;
    segment.record = ++record_;
    segment.position = length_ = 0;
    segment.file = file_;
    ++records_;
    qualities_ = 0;
    state_ = State::description;
  }

  void skip_line(State then) {
    const size_t end = rest_.find('\n');
    check_nul(rest_.substr(0, end));
    if (end == std::string_view::npos) {
      rest_ = {};
      return;
    }
    rest_.remove_prefix(end + 1);
    ++line_;
    line_start_ = true;
    state_ = then;
  }

  // Fills the segment; true when it is full and the record goes on, or the record is whole.
  bool read_sequence(Segment& segment) {
    const dna::Gaps gaps = marker_ == '>' ? dna::Gaps::skip : dna::Gaps::as_n;
    if (!segment.first && segment.codes.empty()) {
      segment.record = record_;
      segment.file = file_;
      segment.position = length_;
    }
    while (!rest_.empty()) {
      if (line_start_ && rest_[0] == (marker_ == '>' ? '>' : '+')) {
        state_ = marker_ == '>' ? State::between : State::plus;
        return end_record(segment);
      }
      const size_t end = std::min(rest_.find('\n'), rest_.size());
      const size_t room = kRun - segment.codes.size();
      std::string_view text = rest_.substr(0, std::min(end, room));
      if (room == 0 && end > 0) {
        if (!dna::is_skipped(rest_[0], gaps)) return true;  // another base: the record goes on
        text = rest_.substr(0, 1);
      }
      const size_t before = segment.codes.size();
      const size_t read = dna::encode(text, gaps, segment.codes);
      length_ += static_cast<int64_t>(segment.codes.size() - before);
      if (read < text.size()) fail_letter(text[read]);
      line_start_ = line_start_ && text.empty();
      rest_.remove_prefix(text.size());
      if (text.size() == end && !rest_.empty()) {
        rest_.remove_prefix(1);
        ++line_;
        line_start_ = true;
      }
    }
    return false;
  }

  bool end_record(Segment& segment) {
    check(length_ > 0, "{}: record '{}' (before line {}) is empty", file_name(), name_, line_);
    segment.last = true;
    return true;
  }

  void read_quality() {
    const size_t end = rest_.find('\n');
    std::string_view text = rest_.substr(0, end);
    check_nul(text);
    qualities_ += static_cast<int64_t>(text.size()) - (!text.empty() && text.back() == '\r');
    check(qualities_ <= length_,
          "{}: line {}: record '{}' has {} bases and another number of qualities", file_name(),
          line_, name_, length_);
    rest_.remove_prefix(text.size());
    if (end == std::string_view::npos) return;
    rest_.remove_prefix(1);
    ++line_;
    if (qualities_ == length_) state_ = State::between;
  }

  // True: the last record of the file was waiting for this.
  bool end_of_file(Segment& segment) {
    bool whole = false;
    if (state_ == State::name) begin_record(segment);
    if (state_ == State::description || (state_ == State::sequence && marker_ == '>')) {
      whole = end_record(segment);
    } else if (state_ != State::between) {
      check(state_ == State::quality && qualities_ == length_,
            "{}: truncated: it ends inside record '{}', which has {} bases and {} qualities",
            file_name(), name_, length_, qualities_);
    }
    check(records_ > 0, "{}: no records", file_name());
    stream_.reset();
    return whole;
  }

  void check_nul(std::string_view text) const {
    check(text.find('\0') == std::string_view::npos, "{}: NUL byte in line {}", file_name(), line_);
  }

  [[noreturn]] void fail_letter(char c) const {
    if (c == '\0') fail("{}: NUL byte in line {}", file_name(), line_);
    fail("{}: record '{}' has {} at base {} (line {}), {}", file_name(), name_, dna::describe(c),
         length_ + 1, line_, dna::why_not_dna(c));
  }

  const std::vector<std::string> paths_;
  const bool unique_names_;
  std::unique_ptr<ByteStream> stream_;
  std::string_view rest_;  // of the block, not yet read
  int64_t next_file_ = 0, file_ = 0, record_ = -1;
  // of the file
  State state_ = State::between;
  char marker_ = 0;  // '>' or '@' of its first record
  int64_t line_ = 1, records_ = 0;
  NameSet seen_;
  // of the record
  std::string name_;
  int64_t length_ = 0, qualities_ = 0;
  bool line_start_ = true;
};

// "read7/1" -> "read7"; the separators of other tools too where two names are compared.
std::string_view pair_name(std::string_view name, std::string_view separators) {
  const size_t n = name.size();
  const bool marked = n > 2 && (name[n - 1] == '1' || name[n - 1] == '2') &&
                      separators.find(name[n - 2]) != std::string_view::npos;
  return marked ? name.substr(0, n - 2) : name;
}

bool are_mates(std::string_view first, std::string_view second) {
  return first == second || pair_name(first, "/._") == pair_name(second, "/._");
}

class PairReader final : public Source {
 public:
  PairReader(const std::string& first, const std::string& second) : paths_{first, second} {
    const bool interleaved = second.empty();
    sources_[0] = read_ahead(std::make_unique<FastaReader>(std::vector{first}, !interleaved));
    if (!interleaved) sources_[1] = open_fasta({second});
  }

  bool next(Segment& segment) override {
    const bool second = record_ % 2 == 1;
    Source& source = second && sources_[1] ? *sources_[1] : *sources_[0];
    if (!source.next(segment)) {
      if (second) fail("{}: '{}' has no mate", sources_[1] ? paths_[1] : paths_[0], name_);
      if (sources_[1])
        check(!sources_[1]->next(segment), "{}: '{}' has no mate in {}", paths_[1], segment.name,
              paths_[0]);
      return false;
    }
    if (segment.first && !second) name_ = segment.name;
    if (segment.first) {
      check(are_mates(name_, segment.name), "{}: '{}' stands where the mate of '{}' was expected",
            second && sources_[1] ? paths_[1] : paths_[0], segment.name, name_);
      segment.name = pair_name(name_, "/");
    }
    segment.record = record_;
    segment.file = second && sources_[1] ? 1 : 0;
    record_ += segment.last;
    return true;
  }

  double fraction() const override { return sources_[0]->fraction(); }

 private:
  const std::string paths_[2];
  std::unique_ptr<Source> sources_[2];
  int64_t record_ = 0;
  std::string name_;  // of the first mate
};

}  // namespace

FileKind sniff(const std::string& path) { return kind_of(ByteStream(path).block()); }

std::unique_ptr<Source> open_fasta(std::vector<std::string> paths, bool unique_names) {
  return read_ahead(std::make_unique<FastaReader>(std::move(paths), unique_names));
}

std::unique_ptr<Source> open_pairs(const std::string& first, const std::string& second) {
  return std::make_unique<PairReader>(first, second);
}

}  // namespace coil
