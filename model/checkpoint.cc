// What a kill can leave behind, and what is then read:
//   step-N.tmp/ half written        never read, removed by the next save
//   step-N/ whole, `latest` before  the checkpoint that latest names
//   step-N/ whole, no `latest`      the newest whole one (the very first save was cut short)
#include "model/checkpoint.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <list>
#include <nlohmann/json.hpp>
#include <optional>
#include <tuple>

#include "kernels/error.h"
#include "model/safetensors.h"

namespace coil {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr int kVersion = 1;
constexpr int64_t kMaxState = 16 << 20;
constexpr const char* kState = "state.json";
constexpr const char* kOptimizer = "optimizer";

// step-N, or step-N.R where step N was saved again while `latest` named the first.
struct StepFolder {
  int64_t step = 0, repeat = 0;
  std::string name;
  bool operator<(const StepFolder& other) const {
    return std::tie(step, repeat) < std::tie(other.step, other.repeat);
  }
};

std::string step_name(int64_t step, int64_t repeat) {
  return repeat == 0 ? fmt::format("step-{}", step) : fmt::format("step-{}.{}", step, repeat);
}

std::optional<StepFolder> parse_name(const std::string& name) {
  if (!name.starts_with("step-")) return std::nullopt;
  StepFolder found{.name = name};
  const char* end = name.data() + name.size();
  auto result = std::from_chars(name.data() + 5, end, found.step);
  if (result.ec == std::errc{} && result.ptr != end && *result.ptr == '.')
    result = std::from_chars(result.ptr + 1, end, found.repeat);
  if (result.ec != std::errc{} || step_name(found.step, found.repeat) != name) return std::nullopt;
  return found;
}

fs::path training_folder(const std::string& folder) { return fs::path(folder) / "train"; }

bool whole(const fs::path& path) { return fs::exists(path / kState); }

std::vector<StepFolder> whole_steps(const fs::path& train) {  // oldest first
  std::vector<StepFolder> steps;
  if (!fs::is_directory(train)) return steps;
  for (const auto& entry : fs::directory_iterator(train))
    if (auto step = parse_name(entry.path().filename().string()); step && whole(entry.path()))
      steps.push_back(*step);
  std::sort(steps.begin(), steps.end());
  return steps;
}

// The checkpoint to read: what `latest` names, else the newest whole one, else none.
std::optional<StepFolder> current(const fs::path& train) {
  const fs::path latest = train / "latest";
  if (fs::exists(latest)) {
    std::string name = read_file(latest.string(), 256);
    while (!name.empty() && name.back() == '\n') name.pop_back();
    if (const auto step = parse_name(name); step && whole(train / name)) return step;
  }
  const auto steps = whole_steps(train);
  if (steps.empty()) return std::nullopt;
  return steps.back();
}

StepFolder current_or_fail(const fs::path& train) {
  const auto step = current(train);
  check(step.has_value(), "no checkpoint in '{}'", train.string());
  return *step;
}

// Under another name first, so that a removal cut short leaves nothing that looks whole.
void discard(const fs::path& path) {
  fs::path doomed = path;
  if (!path.string().ends_with(".tmp")) {
    doomed += ".old.tmp";
    fs::remove_all(doomed);
    fs::rename(path, doomed);
  }
  fs::remove_all(doomed);
}

void remove_leftovers(const fs::path& train) {
  std::vector<fs::path> leftovers;
  for (const auto& entry : fs::directory_iterator(train)) {
    const std::string name = entry.path().filename().string();
    const bool half = name.starts_with("step-") && name.ends_with(".tmp");
    if (half || (parse_name(name) && !whole(entry.path()))) leftovers.push_back(entry.path());
  }
  for (const fs::path& path : leftovers) discard(path);
}

// declare() hands out mutable tensors; saving only reads them.
std::vector<Param> declare_const(const Model& model) { return declare(const_cast<Model&>(model)); }

using HostCopies = std::list<std::vector<std::byte>>;  // where the model is on a device

void add_views(Backend& backend, std::vector<NamedView>& views, const Model& model,
               const std::string& prefix, HostCopies& copies) {
  for (const Param& param : declare_const(model))
    views.push_back(
        {prefix + param.info.name, on_host(backend, param.tensor->view(), copies.emplace_back())});
}

void load_tensors(Backend& backend, const SafetensorsReader& reader, Model& model,
                  const std::string& prefix, const std::string& path) {
  for (const Param& param : declare(model)) {
    const std::string name = prefix + param.info.name;
    const FileTensor& info = reader.info(name);
    check(info.shape == param.info.shape && info.type == FileType::F32,
          "'{}': tensor {}: expected {} F32, found {} {}", path, name, shape_text(param.info.shape),
          shape_text(info.shape), name_of(info.type));
    std::vector<float> values = reader.read_f32(name);
    View host = param.tensor->view();  // same shape, other memory
    host.data = values.data();
    host.device = Device{};
    backend.copy(host, *param.tensor);
  }
  backend.sync();
}

void check_count(const SafetensorsReader& reader, size_t expected, const std::string& path) {
  const size_t found = reader.names().size();
  check(found == expected, "'{}': holds {} tensors, the model needs {}", path, found, expected);
}

Checkpoint read_state(const fs::path& folder, int64_t& optimizer_steps) {
  const std::string path = (folder / kState).string();
  const Json json = Json::parse(read_file(path, kMaxState), nullptr, false);
  const auto is_count = [&](const char* key) {
    return json.contains(key) && json[key].is_number_unsigned();
  };
  const auto is_text = [&](const char* key) { return json.contains(key) && json[key].is_string(); };
  check(json.is_object() && is_count("version") && is_count("step") &&
            is_count("optimizer_steps") && is_text("options") && is_text("cursor"),
        "'{}': not the state of a checkpoint", path);
  check(json["version"] == kVersion,
        "'{}': version {} of the checkpoint format, this program reads {}", path,
        json["version"].get<uint64_t>(), kVersion);
  optimizer_steps = json["optimizer_steps"];
  return {.step = json["step"], .options = json["options"], .cursor = json["cursor"]};
}

}  // namespace

void save_checkpoint(Backend& backend, const std::string& folder, const Checkpoint& checkpoint,
                     const Model& model, const Optimizer& optimizer, int keep,
                     int64_t shard_bytes) try {
  COIL_ASSERT(keep >= 1);
  const fs::path train = training_folder(folder);
  fs::create_directories(train);
  remove_leftovers(train);

  const auto before = current(train);
  int64_t repeat = 0;
  if (before && before->name == step_name(checkpoint.step, 0)) repeat = 1;
  const fs::path target = train / step_name(checkpoint.step, repeat);
  fs::path partial = target;
  partial += ".tmp";
  fs::create_directory(partial);

  HostCopies copies;
  std::vector<NamedView> weights, moments;
  add_views(backend, weights, model, "", copies);
  add_views(backend, moments, optimizer.m, "m.", copies);
  add_views(backend, moments, optimizer.v, "v.", copies);
  write_sharded(partial.string(), weights, shard_bytes);
  write_sharded(partial.string(), moments, shard_bytes, kOptimizer);
  const Json state = {{"version", kVersion},
                      {"step", checkpoint.step},
                      {"optimizer_steps", optimizer.steps},
                      {"options", checkpoint.options},
                      {"cursor", checkpoint.cursor}};
  write_file_atomically((partial / kState).string(), state.dump(2) + "\n");

  if (fs::exists(target)) discard(target);  // whole, but `latest` never came to name it
  fs::rename(partial, target);
  sync_folder(train.string());
  write_file_atomically((train / "latest").string(), target.filename().string() + "\n");

  std::vector<StepFolder> steps = whole_steps(train);
  const auto newer = std::find_if(steps.begin(), steps.end(), [&](const StepFolder& step) {
    return step.name == target.filename();
  });
  for (auto step = std::next(newer); step != steps.end(); ++step) discard(train / step->name);
  const auto kept = std::min<std::ptrdiff_t>(keep, std::next(newer) - steps.begin());
  for (auto step = steps.begin(); step != std::next(newer) - kept; ++step)
    discard(train / step->name);
} catch (const fs::filesystem_error& error) {
  fail("cannot write a checkpoint: '{}': {}", error.path1().string(), error.code().message());
}

bool has_checkpoint(const std::string& folder) {
  return current(training_folder(folder)).has_value();
}

Checkpoint peek_checkpoint(const std::string& folder) {
  const fs::path train = training_folder(folder);
  int64_t optimizer_steps = 0;
  return read_state(train / current_or_fail(train).name, optimizer_steps);
}

Checkpoint load_checkpoint(Backend& backend, const std::string& folder, Model& model,
                           Optimizer& optimizer) {
  const fs::path train = training_folder(folder);
  const fs::path step = train / current_or_fail(train).name;
  int64_t optimizer_steps = 0;
  const Checkpoint checkpoint = read_state(step, optimizer_steps);
  const size_t count = declare(model).size();

  // In messages: the file, of shards the folder.
  const auto place = [&](const SafetensorsReader& reader) {
    return reader.files().size() == 1 ? reader.files()[0] : step.string();
  };
  const SafetensorsReader weight_reader(step.string());
  const std::string weights = place(weight_reader);
  check_count(weight_reader, count, weights);
  load_tensors(backend, weight_reader, model, "", weights);

  const SafetensorsReader moment_reader(step.string(), kOptimizer);
  const std::string moments = place(moment_reader);
  check_count(moment_reader, 2 * count, moments);
  load_tensors(backend, moment_reader, optimizer.m, "m.", moments);
  load_tensors(backend, moment_reader, optimizer.v, "v.", moments);
  optimizer.steps = optimizer_steps;
  return checkpoint;
}

void remove_checkpoints(const std::string& folder) try {
  const fs::path train = training_folder(folder);
  if (!fs::is_directory(train)) return;
  fs::remove(train / "latest");
  for (const StepFolder& step : whole_steps(train)) discard(train / step.name);
  remove_leftovers(train);
} catch (const fs::filesystem_error& error) {
  fail("cannot remove a checkpoint: '{}': {}", error.path1().string(), error.code().message());
}

}  // namespace coil
