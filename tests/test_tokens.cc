// What is told place by place: masks and their shares, the loss against one worked out by hand,
// targets of a table; training with each learns.

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <numbers>

#include "genomics/dataset.h"
#include "kernels/error.h"
#include "model/loss.h"
#include "pipelines/batches.h"
#include "pipelines/evaluate.h"
#include "pipelines/train.h"
#include "tests/records.h"

namespace coil {
namespace {

Config small(const std::string& alphabet) {
  Config config;
  config.d = 16;
  config.e = 32;
  config.dt_rank = 1;
  config.layers.resize(1);
  config.objective = Objective::mlm;
  config.alphabet = alphabet;
  return config;
}

TEST(Masks, Shares) {
  const Masking masking = masking_of(small("dna"));
  const Codes before = random_codes(200'000, 1, 0.2);
  Codes codes = before;
  Philox random(1, 2, 3);
  const std::vector<uint8_t> targets = mask(masking, codes, random);
  double bases = 0, chosen = 0, masked = 0, same = 0;
  for (size_t i = 0; i < codes.size(); ++i) {
    bases += before[i] != dna::kN;
    if (targets[i] == kUncounted) {
      EXPECT_EQ(codes[i], before[i]);
      continue;
    }
    EXPECT_EQ(targets[i], before[i]);
    EXPECT_NE(before[i], dna::kN);
    EXPECT_TRUE(codes[i] == dna::kMask || (codes[i] >= dna::kA && codes[i] <= dna::kT));
    chosen += 1;
    masked += codes[i] == dna::kMask;
    same += codes[i] == before[i];
  }
  EXPECT_NEAR(chosen / bases, 0.15, 0.003);
  EXPECT_NEAR(masked / chosen, 0.8, 0.01);
  EXPECT_NEAR(same / chosen, 0.1 + 0.1 / 4, 0.01);  // a random base is the same one in four
}

TEST(Masks, OfEvaluationAreOfThePlaceAlone) {
  const Masking masking = masking_of(small("dna"));
  const Codes record = random_codes(20'000, 4, 0.2);
  const auto masked = [&](int64_t number, int64_t begin, int64_t length, uint64_t seed) {
    Codes codes(record.begin() + begin, record.begin() + begin + length);
    const std::vector<uint8_t> targets = mask_evenly(masking, codes, seed, number, begin);
    for (size_t i = 0; i < codes.size(); ++i) {
      const uint8_t own = record[begin + i];
      EXPECT_EQ(codes[i], targets[i] == kUncounted ? own : dna::kMask);
      EXPECT_TRUE(targets[i] == kUncounted || (targets[i] == own && own != dna::kN));
    }
    return targets;
  };
  const std::vector<uint8_t> whole = masked(3, 0, 20'000, 1);
  const std::vector<uint8_t> window = masked(3, 700, 5000, 1);
  EXPECT_TRUE(std::equal(window.begin(), window.end(), whole.begin() + 700));
  EXPECT_NE(whole, masked(4, 0, 20'000, 1));
  EXPECT_NE(whole, masked(3, 0, 20'000, 2));
  const auto bases = 20'000 - std::count(record.begin(), record.end(), dna::kN);
  const auto chosen = 20'000 - std::count(whole.begin(), whole.end(), kUncounted);
  EXPECT_NEAR(static_cast<double>(chosen) / static_cast<double>(bases), 0.15, 0.01);
}

TEST(Masks, LettersHaveATokenBehindThem) {
  Config config = small("ABCDEFGHIJKLMNOP");
  EXPECT_EQ(masking_of(config).token, 16);
  EXPECT_EQ(letters_vocabulary(config), 32);
  config.target_column = "t";
  EXPECT_EQ(letters_vocabulary(config), 16);
  EXPECT_EQ(masking_of(config).share, 0);
  config.objective = Objective::lm;
  EXPECT_EQ(letters_vocabulary(config), 16);
}

// The same batch at the same step, another at another; what is read is not what is told.
TEST(Masks, BatchesRepeatThem) {
  Examples all;
  all.codes = {random_codes(5000, 9, 0)};
  all.names = {"r"};
  all.items = {{0, 0, 5000, -1}};
  const BatchOptions options{.objective = Objective::mlm,
                             .batch_tokens = 4000,
                             .min_length = 200,
                             .max_length = 200,
                             .reverse_complement = false,
                             .masking = masking_of(small("dna"))};
  Batches batches(all, all.items, options), again(all, all.items, options);
  const Batch first = batches.draw(7), second = again.draw(7), other = batches.draw(8);
  EXPECT_EQ(first.ids, second.ids);
  EXPECT_EQ(first.targets, second.targets);
  EXPECT_NE(first.targets, other.targets);
  ASSERT_EQ(first.targets.size(), first.ids.size());
  const auto counted =
      std::count_if(first.targets.begin(), first.targets.end(), [](int32_t t) { return t >= 0; });
  EXPECT_NEAR(static_cast<double>(counted), 600, 100);
}

// -log softmax of the token in the same place, over masked places alone.
TEST(MaskedLoss, ByHand) {
  const auto backend = make_cpu_backend(1);
  const Config config = small("dna");
  const Model model = make_model(*backend, config, 5);
  std::vector<int32_t> ids = {1, 6, 3, 6, 2, 4}, targets = {-1, 2, -1, 1, 4, -1};
  const Rows rows(*backend, {{.begin = 0, .length = 4}, {.begin = 4, .length = 2}});
  const auto view = [](std::vector<int32_t>& of) { return host_view(of.data(), DType::i32, {6}); };
  Tensor logits;  // (t, v)
  const BatchLoss found =
      batch_loss(*backend, model, view(ids), rows, view(targets), {}, nullptr, &logits);
  double expected = 0;
  for (int64_t i = 0; i < 6; ++i) {
    if (targets[i] < 0) continue;
    const float* row = logits.view().row<float>(i);
    double sum = 0;
    for (int64_t k = 0; k < config.vocab; ++k) sum += std::exp(static_cast<double>(row[k]));
    expected += std::log(sum) - row[targets[i]];
  }
  EXPECT_EQ(found.weight, 3);
  EXPECT_NEAR(found.sum, expected, 1e-5);
}

// Accuracy and bits against the logits themselves; long items in pieces, by carried state.
TEST(EvaluateTokens, ByHandAndInPieces) {
  const auto backend = make_cpu_backend(1);
  Config config = small("ABCDE");
  config.target_column = "t";
  const Model model = make_model(*backend, config, 6);
  Examples all;
  Philox random(8, 1, 0);
  double nats = 0;
  int64_t counted = 0, right = 0;
  for (const int64_t length : {3, 700, 150}) {
    std::vector<int32_t> ids;
    Codes codes, targets;
    for (int64_t i = 0; i < length; ++i) {
      ids.push_back(static_cast<int32_t>(random.below(5)));
      codes.push_back(static_cast<uint8_t>(ids.back()));
      const bool told = i == 0 || random.below(3) == 0;
      targets.push_back(told ? static_cast<uint8_t>(random.below(5)) : kUncounted);
    }
    const Rows rows = Rows::equal(*backend, 1, length);
    const Tensor h =
        hidden(*backend, model, host_view(ids.data(), DType::i32, {length}), rows, nullptr);
    const Tensor logits = lm_logits(*backend, model, h);  // (t, v)
    for (int64_t i = 0; i < length; ++i) {
      if (targets[i] == kUncounted) continue;
      const float* row = logits.view().row<float>(i);
      double sum = 0;
      for (int64_t k = 0; k < 5; ++k) sum += std::exp(static_cast<double>(row[k]));
      nats += std::log(sum) - row[targets[i]];
      right += std::max_element(row, row + 5) - row == targets[i];
      ++counted;
    }
    all.items.push_back({std::ssize(all.codes), 0, length, -1});
    all.names.push_back("r");
    all.codes.push_back(codes);
    all.targets.push_back(targets);
  }
  const double share = static_cast<double>(right) / static_cast<double>(counted);
  for (const int64_t batch : {10'000, 64}) {
    const Evaluation found = evaluate(*backend, model, all, all.items, {.batch_tokens = batch});
    EXPECT_EQ(found.metrics.count, counted);
    EXPECT_NEAR(found.metrics.accuracy, share, 1.01 / static_cast<double>(counted));
    EXPECT_NEAR(found.bits_per_base, nats / static_cast<double>(counted) / std::numbers::ln2, 1e-4);
  }
}

// The strands of DNA are asked for the same places.
TEST(EvaluateTokens, BothStrandsOfMaskedDna) {
  const auto backend = make_cpu_backend(1);
  const Model model = make_model(*backend, small("dna"), 6);
  Examples all;
  all.codes = {random_codes(900, 3)};
  all.names = {"r"};
  all.items = {{0, 0, 900, -1}};
  const auto run = [&](bool both, uint64_t seed) {
    return evaluate(*backend, model, all, all.items, {.both_strands = both, .seed = seed});
  };
  EXPECT_EQ(run(true, 1).metrics.count, run(false, 1).metrics.count);
  EXPECT_EQ(run(true, 1).bits_per_base, run(true, 1).bits_per_base);
  EXPECT_NE(run(true, 1).bits_per_base, run(true, 2).bits_per_base);
}

class TrainTokens : public ::testing::Test {
 protected:
  TrainTokens() {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::temp_directory_path() /
              fmt::format("coil-tokens-{}-{}", test->name(), getpid());
    std::filesystem::create_directories(folder_);
  }
  ~TrainTokens() override { std::filesystem::remove_all(folder_); }
  std::string at(const std::string& name) const { return (folder_ / name).string(); }

  TrainOptions options(const std::string& data, const std::string& out, int64_t steps) const {
    TrainOptions options;
    apply_preset("dna-tiny", options);
    options.objective = Objective::mlm;
    options.data = {data};
    options.out = at(out);
    options.d = 32;
    options.layers = 1;
    options.batch_tokens = 2000;
    options.lr = 1e-2;
    options.steps = steps;
    options.eval_every = steps;
    return options;
  }
  Evaluation evaluate_on(const std::string& out, const std::string& data) {
    const Model model = load_model(*backend_, at(out));
    const Config& config = model.config;
    const Examples all =
        read_examples({data}, {.labels = config.labels,
                               .labelled = !config.labels.empty(),
                               .target_column = config.target_column,
                               .alphabet = config.letters() ? config.alphabet : ""});
    return evaluate(*backend_, model, all, all.items, {.both_strands = false});
  }
  std::string failure(const TrainOptions& options) {
    try {
      train(*backend_, options);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }
  // ACGTACGT…: what is masked follows from what stands before it.
  std::string periodic() const {
    std::ofstream out(at("periodic.fa"));
    for (int r = 0; r < 4; ++r) {
      out << ">r" << r << "\n";
      for (int i = 0; i < 3000; ++i) out << "AACGT"[(i + r) % 5];
      out << "\n";
    }
    return at("periodic.fa");
  }
  // To be put out at each place: the letter two places before it.
  std::string delayed(const std::string& letters) const {
    std::ofstream out(at("delayed.csv"));
    out << "sequence,t,label\n";
    Philox random(3, 1, 0);
    for (int r = 0; r < 200; ++r) {
      std::string sequence, answer = "..";
      for (int i = 0; i < 60; ++i) sequence += letters[random.below(letters.size())];
      answer += sequence.substr(0, 58);
      out << sequence << ',' << answer << ',' << (sequence[0] == letters[0]) << '\n';
    }
    return at("delayed.csv");
  }

  std::filesystem::path folder_;
  std::unique_ptr<Backend> backend_ = make_cpu_backend(1);
};

TEST_F(TrainTokens, MaskedDnaAndAClassifierFromIt) {
  const std::string data = periodic();
  TrainOptions masked = options(data, "mlm", 60);
  masked.max_length = 200;
  masked.reverse_complement = false;
  ASSERT_EQ(train(*backend_, masked), 0);
  const Evaluation found = evaluate_on("mlm", data);
  EXPECT_GT(found.metrics.accuracy, 0.7);  // guessing: 0.4
  EXPECT_LT(found.bits_per_base, 1.3);     // 1.92
  TrainOptions classifier = options(delayed("ACGT"), "classifier", 5);
  classifier.objective = Objective::classify;
  classifier.from = at("mlm");
  ASSERT_EQ(train(*backend_, classifier), 0);
  const Config config = read_config(at("classifier"));
  EXPECT_EQ(config.objective, Objective::classify);
  EXPECT_EQ(config.labels, (std::vector<std::string>{"0", "1"}));
}

// In chunks the gradients are the same to rounding: so is what comes of a few steps.
TEST_F(TrainTokens, ChunksChangeNothing) {
  TrainOptions whole = options(periodic(), "whole", 3), chunks = whole;
  whole.max_length = chunks.max_length = 200;
  chunks.chunk = 64;
  chunks.out = at("chunks");
  ASSERT_EQ(train(*backend_, whole), 0);
  ASSERT_EQ(train(*backend_, chunks), 0);
  EXPECT_NEAR(evaluate_on("whole", at("periodic.fa")).bits_per_base,
              evaluate_on("chunks", at("periodic.fa")).bits_per_base, 1e-3);
}

TEST_F(TrainTokens, TargetsOfLetters) {
  TrainOptions letters = options(delayed("ABCDEFGHIJKLMNOP"), "letters", 80);
  letters.alphabet = "ABCDEFGHIJKLMNOP";
  letters.target_column = "t";
  letters.metric = "accuracy";
  ASSERT_EQ(train(*backend_, letters), 0);
  const Config config = read_config(at("letters"));
  EXPECT_EQ(config.vocab, 16);
  EXPECT_EQ(config.target_column, "t");
  const Evaluation found = evaluate_on("letters", at("delayed.csv"));
  EXPECT_EQ(found.metrics.count, 200 * 58);
  EXPECT_GT(found.metrics.accuracy, 0.9);
  EXPECT_LT(found.bits_per_base, 1);  // of 4
  // A classifier of the same letters, from it, takes its alphabet.
  TrainOptions classifier = options(at("delayed.csv"), "classifier", 5);
  classifier.objective = Objective::classify;
  classifier.from = at("letters");
  ASSERT_EQ(train(*backend_, classifier), 0);
  EXPECT_EQ(read_config(at("classifier")).alphabet, "ABCDEFGHIJKLMNOP");
  classifier.out = at("other");
  classifier.alphabet = "ABC";
  EXPECT_NE(failure(classifier).find("--alphabet ABC: '"), std::string::npos)
      << failure(classifier);
}

TEST_F(TrainTokens, TargetsOfDna) {
  TrainOptions dna = options(delayed("ACGT"), "dna", 60);
  dna.target_column = "t";
  ASSERT_EQ(train(*backend_, dna), 0);
  EXPECT_GT(evaluate_on("dna", at("delayed.csv")).metrics.accuracy, 0.9);
}

TEST_F(TrainTokens, Refusals) {
  const auto fails = [&](auto change, const std::string& message) {
    TrainOptions wrong = options("none.csv", "new", 5);
    change(wrong);
    EXPECT_NE(failure(wrong).find(message), std::string::npos) << failure(wrong);
  };
  fails([](TrainOptions& o) { o.alphabet = "AAB"; }, "--alphabet: letter 'A' stands twice");
  fails(
      [](TrainOptions& o) {
        o.alphabet = "AB";
        o.mutate = 0.1;
      },
      "--mutate is for DNA");
  fails(
      [](TrainOptions& o) {
        o.target_column = "t";
        o.objective = Objective::lm;
      },
      "--target-column");
  fails([](TrainOptions& o) { o.mask_share = 0; }, "--mask-share: expected 0.001 to 0.999");
  fails([](TrainOptions& o) { apply_preset("audio-tiny", o), o.objective = Objective::mlm; },
        "--objective mlm is for DNA");
}

}  // namespace
}  // namespace coil
