// AdamW over a Model: weights, gradients and the two moments walked in step.
#pragma once

#include "model/head.h"

namespace coil {

struct OptimizerOptions {
  double lr = 2e-3, beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.1,
         clip = 1.0;  // clip 0: none
};

class Optimizer {
 public:
  Optimizer(Backend& backend, const Model& model, const OptimizerOptions& options);
  // Clips grad to norm `clip`, takes a step at learning rate lr, zeroes grad. Returns the norm
  // before clipping; where it is not finite nothing is changed.
  double step(Backend& backend, Model& model, Model& grad, double lr);

  Model m, v;         // moments
  int64_t steps = 0;  // taken

 private:
  OptimizerOptions options_;
};

}  // namespace coil
