// Networks that read sequences from both ends, and both strands as one: forward against the causal
// network, gradients by finite differences and computed layer by layer, and that nothing depends on
// the strand.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "genomics/alphabet.h"
#include "kernels/error.h"
#include "model/loss.h"
#include "model/memory_plan.h"
#include "pipelines/classify.h"
#include "pipelines/evaluate.h"
#include "tests/model_testing.h"
#include "tests/records.h"

namespace coil {
namespace {

struct Case {
  const char* name;
  bool bidirectional, equivariant;
  Pooling pooling;
  int64_t mlp;
};
void PrintTo(const Case& test, std::ostream* out) { *out << test.name; }

Config config_of(const Case& test) {
  Config config = classifier_config(test.pooling);
  config.model_type = "coil";
  config.bidirectional = test.bidirectional;
  config.equivariant = test.equivariant;
  config.mlp = test.mlp;
  return config;
}

class Directions : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    COIL_NEEDS_TEST_DEVICE();
    backend_ = make_test_backend();
    model_ = random_model(*backend_, config_of(GetParam()), 31);
  }
  // Of sequences of these lengths, or pairs of them.
  BatchLoss loss(const std::vector<int64_t>& lengths, Model* grad, const Cut& cut = {}) {
    std::vector<Piece> pieces;
    std::vector<int32_t> ids, targets;
    for (const int64_t length : lengths) {
      for (int strand = 0; strand < (model_.config.equivariant ? 2 : 1); ++strand) {
        pieces.push_back({.begin = static_cast<int64_t>(ids.size()), .length = length});
        const auto more = random_ids(length, model_.config.vocab, 7 + pieces.size());
        ids.insert(ids.end(), more.begin(), more.end());
      }
      targets.push_back(static_cast<int32_t>(targets.size() % 3));
    }
    return batch_loss(*backend_, model_, ids_view(ids), Rows(*backend_, pieces), ids_view(targets),
                      {}, grad, nullptr, 1, cut);
  }
  std::unique_ptr<Backend> backend_;
  Model model_;
};
INSTANTIATE_TEST_SUITE_P(Model, Directions,
                         ::testing::Values(Case{"both_ends_mean", true, false, Pooling::mean, 0},
                                           Case{"both_ends_mlp", true, false, Pooling::mean, 1},
                                           Case{"strands", false, true, Pooling::mean, 0},
                                           Case{"strands_last", false, true, Pooling::last, 0},
                                           Case{"all", true, true, Pooling::mean, 1}),
                         [](const auto& info) { return std::string(info.param.name); });

#ifndef COIL_TEST_CUDA
TEST_P(Directions, GradientByFiniteDifferences) {
  const std::vector<int64_t> lengths = {5, 1, 20, 13};
  model_ = {};  // before the memory it lies in
  backend_ = make_cpu_backend(1);
  model_ = random_model(*backend_, config_of(GetParam()), 31);
  Model grad = zeros_like(*backend_, model_);
  loss(lengths, &grad);
  expect_slopes(model_, grad, [&] {
    const BatchLoss found = loss(lengths, nullptr);
    return found.sum / found.weight;
  });
}
#endif

// Longer than a chunk: layer by layer. The same sums in the same order, so the same bits, where the
// batch is not taken apart.
TEST_P(Directions, GradientsLayerByLayerAreThoseOfTheWhole) {
  for (const std::vector<int64_t>& lengths :
       std::vector<std::vector<int64_t>>{{150}, {5, 150, 1, 90, 33}}) {
    Model expected = zeros_like(*backend_, model_);
    const BatchLoss whole = loss(lengths, &expected);
    for (const Cut& cut : {Cut{.chunk = 64}, Cut{.chunk = 1}, Cut{.rows = 60, .chunk = 200}}) {
      Model grad = zeros_like(*backend_, model_);
      const BatchLoss found = loss(lengths, &grad, cut);
      EXPECT_EQ(found.weight, whole.weight);
      EXPECT_NEAR(found.sum, whole.sum, 1e-6 * whole.sum);
      const std::vector<Param> a = declare(grad), b = declare(expected);
      for (size_t i = 0; i < a.size(); ++i)
        EXPECT_LE(relative_difference(values_of(*backend_, *a[i].tensor),
                                      values_of(*backend_, *b[i].tensor)),
                  5 * kSameAnswer)
            << a[i].info.name << ", chunk " << cut.chunk;
    }
  }
}

// And it is one layer that is held at a time: the plan runs the code.
TEST(LayerByLayer, TakesTheMemoryOfOneLayer) {
  for (const bool bidirectional : {true, false}) {
    Config config = config_of({"", bidirectional, !bidirectional, Pooling::mean, 0});
    config.layers.resize(12);
    const MemoryRequest whole{.length = 20'000, .train = true};
    MemoryRequest cut = whole;
    cut.chunk = 1000;
    const int64_t all = plan_memory(config, whole).activations;
    const int64_t one = plan_memory(config, cut).activations;
    EXPECT_LT(one, all / 4) << bidirectional;
    EXPECT_GT(one, all / 30) << bidirectional;
  }
}

// Hidden states of one sequence.
std::vector<float> hidden_of(Backend& backend, const Model& model, std::vector<int32_t> ids) {
  const Rows rows = Rows::equal(backend, 1, static_cast<int64_t>(ids.size()));
  return values_of(backend, hidden(backend, model, ids_view(ids), rows, nullptr));
}

class BothEnds : public ::testing::Test {
 protected:
  std::unique_ptr<Backend> backend_ = make_cpu_backend();
  Model model_ = random_model(*backend_, config_of({"", true, false, Pooling::mean, 0}), 37);
};

// With the second set silenced it is the causal network.
TEST_F(BothEnds, HasTheCausalNetworkInside) {
  Config config = model_.config;
  config.bidirectional = false;
  Model causal = make_model(*backend_, config, 1);
  std::vector<Param> all = declare(model_), own = declare(causal);
  for (const Param& to : own)
    for (const Param& from : all)
      if (from.info.name == to.info.name) backend_->copy(*from.tensor, *to.tensor);
  for (const Param& param : all)
    if (param.info.name.ends_with("x_proj_b.weight") || param.info.name.ends_with("mixer.D_b"))
      backend_->fill(*param.tensor, 0);
  const std::vector<int32_t> ids = random_ids(97, config.vocab, 3);
  EXPECT_LE(
      largest_difference(hidden_of(*backend_, model_, ids), hidden_of(*backend_, causal, ids)),
      1e-5);
}

// The two sets exchanged and the sequence reversed: the hidden states reversed.
TEST_F(BothEnds, IsItsOwnMirrorImage) {
  std::vector<int32_t> ids = random_ids(97, model_.config.vocab, 4);
  const std::vector<float> forward = hidden_of(*backend_, model_, ids);
  for (Layer& layer : model_.backbone.layers) {
    auto& weights = std::get<Mamba1Weights>(layer.mixer);
    std::swap(static_cast<Mamba1Direction&>(weights), weights.back);
  }
  std::reverse(ids.begin(), ids.end());
  const std::vector<float> back = hidden_of(*backend_, model_, ids);
  const auto d = static_cast<size_t>(model_.config.d);
  std::vector<float> turned;
  for (size_t i = ids.size(); i-- > 0;)
    turned.insert(turned.end(), back.begin() + i * d, back.begin() + (i + 1) * d);
  EXPECT_LE(largest_difference(turned, forward), 1e-5);
}

TEST_F(BothEnds, APieceOfASequenceIsRefused) {
  std::vector<int32_t> ids = random_ids(20, model_.config.vocab, 5);
  State state(*backend_, model_.config, 1);
  const Rows rows(*backend_, {{.length = 20, .to = 0, .last = false}});
  EXPECT_THROW(hidden(*backend_, model_, ids_view(ids), rows, &state), Error);
}

// Of DNA, as classify and eval read it.
Model dna_model(Backend& backend, const Case& test, int64_t kmer = 1) {
  Config config = config_of(test);
  config.alphabet = "dna";
  config.kmer = kmer;
  config.tie = kmer == 1;
  config.vocab = Config::kLetters + (kmer > 1 ? int64_t{1} << 2 * kmer : 0);
  return random_model(backend, config, 41);
}

Examples examples_of(const std::vector<Codes>& records) {
  Examples all{.codes = records, .names = {}, .labels = {"a", "b", "c"}, .items = {}};
  for (size_t i = 0; i < records.size(); ++i) {
    all.names.push_back(fmt::format("r{}", i));
    all.items.push_back({static_cast<int64_t>(i), 0, static_cast<int64_t>(records[i].size()),
                         static_cast<int32_t>(i % 3)});
  }
  return all;
}

// Probabilities of every record, by classify; each record comes in runs.
std::vector<double> answers(Backend& backend, const Model& model, const std::vector<Codes>& records,
                            const StreamOptions& options, int64_t run = Source::kRun) {
  Records source(records, run);
  std::vector<double> found;
  classify(backend, model, source, {.stream = options, .files = {}}, [&](const Answer& answer) {
    found.insert(found.end(), answer.probabilities.begin(), answer.probabilities.end());
  });
  return found;
}

double apart(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  EXPECT_FALSE(a.empty());
  double most = 0;
  for (size_t i = 0; i < a.size(); ++i) most = std::max(most, std::fabs(a[i] - b[i]));
  return most;
}

class BothStrands : public ::testing::TestWithParam<Case> {
 protected:
  std::unique_ptr<Backend> backend_ = make_cpu_backend();
  std::vector<Codes> records_ = {random_codes(70, 1), random_codes(1, 2), random_codes(900, 3),
                                 random_codes(3000, 4), random_codes(257, 5)};
};
INSTANTIATE_TEST_SUITE_P(Dna, BothStrands,
                         ::testing::Values(Case{"strands", false, true, Pooling::mean, 0},
                                           Case{"last", false, true, Pooling::last, 0},
                                           Case{"all", true, true, Pooling::mean, 1}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(BothStrands, SwappedChangeNoProbability) {
  const Model model = dna_model(*backend_, GetParam());
  std::vector<Codes> swapped;
  for (const Codes& codes : records_) swapped.push_back(reverse_complemented(codes));
  const std::vector<double> found = answers(*backend_, model, records_, {.batch = 1024});
  EXPECT_LE(apart(found, answers(*backend_, model, swapped, {.batch = 1024})), 1e-6);
  // The classes differ, and the causal model without this does depend on the strand.
  Model plain = dna_model(*backend_, GetParam());
  plain.config.equivariant = false;
  const StreamOptions forward{.strands = Strands::forward, .batch = 1024};
  EXPECT_GT(apart(answers(*backend_, plain, records_, forward),
                  answers(*backend_, plain, swapped, forward)),
            1e-3);
  // eval and training see what classify does.
  const Examples all = examples_of(records_);
  EXPECT_LE(
      apart(found, evaluate(*backend_, model, all, all.items, {.batch_tokens = 500}).probabilities),
      1e-6);
  EXPECT_THROW(answers(*backend_, model, records_, forward), UsageError);
}

TEST_P(BothStrands, TrainingSeesTheSameMean) {
  const Model model = dna_model(*backend_, GetParam());
  std::vector<Piece> pieces;
  std::vector<int32_t> ids, targets;
  for (const Codes& codes : records_) {
    for (const Codes& strand : {codes, reverse_complemented(codes)}) {
      pieces.push_back({.begin = static_cast<int64_t>(ids.size()),
                        .length = static_cast<int64_t>(strand.size())});
      ids.insert(ids.end(), strand.begin(), strand.end());
    }
    targets.push_back(static_cast<int32_t>(targets.size() % 3));
  }
  const BatchLoss loss = batch_loss(*backend_, model, ids_view(ids), Rows(*backend_, pieces),
                                    ids_view(targets), {}, nullptr);
  const Examples all = examples_of(records_);
  const Evaluation found = evaluate(*backend_, model, all, all.items, {});
  EXPECT_NEAR(loss.sum / loss.weight, found.metrics.loss, 1e-5);
}

// However a record arrives and however long it is, a model of both ends reads it in one piece.
TEST(BothEndsOfRecords, AreReadWhole) {
  const auto backend = make_cpu_backend();
  const Model model = dna_model(*backend, {"", true, false, Pooling::last, 0});
  const std::vector<Codes> records = {random_codes(70, 1), random_codes(5000, 2),
                                      random_codes(300, 3)};
  const Examples all = examples_of(records);
  std::vector<double> expected;
  for (const Codes& codes : records) {
    const Examples one = examples_of({codes});
    const auto alone = evaluate(*backend, model, one, one.items, {}).probabilities;
    expected.insert(expected.end(), alone.begin(), alone.end());
  }
  for (const int64_t run : {int64_t{37}, Source::kRun})
    for (const int64_t batch : {64, 512, 100'000})
      EXPECT_LE(apart(answers(*backend, model, records, {.batch = batch}, run), expected), 1e-6)
          << "runs of " << run << ", batches of " << batch;
  EXPECT_LE(apart(evaluate(*backend, model, all, all.items, {.batch_tokens = 256}).probabilities,
                  expected),
            1e-6);
}

TEST(BothEndsOfRecords, TooLongForMemoryIsSaid) {
  Records source({random_codes(100, 1)});
  Stream stream(source, {.batch = 64, .whole = 99});
  std::vector<Stream::Batch> batches(1);
  try {
    stream.next(batches);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("record 'r0' has 100 bases"), std::string::npos)
        << error.what();
  }
}

TEST(KmerTokens, AreThoseThatEndAtAPlace) {
  Kmers three(3), one;
  std::vector<int32_t> found;
  for (const uint8_t code : parse("ACGTNACGA")) found.push_back(three.next(code));
  // ACG = 0 1 2 in base 4, CGT = 1 2 3; fewer than three bases, and N: the letters.
  EXPECT_EQ(found, (std::vector<int32_t>{1, 2, 16 + 6, 16 + 27, 5, 1, 2, 16 + 6, 16 + 24}));
  EXPECT_EQ(one.next(dna::kG), dna::kG);
}

TEST(KmerTokens, DoNotDependOnHowARecordIsCut) {
  const auto backend = make_cpu_backend();
  const Model model = dna_model(*backend, {"", false, false, Pooling::mean, 0}, 5);
  const std::vector<Codes> records = {random_codes(4, 1), random_codes(2000, 2)};
  const Examples all = examples_of(records);
  const auto expected = evaluate(*backend, model, all, all.items, {}).probabilities;
  for (const int64_t run : {int64_t{37}, Source::kRun})
    for (const int64_t batch : {7, 64, 100'000})
      EXPECT_LE(apart(answers(*backend, model, records, {.batch = batch}, run), expected), 1e-5);
}

}  // namespace
}  // namespace coil
