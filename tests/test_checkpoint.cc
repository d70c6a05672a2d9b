// Checkpoints: bit-equal round trip, and every state of the folder that a kill can leave behind.
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>

#include "kernels/error.h"
#include "model/checkpoint.h"

namespace coil {
namespace {

namespace fs = std::filesystem;

class CheckpointTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "coil-checkpoint-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
    train_ = folder_ / "train";
    config_.d = 8;
    config_.e = 16;
    config_.n = 4;
    config_.dt_rank = 2;
    config_.layers.resize(2);
    model_ = make_model(*backend_, config_, 1);
    optimizer_ = std::make_unique<Optimizer>(*backend_, model_, OptimizerOptions{});
  }
  void TearDown() override { fs::remove_all(folder_); }

  // Every weight and moment depends on `step`, so that a mixture of two steps is seen.
  void set_values(int64_t step) {
    float value = static_cast<float>(step);
    for (Model* part : {&model_, &optimizer_->m, &optimizer_->v})
      for (const Param& param : declare(*part))
        for (float& x : param.tensor->span<float>()) x = value += 0.01f;
    optimizer_->steps = 10 * step;
  }
  void save(int64_t step, int keep = 2, int64_t shard_bytes = 0) {
    set_values(step);
    save_checkpoint(
        *backend_, folder_.string(),
        {.step = step, .options = R"({"lr": 0.1})", .cursor = "cursor " + std::to_string(step)},
        model_, *optimizer_, keep, shard_bytes);
  }
  // Loads into fresh objects and expects exactly what set_values(step) made.
  void expect_step(int64_t step) {
    ASSERT_TRUE(has_checkpoint(folder_.string()));
    Model model = zeros_like(*backend_, model_);
    Optimizer optimizer(*backend_, model, {});
    const Checkpoint checkpoint = load_checkpoint(*backend_, folder_.string(), model, optimizer);
    EXPECT_EQ(checkpoint.step, step);
    EXPECT_EQ(checkpoint.options, R"({"lr": 0.1})");
    EXPECT_EQ(checkpoint.cursor, "cursor " + std::to_string(step));
    EXPECT_EQ(peek_checkpoint(folder_.string()).cursor, checkpoint.cursor);
    EXPECT_EQ(optimizer.steps, 10 * step);
    set_values(step);
    const std::pair<Model*, Model*> pairs[] = {
        {&model, &model_}, {&optimizer.m, &optimizer_->m}, {&optimizer.v, &optimizer_->v}};
    for (const auto& [found, expected] : pairs) {
      const auto a = declare(*found), b = declare(*expected);
      ASSERT_EQ(a.size(), b.size());
      for (size_t i = 0; i < a.size(); ++i)
        EXPECT_EQ(std::memcmp(a[i].tensor->as<char>(), b[i].tensor->as<char>(),
                              static_cast<size_t>(a[i].tensor->count()) * sizeof(float)),
                  0)
            << a[i].info.name;
    }
  }
  std::set<std::string> contents() const {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(train_))
      names.insert(entry.path().filename().string());
    return names;
  }
  std::string load_error() {
    try {
      load_checkpoint(*backend_, folder_.string(), model_, *optimizer_);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }
  void write(const fs::path& path, const std::string& text) { std::ofstream(path) << text; }

  using Names = std::set<std::string>;
  fs::path folder_, train_;
  std::unique_ptr<Backend> backend_ = make_cpu_backend(1);
  Config config_;
  Model model_;
  std::unique_ptr<Optimizer> optimizer_;
};

TEST_F(CheckpointTest, RoundTripIsBitEqual) {
  EXPECT_FALSE(has_checkpoint(folder_.string()));
  EXPECT_NE(load_error().find("no checkpoint in"), std::string::npos);
  save(7);
  expect_step(7);
}

// No file is longer than it may be; what is read is the same, and a later save in one file too.
TEST_F(CheckpointTest, Shards) {
  constexpr int64_t kMost = 4000;
  save(7, 2, kMost);
  expect_step(7);
  int weights = 0, moments = 0;
  for (const auto& entry : fs::directory_iterator(train_ / "step-7")) {
    const std::string name = entry.path().filename().string();
    if (!name.ends_with(".safetensors")) continue;
    EXPECT_LE(entry.file_size(), static_cast<uintmax_t>(kMost)) << name;
    weights += name.starts_with("model-");
    moments += name.starts_with("optimizer-");
  }
  EXPECT_GT(weights, 1);
  EXPECT_GT(moments, weights);
  save(8);
  expect_step(8);
  EXPECT_TRUE(fs::exists(train_ / "step-8" / "optimizer.safetensors"));
}

TEST_F(CheckpointTest, KeepsTheNewest) {
  for (int64_t step : {8, 9, 10, 11}) save(step);
  EXPECT_EQ(contents(), (Names{"latest", "step-10", "step-11"}));
  save(12, 1);
  EXPECT_EQ(contents(), (Names{"latest", "step-12"}));
  expect_step(12);
}

TEST_F(CheckpointTest, SavingAStepAgainReplacesIt) {
  save(5);
  save(6);
  for (int i = 0; i < 3; ++i) {
    save(6);
    expect_step(6);
    EXPECT_LE(contents().size(), 3u);
  }
  save(7);
  EXPECT_TRUE(contents().count("step-7"));
  expect_step(7);
}

TEST_F(CheckpointTest, AnotherRunInTheSameFolderStartsLower) {
  save(100);
  save(200);
  save(50);
  expect_step(50);
  EXPECT_EQ(contents(), (Names{"latest", "step-50"}));
  remove_checkpoints(folder_.string());
  EXPECT_TRUE(contents().empty());
  EXPECT_FALSE(has_checkpoint(folder_.string()));
  remove_checkpoints((folder_ / "absent").string());
}

// Killed while step-2.tmp was written.
TEST_F(CheckpointTest, KilledWhileWriting) {
  save(1);
  for (const char* partial :
       {"model.safetensors", "optimizer.safetensors.tmp", "state.json.tmp", "state.json"}) {
    fs::create_directory(train_ / "step-2.tmp");
    write(train_ / "step-2.tmp" / partial, "half");
    expect_step(1);
    save(2);
    expect_step(2);
    EXPECT_EQ(contents(), (Names{"latest", "step-1", "step-2"})) << partial;
    remove_checkpoints(folder_.string());
    save(1);
  }
}

// Killed between the rename of step-2 and the switch of latest: the older is used, and step 2 can
// be saved again.
TEST_F(CheckpointTest, KilledBeforeLatestWasSwitched) {
  save(1);
  save(2);
  write(train_ / "latest", "step-1\n");
  write(train_ / "latest.tmp", "step-");
  expect_step(1);
  save(2);
  expect_step(2);
}

// The very first save, killed before there was a `latest`.
TEST_F(CheckpointTest, KilledBeforeTheFirstLatest) {
  save(3);
  fs::remove(train_ / "latest");
  expect_step(3);
  save(4);
  expect_step(4);
}

// Killed while an old step was being removed: renamed away first, so it is never taken for whole.
TEST_F(CheckpointTest, KilledWhileRemoving) {
  save(1);
  save(2);
  fs::rename(train_ / "step-1", train_ / "step-1.tmp");
  fs::remove(train_ / "step-1.tmp" / "model.safetensors");
  fs::remove(train_ / "latest");
  expect_step(2);
  save(3);
  EXPECT_EQ(contents(), (Names{"latest", "step-2", "step-3"}));
}

TEST_F(CheckpointTest, LatestThatNamesNothingUsable) {
  save(1);
  save(2);
  for (const char* text : {"step-9\n", "", "../../etc\n", "step-1x\n", "step--1\n", "step-01\n"}) {
    write(train_ / "latest", text);
    expect_step(2);
  }
  fs::remove(train_ / "step-2" / "state.json");  // not whole
  write(train_ / "latest", "step-2\n");
  expect_step(1);
}

TEST_F(CheckpointTest, DamageIsNamed) {
  save(1);
  const fs::path step = train_ / "step-1";
  fs::resize_file(step / "optimizer.safetensors",
                  fs::file_size(step / "optimizer.safetensors") - 4);
  EXPECT_NE(load_error().find("optimizer.safetensors"), std::string::npos) << load_error();
  save(1);
  write(train_ / "step-1.1" / "state.json", "{");
  EXPECT_NE(load_error().find("not the state of a checkpoint"), std::string::npos) << load_error();
  write(train_ / "step-1.1" / "state.json",
        R"({"version":9,"step":1,"optimizer_steps":1,"options":"","cursor":""})");
  EXPECT_NE(load_error().find("version 9"), std::string::npos) << load_error();
}

TEST_F(CheckpointTest, AnotherModelIsRefusedByTensor) {
  save(1);
  config_.n = 5;
  model_ = make_model(*backend_, config_, 1);
  optimizer_ = std::make_unique<Optimizer>(*backend_, model_, OptimizerOptions{});
  EXPECT_NE(load_error().find("A_log"), std::string::npos) << load_error();
  EXPECT_NE(load_error().find("expected (16, 5) F32, found (16, 4) F32"), std::string::npos)
      << load_error();
  config_.n = 4;
  config_.layers.resize(1);
  model_ = make_model(*backend_, config_, 1);
  optimizer_ = std::make_unique<Optimizer>(*backend_, model_, OptimizerOptions{});
  EXPECT_NE(load_error().find("tensors, the model needs"), std::string::npos) << load_error();
}

}  // namespace
}  // namespace coil
