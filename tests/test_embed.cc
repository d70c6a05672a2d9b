// Vectors of records and positions: pooled ones are the means of those of positions, whatever the
// chunk and what else is read; strands; layers.
#include "pipelines/embed.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/records.h"

namespace coil {
namespace {

struct Vectors {
  std::string name;
  int64_t begin = 0, end = 0;
  std::vector<float> values;
};
std::vector<Vectors> embed_all(Backend& backend, const Model& model, Source&& source,
                               const EmbedOptions& options) {
  std::vector<Vectors> all;
  bool open = false;
  embed(backend, model, source, options, [&](const Embedding& part) {
    if (!open) all.push_back({part.name, part.begin, part.begin, {}});
    EXPECT_EQ(all.back().name, part.name);
    EXPECT_EQ(all.back().end, part.begin);
    all.back().end = part.end;
    all.back().values.insert(all.back().values.end(), part.values.begin(), part.values.end());
    open = !part.last;
  });
  EXPECT_FALSE(open);
  return all;
}

class EmbedTest : public ::testing::Test {
 protected:
  std::unique_ptr<Backend> backend = make_cpu_backend(2);
  Config config = small_config(Objective::lm);
  Model model = small_model(*backend, config);
  std::vector<Codes> records = {random_codes(300, 1), random_codes(1, 2), random_codes(5000, 3),
                                random_codes(64, 4), random_codes(70'001, 5)};
  StreamOptions forward(int64_t batch) const {
    return {.strands = Strands::forward, .batch = batch};
  }
};

TEST_F(EmbedTest, PooledIsTheMeanOfPositions) {
  const auto whole = embed_all(*backend, model, Records(records),
                               {.stream = forward(100'000), .per_position = true});
  ASSERT_EQ(whole.size(), records.size());
  for (const int64_t batch : {64, 1000, 100'000}) {
    const auto positions = embed_all(*backend, model, Records(records, 777),
                                     {.stream = forward(batch), .per_position = true});
    ASSERT_EQ(positions.size(), records.size());
    for (const Pooling pooling : {Pooling::mean, Pooling::last}) {
      const auto pooled = embed_all(*backend, model, Records(records, 777),
                                    {.stream = forward(batch), .pooling = pooling});
      ASSERT_EQ(pooled.size(), records.size());
      for (size_t r = 0; r < records.size(); ++r) {
        const auto length = static_cast<int64_t>(records[r].size());
        EXPECT_EQ(positions[r].begin, 0);
        EXPECT_EQ(positions[r].end, length);
        EXPECT_EQ(pooled[r].name, "r" + std::to_string(r));
        EXPECT_EQ(pooled[r].end, length);
        ASSERT_EQ(static_cast<int64_t>(positions[r].values.size()), length * config.d);
        ASSERT_EQ(static_cast<int64_t>(pooled[r].values.size()), config.d);
        for (int64_t j = 0; j < config.d; ++j) {
          double sum = 0;
          for (int64_t i = 0; i < length; ++i) {
            const float value = positions[r].values[i * config.d + j];
            ASSERT_NEAR(value, whole[r].values[i * config.d + j], 1e-4) << r << ' ' << i;
            if (pooling == Pooling::mean || i == length - 1) sum += value;
          }
          const double expected =
              pooling == Pooling::mean ? sum / static_cast<double>(length) : sum;
          ASSERT_NEAR(pooled[r].values[j], expected, 1e-4) << r << ' ' << j;
        }
      }
    }
  }
}

TEST_F(EmbedTest, BothStrandsAreTheMeanOfEach) {
  std::vector<Codes> reversed;
  for (const Codes& codes : records) reversed.push_back(reverse_complemented(codes));
  const auto one = embed_all(*backend, model, Records(records), {.stream = forward(999)}),
             other = embed_all(*backend, model, Records(reversed), {.stream = forward(999)}),
             both = embed_all(*backend, model, Records(records), {.stream = {.batch = 999}});
  for (size_t r = 0; r < records.size(); ++r)
    for (int64_t j = 0; j < config.d; ++j)
      ASSERT_NEAR(both[r].values[j], (one[r].values[j] + other[r].values[j]) / 2, 1e-4);
}

TEST_F(EmbedTest, WindowsHaveTheirPlace) {
  StreamOptions stream = forward(500);
  stream.window = 100;
  const auto windows = embed_all(*backend, model, Records({records[0]}), {.stream = stream});
  ASSERT_EQ(windows.size(), 3u);
  EXPECT_EQ(windows[1].begin, 100);
  EXPECT_EQ(windows[1].end, 200);
  const Codes middle(records[0].begin() + 100, records[0].begin() + 200);
  const auto alone = embed_all(*backend, model, Records({middle}), {.stream = forward(500)});
  for (int64_t j = 0; j < config.d; ++j)
    ASSERT_NEAR(windows[1].values[j], alone[0].values[j], 1e-5);
  stream.window = 120;
  const auto rows =
      embed_all(*backend, model, Records({records[0]}), {.stream = stream, .per_position = true});
  ASSERT_EQ(rows.size(), 3u);
  EXPECT_EQ(rows[2].begin, 240);
  EXPECT_EQ(rows[2].end, 300);
}

// What comes after a layer has no say in it.
TEST_F(EmbedTest, LayersAreCut) {
  const Codes codes = records[0];
  const auto deep = embed_all(*backend, model, Records({codes}), {.stream = forward(400)});
  Model cut = small_model(*backend, config), changed = small_model(*backend, config);
  keep_layers(cut, 2, "m");
  EXPECT_EQ(embed_all(*backend, cut, Records({codes}), {.stream = forward(400)})[0].values,
            deep[0].values);
  keep_layers(cut, 1, "m");
  backend->fill(changed.backbone.layers[1].norm, 0.5);
  keep_layers(changed, 1, "m");
  const auto first = embed_all(*backend, cut, Records({codes}), {.stream = forward(400)});
  EXPECT_NE(first[0].values, deep[0].values);
  EXPECT_EQ(embed_all(*backend, changed, Records({codes}), {.stream = forward(400)})[0].values,
            first[0].values);
  EXPECT_THROW(keep_layers(cut, 2, "m"), Error);
  EXPECT_THROW(keep_layers(cut, 0, "m"), Error);
}

// Of audio the begin token has no vector, and a sample of two codes has one.
TEST_F(EmbedTest, SamplesHaveOneVectorEach) {
  for (const SampleCodes how : {SampleCodes::mulaw, SampleCodes::pcm16}) {
    Config audio = config;
    audio.alphabet.clear();
    audio.audio = {.rate = 8000, .codes = how};
    audio.vocab = audio_vocabulary(audio);
    const Model own = small_model(*backend, audio);
    Codes codes(600);
    for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 37);
    const auto rows =
        embed_all(*backend, own, Records({codes}), {.stream = forward(90), .per_position = true});
    const int64_t samples = how == SampleCodes::mulaw ? 600 : 300;
    ASSERT_EQ(rows.size(), 1u);
    EXPECT_EQ(rows[0].begin, 0);
    EXPECT_EQ(rows[0].end, samples);
    EXPECT_EQ(static_cast<int64_t>(rows[0].values.size()), samples * audio.d);
    const auto last = embed_all(*backend, own, Records({codes}),
                                {.stream = forward(90), .pooling = Pooling::last});
    EXPECT_EQ(last[0].end, samples);
    for (int64_t j = 0; j < audio.d; ++j)
      EXPECT_EQ(last[0].values[j], rows[0].values[(samples - 1) * audio.d + j]);
  }
}

}  // namespace
}  // namespace coil
