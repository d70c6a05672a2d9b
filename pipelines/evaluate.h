// Metrics of a classifier on labelled data, and bits per base of a language model.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "model/head.h"

namespace coil {

struct Metrics {
  int64_t count = 0;
  double loss = 0;  // mean, nats
  double accuracy = 0, macro_f1 = 0, mcc = 0 /* multi-class: Gorodkin 2004 */,
         auroc = 0 /* binary; macro one-against-rest otherwise */;
  std::vector<double> recall, precision;        // per class; NaN where a class is absent
  std::vector<std::vector<int64_t>> confusion;  // [true][predicted]
};
// probabilities: count x classes, row-major.
Metrics measure(std::span<const int32_t> truth, std::span<const double> probabilities, int64_t classes);

}  // namespace coil
