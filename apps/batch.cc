// coil batch MODEL DATASET -o OUT.h5 and coil embed MODEL INPUT… -o OUT.h5: a model's answers as a
// file of results (pipelines/hdf5_results.h).
#include "pipelines/batch.h"

#include <unistd.h>

#include <charconv>
#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "apps/command.h"
#include "apps/dataset.h"
#include "apps/inputs.h"
#include "apps/models.h"
#include "apps/signals.h"
#include "kernels/error.h"
#include "pipelines/classify.h"
#include "pipelines/embed.h"
#include "pipelines/run_log.h"
#include "pipelines/score.h"

namespace coil {
namespace {

namespace po = boost::program_options;
using Json = nlohmann::ordered_json;

struct Options {
  CommonOptions common;
  EngineOptions engine{.strands = "both"};
  std::string model, dataset, out, task, pooling = "mean", split, shard = "1/1",
                                         min_probability = "auto";
  InputOptions input;  // embed
  LabelChoice labels;  // likewise, and --label
  Size window, stride, part{1'000'000};
  int64_t layer = 0;
  bool per_position = false, force = false;
};

void describe_vectors(po::options_description& text, Options& o) {
  text.add_options()                                                                        //
      ("pooling", option(o.pooling, "NAME"), "embed: mean | last: one vector of a record")  //
      ("per-position", po::bool_switch(&o.per_position),
       "score, embed: a number or a vector of every base or sample, forward strand")  //
      ("layer", option(o.layer, "COUNT"),
       "embed: the vectors behind so many layers, through the final norm; 0: all")  //
      ("window", po::value(&o.window)->value_name("SIZE"),
       "an answer for every window of so many bases or samples, each read on its own")  //
      ("stride", po::value(&o.stride)->value_name("SIZE"),
       "from the begin of a window to the next; default: the window");
}

Task parse_task(const std::string& text) {
  for (const Task task : {Task::classify, Task::score, Task::embed})
    if (text == name_of(task)) return task;
  throw UsageError(text.empty()
                       ? std::string("no --task given: expected classify, score or embed")
                       : fmt::format("--task '{}': expected classify, score or embed", text));
}

Pooling parse_pooling(const std::string& text) {
  if (text == "mean") return Pooling::mean;
  if (text == "last") return Pooling::last;
  throw UsageError(fmt::format("--pooling '{}': expected mean or last", text));
}

void parse_shard(const std::string& text, BatchWork& work) {
  constexpr int64_t kMost = 1'000'000;
  const char *const begin = text.data(), *const end = begin + text.size();
  const auto first = std::from_chars(begin, end, work.shard);
  const bool slash = first.ec == std::errc() && first.ptr != end && *first.ptr == '/';
  const auto second = std::from_chars(slash ? first.ptr + 1 : end, end, work.shards);
  if (!slash || second.ec != std::errc() || second.ptr != end || work.shard < 1 ||
      work.shard > work.shards || work.shards > kMost)
    throw UsageError(fmt::format("--shard '{}': expected i/n, 1/n to n/n", text));
}

// What both commands know of the work before the model is loaded.
BatchWork work_of(Options& o, const Config& config, Task task, const po::variables_map& values) {
  BatchWork work{.out = o.out, .task = task, .per_position = o.per_position};
  const bool lm = config.objective == Objective::lm;
  if (task == Task::classify) check_classifier(config, o.model);
  if (task == Task::score) check_language_model(config, o.model);
  check_front_end(config, o.model);
  if (task == Task::classify && o.per_position)
    throw UsageError("--per-position: classify gives one answer to a record or window");
  if (task != Task::embed && (!values["pooling"].defaulted() || o.layer != 0))
    throw UsageError("--pooling and --layer are for embed");
  if (o.per_position && !values["pooling"].defaulted())
    throw UsageError("--pooling does not go with --per-position");
  if (o.window == 0 && o.stride != 0) throw UsageError("--stride needs --window");
  if (config.audio.rate > 0)
    settle_strands(config, values["strands"].defaulted(), o.engine.strands);
  else if (values["strands"].defaulted() && (lm || o.per_position))
    o.engine.strands = "forward";  // as score reads them
  work.stream = o.engine.resolve(config);
  if (o.per_position && work.stream.strands != Strands::forward)
    throw UsageError("--per-position is of the forward strand");
  work.stream.window = o.window;
  work.stream.stride = o.stride;
  work.pooling = parse_pooling(o.pooling);
  const auto layers = static_cast<int64_t>(config.layers.size());
  if (o.layer < 0 || o.layer > layers)
    throw UsageError(fmt::format("--layer {}: expected 1 to {}, or 0 for all", o.layer, layers));
  work.layer = fmt::format("{} of {}", o.layer == 0 ? layers : o.layer, layers);
  work.part_size = o.part;
  if (work.part_size < 1) throw UsageError("--part-size: expected 1 or more");
  work.force = o.force;
  return work;
}

// Everything that has a say in the numbers.
Json manifest_of(const Options& o, const BatchWork& work, Device device) {
  Json model;
  for (const std::string& path : files_of_model(o.model)) {
    int64_t bytes = 0;
    model[std::filesystem::path(path).filename().string()] = hdf5::crc32_of_file(path, 0, bytes);
  }
  Json manifest{{"task", name_of(work.task)},
                {"model", model},
                {"strands", o.engine.strands},
                {"batch", work.stream.batch},
                {"chunk", work.stream.chunk},
                {"window", o.window.value},
                {"stride", o.stride.value},
                {"device", device.kind == Device::Kind::cpu ? "cpu" : "cuda"},
                {"precision", o.common.precision}};
  if (work.task == Task::classify) manifest["min_probability"] = o.min_probability;
  if (work.task != Task::classify) manifest["per_position"] = work.per_position;
  if (work.task == Task::embed) {
    manifest["layer"] = work.layer;
    if (!work.per_position) manifest["pooling"] = o.pooling;
  }
  if (!o.labels.label.empty()) manifest["label"] = o.labels.label;  // one of the model's
  return manifest;
}

void resolve_batch(BatchWork& work, const Config& config, Device device) {
  if (work.stream.batch <= 0) work.stream.batch = auto_batch(config, device);
  work.stream.note = nullptr;
}

Model loaded(Backend& backend, const Options& o) {
  Model model = load_model(backend, o.model, matrix_dtype(o.common));
  if (o.layer > 0) keep_layers(model, o.layer, o.model);
  return model;
}

void print_end(const std::string& out, const std::string& what) {
  fmt::print(stderr, "{}: {}\n", out, what);
}

// "coil batch: 12.3 of 100.0 M, 1.2 M/s, 1:13 left"
class Rate {
 public:
  void operator()(int64_t done, int64_t all) {
    const auto now = Clock::now();
    if (!terminal_ || now - last_ < std::chrono::milliseconds(500)) return;
    last_ = now;
    shown_ = true;
    const double seconds = std::chrono::duration<double>(now - begin_).count();
    const double rate = static_cast<double>(done) / seconds;
    const auto left = rate > 0 ? static_cast<int64_t>(static_cast<double>(all - done) / rate) : 0;
    fmt::print(stderr, "\r\033[Kcoil batch: {:.2f} of {:.2f} M, {:.0f} k/s, {}:{:02} left",
               done * 1e-6, all * 1e-6, rate * 1e-3, left / 60, left % 60);
  }
  ~Rate() {
    if (shown_) fmt::print(stderr, "\r\033[K");
  }

 private:
  using Clock = std::chrono::steady_clock;
  bool terminal_ = isatty(STDERR_FILENO) == 1, shown_ = false;
  Clock::time_point begin_ = Clock::now(), last_ = begin_;
};

}  // namespace

int run_batch(int argc, char** argv) {
  Options o;
  po::options_description text("Options");
  text.add_options()  //
      ("model", po::value(&o.model)->value_name("MODEL"),
       "model folder, or the name of a shipped model")                                    //
      ("dataset", po::value(&o.dataset)->value_name("DATASET"), "of coil dataset build")  //
      ("output,o", po::value(&o.out)->value_name("OUT"), "the HDF5 file of results")      //
      ("task", po::value(&o.task)->value_name("NAME"), "classify | score | embed");
  describe_vectors(text, o);
  text.add_options()  //
      ("min-probability", option(o.min_probability, "P"),
       "classify: below it the label is -1; auto: the model's thresholds by length")  //
      ("label", po::value(&o.labels.label)->value_name("NAME"),
       "conditional model: the label of all records; else the dataset's")                      //
      ("shard", option(o.shard, "i/n"), "the i-th of n parts of the work: see dataset merge")  //
      ("part-size", option(o.part, "SIZE"),
       "records that begin within so many bases or samples are one thread's work, and what a kill "
       "costs; "
       "where left out 16M on a GPU, less with embed --per-position")  //
      ("force", po::bool_switch(&o.force),
       "take over from a process of another host, which must not live any more");
  text.add(describe_split(o.split)).add(describe(o.engine)).add(describe(o.common));
  po::variables_map values;
  if (!parse(
          argc, argv, "batch MODEL DATASET -o OUT --task NAME",
          "A model over every record of a dataset. Run again after a kill, it goes on; run again\n"
          "when done, it says so.",
          text, {"model", "dataset"}, false, values))
    return 0;
  if (o.model.empty()) throw UsageError("no MODEL given");
  o.model = find_model(o.model);
  if (o.dataset.empty()) throw UsageError("no DATASET given");
  o.out = hdf5_output(o.out);
  const Task task = parse_task(o.task);
  const Config config = read_config(o.model);
  BatchWork work = work_of(o, config, task, values);
  work.min_probability = parse_min_probability(o.min_probability);
  if (task != Task::classify && o.min_probability != "auto")
    throw UsageError("--min-probability is for classify");
  parse_shard(o.shard, work);
  std::vector<std::string> read = files_of_model(o.model);
  read.push_back(o.dataset);
  check_outputs({o.out}, read);
  const auto dataset = std::make_shared<const Dataset>(o.dataset);
  check_holds(*dataset, codes_of(config), fmt::format("'{}'", o.model));
  work.reading = dataset_reading(config, o.split, o.labels, config.condition);
  dataset->find_split(o.split);
  work.sources = {o.model, o.dataset};

  Signals signals;  // before the backend, whose threads inherit what is blocked
  const std::unique_ptr<Backend> backend = make_backend(o.common);
  const Device device = backend->device();
  // A GPU is through with a small part before the next one is there.
  if (values["part-size"].defaulted()) {
    if (device.kind != Device::Kind::cpu) work.part_size = 16'000'000;
    if (task == Task::embed && work.per_position)
      work.part_size = std::max<int64_t>(1, (int64_t{256} << 20) / (4 * config.d));
  }
  resolve_batch(work, config, device);
  Json manifest = manifest_of(o, work, device);
  const hdf5::Seal seal = hdf5::read_seal(o.dataset);
  manifest["dataset"] = {{"bytes", seal.bytes}, {"crc32", seal.crc}};
  manifest["split"] = o.split;
  manifest["part_size"] = work.part_size;
  work.manifest = manifest.dump(2);
  const Model model = loaded(*backend, o);
  // Of a CPU a part is one thread's work. On a GPU two are under way: while the host looks at one's
  // batch the other's is computed.
  std::vector<std::unique_ptr<Backend>> more;
  std::vector<Backend*> backends;
  if (device.kind == Device::Kind::cpu) {
    for (int i = 0; i < backend->threads(); ++i)
      backends.push_back(more.emplace_back(make_cpu_backend(1)).get());
  } else {
    backends = {backend.get(), more.emplace_back(make_backend(o.common)).get()};
  }
  work.interrupted = [&] { return signals.taken() != 0; };
  BatchDone done;
  {
    Rate rate;
    work.progress = [&](int64_t codes, int64_t all) { rate(codes, all); };
    done = batch(backends, model, dataset, work);
  }
  if (done.interrupted) {
    print_end(o.out, "interrupted: the same command goes on");
    return 128 + signals.taken();
  }
  const std::string parts = counted(done.parts, "part");
  if (done.stood)
    print_end(o.out, "is there already, from the same model, dataset and options: nothing to do");
  else if (done.found > 0)
    print_end(o.out, fmt::format("{}, of which {} were there already", parts, done.found));
  else
    print_end(o.out, parts);
  return 0;
}

int run_embed(int argc, char** argv) {
  Options o;
  o.task = name_of(Task::embed);
  po::options_description text("Options");
  text.add_options()  //
      ("model", po::value(&o.model)->value_name("MODEL"),
       "model folder, or the name of a shipped model")                                //
      ("output,o", po::value(&o.out)->value_name("OUT"), "the HDF5 file of vectors")  //
      ("force", po::bool_switch(&o.force),
       "take over from a process of another host, which must not live any more");
  describe_vectors(text, o);
  text.add(describe(o.input))
      .add(describe_split(o.input.split))
      .add(describe(o.labels))
      .add(describe(o.engine))
      .add(describe(o.common));
  po::variables_map values;
  if (!parse(argc, argv, "embed MODEL INPUT... -o OUT",
             "Hidden states of a model as vectors: of every record or window, or of every base or "
             "sample.",
             text, {"model", "input"}, true, values))
    return 0;
  if (o.model.empty()) throw UsageError("no MODEL given");
  o.model = find_model(o.model);
  o.out = hdf5_output(o.out);
  const Config config = read_config(o.model);
  BatchWork work = work_of(o, config, Task::embed, values);
  std::vector<std::string> read = files_of(o.input);
  read.push_back(o.labels.table);
  for (const std::string& file : files_of_model(o.model)) read.push_back(file);
  check_outputs({o.out}, read);
  const std::unique_ptr<Source> source =
      config.audio.rate > 0 ? open_sounds(config, o.input, o.labels) : open_inputs(o.input);
  Signals signals;  // before the backend, whose threads inherit what is blocked
  const std::unique_ptr<Backend> backend = make_backend(o.common);
  const OutputLock lock(o.out, o.force);
  refuse_existing(o.out);
  // What is made is kept in parts until all of it is there, and its size known.
  Json manifest = manifest_of(o, work, backend->device());
  manifest["command"] = "embed";
  PartStore::discard(o.out, "command", "embed");
  PartStore store(o.out, manifest.dump());
  const Model model = loaded(*backend, o);
  ResultsAbout about =
      results_about(Task::embed, model.config, work.per_position, work.pooling, work.layer);
  about.sources = {o.model};
  for (const std::string& input : o.input.inputs) about.sources.push_back(input);
  about.manifest = manifest.dump(2);
  ResultPart part;
  constexpr int64_t kPart = 64 << 20;
  int64_t units = 0;
  const auto write = [&] {
    units += part.units();
    store.write(about.parts_end++, part.take());
  };
  try {
    {
      Progress progress("embed");
      const auto some = [&] {
        if (part.bytes() >= kPart) write();
      };
      const auto turn = [&](const Stream& stream) {
        progress(stream);
        if (signals.taken() != 0) throw Error("interrupted");
      };
      with_memory_hint(*backend, model, "--batch", work.stream.batch,
                       [&] { compute_results(*backend, model, *source, work, part, some, turn); });
    }
    if (part.bytes() > 0) write();
    about.parts_all = about.parts_end;
    assemble_results(o.out, about, store);
  } catch (const Error&) {
    store.remove();
    if (signals.taken() == 0) throw;
    print_end(o.out, "interrupted: nothing is kept");
    return 128 + signals.taken();
  }
  store.remove();
  print_end(o.out, fmt::format("{} of {} numbers",
                               work.per_position ? fmt::format("vectors of the positions of {}",
                                                               counted(units, "record"))
                                                 : counted(units, "vector"),
                               model.config.d));
  return 0;
}

}  // namespace coil
