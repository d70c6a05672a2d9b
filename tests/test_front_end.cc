// The front end: tokens and targets of DNA and audio; audio through stream, score, evaluation and
// training batches.
#include "pipelines/front_end.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <set>
#include <sstream>

#include "pipelines/batches.h"
#include "pipelines/evaluate.h"
#include "pipelines/score.h"
#include "tests/records.h"

namespace coil {
namespace {

Config audio_config(SampleCodes codes, Objective objective = Objective::lm,
                    bool condition = false) {
  Config config = small_config(objective);
  config.alphabet.clear();
  config.audio = {.rate = 100, .codes = codes};
  config.condition = condition;
  if (condition) config.labels = {"a", "b"};
  config.vocab = audio_vocabulary(config);
  return config;
}

Codes random_bytes(int64_t length, uint64_t seed) {
  Philox random(seed, 9, 0);
  Codes codes(length);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random.below(256));
  return codes;
}

struct Tokens {
  std::vector<int32_t> ids, targets;
};
Tokens tokens_of(const Config& config, const Codes& codes, int64_t context, int32_t label) {
  Tokens tokens;
  FrontEnd(config).append(codes, context, label, tokens.ids, tokens.targets);
  return tokens;
}
using Ids = std::vector<int32_t>;

TEST(FrontEnd, Tokens) {
  const Tokens dna = tokens_of(small_config(Objective::lm), {1, 2, 5, 3}, 0, -1);
  EXPECT_EQ(dna.ids, (Ids{1, 2, 5, 3}));
  EXPECT_EQ(dna.targets, (Ids{2, -1, 3, -1}));
  const Tokens mulaw = tokens_of(audio_config(SampleCodes::mulaw), {7, 0, 255}, 0, -1);
  EXPECT_EQ(mulaw.ids, (Ids{256, 7, 0, 255}));
  EXPECT_EQ(mulaw.targets, (Ids{7, 0, 255, -1}));
  const Tokens inside = tokens_of(audio_config(SampleCodes::mulaw), {7, 0, 255}, 1, -1);
  EXPECT_EQ(inside.ids, mulaw.ids);
  EXPECT_EQ(inside.targets, (Ids{-1, 0, 255, -1}));
  const Tokens exact = tokens_of(audio_config(SampleCodes::pcm16), {7, 0, 255, 9}, 0, -1);
  EXPECT_EQ(exact.ids, (Ids{512, 7, 256, 255, 256 + 9}));
  EXPECT_EQ(exact.targets, (Ids{7, 256, 255, 256 + 9, -1}));
  const Config conditional = audio_config(SampleCodes::mulaw, Objective::lm, true);
  EXPECT_EQ(tokens_of(conditional, {7}, 0, 1).ids, (Ids{272 + 256, 272 + 7}));
  EXPECT_EQ(tokens_of(conditional, {7}, 0, 1).targets, (Ids{7, -1}));
  EXPECT_THROW(tokens_of(conditional, {7}, 0, -1), Error);
  EXPECT_EQ(conditional.vocab, 272);
}

// By hand, from the logits of one pass: every sample counts.
double nats_of(Backend& backend, const Model& model, const Codes& codes) {
  Tokens tokens = tokens_of(model.config, codes, 0, -1);
  const auto t = static_cast<int64_t>(tokens.ids.size());
  const Tensor h = hidden(backend, model, host_view(tokens.ids.data(), DType::i32, {t}),
                          Rows::equal(backend, 1, t), nullptr);
  const Tensor logits = lm_logits(backend, model, h);
  double nats = 0;
  for (int64_t i = 0; i + 1 < t; ++i) {
    const float* row = logits.view().row<float>(i) + tokens.targets[i] / 256 * 256;
    double sum = 0;
    for (int k = 0; k < 256; ++k) sum += std::exp(static_cast<double>(row[k]));
    nats += std::log(sum) - row[tokens.targets[i] % 256];
  }
  return nats;
}

TEST(AudioScore, IsExactWhateverTheChunk) {
  const auto backend = make_cpu_backend(2);
  for (const SampleCodes how : {SampleCodes::mulaw, SampleCodes::pcm16}) {
    const Model model = small_model(*backend, audio_config(how));
    const int64_t step = FrontEnd(model.config).step();
    const std::vector<Codes> records = {random_bytes(1000 * step, 1), random_bytes(step, 2),
                                        random_bytes(317 * step, 3)};
    for (const int64_t chunk : {1, 2, 3, 997, 5000}) {
      Records source(records, 256);
      std::vector<Score> scores;
      std::string track;
      score(
          *backend, model, source,
          {.stream = {.strands = Strands::forward,
                      .batch = std::max<int64_t>(chunk, 64),
                      .chunk = chunk},
           .per_base = true},
          [&](const Score& one) { scores.push_back(one); },
          [&](const std::string& text) { track += text; });
      ASSERT_EQ(scores.size(), 3u);
      double all = 0;
      for (size_t i = 0; i < 3; ++i) {
        const auto samples = static_cast<int64_t>(records[i].size()) / step;
        const double nats = nats_of(*backend, model, records[i]);
        EXPECT_NEAR(scores[i].log_likelihood, -nats, 1e-5 * nats) << chunk;
        EXPECT_EQ(scores[i].end, samples);
        EXPECT_EQ(scores[i].counted, static_cast<double>(samples));
        all += nats;
      }
      // The lines of the seconds add up to the whole.
      double of_track = 0;
      int64_t lines = 0;
      for (std::istringstream in(track); in.good(); ++lines) {
        std::string name;
        double begin = 0, end = 0, samples = 0, bits = 0;
        if (!(in >> name >> begin >> end >> samples >> bits)) break;
        EXPECT_NEAR((end - begin) * 100, samples, 1e-9);
        of_track += bits * samples * std::numbers::ln2;
      }
      EXPECT_EQ(lines, 10 + 1 + 4);
      EXPECT_NEAR(of_track, all, 1e-5 * all);
    }
  }
}

Examples recordings(int count, int64_t length, int classes = 0) {
  Examples all;
  for (int i = 0; i < count; ++i) {
    all.codes.push_back(random_bytes(length, 50 + i));
    all.names.push_back(fmt::format("{}.wav", i));
    all.items.push_back({.record = i, .length = length, .label = classes ? i % classes : -1});
  }
  for (int k = 0; k < classes; ++k) all.labels.push_back(fmt::format("{}", k));
  return all;
}

TEST(AudioEvaluate, CountsEverySample) {
  const auto backend = make_cpu_backend(2);
  for (const SampleCodes how : {SampleCodes::mulaw, SampleCodes::pcm16}) {
    const Model model = small_model(*backend, audio_config(how));
    const int64_t step = FrontEnd(model.config).step();
    const Examples all = recordings(3, 200 * step);
    double nats = 0;
    for (const Codes& codes : all.codes) nats += nats_of(*backend, model, codes);
    for (const int64_t batch : {7, 64, 4096}) {  // long items too
      const Evaluation found =
          evaluate(*backend, model, all, all.items, {.batch_tokens = batch, .both_strands = true});
      EXPECT_EQ(found.metrics.count, 600);
      EXPECT_NEAR(found.metrics.loss * 600, nats, 1e-5 * nats);
      EXPECT_NEAR(found.bits_per_base, nats / 600 / std::numbers::ln2, 1e-4);
    }
    // Windows: the sample before one is its context, so every sample counts once here too.
    const std::vector<Example> windows = cut_windows(all.items, 50, 50, 1, step);
    EXPECT_EQ(windows.size(), 12u);
    EXPECT_EQ(evaluate(*backend, model, all, windows, {}).metrics.count, 600);
  }
}

TEST(AudioBatches, WindowsHoldWholeSamples) {
  const Config config = audio_config(SampleCodes::pcm16, Objective::lm, true);
  const Examples all = recordings(6, 2000, 2);
  Batches batches(all, all.items,
                  {.objective = Objective::lm,
                   .batch_tokens = 1000,
                   .min_length = 20,
                   .max_length = 100,
                   .reverse_complement = false,
                   .front = FrontEnd(config)});
  std::set<int32_t> begins;
  for (int64_t step = 1; step <= 20; ++step) {
    const Batch batch = batches.draw(step);
    ASSERT_EQ(batch.ids.size(), batch.targets.size());
    int64_t counted = 0;
    for (const Piece& piece : batch.pieces) {
      const int32_t* ids = batch.ids.data() + piece.begin;
      const int32_t* targets = batch.targets.data() + piece.begin;
      begins.insert(ids[0]);
      ASSERT_EQ(piece.length % 2, 1);
      for (int64_t i = 1; i < piece.length; ++i) {
        const int64_t token = ids[i] % config.vocab;
        ASSERT_EQ(ids[i] / config.vocab, ids[0] / config.vocab) << "the label";
        ASSERT_EQ(token / 256, (i - 1) % 2) << "coarse, fine, coarse, …";
        if (targets[i - 1] < 0)
          EXPECT_LE(i, 2);  // of the context
        else
          ASSERT_EQ(targets[i - 1], token);
        counted += targets[i - 1] >= 0;
      }
      EXPECT_EQ(targets[piece.length - 1], -1);
    }
    EXPECT_EQ(counted, batch.codes);
    EXPECT_LE(batch.codes, 1000);
    EXPECT_GT(batch.codes, 1000 - 40);
  }
  EXPECT_EQ(begins, (std::set<int32_t>{512, 528 + 512}));

  Batches whole(all, all.items,
                {.batch_tokens = 5000,
                 .reverse_complement = false,
                 .front = FrontEnd(audio_config(SampleCodes::mulaw, Objective::classify))});
  const Batch batch = whole.draw(1);
  ASSERT_EQ(batch.pieces.size(), 2u);
  EXPECT_EQ(batch.targets.size(), 2u);
  EXPECT_EQ(batch.ids[0], 256);
  EXPECT_EQ(batch.pieces[0].length, 2001);
}

TEST(AudioPartition, IsByFileAndStable) {
  const Examples all = recordings(40, 100, 2);
  const Partition parts = partition_records(all, 0.1, 0, 0, 1, 7);
  EXPECT_EQ(parts.held_out.size(), 4u);
  EXPECT_EQ(parts.train.size(), 36u);
  int64_t of_first = 0;
  std::set<int64_t> held, more_held;
  for (const Example& item : parts.held_out) {
    of_first += item.label == 0;
    held.insert(item.record);
    EXPECT_EQ(item.length, 100);
  }
  EXPECT_EQ(of_first, 2);
  // Ten recordings more: those held out before still are.
  for (const Example& item : partition_records(recordings(50, 100, 2), 0.12, 0, 0, 1, 7).held_out)
    more_held.insert(item.record);
  int64_t kept = 0;
  for (const int64_t record : held) kept += more_held.contains(record);
  EXPECT_GE(kept, 3);
  const Partition windows = partition_records(all, 0.1, 30, 30, 1, 7);
  EXPECT_EQ(windows.held_out.size(), 4u * 3);
  EXPECT_EQ(partition_records(all, 0, 0, 0, 1, 7).held_out.size(), 0u);
}

}  // namespace
}  // namespace coil
