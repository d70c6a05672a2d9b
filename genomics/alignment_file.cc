#include "genomics/alignment_file.h"

#include <htslib/bgzf.h>
#include <htslib/cram.h>
#include <htslib/faidx.h>
#include <htslib/hfile.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string_view>

#include "genomics/byte_stream.h"
#include "kernels/error.h"

namespace coil {
namespace {

// Unset, htslib's REF_PATH stands for a server. Anything in it that is a URL goes; if nothing is
// left, the local cache takes its place, which htslib would ask first.
void keep_references_local() {
  static std::once_flag once;
  std::call_once(once, [] {
    const auto variable = [](const char* name) {
      const char* value = std::getenv(name);
      return std::string(value ? value : "");
    };
    std::string path = variable("REF_PATH");
    if (!path.empty() && path.find("://") == std::string::npos) return;
    path = variable("REF_CACHE");
    if (path.empty()) {
      std::string cache = variable("XDG_CACHE_HOME");
      if (cache.empty()) cache = variable("HOME") + "/.cache";
      path = cache + "/hts-ref/%2s/%2s/%s";
    }
    ::setenv("REF_PATH", path.c_str(), 1);
  });
}

// htslib falls back to the place that the header's UR field names: a server too, and of a file that
// is not there it complains on stderr.
void keep_local_places(htsFile* file) {
  sam_hdr_t* header = cram_fd_get_header(file->fp.cram);
  kstring_t place = KS_INITIALIZE;
  for (int i = 0; i < sam_hdr_nref(header); ++i) {
    const char* name = sam_hdr_tid2name(header, i);
    if (sam_hdr_find_tag_id(header, "SQ", "SN", name, "UR", &place) != 0) continue;
    std::string_view path(place.s, place.l);
    if (path.starts_with("file:")) path.remove_prefix(5);
    if (hisremote(place.s) || ::access(std::string(path).c_str(), R_OK) != 0)
      sam_hdr_remove_tag_id(header, "SQ", "SN", name, "UR");
  }
  ks_free(&place);
}

}  // namespace

void set_reference(htsFile* file, const std::string& name, const std::string& reference) {
  if (reference.empty()) return;
  faidx_t* index = fai_load3(reference.c_str(), nullptr, nullptr, FAI_CREATE);
  if (!index)
    throw Error(fmt::format("{}: the reference cannot be read or has no index ({}.fai)", reference,
                            reference),
                fmt::format("samtools faidx {}", reference));
  fai_destroy(index);
  check(hts_set_fai_filename(file, reference.c_str()) == 0, "{}: the reference {} cannot be read",
        name, reference);
}

AlignmentFile::AlignmentFile(const std::string& path, const AlignmentOptions& options)
    : options_(options), name_(path == "-" ? "standard input" : path), record_(bam_init1()) {
  silence_htslib();
  keep_references_local();
  errno = 0;
  file_.reset(hts_open(path.c_str(), "r"));
  check(file_ != nullptr, "{}: cannot open: {}", name_,
        errno ? std::strerror(errno) : "SAM, BAM or CRAM was expected");
  const htsExactFormat format = file_->format.format;
  check(format == sam || format == bam || format == cram, "{}: SAM, BAM or CRAM was expected",
        name_);
  check(hts_check_EOF(file_.get()) != 0, "{}: truncated: the end marker is missing", name_);
  if (format == cram) {
    set_reference(file_.get(), name_, options.reference);
    keep_local_places(file_.get());
  }
  header_.reset(sam_hdr_read(file_.get()));
  check(header_ != nullptr, "{}: the header is truncated or damaged", name_);
  // Not before the header: htslib 1.16 asks the pool for the end marker then, and waits for ever
  // where the pool has already come to the end of a short or broken pipe.
  if (options.threads > 1) hts_set_threads(file_.get(), options.threads);
}

bool AlignmentFile::read() {
  const int status = sam_read1(file_.get(), header_.get(), record_.get());
  if (status < -1) fail_read();
  if (status >= 0) {
    ++records_;
    return true;
  }
  // From a pipe the end marker is known to be missing only now.
  const BGZF* blocks =
      file_->format.format != cram && file_->format.compression == bgzf ? file_->fp.bgzf : nullptr;
  check(!blocks || !blocks->no_eof_block, "{}: truncated: the end marker is missing", name_);
  return false;
}

void AlignmentFile::fail_read() const {
  if (file_->format.format == cram && options_.reference.empty())
    throw Error(
        fmt::format(
            "{}: record {} cannot be decoded: its reference is not at hand, or the data is damaged",
            name_, records_ + 1),
        "give the FASTA that it was written with as --reference");
  if (file_->format.format == cram)
    fail("{}: record {} cannot be decoded: {} is not its reference, or the data is damaged", name_,
         records_ + 1, options_.reference);
  fail("{}: truncated or damaged at record {}", name_, records_ + 1);
}

bool AlignmentFile::counted() const {
  const uint16_t flag = record_->core.flag;
  if ((flag & BAM_FSECONDARY) && !options_.secondary) return false;
  if ((flag & BAM_FSUPPLEMENTARY) && !options_.supplementary) return false;
  return record_->core.l_qseq > 0;
}

}  // namespace coil
