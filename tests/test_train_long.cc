// Training on sequences longer than a chunk, steps of several batches, windows that grow: the same
// step as of the whole, the same bits when resumed.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "kernels/error.h"
#include "model/checkpoint.h"
#include "model/params.h"
#include "pipelines/batches.h"
#include "pipelines/train.h"

namespace coil {
namespace {

namespace fs = std::filesystem;

class TrainLong : public ::testing::Test {
 protected:
  TrainLong() {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ = fs::temp_directory_path() / fmt::format("coil-{}-{}", test->name(), getpid());
    fs::create_directories(folder_);
  }
  ~TrainLong() override { fs::remove_all(folder_); }
  std::string at(const std::string& name) const { return (folder_ / name).string(); }

  static std::string bases(int64_t length, Philox& random) {
    std::string text;
    for (int64_t i = 0; i < length; ++i) text += "ACGT"[random.below(4)];
    return text;
  }
  std::string genome(int64_t length) const {
    Philox random(5, 1, 0);
    std::ofstream(at("genome.fa")) << ">r\n" << bases(length, random) << "\n";
    return at("genome.fa");
  }
  std::string table(int count, int64_t length) const {
    Philox random(6, 1, 0);
    std::ofstream out(at("table.csv"));
    out << "sequence,label\n";
    for (int i = 0; i < count; ++i) out << bases(length, random) << ',' << i % 3 / 2 << '\n';
    return at("table.csv");
  }
  TrainOptions small(const std::string& data, const std::string& out, Objective objective) const {
    TrainOptions options;
    apply_preset("dna-tiny", options);
    options.data = {data};
    options.out = at(out);
    options.objective = objective;
    options.d = 16;
    options.layers = 2;
    options.lr = 1e-2;
    options.steps = 1;
    options.validation_fraction = 0;
    return options;
  }
  int run(const TrainOptions& options, const TrainHooks& hooks = {}) {
    return train(*backend_, options, hooks);
  }
  std::string failure(const TrainOptions& options) {
    try {
      run(options);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }
  std::string bits(const std::string& out) const {
    const auto text = [](const fs::path& path) {
      std::ostringstream all;
      all << std::ifstream(path, std::ios::binary).rdbuf();
      return all.str();
    };
    std::string latest = text(folder_ / out / "train" / "latest");
    latest.erase(latest.find('\n'));
    return text(folder_ / out / "train" / latest / "model.safetensors") +
           text(folder_ / out / "train" / latest / "optimizer.safetensors");
  }
  // After one step the first moments are the gradient, but for a factor.
  double apart(const std::string& a, const std::string& b) {
    double most = 0;
    Model models[2];
    std::vector<Optimizer> kept;
    for (int i = 0; i < 2; ++i) {
      const std::string out = at(i ? b : a);
      models[i] = make_model(*backend_, read_config(out), 99);
      kept.emplace_back(*backend_, models[i], OptimizerOptions{});
      load_checkpoint(*backend_, out, models[i], kept[i]);
    }
    const auto first = declare(kept[0].m), second = declare(kept[1].m);
    for (size_t i = 0; i < first.size(); ++i) {
      const auto x = first[i].tensor->span<float>(), y = second[i].tensor->span<float>();
      double difference = 0, norm = 0;
      for (size_t j = 0; j < x.size(); ++j) {
        difference += (x[j] - y[j]) * (x[j] - y[j]);
        norm += x[j] * x[j];
      }
      EXPECT_GT(norm, 0) << first[i].info.name;
      most = std::max(most, std::sqrt(difference / norm));
    }
    return most;
  }
  // Broken off at step 7 and gone on with, the run ends in the same bits.
  void expect_resumes(TrainOptions options) {
    options.steps = 12;
    options.eval_every = 5;
    run(options);
    const std::string whole = fs::path(options.out).filename();
    options.out = at("broken");
    int calls = 0;
    EXPECT_EQ(run(options, {.interrupted = [&] { return ++calls == 7 ? SIGINT : 0; }}),
              128 + SIGINT);
    options.resume = true;
    EXPECT_EQ(run(options), 0);
    EXPECT_EQ(bits(whole), bits("broken"));
  }

  fs::path folder_;
  std::unique_ptr<Backend> backend_ = make_cpu_backend(1);
};

TEST_F(TrainLong, AStepInChunksIsTheStepOfTheWhole) {
  TrainOptions options = small(genome(30'000), "whole", Objective::lm);
  options.max_length = options.batch_tokens = 20'000;
  run(options);
  options.out = at("chunks");
  options.chunk = 777;
  run(options);
  EXPECT_LE(apart("whole", "chunks"), 1e-4);
  options.out = at("truncated");
  options.truncate = true;
  run(options);
  EXPECT_GT(apart("whole", "truncated"), 1e-3);
}

TEST_F(TrainLong, AnEpochIsSoManyStepsOfSeveralBatches) {
  TrainOptions options = small(table(24, 300), "run", Objective::classify);
  options.batch_tokens = 5 * 300;
  options.accumulate = 4;
  options.steps = 0;
  options.epochs = 1;
  options.chunk = 140;
  run(options);
  EXPECT_EQ(peek_checkpoint(at("run")).step, 2);  // 24 records, 20 a step
}

// Of classes that are weighed.
TEST_F(TrainLong, AccumulatedGradientsAreThoseOfOneBatch) {
  TrainOptions options = small(table(24, 300), "whole", Objective::classify);
  options.balance = true;
  options.reverse_complement = false;
  options.batch_tokens = 24 * 300;
  run(options);
  options.out = at("parts");
  options.batch_tokens = 8 * 300;
  options.accumulate = 3;
  run(options);
  EXPECT_LE(apart("whole", "parts"), 1e-4);
  options.out = at("again");
  expect_resumes(options);
}

TEST_F(TrainLong, ChunksTruncatedChunksAndGrowingWindowsResumeExactly) {
  TrainOptions options = small(genome(4000), "chunks", Objective::lm);
  options.batch_tokens = 900;
  options.max_length = 800;
  options.min_length = 100;
  options.chunk = 130;
  expect_resumes(options);
  fs::remove_all(at("broken"));
  options.out = at("grown");
  options.truncate = true;
  options.max_length = 0;
  options.lengths = {{150, 1}, {400, 1}, {800, 0}};
  expect_resumes(options);
}

TEST_F(TrainLong, WindowsGrowByEpochs) {
  Examples all;
  all.codes = {std::vector<uint8_t>(10'000, 1)};
  all.items = {{.record = 0, .begin = 0, .length = 10'000, .label = -1}};
  Batches batches(all, all.items,
                  {.objective = Objective::lm,
                   .batch_tokens = 1000,
                   .min_length = 300,
                   .max_length = 900,
                   .lengths = {{100, 0.5}, {500, 1}, {900, 0}}});
  for (const auto& [step, longest] : {std::pair<int64_t, int64_t>{1, 100},
                                      {5, 100},
                                      {6, 500},
                                      {15, 500},
                                      {16, 900},
                                      {1000, 900}}) {
    EXPECT_EQ(batches.longest(step), longest) << step;
    const Batch batch = batches.draw(step);
    EXPECT_GT(batch.codes, 1000 - std::min<int64_t>(300, longest)) << step;
    for (const Piece& piece : batch.pieces) {
      EXPECT_LE(piece.length, longest) << step;
      EXPECT_GE(piece.length, std::min<int64_t>(300, longest)) << step;
    }
  }
}

TEST_F(TrainLong, LengthsSayHowLongARunIs) {
  TrainOptions options = small(genome(4000), "run", Objective::lm);
  options.batch_tokens = 500;
  options.steps = 0;
  options.lengths = {{100, 0.5}, {400, 1}};
  EXPECT_EQ(run(options), 0);
  EXPECT_EQ(peek_checkpoint(at("run")).step, 12);  // 1.5 times 4,000 by 500
  const TrainOptions kept = parse_train_options(peek_checkpoint(at("run")).options);
  EXPECT_EQ(kept.max_length, 400);
  EXPECT_EQ(kept.lengths, options.lengths);
}

TEST_F(TrainLong, RefusesWhatDoesNotGoTogether) {
  TrainOptions options = small(genome(4000), "no", Objective::lm);
  options.truncate = true;
  EXPECT_EQ(failure(options), "--truncate ends gradients where a chunk begins");
  options.truncate = false;
  options.chunk = -2;
  EXPECT_EQ(failure(options), "--chunk: expected 0 or more, or auto, found -2");
  options.chunk = 0;
  options.accumulate = 0;
  EXPECT_EQ(failure(options), "--accumulate: expected 1 to 65536, found 0");
  options.accumulate = 1;
  options.lengths = {{100, 0}, {200, 1}};
  EXPECT_EQ(failure(options),
            "--lengths: expected a length of 1 or more and epochs of more than 0, found 100:0");
  options.lengths = {{100, 1}, {200, 0}};
  options.max_length = 300;
  EXPECT_EQ(failure(options), "--max-length 300: the longest of --lengths is 200");
}

}  // namespace
}  // namespace coil
