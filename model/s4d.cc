// S4D's mixer: forward, and under it backward, read bottom-up with the same names under a `d`
// prefix. No gate before the scan and no convolution: channels meet in output_linear alone.
#include "model/s4d.h"

#include <utility>

namespace coil {
namespace {

View matrix_of(const Tensor& output_linear) {  // (2d, d, 1) as S4 stores it → (2d, d)
  return output_linear.view().reshape({output_linear.view().size[0], output_linear.view().size[1]});
}

}  // namespace

std::vector<Param> declare(const Config& config, S4dWeights& weights, const std::string& prefix) {
  const int64_t d = config.d, n = config.s4d_states;
  std::vector<Param> params;
  auto add = [&](Tensor& tensor, const char* name, std::vector<int64_t> shape, Init init,
                 bool matrix = false) {
    params.push_back({.info = {.name = prefix + name,
                               .shape = std::move(shape),
                               .init = init,
                               .decay = matrix,
                               .matrix = matrix},
                      .tensor = &tensor});
  };
  add(weights.D, "D", {d}, Init::normal);
  add(weights.log_dt, "kernel.log_dt", {d}, Init::log_dt);
  add(weights.C, "kernel.C", {d, n, 2}, Init::s4d_C);
  add(weights.log_A_real, "kernel.log_A_real", {d, n}, Init::s4d_A_real);
  add(weights.A_imag, "kernel.A_imag", {d, n}, Init::s4d_A_imag);
  add(weights.output_linear, "output_linear.0.weight", {2 * d, d, 1}, Init::linear, true);
  add(weights.output_bias, "output_linear.0.bias", {2 * d}, Init::zeros);
  return params;
}

Tensor forward(Backend& backend, const Config& config, const S4dWeights& weights, Tensor u,
               const Rows& rows, S4dState* state, S4dSaved* saved, bool whole) {
  const int64_t t = rows.total(), d = config.d;
  const DType act = backend.activations(weights.output_linear.view().dtype);
  Tensor kept_y;  // (t, d) in training; otherwise y takes the place of u
  if (saved) {
    saved->checkpoints =
        Tensor(backend, DType::f32, {s4d_checkpoints(rows), d, config.s4d_states, 2});
    saved->before_gelu = Tensor(backend, act, {t, d});
    kept_y = Tensor(backend, act, {t, d});
  }
  const View y = saved ? kept_y.view() : u.view();
  backend.run(S4dScan{.x = u,
                      .log_A_real = weights.log_A_real,
                      .A_imag = weights.A_imag,
                      .C = weights.C,
                      .log_dt = weights.log_dt,
                      .D = weights.D,
                      .y = y,
                      .state = state ? state->ssm.view() : View{},
                      .checkpoints = saved ? saved->checkpoints.view() : View{},
                      .before_gelu = saved ? saved->before_gelu.view() : View{},
                      .rows = &rows,
                      .gelu = true});
  if (!whole) return {};

  Tensor ab(backend, act, {t, 2 * d});
  backend.run(Gemm{.a = y,
                   .b = matrix_of(weights.output_linear),
                   .c = ab,
                   .bias = weights.output_bias,
                   .tb = true});
  if (saved) {
    saved->u = std::move(u);
    saved->y = std::move(kept_y);
  } else {
    u = Tensor();
  }

  Tensor out(backend, act, {t, d});
  backend.run(Glu{.x = ab, .y = out});
  if (saved) saved->ab = std::move(ab);
  return out;
}

Tensor backward(Backend& backend, const Config& config, const S4dWeights& weights,
                const S4dSaved& saved, const Rows& rows, View dy, const S4dState* /* initial */,
                S4dState* dstate, S4dWeights& grad) {
  const int64_t t = rows.total(), d = config.d;
  const DType act = backend.activations(weights.output_linear.view().dtype);
  Tensor dab(backend, act, {t, 2 * d});
  backend.run(GluBackward{.x = saved.ab, .dy = dy, .dx = dab});

  backend.run(
      Gemm{.a = dab, .b = saved.y, .c = matrix_of(grad.output_linear), .ta = true, .beta = 1});
  backend.run(SumRows{.x = dab, .out = grad.output_bias});
  Tensor du(backend, act, {t, d});  // of the scan's output, then of its input
  backend.run(Gemm{.a = dab, .b = matrix_of(weights.output_linear), .c = du});
  dab = Tensor();

  backend.run(S4dScanBackward{.x = saved.u,
                              .log_A_real = weights.log_A_real,
                              .A_imag = weights.A_imag,
                              .C = weights.C,
                              .log_dt = weights.log_dt,
                              .D = weights.D,
                              .dy = du,
                              .checkpoints = saved.checkpoints,
                              .before_gelu = saved.before_gelu,
                              .dx = du,
                              .dlog_A_real = grad.log_A_real,
                              .dA_imag = grad.A_imag,
                              .dC = grad.C,
                              .dlog_dt = grad.log_dt,
                              .dD = grad.D,
                              .dstate = dstate ? dstate->ssm.view() : View{},
                              .rows = &rows,
                              .gelu = true});
  return du;
}

}  // namespace coil
