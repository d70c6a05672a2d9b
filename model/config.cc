// config.json and labels.txt, read and written. Every key is checked: a wrong type, a size that
// cannot be and a key that would change the mathematics are refused by a line naming file, key,
// expected and found. Source of names and defaults: transformers' configuration_mamba.py and
// configuration_falcon_mamba.py.
#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string_view>
#include <utility>

#include "kernels/error.h"
#include "model/atomic_file.h"

namespace coil {
namespace {

using Json = nlohmann::json;
constexpr const char* kS4dInits[] = {"lin", "inv", "legs"};  // by S4dInit
using OrderedJson = nlohmann::ordered_json;

constexpr int64_t kMaxSize = (int64_t{1} << 31) - 1;  // of one dimension
constexpr int64_t kMaxLayers = 1 << 16;
constexpr int64_t kMaxParameters = int64_t{1} << 40;
constexpr int64_t kMaxBytes = 16 << 20;  // of config.json and labels.txt

std::string describe(const Json& value) {
  if (value.is_structured()) return fmt::format("an {}", value.type_name());
  std::string text = value.dump(-1, ' ', true);
  return text.size() <= 80 ? text : text.substr(0, 80) + "…";
}

// One JSON object whose messages name the file and the key in full.
class Reader {
 public:
  Reader(const Json& object, std::string where, std::string prefix = {})
      : object_(object), where_(std::move(where)), prefix_(std::move(prefix)) {}

  const Json* find(const char* key) const {
    auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }
  const Json& need(const char* key) const {
    const Json* value = find(key);
    check(value != nullptr, "{}: {}{} is missing", where_, prefix_, key);
    return *value;
  }
  [[noreturn]] void refuse(const char* key, const std::string& expected, const Json& found) const {
    fail("{}: {}{}: expected {}, found {}", where_, prefix_, key, expected, describe(found));
  }

  int64_t size(const char* key, int64_t low = 1, int64_t high = kMaxSize) const {
    const Json& value = need(key);
    // is_number_integer holds for unsigned too; one above 2^63 would turn negative and is refused
    // all the same.
    const int64_t size = value.is_number_integer() ? value.get<int64_t>() : low - 1;
    if (size < low || size > high)
      refuse(key, fmt::format("a whole number from {} to {}", low, high), value);
    return size;
  }
  int64_t size_or(const char* key, int64_t absent, int64_t low = 1, int64_t high = kMaxSize) const {
    return find(key) ? size(key, low, high) : absent;
  }
  bool flag_or(const char* key, bool absent) const {
    const Json* value = find(key);
    if (!value) return absent;
    if (!value->is_boolean()) refuse(key, "true or false", *value);
    return value->get<bool>();
  }
  // Above 0, and still so as f32.
  double positive_or(const char* key, double absent, double high = 1e6) const {
    const Json* value = find(key);
    if (!value) return absent;
    const double number = value->is_number() ? value->get<double>() : 0;
    if (!(number >= 1e-30 && number <= high))
      refuse(key, fmt::format("a number above 0, at most {}", high), *value);
    return number;
  }
  double share_or(const char* key, double absent) const {
    const Json* value = find(key);
    if (!value) return absent;
    const double number = value->is_number() ? value->get<double>() : -1;
    if (!(number >= 0 && number <= 1)) refuse(key, "a number from 0 to 1", *value);
    return number;
  }
  std::string one_of(const char* key, std::initializer_list<const char*> choices) const {
    const Json& value = need(key);
    std::string list;
    for (const char* choice : choices) {
      if (value.is_string() && value.get_ref<const std::string&>() == choice) return choice;
      list += fmt::format("{}\"{}\"", list.empty() ? "" : " or ", choice);
    }
    refuse(key, list, value);
  }
  std::string one_of_or(const char* key, const char* absent,
                        std::initializer_list<const char*> choices) const {
    return find(key) ? one_of(key, choices) : absent;
  }

 private:
  const Json& object_;
  std::string where_, prefix_;
};

void parse_sizes(const Reader& json, Config& config) {
  config.vocab = json.size("vocab_size");
  config.d = json.size("hidden_size");
  config.n = json.size_or("state_size", 16);
  config.w = json.size_or("conv_kernel", 4, 2);
  config.layers.assign(static_cast<size_t>(json.size("num_hidden_layers", 1, kMaxLayers)),
                       LayerConfig{});

  // A written intermediate_size wins over expand: falcon-mamba-7b says expand 16 and 8192 = 2 *
  // 4096.
  if (json.find("intermediate_size")) {
    config.e = json.size("intermediate_size");
  } else {
    const double e = std::floor(json.positive_or("expand", 2) * static_cast<double>(config.d));
    if (!(e >= 1 && e <= static_cast<double>(kMaxSize)))
      json.refuse("expand", fmt::format("expand * hidden_size from 1 to {}", kMaxSize),
                  json.need("expand"));
    config.e = static_cast<int64_t>(e);
  }
  const Json* rank = json.find("time_step_rank");
  const bool automatic =
      !rank || (rank->is_string() && rank->get_ref<const std::string&>() == "auto");
  config.dt_rank = automatic ? (config.d + 15) / 16 : json.size("time_step_rank");
}

// Sizes that are fine one by one may still multiply to what no machine holds.
void check_product(const Config& config, const std::string& where) {
  __int128 total = 0, v = config.vocab;
  const __int128 w = config.w, n = config.n, states = config.s4d_states;
  for (Config stage = config;; stage = inner_config(stage)) {
    const __int128 d = stage.d, e = stage.e, r = stage.dt_rank;
    const __int128 s4d = 2 * d * d + d * (4 * states + 5), mlp = 3 * stage.mlp * d * d + d;
    const __int128 layer = 3 * e * d + e * (w + r + n + 3) + (r + 2 * n) * e + 2 * e + 2 * d + s4d;
    total += (layer + mlp) * static_cast<__int128>(stage.layers.size()) + 2 * v * d + d;
    if (stage.inner.empty()) break;
    v = stage.inner[0].pool * d + d;  // of the products down and up
  }
  check(total <= kMaxParameters,
        "{}: vocab_size {}, hidden_size {}, intermediate_size {}, state_size {}, time_step_rank "
        "{}, conv_kernel {} and "
        "num_hidden_layers {} make {:.2g} parameters, expected at most {:.2g}",
        where, config.vocab, config.d, config.e, config.n, config.dt_rank, config.w,
        all_layers(config), static_cast<double>(total), static_cast<double>(kMaxParameters));
}

void parse_audio(const Json& value, const std::string& where, Config& config) {
  check(value.is_object(), "{}: coil.audio: expected an object, found {}", where, describe(value));
  const Reader json(value, where, "coil.audio.");
  config.audio.rate = json.size("rate", 1, 1 << 24);
  config.audio.codes =
      json.one_of("codes", {"mulaw", "pcm16"}) == "pcm16" ? SampleCodes::pcm16 : SampleCodes::mulaw;
  if (json.find("trim")) config.audio.trim = json.positive_or("trim", 0, 200);
  check(config.alphabet.empty(), "{}: coil: alphabet and audio: expected one of them", where);
}

// The begin token stands behind the codes.
void check_audio_vocabulary(const Config& config, const std::string& where) {
  if (config.audio.rate == 0) return;
  const int64_t needed = config.predicted() + 1;
  check(config.vocab >= needed, "{}: vocab_size: expected at least {} for its codes, found {}",
        where, needed, config.vocab);
}

// Layers of all stages, one after another.
std::vector<LayerConfig*> layers_of(Config& config) {
  std::vector<LayerConfig*> all;
  for (LayerConfig& layer : config.layers) all.push_back(&layer);
  for (Config::Stage& stage : config.inner)
    for (LayerConfig& layer : stage.layers) all.push_back(&layer);
  return all;
}

void parse_layers(const Json& list, const Reader& json, Config& config) {
  const std::vector<LayerConfig*> layers = layers_of(config);
  if (!list.is_array() || list.size() != layers.size())
    json.refuse("mixers", fmt::format("a list of {} names", layers.size()), list);
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string name = list[i].is_string() ? list[i].get<std::string>() : std::string();
    const std::optional<MixerKind> mixer = mixer_named(name);
    if (!mixer) json.refuse("mixers", "\"mamba1\" or \"s4d\"", list[i]);
    layers[i]->mixer = *mixer;
  }
}

// {"pool": [4, 4], "widths": [64, 128, 256], "layers": [8, 8, 8]}
void parse_unet(const Json& value, const std::string& where, Config& config) {
  check(value.is_object(), "{}: coil.unet: expected an object, found {}", where, describe(value));
  for (const auto& item : value.items())
    check(item.key() == "pool" || item.key() == "widths" || item.key() == "layers",
          "{}: coil.unet.{}: expected pool, widths or layers; the model needs a newer Coil", where,
          describe(Json(item.key())));
  const Reader json(value, where, "coil.unet.");
  const auto sizes = [&](const char* key, int64_t low, int64_t high, size_t count) {
    const Json& list = json.need(key);
    const bool fits = list.is_array() && (count == 0 ? !list.empty() && list.size() <= kMaxInner
                                                     : list.size() == count);
    const std::string expected = fmt::format(
        "a list of {} whole numbers from {} to {}",
        count == 0 ? fmt::format("1 to {}", kMaxInner) : std::to_string(count), low, high);
    if (!fits) json.refuse(key, expected, list);
    std::vector<int64_t> all;
    for (const Json& entry : list) {
      const int64_t size = entry.is_number_integer() ? entry.get<int64_t>() : low - 1;
      if (size < low || size > high) json.refuse(key, expected, entry);
      all.push_back(size);
    }
    return all;
  };
  const std::vector<int64_t> pool = sizes("pool", 2, kMaxPool, 0);
  const std::vector<int64_t> widths = sizes("widths", 1, kMaxStageWidth, pool.size() + 1);
  const std::vector<int64_t> layers = sizes("layers", 1, kMaxLayers, pool.size() + 1);
  if (widths[0] != config.d)
    json.refuse("widths", fmt::format("hidden_size, {}, as the first", config.d),
                value["widths"][0]);
  int64_t total = 0;
  for (const int64_t count : layers) total += count;
  check(total == static_cast<int64_t>(config.layers.size()),
        "{}: coil.unet.layers: expected num_hidden_layers, {}, in all, found {}", where,
        config.layers.size(), total);
  config.layers.resize(static_cast<size_t>(layers[0]));
  for (size_t i = 0; i < pool.size(); ++i)
    config.inner.push_back(
        {.pool = pool[i],
         .d = widths[i + 1],
         .layers = std::vector<LayerConfig>(static_cast<size_t>(layers[i + 1]))});
}

void parse_s4d(const Json& value, const std::string& where, Config& config) {
  check(value.is_object(), "{}: coil.s4d: expected an object, found {}", where, describe(value));
  for (const auto& item : value.items())
    check(item.key() == "states" || item.key() == "init",
          "{}: coil.s4d.{}: expected states or init; the model needs a newer Coil", where,
          describe(Json(item.key())));
  const Reader json(value, where, "coil.s4d.");
  config.s4d_states = json.size_or("states", 32);
  config.s4d_init = parse_s4d_init(json.one_of_or("init", "lin", {"lin", "inv", "legs"}));
}

void parse_alphabet(const Reader& json, const std::string& where, Config& config) {
  const Json* alphabet = json.find("alphabet");
  if (!alphabet) return;
  if (!alphabet->is_string()) json.refuse("alphabet", "\"dna\" or letters", *alphabet);
  config.alphabet = alphabet->get<std::string>();
  if (!config.letters()) return;
  const std::string fault = alphabet_fault(config.alphabet);
  check(fault.empty(), "{}: coil.alphabet: {}", where, fault);
  check(config.vocab >= std::ssize(config.alphabet),
        "{}: vocab_size: expected at least {} for its letters, found {}", where,
        config.alphabet.size(), config.vocab);
}

void parse_unknown(const Reader& json, const std::string& where, Config& config) {
  config.unknown_excerpt = json.size_or("unknown_excerpt", 0, 0, Config::kMaxExcerpt);
  if (config.unknown_excerpt > 0 && config.alphabet != "dna")
    json.refuse("unknown_excerpt", "none but of DNA", *json.find("unknown_excerpt"));
  const Json* unknown = json.find("unknown");
  if (!unknown) return;
  if (!unknown->is_array())
    json.refuse("unknown", "a list of {\"length\", \"probability\"}", *unknown);
  for (size_t i = 0; i < unknown->size(); ++i) {
    const Json& entry = (*unknown)[i];
    const std::string name = fmt::format("coil.unknown[{}]", i);
    check(entry.is_object(), "{}: {}: expected an object, found {}", where, name, describe(entry));
    for (const auto& item : entry.items())
      check(item.key() == "length" || item.key() == "probability" || item.key() == "by_class",
            "{}: {}.{}: expected one of length, probability, by_class", where, name,
            describe(Json(item.key())));
    const Reader row(entry, where, name + ".");
    const int64_t length = row.size("length", 0, int64_t{1} << 62);
    const Json& probability = row.need("probability");
    const double p = probability.is_number() ? probability.get<double>() : -1;
    if (!(p >= 0 && p <= 1)) row.refuse("probability", "a number from 0 to 1", probability);
    if (!config.unknown.empty() && length <= config.unknown.back().length)
      row.refuse("length", fmt::format("more than the {} before it", config.unknown.back().length),
                 entry["length"]);
    config.unknown.push_back({length, p});
    const Json* by_class = row.find("by_class");
    if (!by_class) continue;
    if (!by_class->is_array()) row.refuse("by_class", "a list of numbers", *by_class);
    for (const Json& of_class : *by_class) {
      const double value = of_class.is_number() ? of_class.get<double>() : -1;
      if (!(value >= 0 && value <= 1)) row.refuse("by_class", "numbers from 0 to 1", *by_class);
      config.unknown.back().by_class.push_back(value);
    }
  }
}

void parse_coil(const Json& value, const std::string& where, Config& config) {
  constexpr std::string_view known[] = {
      "objective",  "pooling",       "alphabet", "audio",         "condition", "condition_dropout",
      "unknown",    "mixers",        "s4d",      "topology",      "unet",      "mlp",
      "mask_share", "target_column", "kmer",     "bidirectional", "strands",   "unknown_excerpt"};
  check(value.is_object(), "{}: coil: expected an object, found {}", where, describe(value));
  for (const auto& item : value.items())
    check(std::ranges::count(known, item.key()) > 0,
          "{}: coil.{}: expected one of {}; the model needs a newer Coil", where,
          describe(Json(item.key())), fmt::join(known, ", "));
  const Reader json(value, where, "coil.");
  const std::string objective = json.one_of_or("objective", "lm", {"lm", "classify", "mlm"});
  config.objective = objective == "classify" ? Objective::classify
                     : objective == "mlm"    ? Objective::mlm
                                             : Objective::lm;
  config.pooling =
      json.one_of_or("pooling", "mean", {"mean", "last"}) == "last" ? Pooling::last : Pooling::mean;
  parse_alphabet(json, where, config);
  if (const Json* column = json.find("target_column")) {
    if (!column->is_string()) json.refuse("target_column", "a name", *column);
    config.target_column = column->get<std::string>();
  }
  config.mask_share = json.share_or("mask_share", 0.15);
  if (const Json* audio = json.find("audio")) parse_audio(*audio, where, config);
  config.condition = json.flag_or("condition", false);
  if (config.condition && (config.objective != Objective::lm || config.audio.rate == 0))
    json.refuse("condition", "false: only a language model of audio is given labels",
                *json.find("condition"));
  if (config.condition) config.condition_dropout = json.share_or("condition_dropout", 0);
  const Json* mixers = json.find("mixers");
  const bool own = config.model_type == "coil";
  if (mixers && !own) json.refuse("mixers", "none with model_type " + config.model_type, *mixers);
  for (const char* key : {"topology", "unet", "mlp", "bidirectional", "kmer"})
    if (const Json* found = json.find(key); found && !own)
      json.refuse(key, "none with model_type " + config.model_type, *found);
  const bool unet = json.one_of_or("topology", "stack", {"stack", "unet"}) == "unet";
  if (unet)
    parse_unet(json.need("unet"), where, config);
  else if (const Json* found = json.find("unet"))
    json.refuse("unet", "none with topology \"stack\"", *found);
  config.mlp = json.size_or("mlp", 0, 0, 64);
  if (own) parse_layers(json.need("mixers"), json, config);
  config.bidirectional = json.flag_or("bidirectional", false);
  config.kmer = json.size_or("kmer", 1, 1, Config::kMaxKmer);
  config.equivariant = json.one_of_or("strands", "", {"equivariant", ""}) == "equivariant";
  check_directions(config, where);
  if (const Json* s4d = json.find("s4d")) parse_s4d(*s4d, where, config);
  parse_unknown(json, where, config);
}

// Labels stand in tables: no tabs, no control characters, no empty or double names.
void check_label(const std::string& label, const std::set<std::string>& before,
                 const std::string& where, size_t line) {
  check(!label.empty(), "{}: line {}: expected a class name, found an empty line", where, line);
  for (unsigned char c : label)
    check(c >= 0x20 && c != 0x7f,
          "{}: line {}: expected a class name, found the control character {}", where, line,
          static_cast<int>(c));
  check(!before.contains(label), "{}: line {}: the class {} stands twice", where, line, label);
}

std::vector<std::string> parse_labels(const std::string& text, const std::string& where) {
  std::vector<std::string> labels;
  std::set<std::string> seen;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    check_label(line, seen, where, labels.size() + 1);
    seen.insert(line);
    labels.push_back(std::move(line));
  }
  check(!labels.empty(), "{}: expected a class name per line, found none", where);
  return labels;
}

}  // namespace

const char* name_of(Objective objective) {
  constexpr const char* kNames[] = {"lm", "classify", "mlm"};  // by Objective
  return kNames[static_cast<int>(objective)];
}

std::string alphabet_fault(const std::string& letters) {
  constexpr std::string_view kReserved = ".,\"'";  // not counted; what separates and quotes
  if (letters.size() < 2) return fmt::format("expected two letters or more, found '{}'", letters);
  for (size_t i = 0; i < letters.size(); ++i) {
    const char letter = letters[i];
    if (letter <= ' ' || letter > '~')
      return fmt::format("letter {} is the byte 0x{:02x}, expected a printable ASCII letter", i + 1,
                         static_cast<unsigned char>(letter));
    if (kReserved.find(letter) != kReserved.npos)
      return fmt::format("'{}' is no letter that a table can hold", letter);
    if (letters.find(letter) != i) return fmt::format("letter '{}' stands twice", letter);
  }
  return {};
}

const char* name_of(S4dInit init) { return kS4dInits[static_cast<int>(init)]; }

S4dInit parse_s4d_init(const std::string& name) {
  const auto found = std::ranges::find(kS4dInits, name);
  check(found != std::end(kS4dInits), "s4d init '{}': expected lin, inv or legs", name);
  return static_cast<S4dInit>(found - kS4dInits);
}

void check_directions(const Config& config, const std::string& where) {
  if (config.bidirectional) {
    const bool mamba = std::ranges::all_of(
        config.layers, [](const LayerConfig& layer) { return layer.mixer == MixerKind::mamba1; });
    check(mamba && config.inner.empty(), "{}: bidirectional: expected a stack of mamba1, found {}",
          where, config.inner.empty() ? mixer_names(config) : "a U-Net");
    check(config.objective != Objective::lm,
          "{}: bidirectional: a causal language model would see what it predicts; expected "
          "objective mlm or classify",
          where);
  }
  if (config.kmer > 1) {
    const int64_t rows = Config::dna_vocabulary(config.kmer);
    check(config.alphabet == "dna" && config.vocab == rows,
          "{}: kmer {}: expected alphabet dna and vocab_size {}, found '{}' and {}", where,
          config.kmer, rows, config.alphabet, config.vocab);
    check(!config.tie, "{}: kmer: expected tie_word_embeddings false: k-mers are read, not put out",
          where);
  }
  if (!config.equivariant) return;
  check(config.inner.empty(), "{}: strands equivariant: expected a stack, found a U-Net", where);
  check(config.audio.rate == 0, "{}: strands: audio has none", where);
  check(config.objective == Objective::classify,
        "{}: strands equivariant: expected objective classify, found {}", where,
        name_of(config.objective));
}

Config parse_config(const std::string& text, const std::string& where) {
  Json root;
  try {
    root = Json::parse(text);
  } catch (const Json::parse_error& error) {
    fail("{}: expected JSON, found something else at byte {}", where, error.byte);
  } catch (const Json::exception&) {
    fail("{}: expected JSON, found a number that does not fit", where);
  }
  check(root.is_object(), "{}: expected a JSON object, found {}", where, describe(root));
  const Reader json(root, where);

  Config config;
  config.model_type = json.one_of("model_type", {"mamba", "falcon_mamba", "coil"});
  config.mixer_norms = config.model_type == "falcon_mamba";
  parse_sizes(json, config);
  config.eps = static_cast<float>(json.positive_or("layer_norm_epsilon", 1e-5));
  config.mixer_eps = static_cast<float>(json.positive_or("mixer_rms_eps", 1e-6));
  config.bias = json.flag_or("use_bias", false);
  config.conv_bias = json.flag_or("use_conv_bias", true);
  config.tie = json.flag_or("tie_word_embeddings", true);
  config.dt_min = static_cast<float>(json.positive_or("time_step_min", 1e-3));
  config.dt_max = static_cast<float>(json.positive_or("time_step_max", 0.1));
  config.dt_floor = static_cast<float>(json.positive_or("time_step_floor", 1e-4));
  if (config.dt_min > config.dt_max)
    json.refuse("time_step_min", fmt::format("at most time_step_max, {}", config.dt_max),
                json.need("time_step_min"));

  // What would change the mathematics. (residual_in_fp32 does not: Coil's residual stream is always
  // f32.)
  json.one_of_or("hidden_act", "silu", {"silu", "swish"});
  if (const Json* quantized = json.find("quantization_config"))
    json.refuse("quantization_config", "none: quantized weights are not supported", *quantized);

  if (const Json* coil = json.find("coil"))
    parse_coil(*coil, where, config);
  else
    check(config.model_type != "coil", "{}: coil is missing", where);
  check_product(config, where);
  check_audio_vocabulary(config, where);
  return config;
}

std::string to_json(const Config& config) {
  const bool lm = config.objective == Objective::lm;
  const bool falcon = config.model_type == "falcon_mamba";
  // Floats through their shortest decimal form: 1e-05, not 9.999999747378752e-06.
  auto number = [](float value) { return std::stod(fmt::format("{}", value)); };
  OrderedJson json;
  const bool own = config.model_type == "coil";
  if (!own)
    json["architectures"] = {std::string(falcon ? "FalconMamba" : "Mamba") +
                             (lm ? "ForCausalLM" : "Model")};
  json["model_type"] = config.model_type;
  json["vocab_size"] = config.vocab;
  json["hidden_size"] = config.d;
  json["intermediate_size"] = config.e;
  if (config.e % config.d == 0) json["expand"] = config.e / config.d;
  json["state_size"] = config.n;
  json["conv_kernel"] = config.w;
  json["time_step_rank"] = config.dt_rank;
  json["num_hidden_layers"] = all_layers(config);
  json["layer_norm_epsilon"] = number(config.eps);
  if (falcon) json["mixer_rms_eps"] = number(config.mixer_eps);
  json["use_bias"] = config.bias;
  json["use_conv_bias"] = config.conv_bias;
  json["tie_word_embeddings"] = config.tie;
  json["hidden_act"] = "silu";
  json["residual_in_fp32"] = true;
  json["time_step_min"] = number(config.dt_min);
  json["time_step_max"] = number(config.dt_max);
  json["time_step_floor"] = number(config.dt_floor);
  json["bos_token_id"] = 0;
  json["eos_token_id"] = 0;
  json["pad_token_id"] = 0;
  json["dtype"] = "float32";
  OrderedJson coil;
  if (own) {
    if (!config.inner.empty()) {
      coil["topology"] = "unet";
      OrderedJson& unet = coil["unet"];
      for (const Config::Stage& stage : config.inner) unet["pool"].push_back(stage.pool);
      unet["widths"].push_back(config.d);
      unet["layers"].push_back(config.layers.size());
      for (const Config::Stage& stage : config.inner) {
        unet["widths"].push_back(stage.d);
        unet["layers"].push_back(stage.layers.size());
      }
    }
    if (config.mlp > 0) coil["mlp"] = config.mlp;
    for (const LayerConfig* layer : layers_of(const_cast<Config&>(config)))
      coil["mixers"].push_back(name_of(layer->mixer));
    coil["s4d"] = {{"states", config.s4d_states}, {"init", name_of(config.s4d_init)}};
  }
  if (config.bidirectional) coil["bidirectional"] = true;
  if (config.kmer > 1) coil["kmer"] = config.kmer;
  if (config.equivariant) coil["strands"] = "equivariant";
  coil["objective"] = name_of(config.objective);
  if (config.objective == Objective::classify)
    coil["pooling"] = config.pooling == Pooling::last ? "last" : "mean";
  if (config.objective == Objective::mlm) {
    if (config.target_column.empty())
      coil["mask_share"] = config.mask_share;
    else
      coil["target_column"] = config.target_column;
  }
  if (!config.alphabet.empty()) coil["alphabet"] = config.alphabet;
  if (config.audio.rate > 0) {
    coil["audio"]["rate"] = config.audio.rate;
    coil["audio"]["codes"] = config.audio.codes == SampleCodes::pcm16 ? "pcm16" : "mulaw";
    if (config.audio.trim > 0) coil["audio"]["trim"] = config.audio.trim;
  }
  if (config.condition) coil["condition"] = true;
  if (config.condition_dropout > 0) coil["condition_dropout"] = config.condition_dropout;
  for (const Config::Threshold& threshold : config.unknown) {
    nlohmann::ordered_json row{{"length", threshold.length},
                               {"probability", threshold.probability}};
    if (!threshold.by_class.empty()) row["by_class"] = threshold.by_class;
    coil["unknown"].push_back(row);
  }
  if (config.unknown_excerpt > 0) coil["unknown_excerpt"] = config.unknown_excerpt;
  json["coil"] = coil;
  return json.dump(2) + "\n";
}

Config read_config(const std::string& folder) {
  const std::string path = folder + "/config.json";
  Config config = parse_config(read_file(path, kMaxBytes), path);
  const std::string labels = folder + "/labels.txt";
  if (config.objective == Objective::classify || config.condition)
    config.labels = parse_labels(read_file(labels, kMaxBytes), labels);
  for (const Config::Threshold& threshold : config.unknown) {
    check(threshold.by_class.empty() || threshold.by_class.size() == config.labels.size(),
          "{}: coil.unknown of length {}: expected by_class for {} labels, found {}", path,
          threshold.length, config.labels.size(), threshold.by_class.size());
  }
  check_audio_vocabulary(config, path);
  return config;
}

void write_config(const Config& config, const std::string& folder) {
  const std::string labels = folder + "/labels.txt";
  if (config.objective == Objective::classify || config.condition) {
    std::string text;
    std::set<std::string> seen;
    for (const std::string& label : config.labels) {
      check_label(label, seen, labels, seen.size() + 1);
      seen.insert(label);
      text += label + "\n";
    }
    write_file_atomically(labels, text);
  }
  write_file_atomically(folder + "/config.json", to_json(config));
}

}  // namespace coil
