// Metrics of a classifier on labelled data, and bits per base or sample of a language model.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "model/batch.h"
#include "model/head.h"
#include "pipelines/stream.h"

namespace coil {

struct Metrics {
  int64_t count = 0;
  double loss = 0;  // mean, nats
  double accuracy = 0, macro_f1 = 0, mcc = 0 /* multi-class: Gorodkin 2004 */,
         auroc = 0 /* binary; macro one-against-rest otherwise */;
  std::vector<double> recall, precision;        // per class; NaN where a class is absent
  std::vector<std::vector<int64_t>> confusion;  // [true][predicted]
};
// probabilities: count x classes, row-major. MCC is 0 where it is undefined, AUROC NaN where fewer
// than two classes are present; macro-F1 is over the classes present in truth or prediction.
Metrics measure(std::span<const int32_t> truth, std::span<const double> probabilities,
                int64_t classes);

void softmax(std::span<double> values);  // of logits, in place

struct EvaluateOptions {
  int64_t batch_tokens = 0;  // rows at once, 0: auto_batch; longer items are read in pieces
  bool both_strands = true;  // DNA only. classify: probabilities averaged; else log-likelihoods
  // Told where memory makes batches smaller than they would be.
  const Note* note = nullptr;
  uint64_t seed = 1;  // mlm: of the masks, which it, record and place alone set
};
struct Evaluation {
  Metrics metrics;  // classify; lm: count (bases, samples) and loss only, mlm: accuracy too
  std::vector<double> probabilities;  // classify: items x classes
  double bits_per_base = 0;           // lm, mlm; or per sample. What counts: pipelines/front_end.h
};
Evaluation evaluate(Backend& backend, const Model& model, const Examples& all,
                    std::span<const Example> items, const EvaluateOptions& options);

}  // namespace coil
