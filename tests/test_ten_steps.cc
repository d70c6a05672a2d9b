// Ten steps of AdamW on a small DNA model of random weights, on the device under test beside the
// CPU on one thread: the losses agree, and every repeat has the same bits.
#include <cmath>

#include "kernels/error.h"
#include "model/loss.h"
#include "model/optimizer.h"
#include "tests/model_testing.h"

namespace coil {
namespace {

constexpr int kSteps = 10;
constexpr double kRate = 1e-3;

struct Course {
  std::vector<double> losses;               // mean of each step, before it
  std::vector<std::vector<float>> weights;  // after the last
};

class TenSteps : public ::testing::TestWithParam<Objective> {
 protected:
  void SetUp() override {
    COIL_NEEDS_TEST_DEVICE();
    config.vocab = 11;
    config.d = 64;
    config.e = 128;
    config.dt_rank = 4;
    config.layers.resize(2);
    config.objective = GetParam();
    config.tie = GetParam() == Objective::lm;
    if (GetParam() == Objective::classify) config.labels = {"a", "b", "c"};
  }

  // bf16: forward and backward read a copy in it, as in training.
  Course train(Backend& backend, DType matrices) {
    Model model = make_model(backend, config, 61), grad = zeros_like(backend, model), copy;
    const bool half = matrices == DType::bf16;
    if (half) copy = converted(backend, model, matrices);
    Optimizer optimizer(backend, model, {.weight_decay = 0.1, .clip = 1});
    const Tensor squares(backend, DType::f64, {1});
    Course run;
    for (uint64_t step = 0; step < kSteps; ++step) {
      std::vector<Piece> pieces;
      std::vector<int32_t> ids, targets;
      for (const int64_t length : {150, 1, 64, 129, 200, 33, 8}) {
        const bool lm = GetParam() == Objective::lm;
        pieces.push_back({.begin = static_cast<int64_t>(ids.size()), .length = length});
        // A language of few words: something to learn. Classes have theirs.
        const uint64_t kind = (step * 7 + pieces.size()) % 3;
        const std::vector<int32_t> word = random_ids(5, config.vocab, 70 + kind);
        Philox random(71, static_cast<uint32_t>(pieces.size()), step);
        for (int64_t i = 0; i < length; ++i)
          ids.push_back(random.below(4) == 0 ? static_cast<int32_t>(random.below(11))
                                             : word[i % 5]);
        for (int64_t i = 1; lm && i < length; ++i) targets.push_back(ids[ids.size() - length + i]);
        targets.push_back(lm ? -1 : static_cast<int32_t>(kind));
      }
      const BatchLoss loss = batch_loss(backend, half ? copy : model, ids_view(ids),
                                        Rows(backend, pieces), ids_view(targets), View{}, &grad);
      run.losses.push_back(loss.sum / loss.weight);
      optimizer.step(backend, model, grad, kRate, squares, half ? &copy : nullptr);
    }
    for (const Param& param : declare(model))
      run.weights.push_back(values_of(backend, *param.tensor));
    return run;
  }

  void expect_losses(const Course& found, const Course& expected, double bound, const char* name) {
    double worst = 0;
    for (int step = 0; step < kSteps; ++step) {
      const double error = std::abs(found.losses[step] / expected.losses[step] - 1);
      EXPECT_LE(error, bound) << name << ", step " << step << ": " << found.losses[step];
      worst = std::max(worst, error);
    }
    fmt::print("[ ten steps] {}: loss {:.4f} to {:.4f}, largest relative difference {:.1e}\n", name,
               found.losses.front(), found.losses.back(), worst);
  }

  Config config;
};
INSTANTIATE_TEST_SUITE_P(Objectives, TenSteps,
                         ::testing::Values(Objective::lm, Objective::classify),
                         [](const auto& info) {
                           return info.param == Objective::lm ? "lm" : "classify";
                         });

TEST_P(TenSteps, LossesAreTheCpus) {
  const auto backend = make_test_backend(), cpu = make_cpu_backend(1);
  const Course expected = train(*cpu, DType::f32);
  EXPECT_LT(expected.losses.back(), expected.losses.front());
  expect_losses(train(*backend, DType::f32), expected, 1e-4, "f32");
  if (backend->activations(DType::bf16) == DType::bf16)
    expect_losses(train(*backend, DType::bf16), expected, 2e-2, "bf16");
}

TEST_P(TenSteps, SameBitsAgain) {
  const auto backend = make_test_backend();
  for (const DType matrices : {DType::f32, DType::bf16}) {
    const Course first = train(*backend, matrices), again = train(*backend, matrices);
    EXPECT_EQ(first.losses, again.losses) << name_of(matrices);
    ASSERT_EQ(first.weights.size(), again.weights.size());
    for (size_t i = 0; i < first.weights.size(); ++i)
      EXPECT_TRUE(same_bits(first.weights[i], again.weights[i])) << name_of(matrices) << ' ' << i;
  }
}

}  // namespace
}  // namespace coil
