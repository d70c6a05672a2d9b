// Presets, and the options of a run as JSON: kept in its checkpoints, compared on --resume.

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>
#include <string_view>

#include "kernels/error.h"
#include "pipelines/train.h"
#include "pipelines/training_data.h"

namespace coil {
namespace {

using nlohmann::json;

struct Preset {
  const char* name;
  bool audio;
  Objective objective;
  int64_t d, layers;
  double lr;
  int64_t batch_tokens;
  bool unet = false;           // of S4D
  bool bidirectional = false;  // and what suits some ten thousand short rows
};
constexpr Preset kPresets[] = {
    {"dna-tiny", false, Objective::classify, 64, 2, 6e-3, 8192},
    {"dna-small", false, Objective::classify, 128, 4, 4e-3, 8192},
    {"dna-base", false, Objective::classify, 256, 8, 2e-3, 8192},
    {"dna-short", false, Objective::classify, 128, 4, 2e-3, 8192, false, true},
    {"audio-tiny", true, Objective::lm, 64, 2, 6e-3, 16'384},
    {"audio-small", true, Objective::lm, 128, 4, 4e-3, 32'768},
    {"audio-base", true, Objective::lm, 64, 8, 4e-3, 65'536, true},
};
// What older checkpoints lack; their defaults are what those runs had.
constexpr std::string_view kLater[] = {
    "precision", "audio",         "rate",          "codes",
    "trim",      "labels",        "label_pattern", "condition",
    "mixers",    "s4d_states",    "s4d_init",      "topology",
    "pool",      "widths",        "mlp",           "condition_dropout",
    "dt_rank",   "lengths",       "accumulate",    "chunk",
    "truncate",  "bidirectional", "strands",       "kmer",
    "alphabet",  "mask_share",    "target_column", "shard_size",
    "mutate_to"};

// The one list of what is stored: f(key, member, whether another value on resume is refused).
template <class Options, class F>
void visit(Options& o, F f) {
  f("data", o.data, false);  // compared by content, see train.cc
  f("validation", o.validation, false);
  f("validation_fraction", o.validation_fraction, true);
  f("validation_tokens", o.validation_tokens, true);
  f("preset", o.preset, true);
  f("from", o.from, true);
  f("sequence_column", o.sequence_column, true);
  f("label_column", o.label_column, true);
  f("target_column", o.target_column, true);
  f("alphabet", o.alphabet, true);
  f("mask_share", o.mask_share, true);
  f("table", o.table, false);
  f("audio", o.audio, true);
  f("rate", o.rate, true);
  f("codes", o.codes, true);
  f("trim", o.trim, true);
  f("labels", o.labels, false);
  f("label_pattern", o.label_pattern, false);
  f("condition", o.condition, true);
  f("condition_dropout", o.condition_dropout, true);
  f("min_length", o.min_length, true);
  f("max_length", o.max_length, true);
  f("lengths", o.lengths, true);
  f("d", o.d, true);
  f("layers", o.layers, true);
  f("n", o.n, true);
  f("dt_rank", o.dt_rank, true);
  f("mixers", o.mixers, true);
  f("s4d_states", o.s4d_states, true);
  f("s4d_init", o.s4d_init, true);
  f("topology", o.topology, true);
  f("pool", o.pool, true);
  f("widths", o.widths, true);
  f("mlp", o.mlp, true);
  f("bidirectional", o.bidirectional, true);
  f("strands", o.strands, true);
  f("kmer", o.kmer, true);
  f("steps", o.steps, true);
  f("epochs", o.epochs, true);
  f("batch_tokens", o.batch_tokens, true);
  f("accumulate", o.accumulate, true);
  f("chunk", o.chunk, true);
  f("truncate", o.truncate, true);
  f("lr", o.lr, true);
  f("min_lr", o.min_lr, true);
  f("warmup", o.warmup, true);
  f("weight_decay", o.weight_decay, true);
  f("clip", o.clip, true);
  f("reverse_complement", o.reverse_complement, true);
  f("mutate", o.mutate, true);
  f("mutate_to", o.mutate_to, true);
  f("balance", o.balance, true);
  f("eval_every", o.eval_every, true);
  f("checkpoint_every", o.checkpoint_every, false);
  f("shard_size", o.shard_size, false);
  f("patience", o.patience, true);
  f("metric", o.metric, true);
  f("seed", o.seed, true);
  f("precision", o.precision, true);
  f("threads", o.threads, false);  // a note, not a refusal: the machine may have changed
}

const char* name_of(Pooling pooling) { return pooling == Pooling::last ? "last" : "mean"; }

}  // namespace

std::vector<std::string> preset_names() {
  std::vector<std::string> names;
  for (const Preset& preset : kPresets) names.push_back(preset.name);
  return names;
}

void apply_preset(const std::string& name, TrainOptions& options) {
  for (const Preset& preset : kPresets) {
    if (preset.name != name) continue;
    options.preset = name;
    options.audio = preset.audio;
    options.objective = preset.objective;
    options.batch_tokens = preset.batch_tokens;
    if (preset.audio) options.reverse_complement = false;
    options.d = preset.d;
    options.layers = preset.layers;
    options.lr = preset.lr;
    if (preset.bidirectional) {
      options.bidirectional = true;
      options.epochs = 10;
      options.weight_decay = 0.3;
    }
    if (preset.unet) {
      options.topology = "unet";
      options.mixers = "s4d";
    }
    return;
  }
  throw UsageError(
      fmt::format("unknown preset '{}': expected {}", name, fmt::join(preset_names(), ", ")));
}

Config network_of(const TrainOptions& options) {
  const bool unet = options.topology == "unet";
  if (!unet && options.topology != "stack")
    throw UsageError(fmt::format("--topology '{}': expected stack or unet", options.topology));
  if (!unet && !(options.pool.empty() && options.widths.empty()))
    throw UsageError(
        fmt::format("--{}: a stack has no stages", options.pool.empty() ? "widths" : "pool"),
        "--topology unet");
  Config config;
  config.d = options.d;
  config.e = 2 * options.d;
  config.n = options.n;
  config.dt_rank = options.dt_rank > 0 ? options.dt_rank : dt_rank_of(options.d);
  config.s4d_states = options.s4d_states;
  config.s4d_init = parse_s4d_init(options.s4d_init);
  config.mlp = options.mlp >= 0 ? options.mlp : unet ? 2 : 0;
  if (unet) {
    config.layers.resize(static_cast<size_t>(options.layers));
    add_stages(config, options.pool.empty() ? "4,4" : options.pool, options.widths, options.mixers);
    config.tie = false;
  } else {
    config.layers = parse_mixers(options.mixers, options.layers);
  }
  config.bidirectional = options.bidirectional;
  config.kmer = options.kmer;
  if (config.kmer > 1) config.tie = false;
  const bool mamba = std::ranges::all_of(
      config.layers, [](const LayerConfig& layer) { return layer.mixer == MixerKind::mamba1; });
  if (config.bidirectional && (unet || !mamba))
    throw UsageError(fmt::format("--bidirectional: expected a stack of mamba1, found {}",
                                 unet ? "a U-Net" : mixer_names(config)));
  if (unet || !mamba || config.mlp > 0 || config.bidirectional || config.kmer > 1)
    config.model_type = "coil";
  return config;
}

namespace {

// What only one kind of data has.
void check_audio(const TrainOptions& o) {
  const auto refuse = [&](bool given, const char* option) {
    if (!given) return;
    if (o.audio) throw UsageError(fmt::format("--{} is for DNA", option));
    throw UsageError(fmt::format("--{} is for audio", option), "--preset audio-small");
  };
  parse_codes(o.codes);
  if (o.audio) {
    refuse(std::max(o.mutate, o.mutate_to) > 0, "mutate");
    refuse(!o.table.empty(), "table");
    refuse(o.strands != "average", "strands");
    refuse(o.kmer > 1, "kmer");
    refuse(o.bidirectional, "bidirectional");
    refuse(o.objective == Objective::mlm, "objective mlm");
    refuse(!o.alphabet.empty(), "alphabet");
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

// A table's own letters and targets.
void check_letters(const TrainOptions& o) {
  if (!o.target_column.empty() && o.objective != Objective::mlm)
    throw UsageError("--target-column: what each place is to put out goes with a token head",
                     "--objective mlm");
  if (o.alphabet.empty()) return;
  const std::string fault = alphabet_fault(o.alphabet);
  if (!fault.empty()) throw UsageError(fmt::format("--alphabet: {}", fault));
  if (std::max(o.mutate, o.mutate_to) > 0)
    throw UsageError("--mutate is for DNA, not for the letters of --alphabet");
  if (o.kmer > 1) throw UsageError("--kmer is for DNA, not for the letters of --alphabet");
  if (!o.table.empty()) throw UsageError("--table is for FASTA, --alphabet for CSV and TSV");
}

// Both ends, both strands: what does not go with them.
void check_directions(const TrainOptions& o) {
  if (o.strands != "average" && o.strands != "equivariant")
    throw UsageError(fmt::format("--strands '{}': expected average or equivariant", o.strands));
  if (o.objective == Objective::lm && o.bidirectional)
    throw UsageError("--bidirectional: a causal language model would see what it predicts",
                     "--objective mlm");
  if (o.strands == "equivariant" && !(o.alphabet.empty() && o.target_column.empty()))
    throw UsageError(fmt::format("--strands equivariant: {} no other strand",
                                 o.alphabet.empty() ? "targets have" : "letters have"));
  if (o.strands == "equivariant" && is_language(o.objective))
    throw UsageError(
        "--strands equivariant is for a classifier",
        "a language model is trained on either strand; --from makes a classifier of it");
  if (o.strands == "equivariant" && !o.reverse_complement)
    throw UsageError(
        "--strands equivariant: both strands are one, --no-reverse-complement says "
        "that they differ");
  if (o.truncate && (o.bidirectional || o.strands == "equivariant"))
    throw UsageError("--truncate: sequences are read whole");
}

}  // namespace

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
  within("mutate", o.mutate_to, 0, 1);
  within("condition-dropout", o.condition_dropout, 0, 1);
  within("validation-fraction", o.validation_fraction, 0, 0.5);
  within("shard-size", static_cast<double>(o.shard_size), 0, kAny);
  within("max-minutes", o.max_minutes, 0, kAny);
  within("trim", o.trim, 0, 200);
  within("rate", static_cast<double>(o.rate), 0, 1 << 24);
  within("kmer", static_cast<double>(o.kmer), 1, Config::kMaxKmer);
  within("mask-share", o.mask_share, 0.001, 0.999);
  check_directions(o);
  check_audio(o);
  check_letters(o);
  if (o.from.empty()) network_of(o);  // else the network is that of a model
}

std::string to_json(const TrainOptions& options) {
  json out;
  visit(options, [&](const char* key, const auto& value, bool) { out[key] = value; });
  out["objective"] = name_of(options.objective);
  out["pooling"] = name_of(options.pooling);
  return out.dump();
}

TrainOptions parse_train_options(const std::string& text) {
  TrainOptions options;
  options.mlp = 0;
  options.condition_dropout = 0;
  try {
    const json in = json::parse(text);
    visit(options, [&](const char* key, auto& value, bool) {
      if (in.contains(key) || !std::ranges::count(kLater, key)) in.at(key).get_to(value);
    });
    if (!in.contains("dt_rank")) options.dt_rank = (options.d + 15) / 16;
    for (const Objective objective : {Objective::lm, Objective::classify, Objective::mlm})
      if (in.at("objective") == name_of(objective)) options.objective = objective;
    options.pooling = in.at("pooling") == "last" ? Pooling::last : Pooling::mean;
  } catch (const json::exception& error) {
    fail("the checkpoint's options cannot be read: {}", error.what());
  }
  return options;
}

std::string differences(const TrainOptions& then, const TrainOptions& now) {
  const json a = json::parse(to_json(then)), b = json::parse(to_json(now));
  std::vector<std::string> found;
  const auto compare = [&](const std::string& key) {
    if (a.at(key) != b.at(key))
      found.push_back(fmt::format("{} ({} then, {} now)", key, a.at(key).dump(), b.at(key).dump()));
  };
  compare("objective");
  compare("pooling");
  visit(now, [&](const char* key, const auto&, bool compared) {
    if (compared) compare(key);
  });
  return fmt::format("{}", fmt::join(found, ", "));
}

double learning_rate(const TrainOptions& options, int64_t step) {
  const double warm =
      std::max(1.0, std::floor(options.warmup * static_cast<double>(options.steps)));
  const double at = static_cast<double>(step);
  if (at <= warm) return options.lr * at / warm;
  const double part = (at - warm) / std::max(1.0, static_cast<double>(options.steps) - warm);
  const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * std::min(1.0, part)));
  return options.lr * (options.min_lr + (1 - options.min_lr) * cosine);
}

}  // namespace coil
