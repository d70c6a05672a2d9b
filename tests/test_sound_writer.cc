// Writing WAV: headers short and long, files at every moment of their growth, read back by others.
#include "audio/sound_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <csignal>

#include "audio/sound.h"
#include "tests/sound_files.h"

namespace coil::audio {
namespace {

std::vector<float> samples_of(const std::string& path) {
  Sound sound(path);
  std::vector<float> samples(sound.frames());
  EXPECT_EQ(sound.read(samples), sound.frames());
  return samples;
}

TEST_F(SoundTest, EveryWriteLeavesAWholeFile) {
  const std::string file = path("out.wav");
  SoundWriter writer(file, 8000);
  EXPECT_EQ(bytes_of(file).size(), static_cast<size_t>(kWavHeader));
  EXPECT_EQ(error_of([&] { Sound sound(file); }), file + ": no samples");
  std::vector<float> all;
  for (int i = 0; i < 3; ++i) {
    std::vector<float> part;
    for (int k = 0; k < 1000; ++k)
      part.push_back(static_cast<float>(((1000 * i + k) * 7919) % 65536 - 32768) / 32768);
    EXPECT_TRUE(writer.write(part));
    all.insert(all.end(), part.begin(), part.end());
    EXPECT_EQ(samples_of(file), all);  // bit for bit
    shell("soxi -s out.wav | grep -qx " + std::to_string(all.size()) +
          " && flac -sf out.wav -o out.flac && flac -st out.flac && sox out.wav again.wav");
    EXPECT_EQ(samples_of(path("out.flac")), all);
    EXPECT_EQ(samples_of(path("again.wav")), all);
  }
  writer.close();
}

// Killed between samples and the header that counts them: readers stop at what the header says.
TEST_F(SoundTest, SamplesThatAreNotCountedYetAreNotRead) {
  const std::string file = path("out.wav");
  SoundWriter writer(file, 8000);
  writer.write(std::vector<float>(500, 0.25f));
  writer.close();
  std::string bytes = bytes_of(file);
  for (int i = 0; i < 700; ++i) bytes += static_cast<char>(i);
  write("out.wav", bytes);
  EXPECT_EQ(samples_of(file), std::vector<float>(500, 0.25f));
  shell(
      "soxi -s out.wav | grep -qx 500; sox out.wav again.wav && soxi -s again.wav | grep -qx 500");
  shell("flac -sf out.wav -o out.flac && flac -st out.flac && sox out.flac -n stat 2>/dev/null");
  EXPECT_EQ(samples_of(path("out.flac")).size(), 500u);
}

TEST_F(SoundTest, SamplesAreRoundedAndClipped) {
  SoundWriter writer(path("out.wav"), 16'000);
  writer.write(std::vector<float>{0, 1, -1, 2, -2, 0.49f / 32768, 0.5f / 32768, -0.5f / 32768});
  writer.close();
  EXPECT_EQ(samples_of(path("out.wav")),
            (std::vector<float>{0, 32767.f / 32768, -1, 32767.f / 32768, -1, 0, 1.f / 32768, 0}));
}

// A file without blocks on the disk stands for one of 5 GiB.
TEST_F(SoundTest, LongFilesAreRf64) {
  const int64_t short_most =
      (int64_t{1} << 32) - kWavHeader + 6;              // even; RIFF's length is 2^32 - 2
  EXPECT_EQ(wav_header(8000, short_most)[3], 'F');      // RIFF
  EXPECT_EQ(wav_header(8000, short_most + 2)[3], '4');  // RF64
  for (const int64_t bytes : {short_most, short_most + 2, int64_t{5} << 30}) {
    const auto header = wav_header(8000, bytes);
    const std::string file = path("long.wav");
    std::ofstream(file, std::ios::binary)
        .write(reinterpret_cast<const char*>(header.data()), header.size());
    if (::truncate(file.c_str(), kWavHeader + bytes) != 0) GTEST_SKIP() << "no sparse files";
    Sound sound(file);
    EXPECT_EQ(sound.frames(), bytes / 2) << bytes;
    EXPECT_EQ(sound.rate(), 8000);
    sound.seek(bytes / 2 - 3);
    std::vector<float> last(5);
    EXPECT_EQ(sound.read(last), 3);
  }
}

TEST_F(SoundTest, WhatCannotBeWritten) {
  EXPECT_EQ(error_of([&] { SoundWriter(path("no/out.wav"), 8000); }),
            "cannot write '" + path("no/out.wav") + "': No such file or directory");
  SoundWriter full("/dev/full", 8000);
  EXPECT_EQ(error_of([&] { full.write(std::vector<float>(10)); }),
            "cannot write '/dev/full': No space left on device");
}

// No header, and no error when nobody reads any more.
TEST_F(SoundTest, PipesTakeRawSamples) {
  std::signal(SIGPIPE, SIG_IGN);
  const std::string pipe = path("pipe");
  shell("mkfifo pipe");
  const int reader = ::open(pipe.c_str(), O_RDONLY | O_NONBLOCK);
  ASSERT_GE(reader, 0);
  SoundWriter writer(pipe, 8000);
  EXPECT_TRUE(writer.write(std::vector<float>{0.5f, -1}));
  uint8_t bytes[8];
  ASSERT_EQ(::read(reader, bytes, sizeof bytes), 4);
  EXPECT_EQ(bytes[0] | bytes[1] << 8, 0x4000);
  EXPECT_EQ(bytes[2] | bytes[3] << 8, 0x8000);
  ::close(reader);
  EXPECT_FALSE(writer.write(std::vector<float>{0.5f}));
}

}  // namespace
}  // namespace coil::audio
