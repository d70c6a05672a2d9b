#include "genomics/alignment.h"

#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <utility>

#include "genomics/alignment_file.h"
#include "genomics/alphabet.h"
#include "genomics/byte_stream.h"
#include "genomics/read_ahead.h"
#include "kernels/error.h"

namespace coil {
namespace {

// Of BAM's four-bit letters "=ACMGRSVTWYHKDBN".
constexpr std::array<uint8_t, 16> kCodeOf = [] {
  std::array<uint8_t, 16> codes{};
  codes.fill(dna::kN);
  codes[0] = dna::kInvalid;
  codes[1] = dna::kA;
  codes[2] = dna::kC;
  codes[4] = dna::kG;
  codes[8] = dna::kT;
  return codes;
}();

class AlignmentReader final : public Source {
 public:
  AlignmentReader(const std::string& path, const AlignmentOptions& options)
      : file_(path, options) {}

  bool next(Segment& segment) override {
    if (position_ == length_) {
      do {
        if (!file_.read()) return false;
      } while (!file_.counted());
      ++record_;
      position_ = 0;
      length_ = file_.record()->core.l_qseq;
    }
    const bam1_t* record = file_.record();
    const bool reverse = bam_is_rev(record);
    const int64_t count = std::min(kRun, length_ - position_);
    const int64_t begin = reverse ? length_ - position_ - count : position_;
    const uint8_t* letters = bam_get_seq(record);
    segment.codes.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t code = kCodeOf[bam_seqi(letters, begin + i)];
      check(code != dna::kInvalid,
            "{}: record '{}' has '=' at base {}, which stands for its reference; letters were "
            "expected",
            file_.name(), bam_get_qname(record), begin + i + 1);
      segment.codes[i] = code;
    }
    if (reverse) dna::reverse_complement(segment.codes);
    segment.record = record_;
    segment.file = 0;
    segment.position = position_;
    segment.offset = 0;
    segment.first = position_ == 0;
    segment.name = segment.first ? bam_get_qname(record) : "";
    position_ += count;
    segment.last = position_ == length_;
    return true;
  }

 private:
  AlignmentFile file_;
  int64_t record_ = -1, position_ = 0, length_ = 0;
};

// The letters of hts_open's mode by the file's ending.
const char* mode_of(const std::string& path) {
  constexpr std::pair<std::string_view, const char*> kEndings[] = {
      {".bam", "wb"}, {".cram", "wc"}, {".sam", "w"}, {".sam.gz", "wz"}};
  for (const auto& [ending, mode] : kEndings)
    if (path.ends_with(ending)) return mode;
  throw UsageError(
      fmt::format("{}: a name ending in .bam, .cram, .sam or .sam.gz was expected", path));
}

}  // namespace

std::unique_ptr<Source> open_alignments(const std::string& path, const AlignmentOptions& options) {
  return read_ahead(std::make_unique<AlignmentReader>(path, options));
}

struct TagWriter::Impl {
  Impl(const std::string& in_path, const std::string& out_path, const AlignmentOptions& options,
       const std::string& version, const std::string& command_line)
      : mode(mode_of(out_path)),
        path(out_path),
        temporary(out_path + ".tmp"),
        in(checked(in_path), options) {
    struct stat status {};
    check(::stat(path.c_str(), &status) != 0 || S_ISREG(status.st_mode),
          "{}: is a folder, pipe or device; alignments are written to a file", path);
    if (mode[1] == 'c' && options.reference.empty())
      throw Error(fmt::format("{}: writing CRAM needs the reference", path),
                  "give the FASTA as --reference");
    add_program(version, command_line);
  }

  void open(const AlignmentOptions& options) {
    errno = 0;
    out.reset(hts_open(temporary.c_str(), mode));
    if (!out) fail_write();
    if (options.threads > 1) hts_set_threads(out.get(), options.threads);
    if (mode[1] == 'c') set_reference(out.get(), path, options.reference);
    if (sam_hdr_write(out.get(), in.header()) != 0) fail_write();
  }

  ~Impl() {
    if (closed) return;
    out.reset();
    std::remove(temporary.c_str());
  }

  static const std::string& checked(const std::string& in_path) {
    check(in_path != "-", "standard input cannot be read twice; tagging needs a file");
    return in_path;
  }

  void add_program(const std::string& version, std::string command_line) {
    for (char& c : command_line)
      if (c == '\t' || c == '\n' || c == '\r') c = ' ';
    const char* line = command_line.empty() ? nullptr : command_line.c_str();
    const int status = sam_hdr_add_pg(in.header(), "coil", "VN", version.c_str(),
                                      line ? "CL" : nullptr, line, nullptr);
    check(status == 0, "{}: no @PG line can be added to its header", in.name());
  }

  [[noreturn]] void fail_write() const {
    fail("{}: cannot write: {}", path, errno ? std::strerror(errno) : "input/output error");
  }

  void write() {
    errno = 0;
    if (sam_write1(out.get(), in.header(), in.record()) < 0) fail_write();
  }

  // A tag of another type would be refused: it goes and the new one is appended.
  void drop_unless(const char* tag, char type) {
    uint8_t* old = bam_aux_get(in.record(), tag);
    if (old && *old != type) bam_aux_del(in.record(), old);
  }

  const char* const mode;
  const std::string path, temporary;
  AlignmentFile in;
  HtsPointer<htsFile> out;
  bool closed = false;
};

TagWriter::TagWriter(const std::string& in, const std::string& out, const AlignmentOptions& options,
                     const std::string& version, const std::string& command_line)
    : impl_(std::make_unique<Impl>(in, out, options, version, command_line)) {
  impl_->open(options);  // from here on the temporary file is removed on failure
}

TagWriter::~TagWriter() = default;

void TagWriter::answer(const std::string& label, double probability) {
  Impl& writer = *impl_;
  for (;;) {
    check(writer.in.read(), "{}: has fewer records than when it was first read", writer.in.name());
    if (writer.in.counted()) break;
    writer.write();
  }
  std::string text = label;
  for (char& c : text)
    if (c < ' ' || c > '~') c = '_';
  writer.drop_unless("YC", 'Z');
  writer.drop_unless("YP", 'f');
  bam1_t* record = writer.in.record();
  const bool ok =
      bam_aux_update_str(record, "YC", static_cast<int>(text.size() + 1), text.c_str()) == 0 &&
      bam_aux_update_float(record, "YP", static_cast<float>(probability)) == 0;
  check(ok, "{}: record '{}' cannot take another tag: its tags are damaged", writer.in.name(),
        bam_get_qname(record));
  writer.write();
}

void TagWriter::close() {
  Impl& writer = *impl_;
  while (writer.in.read()) {
    check(!writer.in.counted(), "{}: has more records than when it was first read",
          writer.in.name());
    writer.write();
  }
  errno = 0;
  if (hts_close(writer.out.release()) != 0) writer.fail_write();
  errno = 0;
  const HtsPointer<htsFile> written(hts_open(writer.temporary.c_str(), "r"));
  if (!written || hts_check_EOF(written.get()) == 0) writer.fail_write();
  errno = 0;
  if (std::rename(writer.temporary.c_str(), writer.path.c_str()) != 0) writer.fail_write();
  writer.closed = true;
}

}  // namespace coil
