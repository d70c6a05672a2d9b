#include "genomics/intervals.h"

#include <htslib/bgzf.h>
#include <htslib/faidx.h>

#include <charconv>
#include <cstdlib>
#include <string_view>
#include <unordered_map>
#include <utility>

#include "genomics/alphabet.h"
#include "genomics/byte_stream.h"
#include "genomics/fasta.h"
#include "genomics/read_ahead.h"
#include "kernels/error.h"

namespace coil {
namespace {

// A whole number, with commas where allowed; false for anything else.
bool parse_number(std::string_view text, bool commas, int64_t& value) {
  std::string digits;
  for (char c : text) {
    if (commas && c == ',' && !digits.empty()) continue;
    if (c < '0' || c > '9') return false;
    digits += c;
  }
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  return error == std::errc() && !digits.empty();
}

// "from", "from-", "from-to" or "-to" into 0-based, half open; false where it is none of them.
bool parse_range(std::string_view text, int64_t& begin, int64_t& end) {
  const size_t dash = text.find('-');
  const std::string_view from = text.substr(0, dash);
  const std::string_view to = dash == std::string_view::npos ? "" : text.substr(dash + 1);
  if (from.empty() && to.empty()) return false;
  int64_t first = 1, last = INT64_MAX;
  if (!from.empty() && !parse_number(from, true, first)) return false;
  if (!to.empty() && !parse_number(to, true, last)) return false;
  begin = first - 1;
  end = last;
  return true;
}

std::vector<std::string_view> fields_of(std::string_view line) {
  const std::string_view separators = line.find('\t') == std::string_view::npos ? " " : "\t";
  std::vector<std::string_view> fields;
  for (size_t begin = 0; begin < line.size();) {
    const size_t end = std::min(line.find_first_of(separators, begin), line.size());
    if (end > begin) fields.push_back(line.substr(begin, end - begin));
    begin = end + 1;
  }
  return fields;
}

struct CloseIndex {
  void operator()(faidx_t* index) const { fai_destroy(index); }
};
using Index = std::unique_ptr<faidx_t, CloseIndex>;

Index open_index(const std::string& fasta) {
  silence_htslib();
  check(fasta != "-", "standard input has no index; regions need a FASTA file");
  check(sniff(fasta) == FileKind::fasta, "{}: not FASTA, which regions need", fasta);
  BGZF* file = bgzf_open(fasta.c_str(), "r");
  const bool gzip = file && bgzf_compression(file) == 1;
  if (file) bgzf_close(file);
  if (gzip)
    throw Error(
        fmt::format("{}: compressed by gzip, which cannot be indexed; bgzip or plain was expected",
                    fasta),
        fmt::format("gunzip -c {} | bgzip > FASTA.gz; samtools faidx FASTA.gz", fasta));
  Index index(fai_load3(fasta.c_str(), nullptr, nullptr, FAI_CREATE));
  if (!index)
    throw Error(fmt::format("{}: its index ({}.fai) is missing or damaged and could not be made",
                            fasta, fasta),
                fmt::format("samtools faidx {}", fasta));
  return index;
}

// From the .fai: htslib 1.16 gives lengths as int, too short for 2^31 bases.
std::unordered_map<std::string, int64_t> sequence_lengths(const std::string& fasta) {
  std::unordered_map<std::string, int64_t> lengths;
  ByteStream stream(fasta + ".fai");
  for (std::string line; stream.line(line);) {
    const size_t tab = line.find('\t');
    int64_t length = 0;
    const bool ok =
        tab != std::string::npos &&
        parse_number(std::string_view(line).substr(tab + 1, line.find('\t', tab + 1) - tab - 1),
                     false, length);
    check(ok, "{}: damaged index", stream.name());
    lengths.emplace(line.substr(0, tab), length);
  }
  return lengths;
}

class RegionReader final : public Source {
 public:
  RegionReader(std::string fasta, Index index, std::vector<Interval> intervals)
      : fasta_(std::move(fasta)), index_(std::move(index)), intervals_(std::move(intervals)) {}

  bool next(Segment& segment) override {
    if (record_ == static_cast<int64_t>(intervals_.size())) return false;
    const Interval& region = intervals_[record_];
    const int64_t begin = region.begin + position_;
    const int64_t count = std::min(kRun, region.end - begin);
    segment.record = record_;
    segment.file = 0;
    segment.position = position_;
    segment.offset = region.begin;
    segment.first = position_ == 0;
    segment.last = begin + count == region.end;
    segment.name =
        segment.first ? fmt::format("{}:{}-{}", region.name, region.begin + 1, region.end) : "";
    fetch(region, begin, count, segment.codes);
    position_ += count;
    if (segment.last) {
      ++record_;
      position_ = 0;
    }
    return true;
  }

  double fraction() const override {
    return static_cast<double>(record_) / static_cast<double>(intervals_.size());
  }

 private:
  void fetch(const Interval& region, int64_t begin, int64_t count,
             std::vector<uint8_t>& codes) const {
    hts_pos_t length = 0;
    const std::unique_ptr<char, decltype(&std::free)> text(
        faidx_fetch_seq64(index_.get(), region.name.c_str(), begin, begin + count - 1, &length),
        &std::free);
    check(text && length == count,
          "{}: sequence '{}' cannot be read at base {}: truncated, or the index is of another file",
          fasta_, region.name, begin + 1);
    codes.clear();
    const std::string_view letters(text.get(), static_cast<size_t>(length));
    const size_t read = dna::encode(letters, dna::Gaps::as_n, codes);
    if (read < letters.size())
      fail("{}: sequence '{}' has {} at base {}, {}", fasta_, region.name,
           dna::describe(letters[read]), begin + static_cast<int64_t>(read) + 1,
           dna::why_not_dna(letters[read]));
  }

  const std::string fasta_;
  const Index index_;
  const std::vector<Interval> intervals_;
  int64_t record_ = 0, position_ = 0;
};

}  // namespace

Interval parse_region(const std::string& text) {
  Interval region{.name = text, .text = text};
  std::string_view range;
  const size_t brace = text.starts_with('{') ? text.find('}') : std::string::npos;
  if (brace != std::string::npos) {
    region.name = text.substr(1, brace - 1);
    range = std::string_view(text).substr(brace + 1);
    region.text.clear();  // braces say that the name ends here
    if (!range.empty()) {
      const bool ok = range[0] == ':' && parse_range(range.substr(1), region.begin, region.end);
      check(ok, "region '{}': a range like :1,000-2,000 was expected after '}}'", text);
    }
  } else if (const size_t colon = text.rfind(':'); colon != std::string::npos) {
    if (parse_range(std::string_view(text).substr(colon + 1), region.begin, region.end))
      region.name = text.substr(0, colon);
  }
  check(!region.name.empty(), "region '{}': a sequence's name was expected, as in chr1:1,000-2,000",
        text);
  check(region.begin >= 0, "region '{}': positions count from 1", text);
  check(region.begin < region.end, "region '{}' ends before it begins", text);
  return region;
}

std::vector<Interval> read_bed(const std::string& path) {
  std::vector<Interval> intervals;
  ByteStream stream(path);
  int64_t number = 0;
  for (std::string line; stream.line(line);) {
    ++number;
    const std::vector<std::string_view> fields = fields_of(line);
    if (fields.empty() || line[0] == '#' || fields[0] == "track" || fields[0] == "browser")
      continue;
    check(fields.size() >= 3, "{}: line {} has {} columns; name, begin and end were expected",
          stream.name(), number, fields.size());
    Interval interval{.name = std::string(fields[0])};
    const bool ok = parse_number(fields[1], false, interval.begin) &&
                    parse_number(fields[2], false, interval.end);
    check(ok, "{}: line {}: '{}' and '{}' are no positions", stream.name(), number, fields[1],
          fields[2]);
    check(interval.begin < interval.end, "{}: line {}: the interval {}-{} is empty", stream.name(),
          number, interval.begin, interval.end);
    intervals.push_back(std::move(interval));
  }
  check(!intervals.empty(), "{}: no intervals", stream.name());
  return intervals;
}

std::unique_ptr<Source> open_regions(const std::string& fasta, std::vector<Interval> intervals) {
  check(!intervals.empty(), "{}: no regions asked for", fasta);
  Index index = open_index(fasta);
  const std::unordered_map<std::string, int64_t> lengths = sequence_lengths(fasta);
  for (Interval& interval : intervals) {
    if (!interval.text.empty() && lengths.contains(interval.text)) {
      interval.name = interval.text;
      interval.begin = 0;
      interval.end = INT64_MAX;
    }
    const auto found = lengths.find(interval.name);
    check(found != lengths.end(), "{}: no sequence '{}' in it", fasta, interval.name);
    check(interval.begin < found->second,
          "{}: the region begins at {}, past the end of '{}' ({} bases)", fasta, interval.begin + 1,
          interval.name, found->second);
    interval.end = std::min(interval.end, found->second);
  }
  return read_ahead(std::make_unique<RegionReader>(fasta, std::move(index), std::move(intervals)));
}

}  // namespace coil
