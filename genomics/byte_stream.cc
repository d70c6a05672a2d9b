#include "genomics/byte_stream.h"

#include <htslib/bgzf.h>
#include <htslib/hfile.h>
#include <htslib/hts_log.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "kernels/error.h"

namespace coil {

void silence_htslib() { hts_set_log_level(HTS_LOG_OFF); }

struct ByteStream::Impl {
  static constexpr size_t kBlock = 1 << 18;
  BGZF* file = nullptr;
  int64_t bytes = 0;  // of the file; 0: a pipe
  std::vector<char> buffer = std::vector<char>(kBlock);
  ~Impl() {
    if (file) bgzf_close(file);
  }
};

ByteStream::ByteStream(const std::string& path)
    : impl_(std::make_unique<Impl>()), name_(path == "-" ? "standard input" : path) {
  silence_htslib();
  errno = 0;
  impl_->file = bgzf_open(path.c_str(), "r");
  check(impl_->file, "{}: cannot open: {}", name_, errno ? std::strerror(errno) : "not readable");
  struct stat status {};
  if (path != "-" && stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode))
    impl_->bytes = status.st_size;
}

ByteStream::~ByteStream() = default;

double ByteStream::fraction() const {
  if (impl_->bytes == 0) return -1;
  return static_cast<double>(htell(impl_->file->fp)) / static_cast<double>(impl_->bytes);
}

std::string_view ByteStream::block() {
  errno = 0;
  const ssize_t n = bgzf_read(impl_->file, impl_->buffer.data(), impl_->buffer.size());
  if (n < 0) {
    const int reason = errno;
    // A read that failed in the operating system (a folder, a broken disk) has errno; bad data has
    // none.
    const bool compressed = impl_->file->is_compressed;
    if (!compressed || reason == EISDIR || reason == EIO)
      fail("{}: cannot read: {}", name_, reason ? std::strerror(reason) : "input/output error");
    fail("{}: the compressed data is truncated or damaged", name_);
  }
  // A bgzip file cut between two blocks reads without an error: only its empty last block is
  // missing.
  if (n == 0 && impl_->file->no_eof_block)
    fail("{}: the bgzip end marker is missing: the file is truncated", name_);
  return {impl_->buffer.data(), static_cast<size_t>(n)};
}

bool ByteStream::line(std::string& text) {
  text.clear();
  bool any = false;
  for (;;) {
    if (rest_.empty() && (rest_ = block()).empty()) break;
    any = true;
    const size_t end = rest_.find('\n');
    text.append(rest_.substr(0, end));
    if (end == std::string_view::npos) {
      rest_ = {};
      continue;
    }
    rest_.remove_prefix(end + 1);
    break;
  }
  if (!text.empty() && text.back() == '\r') text.pop_back();
  return any;
}

}  // namespace coil
