// AdamW (Loshchilov and Hutter 2019) over all parameters of a model, gradients clipped to a norm as
// torch's clip_grad_norm_ does: factor clip / (norm + 1e-6) where that is below 1, the norm summed
// in f64.
#include "model/optimizer.h"

#include <algorithm>
#include <cmath>

#include "kernels/error.h"

namespace coil {

Optimizer::Optimizer(Backend& backend, const Model& model, const OptimizerOptions& options)
    : m(zeros_like(backend, model)), v(zeros_like(backend, model)), options_(options) {}

double Optimizer::step(Backend& backend, Model& model, Model& grad, double lr) {
  const std::vector<Param> weights = declare(model), grads = declare(grad), ms = declare(m),
                           vs = declare(v);
  COIL_ASSERT(weights.size() == grads.size() && weights.size() == ms.size());

  Tensor total(backend, DType::f64, {1});
  backend.fill(total, 0);
  for (const Param& param : grads) backend.run(SumSquares{.x = *param.tensor, .out = total});
  std::vector<std::byte> kept;
  const double norm = std::sqrt(*on_host(backend, total, kept).as<double>());
  if (!std::isfinite(norm)) return norm;

  double factor = 1;
  if (options_.clip > 0) factor = std::min(1.0, options_.clip / (norm + 1e-6));
  ++steps;
  for (size_t i = 0; i < weights.size(); ++i) {
    backend.run(
        AdamW{.w = *weights[i].tensor,
              .g = *grads[i].tensor,
              .m = *ms[i].tensor,
              .v = *vs[i].tensor,
              .lr = static_cast<float>(lr),
              .beta1 = static_cast<float>(options_.beta1),
              .beta2 = static_cast<float>(options_.beta2),
              .eps = static_cast<float>(options_.eps),
              .decay = weights[i].info.decay ? static_cast<float>(options_.weight_decay) : 0.0f,
              .grad_scale = static_cast<float>(factor),
              .step = steps});
    backend.fill(*grads[i].tensor, 0);
  }
  return norm;
}

}  // namespace coil
