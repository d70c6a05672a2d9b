// coil info MODEL: what the network is, its tensors, and a memory plan for a length, batch and
// chunk.
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "apps/command.h"
#include "apps/models.h"
#include "kernels/error.h"
#include "model/memory_plan.h"
#include "model/safetensors.h"
#include "pipelines/run_log.h"
#include "pipelines/stream.h"
#include "pipelines/train.h"

namespace coil {
namespace {

namespace po = boost::program_options;
using Json = nlohmann::ordered_json;

struct InfoOptions {
  std::string model;
  Size length{1'000'000}, batch{1}, chunk{0};
  bool train = false, json = false;
  CommonOptions common;
};

po::options_description describe(InfoOptions& options) {
  po::options_description text("Options");
  text.add_options()  //
      ("model", po::value(&options.model)->value_name("MODEL"),
       "a model folder, Coil's or Hugging Face's, or the name of a shipped model such as "
       "species")                                                                 //
      ("length", option(options.length, "SIZE"), "bases or steps of a sequence")  //
      ("batch", option(options.batch, "COUNT"), "sequences at once")              //
      ("chunk", option(options.chunk, "SIZE"),
       "bases of a sequence at a time; 0: as classify and score choose, in training all")   //
      ("train", po::bool_switch(&options.train), "plan for training instead of inference")  //
      ("json", po::bool_switch(&options.json), "JSON instead of text");
  text.add(describe(options.common));
  return text;
}

std::string bytes_text(int64_t bytes) {
  const double value = static_cast<double>(bytes);
  if (value < 1e3) return fmt::format("{} B", bytes);
  if (value < 1e6) return fmt::format("{:.1f} kB", value / 1e3);
  if (value < 1e9) return fmt::format("{:.1f} MB", value / 1e6);
  return fmt::format("{:.1f} GB", value / 1e9);
}

// Tensors that differ only in the layer's number are one group: backbone.layers.*.mixer.D.
std::string group_of(const std::string& name) {
  const std::string layers = ".layers.";
  const size_t found = name.find(layers);
  if (found == name.npos) return name;
  const size_t number = found + layers.size();
  return name.substr(0, number) + "*" + name.substr(std::min(name.size(), name.find('.', number)));
}

struct Group {
  std::string name, shape, type;
  int64_t tensors = 0, parameters = 0, bytes = 0;
};

int64_t count_of(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

std::vector<Group> group_tensors(const std::vector<Param>& params,
                                 const SafetensorsReader& reader) {
  std::vector<Group> groups;
  std::map<std::string, size_t> places;
  for (const Param& param : params) {
    // A folder of the original code names its embedding otherwise; its loader says what is missing.
    const std::string type =
        reader.has(param.info.name) ? name_of(reader.info(param.info.name).type) : "absent";
    const std::string name = group_of(param.info.name);
    const auto [place, fresh] = places.try_emplace(name, groups.size());
    if (fresh)
      groups.push_back({.name = name, .shape = shape_text(param.info.shape), .type = type});
    Group& group = groups[place->second];
    if (group.type != type) group.type = "mixed";
    ++group.tensors;
    const int64_t count = count_of(param.info.shape);
    group.parameters += count;
    if (reader.has(param.info.name))
      group.bytes += count * size_of(reader.info(param.info.name).type);
  }
  return groups;
}

std::string objective_text(const Config& config) {
  if (config.objective == Objective::lm)
    return fmt::format("language model, {} head", config.tie ? "tied" : "untied");
  if (config.objective == Objective::mlm) {
    const std::string what =
        config.target_column.empty()
            ? fmt::format("masked language model, {:g} % masked", 100 * config.mask_share)
            : fmt::format("tells column '{}'", config.target_column);
    return fmt::format("{}, {} head", what, config.tie ? "tied" : "untied");
  }
  return fmt::format("classifier of {} classes, {} pooling", config.labels.size(),
                     config.pooling == Pooling::mean ? "mean" : "last");
}

std::string front_end_text(const Config& config) {
  if (config.letters()) return fmt::format(" · letters {}", config.alphabet);
  if (config.audio.rate == 0) {
    std::string text = config.alphabet.empty() ? "" : " · " + config.alphabet;
    if (config.kmer > 1) text += fmt::format(" by {}-mers", config.kmer);
    if (config.bidirectional) text += ", from both ends";
    if (config.equivariant) text += ", both strands as one";
    return text;
  }
  std::string text = fmt::format(
      " · audio at {} Hz, {}", with_commas(config.audio.rate),
      config.audio.codes == SampleCodes::pcm16 ? "16 bits, 2 steps a sample" : "8-bit mu-law");
  if (config.audio.trim > 0) text += fmt::format(", trimmed at -{:g} dB", config.audio.trim);
  return text +
         (config.condition ? fmt::format(", given one of {} labels", config.labels.size()) : "");
}

std::string sizes_text(const Config& config) {
  if (!config.inner.empty())
    return fmt::format("{} · e {} · s4d states {} · conv {} · vocabulary {}", network_text(config),
                       config.e, config.s4d_states, config.w, config.vocab);
  if (config.model_type == "coil")
    return fmt::format("{} · d {} · e {} · n {} · s4d states {} · conv {} · vocabulary {} · {}",
                       counted(static_cast<int64_t>(config.layers.size()), "layer"), config.d,
                       config.e, config.n, config.s4d_states, config.w, config.vocab,
                       mixer_names(config.layers));
  return fmt::format("{} · d {} · e {} · n {} · conv {} · dt rank {} · vocabulary {}",
                     counted(static_cast<int64_t>(config.layers.size()), "layer"), config.d,
                     config.e, config.n, config.w, config.dt_rank, config.vocab);
}

MemoryRequest request_of(const InfoOptions& options, const Config& config) {
  const Device device = device_of(options.common);
  int64_t chunk = options.chunk, sequences = options.batch;
  if (!options.train && chunk == 0) chunk = auto_batch(config, device);
  if (options.train && options.length > 0) {  // a larger batch is computed in parts
    const int64_t most = training_rows(device);
    sequences =
        std::clamp<int64_t>((chunk > 0 ? std::min<int64_t>(most, chunk) : most) / options.length,
                            std::min<int64_t>(1, sequences), sequences);
  }
  return {.length = options.length,
          .sequences = sequences,
          .chunk = chunk,
          .matrices = matrix_dtype(options.common),
          .train = options.train,
          .device = device};
}
// Of a sequence at once.
int64_t steps_of(const MemoryRequest& request) {
  return request.chunk > 0 ? std::min(request.chunk, request.length) : request.length;
}

// "below 0.750", of thresholds by class "below 0.270 to 0.992".
std::string threshold_text(const Config::Threshold& threshold) {
  if (threshold.by_class.empty()) return fmt::format("below {:.3f}", threshold.probability);
  const auto [low, high] = std::ranges::minmax(threshold.by_class);
  return fmt::format("below {:.3f} to {:.3f}, by class,", low, high);
}

std::string text_of(const InfoOptions& options, const Config& config,
                    const SafetensorsReader& reader, const std::vector<Group>& groups,
                    const MemoryRequest& request, const MemoryPlan& plan) {
  std::string text = fmt::format("model    {} · {}{}\nnetwork  {}\nfiles    {}\n",
                                 config.model_type, objective_text(config), front_end_text(config),
                                 sizes_text(config), fmt::join(reader.files(), " "));
  if (!config.labels.empty()) text += fmt::format("labels   {}\n", fmt::join(config.labels, ", "));
  const std::string excerpts =
      config.unknown_excerpt > 0
          ? fmt::format(", of excerpts of {}", with_commas(config.unknown_excerpt))
          : "";
  for (const Config::Threshold& threshold : config.unknown)
    text += fmt::format("unknown  {} at {} bases{}\n", threshold_text(threshold),
                        with_commas(threshold.length), excerpts);

  size_t width = 6, shape = 5;
  for (const Group& group : groups) {
    width = std::max(width, group.name.size());
    shape = std::max(shape, group.shape.size());
  }
  const auto row = [&](const auto& name, const auto& size, const auto& type, const auto& tensors,
                       const auto& count, const auto& bytes) {
    text += fmt::format("{:<{}}  {:<{}}  {:<6}  {:>7}  {:>13}  {:>9}\n", name, width, size, shape,
                        type, tensors, count, bytes);
  };
  text += '\n';
  row("tensor", "shape", "type", "tensors", "parameters", "bytes");
  Group total{.name = "total", .shape = "", .type = ""};
  for (const Group& group : groups) {
    row(group.name, group.shape, group.type, group.tensors, with_commas(group.parameters),
        bytes_text(group.bytes));
    total.tensors += group.tensors;
    total.parameters += group.parameters;
    total.bytes += group.bytes;
  }
  row(total.name, "", "", total.tensors, with_commas(total.parameters), bytes_text(total.bytes));

  const std::string of =
      fmt::format("{} × {} {}", with_commas(options.batch), with_commas(request.length),
                  config.audio.rate == 0                     ? "bases"
                  : config.audio.codes == SampleCodes::pcm16 ? "steps"
                                                             : "samples");
  const auto line = [&](const char* name, int64_t bytes, const std::string& note) {
    text += fmt::format("{:<12}  {:>9}  {}\n", name, bytes_text(bytes), note);
  };
  if (request.train) {
    const bool longer = steps_of(request) < request.length;
    const bool by_layer = longer && config.trains_whole(), cut = longer && !by_layer;
    text += fmt::format("\nmemory to train on {}{}\n", of,
                        cut        ? fmt::format(", {} at a time", with_commas(plan.chunk))
                        : by_layer ? std::string(", layer by layer")
                                   : std::string());
    line("weights", plan.weights, "f32");
    line("gradients", plan.gradients, "f32");
    line("moments", plan.moments, "f32, two of AdamW");
    if (plan.copy > 0) line("copy", plan.copy, "of the weights, matrices bf16");
    if (cut)
      line("states", plan.state,
           fmt::format("of {} of a sequence, behind each{}",
                       counted((request.length - 1) / plan.chunk, "chunk"),
                       plan.tile > 0 ? ", before tiles of the last" : ""));
    line("activations", plan.activations,
         cut ? "grow with chunk, not with length"
         : request.sequences == options.batch
             ? "grow with batch × length"
             : fmt::format("grow with length, of {} at a time",
                           counted(request.sequences, "sequence")));
  } else {
    const bool whole = config.bidirectional;
    text +=
        fmt::format("\nmemory to read {}, {}\n", of,
                    whole ? "whole" : fmt::format("{} at a time", with_commas(steps_of(request))));
    line("weights", plan.weights, request.matrices == DType::bf16 ? "matrices bf16" : "f32");
    if (!whole)
      line("state", plan.state,
           fmt::format("{} a sequence, whatever its length",
                       bytes_text(plan.state / request.sequences)));
    line("activations", plan.activations,
         whole ? "grow with batch × length" : "grow with batch × chunk, not with length");
  }
  if (plan.workspace > 0) line("workspace", plan.workspace, "of matrix products");
  line("total", plan.total(), "besides program, libraries and input buffers");
  return text;
}

std::string json_of(const InfoOptions& options, const Config& config,
                    const SafetensorsReader& reader, const std::vector<Param>& params,
                    const MemoryRequest& request, const MemoryPlan& plan) {
  Json json;
  json["model_type"] = config.model_type;
  json["objective"] = name_of(config.objective);
  json["alphabet"] = config.alphabet;
  if (config.kmer > 1) json["kmer"] = config.kmer;
  if (config.bidirectional) json["bidirectional"] = true;
  if (config.equivariant) json["strands"] = "equivariant";
  if (config.objective == Objective::mlm && config.target_column.empty())
    json["mask_share"] = config.mask_share;
  if (!config.target_column.empty()) json["target_column"] = config.target_column;
  if (config.audio.rate > 0) {
    json["audio"] = {{"rate", config.audio.rate},
                     {"codes", config.audio.codes == SampleCodes::pcm16 ? "pcm16" : "mulaw"},
                     {"trim", config.audio.trim},
                     {"condition", config.condition}};
  }
  if (config.objective == Objective::classify)
    json["pooling"] = config.pooling == Pooling::mean ? "mean" : "last";
  json["labels"] = config.labels;
  json["unknown"] = Json::array();
  for (const Config::Threshold& threshold : config.unknown) {
    json["unknown"].push_back(
        {{"length", threshold.length}, {"probability", threshold.probability}});
    if (!threshold.by_class.empty()) json["unknown"].back()["by_class"] = threshold.by_class;
  }
  if (config.unknown_excerpt > 0) json["unknown_excerpt"] = config.unknown_excerpt;
  json["network"] = {{"layers", all_layers(config)},
                     {"d", config.d},
                     {"e", config.e},
                     {"n", config.n},
                     {"conv", config.w},
                     {"dt_rank", config.dt_rank},
                     {"mixers", mixer_names(config)},
                     {"mlp", config.mlp},
                     {"vocabulary", config.vocab}};
  for (const Config::Stage& stage : config.inner)
    json["network"]["inner"].push_back(
        {{"pool", stage.pool}, {"d", stage.d}, {"layers", stage.layers.size()}});
  json["files"] = reader.files();
  json["parameters"] = parameters(config);
  for (const Param& param : params) {
    const bool present = reader.has(param.info.name);
    json["tensors"].push_back(
        {{"name", param.info.name},
         {"shape", param.info.shape},
         {"type", present ? Json(name_of(reader.info(param.info.name).type)) : Json(nullptr)}});
  }
  json["memory"] = {{"train", request.train},
                    {"length", request.length},
                    {"batch", options.batch.value},
                    {"at_once", request.sequences},
                    {"chunk", plan.chunk > 0 ? plan.chunk : steps_of(request)},
                    {"weights", plan.weights},
                    {"state", plan.state},
                    {"activations", plan.activations},
                    {"gradients", plan.gradients},
                    {"moments", plan.moments},
                    {"copy", plan.copy},
                    {"workspace", plan.workspace},
                    {"total", plan.total()}};
  return json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace

int run_info(int argc, char** argv) {
  InfoOptions options;
  po::variables_map values;
  const std::string text =
      "Prints what a model is: network, labels, tensors with their shapes, and the memory that "
      "reading or\n"
      "training on sequences of a length takes.";
  if (!parse(argc, argv, "info MODEL [--length 1M --batch 1 --chunk 4k] [--train] [--json]", text,
             describe(options), {"model"}, false, values))
    return 0;
  if (options.model.empty()) throw UsageError("no MODEL given", "usage: coil info MODEL [options]");
  options.model = find_model(options.model);

  Model model;
  model.config = read_config(options.model);
  const std::vector<Param> params = declare(model);
  const SafetensorsReader reader(options.model);
  const MemoryRequest request = request_of(options, model.config);
  const MemoryPlan plan = plan_memory(model.config, request);
  Output out("");
  out.write(options.json ? json_of(options, model.config, reader, params, request, plan)
                         : text_of(options, model.config, reader, group_tensors(params, reader),
                                   request, plan));
  out.close();
  return 0;
}

}  // namespace coil
