// Decoding a U-Net of S4D in one op (UnetStep) against the ops it stands for, on the test's device:
// shapes, numbers of sequences, sequences at different places, states; and what it declines.
#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/error.h"
#include "model/step_tables.h"
#include "tests/model_testing.h"

namespace coil {
namespace {

struct Network {
  const char* name;
  int64_t d, layers, states;
  const char *pool, *widths;  // no pool: a stack
  int64_t mlp;
  bool tie;
};
constexpr Network kNetworks[] = {
    {"audio-base", 64, 2, 32, "4,4", "128,256", 2, false},
    {"one stage inside", 64, 1, 16, "2", "64", 1, true},
    {"a stack", 128, 3, 64, "", "", 2, true},
    {"no MLP", 64, 2, 4, "3,2", "192,64", 0, false},
    {"wide", 256, 1, 128, "16", "512", 1, false},
};

Config config_of(const Network& network) {
  Config config;
  config.model_type = "coil";
  config.vocab = 48;
  config.d = network.d;
  config.e = 2 * network.d;
  config.dt_rank = 8;
  config.s4d_states = network.states;
  config.mlp = network.mlp;
  config.tie = network.tie;
  config.layers = parse_mixers("s4d", network.layers);
  if (*network.pool) add_stages(config, network.pool, network.widths, "s4d");
  return config;
}

Model model_of(Backend& backend, const Config& config, DType matrices) {
  const auto cpu = make_cpu_backend();
  Model model = converted(backend, lively_model(*cpu, config, 31), matrices);
  backend.sync();
  return model;
}

class UnetStepTest : public ::testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    COIL_NEEDS_TEST_DEVICE();
    backend = make_test_backend();
  }
  // Sequence i is at `position` + 3 i, or at its begin where that is below 0.
  Rows rows(int64_t count, int64_t position) const {
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < count; ++i)
      pieces.push_back({.begin = i,
                        .length = 1,
                        .position = std::max<int64_t>(0, position + 3 * i),
                        .from = position + 3 * i <= 0 ? -1 : static_cast<int32_t>(i),
                        .to = static_cast<int32_t>(i),
                        .last = false});
    return Rows(*backend, std::move(pieces));
  }
  Tensor logits_by_op(const Model& model, const StepTables& tables, std::vector<int32_t>& ids,
                      const Rows& at, const State& state) const {
    Tensor logits(*backend, DType::f32, {at.total(), model.config.vocab});
    EXPECT_TRUE(try_step(
        *backend, model, tables,
        {.ids = ids_view(ids), .table = model.embedding, .head = model.output(), .logits = logits},
        at, &state));
    return logits;
  }
  void expect_close(std::span<const float> found, std::span<const float> expected,
                    const std::string& what) {
    // Of nothing but zeros (steps that wait when none do) there is no relative difference.
    const double difference = same_bits(found, expected) ? 0 : relative_difference(found, expected);
    EXPECT_LE(difference, GetParam() == DType::f32 ? 2e-5 : 3e-2) << what;
    worst = std::max(worst, difference);
  }
  std::unique_ptr<Backend> backend;
  double worst = 0;
};
INSTANTIATE_TEST_SUITE_P(Types, UnetStepTest, ::testing::Values(DType::f32, DType::bf16),
                         [](const auto& info) { return name_of(info.param); });

TEST_P(UnetStepTest, AgreesWithTheOps) {
  for (const Network& network : kNetworks) {
    const Model model = model_of(*backend, config_of(network), GetParam());
    const StepTables tables = step_tables(*backend, model);
    for (const int64_t count : {1, 3, 20}) {
      State by_op(*backend, model.config, static_cast<int32_t>(count)),
          by_ops(*backend, model.config, static_cast<int32_t>(count));
      for (int64_t position = -3 * (count - 1); position < 35; ++position) {
        const std::string what = fmt::format("{}, {} sequences, the last at {}", network.name,
                                             count, position + 3 * (count - 1));
        std::vector<int32_t> ids = random_ids(count, model.config.vocab, 100 + position);
        const Rows at = rows(count, position);
        const Tensor found = logits_by_op(model, tables, ids, at, by_op);
        const Tensor expected = step_logits(*backend, model, {}, ids_view(ids), at, &by_ops);
        expect_close(values_of(*backend, found), values_of(*backend, expected), what);
        if (HasFailure()) return;
      }
      const auto found = by_op.tensors(), expected = by_ops.tensors();
      for (size_t i = 0; i < found.size(); ++i)
        expect_close(values_of(*backend, found[i].second), values_of(*backend, expected[i].second),
                     fmt::format("{}, {}", network.name, found[i].first));
      if (HasFailure()) return;
    }
  }
  RecordProperty("worst", fmt::format("{:.2e}", worst));
}

// The state is the ops' own: a prompt read by them goes on step by step.
TEST_P(UnetStepTest, GoesOnFromAPrompt) {
  const Model model = model_of(*backend, config_of(kNetworks[0]), GetParam());
  const StepTables tables = step_tables(*backend, model);
  std::vector<int32_t> ids = random_ids(60, model.config.vocab, 6);
  const Rows whole = Rows::equal(*backend, 1, 60);
  const std::vector<float> expected = values_of(
      *backend, lm_logits(*backend, model, hidden(*backend, model, ids_view(ids), whole, nullptr)));
  State state(*backend, model.config, 1);
  const Rows prompt(*backend, {{.length = 21, .from = -1, .to = 0, .last = false}});
  hidden(*backend, model, ids_view(ids).slice(0, 21), prompt, &state);
  for (int64_t position = 21; position < 60; ++position) {
    std::vector<int32_t> id{ids[position]};
    const Rows at(*backend, {{.length = 1, .position = position, .from = 0, .to = 0}});
    const Tensor found = logits_by_op(model, tables, id, at, state);
    expect_close(values_of(*backend, found),
                 std::span(expected).subspan(position * model.config.vocab, model.config.vocab),
                 fmt::format("step {}", position));
  }
}

TEST_P(UnetStepTest, TheSameBitsWhateverTheRepeatAndTheBatch) {
  const Model model = model_of(*backend, config_of(kNetworks[0]), GetParam());
  const StepTables tables = step_tables(*backend, model);
  const auto run = [&](int64_t count) {
    State state(*backend, model.config, static_cast<int32_t>(count));
    std::vector<float> first;
    for (int64_t position = 0; position < 33; ++position) {
      std::vector<int32_t> ids(count, static_cast<int32_t>(position % model.config.vocab));
      std::vector<Piece> pieces;
      for (int32_t i = 0; i < count; ++i)
        pieces.push_back({.begin = i,
                          .length = 1,
                          .position = position,
                          .from = position == 0 ? -1 : i,
                          .to = i,
                          .last = false});
      const Rows at(*backend, std::move(pieces));
      first = values_of(*backend, logits_by_op(model, tables, ids, at, state));
    }
    first.resize(model.config.vocab);
    return first;
  };
  const std::vector<float> expected = run(1);
  for (const int64_t count : {1, 2, 7}) EXPECT_TRUE(same_bits(run(count), expected)) << count;
}

TEST_P(UnetStepTest, DeclinesWhatItIsNotFor) {
  const auto declines = [&](const Config& config, std::vector<Piece> pieces, const char* what) {
    const Model model = model_of(*backend, config, GetParam());
    const StepTables tables = step_tables(*backend, model);
    State state(*backend, config, 4);
    const Rows at(*backend, std::move(pieces));
    std::vector<int32_t> ids(at.total(), 1);
    Tensor logits(*backend, DType::f32, {at.total(), config.vocab});
    EXPECT_FALSE(try_step(
        *backend, model, tables,
        {.ids = ids_view(ids), .table = model.embedding, .head = model.output(), .logits = logits},
        at, &state))
        << what;
  };
  const Config config = config_of(kNetworks[0]);
  declines(config, {{.length = 2, .from = 0, .to = 0}}, "two steps");
  declines(config, {{.length = 1, .position = 1, .from = 0, .to = 1}}, "a fork");
  declines(config, {{.length = 1, .from = -1, .to = -1}}, "a state that is discarded");
  Config mixed = config;
  mixed.layers = parse_mixers("s4d,mamba1", 2);
  declines(mixed, {{.length = 1, .position = 1, .from = 0, .to = 0}}, "Mamba in a stage");
}

}  // namespace
}  // namespace coil
