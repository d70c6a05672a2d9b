// Decoding in one op (MambaStep, UnetStep) on the CPU against the ops it stands for. Alone, beside
// others and on any number of threads a sequence gets the same bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "kernels/error.h"
#include "model/step_tables.h"
#include "tests/model_testing.h"

namespace coil {
namespace {

constexpr int64_t kSteps = 9;

Config config_of(int64_t d, int64_t e, int64_t n, int64_t w, int64_t r, bool bias, int64_t vocab) {
  Config config;
  config.vocab = vocab;
  config.d = d;
  config.e = e;
  config.n = n;
  config.w = w;
  config.dt_rank = r;
  config.bias = bias;
  config.conv_bias = !bias;
  config.tie = !bias;
  config.layers.resize(3);
  return config;
}

// Logits (kSteps, count, vocab) of sequences whose ids are those of `first`, `first` + 1, ….
std::vector<float> step_by_step(Backend& backend, const Model& model, int first, int64_t count) {
  const Config& config = model.config;
  State state(backend, config, static_cast<int32_t>(count));
  std::vector<float> all;
  for (int64_t step = 0; step < kSteps; ++step) {
    std::vector<Piece> pieces;
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < count; ++i) {
      pieces.push_back({.begin = i,
                        .length = 1,
                        .position = step,
                        .from = step == 0 ? -1 : static_cast<int32_t>(i),
                        .to = static_cast<int32_t>(i),
                        .last = false});
      ids.push_back(random_ids(kSteps, config.vocab, 50 + first + i)[step]);
    }
    const Rows rows(backend, pieces);
    Tensor logits(backend, DType::f32, {count, config.vocab});
    const MambaStep ends{
        .ids = ids_view(ids), .table = model.embedding, .head = model.output(), .logits = logits};
    EXPECT_TRUE(try_step(backend, config, model.backbone, ends, rows, &state));
    const std::vector<float> values = values_of(backend, logits);
    all.insert(all.end(), values.begin(), values.end());
  }
  return all;
}

// A pass over whole sequences takes the ops.
std::vector<float> in_one_pass(Backend& backend, const Model& model, int64_t count) {
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < count; ++i) {
    const std::vector<int32_t> own = random_ids(kSteps, model.config.vocab, 50 + i);
    ids.insert(ids.end(), own.begin(), own.end());
  }
  const Rows rows = Rows::equal(backend, count, kSteps);
  const Tensor h = hidden(backend, model, ids_view(ids), rows, nullptr);
  const std::vector<float> values = values_of(backend, lm_logits(backend, model, h));
  std::vector<float> turned;  // (kSteps, count, vocab)
  const int64_t v = model.config.vocab;
  for (int64_t step = 0; step < kSteps; ++step)
    for (int64_t i = 0; i < count; ++i) {
      const auto row = values.begin() + (i * kSteps + step) * v;
      turned.insert(turned.end(), row, row + v);
    }
  return turned;
}

TEST(CpuStep, AgreesWithTheOps) {
  const Config configs[] = {
      config_of(24, 40, 5, 3, 3, true, 11), config_of(64, 128, 16, 4, 4, false, 272),
      config_of(33, 66, 16, 4, 7, true, 100), config_of(128, 272, 20, 2, 8, false, 16)};
  for (const DType matrices : {DType::f32, DType::bf16})
    for (const Config& config : configs) {
      const auto one = make_cpu_backend(1), three = make_cpu_backend(3);
      const Model model = converted(*one, random_model(*one, config, 5), matrices);
      // Products of many rows may round activations to bf16 where matrices are.
      const Model widened = converted(*one, model, DType::f32);
      for (const int64_t count : {1, 2, 3, 4, 7, 16}) {
        const std::string what =
            fmt::format("{}, d {}, {} sequences", name_of(matrices), config.d, count);
        const std::vector<float> found = step_by_step(*one, model, 0, count);
        EXPECT_LE(relative_difference(found, in_one_pass(*one, widened, count)), 5e-5) << what;
        EXPECT_TRUE(same_bits(step_by_step(*three, model, 0, count), found)) << what;
        const auto last = static_cast<int>(count) - 1;
        const std::vector<float> alone = step_by_step(*one, model, last, 1);
        const int64_t v = config.vocab;
        for (int64_t step = 0; step < kSteps; ++step)
          EXPECT_TRUE(same_bits(std::span(alone).subspan(step * v, v),
                                std::span(found).subspan((step * count + last) * v, v)))
              << what;
      }
    }
}

// States that fork, and what comes out of the stack instead of logits.
TEST(CpuStep, StatesForkAndHiddenRowsComeOut) {
  const auto backend = make_cpu_backend(2);
  const Config config = config_of(64, 128, 16, 4, 4, false, 11);
  const Model model = random_model(*backend, config, 5);
  State state(*backend, config, 3);
  std::vector<int32_t> ids = random_ids(6, 11, 1);
  const auto step = [&](int32_t id, int32_t from, int32_t to) {
    std::vector<int32_t> one{id};
    const Rows rows(*backend, {{.length = 1, .from = from, .to = to, .last = false}});
    return values_of(*backend, hidden(*backend, model, ids_view(one), rows, &state));
  };
  step(ids[0], -1, 0);
  const std::vector<float> forked = step(ids[1], 0, 1), again = step(ids[1], 0, 2);
  EXPECT_TRUE(same_bits(forked, again));
  EXPECT_TRUE(same_bits(step(ids[2], 1, -1), step(ids[2], 2, 2)));
  std::vector<int32_t> three{ids[0], ids[1], ids[2]};
  const Rows rows = Rows::equal(*backend, 1, 3);
  const std::vector<float> pass =
      values_of(*backend, hidden(*backend, model, ids_view(three), rows, nullptr));
  EXPECT_LE(relative_difference(step(ids[2], 1, -1), std::span(pass).last(64)), 1e-5);
}

TEST(CpuStep, WhatItDeclinesOrRefuses) {
  const auto backend = make_cpu_backend(2);
  const Config config = config_of(64, 128, 16, 4, 4, false, 11);
  const Model model = random_model(*backend, config, 5);
  State state(*backend, config, 2);
  const auto run = [&](const View& x, const View& y, const Rows& rows, const State* states) {
    return try_step(*backend, config, model.backbone, {.x = x, .y = y}, rows, states);
  };
  const Tensor x(*backend, DType::f32, {1, 64}), y(*backend, DType::f32, {1, 64});
  const Tensor narrow(*backend, DType::f32, {1, 32});
  const Rows rows(*backend, {{.length = 1, .from = 0, .to = 4}});
  EXPECT_THROW(run(x, y, rows, &state), Error);  // slot 4 of 2
  EXPECT_THROW(run(x, y, rows, nullptr), Error);
  const Rows fresh = Rows::equal(*backend, 1, 1);
  EXPECT_THROW(run(narrow, y, fresh, nullptr), Error);
  EXPECT_TRUE(run(x, y, fresh, nullptr));
  const Rows many = Rows::equal(*backend, 17, 1);
  const Tensor wide(*backend, DType::f32, {17, 64}), out(*backend, DType::f32, {17, 64});
  EXPECT_FALSE(run(wide, out, many, nullptr));
}

constexpr int64_t kUnetSteps = 14;

Config unet_config() {  // no width is whole vectors or cache lines
  Config config;
  config.vocab = 23;
  config.d = 40;
  config.s4d_states = 20;
  config.mlp = 2;
  config.tie = false;
  config.layers = parse_mixers("s4d", 2);
  add_stages(config, "2,3", "72,100", "s4d");
  return config;
}

// Logits (kUnetSteps, count, vocab) of sequences first, first + 1, …, each a step ahead of the one
// before. Without tables by the ops.
std::vector<float> unet_steps(Backend& backend, const Model& model, const StepTables& tables,
                              int64_t first, int64_t count) {
  const int64_t v = model.config.vocab;
  State state(backend, model.config, static_cast<int32_t>(count));
  std::vector<float> all;
  for (int64_t step = 0; step < kUnetSteps; ++step) {
    std::vector<Piece> pieces;
    std::vector<int32_t> ids;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t position = step + first + i;
      const auto slot = static_cast<int32_t>(count - 1 - i);
      pieces.push_back({.begin = i,
                        .length = 1,
                        .position = position,
                        .from = position == 0 ? -1 : slot,
                        .to = slot,
                        .last = false});
      ids.push_back(static_cast<int32_t>((7 * position + first + i) % v));
    }
    const Rows rows(backend, pieces);
    Tensor logits(backend, DType::f32, {count, v});
    const UnetStep ends{
        .ids = ids_view(ids), .table = model.embedding, .head = model.output(), .logits = logits};
    if (tables.layers.empty())
      logits = step_logits(backend, model, tables, ids_view(ids), rows, &state);
    else
      EXPECT_TRUE(try_step(backend, model, tables, ends, rows, &state));
    const std::vector<float> values = values_of(backend, logits);
    all.insert(all.end(), values.begin(), values.end());
  }
  return all;
}

// What sequence `which` of `count` got.
std::vector<float> of_one(std::span<const float> all, int64_t which, int64_t count, int64_t v) {
  std::vector<float> own;
  for (int64_t step = 0; step < kUnetSteps; ++step) {
    const auto row = all.subspan((step * count + which) * v, v);
    own.insert(own.end(), row.begin(), row.end());
  }
  return own;
}

TEST(CpuStep, OfAUnetTheSameBitsAloneAndBesideOthers) {
  const auto one = make_cpu_backend(1), three = make_cpu_backend(3);
  for (const DType matrices : {DType::f32, DType::bf16}) {
    const Model model = converted(*one, random_model(*one, unet_config(), 5), matrices);
    const StepTables tables = step_tables(*one, model);
    for (const int64_t count : {1, 2, 7, 16, 64}) {
      const std::string what = fmt::format("{}, {} sequences", name_of(matrices), count);
      const std::vector<float> found = unet_steps(*one, model, tables, 0, count);
      if (matrices == DType::f32) {
        EXPECT_LE(relative_difference(found, unet_steps(*one, model, {}, 0, count)), 2e-5) << what;
      }
      EXPECT_TRUE(same_bits(unet_steps(*three, model, tables, 0, count), found)) << what;
      const int64_t v = model.config.vocab;
      for (const int64_t which : {count / 2, count - 1})
        EXPECT_TRUE(
            same_bits(unet_steps(*one, model, tables, which, 1), of_one(found, which, count, v)))
            << what << ", " << which;
    }
  }
}

TEST(CpuStep, OfAUnetWhatIsNotFiniteStaysInItsSequence) {
  const auto backend = make_cpu_backend(2);
  const Model model = random_model(*backend, unet_config(), 5);
  const StepTables tables = step_tables(*backend, model);
  const int64_t v = model.config.vocab;
  const std::vector<float> clean = unet_steps(*backend, model, tables, 0, 3);
  // Of the three sequences only the middle one has this id in its 14 steps.
  std::vector<int32_t> uses(v);
  for (int64_t i = 0; i < 3; ++i)
    for (int64_t step = 0; step < kUnetSteps; ++step) uses[(7 * (step + i) + i) % v] |= 1 << i;
  const auto id = std::ranges::find(uses, 1 << 1) - uses.begin();
  ASSERT_LT(id, v);
  model.embedding.as<float>()[id * model.config.d] = INFINITY;
  const std::vector<float> found = unet_steps(*backend, model, tables, 0, 3);
  for (const int64_t i : {0, 2})
    EXPECT_TRUE(same_bits(of_one(found, i, 3, v), of_one(clean, i, 3, v))) << i;
  EXPECT_TRUE(std::ranges::any_of(of_one(found, 1, 3, v), [](float x) { return std::isnan(x); }));
}

TEST(CpuStep, OfAUnetWhatItDeclinesOrRefuses) {
  const auto backend = make_cpu_backend(2);
  const Model model = random_model(*backend, unet_config(), 5);
  const StepTables tables = step_tables(*backend, model);
  const auto run = [&](int64_t count, int32_t slots, int64_t columns) {
    std::vector<Piece> pieces;
    for (int32_t i = 0; i < count; ++i)
      pieces.push_back({.begin = i, .length = 1, .from = -1, .to = i, .last = false});
    const Rows rows(*backend, std::move(pieces));
    const State state(*backend, model.config, slots);
    std::vector<int32_t> ids(count, 1);
    const Tensor logits(*backend, DType::f32, {count, columns});
    return try_step(
        *backend, model, tables,
        {.ids = ids_view(ids), .table = model.embedding, .head = model.output(), .logits = logits},
        rows, &state);
  };
  EXPECT_TRUE(run(64, 64, 23));
  EXPECT_FALSE(run(65, 65, 23));
  EXPECT_THROW(run(2, 1, 23), Error);
  EXPECT_THROW(run(2, 2, 22), Error);
}

}  // namespace
}  // namespace coil
