// Samples of one channel written as they are made: 16-bit WAV in a file, whose header is right
// after every write, or 16-bit PCM without one (little endian) in a pipe or a device.
//
//   WAV    RIFF, JUNK of 28 bytes, fmt, data: 80 bytes. Past 4 GiB the same bytes become RF64 and
//          ds64 (EBU Tech 3306), where lengths have 64 bits. Samples are written first and then the
//          header that counts them, so that a program that is killed leaves a file that is whole up
//          to its last write; of what follows, a reader knows nothing.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace coil::audio {

constexpr int64_t kWavHeader = 80;
// Of a file with `bytes` of samples.
std::array<uint8_t, kWavHeader> wav_header(int64_t rate, int64_t bytes);

class SoundWriter {
 public:
  // "-" is standard output. A file of that name is begun anew.
  SoundWriter(const std::string& path, int64_t rate);
  ~SoundWriter();
  SoundWriter(SoundWriter&& other) noexcept;
  SoundWriter(const SoundWriter&) = delete;

  // A sample x becomes floor(32768 x + 1/2), clipped. False where the reader of a pipe has gone.
  // Throws naming the file and the reason, a full disk above all.
  bool write(std::span<const float> samples);
  void close();  // throws what the system kept back until then

 private:
  bool write_at(const void* data, size_t bytes, int64_t offset);  // false: a pipe's reader has gone
  std::string name_;                                              // for messages
  int descriptor_ = -1;
  bool wav_ = false;
  int64_t rate_, bytes_ = 0;
  std::vector<uint8_t> pcm_;
};

}  // namespace coil::audio
