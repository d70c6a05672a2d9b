#include "pipelines/training_data.h"

#include <algorithm>

#include "audio/dataset.h"
#include "genomics/dataset.h"
#include "kernels/error.h"
#include "pipelines/hash.h"
#include "pipelines/hdf5_read.h"

namespace coil {
namespace {

constexpr int64_t kWindow = 1024;       // bases, of language modelling
constexpr int64_t kAudioWindow = 8192;  // samples, likewise, where a batch holds as many

// Of what is trained and validated on: a resumed run must see the same data, wherever it
// lies now.
uint64_t fingerprint(const Examples& all, uint64_t hash = kHashStart) {
  const auto mix = [&](const void* data, size_t bytes) { hash = hash_bytes(data, bytes, hash); };
  for (const auto& codes : all.codes) mix(codes.data(), codes.size());
  for (const auto& targets : all.targets) mix(targets.data(), targets.size());
  for (const auto& label : all.labels) mix(label.c_str(), label.size() + 1);
  for (const Example& item : all.items) {
    const int64_t fields[] = {item.record, item.begin, item.length, item.label};
    mix(fields, sizeof fields);
  }
  return hash;
}

TrainingData read_dna(const TrainOptions& options) {
  TrainingData data;
  DatasetOptions dataset{.sequence_column = options.sequence_column,
                         .label_column = options.label_column,
                         .table = options.table,
                         .min_length = options.min_length,
                         .max_length = options.max_length,
                         .labels = {},
                         .labelled = options.objective == Objective::classify,
                         .target_column = options.target_column,
                         .alphabet = options.alphabet};
  data.all = read_examples(options.data, dataset);
  const double fraction = options.validation.empty() ? options.validation_fraction : 0;
  data.parts = partition(data.all, fraction, options.min_length, options.max_length, options.seed);
  if (options.validation.empty()) return data;
  dataset.labels = data.all.labels;
  data.validation = read_examples({options.validation}, dataset);
  data.parts.held_out = options.max_length == 0
                            ? data.validation.items
                            : cut_windows(whole_records(data.validation), options.min_length,
                                          options.max_length, options.seed);
  return data;
}

TrainingData read_audio(TrainOptions& options,
                        const std::function<void(const std::string&)>& note) {
  TrainingData data;
  audio::LabelOptions labels{
      .labelled = options.objective == Objective::classify || options.condition,
      .table = options.labels,
      .pattern = options.label_pattern};
  const audio::Recordings recordings = audio::list_recordings(options.data, labels);
  if (options.rate == 0) options.rate = audio::common_rate(recordings);
  const audio::ReadOptions reading{.rate = options.rate,
                                   .codes = parse_codes(options.codes),
                                   .trim = options.trim,
                                   .note = note};
  const int64_t step = reading.codes == SampleCodes::pcm16 ? 2 : 1;
  data.all = read_recordings(recordings, reading);
  const double fraction = options.validation.empty() ? options.validation_fraction : 0;
  data.parts = partition_records(data.all, fraction, options.min_length, options.max_length, step,
                                 options.seed);
  if (options.validation.empty()) return data;
  labels.known = data.all.labels;
  data.validation = read_recordings(audio::list_recordings({options.validation}, labels), reading);
  data.parts.held_out = options.max_length == 0
                            ? data.validation.items
                            : cut_windows(data.validation.items, options.min_length,
                                          options.max_length, options.seed, step);
  return data;
}

// The records of a split, where the dataset has any in it.
bool has_split(const Dataset& dataset, const std::string& name) {
  if (std::ranges::count(dataset.splits(), name) == 0) return false;
  constexpr int64_t kBlock = 1 << 16;
  const int8_t split = dataset.find_split(name);
  for (int64_t at = 0; at < dataset.records(); at += kBlock) {
    const auto block = dataset.read(at, std::min(kBlock, dataset.records() - at));
    if (std::ranges::count(block.split, split) > 0) return true;
  }
  return false;
}

// Of datasets with splits: trained on split train, validated on split validation.
TrainingData read_stored(TrainOptions& options) {
  if (!options.alphabet.empty() || !options.target_column.empty())
    throw UsageError("--alphabet and --target-column: for CSV and TSV, the data is a dataset");
  if (!options.table.empty() || !options.labels.empty() || !options.label_pattern.empty())
    throw UsageError("--table, --labels and --label-pattern: a dataset has its labels");
  CodesOf expected;
  const auto open = [&](const std::string& path) {
    auto dataset = std::make_shared<const Dataset>(path);
    if (options.audio) {
      if (options.rate == 0) options.rate = dataset->what().rate;
      expected = {.rate = options.rate, .encoding = parse_codes(options.codes)};
    }
    check_holds(*dataset, expected, fmt::format("the preset {}", options.preset));
    return dataset;
  };
  const auto read = [&](const std::shared_ptr<const Dataset>& dataset, const char* split,
                        DatasetReading reading) {
    if (has_split(*dataset, split)) reading.split = split;
    return read_datasets({dataset}, reading);
  };
  DatasetReading reading{.labelled = options.objective == Objective::classify || options.condition};
  std::vector<std::shared_ptr<const Dataset>> datasets;
  for (const std::string& path : options.data) datasets.push_back(open(path));
  if (options.validation.empty() && datasets.size() == 1 && has_split(*datasets[0], "validation"))
    options.validation = options.data[0];
  TrainingData data;
  const auto splits = std::ranges::count_if(
      datasets, [](const auto& dataset) { return has_split(*dataset, "train"); });
  check(splits == 0 || splits == std::ssize(datasets),
        "some datasets have a split train, others have none: expected all or none");
  DatasetReading train = reading;
  if (splits > 0) train.split = "train";
  data.all = read_datasets(datasets, train);
  check(!reading.labelled || data.all.labels.size() > 1,
        "{} in the data given; two classes are needed",
        data.all.labels.empty() ? "no labels" : fmt::format("only class '{}'", data.all.labels[0]));
  const double fraction = options.validation.empty() ? options.validation_fraction : 0;
  const int64_t step = expected.step();
  if (options.audio)
    data.parts = partition_records(data.all, fraction, options.min_length, options.max_length, step,
                                   options.seed);
  else
    data.parts =
        partition(data.all, fraction, options.min_length, options.max_length, options.seed);
  if (options.validation.empty()) return data;
  check(is_dataset(options.validation), "{}: is no dataset, and the data is", options.validation);
  reading.labels = data.all.labels;
  data.validation = read(open(options.validation), "validation", reading);
  data.parts.held_out = options.max_length == 0
                            ? data.validation.items
                            : cut_windows(data.validation.items, options.min_length,
                                          options.max_length, options.seed, step);
  return data;
}

}  // namespace

SampleCodes parse_codes(const std::string& name) {
  if (name == "mulaw") return SampleCodes::mulaw;
  if (name == "pcm16") return SampleCodes::pcm16;
  throw UsageError(fmt::format("--codes '{}': expected mulaw or pcm16", name));
}

TrainingData read_training_data(TrainOptions& options,
                                const std::function<void(const std::string&)>& note) {
  // Rows with targets are tasks: read whole.
  if (is_language(options.objective) && options.target_column.empty() && options.max_length == 0) {
    const int64_t step = parse_codes(options.codes) == SampleCodes::pcm16 ? 2 : 1;
    options.max_length =
        options.audio ? std::min(kAudioWindow, options.batch_tokens / step) : kWindow;
  }
  if (options.max_length > 0 && options.min_length == 0) options.min_length = options.max_length;
  if (options.min_length > options.max_length)
    throw UsageError(options.max_length == 0
                         ? "--min-length needs --max-length: without it records are read whole"
                         : fmt::format("--min-length {} is more than --max-length {}",
                                       options.min_length, options.max_length));
  TrainingData data = are_datasets(options.data) ? read_stored(options)
                      : options.audio            ? read_audio(options, note)
                                                 : read_dna(options);
  uint64_t hash = fingerprint(data.all);
  if (!options.validation.empty()) hash = fingerprint(data.validation, hash);
  data.fingerprint = fmt::format("{:016x}", hash);
  data.parts.held_out = thin(std::move(data.parts.held_out), options.validation_tokens);
  return data;
}

}  // namespace coil
