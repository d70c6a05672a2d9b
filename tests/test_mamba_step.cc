// Decoding in one op (MambaStep) on the GPU against the CPU, whose own is held against the ops it
// stands for in test_cpu_step.cc: batch sizes, shapes, states that fork, start and end, prefill and
// decoding on the same slots; networks that it declines go on with the ops. The same bits whatever
// the repeat: what its barriers do not order would show.
#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/error.h"
#include "model/step_tables.h"
#include "tests/model_testing.h"

namespace coil {
namespace {

struct Network {
  int64_t d, e, n, w, r, layers;
  bool bias = false, conv_bias = true;
};

Config config_of(const Network& network) {
  Config config;
  config.vocab = 11;
  config.d = network.d;
  config.e = network.e;
  config.n = network.n;
  config.w = network.w;
  config.dt_rank = network.r;
  config.layers.resize(static_cast<size_t>(network.layers));
  config.bias = network.bias;
  config.conv_bias = network.conv_bias;
  return config;
}

class MambaStepTest : public ::testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    COIL_NEEDS_TEST_DEVICE();
    gpu = make_test_backend();
  }
  // One model on both devices, its matrices rounded to the type of the test.
  struct Pair {
    Model on_cpu, on_gpu;
    State cpu_state, gpu_state;
  };
  Pair make(const Config& config, int32_t slots) {
    Model model = converted(*cpu, lively_model(*cpu, config, 23), GetParam());
    Model copied;
    copied.config = config;
    for (const Param& param : declare(copied))
      allocate(*gpu, param, param.info.matrix ? GetParam() : DType::f32);
    copy_values(*gpu, model, copied);
    gpu->sync();
    return {std::move(model), std::move(copied), State(*cpu, config, slots),
            State(*gpu, config, slots)};
  }
  bool try_on_gpu(const Pair& pair, const MambaStep& ends, const Rows& rows, const State* state) {
    return try_step(*gpu, pair.on_gpu.config, pair.on_gpu.backbone, ends, rows, state);
  }
  // hidden() by the op alone; fails where it is declined.
  Tensor step(Pair& pair, std::vector<int32_t>& ids, const Rows& rows) {
    const int64_t t = rows.total(), d = pair.on_gpu.config.d;
    Tensor kept, x(*gpu, DType::f32, {t, d}), y(*gpu, gpu->activations(GetParam()), {t, d});
    gpu->run(
        Embed{.ids = brought(*gpu, ids_view(ids), kept), .table = pair.on_gpu.embedding, .y = x});
    EXPECT_TRUE(try_on_gpu(pair, {.x = x, .y = y}, rows, &pair.gpu_state));
    return y;
  }
  void expect_close(std::span<const float> found, std::span<const float> expected,
                    const std::string& what) {
    const double difference = relative_difference(found, expected);
    EXPECT_LE(difference, GetParam() == DType::f32 ? 1e-5 : 1e-2) << what;
    worst = std::max(worst, difference);
  }
  void expect_close_states(const Pair& pair, const std::string& what) {
    for (size_t l = 0; l < pair.on_cpu.config.layers.size(); ++l) {
      const auto& a = std::get<Mamba1State>(pair.gpu_state.layers[l]);
      const auto& b = std::get<Mamba1State>(pair.cpu_state.layers[l]);
      if (pair.on_cpu.config.w > 1)
        expect_close(values_of(*gpu, a.conv), values_of(*cpu, b.conv),
                     fmt::format("{}, conv state {}", what, l));
      expect_close(values_of(*gpu, a.ssm), values_of(*cpu, b.ssm),
                   fmt::format("{}, ssm state {}", what, l));
    }
  }
  std::unique_ptr<Backend> cpu = make_cpu_backend(), gpu;
  double worst = 0;
};
INSTANTIATE_TEST_SUITE_P(Types, MambaStepTest, ::testing::Values(DType::f32, DType::bf16),
                         [](const auto& info) { return name_of(info.param); });

// `count` steps of sequences i that stand in slots i; in `round` 0 they begin, every third one
// forks into a slot of its own, every fifth one's state is discarded.
std::vector<Piece> steps(int64_t count, int round) {
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < count; ++i) {
    const auto slot = static_cast<int32_t>(i), other = static_cast<int32_t>(count + i);
    pieces.push_back({.begin = i,
                      .length = 1,
                      .position = round,
                      .from = round == 0 ? -1 : slot,
                      .to = i % 5 == 4 ? -1 : (i % 3 == 2 ? other : slot),
                      .last = false});
  }
  return pieces;
}

TEST_P(MambaStepTest, AgreesWithTheOps) {
  const Network networks[] = {
      {64, 128, 16, 4, 8, 2},    {32, 64, 4, 2, 8, 1, true}, {96, 224, 8, 3, 16, 2, false, false},
      {64, 160, 32, 1, 24, 1},   {256, 512, 16, 4, 16, 2},   {512, 1024, 16, 4, 32, 2},
      {1024, 2048, 16, 4, 64, 1}};
  for (const Network& network : networks) {
    if (network.d == 1024 && GetParam() == DType::f32) continue;  // too much for shared memory
    for (const int64_t count : {1, 3, 17, 64, 70}) {
      Pair pair = make(config_of(network), static_cast<int32_t>(2 * count));
      const std::string what = fmt::format("d {}, e {}, n {}, w {}, r {}, {} sequences", network.d,
                                           network.e, network.n, network.w, network.r, count);
      for (int round = 0; round < 3; ++round) {
        std::vector<int32_t> ids = random_ids(count, 11, 100 + round);
        const Rows on_gpu(*gpu, steps(count, round)), on_cpu(*cpu, steps(count, round));
        const Tensor found = step(pair, ids, on_gpu);
        const Tensor expected = hidden(*cpu, pair.on_cpu, ids_view(ids), on_cpu, &pair.cpu_state);
        expect_close(values_of(*gpu, found), values_of(*cpu, expected), what);
      }
      expect_close_states(pair, what);
    }
  }
  fmt::print("[ step     ] {}: largest relative difference {:.1e}\n", name_of(GetParam()), worst);
}

// From ids, of the host or the device, to logits; the vocabulary fills no tile, and an id that does
// not exist makes its row NaN. The batch changes, and with it the place of the words that blocks
// hand on.
TEST_P(MambaStepTest, FromIdsToLogits) {
  for (const int64_t vocab : {11, 256}) {
    Config config = config_of({64, 128, 16, 4, 8, 2});
    config.vocab = vocab;
    config.tie = vocab == 11;
    Pair pair = make(config, 70);
    bool from_host = true;
    for (const int64_t count : {1, 2, 5, 4, 64, 33, 70, 1}) {
      const std::string what = fmt::format("vocabulary {}, {} sequences", vocab, count);
      std::vector<int32_t> ids = random_ids(count, static_cast<int>(vocab), 5);
      std::vector<Piece> pieces = steps(count, 1);
      for (Piece& piece : pieces) piece.to = piece.from;
      const Rows on_gpu(*gpu, pieces), on_cpu(*cpu, pieces);
      const auto run = [&] {
        Tensor kept, logits(*gpu, DType::f32, {count, vocab});
        from_host = !from_host;
        const MambaStep ends{.ids = from_host ? ids_view(ids) : brought(*gpu, ids_view(ids), kept),
                             .table = pair.on_gpu.embedding,
                             .head = pair.on_gpu.output(),
                             .logits = logits};
        EXPECT_TRUE(try_on_gpu(pair, ends, on_gpu, &pair.gpu_state)) << what;
        return values_of(*gpu, logits);
      };
      for (int repeat = 0; repeat < 2; ++repeat)
        expect_close(run(),
                     values_of(*cpu, step_logits(*cpu, pair.on_cpu, {}, ids_view(ids), on_cpu,
                                                 &pair.cpu_state)),
                     what);
      expect_close_states(pair, what);
      ids.back() = static_cast<int32_t>(vocab);
      const Rows fresh = Rows::equal(*gpu, count, 1);
      const std::vector<float> logits =
          values_of(*gpu, step_logits(*gpu, pair.on_gpu, {}, ids_view(ids), fresh, nullptr));
      for (int64_t i = 0; i < count * vocab; ++i)
        ASSERT_EQ(std::isnan(logits[static_cast<size_t>(i)]), i / vocab == count - 1) << what;
    }
  }
}

// Networks that are cut alike take turns on one backend.
TEST_P(MambaStepTest, NetworksTakeTurns) {
  std::vector<Pair> pairs;
  for (const auto& [layers, vocab] : {std::pair{6, 256}, {7, 256}, {6, 250}}) {
    Config config = config_of({64, 128, 16, 4, 8, layers});
    config.vocab = vocab;
    pairs.push_back(make(config, 3));
  }
  for (int round = 0; round < 2; ++round)
    for (Pair& pair : pairs) {
      const Config& config = pair.on_gpu.config;
      std::vector<int32_t> ids = random_ids(3, static_cast<int>(config.vocab), 9);
      std::vector<Piece> pieces = steps(3, round);
      for (Piece& piece : pieces) piece.to = static_cast<int32_t>(piece.begin);
      const Rows on_gpu(*gpu, pieces), on_cpu(*cpu, pieces);
      expect_close(values_of(*gpu, step_logits(*gpu, pair.on_gpu, {}, ids_view(ids), on_gpu,
                                               &pair.gpu_state)),
                   values_of(*cpu, step_logits(*cpu, pair.on_cpu, {}, ids_view(ids), on_cpu,
                                               &pair.cpu_state)),
                   fmt::format("{} layers, vocabulary {}", config.layers.size(), config.vocab));
    }
}

// What it declines, the ops do: the answer is there all the same.
TEST_P(MambaStepTest, OtherNetworksTakeTheOps) {
  Config falcon = config_of({64, 128, 16, 4, 8, 2});
  falcon.mixer_norms = true;
  const Config configs[] = {small_config(false),
                            falcon,
                            config_of({64, 128, 12, 4, 8, 1}),
                            config_of({64, 128, 16, 4, 4, 1}),
                            config_of({72, 144, 16, 4, 8, 1}),
                            config_of({64, 128, 16, 4, 136, 1})};
  for (const Config& config : configs) {
    Pair pair = make(config, 10);
    std::vector<int32_t> ids = random_ids(5, 11, 7);
    const Rows on_gpu(*gpu, steps(5, 0)), on_cpu(*cpu, steps(5, 0));
    const Tensor x(*gpu, DType::f32, {5, config.d}),
        y(*gpu, gpu->activations(GetParam()), {5, config.d});
    EXPECT_FALSE(try_on_gpu(pair, {.x = x, .y = y}, on_gpu, &pair.gpu_state));
    const std::string what = fmt::format("d {}, n {}, r {}", config.d, config.n, config.dt_rank);
    expect_close(values_of(*gpu, hidden(*gpu, pair.on_gpu, ids_view(ids), on_gpu, &pair.gpu_state)),
                 values_of(*cpu, hidden(*cpu, pair.on_cpu, ids_view(ids), on_cpu, &pair.cpu_state)),
                 what);
  }
}

// A batch of pieces of any length, then steps, then both, on the same slots.
TEST_P(MambaStepTest, PrefillAndDecodingShareSlots) {
  Pair pair = make(config_of({64, 128, 16, 4, 8, 2}), 6);
  const auto both = [&](std::vector<Piece> pieces, const char* what) {
    const int64_t t = pieces.back().begin + pieces.back().length;
    std::vector<int32_t> ids = random_ids(t, 11, 50 + static_cast<uint64_t>(t));
    const Rows on_gpu(*gpu, pieces), on_cpu(*cpu, pieces);
    expect_close(values_of(*gpu, hidden(*gpu, pair.on_gpu, ids_view(ids), on_gpu, &pair.gpu_state)),
                 values_of(*cpu, hidden(*cpu, pair.on_cpu, ids_view(ids), on_cpu, &pair.cpu_state)),
                 what);
    expect_close_states(pair, what);
  };
  both({{.begin = 0, .length = 37, .to = 0}, {.begin = 37, .length = 2, .to = 1}}, "prefill");
  both({{.begin = 0, .length = 1, .from = 0, .to = 0},
        {.begin = 1, .length = 1, .from = 1, .to = 2},
        {.begin = 2, .length = 1, .from = -1, .to = 3}},
       "steps");
  both({{.begin = 0, .length = 1, .from = 2, .to = 2},
        {.begin = 1, .length = 50, .from = 0, .to = 4},
        {.begin = 51, .length = 1, .from = 3, .to = 3}},
       "both");
  both({{.begin = 0, .length = 1, .from = 4, .to = 0},
        {.begin = 1, .length = 1, .from = 4, .to = -1},
        {.begin = 2, .length = 1, .from = 3, .to = 5}},
       "steps again");
}

TEST_P(MambaStepTest, SameBitsAThousandTimes) {
  for (const int64_t count : {1, 5, 64}) {
    Pair pair = make(config_of({256, 512, 16, 4, 16, 3}), static_cast<int32_t>(2 * count));
    std::vector<int32_t> ids = random_ids(count, 11, 3);
    step(pair, ids, Rows(*gpu, steps(count, 0)));
    std::vector<Piece> pieces = steps(count, 1);
    for (Piece& piece : pieces) piece.to = static_cast<int32_t>(count) + piece.from;
    const Rows rows(*gpu, pieces);  // states are read and not written over
    const std::vector<float> first = values_of(*gpu, step(pair, ids, rows));
    const auto& state = std::get<Mamba1State>(pair.gpu_state.layers.back());
    const std::vector<float> first_state = values_of(*gpu, state.ssm);
    for (int repeat = 0; repeat < 1000; ++repeat) {
      const std::vector<float> again = values_of(*gpu, step(pair, ids, rows));
      ASSERT_TRUE(same_bits(again, first)) << count << " sequences, repeat " << repeat;
    }
    EXPECT_TRUE(same_bits(values_of(*gpu, state.ssm), first_state)) << count << " sequences";
  }
}

TEST_P(MambaStepTest, NanStaysInItsSequence) {
  const int64_t count = 20, d = 64;
  Pair pair = make(config_of({d, 128, 16, 4, 8, 2}), 0);
  const Rows rows = Rows::equal(*gpu, count, 1);
  std::vector<float> values = values_of(*cpu, random_tensor(*cpu, {count, d}, 9)), after[2];
  for (std::vector<float>& found : after) {
    const Tensor x(*gpu, DType::f32, {count, d});
    const Tensor y(*gpu, gpu->activations(GetParam()), {count, d});
    gpu->copy(host_view(values.data(), DType::f32, {count, d}), x);
    ASSERT_TRUE(try_on_gpu(pair, {.x = x, .y = y}, rows, nullptr));
    found = values_of(*gpu, y);
    values[7 * d + 3] = std::numeric_limits<float>::quiet_NaN();
  }
  for (int64_t i = 0; i < count; ++i) {
    const auto row = [&](const std::vector<float>& all) {
      return std::span(all).subspan(static_cast<size_t>(i * d), static_cast<size_t>(d));
    };
    EXPECT_EQ(same_bits(row(after[0]), row(after[1])), i != 7) << "sequence " << i;
    for (const float value : row(after[1])) EXPECT_EQ(std::isnan(value), i == 7);
  }
}

TEST_P(MambaStepTest, WrongOperandsAreRefused) {
  Pair pair = make(config_of({64, 128, 16, 4, 8, 1}), 2);
  const Rows rows(*gpu, {{.length = 1, .from = 0, .to = 4}});
  const Tensor x(*gpu, DType::f32, {1, 64}), y(*gpu, gpu->activations(GetParam()), {1, 64});
  const auto run = [&](const View& in, const View& out, const State* state) {
    try_on_gpu(pair, {.x = in, .y = out}, rows, state);
  };
  EXPECT_THROW(run(x, y, &pair.gpu_state), Error);  // slot 4 of 2
  EXPECT_THROW(run(x, y, nullptr), Error);
  const Tensor narrow(*gpu, DType::f32, {1, 32}), host(*cpu, DType::f32, {1, 64});
  EXPECT_THROW(run(narrow, y, &pair.gpu_state), Error);
  EXPECT_THROW(run(host, y, &pair.gpu_state), Error);
}

}  // namespace
}  // namespace coil
