// The loop. A step: draw a batch, loss and gradients, AdamW at the step's learning rate. A device
// is never waited for but by a step's numbers (loss, gradient norm), which are read when the next
// step has been asked for; until then the device itself holds back a step that is not finite. An
// evaluation: validation, a line, the model kept if it is the best so far; then a checkpoint. Order
// matters for --resume: the best model is written before the checkpoint that knows of it, so that a
// kill between the two only repeats its writing.

#include "pipelines/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "model/checkpoint.h"
#include "model/memory_plan.h"
#include "pipelines/fit.h"

namespace coil {

namespace fs = std::filesystem;
using nlohmann::json;
using Clock = std::chrono::steady_clock;

namespace {

constexpr double kExploded = 100;  // times the loss of guessing

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

int Trainer::loop() {
  if (rounded_) copy_values(backend_, model_, *rounded_);
  started_ = rate_start_ = Clock::now();
  auto shown = started_;
  while (step_ < options_.steps) {
    train_step();
    const bool late =
        options_.max_minutes > 0 && seconds_since(started_) >= 60 * options_.max_minutes;
    const int signal = interrupted();
    const bool last = step_ == options_.steps;
    const bool due = last || late || step_ % options_.eval_every == 0;
    if (due) evaluate_now();  // after a signal too: it would be missing from a resumed run
    const bool patience_ends = options_.patience > 0 && progress_.stale >= options_.patience;
    progress_.finished = last || patience_ends;
    if (due || signal != 0 || step_ % options_.checkpoint_every == 0) save();
    if (signal != 0) {
      say(fmt::format("stopped by {} at step {}; to go on: coil train --resume -o {}",
                      signal == 2 ? "Ctrl-C" : fmt::format("signal {}", signal), step_,
                      options_.out));
      return 128 + signal;
    }
    if (patience_ends && !last)
      say(fmt::format("no improvement in {} evaluations: stopped", options_.patience));
    if (late && !last)
      say(fmt::format("stopped after {} at step {}; to go on: coil train --resume -o {}",
                      duration(seconds_since(started_)), step_, options_.out));
    if (last || late || patience_ends) break;
    if (hooks_.progress && seconds_since(shown) > 0.5) {
      shown = Clock::now();
      const double rate = static_cast<double>(rate_tokens_) / seconds_since(rate_start_);
      hooks_.progress(fmt::format("step {}/{}  loss {:.4f}  {:.1f}k tok/s", step_, options_.steps,
                                  mean_loss(), rate / 1000));
    }
  }
  if (data_.parts.held_out.empty())
    say(fmt::format("no validation set: the model of step {} is kept: {}", progress_.best_step,
                    options_.out));
  else if (progress_.best_step >= 0)
    say(fmt::format("best {} {:.4f} at step {}: {}", options_.metric, progress_.best_metric,
                    progress_.best_step, options_.out));
  return progress_.finished ? 0 : kTimeEnded;
}

std::string Trainer::memory_hint() const {
  const Memory memory = backend_.memory();
  if (memory.room() < 0) return "coil info MODEL --train --length … plans memory";
  const int64_t usable = plannable(memory.room() + memory.in_use, backend_.device());
  const int64_t longest = this->longest();
  const DType matrices = options_.precision == "bf16" ? DType::bf16 : DType::f32;
  int64_t rows =
      std::min(options_.batch_tokens, std::max(longest, training_rows(backend_.device())));
  MemoryPlan plan;
  if (options_.chunk > 0) rows = std::min(rows, options_.chunk);
  for (rows /= 2; rows >= 1; rows /= 2) {
    const bool cut = rows < longest;
    plan = plan_memory(network(), {.length = cut ? longest : rows,
                                   .chunk = cut ? rows : 0,
                                   .matrices = matrices,
                                   .train = true,
                                   .device = backend_.device()});
    if (plan.total() > usable) continue;
    return fmt::format("{} {} would fit", cut ? "--chunk" : "--batch-tokens", rows);
  }
  return fmt::format(
      "weights, gradients and moments alone take {}: a smaller network (--d-model, --layers), or "
      "--device cpu",
      binary_size(plan.total() - plan.activations));
}

// Beside a device the batches after them are drawn meanwhile.
std::vector<Batch> Trainer::next_batches() {
  const bool cpu = backend_.device().kind == Device::Kind::cpu;
  const auto draw = [&](int64_t step) {
    ahead_ = std::async(cpu ? std::launch::deferred : std::launch::async, [this, step] {
      std::vector<Batch> batches;
      for (int64_t i = options_.accumulate; i-- > 0;)
        batches.push_back(batches_->draw(step * options_.accumulate - i));
      return batches;
    });
  };
  if (!ahead_.valid()) draw(step_ + 1);
  std::vector<Batch> batches = ahead_.get();
  if (step_ + 1 < options_.steps) draw(step_ + 2);
  return batches;
}

// Several batches are one step on all of them: each counts by its targets.
void Trainer::train_step() {
  std::vector<Batch> batches = next_batches();
  const View weights = class_weights_.empty()
                           ? View{}
                           : host_view(class_weights_.data(), DType::f32,
                                       {static_cast<int64_t>(class_weights_.size())});
  const auto view = [](std::vector<int32_t>& numbers) {
    return host_view(numbers.data(), DType::i32, {static_cast<int64_t>(numbers.size())});
  };
  double total = 0;
  for (Batch& batch : batches) total += weight_of(view(batch.targets), weights);
  const Tensor numbers(backend_, DType::f64, {2});
  backend_.fill(numbers, 0);
  const View loss = numbers.view().slice(0, 1), squares = numbers.view().slice(1, 1);
  double counted = 0;
  for (Batch& batch : batches) {
    if (!rows_ || !std::ranges::equal(rows_->pieces(), batch.pieces))
      rows_.emplace(backend_, batch.pieces);
    const double share = weight_of(view(batch.targets), weights) / total;
    counted += add_loss(backend_, computing(), view(batch.ids), *rows_, view(batch.targets),
                        weights, loss, &grad_, nullptr, share,
                        {.rows = training_rows(backend_.device()),
                         .chunk = options_.chunk,
                         .truncate = options_.truncate});
    progress_.tokens += static_cast<int64_t>(batch.ids.size());
    rate_tokens_ += static_cast<int64_t>(batch.ids.size());
  }
  ++step_;
  optimizer_->step(backend_, model_, grad_, learning_rate(options_, step_), squares,
                   rounded_ ? &*rounded_ : nullptr);
  reports_.push_back({step_, counted, std::make_unique<Fetch>(backend_, numbers)});
  progress_.epoch = batches.back().epoch;
  progress_.next = batches.back().next;
  settle(1);
}

// Reads the numbers of all steps but the last `left`.
void Trainer::settle(size_t left) {
  for (; reports_.size() > left; reports_.pop_front()) {
    Report& report = reports_.front();
    const double* const numbers = report.numbers->wait().as<double>();
    const double sum = numbers[0], norm = std::sqrt(numbers[1]);
    const double mean = report.weight > 0 ? sum / report.weight : 0;
    const int64_t choices = !language() ? std::max<int64_t>(2, data_.all.labels.size())
                                        : softmaxes(model_.config).front().count;
    const double guess = std::log(static_cast<double>(choices));
    if (!std::isfinite(mean) || mean > kExploded * guess)
      exploded(report.step, fmt::format("the loss is {:g}", mean));
    if (!std::isfinite(norm))
      exploded(report.step, fmt::format("the gradient's norm is {:g}", norm));
    progress_.loss_sum += sum;
    progress_.loss_weight += report.weight;
  }
}

void Trainer::exploded(int64_t step, const std::string& what) const {
  const int64_t kept = peek_checkpoint(options_.out).step;
  throw Error(
      fmt::format(
          "step {}: {}: training stopped; the checkpoint of step {} in '{}' is the last good one",
          step, what, kept, options_.out),
      fmt::format("start again with a learning rate below {:g} (--lr)", options_.lr));
}

void Trainer::evaluate_now() {
  settle(0);
  RunPoint point{.unit = front_.unit(),
                 .step = step_,
                 .steps = options_.steps,
                 .tokens = progress_.tokens,
                 .train_loss = mean_loss(),
                 .learning_rate = learning_rate(options_, step_)};
  point.tokens_per_second = static_cast<double>(rate_tokens_) / seconds_since(rate_start_);
  const Note note = [this](const std::string& text) { say("note: evaluation: " + text); };
  if (!data_.parts.held_out.empty())
    point.validation = evaluate(
        backend_, computing(), data_.held_out_of(options_), data_.parts.held_out,
        {.both_strands = options_.reverse_complement, .note = &note, .seed = options_.seed});
  const Metrics& m = point.validation.metrics;
  // Without a validation set the last model stands.
  double metric = static_cast<double>(step_), loss = 0;
  if (m.count > 0) {
    loss = m.loss;
    if (!std::isfinite(loss)) exploded(step_, fmt::format("the validation loss is {:g}", loss));
    metric = options_.metric == "mcc"        ? m.mcc
             : options_.metric == "accuracy" ? m.accuracy
             : options_.metric == "auroc"    ? m.auroc
                                             : loss;
  }
  const double sign = options_.metric == "loss" && m.count > 0 ? -1 : 1;
  const bool better = sign * metric > sign * progress_.best_metric ||
                      (metric == progress_.best_metric && loss < progress_.best_loss);
  point.best = progress_.best_step < 0 || better;
  const double trained = seconds_before_ + seconds_since(started_);
  point.seconds = trained;
  const auto left = static_cast<double>(options_.steps - step_);
  point.seconds_left = left * seconds_since(started_) /
                       static_cast<double>(std::max<int64_t>(1, step_ - first_step_));
  if (point.best) {
    progress_.best_metric = metric;
    progress_.best_loss = loss;
    progress_.best_step = step_;
    progress_.stale = 0;
    save_model(backend_, model_, options_.out, options_.shard_size);
    write_file_atomically((fs::path(options_.out) / "README.md").string(),
                          model_card(options_, model_.config, facts(point)));
  } else {
    ++progress_.stale;
  }
  progress_.loss_sum = progress_.loss_weight = 0;
  progress_.last_evaluation = step_;
  say(describe(point, options_.objective));
  log_->add(to_json(point, options_.objective));
  rate_start_ = Clock::now();
  rate_tokens_ = 0;
}

CardFacts Trainer::facts(const RunPoint& point) const {
  return {.train_examples = static_cast<int64_t>(data_.parts.train.size()),
          .train_bases = bases(data_.parts.train),
          .held_out = static_cast<int64_t>(data_.parts.held_out.size()),
          .held_out_bases = bases(data_.parts.held_out),
          .metric = options_.metric,
          .best = point};
}

void Trainer::save() {
  settle(0);
  progress_.seconds = seconds_before_ + (step_ > 0 ? seconds_since(started_) : 0);
  const json cursor = {{"data", data_.fingerprint},
                       {"epoch", progress_.epoch},
                       {"next", progress_.next},
                       {"best_metric", progress_.best_metric},
                       {"best_loss", progress_.best_loss},
                       {"best_step", progress_.best_step},
                       {"stale", progress_.stale},
                       {"tokens", progress_.tokens},
                       {"last_evaluation", progress_.last_evaluation},
                       {"loss_sum", progress_.loss_sum},
                       {"loss_weight", progress_.loss_weight},
                       {"seconds", progress_.seconds},
                       {"finished", progress_.finished}};
  save_checkpoint(backend_, options_.out,
                  {.step = step_, .options = to_json(options_), .cursor = cursor.dump()}, model_,
                  *optimizer_, 2, options_.shard_size);
}

}  // namespace coil
