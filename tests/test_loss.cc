// The loss in chunks: gradients through whole sequences whatever the chunk, of every mixer, both
// topologies and every head; and gradients that end where a chunk begins.
#include "model/loss.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "kernels/error.h"
#include "tests/model_testing.h"

namespace coil {
namespace {

struct Case {
  const char* network;
  const char* head;  // lm | mlm | audio | mean | last
};
std::string name_of(const Case& test) { return std::string(test.network) + "_" + test.head; }

void PrintTo(const Case& test, std::ostream* out) { *out << name_of(test); }

Config config_of(const Case& test) {
  const std::string network = test.network;
  Config config = network == "s4d"      ? mixed_config("s4d", 2)
                  : network == "mixed"  ? mixed_config("s4d,mamba1", 3)
                  : network == "unet"   ? unet_config("s4d/s4d,mamba1/mamba1")
                  : network == "unet16" ? unet_config("s4d,mamba1", "16")
                                        : small_config(network == "falcon_mamba");
  if (test.head == std::string("audio")) {  // two softmaxes, a begin token behind their codes
    config.audio = {.rate = 8000, .codes = SampleCodes::pcm16};
    config.vocab = config.predicted() + 1;
  }
  if (test.head == std::string("mlm")) config.objective = Objective::mlm;
  if (test.head == std::string("lm") || config.objective == Objective::mlm || config.audio.rate > 0)
    return config;
  config.objective = Objective::classify;
  config.pooling = test.head == std::string("last") ? Pooling::last : Pooling::mean;
  config.labels = {"a", "b", "c"};
  return config;
}

// Several sequences, their targets and class weights.
struct Records {
  std::vector<int32_t> ids, targets;
  std::vector<float> class_weights = {1, 0.5f, 2};
  std::vector<Piece> pieces;
  Records(const Config& config, const std::vector<int64_t>& lengths, uint64_t seed) {
    const bool lm = config.objective != Objective::classify;
    for (const int64_t length : lengths) {
      pieces.push_back({.begin = static_cast<int64_t>(ids.size()), .length = length});
      const std::vector<int32_t> own = random_ids(length, config.vocab, seed + pieces.size());
      ids.insert(ids.end(), own.begin(), own.end());
      if (lm) targets.insert(targets.end(), own.begin() + 1, own.end());
      targets.push_back(lm ? -1 : static_cast<int32_t>(pieces.size() % 3));
    }
    if (!lm && targets.size() > 2) targets[1] = -1;
  }
};

class LossInChunks : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    COIL_NEEDS_TEST_DEVICE();
    backend_ = make_test_backend();
    model_ = random_model(*backend_, config_of(GetParam()), 29);
  }
  BatchLoss loss(Records& records, Model* grad, const Cut& cut) {
    const bool lm = model_.config.objective != Objective::classify;
    const View weights = host_view(records.class_weights.data(), DType::f32, {3});
    return batch_loss(*backend_, model_, ids_view(records.ids), Rows(*backend_, records.pieces),
                      ids_view(records.targets), lm ? View{} : weights, grad, nullptr, 0.7, cut);
  }
  // The largest relative difference of a tensor's gradient, and its name.
  std::pair<double, std::string> apart(Model& found, Model& expected) {
    const std::vector<Param> a = declare(found), b = declare(expected);
    std::pair<double, std::string> most;
    for (size_t i = 0; i < a.size(); ++i) {
      const double difference = relative_difference(values_of(*backend_, *a[i].tensor),
                                                    values_of(*backend_, *b[i].tensor));
      if (!(difference <= most.first)) most = {difference, a[i].info.name};
    }
    return most;
  }
  void expect_same(Records& records, const std::vector<Cut>& cuts, double tolerance,
                   double of_loss = 1e-6) {
    Model expected = zeros_like(*backend_, model_);
    const BatchLoss whole = loss(records, &expected, {});
    for (const Cut& cut : cuts) {
      Model grad = zeros_like(*backend_, model_);
      const BatchLoss found = loss(records, &grad, cut);
      EXPECT_EQ(found.weight, whole.weight);
      EXPECT_NEAR(found.sum, whole.sum, of_loss * std::fabs(whole.sum)) << "chunk " << cut.chunk;
      EXPECT_NEAR(loss(records, nullptr, cut).sum, whole.sum, of_loss * std::fabs(whole.sum));
      const auto [difference, name] = apart(grad, expected);
      fmt::print("[ loss     ] {} steps, chunk {}, rows {}: {:.1e} in {}\n", records.ids.size(),
                 cut.chunk, cut.rows, difference, name);
      EXPECT_LE(difference, tolerance) << name << ", chunk " << cut.chunk << ", rows " << cut.rows;
    }
  }

  std::unique_ptr<Backend> backend_;
  Model model_;
};
INSTANTIATE_TEST_SUITE_P(
    Loss, LossInChunks,
    ::testing::Values(Case{"mamba", "lm"}, Case{"mamba", "mlm"}, Case{"mamba", "mean"},
                      Case{"mamba", "last"}, Case{"falcon_mamba", "lm"}, Case{"s4d", "lm"},
                      Case{"s4d", "mean"}, Case{"s4d", "last"}, Case{"mixed", "lm"},
                      Case{"unet", "lm"}, Case{"unet", "mean"}, Case{"unet", "last"},
                      Case{"unet16", "lm"}, Case{"unet16", "mean"}, Case{"mamba", "audio"}),
    [](const auto& info) { return name_of(info.param); });

// Chunks that divide neither the lengths nor the pooling of a U-Net; shorter than a coarse step
// too.
TEST_P(LossInChunks, GradientsAreThoseOfTheWhole) {
  Records records(model_.config, {1, 150, 33, 2, 97, 64, 131}, 7);
  expect_same(records,
              {{.chunk = 1},
               {.chunk = 7},
               {.chunk = 64},
               {.chunk = 1000},
               {.rows = 100},
               {.rows = 100, .chunk = 140},
               {.rows = 1, .chunk = 1000}},
              5 * kSameAnswer);
}

TEST_P(LossInChunks, OfALongSequenceTheyDoNotDependOnTheChunk) {
  const bool small = model_.config.layers[0].mixer == MixerKind::mamba1;
  const bool slow = std::getenv("COIL_SLOW") != nullptr;  // a minute for each network
  Records records(model_.config, {!small ? 2'000 : slow ? 65'536 : 8'000}, 8);
  expect_same(records, {{.chunk = 333}, {.chunk = 1999}}, 10 * kSameAnswer);
}

// Truncated: as if each chunk's first state were given, a number that nothing is known of.
TEST_P(LossInChunks, TruncatedGradientsEndWhereAChunkBegins) {
  const int64_t length = 100, chunk = 37;
  Records records(model_.config, {length}, 9);
  const Config& config = model_.config;
  Model exact = zeros_like(*backend_, model_), found = zeros_like(*backend_, model_);
  const BatchLoss whole = loss(records, &exact, {});
  const BatchLoss carried = loss(records, &found, {.chunk = chunk, .truncate = true});
  EXPECT_NEAR(carried.sum, whole.sum, 1e-6 * std::fabs(whole.sum));  // the state is carried
  EXPECT_GT(apart(found, exact).first, 1e-3);
  // What comes to a chunk's last layer is the same; of its parameters only the path through the
  // state is missing. In the chunk that begins the sequence nothing is.
  Model once = zeros_like(*backend_, model_), again = zeros_like(*backend_, model_);
  loss(records, &once, {.chunk = length});
  loss(records, &again, {.chunk = length, .truncate = true});
  EXPECT_EQ(apart(again, once).first, 0);
  if (config.objective != Objective::lm || config.audio.rate > 0) return;

  // By hand, chunk by chunk.
  Model parts = zeros_like(*backend_, model_);
  State state(*backend_, config, 3);
  for (int32_t i = 0; i * chunk < length; ++i) {
    const int64_t begin = i * chunk, steps = std::min(chunk, length - begin);
    const Rows rows(*backend_, {{.length = steps, .position = begin, .from = i - 1, .to = i}});
    std::vector<int32_t> ids(records.ids.begin() + begin, records.ids.begin() + begin + steps);
    Saved saved;
    const Tensor h = hidden(*backend_, model_, ids_view(ids), rows, &state, &saved);
    const Tensor logits = lm_logits(*backend_, model_, h);
    std::vector<int32_t> targets(records.targets.begin() + begin,
                                 records.targets.begin() + begin + steps);
    Tensor on_device(*backend_, DType::i32, {steps});
    backend_->copy(ids_view(targets), on_device);
    backend_->sync();
    backend_->run(CrossEntropy{.logits = logits,
                               .targets = on_device,
                               .loss = Tensor(*backend_, DType::f32, {steps}),
                               .dlogits = logits,
                               .scale = 0.7f / static_cast<float>(whole.weight)});
    const Tensor dh(*backend_, DType::f32, {steps, config.d});
    backend_->run(Gemm{.a = logits, .b = model_.output(), .c = dh});
    model_.backbone.backward(*backend_, config, saved, rows, dh, nullptr, parts.backbone);
  }
  const std::vector<Param> a = declare(found), b = declare(parts);
  for (size_t i = 0; i < a.size(); ++i) {
    const std::string& name = a[i].info.name;
    if (name.find(".layers.") == name.npos && name.find(".stages.") == name.npos) continue;
    EXPECT_LE(
        relative_difference(values_of(*backend_, *a[i].tensor), values_of(*backend_, *b[i].tensor)),
        2e-5)
        << name;
  }
}

#ifdef COIL_TEST_CUDA
TEST_P(LossInChunks, OfMoreThanAMillionStepsTheyDoNotDependOnTheChunk) {
  const bool small = std::getenv("COIL_SMALL_SHAPES") != nullptr;  // compute-sanitizer
  const int64_t length = small ? 3000 : 3 << 19;
  Records records(model_.config, {length}, 13);
  // Too short for kept states before tiles; of some of the chunks before the last; of all.
  expect_same(records, {{.chunk = length / 64}, {.chunk = length / 31}, {.chunk = length / 16 + 5}},
              1e-3);
}

TEST_P(LossInChunks, InBf16TheyAreWithinItsRounding) {
  const auto cpu = make_cpu_backend();
  model_ = converted(*backend_, lively_model(*cpu, model_.config, 29), DType::bf16);
  Records records(model_.config, {150, 33, 2000}, 12);
  expect_same(records, {{.chunk = 64}, {.chunk = 999}}, 2e-2, 1e-3);
}
#endif

// What a step is told by later ones would show in the sum of the losses before it, which is in f64.
TEST_P(LossInChunks, NothingIsSeenBeforeItsTime) {
  if (model_.config.objective != Objective::lm) return;  // a classifier sees all
  Records records(model_.config, {300}, 10);
  std::fill(records.targets.begin() + 201, records.targets.end(), -1);
  const Cut cut{.chunk = 53};
  Model grad = zeros_like(*backend_, model_);
  const double before = loss(records, &grad, cut).sum;
  for (size_t i = 202; i < 300; ++i) records.ids[i] = (records.ids[i] + 1) % 11;
  grad = zeros_like(*backend_, model_);
  EXPECT_NEAR(loss(records, &grad, cut).sum, before, 1e-9 * before);
}

TEST_P(LossInChunks, SameBitsTwice) {
  Records records(model_.config, {90, 7}, 11);
  Model first = zeros_like(*backend_, model_), second = zeros_like(*backend_, model_);
  loss(records, &first, {.chunk = 13});
  loss(records, &second, {.chunk = 13});
  EXPECT_EQ(apart(first, second).first, 0);
}

}  // namespace
}  // namespace coil
