// Recordings for the tests of audio/: made by sox, flac and by hand.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace coil {

// A folder of its own for each test, removed at the end.
class SoundTest : public ::testing::Test {
 protected:
  SoundTest() {
    std::string pattern = (std::filesystem::temp_directory_path() / "coil-test-XXXXXX").string();
    folder_ = ::mkdtemp(pattern.data());
  }
  ~SoundTest() override { std::filesystem::remove_all(folder_); }
  void SetUp() override {
    if (std::system("command -v sox >/dev/null && command -v flac >/dev/null") != 0)
      GTEST_SKIP() << "sox and flac are not installed";
  }

  std::string path(const std::string& name) const { return folder_ + "/" + name; }

  // A shell command in the folder.
  void shell(const std::string& command) const {
    ASSERT_EQ(std::system(("cd '" + folder_ + "' && " + command).c_str()), 0) << command;
  }
  // `length` samples of a tone with a little noise, always the same.
  std::string tone(const std::string& name, const std::string& format, int rate, int length) const {
    std::filesystem::create_directories(std::filesystem::path(path(name)).parent_path());
    shell("sox -R -D -r " + std::to_string(rate) + " -n " + format + " '" + name + "' synth " +
          std::to_string(length) + "s sine 440 vol 0.5");
    return path(name);
  }

  std::string write(const std::string& name, const std::string& bytes) const {
    std::filesystem::create_directories(std::filesystem::path(path(name)).parent_path());
    std::ofstream(path(name), std::ios::binary) << bytes;
    return path(name);
  }
  std::string bytes_of(const std::string& file) const {
    std::ifstream in(file, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  // WAV by hand: 16-bit, one channel.
  std::string wav(const std::string& name, const std::vector<int16_t>& samples,
                  uint32_t rate = 8000) const {
    return wav_bytes(name, {reinterpret_cast<const char*>(samples.data()), 2 * samples.size()}, 1,
                     rate, 16);
  }
  std::string wav(const std::string& name, const std::vector<float>& samples,
                  uint32_t rate = 8000) const {
    return wav_bytes(name, {reinterpret_cast<const char*>(samples.data()), 4 * samples.size()}, 3,
                     rate, 32);
  }

 private:
  std::string wav_bytes(const std::string& name, const std::string& data, uint16_t format,
                        uint32_t rate, uint16_t bits) const {
    std::string text;
    const auto add = [&](auto value) {
      char bytes[sizeof value];
      std::memcpy(bytes, &value, sizeof value);
      text.append(bytes, sizeof value);
    };
    static_assert(std::endian::native == std::endian::little);
    text += "RIFF";
    add(static_cast<uint32_t>(36 + data.size()));
    text += "WAVEfmt ";
    add(uint32_t{16});
    add(format);
    add(uint16_t{1});
    add(rate);
    add(rate * bits / 8);
    add(static_cast<uint16_t>(bits / 8));
    add(bits);
    text += "data";
    add(static_cast<uint32_t>(data.size()));
    return write(name, text + data);
  }

  std::string folder_;
};

template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace coil
