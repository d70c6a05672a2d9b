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
  // Clips grad to norm `clip`, takes a step at learning rate lr, zeroes grad. squares(1) f64, in
  // the backend's memory: set to the sum of squares of grad before clipping. Where that is not
  // finite nothing is changed, nor by any later step, since grad keeps it. copy, optional, as
  // `converted` makes it, gets the new weights too. Waits for nothing.
  void step(Backend& backend, Model& model, Model& grad, double lr, View squares, Model* copy);
  // The same, waited for. Returns the norm; a step that changed nothing is not counted.
  double step(Backend& backend, Model& model, Model& grad, double lr);

  Model m, v;         // moments
  int64_t steps = 0;  // taken

 private:
  OptimizerOptions options_;
};

}  // namespace coil
