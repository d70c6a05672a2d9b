// The log of JSON lines, the line of an evaluation, the model card: see run_log.h.

#include "pipelines/run_log.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "model/checkpoint.h"

namespace coil {
namespace {

using nlohmann::json;

json number(double value) { return std::isfinite(value) ? json(value) : json(nullptr); }

}  // namespace

std::string duration(double seconds) {
  const auto s = static_cast<int64_t>(std::max(0.0, seconds) + 0.5);
  if (s >= 3600) return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
  return fmt::format("{}:{:02}", s / 60, s % 60);
}

std::string with_commas(int64_t value) {
  std::string digits = std::to_string(value);
  for (auto at = static_cast<std::ptrdiff_t>(digits.size()) - 3; at > (value < 0 ? 1 : 0); at -= 3)
    digits.insert(static_cast<size_t>(at), ",");
  return digits;
}

std::string counted(int64_t count, const char* thing) {
  return fmt::format("{} {}{}", with_commas(count), thing, count == 1 ? "" : "s");
}

std::string describe(const RunPoint& point, Objective objective) {
  const Metrics& m = point.validation.metrics;
  std::string line =
      fmt::format("step {}/{}  loss {:.4f}", point.step, point.steps, point.train_loss);
  if (m.count > 0) {
    line += fmt::format("  val {:.4f}", m.loss);
    if (objective == Objective::classify)
      line += fmt::format("  acc {:.4f}  mcc {:.4f}  auroc {:.4f}", m.accuracy, m.mcc, m.auroc);
    else
      line += fmt::format("  bits/{} {:.4f}", point.unit, point.validation.bits_per_base);
    if (objective == Objective::mlm) line += fmt::format("  acc {:.4f}", m.accuracy);
  }
  line += fmt::format("  {:.1f}k tok/s  ETA {}", point.tokens_per_second / 1000,
                      duration(point.seconds_left));
  if (point.best && m.count > 0) line += "  best";
  return line;
}

std::string to_json(const RunPoint& point, Objective objective) {
  const Metrics& m = point.validation.metrics;
  json out = {{"event", "evaluation"},
              {"step", point.step},
              {"steps", point.steps},
              {"tokens", point.tokens},
              {"loss", number(point.train_loss)},
              {"learning_rate", point.learning_rate},
              {"tokens_per_second", number(point.tokens_per_second)},
              {"seconds", point.seconds},
              {"best", point.best}};
  if (m.count > 0) {
    out["validation_loss"] = number(m.loss);
    if (objective == Objective::classify) {
      out["accuracy"] = number(m.accuracy);
      out["macro_f1"] = number(m.macro_f1);
      out["mcc"] = number(m.mcc);
      out["auroc"] = number(m.auroc);
    } else {
      out[fmt::format("bits_per_{}", point.unit)] = number(point.validation.bits_per_base);
      if (objective == Objective::mlm) out["accuracy"] = number(m.accuracy);
    }
  }
  return out.dump();
}

RunLog::RunLog(const std::string& path, int64_t resumed_step) : path_(path) {
  std::string kept;
  if (resumed_step >= 0) {
    std::ifstream in(path);
    for (std::string line; std::getline(in, line);) {
      const json event = json::parse(line, nullptr, false);
      if (!event.is_object() || !event.contains("step"))
        continue;  // the last line may be cut short
      if (event["step"].is_number_integer() && event["step"].get<int64_t>() <= resumed_step)
        kept += line + "\n";
    }
  }
  write_file_atomically(path, kept);
}

void RunLog::add(const std::string& line) {
  std::FILE* file = std::fopen(path_.c_str(), "a");
  check(file != nullptr, "cannot open '{}': {}", path_, std::strerror(errno));
  const bool written = std::fputs((line + "\n").c_str(), file) >= 0;
  check(std::fclose(file) == 0 && written, "cannot write '{}': {}", path_, std::strerror(errno));
}

namespace {

std::string mixers_text(const std::vector<LayerConfig>& layers) {  // one name where all are alike
  const MixerKind first = layers[0].mixer;
  const bool alike =
      std::ranges::all_of(layers, [&](const LayerConfig& layer) { return layer.mixer == first; });
  return alike ? name_of(first) : mixer_names(layers);
}

}  // namespace

std::string network_text(const Config& config) {
  const std::string mlp = config.mlp > 0 ? fmt::format(", MLP {}", config.mlp) : "";
  std::string reading = config.bidirectional ? ", both ends" : "";
  if (config.equivariant) reading += ", both strands";
  if (config.kmer > 1) reading += fmt::format(", {}-mers", config.kmer);
  if (config.inner.empty()) {
    const bool own = config.model_type == "coil";
    return fmt::format("{}{}, d {}, n {}{}{}", counted(all_layers(config), "layer"),
                       own ? fmt::format(" ({})", mixers_text(config.layers)) : "", config.d,
                       config.n, mlp, reading);
  }
  std::string layers, widths, pool;
  for (Config stage = config;; stage = inner_config(stage)) {
    const char* const between = layers.empty() ? "" : " / ";
    layers += fmt::format("{}{} {}", between, stage.layers.size(), mixers_text(stage.layers));
    widths += fmt::format("{}{}", between, stage.d);
    if (stage.inner.empty()) break;
    pool += fmt::format("{}{}", pool.empty() ? "" : ", ", stage.inner[0].pool);
  }
  return fmt::format("U-Net of {}, pooling {}, layers {}, d {}, n {}{}",
                     counted(static_cast<int64_t>(config.inner.size()) + 1, "stage"), pool, layers,
                     widths, config.n, mlp);
}

std::string model_card(const TrainOptions& options, const Config& config, const CardFacts& facts) {
  const bool language = config.language();
  const Metrics& m = facts.best.validation.metrics;
  std::string card = "# A Coil model\n\n";
  const bool audio = config.audio.rate > 0;
  const char* const unit = facts.best.unit;
  const std::string what = config.letters() ? fmt::format("the letters '{}'", config.alphabet)
                           : audio          ? "audio"
                                            : "DNA";
  if (config.objective == Objective::mlm) {
    card +=
        config.target_column.empty()
            ? fmt::format("A masked language model of {}: tells {}s that were masked, {:g} %.\n",
                          what, unit, 100 * config.mask_share)
            : fmt::format("Reads {} and puts out column '{}', {} by {}.\n", what,
                          config.target_column, unit, unit);
  } else if (language) {
    card +=
        fmt::format("A language model of {}: predicts each {} from those before it.\n", what, unit);
  } else {
    card += fmt::format("Classifies {} into {} classes: {}.\n",
                        audio              ? "recordings"
                        : config.letters() ? "sequences of " + what
                                           : "DNA sequences",
                        config.labels.size(), fmt::join(config.labels, ", "));
  }
  if (config.condition)
    card += fmt::format("Each recording has one of {} labels: {}.\n", config.labels.size(),
                        fmt::join(config.labels, ", "));
  card += fmt::format(
      "\n| | |\n|---|---|\n| network | {}{}, {} parameters |\n"
      "| made with | coil {} train |\n| data | {} |\n| training | {}, {} |\n",
      config.model_type == "coil" ? "" : "Mamba, ", network_text(config),
      with_commas(parameters(config)), COIL_VERSION, fmt::join(options.data, ", "),
      counted(facts.train_examples, "example"), counted(facts.train_bases, unit));
  if (audio)
    card += fmt::format("| audio | {} Hz, one channel, {} |\n", config.audio.rate,
                        config.audio.codes == SampleCodes::pcm16 ? "16 bits" : "8-bit mu-law");
  const bool validated = facts.held_out > 0;
  if (validated)
    card += fmt::format("| validation | {}: {}, {} |\n",
                        options.validation.empty()
                            ? fmt::format("{:g} of the data held out", options.validation_fraction)
                            : options.validation,
                        counted(facts.held_out, "example"), counted(facts.held_out_bases, unit));
  if (options.max_length > 0)
    card +=
        fmt::format("| windows | {} to {} {}s |\n", options.min_length, options.max_length, unit);
  card += fmt::format("| this model | step {} of {}, {} |\n", facts.best.step, facts.best.steps,
                      validated ? fmt::format("best validation {}", facts.metric)
                                : "the last; there was no validation set");
  if (m.count > 0 && language)
    card += fmt::format("| validation | {:.4f} bits per {} |\n",
                        facts.best.validation.bits_per_base, unit);
  if (m.count > 0 && !language)
    card += fmt::format("| validation | accuracy {:.4f}, MCC {:.4f}, AUROC {:.4f}, loss {:.4f} |\n",
                        m.accuracy, m.mcc, m.auroc, m.loss);
  if (validated)
    card +=
        "\nThe validation figures chose this model, so they flatter it: measure it with `coil eval`"
        " on data that took no part in training.\n";
  card += "\n## Options\n\n```json\n";
  json all = json::parse(to_json(options));
  if (!config.condition) all.erase("condition_dropout");
  card += all.dump(2);
  card += "\n```\n";
  return card;
}

}  // namespace coil
