// Thresholds of "unknown" by length. Pieces of each length are cut evenly from sequences of known
// classes that the model was not trained on; the threshold is the largest probability that keeps at
// least `keep` of them:
//   p(L) = the (1 - keep) quantile of the agreement of known pieces of L bases,
// that is of the top probability or, with excerpts, of its mean over these (pipelines/classify.h);
// by class: p(L, c) = that of those which are called c. Classes differ in how sure of them a model
// is; what is foreign and goes by the name of a class of which it is sure then stands out.
// Sequences of a class that was left out of training say how many of the unknown it catches; they
// do not set it.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "model/head.h"
#include "pipelines/stream.h"

namespace coil {

struct CalibrateOptions {
  StreamOptions stream;
  std::vector<int64_t> lengths{300, 1000, 3000, 10'000, 30'000};
  double keep = 0.95;
  int64_t pieces = 1000;  // of each length, about
  double overlap = 0;     // share of a piece that the next one may have too
  bool by_class = false;
  // Taken off the log-odds of every threshold: new strains are called less surely.
  double slack = 0;
  int64_t excerpt = 0;  // of Config::unknown_excerpt
};
struct Calibration {
  int64_t length = 0;
  double threshold = 0;
  std::vector<double> by_class;  // of classes that fewer than 20 known pieces are called: threshold
  int64_t known = 0, unknown = 0;  // pieces
  double kept = 0, caught = 0;     // shares of them; caught: NaN where there are no unknown ones
};

using OpenSource = std::function<std::unique_ptr<Source>()>;

// One row per length, ascending. Lengths of which there are fewer than 100 known pieces are left
// out. `unknown` may be empty. Throws where no length is left.
std::vector<Calibration> calibrate(Backend& backend, const Model& model, const OpenSource& known,
                                   const OpenSource& unknown, const CalibrateOptions& options);

}  // namespace coil
