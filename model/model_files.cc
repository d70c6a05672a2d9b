// A model folder: config.json, model.safetensors or its shards, labels.txt. Every tensor is checked
// by name, shape and finite values before a model is handed out.
#include <cmath>
#include <filesystem>
#include <list>
#include <optional>
#include <set>

#include "kernels/error.h"
#include "model/head.h"
#include "model/safetensors.h"

namespace coil {
namespace {

constexpr const char* kEmbedding = "backbone.embeddings.weight";
constexpr const char* kOldEmbedding = "backbone.embedding.weight";  // state-spaces/mamba
constexpr const char* kHead = "lm_head.weight";

// The name under which a file holds a parameter; none: it does not.
std::optional<std::string> name_in(const SafetensorsReader& reader, const std::string& name) {
  if (reader.has(name)) return name;
  if (name == kEmbedding && reader.has(kOldEmbedding)) return kOldEmbedding;
  return std::nullopt;
}

std::vector<float> read_finite(const SafetensorsReader& reader, const std::string& name,
                               const std::string& folder) {
  std::vector<float> values = reader.read_f32(name);
  for (size_t i = 0; i < values.size(); ++i)
    check(std::isfinite(values[i]), "{}: tensor {}: element {}: expected a finite number, found {}",
          folder, name, i, values[i]);
  return values;
}

void set_values(Backend& backend, const Param& param, std::vector<float>& values) {
  View from = param.tensor->view();  // same shape, other memory
  from.data = values.data();
  from.dtype = DType::f32;
  from.device = Device{};
  backend.copy(from, *param.tensor);
  backend.sync();
}

// A tied model may still bring lm_head.weight, as torch.save of the original code does: then it
// must be the embedding.
void check_tied_head(const SafetensorsReader& reader, const std::string& folder) {
  const auto embedding = name_in(reader, kEmbedding);
  if (!embedding || !reader.has(kHead)) return;
  check(reader.read_f32(kHead) == reader.read_f32(*embedding),
        "{}: tensor {}: expected the values of {} (tie_word_embeddings is true), found others",
        folder, kHead, *embedding);
}

}  // namespace

Model load_model(Backend& backend, const std::string& folder, DType matrices) {
  COIL_ASSERT(matrices == DType::f32 || matrices == DType::bf16);
  Model model;
  model.config = read_config(folder);
  const SafetensorsReader reader(folder);
  std::set<std::string> taken;
  for (const Param& param : declare(model)) {
    const auto name = name_in(reader, param.info.name);
    check(name.has_value(), "{}: tensor {} is missing", folder, param.info.name);
    const FileTensor& found = reader.info(*name);
    check(found.shape == param.info.shape, "{}: tensor {}: expected shape {}, found {}", folder,
          *name, shape_text(param.info.shape), shape_text(found.shape));
    std::vector<float> values = read_finite(reader, *name, folder);
    allocate(backend, param, param.info.matrix ? matrices : DType::f32);
    set_values(backend, param, values);
    taken.insert(*name);
  }
  if (model.config.language() && model.config.tie) {
    check_tied_head(reader, folder);
    taken.insert(kHead);
  }
  for (const std::string& name : reader.names())
    check(taken.contains(name), "{}: tensor {}: expected no such tensor in a model of type {}",
          folder, name, model.config.model_type);
  return model;
}

void save_model(Backend& backend, const Model& model, const std::string& folder,
                int64_t shard_bytes) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  check(!error, "{}: cannot be made a folder: {}", folder, error.message());
  std::list<std::vector<std::byte>> kept;  // host copies, where the model is on a device
  std::vector<NamedView> tensors;
  for (const Param& param :
       declare(const_cast<Model&>(model)))  // declare hands out mutable tensors; only read here
    tensors.push_back(
        {param.info.name, on_host(backend, param.tensor->view(), kept.emplace_back())});
  write_config(model.config, folder);
  write_sharded(folder, tensors, shard_bytes);
}

std::vector<std::string> load_matching(Backend& backend, Model& model, const std::string& folder) {
  const Config other = read_config(folder);
  const Config& own = model.config;
  check(other.mixer_norms == own.mixer_norms && other.conv_bias == own.conv_bias &&
            other.bias == own.bias,
        "{}: expected model_type {}, use_conv_bias {} and use_bias {}, found {}, {} and {}", folder,
        own.model_type, own.conv_bias, own.bias, other.model_type, other.conv_bias, other.bias);
  const bool same_head = other.objective == own.objective && other.labels == own.labels;
  const SafetensorsReader reader(folder);
  std::vector<std::string> taken;
  for (const Param& param : declare(model)) {
    const bool head =  // or an embedding of labels
        !param.info.name.starts_with("backbone.") || param.tensor == &model.labels;
    const auto name = name_in(reader, param.info.name);
    if (!name || (head && !same_head) || reader.info(*name).shape != param.info.shape) continue;
    std::vector<float> values = read_finite(reader, *name, folder);
    set_values(backend, param, values);
    taken.push_back(param.info.name);
  }
  check(!taken.empty(), "{}: no tensor of the same name and shape as in the new model", folder);
  return taken;
}

}  // namespace coil
