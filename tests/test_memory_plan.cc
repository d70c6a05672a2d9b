// The memory plan against what the shapes say, and what it must not depend on.
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "model/counting_backend.h"
#include "model/loss.h"
#include "model/memory_plan.h"

namespace coil {
namespace {

Config small() {
  Config config;
  config.layers.resize(3);
  config.labels = {"a", "b"};
  config.objective = Objective::classify;
  return config;
}

TEST(MemoryPlan, WeightsAndStateAreThoseOfTheShapes) {
  const Config config = small();
  const MemoryPlan plan = plan_memory(config, {.length = 1'000'000, .sequences = 5, .chunk = 1000});
  EXPECT_EQ(plan.weights, 4 * parameters(config));
  const int64_t layer = 4 * (config.w - 1) * config.e + 4 * config.e * config.n;
  EXPECT_EQ(plan.state, 5 * (3 * layer + 8 * (config.d + 1)));
  EXPECT_EQ(plan.gradients + plan.moments, 0);

  const MemoryPlan half =
      plan_memory(config, {.length = 1'000'000, .chunk = 1000, .matrices = DType::bf16});
  EXPECT_LT(half.weights, 0.65 * static_cast<double>(plan.weights));
  EXPECT_GT(half.weights, plan.weights / 2);  // norms, A_log and the like stay f32
}

TEST(MemoryPlan, OfAUNetHoldsEveryStage) {
  Config config = small();
  config.model_type = "coil";
  config.mlp = 1;
  add_stages(config, "4,2", "", "mamba1/s4d");
  const MemoryPlan plan = plan_memory(config, {.length = 100'000, .sequences = 5, .chunk = 1000});
  EXPECT_EQ(plan.weights, 4 * parameters(config));
  const int64_t d = config.d, layer = 4 * (config.w - 1) * config.e + 4 * config.e * config.n;
  const int64_t inner = 3 * 4 * 2 * config.s4d_states * (2 * d + 4 * d);
  const int64_t between = 4 * (3 * d + 4 * d) + 4 * (1 * 2 * d + 2 * 2 * d);  // rests, next steps
  EXPECT_EQ(plan.state, 5 * (3 * layer + inner + between + 8 * (d + 1)));
  EXPECT_EQ(plan.total(),
            plan_memory(config, {.length = 1'000'000'000, .sequences = 5, .chunk = 1000}).total());
}

TEST(MemoryPlan, InferenceDependsOnTheChunkAndNotOnTheLength) {
  const MemoryPlan kilo = plan_memory(small(), {.length = 10'000, .chunk = 1000});
  const MemoryPlan giga = plan_memory(small(), {.length = 1'000'000'000, .chunk = 1000});
  EXPECT_EQ(kilo.total(), giga.total());
  const MemoryPlan wide = plan_memory(small(), {.length = 10'000, .chunk = 2000});
  EXPECT_NEAR(static_cast<double>(wide.activations), 2.0 * static_cast<double>(kilo.activations),
              0.01 * static_cast<double>(wide.activations));
  // At least x|z, conv, dt|B|C and the residual stream of one layer.
  const Config config = small();
  EXPECT_GT(kilo.activations, 4 * 1000 * (3 * config.e + config.dt_rank + 2 * config.n + config.d));
}

TEST(MemoryPlan, TrainingHoldsEveryLayer) {
  const Config config = small();
  const MemoryPlan plan = plan_memory(config, {.length = 1024, .sequences = 4, .train = true});
  EXPECT_EQ(plan.gradients, plan.weights);
  EXPECT_EQ(plan.moments, 2 * plan.weights);
  EXPECT_EQ(plan.state, 0);
  const int64_t saved = 4096 * (2 * config.d + 5 * config.e + config.dt_rank + 2 * config.n + 1) +
                        4 * (1024 / 32) * config.e * config.n;
  EXPECT_GT(plan.activations, 3 * 4 * saved);
  EXPECT_LT(plan.activations, 5 * 4 * saved);
}

TEST(MemoryPlan, TrainingInChunksGrowsByAStateAChunk) {
  const Config config = small();
  const auto plan = [&](int64_t length) {
    return plan_memory(
        config,
        {.length = length, .sequences = 3, .chunk = 1000, .matrices = DType::bf16, .train = true});
  };
  const MemoryPlan few = plan(10'000), many = plan(1'000'000'000);
  EXPECT_EQ(few.activations, many.activations);
  const int64_t state = 3 * (4 * (config.w - 1) * config.e + 4 * config.e * config.n);
  EXPECT_EQ(few.state, 9 * state);
  EXPECT_EQ(many.state, 999'999 * state);
  // Beside a batch of one chunk only the states at hand, their gradients and small numbers.
  const MemoryPlan one = plan_memory(config, {.length = 1000, .train = true});
  EXPECT_LT(few.activations, one.activations + 10 * state);
  EXPECT_EQ(plan(1000).state, 0);
}

// On a GPU the states before tiles of the last chunks stand beside them.
TEST(MemoryPlan, TrainingOnAGpuKeepsStatesBeforeTilesOfTheLastChunks) {
  const Config config = small();
  const Device gpu{Device::Kind::cuda, 0};
  const auto plan = [&](int64_t length) {
    return plan_memory(config, {.length = length, .chunk = 60'000, .train = true, .device = gpu});
  };
  const int64_t tiles = scan_tiles(gpu, config.e), n = config.n, e = config.e;
  const MemoryPlan few = plan(3'000'000), many = plan(300'000'000);
  EXPECT_EQ(few.activations, many.activations);
  EXPECT_EQ(few.tile, 144);  // 60,000 steps of 396 tiles, in eights
  EXPECT_EQ(few.chunk, 144 * tiles);
  const auto state_of = [&](int64_t chunks) {
    return 3 * (4 * (config.w - 1) * e + 4 * e * n) * (chunks - 1) +
           4 * 3 * Chunks::kKept * tiles * e * n;
  };
  // Blocks are of whole size classes.
  const auto close = [](int64_t found, int64_t expected) {
    EXPECT_NEAR(static_cast<double>(found), static_cast<double>(expected),
                0.125 * static_cast<double>(expected));
  };
  close(few.state, state_of((3'000'000 + few.chunk - 1) / few.chunk));
  close(many.state, state_of((300'000'000 + many.chunk - 1) / many.chunk));
}

TEST(Chunks, AreAsManyAsFitAndNearlyOfOneLength) {
  const CountingBackend gpu({Device::Kind::cuda, 0}), cpu({Device::Kind::cpu, 0});
  for (const int64_t d : {16, 256, 768, 2048, 60'000}) {
    Model model;
    model.config.d = d;
    model.config.e = 2 * d;
    model.config.layers.resize(2);
    declare(model);
    const int64_t tiles = scan_tiles(gpu.device(), 2 * d);
    for (const int64_t length : {100'000, 131'072, 1'000'000, 1'048'576, 16'777'216})
      for (const int64_t asked : {1000, 10'072, 32'768, 40'000, 65'536, 131'072, 400'000}) {
        const Chunks cut = chunks_of(gpu, model, length, asked);
        const std::string what = fmt::format("d {}: {} steps, chunk {}", d, length, asked);
        EXPECT_LE(cut.length, asked) << what;
        EXPECT_EQ(chunks_of(cpu, model, length, asked).tile, 0) << what;
        if (length <= asked) continue;
        EXPECT_EQ(chunks_of(gpu, model, length, cut.length).length, cut.length) << what;
        if (cut.tile == 0) {
          EXPECT_TRUE(tiles == 0 || asked / tiles < 128) << what;
          continue;
        }
        EXPECT_EQ(cut.length, cut.tile * tiles) << what;
        EXPECT_GE(cut.tile, 128) << what;
        const int64_t most = asked / tiles / 8 * 8 * tiles, count = (length + most - 1) / most;
        EXPECT_EQ((length + cut.length - 1) / cut.length, count) << what;  // no more for being even
        const int64_t last = length - (count - 1) * cut.length;
        if (cut.tile > 128) {
          EXPECT_GE(last, cut.length - count * 8 * tiles) << what;
        }
      }
  }
}

TEST(MemoryPlan, RefusesWhatIsNoPlan) {
  EXPECT_THROW(plan_memory(small(), {.length = 0}), Error);
  EXPECT_THROW(plan_memory(small(), {.length = 5, .sequences = 0}), Error);
  EXPECT_THROW(plan_memory(small(), {.length = int64_t{1} << 40, .sequences = 1000}), Error);
}

}  // namespace
}  // namespace coil
