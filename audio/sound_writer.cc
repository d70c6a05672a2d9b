#include "audio/sound_writer.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/error.h"

namespace coil::audio {

std::array<uint8_t, kWavHeader> wav_header(int64_t rate, int64_t bytes) {
  constexpr int64_t kLargest = 0xffffffff;
  constexpr int64_t kLong = 28;                 // of ds64, and of what keeps its place
  const int64_t riff = kWavHeader - 8 + bytes;  // all that follows the length itself
  const bool is_long = riff > kLargest;
  std::array<uint8_t, kWavHeader> header{};
  size_t at = 0;
  const auto text = [&](const char* name) {
    std::memcpy(header.data() + at, name, 4);
    at += 4;
  };
  const auto number = [&](int64_t value, int width) {
    for (int i = 0; i < width; ++i) header[at++] = static_cast<uint8_t>(value >> (8 * i));
  };
  text(is_long ? "RF64" : "RIFF");
  number(is_long ? kLargest : riff, 4);
  text("WAVE");
  text(is_long ? "ds64" : "JUNK");
  number(kLong, 4);
  number(is_long ? riff : 0, 8);
  number(is_long ? bytes : 0, 8);
  number(is_long ? bytes / 2 : 0, 8);  // samples
  number(0, 4);                        // no table of other long chunks
  text("fmt ");
  number(16, 4);
  number(1, 2);  // PCM
  number(1, 2);  // channel
  number(rate, 4);
  number(2 * rate, 4);  // bytes a second
  number(2, 2);         // bytes a sample of all channels
  number(16, 2);        // bits
  text("data");
  number(is_long ? kLargest : bytes, 4);
  COIL_ASSERT(at == header.size());
  return header;
}

SoundWriter::SoundWriter(const std::string& path, int64_t rate)
    : name_(path == "-" ? "standard output" : fmt::format("'{}'", path)), rate_(rate) {
  COIL_ASSERT(rate > 0 && 2 * rate <= 0xffffffff);
  if (path == "-") {
    descriptor_ = STDOUT_FILENO;
    return;
  }
  descriptor_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  check(descriptor_ >= 0, "cannot write {}: {}", name_, std::strerror(errno));
  struct stat status {};
  wav_ = ::fstat(descriptor_, &status) == 0 && S_ISREG(status.st_mode);
  if (!wav_) return;
  try {
    const auto header = wav_header(rate_, 0);
    write_at(header.data(), header.size(), 0);
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

SoundWriter::~SoundWriter() {
  if (descriptor_ > STDERR_FILENO) ::close(descriptor_);
}

SoundWriter::SoundWriter(SoundWriter&& other) noexcept
    : name_(std::move(other.name_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      wav_(other.wav_),
      rate_(other.rate_),
      bytes_(other.bytes_),
      pcm_(std::move(other.pcm_)) {}

bool SoundWriter::write_at(const void* data, size_t bytes, int64_t offset) {
  const auto* from = static_cast<const uint8_t*>(data);
  while (bytes > 0) {
    const ssize_t written =
        wav_ ? ::pwrite(descriptor_, from, bytes, offset) : ::write(descriptor_, from, bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0 && errno == EPIPE) return false;
    check(written > 0, "cannot write {}: {}", name_, std::strerror(written < 0 ? errno : ENOSPC));
    from += written;
    bytes -= static_cast<size_t>(written);
    offset += written;
  }
  return true;
}

bool SoundWriter::write(std::span<const float> samples) {
  pcm_.clear();
  for (const float x : samples) {
    const double rounded = std::floor(32768 * static_cast<double>(x) + 0.5);
    const auto word =
        static_cast<uint16_t>(static_cast<int16_t>(std::clamp(rounded, -32768.0, 32767.0)));
    pcm_.push_back(static_cast<uint8_t>(word & 255));
    pcm_.push_back(static_cast<uint8_t>(word >> 8));
  }
  if (!write_at(pcm_.data(), pcm_.size(), kWavHeader + bytes_)) return false;
  bytes_ += static_cast<int64_t>(pcm_.size());
  if (!wav_) return true;
  const auto header = wav_header(rate_, bytes_);
  return write_at(header.data(), header.size(), 0);
}

void SoundWriter::close() {
  const int descriptor = std::exchange(descriptor_, -1);
  if (descriptor <= STDERR_FILENO) return;
  check(::close(descriptor) == 0, "cannot write {}: {}", name_, std::strerror(errno));
}

}  // namespace coil::audio
