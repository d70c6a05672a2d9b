// How a run begins: options settled, data read, the network made or taken up again from a
// checkpoint.
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
#include "model/safetensors.h"
#include "pipelines/fit.h"

namespace coil {

namespace fs = std::filesystem;
using nlohmann::json;
using Clock = std::chrono::steady_clock;

namespace {

constexpr int64_t kEvaluations = 20;          // in a run, unless asked otherwise
constexpr int64_t kPartRows = 4096;           // on a CPU; larger is not faster
constexpr int64_t kDevicePartRows = 131'072;  // on a GPU: more would cost memory, not save time

}  // namespace

void Trainer::check_folder() const {
  check(!options_.out.empty(), "no model folder to write to: -o MODEL");
  std::error_code error;
  const fs::file_status status = fs::status(options_.out, error);
  if (status.type() == fs::file_type::not_found) return;
  check(!error, "'{}': {}", options_.out, error.message());
  check(fs::is_directory(status), "'{}' is not a folder", options_.out);
  if (options_.resume) {
    if (!has_checkpoint(options_.out) && has_tensors(options_.out))
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
    config = read_config(options_.found_from());
    const int64_t tokens = Config::dna_vocabulary(config.kmer);
    if (!options_.audio && options_.alphabet.empty())
      check(config.alphabet == "dna" && config.vocab == tokens,
            "'{}': its alphabet is '{}' with {} tokens, expected 'dna' with {}", options_.from,
            config.alphabet, config.vocab, tokens);
  } else {
    config = network_of(options_);
  }
  config.objective = options_.objective;
  config.pooling = options_.pooling;
  config.mask_share = options_.mask_share;
  config.target_column = options_.target_column;
  config.labels = data_.all.labels;
  config.condition = options_.condition;
  config.condition_dropout = options_.condition ? options_.condition_dropout : 0;
  if (options_.audio) {
    config.audio = {
        .rate = options_.rate, .codes = parse_codes(options_.codes), .trim = options_.trim};
    const int64_t vocab = audio_vocabulary(config);
    config.vocab = options_.from.empty() ? vocab : std::max(config.vocab, vocab);
  } else if (!options_.alphabet.empty()) {
    config.alphabet = options_.alphabet;
    const int64_t vocab = letters_vocabulary(config);
    config.vocab = options_.from.empty() ? vocab : std::max(config.vocab, vocab);
  } else {
    config.vocab = Config::dna_vocabulary(config.kmer);
    config.alphabet = "dna";
    config.equivariant = options_.strands == "equivariant";
    if (config.equivariant) config.model_type = "coil";
  }
  config.unknown.clear();
  config.unknown_excerpt = 0;
  check_directions(config, options_.from.empty() ? "the network" : options_.from);
  return config;
}

// How a network reads, and letters of its own, are those of the model that is begun from. Only DNA
// has another strand, and targets are those of the one given.
void Trainer::settle_from() {
  if (!options_.from.empty() && !options_.audio) {
    const Config config = read_config(options_.found_from());
    options_.bidirectional = config.bidirectional;
    options_.kmer = config.kmer;
    const std::string theirs = config.letters() ? config.alphabet : "";
    if (options_.alphabet.empty()) options_.alphabet = theirs;
    check(options_.alphabet == theirs, "--alphabet {}: '{}' has the alphabet '{}'",
          options_.alphabet, options_.from, config.alphabet);
  }
  if (!options_.alphabet.empty() || !options_.target_column.empty())
    options_.reverse_complement = false;
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
  return most + front_.prefix() + (front_.audio() && language() ? step : 0);
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
  if (options_.metric.empty()) options_.metric = language() ? "loss" : "mcc";
  const bool known = options_.metric == "loss" ||
                     (options_.objective == Objective::mlm && options_.metric == "accuracy") ||
                     (!language() && (options_.metric == "mcc" || options_.metric == "accuracy" ||
                                      options_.metric == "auroc"));
  if (!known)
    throw UsageError(fmt::format("--metric {}: expected {}", options_.metric,
                                 !language() ? "mcc, accuracy, auroc or loss"
                                 : options_.objective == Objective::lm ? "loss"
                                                                       : "accuracy or loss"));
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
  settle_from();
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
                                             .pairs = config.equivariant && !language(),
                                             .mutate = options_.mutate,
                                             .mutate_to = options_.mutate_to,
                                             .condition_dropout = config.condition_dropout,
                                             .masking = masking_of(config),
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
  // Of windows the classes are drawn evenly.
  if (options_.balance && !language() && options_.max_length == 0) {
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
    const std::vector<std::string> taken = load_matching(backend_, model_, options_.found_from());
    check(!taken.empty(), "'{}' has no tensor in common with this model", options_.from);
    say(fmt::format("{} tensors taken from {}", taken.size(), options_.from));
    std::vector<std::string> anew;  // other shapes, another head
    for (const Param& param : declare(model_))
      if (!std::ranges::count(taken, param.info.name)) anew.push_back(param.info.name);
    if (!anew.empty()) say(fmt::format("not taken, begun anew: {}", fmt::join(anew, ", ")));
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
