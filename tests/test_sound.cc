// Reading audio: formats, depths, channels, rates, and files that are not what they should be.
#include "audio/sound.h"

#include <cmath>
#include <limits>
#include <numbers>

#include "audio/resample.h"
#include "audio/sound_writer.h"
#include "tests/sound_files.h"

// libsndfile 1.2.0 does not free what libvorbis allocated for a file that it cannot open.
extern "C" const char* __lsan_default_suppressions() { return "leak:vorbis_info_init"; }

namespace coil::audio {
namespace {

std::vector<float> all_of(const std::string& path, size_t block = 1000) {
  Sound sound(path);
  std::vector<float> samples, part(block);
  while (const int64_t count = sound.read(part))
    samples.insert(samples.end(), part.begin(), part.begin() + count);
  return samples;
}

TEST_F(SoundTest, FormatsAndDepths) {
  const std::vector<float> truth = all_of(tone("a.wav", "-b 16", 8000, 4000));
  ASSERT_EQ(truth.size(), 4000u);
  EXPECT_EQ(truth, all_of(path("a.wav"), 7));
  shell("flac -s a.wav -o a.flac && sox a.wav a.aiff && sox a.wav a.au && sox a.wav -b 24 a24.wav");
  for (const char* name : {"a.flac", "a.aiff", "a.au", "a24.wav"})
    EXPECT_EQ(all_of(path(name)), truth) << name;  // bit for bit
  shell("sox a.wav -b 8 a8.wav && sox a.wav -C 10 a.ogg && sox a.wav -C 320 a.mp3");
  for (const char* name : {"a8.wav", "a.ogg"}) {
    const std::vector<float> found = all_of(path(name));
    ASSERT_EQ(found.size(), truth.size()) << name;
    for (size_t i = 0; i < truth.size(); ++i) ASSERT_NEAR(found[i], truth[i], 0.03) << name;
  }
  EXPECT_GE(all_of(path("a.mp3")).size(), truth.size());  // MP3 pads
}

TEST_F(SoundTest, ChannelsBecomeTheirMean) {
  wav("l.wav", std::vector<int16_t>{100, -200, 32767});
  wav("r.wav", std::vector<int16_t>{300, -200, -32768});
  shell("sox -M l.wav r.wav both.wav");
  Sound sound(path("both.wav"));
  EXPECT_EQ(sound.channels(), 2);
  EXPECT_EQ(all_of(path("both.wav")),
            (std::vector<float>{200 / 32768.0f, -200 / 32768.0f, -0.5f / 32768}));
  tone("many.wav", "-c 65 -b 16", 8000, 3);
  EXPECT_EQ(Sound(path("many.wav")).channels(), 65);
  EXPECT_EQ(all_of(path("many.wav")).size(), 3u);
}

TEST_F(SoundTest, SeeksBack) {
  const std::string file = tone("a.flac", "-b 16", 8000, 9000);
  const std::vector<float> truth = all_of(file);
  Sound sound(file);
  std::vector<float> part(100);
  sound.read(part);
  sound.seek(5000);
  EXPECT_EQ(sound.position(), 5000);
  ASSERT_EQ(sound.read(part), 100);
  EXPECT_TRUE(std::equal(part.begin(), part.end(), truth.begin() + 5000));
}

TEST_F(SoundTest, WhatIsNoRecording) {
  const auto says = [&](const std::string& file) { return error_of([&] { all_of(file); }); };
  EXPECT_EQ(says(path("no.wav")), path("no.wav") + ": cannot open: No such file or directory");
  EXPECT_EQ(says(path("")), path("") + ": is a folder, a file of audio was expected");
  const std::string text = write("text.wav", "hello"), none = write("none.wav", "");
  EXPECT_EQ(says(text), text + ": not audio that libsndfile reads");
  EXPECT_EQ(says(none), none + ": not audio that libsndfile reads");
  const std::string empty = wav("empty.wav", std::vector<int16_t>{});
  EXPECT_EQ(says(empty), empty + ": no samples");
  const std::string zero = wav("zero.wav", std::vector<int16_t>{1, 2}, 0);
  EXPECT_NE(says(zero).find("gives no rate"), std::string::npos) << says(zero);
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinite = 1 / 0.0f;
  const std::string bad = wav("nan.wav", std::vector<float>{0, 0.5f, nan});
  EXPECT_EQ(says(bad), bad + ": sample 3 is not a number, a finite number was expected");
  const std::string huge = wav("inf.wav", std::vector<float>{0, -infinite});
  EXPECT_EQ(says(huge), huge + ": sample 2 is infinite, a finite number was expected");
}

TEST_F(SoundTest, CutShort) {
  tone("a.wav", "-b 16", 8000, 24'000);
  shell("sox a.wav a.flac && sox a.wav a.aiff && sox a.wav a.au && sox a.wav a.ogg");
  shell("sox a.wav a.w64 && sox a.wav long.wav repeat 60 && sox long.wav long.ogg");
  const auto header = wav_header(8000, int64_t{5} << 30);  // RF64
  write("a.rf64", std::string(header.begin(), header.end()) + std::string(48'000, '\0'));
  for (const char* name :
       {"a.wav", "a.flac", "a.aiff", "a.au", "a.ogg", "a.w64", "long.ogg", "a.rf64"})
    for (const double part : {0.5, 0.8, 0.999}) {
      const std::string bytes = bytes_of(path(name));
      const auto kept = static_cast<size_t>(part * static_cast<double>(bytes.size()));
      const std::string cut = write(std::string("cut.") + name, bytes.substr(0, kept));
      const std::string said = error_of([&] { all_of(cut); });
      EXPECT_EQ(said.find(cut + ": truncated"), 0u) << name << ' ' << part << ": " << said;
    }
  EXPECT_EQ(all_of(path("a.w64")).size(), 24'000u);
  EXPECT_NEAR(static_cast<double>(all_of(path("long.ogg")).size()), 61 * 24'000, 500);
  // A pipe's writer could not know the length and left the largest one.
  shell("sox a.wav -t wav - 2>/dev/null | cat > piped.wav");
  EXPECT_EQ(all_of(path("piped.wav")).size(), 24'000u);
}

TEST_F(SoundTest, Resampling) {
  const double step = 2 * std::numbers::pi * 440;
  std::vector<float> in(44'100);
  for (size_t i = 0; i < in.size(); ++i)
    in[i] = static_cast<float>(0.5 * std::sin(step * static_cast<double>(i) / 44'100));
  const auto resampled = [&](size_t block) {
    Resampler resampler(44'100, 16'000, "tone");
    std::vector<float> out;
    for (size_t at = 0; at < in.size(); at += block) {
      const size_t count = std::min(block, in.size() - at);
      resampler.run(std::span(in).subspan(at, count), at + count == in.size(), out);
    }
    return out;
  };
  const std::vector<float> out = resampled(in.size());
  ASSERT_EQ(out.size(), 16'000u);
  for (size_t i = 500; i + 500 < out.size(); ++i)
    ASSERT_NEAR(out[i], 0.5 * std::sin(step * static_cast<double>(i) / 16'000), 1e-3) << i;
  const std::vector<float> pieces = resampled(977);
  ASSERT_EQ(pieces.size(), out.size());
  for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(pieces[i], out[i], 1e-6) << i;

  std::vector<float> same;
  Resampler(8000, 8000, "tone").run(in, true, same);
  EXPECT_EQ(same, in);
  EXPECT_EQ(error_of([] { Resampler(100, 48'000, "x.wav"); }),
            "x.wav: 100 Hz cannot be resampled to 48000 Hz: at most 256 times more or less");
}

}  // namespace
}  // namespace coil::audio
