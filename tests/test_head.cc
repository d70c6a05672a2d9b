// Classifier heads and their gradients by finite differences, the optimizer, and that training
// learns.
#include "model/head.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "model/loss.h"
#include "model/optimizer.h"
#include "tests/model_testing.h"

namespace coil {
namespace {

class Classifier : public ::testing::TestWithParam<Pooling> {
 protected:
  Classifier() {
    Philox random(3, 0, 0);
    std::vector<Piece> pieces;
    for (int64_t length : {5, 1, 40, 33, 64}) {
      pieces.push_back({.begin = static_cast<int64_t>(ids_.size()), .length = length});
      const auto more = random_ids(length, model_.config.vocab, static_cast<uint64_t>(length));
      ids_.insert(ids_.end(), more.begin(), more.end());
    }
    rows_ = std::make_unique<Rows>(*backend_, pieces);
  }
  BatchLoss loss(Model* grad, Tensor* logits = nullptr, double scale = 1) {
    return batch_loss(*backend_, model_, ids_view(ids_), *rows_, ids_view(targets_),
                      host_view(class_weights_.data(), DType::f32, {3}), grad, logits, scale);
  }
  double mean_loss() {
    const BatchLoss result = loss(nullptr);
    return result.sum / result.weight;
  }

  std::unique_ptr<Backend> backend_ = make_cpu_backend();
  Model model_ = random_model(*backend_, classifier_config(GetParam()), 23);
  std::vector<int32_t> ids_, targets_ = {0, 2, 1, -1, 2};
  std::vector<float> class_weights_ = {1, 0.5f, 2};
  std::unique_ptr<Rows> rows_;
};
INSTANTIATE_TEST_SUITE_P(Head, Classifier, ::testing::Values(Pooling::mean, Pooling::last),
                         [](const auto& info) {
                           return info.param == Pooling::mean ? "mean" : "last";
                         });

TEST_P(Classifier, LossIsThatOfTheLogits) {
  Tensor logits;
  const BatchLoss found = loss(nullptr, &logits);
  EXPECT_EQ(found.weight, 1 + 2 + 0.5 + 2);
  ASSERT_EQ(logits.view().rows(), 5);
  ASSERT_EQ(logits.view().cols(), 3);
  double sum = 0;
  for (int64_t i = 0; i < 5; ++i) {
    const int32_t target = targets_[static_cast<size_t>(i)];
    if (target < 0) continue;
    const float* row = logits.view().row<float>(i);
    const double total = std::exp(row[0]) + std::exp(row[1]) + std::exp(row[2]);
    sum -= class_weights_[static_cast<size_t>(target)] * std::log(std::exp(row[target]) / total);
  }
  EXPECT_NEAR(found.sum, sum, 1e-5);
}

TEST_P(Classifier, GradientByFiniteDifferences) {
  Model grad = zeros_like(*backend_, model_);
  loss(&grad);
  expect_slopes(model_, grad, [this] { return mean_loss(); });
}

TEST_P(Classifier, ScaleAndAccumulation) {
  Model once = zeros_like(*backend_, model_), twice = zeros_like(*backend_, model_);
  Tensor logits;
  loss(&once, &logits);
  for (int i = 0; i < 2; ++i) loss(&twice, nullptr, 0.5);
  const std::vector<Param> a = declare(once), b = declare(twice);
  for (size_t i = 0; i < a.size(); ++i)
    EXPECT_LE(
        relative_difference(values_of(*backend_, *b[i].tensor), values_of(*backend_, *a[i].tensor)),
        1e-5)
        << a[i].info.name;
  // The logits that come back are logits, not their gradient.
  Tensor again;
  loss(nullptr, &again);
  EXPECT_LE(largest_difference(logits.span<float>(), again.span<float>()), 1e-6);
}

TEST_P(Classifier, NothingCountedChangesNothing) {
  std::fill(targets_.begin(), targets_.end(), -1);
  Model grad = zeros_like(*backend_, model_);
  const BatchLoss found = loss(&grad);
  EXPECT_EQ(found.sum, 0);
  EXPECT_EQ(found.weight, 0);
  for (const Param& param : declare(grad))
    for (float value : param.tensor->span<float>()) ASSERT_EQ(value, 0.0f) << param.info.name;
}

// A record in pieces gives the logits of the record whole: mixer state and pooling alike.
TEST_P(Classifier, LogitsOfARecordInPieces) {
  std::vector<int32_t> ids = random_ids(500, model_.config.vocab, 9);
  auto logits_of = [&](int64_t chunk) {
    State state(*backend_, model_.config, 1);
    std::vector<float> logits;
    for (int64_t begin = 0; begin < 500; begin += chunk) {
      const int64_t length = std::min<int64_t>(chunk, 500 - begin);
      const Rows rows(*backend_, {{.length = length,
                                   .position = begin,
                                   .from = begin == 0 ? -1 : 0,
                                   .to = 0,
                                   .last = begin + length == 500}});
      const Tensor h = hidden(*backend_, model_, ids_view(ids).slice(begin, length), rows, &state);
      const Tensor part = class_logits(*backend_, model_, h, rows, &state);
      EXPECT_EQ(part.view().rows(), begin + length == 500 ? 1 : 0);
      if (part.view().rows() > 0) logits = values_of(*backend_, part);
    }
    return logits;
  };
  const std::vector<float> whole = logits_of(500);
  for (int64_t chunk : {1, 64, 499})
    EXPECT_LE(largest_difference(logits_of(chunk), whole), 1e-5) << chunk;
}

// Audio: one softmax over the codes of mu-law, or two over those of 16 bits, and none over the
// begin token behind them.
TEST(AudioHead, LossAndGradient) {
  const auto backend = make_cpu_backend();
  for (const SampleCodes codes : {SampleCodes::mulaw, SampleCodes::pcm16}) {
    Config config = small_config(false);
    config.audio = {.rate = 8000, .codes = codes};
    config.vocab = config.predicted() + 3;
    Model model = random_model(*backend, config, 61), grad = zeros_like(*backend, model);
    const auto begin = static_cast<int32_t>(config.predicted());
    std::vector<int32_t> ids = {begin}, targets;
    const int64_t groups = config.predicted() / 256;
    for (const int32_t code : random_ids(40, 256, 3))
      ids.push_back(code + 256 * static_cast<int32_t>((ids.size() - 1) % groups));
    targets.assign(ids.begin() + 1, ids.end());
    targets.push_back(-1);
    const Rows rows = Rows::equal(*backend, 1, 41);
    const auto loss = [&](Model* into, Tensor* logits) {
      return batch_loss(*backend, model, ids_view(ids), rows, ids_view(targets), View{}, into,
                        logits);
    };
    Tensor logits;
    const BatchLoss found = loss(nullptr, &logits);
    EXPECT_EQ(found.weight, 40);
    ASSERT_EQ(logits.view().cols(), config.predicted());
    double sum = 0;
    for (int64_t i = 0; i < 40; ++i) {
      const float* row = logits.view().row<float>(i) + targets[i] / 256 * 256;
      double total = 0;
      for (int k = 0; k < 256; ++k) total += std::exp(row[k]);
      sum += std::log(total) - row[targets[i] % 256];
    }
    EXPECT_NEAR(found.sum, sum, 1e-4 * sum);

    loss(&grad, nullptr);
    std::span<float> w = model.embedding.span<float>(), g = grad.embedding.span<float>();
    double norm = 0;
    for (const float value : g) norm += static_cast<double>(value) * value;
    norm = std::sqrt(norm);
    const std::vector<float> before(w.begin(), w.end());
    const auto at = [&](double h) {
      for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(before[i] + h * g[i] / norm);
      return loss(nullptr, nullptr).sum / 40;
    };
    EXPECT_NEAR((at(1e-2) - at(-1e-2)) / 2e-2, norm, 0.01 * norm);
  }
}

class OptimizerTest : public ::testing::Test {
 protected:
  void fill_gradient(float value) {
    for (const Param& param : declare(grad_)) backend_->fill(*param.tensor, value);
  }
  std::unique_ptr<Backend> backend_ = make_cpu_backend();
  Model model_ = random_model(*backend_, small_config(false), 41);
  Model grad_ = zeros_like(*backend_, model_);
};

TEST_F(OptimizerTest, ClipsByTheNormOfAllGradients) {
  const double count = static_cast<double>(parameters(model_.config));
  for (const float value : {0.5f, 1e-4f}) {
    Optimizer optimizer(*backend_, model_, {.beta1 = 0.9, .clip = 1});
    fill_gradient(value);
    const double norm = optimizer.step(*backend_, model_, grad_, 1e-3),
                 expected = value * std::sqrt(count);
    EXPECT_NEAR(norm, expected, 1e-6 * expected);
    const double factor = std::min(1.0, 1 / (expected + 1e-6));
    EXPECT_EQ(optimizer.steps, 1);
    for (const Param& param : declare(optimizer.m))
      EXPECT_NEAR(param.tensor->as<float>()[0], 0.1 * value * factor, 1e-5 * value * factor)
          << param.info.name;
    for (const Param& param : declare(grad_))
      for (float g : param.tensor->span<float>()) ASSERT_EQ(g, 0.0f) << param.info.name;
  }
}

TEST_F(OptimizerTest, ANormThatIsNotFiniteChangesNothing) {
  Optimizer optimizer(*backend_, model_, {});
  fill_gradient(0.1f);
  optimizer.step(*backend_, model_, grad_, 1e-3);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    fill_gradient(0.1f);
    grad_.embedding.as<float>()[3] = bad;
    std::vector<std::vector<float>> before, after;
    auto record = [&](std::vector<std::vector<float>>& into) {
      for (Model* model : {&model_, &optimizer.m, &optimizer.v})
        for (const Param& param : declare(*model))
          into.push_back(values_of(*backend_, *param.tensor));
    };
    record(before);
    EXPECT_FALSE(std::isfinite(optimizer.step(*backend_, model_, grad_, 1e-3)));
    record(after);
    EXPECT_EQ(optimizer.steps, 1);
    EXPECT_EQ(before, after);
  }
}

// Sequences that repeat a random word of four tokens: after one period all is known.
TEST(Training, LearnsToRepeat) {
  const auto backend = make_cpu_backend();
  Config config = small_config(false);
  config.d = 32;
  config.e = 64;
  config.n = 8;
  Model model = make_model(*backend, config, 51), grad = zeros_like(*backend, model);
  Optimizer optimizer(*backend, model, {.weight_decay = 0.01, .clip = 1});
  const int64_t batch = 16, length = 32;
  double first = 0, last = 0;
  for (uint64_t step = 0; step < 60; ++step) {
    Philox random(5, 0, step);
    std::vector<int32_t> ids, targets;
    for (int64_t i = 0; i < batch; ++i) {
      int32_t word[4];
      for (int32_t& token : word) token = static_cast<int32_t>(random.below(4));
      for (int64_t j = 0; j < length; ++j) {
        ids.push_back(word[j % 4]);
        targets.push_back(j < 4 || j + 1 == length ? -1 : word[(j + 1) % 4]);
      }
    }
    const BatchLoss loss =
        batch_loss(*backend, model, ids_view(ids), Rows::equal(*backend, batch, length),
                   ids_view(targets), View{}, &grad);
    optimizer.step(*backend, model, grad, 1e-2);
    last = loss.sum / loss.weight;
    if (step == 0) first = last;
  }
  EXPECT_GT(first, 2.0);  // ln 11 = 2.4
  EXPECT_LT(last, 0.5);
}

}  // namespace
}  // namespace coil
