// A file of audio read as one channel, block by block (libsndfile: WAV, FLAC, OGG, MP3, AIFF and
// more). Integers of b bits are divided by 2^(b-1); several channels become their mean. The only
// home of libsndfile.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace coil::audio {

class Sound {
 public:
  // Throws where the file cannot be opened, is no audio, has no samples, no rate, or ends before
  // the length in its header (WAV, AIFF, AU and their like, Ogg; FLAC says so when read; MP3 has no
  // length that would tell).
  explicit Sound(const std::string& path);
  ~Sound();
  Sound(Sound&&) noexcept;

  int64_t rate() const { return rate_; }
  int channels() const { return channels_; }
  int64_t frames() const { return frames_; }      // samples of one channel
  int64_t position() const { return position_; }  // of the next one
  // Fills as much of `samples` as there is; fewer only at the end. Throws on a value that is not
  // finite and on data that ends early or cannot be decoded.
  int64_t read(std::span<float> samples);
  void seek(int64_t frame);

 private:
  struct File;
  void fill();
  std::string path_;
  std::unique_ptr<File> file_;
  int64_t rate_ = 0, frames_ = 0, position_ = 0;
  int channels_ = 0;
};

bool has_wav_name(const std::string& path);    // .wav, .wave
bool has_audio_name(const std::string& path);  // by its ending: .wav, .flac, .ogg, …

}  // namespace coil::audio
