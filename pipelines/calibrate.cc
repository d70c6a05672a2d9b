#include "pipelines/calibrate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/error.h"
#include "pipelines/classify.h"

namespace coil {
namespace {

constexpr int64_t kFewest = 100;       // pieces: a 5 % quantile rests on five of them
constexpr size_t kFewestOfClass = 20;  // on one

int64_t count_bases(Source& source) {
  int64_t bases = 0;
  for (Segment segment; source.next(segment);) bases += static_cast<int64_t>(segment.codes.size());
  return bases;
}

struct Call {
  int32_t label;
  double probability;
  std::vector<double> odds;
};

// Of pieces of `length`.
std::vector<Call> calls(Backend& backend, const Model& model, Source& source, int64_t length,
                        int64_t stride, const CalibrateOptions& options) {
  ClassifyOptions how{.stream = options.stream, .files = {}, .min_probability = 0};
  how.stream.window = length;
  how.stream.stride = stride;
  std::vector<Call> found;
  classify(backend, model, source, how, [&](const Answer& answer) {
    if (answer.end - answer.begin == length)
      found.push_back({answer.label, answer.probability, log_odds(answer.probabilities)});
  });
  return found;
}

// The largest threshold that keeps the share `keep` of `values`.
double keeping(std::vector<double> values, double keep) {
  std::sort(values.begin(), values.end());
  const auto lost =
      static_cast<size_t>(std::floor((1 - keep) * static_cast<double>(values.size()) + 1e-9));
  return values[std::min(lost, values.size() - 1)];
}

double lowered(double probability, double slack) {
  if (slack == 0 || probability <= 0 || probability >= 1) return probability;
  return 1 / (1 + (1 - probability) / probability * std::exp(slack));
}

Config::Threshold threshold_of(const Calibration& row) {
  return {row.length, row.threshold, row.by_class, row.centres, row.distances};
}

// Mean log-odds by the class called; empty where fewer than kFewestOfClass are called it.
std::vector<std::vector<double>> centres_of(const std::vector<Call>& calls, size_t classes) {
  std::vector<size_t> count(classes, 0);
  std::vector<std::vector<double>> centres(classes, std::vector<double>(classes, 0));
  for (const Call& call : calls) {
    count[call.label]++;
    for (size_t c = 0; c < classes; c++) centres[call.label][c] += call.odds[c];
  }
  for (size_t k = 0; k < classes; k++) {
    if (count[k] < kFewestOfClass) centres[k].clear();
    for (double& value : centres[k]) value /= static_cast<double>(count[k]);
  }
  return centres;
}

// Of each class, of known pieces; of one that fewer than kFewestOfClass are called, that of all.
std::vector<double> distances_of(const std::vector<Call>& calls, const Config::Threshold& row,
                                 double keep) {
  constexpr double kLeast = 1e-6;  // pieces may all be alike
  std::vector<double> all;
  std::vector<std::vector<double>> of_class(row.centres.size());
  for (const Call& call : calls) {
    all.push_back(-distance(row, call.odds, call.label));
    of_class[call.label].push_back(all.back());
  }
  std::vector<double> distances;
  for (const std::vector<double>& values : of_class)
    distances.push_back(
        std::max(kLeast, -keeping(values.size() < kFewestOfClass ? all : values, keep)));
  return distances;
}

// The share of calls that are not unknown.
double share_kept(const std::vector<Call>& calls, const Calibration& row) {
  if (calls.empty()) return std::numeric_limits<double>::quiet_NaN();
  const Config::Threshold rule = threshold_of(row);
  const auto kept = std::ranges::count_if(calls, [&](const Call& call) {
    if (!row.centres.empty())
      return distance(rule, call.odds, call.label) <= row.distances[call.label];
    return call.probability >= (row.by_class.empty() ? row.threshold : row.by_class[call.label]);
  });
  return static_cast<double>(kept) / static_cast<double>(calls.size());
}

}  // namespace

std::vector<Calibration> calibrate(Backend& backend, const Model& model, const OpenSource& known,
                                   const OpenSource& unknown, const CalibrateOptions& options,
                                   const OpenSource& centres) {
  COIL_ASSERT(options.keep > 0 && options.keep <= 1 && options.pieces > 0);
  COIL_ASSERT(options.overlap >= 0 && options.overlap < 1);
  std::vector<int64_t> lengths = options.lengths;
  std::sort(lengths.begin(), lengths.end());
  lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  const int64_t known_bases = count_bases(*known());
  const int64_t unknown_bases = unknown ? count_bases(*unknown()) : 0;
  const int64_t centre_bases = centres ? count_bases(*centres()) : 0;
  std::vector<Calibration> rows;
  for (const int64_t length : lengths) {
    const auto nearest =
        static_cast<int64_t>(std::ceil(static_cast<double>(length) * (1 - options.overlap)));
    const auto pieces_of = [&](const OpenSource& open, int64_t bases) {
      return calls(backend, model, *open(), length, std::max(nearest, bases / options.pieces),
                   options);
    };
    const std::vector<Call> in = pieces_of(known, known_bases);
    if (static_cast<int64_t>(in.size()) < kFewest) continue;
    const std::vector<Call> out = unknown ? pieces_of(unknown, unknown_bases) : std::vector<Call>();
    std::vector<double> all;
    std::vector<std::vector<double>> of_class(model.config.labels.size());
    for (const Call& call : in) {
      all.push_back(call.probability);
      of_class[call.label].push_back(call.probability);
    }
    Calibration row{.length = length,
                    .threshold = lowered(keeping(all, options.keep), options.slack),
                    .by_class = {},
                    .centres = {},
                    .distances = {},
                    .known = static_cast<int64_t>(in.size()),
                    .unknown = static_cast<int64_t>(out.size())};
    if (options.by_class)
      for (const std::vector<double>& values : of_class)
        row.by_class.push_back(values.size() < kFewestOfClass
                                   ? row.threshold
                                   : lowered(keeping(values, options.keep), options.slack));
    if (centres) {
      row.centres = centres_of(pieces_of(centres, centre_bases), model.config.labels.size());
      row.distances = distances_of(in, threshold_of(row), options.keep);
      row.threshold = 0;
    }
    row.kept = share_kept(in, row);
    row.caught = 1 - share_kept(out, row);
    rows.push_back(row);
  }
  check(!rows.empty(),
        "known sequences of {} bases in all give fewer than {} pieces of {} bases: more were "
        "expected",
        known_bases, kFewest, lengths.front());
  return rows;
}

}  // namespace coil
