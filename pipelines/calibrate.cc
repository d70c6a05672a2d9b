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
  double agreement;
};

// Of pieces of `length`.
std::vector<Call> calls(Backend& backend, const Model& model, Source& source, int64_t length,
                        int64_t stride, const CalibrateOptions& options) {
  ClassifyOptions how{.stream = options.stream, .files = {}, .min_probability = 0};
  how.stream.window = length;
  how.stream.stride = stride;
  how.stream.excerpt = options.excerpt;
  std::vector<Call> found;
  classify(backend, model, source, how, [&](const Answer& answer) {
    if (answer.end - answer.begin == length) found.push_back({answer.label, answer.agreement});
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

// The share of calls that are not unknown.
double share_kept(const std::vector<Call>& calls, const Calibration& row) {
  if (calls.empty()) return std::numeric_limits<double>::quiet_NaN();
  const auto kept = std::ranges::count_if(calls, [&](const Call& call) {
    return call.agreement >= (row.by_class.empty() ? row.threshold : row.by_class[call.label]);
  });
  return static_cast<double>(kept) / static_cast<double>(calls.size());
}

}  // namespace

std::vector<Calibration> calibrate(Backend& backend, const Model& model, const OpenSource& known,
                                   const OpenSource& unknown, const CalibrateOptions& options) {
  COIL_ASSERT(options.keep > 0 && options.keep <= 1 && options.pieces > 0);
  COIL_ASSERT(options.overlap >= 0 && options.overlap < 1);
  std::vector<int64_t> lengths = options.lengths;
  std::sort(lengths.begin(), lengths.end());
  lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  const int64_t known_bases = count_bases(*known());
  const int64_t unknown_bases = unknown ? count_bases(*unknown()) : 0;
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
      all.push_back(call.agreement);
      of_class[call.label].push_back(call.agreement);
    }
    Calibration row{.length = length,
                    .threshold = lowered(keeping(all, options.keep), options.slack),
                    .by_class = {},
                    .known = static_cast<int64_t>(in.size()),
                    .unknown = static_cast<int64_t>(out.size())};
    if (options.by_class)
      for (const std::vector<double>& values : of_class)
        row.by_class.push_back(values.size() < kFewestOfClass
                                   ? row.threshold
                                   : lowered(keeping(values, options.keep), options.slack));
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
