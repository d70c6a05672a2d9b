#include "audio/container.h"

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>

#include "kernels/error.h"

namespace coil::audio {
namespace {

class File {
 public:
  explicit File(const std::string& path) : in_(path, std::ios::binary) {
    std::error_code error;
    const auto bytes = std::filesystem::file_size(path, error);
    if (!error) bytes_ = static_cast<int64_t>(bytes);
  }
  int64_t bytes() const { return bytes_; }  // 0 of what is no regular file
  std::string read(int64_t from, int64_t count) {
    from = std::max<int64_t>(0, from);
    std::string text(static_cast<size_t>(std::clamp<int64_t>(bytes_ - from, 0, count)), '\0');
    in_.seekg(from);
    in_.read(text.data(), static_cast<std::streamsize>(text.size()));
    text.resize(static_cast<size_t>(in_.gcount()));
    return text;
  }

 private:
  std::ifstream in_;
  int64_t bytes_ = 0;
};

// Little endian; 0 where the text is shorter.
int64_t number(const std::string& text, size_t at, size_t width) {
  if (text.size() < at + width) return 0;
  uint64_t value = 0;
  for (size_t i = 0; i < width; ++i)
    value |= uint64_t{static_cast<uint8_t>(text[at + i])} << (8 * i);
  return static_cast<int64_t>(value);
}

// The last page is whole and says that its stream ends (RFC 3533).
bool ogg_ends(File& file) {
  constexpr int64_t kMostPage = 65'307;
  constexpr size_t kHeader = 27;  // then a table of the lengths of segments
  const std::string tail = file.read(file.bytes() - kMostPage, kMostPage);
  const size_t page = tail.rfind("OggS");
  if (page == std::string::npos || page + kHeader > tail.size()) return false;
  const auto segments = static_cast<size_t>(number(tail, page + 26, 1));
  size_t size = kHeader + segments;
  for (size_t i = 0; i < segments; ++i)
    size += static_cast<size_t>(number(tail, page + kHeader + i, 1));
  return (tail[page + 5] & 4) != 0 && page + size <= tail.size();
}

}  // namespace

void check_end(const std::string& path) {
  File file(path);
  const std::string begin = file.read(0, 64);
  int64_t said = 0;
  if (begin.starts_with("OggS"))
    check(ogg_ends(file), "{}: truncated: its last page does not end the stream", path);
  else if (begin.starts_with("RF64") && begin.compare(12, 4, "ds64") == 0)
    said = number(begin, 20, 8) + 8;
  else if (begin.starts_with("riff"))  // Wave64
    said = number(begin, 16, 8);
  check(said <= file.bytes(), "{}: truncated: its header says {} bytes, {} are there", path, said,
        file.bytes());
}

std::string wav_header_text(const std::string& path) {
  const std::string begin = File(path).read(0, 28);
  if (begin.size() < 28 || !begin.starts_with("RIFF") || begin.compare(12, 4, "fmt ") != 0)
    return "";
  return fmt::format(": {} Hz, {} channels", number(begin, 24, 4), number(begin, 22, 2));
}

}  // namespace coil::audio
