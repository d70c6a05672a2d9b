// Folders of recordings: what is taken, labels, the codes streamed and held, trimming.
#include "audio/codes.h"
#include "audio/dataset.h"
#include "tests/sound_files.h"

namespace coil::audio {
namespace {

struct Read {
  std::vector<std::string> names;
  std::vector<std::vector<uint8_t>> codes;
  std::vector<int64_t> offsets;
};
Read drain(Source& source) {
  Read read;
  for (Segment segment; source.next(segment);) {
    EXPECT_LE(segment.codes.size(), static_cast<size_t>(Source::kRun));
    if (segment.first) {
      EXPECT_EQ(segment.record, static_cast<int64_t>(read.names.size()));
      read.names.push_back(segment.name);
      read.codes.emplace_back();
      read.offsets.push_back(segment.offset);
    }
    EXPECT_EQ(segment.position, static_cast<int64_t>(read.codes.back().size()));
    read.codes.back().insert(read.codes.back().end(), segment.codes.begin(), segment.codes.end());
  }
  return read;
}

std::vector<std::string> names_of(const Recordings& recordings) {
  std::vector<std::string> names;
  for (const Recording& file : recordings.files) names.push_back(file.name);
  return names;
}

TEST_F(SoundTest, FoldersAreSearchedToTheBottom) {
  for (const char* name :
       {"in/b/2.wav", "in/a/1.wav", "in/.hidden.wav", "in/.git/x.wav", "in/c.WAV"})
    wav(name, std::vector<int16_t>{1, 2, 3});
  write("in/list.tsv", "x");
  const Recordings all = list_recordings({path("in"), path("in/.hidden.wav")}, {});
  EXPECT_EQ(names_of(all),
            (std::vector<std::string>{"a/1.wav", "b/2.wav", "c.WAV", ".hidden.wav"}));
  write("none/x.txt", "x");
  EXPECT_NE(error_of([&] { list_recordings({path("none")}, {}); }).find("no audio in this folder"),
            std::string::npos);
}

TEST_F(SoundTest, Labels) {
  for (const char* name :
       {"in/a/7_x_0.wav", "in/a/10_x_1.wav", "in/b/7_y_0.wav", "in/b/10_y_1.wav"})
    wav(name, std::vector<int16_t>{1, 2, 3});
  const auto labels = [&](const LabelOptions& options) {
    std::string text;
    const Recordings all = list_recordings({path("in")}, options);
    for (const Recording& file : all.files) text += all.labels[file.label] + " ";
    for (const std::string& label : all.labels) text += "/" + label;
    return text;
  };
  EXPECT_EQ(labels({.labelled = true}), "a a b b /a/b");
  EXPECT_EQ(labels({.labelled = true, .pattern = "^([0-9]+)_"}), "10 7 10 7 /7/10");
  const std::string table =
      write("t.tsv", "file\tlabel\na/7_x_0.wav\tone\n10_x_1\tone\nb/7_y_0\ttwo\n10_y_1.wav\ttwo\n");
  EXPECT_EQ(labels({.labelled = true, .table = table}), "one one two two /one/two");
  EXPECT_EQ(labels({.labelled = true, .known = {"b", "c", "a"}}), "a a b b /b/c/a");
  const auto says = [&](const LabelOptions& options) { return error_of([&] { labels(options); }); };
  EXPECT_EQ(says({.labelled = true, .pattern = "^z"}),
            path("in/a/10_x_1.wav") + ": no label: its name does not match '^z'");
  EXPECT_NE(says({.labelled = true, .pattern = "("}).find("is no regular expression"),
            std::string::npos);
  EXPECT_EQ(says({.labelled = true, .known = {"a"}}),
            path("in/b/10_y_1.wav") + " has label 'b', which is not one of the model's: a");
  EXPECT_EQ(says({.labelled = true, .table = write("u.tsv", "10_x_1\tone\n")}),
            path("in/a/7_x_0.wav") + ": no label in " + path("u.tsv"));
  EXPECT_EQ(says({.labelled = true, .pattern = "_(.)_"}), "");
  EXPECT_NE(says({.labelled = true, .pattern = "wav"}).find("only one class"), std::string::npos);
}

TEST_F(SoundTest, CodesStreamedAndHeldAreTheSame) {
  tone("in/long.wav", "-b 16", 8000, 200'000);
  tone("in/short.wav", "-b 16", 8000, 100);
  const Recordings files = list_recordings({path("in")}, {});
  for (const SampleCodes how : {SampleCodes::mulaw, SampleCodes::pcm16}) {
    const ReadOptions options{.rate = 8000, .codes = how};
    const Read streamed = drain(*open_recordings(files, options));
    const Examples held = read_recordings(files, options);
    EXPECT_EQ(streamed.codes, held.codes);
    EXPECT_EQ(streamed.names,
              (std::vector<std::string>{path("in/long.wav"), path("in/short.wav")}));
    EXPECT_EQ(held.names, (std::vector<std::string>{"long.wav", "short.wav"}));
    ASSERT_EQ(held.items.size(), 2u);
    EXPECT_EQ(held.items[0].length, 200'000 * codes_of_a_sample(how));
  }
  // Sixteen bits come back as they were.
  const Examples exact = read_recordings(files, {.rate = 8000, .codes = SampleCodes::pcm16});
  std::vector<float> samples;
  decode(exact.codes[1], SampleCodes::pcm16, samples);
  std::vector<int16_t> words;
  for (const float x : samples) words.push_back(static_cast<int16_t>(x * 32768));
  wav("again.wav", words);
  shell("sox in/short.wav -t raw a && sox again.wav -t raw b && cmp a b");
}

TEST_F(SoundTest, ResampledAndMixedDownWithANote) {
  tone("in/a.wav", "-b 16 -c 2", 16'000, 16'000);
  tone("in/b.wav", "-b 16 -c 2", 16'000, 16'000);
  tone("in/c.wav", "-b 16", 8000, 8000);
  tone("in/d.wav", "-b 16 -c 65", 384'000, 3840);
  std::vector<std::string> notes;
  const Recordings files = list_recordings({path("in")}, {});
  const Examples all = read_recordings(
      files, {.rate = 8000, .note = [&](const std::string& text) { notes.push_back(text); }});
  ASSERT_EQ(notes.size(), 2u);
  EXPECT_EQ(notes[0], "note: " + path("in/a.wav") +
                          ": 16000 Hz, 2 channels: resampled to 8000 Hz, the channels' mean is "
                          "read; so are others like it");
  for (int i = 0; i < 3; ++i) EXPECT_EQ(all.codes[i].size(), 8000u);
  EXPECT_EQ(all.codes[3].size(), 80u);
  EXPECT_EQ(common_rate(files), 16'000);
  const std::string one = wav("one.wav", std::vector<int16_t>{5}, 200'000);
  EXPECT_EQ(error_of([&] { read_recordings(list_recordings({one}, {}), {.rate = 1000}); }),
            one + ": too short: no sample is left at 1000 Hz");
}

TEST_F(SoundTest, TrimLeavesOutTheQuietBeginAndEnd) {
  std::vector<int16_t> samples(70'000, 3);
  samples[40'000] = 9000;
  samples[50'000] = -9000;
  const std::string file = wav("a.wav", samples);
  const Recordings files = list_recordings({file}, {});
  const Read whole = drain(*open_recordings(files, {.rate = 8000}));
  EXPECT_EQ(whole.codes[0].size(), 70'000u);
  const ReadOptions trimming{.rate = 8000, .codes = SampleCodes::pcm16, .trim = 60};
  const Read trimmed = drain(*open_recordings(files, trimming));
  EXPECT_EQ(trimmed.codes[0].size(), 2 * 10'001u);
  EXPECT_EQ(trimmed.offsets[0], 2 * 40'000);
  const std::string quiet = wav("quiet.wav", std::vector<int16_t>(100, 3));
  EXPECT_EQ(error_of([&] { read_recordings(list_recordings({quiet}, {}), trimming); }),
            quiet + ": nothing in it is as loud as -60 dB, so trimming leaves no samples");
}

TEST(Recordings, RealSet) {
  const char* named = std::getenv("COIL_DATA");
  const std::string data = named ? named : COIL_SOURCE_DIR "/../shared/data";
  const std::string folder = data + "/audio/fsdd/train";
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << "no real data at " << data;
  const Recordings files = list_recordings({folder}, {.labelled = true, .pattern = "^([0-9])_"});
  EXPECT_EQ(files.files.size(), 2700u);
  EXPECT_EQ(files.labels.size(), 10u);
  EXPECT_EQ(common_rate(files), 8000);
  const Examples all = read_recordings(files, {.rate = 8000});
  for (const auto& codes : all.codes) EXPECT_GT(codes.size(), 1000u);
}

}  // namespace
}  // namespace coil::audio
