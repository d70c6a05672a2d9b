// Training on small data made here: it learns, repeats itself bit for bit, survives being killed,
// refuses what does not fit.

#include "pipelines/train.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "genomics/alphabet.h"
#include "genomics/dataset.h"
#include "kernels/error.h"
#include "model/checkpoint.h"
#include "model/loss.h"
#include "model/params.h"
#include "pipelines/batches.h"
#include "pipelines/evaluate.h"

extern char** environ;

namespace coil {
namespace {

namespace fs = std::filesystem;

std::string random_bases(int64_t length, Philox& random, double gc = 0.5) {
  std::string bases;
  for (int64_t i = 0; i < length; ++i) {
    const bool strong = random.uniform() < gc;
    bases += (random.next() & 1) ? (strong ? 'G' : 'A') : (strong ? 'C' : 'T');
  }
  return bases;
}

std::string read_text(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

// A folder of its own for every test.
class Train : public ::testing::Test {
 protected:
  Train() {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ = fs::temp_directory_path() / fmt::format("coil-{}-{}", test->name(), getpid());
    fs::create_directories(folder_);
  }
  ~Train() override { fs::remove_all(folder_); }

  std::string at(const std::string& name) const { return (folder_ / name).string(); }

  // Label 1: a motif stands somewhere.
  std::string motif_csv(const std::string& name, int count, uint64_t seed) const {
    std::ofstream out(at(name));
    Philox random(seed, 1, 0);
    out << "sequence,label\n";
    for (int i = 0; i < count; ++i) {
      std::string bases = random_bases(40, random);
      if (i % 2) bases.replace(random.below(33), 8, "TATAAACG");
      out << bases << ',' << i % 2 << '\n';
    }
    return at(name);
  }
  // rich/ and poor/: two records of `length` each, GC 65 % and 35 %.
  std::string gc_folders(const std::string& name, int64_t length) const {
    Philox random(5, 1, 0);
    for (const auto& [label, gc] : {std::pair{"rich", 0.65}, {"poor", 0.35}}) {
      fs::create_directories(folder_ / name / label);
      std::ofstream out(folder_ / name / label / "genome.fa");
      for (int i = 0; i < 2; ++i)
        out << ">" << label << i << "\n" << random_bases(length, random, gc) << "\n";
    }
    return at(name);
  }
  std::string periodic_fasta(const std::string& name) const {  // of period 5
    std::ofstream out(at(name));
    for (int r = 0; r < 2; ++r) {
      out << ">r" << r << "\n";
      for (int i = 0; i < 2000; ++i) out << "AACGT"[(i + r) % 5];
      out << "\n";
    }
    return at(name);
  }
  TrainOptions small(const std::string& data, const std::string& out) const {
    TrainOptions options;
    apply_preset("dna-tiny", options);
    options.data = {data};
    options.out = at(out);
    options.d = 16;
    options.layers = 1;
    options.batch_tokens = 1024;
    options.lr = 1e-2;
    options.steps = 30;
    options.eval_every = 10;
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
  // The best model and the last checkpoint, as bytes.
  std::string bits(const std::string& out) const {
    std::string latest = read_text(folder_ / out / "train" / "latest");
    latest.erase(latest.find('\n'));
    return read_text(folder_ / out / "model.safetensors") +
           read_text(folder_ / out / "train" / latest / "model.safetensors") +
           read_text(folder_ / out / "train" / latest / "optimizer.safetensors");
  }
  Evaluation evaluate_on(const std::string& out, const std::string& data,
                         DatasetOptions options = {}) {
    const Model model = load_model(*backend_, at(out));
    options.labels = model.config.labels;
    options.labelled = model.config.objective == Objective::classify;
    const Examples all = read_examples({data}, options);
    return evaluate(*backend_, model, all, all.items, {.both_strands = options.labelled});
  }

  fs::path folder_;
  std::unique_ptr<Backend> backend_ = make_cpu_backend(1);
};

TEST_F(Train, LearnsAMotifFromCsv) {
  TrainOptions options = small(motif_csv("train.csv", 1200, 1), "model");
  options.d = 32;
  options.layers = 2;
  options.batch_tokens = 2048;
  options.reverse_complement = false;  // the motif stands on this strand
  options.steps = 250;
  options.eval_every = 50;
  std::vector<std::string> lines;
  EXPECT_EQ(run(options, {.line = [&](const std::string& line) { lines.push_back(line); }}), 0);
  const Evaluation test = evaluate_on("model", motif_csv("test.csv", 400, 2));
  EXPECT_GT(test.metrics.accuracy, 0.9);
  EXPECT_GT(test.metrics.mcc, 0.8);
  EXPECT_GT(test.metrics.auroc, 0.95);
  ASSERT_GE(lines.size(), 7u);
  EXPECT_NE(lines[2].find("step 50/250"), std::string::npos) << lines[2];
  for (const char* word : {"loss", "val", "acc", "mcc", "auroc", "tok/s", "ETA"})
    EXPECT_NE(lines[2].find(word), std::string::npos) << word;
}

TEST_F(Train, LayersOfS4dLearnAndResumeExactly) {
  TrainOptions options = small(gc_folders("data", 3000), "whole");
  options.layers = 2;
  options.mixers = "s4d,mamba1";
  options.s4d_states = 4;
  options.s4d_init = "inv";
  options.min_length = 20;
  options.max_length = 100;
  options.metric = "loss";
  EXPECT_EQ(run(options), 0);
  const Config config = read_config(at("whole"));
  EXPECT_EQ(mixer_names(config.layers), "s4d,mamba1");
  EXPECT_EQ(config.s4d_states, 4);
  EXPECT_GT(evaluate_on("whole", gc_folders("more", 2000)).metrics.accuracy, 0.7);
  options.out = at("broken");
  int calls = 0;
  run(options, {.interrupted = [&] { return ++calls == 13 ? SIGINT : 0; }});
  options.resume = true;
  run(options);
  EXPECT_EQ(bits("whole"), bits("broken"));
}

TEST_F(Train, AUNetLearnsAndResumesExactly) {
  TrainOptions options = small(periodic_fasta("r.fa"), "whole");
  options.objective = Objective::lm;
  options.topology = "unet";
  options.pool = "3,2";
  options.widths = "24,20";
  options.mixers = "s4d/mamba1";
  options.s4d_states = 4;
  options.min_length = options.max_length = 100;
  options.steps = 60;
  EXPECT_EQ(run(options), 0);
  const Config config = read_config(at("whole"));
  EXPECT_EQ(mixer_names(config), "s4d/mamba1/mamba1");
  EXPECT_EQ(config.inner[1].d, 20);
  EXPECT_EQ(config.mlp, 2);
  EXPECT_FALSE(config.tie);
  EXPECT_LT(evaluate_on("whole", at("r.fa")).bits_per_base, 0.5);  // of 2
  EXPECT_NE(read_text(folder_ / "whole" / "README.md")
                .find("U-Net of 3 stages, pooling 3, 2, layers 1 s4d / 1 mamba1 / 1 mamba1, d 16 / "
                      "24 / 20, n 16, MLP 2"),
            std::string::npos);
  options.out = at("broken");
  int calls = 0;
  run(options, {.interrupted = [&] { return ++calls == 13 ? SIGINT : 0; }});
  options.resume = true;
  run(options);
  EXPECT_EQ(bits("whole"), bits("broken"));

  TrainOptions from = small(at("r.fa"), "tuned");  // the network is that of the model
  from.objective = Objective::lm;
  from.from = at("whole");
  from.min_length = from.max_length = 100;
  EXPECT_EQ(run(from), 0);
  EXPECT_EQ(mixer_names(read_config(at("tuned"))), "s4d/mamba1/mamba1");

  options = small(at("r.fa"), "no");
  options.topology = "tree";
  EXPECT_EQ(failure(options), "--topology 'tree': expected stack or unet");
  options.topology = "stack";
  options.pool = "4";
  EXPECT_EQ(failure(options), "--pool: a stack has no stages");
  options.topology = "unet";
  options.pool = "4,0";
  EXPECT_EQ(failure(options), "pool '4,0': expected whole numbers from 2 to 65536, found '0'");
}

TEST_F(Train, LearnsClassesFromFolders) {
  TrainOptions options = small(gc_folders("data", 6000), "model");
  options.min_length = 50;
  options.max_length = 200;
  options.steps = 60;
  options.eval_every = 20;
  EXPECT_EQ(run(options), 0);
  const Evaluation test = evaluate_on("model", at("data"), {.min_length = 200, .max_length = 200});
  EXPECT_GT(test.metrics.accuracy, 0.9);
  EXPECT_EQ(read_text(folder_ / "model" / "labels.txt"), "poor\nrich\n");
  const std::string card = read_text(folder_ / "model" / "README.md");
  EXPECT_NE(card.find("poor, rich"), std::string::npos);
  EXPECT_NE(card.find("\"max_length\": 200"), std::string::npos);
  std::istringstream log(read_text(folder_ / "model" / "train" / "log.jsonl"));
  int lines = 0;
  for (std::string line; std::getline(log, line); ++lines) {
    EXPECT_EQ(line.front(), '{');
    EXPECT_EQ(line.back(), '}');
    EXPECT_EQ(line.find("\"mcc\":") != std::string::npos, lines > 0);
  }
  EXPECT_EQ(lines, 4);  // the options and three evaluations
}

TEST_F(Train, LanguageModelThenFineTuning) {
  TrainOptions options = small(periodic_fasta("dna.fa"), "lm");
  options.objective = Objective::lm;
  options.max_length = 100;
  options.reverse_complement = false;
  options.steps = 150;
  options.eval_every = 50;
  EXPECT_EQ(run(options), 0);
  const Evaluation lm = evaluate_on("lm", at("dna.fa"), {.max_length = 500});
  EXPECT_LT(lm.bits_per_base, 1.0);  // 2 for random bases
  EXPECT_EQ(lm.metrics.count, 2 * 4 * 499);

  TrainOptions tuned = small(motif_csv("train.csv", 200, 1), "tuned");
  tuned.from = at("lm");
  tuned.d = 999;  // the network is that of the model it starts from
  tuned.steps = 2;
  std::string lines;
  EXPECT_EQ(run(tuned, {.line = [&](const std::string& line) { lines += line + "\n"; }}), 0);
  EXPECT_NE(lines.find("tensors taken from " + at("lm")), std::string::npos) << lines;
  const Config config = read_config(at("tuned"));
  EXPECT_EQ(config.d, 16);
  EXPECT_EQ(config.labels, (std::vector<std::string>{"0", "1"}));
}

// A batch of several parts, with class weights, is one step on all of it.
TEST_F(Train, AStepInPartsIsTheStepOfTheWholeBatch) {
  TrainOptions options = small(motif_csv("train.csv", 299, 1), "model");
  options.batch_tokens = 299 * 40;  // three parts
  options.validation_fraction = 0;
  options.balance = true;
  options.steps = 1;
  run(options);

  const Examples all = read_examples(options.data, {});
  Batches batches(all, all.items, {.batch_tokens = options.batch_tokens});
  Batch batch = batches.draw(1);
  Config config = read_config(at("model"));
  Model model = make_model(*backend_, config, options.seed), grad = zeros_like(*backend_, model);
  Optimizer optimizer(*backend_, model, {.lr = options.lr, .weight_decay = options.weight_decay});
  float weights[] = {299 / (2 * 150.f), 299 / (2 * 149.f)};
  const auto t = static_cast<int64_t>(batch.ids.size());
  ASSERT_EQ(t, 299 * 40);
  batch_loss(*backend_, model, host_view(batch.ids.data(), DType::i32, {t}),
             Rows(*backend_, batch.pieces), host_view(batch.targets.data(), DType::i32, {299}),
             host_view(weights, DType::f32, {2}), &grad);
  optimizer.step(*backend_, model, grad, learning_rate(options, 1));

  Model trained = make_model(*backend_, config, 99);
  Optimizer moments(*backend_, trained, {});
  load_checkpoint(*backend_, at("model"), trained, moments);
  const auto expected = declare(optimizer.m), found = declare(moments.m);
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto a = expected[i].tensor->span<float>(), b = found[i].tensor->span<float>();
    double difference = 0, norm = 0;
    for (size_t j = 0; j < a.size(); ++j) {
      difference += (a[j] - b[j]) * (a[j] - b[j]);
      norm += a[j] * a[j];
    }
    EXPECT_LE(std::sqrt(difference), 1e-4 * std::sqrt(norm)) << expected[i].info.name;
    EXPECT_GT(norm, 0) << expected[i].info.name;
  }
}

TEST_F(Train, SameSeedSameBits) {
  TrainOptions options = small(motif_csv("train.csv", 300, 1), "a");
  options.mutate = 0.05;
  run(options);
  options.out = at("b");
  run(options);
  options.out = at("c");
  options.seed = 2;
  run(options);
  EXPECT_EQ(bits("a"), bits("b"));
  EXPECT_NE(bits("a"), bits("c"));
}

TEST_F(Train, ASignalWritesACheckpointAndResumeIsExact) {
  const std::string data = motif_csv("train.csv", 300, 1);
  run(small(data, "whole"));
  for (const int at_step : {1, 10, 17}) {  // 10: an evaluation is due
    const std::string out = fmt::format("broken{}", at_step);
    TrainOptions options = small(data, out);
    int calls = 0;
    std::string last;
    EXPECT_EQ(run(options, {.line = [&](const std::string& line) { last = line; },
                            .interrupted = [&] { return ++calls == at_step ? SIGTERM : 0; }}),
              128 + SIGTERM);
    EXPECT_NE(last.find(fmt::format("step {}; to go on: coil train --resume", at_step)),
              std::string::npos)
        << last;
    EXPECT_EQ(peek_checkpoint(at(out)).step, at_step);
    options.resume = true;
    EXPECT_EQ(run(options), 0);
    EXPECT_EQ(bits("whole"), bits(out));
    const auto evaluations = [&](const std::string& name) {
      std::istringstream log(read_text(folder_ / name / "train" / "log.jsonl"));
      std::vector<std::string> found;
      for (std::string line; std::getline(log, line);)
        if (const auto loss = line.find("\"loss\""); line.find("evaluation") != std::string::npos)
          found.push_back(line.substr(loss, line.find(",\"mcc\"") - loss));
      return found;
    };
    EXPECT_EQ(evaluations("whole"), evaluations(out));
    EXPECT_EQ(evaluations(out).size(), 3u);
  }
}

TEST_F(Train, WindowsResumeExactly) {
  TrainOptions options = small(gc_folders("data", 3000), "whole");
  options.min_length = 20;
  options.max_length = 100;
  options.metric = "loss";
  run(options);
  options.out = at("broken");
  int calls = 0;
  run(options, {.interrupted = [&] { return ++calls == 13 ? SIGINT : 0; }});
  options.resume = true;
  run(options);
  EXPECT_EQ(bits("whole"), bits("broken"));
}

// Not a test: what the one below starts and kills.
TEST(TrainChild, DISABLED_Run) {
  const char* folder = std::getenv("COIL_TRAIN_CHILD");
  if (!folder) GTEST_SKIP() << "COIL_TRAIN_CHILD is not set";
  TrainOptions options = parse_train_options(read_text(fs::path(folder) / "options.json"));
  options.out = (fs::path(folder) / "killed").string();
  options.resume = true;
  const auto backend = make_cpu_backend(1);
  ASSERT_EQ(train(*backend, options), 0);
}

TEST_F(Train, KilledAtRandomMomentsEndsAtTheSameBits) {
  TrainOptions options = small(motif_csv("train.csv", 300, 1), "whole");
  options.steps = 120;
  options.eval_every = 6;
  options.checkpoint_every = 2;
  std::ofstream(folder_ / "options.json") << to_json(options);
  run(options);
  setenv("COIL_TRAIN_CHILD", folder_.c_str(), 1);
  Philox random(9, 1, 0);
  int kills = 0, status = -1;
  for (int round = 0; round < 40; ++round) {
    std::string program = "/proc/self/exe", filter = "--gtest_filter=TrainChild.DISABLED_Run",
                also = "--gtest_also_run_disabled_tests", quiet = "--gtest_brief=1";
    char* arguments[] = {program.data(), filter.data(), also.data(), quiet.data(), nullptr};
    pid_t child = 0;
    ASSERT_EQ(posix_spawn(&child, program.c_str(), nullptr, nullptr, arguments, environ), 0);
    const auto patience = std::chrono::milliseconds(round == 39 ? 100'000 : 20 + random.below(200));
    const auto deadline = std::chrono::steady_clock::now() + patience;
    pid_t ended = 0;
    while ((ended = waitpid(child, &status, WNOHANG)) == 0 &&
           std::chrono::steady_clock::now() < deadline)
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (ended == child) break;
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    ++kills;
  }
  unsetenv("COIL_TRAIN_CHILD");
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_GE(kills, 1);
  EXPECT_EQ(bits("whole"), bits("killed"));
}

TEST_F(Train, AnExplodingLossStopsAndNamesTheStep) {
  TrainOptions options = small(motif_csv("train.csv", 300, 1), "model");
  options.lr = 1e9;
  options.warmup = 0;
  const std::string message = failure(options);
  // Noticed when the step after it has been asked for.
  EXPECT_TRUE(message.starts_with("step 2: the loss is ")) << message;
  EXPECT_NE(message.find("training stopped; the checkpoint of step 0"), std::string::npos)
      << message;
  EXPECT_EQ(peek_checkpoint(at("model")).step, 0);

  options.out = at("kept");
  options.checkpoint_every = 1;  // nothing is written before its step has been looked at
  const std::string again = failure(options);
  EXPECT_TRUE(again.starts_with("step 2: the loss is ")) << again;
  EXPECT_NE(again.find("the checkpoint of step 1 "), std::string::npos) << again;
  EXPECT_EQ(peek_checkpoint(at("kept")).step, 1);
}

TEST_F(Train, RefusesWhatDoesNotFit) {
  const std::string data = motif_csv("train.csv", 300, 1);
  TrainOptions options = small(data, "model");
  run(options);
  EXPECT_NE(failure(options).find("is not empty"), std::string::npos);

  options.resume = true;
  EXPECT_EQ(run(options), 0);  // finished already: nothing to do
  options.lr = 0.5;
  options.seed = 7;
  const std::string other = failure(options);
  EXPECT_NE(other.find("lr (0.01 then, 0.5 now)"), std::string::npos) << other;
  EXPECT_NE(other.find("seed (1 then, 7 now)"), std::string::npos) << other;
  options = small(motif_csv("train.csv", 300, 3), "model");
  options.resume = true;
  EXPECT_NE(failure(options).find("the data differ"), std::string::npos);

  EXPECT_THROW(apply_preset("dna-huge", options), UsageError);
  options = small(data, "new");
  options.metric = "luck";
  EXPECT_NE(failure(options).find("--metric luck"), std::string::npos);
  options = small(data, "new");
  options.batch_tokens = 30;
  EXPECT_NE(failure(options).find("has 40 bases, more than a batch of 30 holds"),
            std::string::npos);
  options = small(data, "new");
  options.min_length = 50;
  options.max_length = 20;
  EXPECT_NE(failure(options).find("--min-length 50 is more than --max-length 20"),
            std::string::npos);
  options = small(data, "new");
  std::ofstream(at("other.csv")) << "sequence,label\nACGT,0\nACGT,7\n";
  options.validation = at("other.csv");
  EXPECT_NE(failure(options).find("7"), std::string::npos);
  EXPECT_FALSE(fs::exists(at("new")));  // nothing was written before all was checked
}

TEST_F(Train, BalanceWeighsTheRareClass) {
  // Nothing to learn but the classes' shares, 9 to 1.
  std::ofstream out(at("train.csv"));
  Philox random(3, 1, 0);
  out << "sequence,label\n";
  for (int i = 0; i < 500; ++i) out << random_bases(20, random) << ',' << (i % 10 == 0) << '\n';
  out.close();
  double mean[2] = {};
  for (const bool balance : {false, true}) {
    TrainOptions options = small(at("train.csv"), balance ? "balanced" : "plain");
    options.balance = balance;
    options.metric = "loss";
    options.steps = 40;
    options.eval_every = 40;
    run(options);
    const Evaluation e = evaluate_on(balance ? "balanced" : "plain", at("train.csv"));
    for (size_t i = 1; i < e.probabilities.size(); i += 2)
      mean[balance] += e.probabilities[i] / 500;
  }
  EXPECT_LT(mean[0], 0.3);
  EXPECT_GT(mean[1], 0.35);
  EXPECT_LT(mean[1], 0.65);
}

TEST_F(Train, TimeLimitAndPatience) {
  TrainOptions options = small(motif_csv("train.csv", 300, 1), "timed");
  options.max_minutes = 1e-9;
  EXPECT_EQ(run(options), kTimeEnded);
  EXPECT_EQ(peek_checkpoint(at("timed")).step, 1);
  EXPECT_TRUE(fs::exists(folder_ / "timed" / "model.safetensors"));
  options.max_minutes = 0;  // may differ
  options.resume = true;
  EXPECT_EQ(run(options), 0);
  EXPECT_EQ(peek_checkpoint(at("timed")).step, 30);

  options = small(at("train.csv"), "patient");
  options.lr = 1e-12;  // never better
  options.patience = 2;
  options.eval_every = 3;
  options.metric = "accuracy";
  EXPECT_EQ(run(options), 0);
  EXPECT_LT(peek_checkpoint(at("patient")).step, 30);
}

TEST(TrainSchedule, WarmUpThenCosine) {
  TrainOptions options;
  options.steps = 200;
  options.lr = 1;
  options.warmup = 0.05;
  options.min_lr = 0.1;
  EXPECT_DOUBLE_EQ(learning_rate(options, 1), 0.1);
  EXPECT_DOUBLE_EQ(learning_rate(options, 10), 1);
  EXPECT_NEAR(learning_rate(options, 105), 0.55, 1e-12);  // half way down
  EXPECT_NEAR(learning_rate(options, 200), 0.1, 1e-12);
}

TEST(TrainOptionsJson, RoundTrip) {
  TrainOptions options;
  options.data = {"a.csv", "b.csv"};
  options.lr = 0.1 + 0.2;
  options.objective = Objective::lm;
  options.pooling = Pooling::last;
  options.balance = true;
  const TrainOptions back = parse_train_options(to_json(options));
  EXPECT_EQ(to_json(back), to_json(options));
  EXPECT_EQ(differences(options, back), "");
  EXPECT_THROW(parse_train_options("{}"), Error);
  // Of a run from before they were stored.
  auto older = nlohmann::json::parse(to_json(options));
  older["d"] = 65;
  for (const char* key : {"dt_rank", "condition_dropout"}) older.erase(key);
  const TrainOptions then = parse_train_options(older.dump());
  EXPECT_EQ(network_of(then).dt_rank, 5);
  EXPECT_EQ(then.condition_dropout, 0);
}

}  // namespace
}  // namespace coil
