#include "pipelines/calibrate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/error.h"
#include "pipelines/classify.h"

namespace coil {
namespace {

constexpr int64_t kFewest = 100;  // pieces: a 5 % quantile rests on five of them

int64_t count_bases(Source& source) {
  int64_t bases = 0;
  for (Segment segment; source.next(segment);) bases += static_cast<int64_t>(segment.codes.size());
  return bases;
}

// Top probabilities of pieces of `length`, ascending.
std::vector<double> tops(Backend& backend, const Model& model, Source& source, int64_t length,
                         int64_t stride, const CalibrateOptions& options) {
  ClassifyOptions how{.stream = options.stream, .files = {}};
  how.stream.window = length;
  how.stream.stride = stride;
  std::vector<double> found;
  classify(backend, model, source, how, [&](const Answer& answer) {
    if (answer.end - answer.begin == length) found.push_back(answer.probability);
  });
  std::sort(found.begin(), found.end());
  return found;
}

// The share of sorted values at or above `threshold`.
double share_above(const std::vector<double>& sorted, double threshold) {
  if (sorted.empty()) return std::numeric_limits<double>::quiet_NaN();
  const auto first = std::lower_bound(sorted.begin(), sorted.end(), threshold);
  return static_cast<double>(sorted.end() - first) / static_cast<double>(sorted.size());
}

}  // namespace

std::vector<Calibration> calibrate(Backend& backend, const Model& model, const OpenSource& known,
                                   const OpenSource& unknown, const CalibrateOptions& options) {
  COIL_ASSERT(options.keep > 0 && options.keep <= 1 && options.pieces > 0);
  std::vector<int64_t> lengths = options.lengths;
  std::sort(lengths.begin(), lengths.end());
  lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  const int64_t known_bases = count_bases(*known());
  const int64_t unknown_bases = unknown ? count_bases(*unknown()) : 0;
  std::vector<Calibration> rows;
  for (const int64_t length : lengths) {
    const auto pieces_of = [&](const OpenSource& open, int64_t bases) {
      return tops(backend, model, *open(), length, std::max(length, bases / options.pieces),
                  options);
    };
    const std::vector<double> in = pieces_of(known, known_bases);
    if (static_cast<int64_t>(in.size()) < kFewest) continue;
    const std::vector<double> out =
        unknown ? pieces_of(unknown, unknown_bases) : std::vector<double>();
    const auto lost = static_cast<size_t>(std::floor((1 - options.keep) * in.size() + 1e-9));
    const double threshold = in[std::min(lost, in.size() - 1)];
    rows.push_back({.length = length,
                    .threshold = threshold,
                    .known = static_cast<int64_t>(in.size()),
                    .unknown = static_cast<int64_t>(out.size()),
                    .kept = share_above(in, threshold),
                    .caught = 1 - share_above(out, threshold)});
  }
  check(!rows.empty(),
        "known sequences of {} bases in all give fewer than {} pieces of {} bases: more were "
        "expected",
        known_bases, kFewest, lengths.front());
  return rows;
}

}  // namespace coil
