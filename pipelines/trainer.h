// A training run, between its begin (train.cc) and its loop (train_loop.cc).
#pragma once

#include <chrono>
#include <deque>
#include <future>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "kernels/error.h"
#include "model/loss.h"
#include "pipelines/batches.h"
#include "pipelines/run_log.h"
#include "pipelines/train.h"
#include "pipelines/training_data.h"

namespace coil {

// What a checkpoint keeps beside weights and moments.
struct TrainProgress {
  double best_metric = 0, best_loss = 0;
  int64_t best_step = -1, stale = 0, tokens = 0, last_evaluation = 0;
  int64_t epoch = 0, next = 0;           // where the next batch is drawn
  double loss_sum = 0, loss_weight = 0;  // since the last evaluation
  double seconds = 0;                    // of training, over all sittings
  bool finished = false;
};

class Trainer {
 public:
  Trainer(Backend& backend, TrainOptions options, const TrainHooks& hooks)
      : backend_(backend), options_(std::move(options)), hooks_(hooks) {}

  int run() {
    begin();
    if (progress_.finished) {
      say("this run is finished already");
      return 0;
    }
    return loop();
  }

  // What would fit, after memory ran out.
  std::string memory_hint() const;

 private:
  void say(const std::string& text) const {
    if (hooks_.line) hooks_.line(text);
  }
  int interrupted() const { return hooks_.interrupted ? hooks_.interrupted() : 0; }
  bool language() const { return is_language(options_.objective); }
  int64_t bases(std::span<const Example> items) const {  // or samples
    int64_t total = 0;
    for (const Example& item : items) total += item.length;
    return total / front_.step();
  }
  // Since the last evaluation: per example, base or sample.
  double mean_loss() const {
    const double of_codes =
        progress_.loss_weight > 0 ? progress_.loss_sum / progress_.loss_weight : 0;
    return language() ? of_codes * static_cast<double>(front_.step()) : of_codes;
  }
  // What forward and backward read: the weights, or their copy in bf16.
  const Model& computing() const { return rounded_ ? *rounded_ : model_; }

  void begin();
  void check_folder() const;
  void read_data();
  Config network() const;
  void settle_lengths();
  void settle_from();
  void resolve();
  int64_t longest() const;
  void settle_chunk(const Config& config);
  void restore();
  int loop();
  std::vector<Batch> next_batches();
  void train_step();
  void settle(size_t left);
  void evaluate_now();
  void save();
  [[noreturn]] void exploded(int64_t step, const std::string& what) const;
  CardFacts facts(const RunPoint& point) const;

  Backend& backend_;
  TrainOptions options_;
  const TrainHooks& hooks_;
  TrainingData data_;
  FrontEnd front_;
  std::unique_ptr<Batches> batches_;
  std::future<std::vector<Batch>> ahead_;  // of the next step
  std::vector<float> class_weights_;
  Model model_, grad_;            // f32
  std::optional<Model> rounded_;  // with bf16 matrices
  std::unique_ptr<Optimizer> optimizer_;
  std::optional<Rows> rows_;  // of the last batch: where the next one's are the same, sent once
  struct Report {
    int64_t step;
    double weight;                   // of its targets
    std::unique_ptr<Fetch> numbers;  // (2) f64: sum of losses, sum of squares of the gradient
  };
  std::deque<Report> reports_;  // of steps whose numbers were not read yet
  std::unique_ptr<RunLog> log_;
  TrainProgress progress_;
  int64_t step_ = 0, first_step_ = 0;  // first_step_: where this sitting began
  std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now(), rate_start_;
  double seconds_before_ = 0;  // of earlier sittings
  int64_t rate_tokens_ = 0;    // since rate_start_, evaluations left out
};

}  // namespace coil
