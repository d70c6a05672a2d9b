// Files that are whole or absent: written to path.tmp, fsynced, renamed over path, and the folder
// fsynced, so that a kill or a full disk at any moment leaves the old file or the new one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace coil {

class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path);  // throws naming the path and the reason
  ~AtomicFile();  // not committed: path.tmp is removed, path left as it was
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  void write(const void* data, size_t bytes);
  void commit();

 private:
  std::string path_, partial_;
  int descriptor_ = -1;
};

void write_file_atomically(const std::string& path, const std::string& text);

// fsync of a folder: makes renames and new files in it durable.
void sync_folder(const std::string& folder);

// The whole of a small file. Throws where it cannot be read or is longer than `limit`.
std::string read_file(const std::string& path, int64_t limit);

}  // namespace coil
