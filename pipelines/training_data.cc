#include "pipelines/training_data.h"

#include <algorithm>

#include "audio/dataset.h"
#include "genomics/dataset.h"
#include "kernels/error.h"
#include "pipelines/hash.h"

namespace coil {
namespace {

constexpr int64_t kWindow = 1024;       // bases, of language modelling
constexpr int64_t kAudioWindow = 8192;  // samples, likewise, where a batch holds as many

// Of what is trained and validated on: a resumed run must see the same data, wherever it
// lies now.
uint64_t fingerprint(const Examples& all, uint64_t hash = kHashStart) {
  const auto mix = [&](const void* data, size_t bytes) { hash = hash_bytes(data, bytes, hash); };
  for (const auto& codes : all.codes) mix(codes.data(), codes.size());
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
                         .labelled = options.objective != Objective::lm};
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

}  // namespace

SampleCodes parse_codes(const std::string& name) {
  if (name == "mulaw") return SampleCodes::mulaw;
  if (name == "pcm16") return SampleCodes::pcm16;
  throw UsageError(fmt::format("--codes '{}': expected mulaw or pcm16", name));
}

TrainingData read_training_data(TrainOptions& options,
                                const std::function<void(const std::string&)>& note) {
  if (options.objective == Objective::lm && options.max_length == 0) {
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
  TrainingData data = options.audio ? read_audio(options, note) : read_dna(options);
  uint64_t hash = fingerprint(data.all);
  if (!options.validation.empty()) hash = fingerprint(data.validation, hash);
  data.fingerprint = fmt::format("{:016x}", hash);
  data.parts.held_out = thin(std::move(data.parts.held_out), options.validation_tokens);
  return data;
}

}  // namespace coil
