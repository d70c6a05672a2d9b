// The loop. A step: draw a batch, loss and gradients, AdamW at the step's learning rate. A device
// is never waited for but by a step's numbers (loss, gradient norm), which are read when the next
// step has been asked for; until then the device itself holds back a step that is not finite. An
// evaluation: validation, a line, the model kept if it is the best so far; then a checkpoint. Order
// matters for --resume: the best model is written before the checkpoint that knows of it, so that a
// kill between the two only repeats its writing.

#include "pipelines/train.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <deque>
#include <filesystem>
#include <future>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>

#include "genomics/alphabet.h"
#include "kernels/error.h"
#include "model/checkpoint.h"
#include "model/loss.h"
#include "model/memory_plan.h"
#include "pipelines/batches.h"
#include "pipelines/fit.h"
#include "pipelines/run_log.h"
#include "pipelines/training_data.h"

namespace coil {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Clock = std::chrono::steady_clock;

constexpr double kExploded = 100;             // times the loss of guessing
constexpr int64_t kEvaluations = 20;          // in a run, unless asked otherwise
constexpr int64_t kPartRows = 4096;           // on a CPU; larger is not faster
constexpr int64_t kDevicePartRows = 131'072;  // on a GPU: more would cost memory, not save time

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// What only one kind of data has.
void check_audio(const TrainOptions& o) {
  const auto refuse = [&](bool given, const char* option) {
    if (!given) return;
    if (o.audio) throw UsageError(fmt::format("--{} is for DNA", option));
    throw UsageError(fmt::format("--{} is for audio", option), "--preset audio-small");
  };
  parse_codes(o.codes);
  if (o.audio) {
    refuse(o.mutate > 0, "mutate");
    refuse(!o.table.empty(), "table");
    if (o.condition && o.objective != Objective::lm)
      throw UsageError("--condition is for a language model: it does not go with --task classify");
    if (!o.condition && o.objective == Objective::lm &&
        !(o.labels.empty() && o.label_pattern.empty()))
      throw UsageError(
          "--labels, --label-pattern: a language model is given labels with --condition");
    if (!o.labels.empty() && !o.label_pattern.empty())
      throw UsageError("--labels, --label-pattern: expected one of them, not both");
    if (o.balance && o.objective == Objective::lm)
      throw UsageError("--balance is for a classifier");
  } else {
    refuse(o.rate > 0, "rate");
    refuse(o.codes != "mulaw", "codes");
    refuse(o.trim > 0, "trim");
    refuse(o.condition, "condition");
    refuse(!o.labels.empty(), "labels");
    refuse(!o.label_pattern.empty(), "label-pattern");
  }
}

void check_ranges(const TrainOptions& o) {
  const auto within = [](const char* name, double value, double low, double high) {
    if (!(value >= low && value <= high))
      throw UsageError(fmt::format("--{}: expected {}, found {:.12g}", name,
                                   std::isinf(high) ? fmt::format("{:g} or more", low)
                                                    : fmt::format("{:.12g} to {:.12g}", low, high),
                                   value));
  };
  constexpr double kAny = std::numeric_limits<double>::infinity();
  within("d-model", static_cast<double>(o.d), 1, 1 << 16);
  within("layers", static_cast<double>(o.layers), 1, 1 << 12);
  within("state", static_cast<double>(o.n), 1, 1 << 12);
  within("dt-rank", static_cast<double>(o.dt_rank), 0, 1 << 12);
  within("s4d-states", static_cast<double>(o.s4d_states), 1, 128);
  within("mlp", static_cast<double>(o.mlp), -1, 64);
  within("steps", static_cast<double>(o.steps), 0, kAny);
  within("epochs", o.epochs, 0, kAny);
  within("batch-tokens", static_cast<double>(o.batch_tokens), 1, kAny);
  within("accumulate", static_cast<double>(o.accumulate), 1, 1 << 16);
  if (o.chunk < TrainOptions::kAutoChunk)
    throw UsageError(fmt::format("--chunk: expected 0 or more, or auto, found {}", o.chunk));
  if (o.truncate && o.chunk == 0)
    throw UsageError("--truncate ends gradients where a chunk begins", "--chunk 4k");
  if (!(o.lr > 0)) throw UsageError(fmt::format("--lr: expected more than 0, found {:g}", o.lr));
  within("min-lr", o.min_lr, 0, 1);
  within("warmup", o.warmup, 0, 1);
  within("weight-decay", o.weight_decay, 0, kAny);
  within("clip", o.clip, 0, kAny);
  within("mutate", o.mutate, 0, 1);
  within("condition-dropout", o.condition_dropout, 0, 1);
  within("validation-fraction", o.validation_fraction, 0, 0.5);
  within("max-minutes", o.max_minutes, 0, kAny);
  within("trim", o.trim, 0, 200);
  within("rate", static_cast<double>(o.rate), 0, 1 << 24);
  check_audio(o);
  if (o.from.empty()) network_of(o);  // else the network is that of a model
}

// What a checkpoint keeps beside weights and moments.
struct Progress {
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
    const int signal = loop();
    if (signal != 0) {
      say(fmt::format("stopped by {} at step {}; to go on: coil train --resume -o {}",
                      signal == 2 ? "Ctrl-C" : fmt::format("signal {}", signal), step_,
                      options_.out));
      return 128 + signal;
    }
    return 0;
  }

  // What would fit, after memory ran out.
  std::string memory_hint() const;

 private:
  void say(const std::string& text) const {
    if (hooks_.line) hooks_.line(text);
  }
  int interrupted() const { return hooks_.interrupted ? hooks_.interrupted() : 0; }
  bool lm() const { return options_.objective == Objective::lm; }
  int64_t bases(std::span<const Example> items) const {  // or samples
    int64_t total = 0;
    for (const Example& item : items) total += item.length;
    return total / front_.step();
  }
  // Since the last evaluation: per example, base or sample.
  double mean_loss() const {
    const double of_codes =
        progress_.loss_weight > 0 ? progress_.loss_sum / progress_.loss_weight : 0;
    return lm() ? of_codes * static_cast<double>(front_.step()) : of_codes;
  }
  // What forward and backward read: the weights, or their copy in bf16.
  const Model& computing() const { return rounded_ ? *rounded_ : model_; }

  void begin();
  void check_folder() const;
  void read_data();
  Config network() const;
  void settle_lengths();
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
  Progress progress_;
  int64_t step_ = 0, first_step_ = 0;  // first_step_: where this sitting began
  Clock::time_point started_ = Clock::now(), rate_start_;
  double seconds_before_ = 0;  // of earlier sittings
  int64_t rate_tokens_ = 0;    // since rate_start_, evaluations left out
};

void Trainer::check_folder() const {
  check(!options_.out.empty(), "no model folder to write to: -o MODEL");
  std::error_code error;
  const fs::file_status status = fs::status(options_.out, error);
  if (status.type() == fs::file_type::not_found) return;
  check(!error, "'{}': {}", options_.out, error.message());
  check(fs::is_directory(status), "'{}' is not a folder", options_.out);
  if (options_.resume) {
    if (!has_checkpoint(options_.out) && fs::exists(fs::path(options_.out) / "model.safetensors"))
      fail("'{}' holds a model but no checkpoint to resume from", options_.out);
    return;
  }
  if (!fs::is_empty(options_.out))
    throw Error(fmt::format("model folder '{}' is not empty", options_.out),
                "--resume continues its run; or name another folder with -o");
}

void Trainer::read_data() {
  data_ = read_training_data(options_, [this](const std::string& text) { say(text); });
  check(!data_.parts.train.empty(), "no training examples are left beside the validation set");
}

Config Trainer::network() const {
  Config config;
  if (!options_.from.empty()) {
    config = read_config(options_.from);
    if (!options_.audio)
      check(config.alphabet == "dna" && config.vocab == dna::kVocab,
            "'{}': its alphabet is '{}' with {} tokens, expected 'dna' with {}", options_.from,
            config.alphabet, config.vocab, dna::kVocab);
  } else {
    config = network_of(options_);
  }
  config.objective = options_.objective;
  config.pooling = options_.pooling;
  config.labels = data_.all.labels;
  config.condition = options_.condition;
  config.condition_dropout = options_.condition ? options_.condition_dropout : 0;
  if (options_.audio) {
    config.audio = {
        .rate = options_.rate, .codes = parse_codes(options_.codes), .trim = options_.trim};
    const int64_t vocab = audio_vocabulary(config);
    config.vocab = options_.from.empty() ? vocab : std::max(config.vocab, vocab);
  } else {
    config.vocab = dna::kVocab;
    config.alphabet = "dna";
  }
  config.unknown.clear();
  return config;
}

// Length warm-up: windows as long as its longest are what is held out. An end of its last stage is
// that of the run.
void Trainer::settle_lengths() {
  if (options_.lengths.empty()) return;
  int64_t most = 0;
  double epochs = 0;
  for (size_t i = 0; i < options_.lengths.size(); ++i) {
    const auto [length, more] = options_.lengths[i];
    const bool last = i + 1 == options_.lengths.size();
    if (length < 1 || !(more > 0 || (last && more == 0)))
      throw UsageError(
          fmt::format("--lengths: expected a length of 1 or more and epochs of more than 0, "
                      "found {}:{:g}",
                      length, more),
          "--lengths 1k:2,4k:2,16k");
    most = std::max(most, length);
    epochs += more;
    if (last && more > 0) options_.epochs = epochs;
  }
  if (options_.max_length != 0 && options_.max_length != most)
    throw UsageError(
        fmt::format("--max-length {}: the longest of --lengths is {}", options_.max_length, most));
  options_.max_length = most;
}

// Of a window or record, in tokens: its codes, and what the front end puts before them.
int64_t Trainer::longest() const {
  const int64_t step = front_.step();
  int64_t most = options_.max_length * step;
  if (most == 0)
    for (const Example& item : data_.parts.train) most = std::max(most, item.length);
  return most + front_.prefix() + (front_.audio() && lm() ? step : 0);
}

// A run that is gone on with keeps what it began with.
void Trainer::settle_chunk(const Config& config) {
  if (options_.chunk != TrainOptions::kAutoChunk) return;
  if (options_.resume && has_checkpoint(options_.out)) {
    options_.chunk = parse_train_options(peek_checkpoint(options_.out).options).chunk;
  } else {
    const DType matrices = options_.precision == "bf16" ? DType::bf16 : DType::f32;
    // A batch shorter than what is taken at once needs no room for more.
    const int64_t rows =
        std::clamp<int64_t>(options_.batch_tokens, kFewestRows, training_rows(backend_.device()));
    options_.chunk = fitting_chunk(backend_, config, matrices, longest(), rows);
    say(options_.chunk > 0 ? fmt::format("a sequence of {} does not fit whole: chunks of {}",
                                         counted(longest(), "token"), with_commas(options_.chunk))
                           : "sequences fit whole: no chunks");
  }
  options_.truncate &= options_.chunk > 0;
}

// What "0: automatic" stands for is settled once and recorded.
void Trainer::resolve() {
  options_.threads = backend_.threads();
  if (options_.metric.empty()) options_.metric = lm() ? "loss" : "mcc";
  const bool known = options_.metric == "loss" ||
                     (!lm() && (options_.metric == "mcc" || options_.metric == "accuracy" ||
                                options_.metric == "auroc"));
  if (!known)
    throw UsageError(fmt::format("--metric {}: expected {}", options_.metric,
                                 lm() ? "loss" : "mcc, accuracy, auroc or loss"));
  if (options_.steps == 0) {
    const double tokens = options_.epochs * static_cast<double>(batches_->tokens());
    const double of_a_step =
        static_cast<double>(options_.batch_tokens) * static_cast<double>(options_.accumulate);
    options_.steps = std::max<int64_t>(1, std::llround(std::ceil(tokens / of_a_step)));
  }
  if (options_.eval_every == 0)
    options_.eval_every = std::max<int64_t>(1, (options_.steps + kEvaluations - 1) / kEvaluations);
  if (options_.checkpoint_every == 0) options_.checkpoint_every = options_.eval_every;
  if (options_.log.empty())
    options_.log = (fs::path(options_.out) / "train" / "log.jsonl").string();
}

void Trainer::begin() {
  check_ranges(options_);
  check_folder();
  settle_lengths();
  read_data();
  const Config config = network();
  front_ = FrontEnd(config);
  batches_ =
      std::make_unique<Batches>(data_.all, data_.parts.train,
                                BatchOptions{.objective = options_.objective,
                                             .batch_tokens = options_.batch_tokens,
                                             .min_length = options_.min_length,
                                             .max_length = options_.max_length,
                                             .lengths = options_.lengths,
                                             .reverse_complement = options_.reverse_complement,
                                             .mutate = options_.mutate,
                                             .condition_dropout = config.condition_dropout,
                                             .seed = options_.seed,
                                             .front = front_});
  resolve();
  settle_chunk(config);
  options_.d = config.d;
  options_.layers = static_cast<int64_t>(config.layers.size());
  options_.n = config.n;
  options_.dt_rank = config.dt_rank;
  options_.mlp = config.mlp;
  if (!options_.from.empty()) {
    options_.mixers = mixer_names(config);
    options_.topology = config.inner.empty() ? "stack" : "unet";
  }
  model_ = make_model(backend_, config, options_.seed);
  grad_ = zeros_like(backend_, model_);
  if (options_.precision == "bf16") {
    check(backend_.activations(DType::bf16) == DType::bf16,
          "precision bf16: this device trains in f32");
    rounded_ = converted(backend_, model_, DType::bf16);
  }
  optimizer_ = std::make_unique<Optimizer>(
      backend_, model_,
      OptimizerOptions{
          .lr = options_.lr, .weight_decay = options_.weight_decay, .clip = options_.clip});

  say(fmt::format(
      "{} ({}), {} for validation ({}){}",
      counted(static_cast<int64_t>(data_.parts.train.size()), "training example"),
      counted(bases(data_.parts.train), front_.unit()),
      with_commas(static_cast<int64_t>(data_.parts.held_out.size())),
      counted(bases(data_.parts.held_out), front_.unit()),
      data_.all.labels.empty() ? "" : fmt::format(", {} classes", data_.all.labels.size())));
  if (data_.parts.held_out.empty())
    say("note: nothing is held out to validate with: the last model is kept");
  say(fmt::format("{}: {}; {} of {}, learning rate {:g}, {}", network_text(config),
                  counted(parameters(config), "parameter"), counted(options_.steps, "step"),
                  counted(options_.batch_tokens * options_.accumulate, "token"), options_.lr,
                  counted(options_.threads, "thread")));
  if (options_.balance && !lm() && options_.max_length == 0) {  // windows: classes are drawn evenly
    std::vector<double> counts(data_.all.labels.size(), 0);
    for (const Example& item : data_.parts.train) counts[item.label] += 1;
    for (const double count : counts)
      class_weights_.push_back(
          static_cast<float>(static_cast<double>(data_.parts.train.size()) /
                             (static_cast<double>(counts.size()) * std::max(1.0, count))));
  }
  if (options_.resume && has_checkpoint(options_.out)) {
    restore();
    return;
  }
  if (!options_.from.empty()) {
    const std::vector<std::string> taken = load_matching(backend_, model_, options_.from);
    check(!taken.empty(), "'{}' has no tensor in common with this model", options_.from);
    say(fmt::format("{} tensors taken from {}", taken.size(), options_.from));
  }
  std::error_code error;
  fs::create_directories(fs::path(options_.out) / "train", error);
  check(!error, "cannot make the folder '{}': {}", options_.out, error.message());
  log_ = std::make_unique<RunLog>(options_.log, -1);
  json start = json::parse(to_json(options_));
  start["event"] = "start";
  start["step"] = 0;
  start["parameters"] = parameters(config);
  log_->add(start.dump());
  save();
}

void Trainer::restore() {
  const Checkpoint kept = peek_checkpoint(options_.out);
  const TrainOptions then = parse_train_options(kept.options);
  const json cursor = json::parse(kept.cursor);
  // Options first: another network would not load at all.
  const std::string other = differences(then, options_);
  if (!other.empty())
    throw Error(
        fmt::format("'{}' was trained with other options: {}", options_.out, other),
        "resume with the same options (none need be given), or name another folder with -o");
  check(cursor.at("data") == data_.fingerprint,
        "the data differ from those that '{}' was trained on (fingerprint {} then, {} now)",
        options_.out, cursor.at("data").get<std::string>(), data_.fingerprint);
  load_checkpoint(backend_, options_.out, model_, *optimizer_);
  step_ = first_step_ = kept.step;
  progress_ = {.best_metric = cursor.at("best_metric"),
               .best_loss = cursor.at("best_loss"),
               .best_step = cursor.at("best_step"),
               .stale = cursor.at("stale"),
               .tokens = cursor.at("tokens"),
               .last_evaluation = cursor.at("last_evaluation"),
               .epoch = cursor.at("epoch"),
               .next = cursor.at("next"),
               .loss_sum = cursor.at("loss_sum"),
               .loss_weight = cursor.at("loss_weight"),
               .seconds = cursor.at("seconds"),
               .finished = cursor.at("finished")};
  batches_->epoch = progress_.epoch;
  batches_->next = progress_.next;
  seconds_before_ = progress_.seconds;
  log_ = std::make_unique<RunLog>(options_.log, step_);
  say(fmt::format("resumed at step {} of {}", step_, options_.steps));
  if (then.threads != options_.threads)
    say(fmt::format("note: {} threads then, {} now: results will differ in their last bits",
                    then.threads, options_.threads));
}

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
    if (signal != 0) return signal;
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
  return 0;
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
    const int64_t choices = !lm() ? std::max<int64_t>(2, data_.all.labels.size())
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
    point.validation =
        evaluate(backend_, computing(), data_.held_out_of(options_), data_.parts.held_out,
                 {.both_strands = options_.reverse_complement, .note = &note});
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
    save_model(backend_, model_, options_.out);
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
                  *optimizer_);
}

}  // namespace

int64_t training_rows(Device device) {
  return device.kind == Device::Kind::cpu ? kPartRows : kDevicePartRows;
}

int train(Backend& backend, TrainOptions options, const TrainHooks& hooks) {
  Trainer trainer(backend, std::move(options), hooks);
  try {
    return trainer.run();
  } catch (const OutOfMemory& error) {
    throw OutOfMemory(error.what(), trainer.memory_hint());
  }
}

}  // namespace coil
