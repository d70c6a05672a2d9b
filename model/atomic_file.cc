#include "model/atomic_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "kernels/error.h"

namespace coil {

AtomicFile::AtomicFile(const std::string& path) : path_(path), partial_(path + ".tmp") {
  descriptor_ = ::open(partial_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  check(descriptor_ >= 0, "cannot write '{}': {}", partial_, std::strerror(errno));
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(partial_.c_str());
}

void AtomicFile::write(const void* data, size_t bytes) {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(descriptor_, from, bytes);
    if (written < 0 && errno == EINTR) continue;
    check(written > 0, "cannot write '{}': {}", path_, std::strerror(written < 0 ? errno : ENOSPC));
    from += written;
    bytes -= static_cast<size_t>(written);
  }
}

void AtomicFile::commit() {
  const bool synced = ::fsync(descriptor_) == 0;  // before errno is looked at
  check(synced, "cannot write '{}': {}", path_, std::strerror(errno));
  const bool renamed = ::rename(partial_.c_str(), path_.c_str()) == 0;
  check(renamed, "cannot rename '{}' to '{}': {}", partial_, path_, std::strerror(errno));
  ::close(descriptor_);
  descriptor_ = -1;
  sync_folder(std::filesystem::path(path_).parent_path().string());
}

void write_file_atomically(const std::string& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

void sync_folder(const std::string& folder) {
  const std::string name = folder.empty() ? "." : folder;
  const int descriptor = ::open(name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  check(descriptor >= 0, "cannot open folder '{}': {}", name, std::strerror(errno));
  // Some network file systems refuse fsync of a folder with EINVAL; the rename itself stands.
  const int status = ::fsync(descriptor) == 0 || errno == EINVAL ? 0 : errno;
  ::close(descriptor);
  check(status == 0, "cannot sync folder '{}': {}", name, std::strerror(status));
}

std::string read_file(const std::string& path, int64_t limit) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  check(descriptor >= 0, "cannot open '{}': {}", path, std::strerror(errno));
  std::string text;
  char block[1 << 16];
  ssize_t bytes;
  while ((bytes = ::read(descriptor, block, sizeof block)) != 0) {
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes > 0) text.append(block, static_cast<size_t>(bytes));
    if (bytes < 0 || static_cast<int64_t>(text.size()) > limit) break;
  }
  const int status = bytes < 0 ? errno : 0;
  ::close(descriptor);
  check(status == 0, "cannot read '{}': {}", path, std::strerror(status));
  check(static_cast<int64_t>(text.size()) <= limit, "'{}' is longer than {} bytes", path, limit);
  return text;
}

}  // namespace coil
