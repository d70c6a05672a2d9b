// Reading through libsndfile. What it passes over in silence is looked for here: a file that ends
// before its header says (libsndfile shortens it, and only its log tells), values that are not
// finite.
#include "audio/sound.h"

#include <sndfile.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <sstream>
#include <vector>

#include "audio/container.h"
#include "kernels/error.h"

namespace coil::audio {
namespace {

constexpr int64_t kBlock = 1 << 16;       // floats read at once, of all channels
constexpr int64_t kUnknown = 0x7ff00000;  // a length from here on stands for "not known": a pipe
constexpr int kLog = 16 << 10;            // bytes of libsndfile's log that are looked at

// "data : 48000 (should be 23978)": what the header says and what there is.
void check_length(SNDFILE* file, const std::string& path) {
  std::vector<char> text(kLog, '\0');
  sf_command(file, SFC_GET_LOG_INFO, text.data(), kLog);
  std::istringstream lines(text.data());
  for (std::string line; std::getline(lines, line);) {
    const size_t colon = line.find(':'), should = line.find("(should be ");
    if (colon == std::string::npos || should == std::string::npos || should < colon) continue;
    const std::string name = line.substr(0, line.find_last_not_of(" \t", colon - 1) + 1);
    if (!name.ends_with("data") && !name.ends_with("SSND") && !name.ends_with("Data Size"))
      continue;
    int64_t said = 0, found = 0;
    const char* const end = line.data() + line.size();
    std::from_chars(line.data() + line.find_first_not_of(" \t", colon + 1), end, said);
    std::from_chars(line.data() + should + 11, end, found);
    check(said <= found || said >= kUnknown,
          "{}: truncated: its header says {} bytes of samples, {} are there", path, said, found);
  }
}

}  // namespace

struct Sound::File {
  SNDFILE* handle = nullptr;
  std::vector<float> block;  // (frames, channels)
  size_t at = 0, end = 0;    // in the block, in floats
  ~File() {
    if (handle) sf_close(handle);
  }
};

Sound::Sound(const std::string& path) : path_(path), file_(std::make_unique<File>()) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  check(status.type() != std::filesystem::file_type::not_found, "{}: cannot open: {}", path,
        std::strerror(ENOENT));
  check(!error, "{}: cannot open: {}", path, error.message());
  check(status.type() != std::filesystem::file_type::directory,
        "{}: is a folder, a file of audio was expected", path);
  SF_INFO info{};
  file_->handle = sf_open(path.c_str(), SFM_READ, &info);
  if (!file_->handle) {
    const int code = sf_error(nullptr);
    if (code == SF_ERR_SYSTEM) fail("{}: cannot open: {}", path, std::strerror(errno));
    check(code != SF_ERR_UNRECOGNISED_FORMAT, "{}: not audio that libsndfile reads", path);
    check(code != SF_ERR_MALFORMED_FILE, "{}: truncated or damaged: {}", path,
          sf_strerror(nullptr));
    // What libsndfile says of a rate of 0 and of 0 or too many channels.
    fail("{}: its header gives no rate or number of channels that can be read{} ({})", path,
         wav_header_text(path), sf_strerror(nullptr));
  }
  rate_ = info.samplerate;
  channels_ = info.channels;
  frames_ = info.frames;
  check(rate_ > 0, "{}: its rate is {} Hz", path, rate_);
  check_end(path);
  check_length(file_->handle, path);
  check(frames_ > 0, "{}: no samples", path);
  file_->block.resize(static_cast<size_t>(std::max<int64_t>(1, kBlock / channels_) * channels_));
}

Sound::~Sound() = default;
Sound::Sound(Sound&&) noexcept = default;

void Sound::fill() {
  File& file = *file_;
  const auto wanted = static_cast<sf_count_t>(file.block.size()) / channels_;
  const sf_count_t got = sf_readf_float(file.handle, file.block.data(), wanted);
  check(sf_error(file.handle) == SF_ERR_NO_ERROR, "{}: truncated or damaged after sample {}: {}",
        path_, position_, sf_strerror(file.handle));
  file.at = 0;
  file.end = static_cast<size_t>(std::max<sf_count_t>(got, 0) * channels_);
  check(got > 0 || position_ >= frames_ || frames_ == SF_COUNT_MAX /* not known */,
        "{}: truncated: its header says {} samples, {} are there", path_, frames_, position_);
}

int64_t Sound::read(std::span<float> samples) {
  File& file = *file_;
  size_t done = 0;
  for (; done < samples.size(); ++done, ++position_) {
    if (file.at == file.end) {
      fill();
      if (file.end == 0) break;
    }
    double sum = 0;
    for (int channel = 0; channel < channels_; ++channel) sum += file.block[file.at++];
    check(std::isfinite(sum), "{}: sample {} is {}, a finite number was expected", path_,
          position_ + 1, std::isnan(sum) ? "not a number" : "infinite");
    samples[done] = channels_ == 1 ? static_cast<float>(sum) : static_cast<float>(sum / channels_);
  }
  return static_cast<int64_t>(done);
}

void Sound::seek(int64_t frame) {
  check(sf_seek(file_->handle, frame, SEEK_SET) == frame, "{}: cannot go to sample {}: {}", path_,
        frame, sf_strerror(file_->handle));
  position_ = frame;
  file_->at = file_->end = 0;
}

namespace {

std::string lower_ending(const std::string& path) {
  std::string ending = std::filesystem::path(path).extension().string();
  std::transform(ending.begin(), ending.end(), ending.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return ending;
}

}  // namespace

bool has_wav_name(const std::string& path) {
  const std::string ending = lower_ending(path);
  return ending == ".wav" || ending == ".wave";
}

bool has_audio_name(const std::string& path) {
  static constexpr const char* kEndings[] = {".wav",  ".wave", ".flac", ".ogg",  ".oga",
                                             ".opus", ".mp3",  ".aif",  ".aiff", ".aifc",
                                             ".au",   ".snd",  ".caf",  ".w64",  ".rf64"};
  return std::ranges::count(kEndings, lower_ending(path)) > 0;
}

}  // namespace coil::audio
