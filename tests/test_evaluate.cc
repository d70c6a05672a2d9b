// Metrics against values worked out by hand; evaluation in batches, in pieces and alone.

#include "pipelines/evaluate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

#include "genomics/alphabet.h"
#include "tests/records.h"

namespace coil {
namespace {

TEST(Metrics, BinaryByHand) {
  const std::vector<int32_t> truth = {0, 0, 1, 1, 1};
  const std::vector<double> p = {.9, .1, .4, .6, .6, .4, .2, .8, .4, .6};
  const Metrics m = measure(truth, p, 2);  // answers 0 1 0 1 1
  EXPECT_EQ(m.count, 5);
  EXPECT_EQ(m.confusion, (std::vector<std::vector<int64_t>>{{1, 1}, {1, 2}}));
  EXPECT_DOUBLE_EQ(m.accuracy, 0.6);
  EXPECT_DOUBLE_EQ(m.mcc, 1.0 / 6);  // (2*1 - 1*1) / sqrt(3*3*2*2)
  EXPECT_DOUBLE_EQ(m.macro_f1, (0.5 + 2.0 / 3) / 2);
  EXPECT_DOUBLE_EQ(m.auroc, 4.5 / 6);  // one tie counts a half
  EXPECT_DOUBLE_EQ(m.recall[0], 0.5);
  EXPECT_DOUBLE_EQ(m.recall[1], 2.0 / 3);
  EXPECT_DOUBLE_EQ(m.precision[1], 2.0 / 3);
  EXPECT_NEAR(m.loss, -std::log(.9 * .4 * .4 * .8 * .6) / 5, 1e-12);
}

TEST(Metrics, ThreeClassesByHand) {
  const std::vector<int32_t> truth = {0, 0, 1, 1, 2, 2};
  const int answers[] = {0, 1, 1, 1, 2, 0};
  std::vector<double> p(18, 0.1);
  for (int i = 0; i < 6; ++i) p[3 * i + answers[i]] = 0.8;
  const Metrics m = measure(truth, p, 3);
  EXPECT_EQ(m.confusion, (std::vector<std::vector<int64_t>>{{1, 1, 0}, {0, 2, 0}, {1, 0, 1}}));
  EXPECT_NEAR(m.mcc, 12 / std::sqrt(22.0 * 24.0), 1e-12);  // c s = 24, sum p t = 12
  EXPECT_NEAR(m.macro_f1, (0.5 + 0.8 + 2.0 / 3) / 3, 1e-12);
  // One against the rest, ties at 0.1 and 0.8: 5 of 8, 7 of 8, 6 of 8 pairs in order.
  // class 2 0.75.
  EXPECT_NEAR(m.auroc, (0.625 + 0.875 + 0.75) / 3, 1e-12);
}

TEST(Metrics, UndefinedIsSaidSo) {
  const std::vector<int32_t> truth = {1, 1};
  const std::vector<double> p = {.2, .7, .1, .3, .6, .1};
  const Metrics m = measure(truth, p, 3);
  EXPECT_EQ(m.accuracy, 1);
  EXPECT_EQ(m.mcc, 0);  // one class only
  EXPECT_TRUE(std::isnan(m.auroc));
  EXPECT_TRUE(std::isnan(m.recall[0]));
  EXPECT_TRUE(std::isnan(m.precision[2]));
  EXPECT_EQ(m.macro_f1, 1);
  EXPECT_EQ(measure({}, {}, 3).count, 0);
  const std::vector<double> bad = {.2, std::nan(""), .1, .3, .6, .1};
  EXPECT_TRUE(std::isnan(measure(truth, bad, 3).loss));
}

class EvaluateModel : public ::testing::Test {
 protected:
  EvaluateModel() : backend_(make_cpu_backend(1)) {
    for (int64_t length : {5, 90, 400, 33, 1, 170}) {
      all_.codes.push_back(random_codes(length, 100 + length));
      all_.names.push_back(std::to_string(length));
      all_.items.push_back({.record = static_cast<int64_t>(all_.items.size()),
                            .begin = 0,
                            .length = length,
                            .label = static_cast<int32_t>(length % 2)});
    }
  }
  Model model(Objective objective) {
    Config config;
    config.d = 16;
    config.e = 32;
    config.dt_rank = 1;
    config.layers.resize(2);
    config.objective = objective;
    config.alphabet = "dna";
    if (objective == Objective::classify) config.labels = {"even", "odd"};
    return make_model(*backend_, config, 3);
  }
  std::unique_ptr<Backend> backend_;
  Examples all_;
};

TEST_F(EvaluateModel, PiecesAndBatchesAgree) {
  const Model m = model(Objective::classify);
  const Evaluation whole = evaluate(*backend_, m, all_, all_.items, {.batch_tokens = 10'000});
  const Evaluation pieces = evaluate(*backend_, m, all_, all_.items, {.batch_tokens = 64});
  const Evaluation standard = evaluate(*backend_, m, all_, all_.items, {});
  ASSERT_EQ(whole.probabilities.size(), 12u);
  for (size_t i = 0; i < 12; ++i) {
    EXPECT_NEAR(whole.probabilities[i], pieces.probabilities[i], 1e-5);
    EXPECT_NEAR(whole.probabilities[i], standard.probabilities[i], 1e-5);
  }
  for (size_t i = 0; i < 6; ++i)
    EXPECT_NEAR(whole.probabilities[2 * i] + whole.probabilities[2 * i + 1], 1, 1e-12);
}

TEST_F(EvaluateModel, BothStrandsAreTheirMean) {
  const Model m = model(Objective::classify);
  const auto run = [&](const Examples& e, bool both) {
    return evaluate(*backend_, m, e, e.items, {.batch_tokens = 1000, .both_strands = both})
        .probabilities;
  };
  Examples reversed = all_;
  for (auto& codes : reversed.codes) dna::reverse_complement(codes);
  const auto both = run(all_, true), forward = run(all_, false), reverse = run(reversed, false);
  for (size_t i = 0; i < both.size(); ++i)
    EXPECT_NEAR(both[i], (forward[i] + reverse[i]) / 2, 1e-6);
}

TEST_F(EvaluateModel, BitsPerBase) {
  const Model m = model(Objective::lm);
  const auto bits = [&](int64_t batch, bool both) {
    return evaluate(*backend_, m, all_, all_.items, {.batch_tokens = batch, .both_strands = both});
  };
  double nats = 0;
  int64_t counted = 0;
  for (const Codes& codes : all_.codes) {
    std::vector<int32_t> ids(codes.begin(), codes.end());
    const Rows rows = Rows::equal(*backend_, 1, static_cast<int64_t>(ids.size()));
    const Tensor h =
        hidden(*backend_, m, host_view(ids.data(), DType::i32, {rows.total()}), rows, nullptr);
    const Tensor logits = lm_logits(*backend_, m, h);  // (t, v)
    for (size_t i = 1; i < ids.size(); ++i) {
      if (ids[i] == dna::kN) continue;
      const float* row = logits.view().row<float>(static_cast<int64_t>(i) - 1);
      double sum = 0;
      for (int base = dna::kA; base <= dna::kT; ++base)
        sum += std::exp(static_cast<double>(row[base]));
      nats += std::log(sum) - row[ids[i]];
      ++counted;
    }
  }
  const Evaluation whole = bits(10'000, false), pieces = bits(64, false);
  EXPECT_EQ(whole.metrics.count, counted);
  EXPECT_EQ(pieces.metrics.count, counted);
  EXPECT_NEAR(whole.bits_per_base, nats / static_cast<double>(counted) / std::numbers::ln2, 1e-5);
  EXPECT_NEAR(pieces.bits_per_base, whole.bits_per_base, 1e-5);
  EXPECT_NEAR(bits(10'000, true).bits_per_base, bits(64, true).bits_per_base, 1e-5);
}

}  // namespace
}  // namespace coil
