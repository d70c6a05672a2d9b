// The gated MLP: forward, and under it backward, read bottom-up with the same names under a `d`
// prefix.
#include "model/mlp.h"

#include <utility>

namespace coil {

std::vector<Param> declare(const Config& config, MlpWeights& weights, const std::string& prefix) {
  const int64_t d = config.d, f = config.mlp * d;
  const auto matrix = [&](Tensor& tensor, const char* name, std::vector<int64_t> shape, Init init) {
    return Param{.info = {.name = prefix + name,
                          .shape = std::move(shape),
                          .init = init,
                          .decay = true,
                          .matrix = true},
                 .tensor = &tensor};
  };
  std::vector<Param> params;
  params.push_back(matrix(weights.in, "in_proj.weight", {2 * f, d}, Init::linear));
  params.push_back(matrix(weights.out, "out_proj.weight", {d, f}, Init::residual_out));
  return params;
}

Tensor forward(Backend& backend, const Config& config, const MlpWeights& weights, Tensor u,
               MlpSaved* saved) {
  const int64_t t = u.view().rows(), d = config.d, f = config.mlp * d;
  const DType act = backend.activations(weights.in.view().dtype);
  Tensor ab(backend, act, {t, 2 * f});
  backend.run(Gemm{.a = u, .b = weights.in, .c = ab, .tb = true});
  Tensor y(backend, act, {t, f});
  backend.run(Glu{.x = ab, .y = y});
  Tensor out;  // (t, d) in training; otherwise it takes the place of u
  if (saved) {
    saved->u = std::move(u);
    saved->ab = std::move(ab);
    out = Tensor(backend, act, {t, d});
  } else {
    ab = Tensor();
    out = std::move(u);
  }
  backend.run(Gemm{.a = y, .b = weights.out, .c = out, .tb = true});
  if (saved) saved->y = std::move(y);
  return out;
}

Tensor backward(Backend& backend, const Config& config, const MlpWeights& weights,
                const MlpSaved& saved, View dy, MlpWeights& grad) {
  const int64_t t = dy.rows(), d = config.d, f = config.mlp * d;
  const DType act = backend.activations(weights.in.view().dtype);
  backend.run(Gemm{.a = dy, .b = saved.y, .c = grad.out, .ta = true, .beta = 1});
  Tensor dgated(backend, act, {t, f});
  backend.run(Gemm{.a = dy, .b = weights.out, .c = dgated});

  Tensor dab(backend, act, {t, 2 * f});
  backend.run(GluBackward{.x = saved.ab, .dy = dgated, .dx = dab});
  dgated = Tensor();

  backend.run(Gemm{.a = dab, .b = saved.u, .c = grad.in, .ta = true, .beta = 1});
  Tensor du(backend, act, {t, d});
  backend.run(Gemm{.a = dab, .b = weights.in, .c = du});
  return du;
}

}  // namespace coil
