// AdamW (Loshchilov and Hutter 2019) over all parameters of a model, gradients clipped to a norm as
// torch's clip_grad_norm_ does: factor clip / (norm + 1e-6) where that is below 1, the norm summed
// in f64.
#include "model/optimizer.h"

#include <cmath>

#include "kernels/error.h"

namespace coil {

Optimizer::Optimizer(Backend& backend, const Model& model, const OptimizerOptions& options)
    : m(zeros_like(backend, model)), v(zeros_like(backend, model)), options_(options) {}

void Optimizer::step(Backend& backend, Model& model, Model& grad, double lr, View squares,
                     Model* copy) {
  const std::vector<Param> weights = declare(model), grads = declare(grad), ms = declare(m),
                           vs = declare(v);
  const std::vector<Param> copies = copy ? declare(*copy) : std::vector<Param>();
  COIL_ASSERT(weights.size() == grads.size() && weights.size() == ms.size());
  std::vector<View> gradients;
  std::vector<AdamW::Item> items;
  for (size_t i = 0; i < weights.size(); ++i) {
    gradients.push_back(*grads[i].tensor);
    items.push_back(
        {.w = *weights[i].tensor,
         .g = *grads[i].tensor,
         .m = *ms[i].tensor,
         .v = *vs[i].tensor,
         .copy = copy ? copies[i].tensor->view() : View{},
         .decay = weights[i].info.decay ? static_cast<float>(options_.weight_decay) : 0.0f});
  }
  backend.fill(squares, 0);
  backend.run(SumSquares{.x = gradients, .out = squares});
  ++steps;
  backend.run(AdamW{.items = items,
                    .squares = squares,
                    .clip = options_.clip,
                    .lr = static_cast<float>(lr),
                    .beta1 = static_cast<float>(options_.beta1),
                    .beta2 = static_cast<float>(options_.beta2),
                    .eps = static_cast<float>(options_.eps),
                    .step = steps});
}

double Optimizer::step(Backend& backend, Model& model, Model& grad, double lr) {
  const Tensor squares(backend, DType::f64, {1});
  step(backend, model, grad, lr, squares, nullptr);
  std::vector<std::byte> kept;
  const double norm = std::sqrt(*on_host(backend, squares, kept).as<double>());
  if (!std::isfinite(norm)) --steps;
  return norm;
}

}  // namespace coil
