#include "pipelines/classify.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/error.h"
#include "pipelines/engine.h"
#include "pipelines/evaluate.h"

namespace coil {
namespace {

// Of the sequences that end in a batch.
std::vector<float> logits_of(Backend& backend, const Model& model, Stream::Batch& batch,
                             State& state) {
  const Rows rows(backend, batch.pieces);
  const View ids = host_view(batch.ids.data(), DType::i32, {rows.total()});
  const Tensor h = hidden(backend, model, ids, rows, &state);           // (t, d)
  const Tensor logits = class_logits(backend, model, h, rows, &state);  // (m, classes)
  std::vector<std::byte> kept;
  const View host = on_host(backend, logits, kept);
  return {host.as<float>(), host.as<float>() + host.count()};
}

// The mean over the units that share an answer.
class Average {
 public:
  Average(const Config& config, const ClassifyOptions& options,
          const std::function<void(const Answer&)>& emit)
      : config_(config), options_(options), emit_(emit) {}

  void add(const Stream::Unit& unit) {
    const int64_t group = options_.per == AnswerPer::file   ? unit.file
                          : options_.per == AnswerPer::pair ? unit.record / 2
                                                            : group_ + 1;
    if (group != group_) flush();
    if (weight_ == 0) begin(unit);
    group_ = group;
    const auto length = static_cast<double>(unit.length());
    weight_ += length;
    std::vector<double> values = unit.values;  // mean over the strands
    for (double& value : values) value /= unit.strands;
    if (config_.equivariant) softmax(values);
    const std::vector<double>& excerpts = unit.excerpts.empty() ? values : unit.excerpts;
    const double all = unit.excerpts.empty()  // else 1 of each sequence
                           ? 1
                           : std::accumulate(excerpts.begin(), excerpts.end(), 0.0);
    for (size_t i = 0; i < sum_.size(); i++) {
      sum_[i] += length * values[i];
      agreement_[i] += length * excerpts[i] / all;
    }
    answer_.end += options_.per == AnswerPer::unit ? 0 : unit.fresh;
  }

  void flush() {
    if (weight_ == 0) return;
    answer_.probabilities = sum_;
    for (double& p : answer_.probabilities) p /= weight_;
    const auto best = std::max_element(answer_.probabilities.begin(), answer_.probabilities.end());
    answer_.probability = *best;
    answer_.label = static_cast<int32_t>(best - answer_.probabilities.begin());
    const int64_t length = answer_.end - answer_.begin;
    answer_.agreement = agreement_[answer_.label] / weight_;
    const double threshold = options_.min_probability >= 0
                                 ? options_.min_probability
                                 : unknown_threshold(config_, length, answer_.label);
    if (!(answer_.agreement >= threshold)) answer_.label = -1;
    emit_(answer_);
    weight_ = 0;
  }

 private:
  void begin(const Stream::Unit& unit) {
    answer_ = {.name = unit.name, .probabilities = {}};
    if (options_.per == AnswerPer::file) {
      answer_.name = options_.files.at(unit.file);
    } else if (options_.per == AnswerPer::pair) {
      if (answer_.name.ends_with("/1")) answer_.name.resize(answer_.name.size() - 2);
    } else {
      answer_.begin = unit.begin;
      answer_.end = unit.end;
    }
    sum_.assign(config_.labels.size(), 0);
    agreement_ = sum_;
  }

  const Config& config_;
  const ClassifyOptions& options_;
  const std::function<void(const Answer&)>& emit_;
  Answer answer_;
  std::vector<double> sum_, agreement_;
  double weight_ = 0;  // bases or samples
  int64_t group_ = -1;
};

}  // namespace

double unknown_threshold(const Config& config, int64_t length, int32_t label) {
  const auto of = [label](const Config::Threshold& row) {
    return row.by_class.empty() ? row.probability : row.by_class.at(static_cast<size_t>(label));
  };
  const std::vector<Config::Threshold>& table = config.unknown;
  if (table.empty()) return 0;
  if (length <= table.front().length) return of(table.front());
  for (size_t i = 1; i < table.size(); i++) {
    const Config::Threshold &low = table[i - 1], &high = table[i];
    if (length > high.length) continue;
    const double span = std::log(static_cast<double>(high.length) / low.length);
    const double share = span > 0 ? std::log(static_cast<double>(length) / low.length) / span : 1;
    return of(low) + share * (of(high) - of(low));
  }
  return of(table.back());
}

void check_classifier(const Config& config, const std::string& where) {
  if (config.language()) {
    const bool masked = config.objective == Objective::mlm;
    throw Error(fmt::format("{}: is a {}language model, expected a classifier", where,
                            masked ? "masked " : ""),
                masked ? "coil train --from makes a classifier of it"
                       : "coil score reads a language model; coil train --from makes a classifier "
                         "of it");
  }
  check_front_end(config, where);
}

void classify(Backend& backend, const Model& model, Source& source, const ClassifyOptions& options,
              const std::function<void(const Answer&)>& emit,
              const std::function<void(const Stream&)>& progress) {
  const size_t classes = model.config.labels.size();
  if (model.config.equivariant && options.stream.strands != Strands::both)
    throw UsageError("--strands: the model is equivariant, the mean of both strands");
  Average average(model.config, options, emit);
  const auto compute = [&](Backend& own, Stream::Batch& batch, State& state) {
    return logits_of(own, model, batch, state);  // (m, classes)
  };
  const auto add = [&](const Stream::Batch& batch, const std::vector<float>& logits) {
    const float* row = logits.data();
    for (size_t i = 0; i < batch.pieces.size(); i++) {
      if (!batch.pieces[i].last) continue;
      std::vector<double> of_strand(row, row + classes);
      Stream::Unit& unit = *batch.units[i];
      if (!model.config.equivariant || batch.excerpt[i]) softmax(of_strand);
      std::vector<double>& values = batch.excerpt[i] ? unit.excerpts : unit.values;
      values.resize(classes);
      for (size_t k = 0; k < classes; k++) values[k] += of_strand[k];
      row += classes;
    }
  };
  Stream::Unit unit;
  const auto turn = [&](Stream& stream) {
    while (stream.pop(unit)) average.add(unit);
    if (progress) progress(stream);
  };
  StreamOptions stream = options.stream;
  if (options.min_probability < 0) stream.excerpt = model.config.unknown_excerpt;
  run_stream(backend, model, source, stream, {compute, add, turn});
  average.flush();
}

}  // namespace coil
