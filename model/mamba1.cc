// Mamba's first mixer (Gu and Dao 2023, figure 3): forward, and under it backward, read bottom-up
// with the same names under a `d` prefix. falcon_mamba adds RMS norms without weights on dt, B and
// C before dt_proj. Nothing is copied: x|z and dt|B|C are column views of one product each.
#include "model/mamba1.h"

#include <utility>

#include "kernels/error.h"

namespace coil {
namespace {

// dt | B | C of a (t, r + 2n) product.
struct Parts {
  View dt, B, C;
};
Parts split(const View& dbc, const Config& config) {
  return {dbc.columns(0, config.dt_rank), dbc.columns(config.dt_rank, config.n),
          dbc.columns(config.dt_rank + config.n, config.n)};
}

View conv_taps(const Tensor& weight) {  // (e, 1, w) as Hugging Face stores it → (e, w)
  return weight.view().reshape({weight.view().size[0], weight.view().size[2]});
}

View view_or_none(const Tensor& tensor) { return tensor ? tensor.view() : View{}; }

}  // namespace

std::vector<Param> declare(const Config& config, Mamba1Weights& weights,
                           const std::string& prefix) {
  const int64_t d = config.d, e = config.e, n = config.n, r = config.dt_rank;
  std::vector<Param> params;
  auto add = [&](Tensor& tensor, const std::string& name, std::vector<int64_t> shape, Init init,
                 bool matrix = false) {
    params.push_back(
        {.info = {.name = prefix + name,
                  .shape = std::move(shape),
                  .init = init,
                  .decay = matrix,  // here the tensors that decay are those that may be bf16
                  .matrix = matrix},
         .tensor = &tensor});
  };
  const auto system = [&](Mamba1Direction& set, const std::string& of) {
    add(set.A_log, "A" + of + "_log", {e, n}, Init::A_log);
    add(set.D, "D" + of, {e}, Init::ones);
  };
  const auto inputs = [&](Mamba1Direction& set, const std::string& of) {
    add(set.conv_weight, "conv1d" + of + ".weight", {e, 1, config.w}, Init::linear);
    if (config.conv_bias) add(set.conv_bias, "conv1d" + of + ".bias", {e}, Init::zeros);
    add(set.x_proj, "x_proj" + of + ".weight", {r + 2 * n, e}, Init::linear, true);
    add(set.dt_proj, "dt_proj" + of + ".weight", {e, r}, Init::dt_weight, true);
    add(set.dt_bias, "dt_proj" + of + ".bias", {e}, Init::dt_bias);
  };
  system(weights, "");
  add(weights.in_proj, "in_proj.weight", {2 * e, d}, Init::linear, true);
  if (config.bias) add(weights.in_proj_bias, "in_proj.bias", {2 * e}, Init::zeros);
  inputs(weights, "");
  if (config.bidirectional) {
    system(weights.back, "_b");
    inputs(weights.back, "_b");
  }
  add(weights.out_proj, "out_proj.weight", {d, e}, Init::residual_out, true);
  if (config.bias) add(weights.out_proj_bias, "out_proj.bias", {d}, Init::zeros);
  return params;
}

namespace {

// xz (t, 2e) → y (t, e), read one way; with `saved` y stands there.
Tensor forward(Backend& backend, const Config& config, const Mamba1Direction& weights, View xz,
               const Rows& rows, Mamba1State* state, Mamba1DirectionSaved* saved, bool reverse) {
  const int64_t t = rows.total(), e = config.e, n = config.n, r = config.dt_rank;
  const DType act = backend.activations(weights.x_proj.view().dtype);
  const View x = xz.columns(0, e), z = xz.columns(e, e);

  Tensor conv(backend, act, {t, e});
  backend.run(Conv1d{.x = x,
                     .weight = conv_taps(weights.conv_weight),
                     .y = conv,
                     .bias = view_or_none(weights.conv_bias),
                     .state = state ? state->conv.view() : View{},
                     .rows = &rows,
                     .reverse = reverse});
  Tensor dbc(backend, act, {t, r + 2 * n});
  backend.run(Gemm{.a = conv, .b = weights.x_proj, .c = dbc, .tb = true});
  if (config.mixer_norms) {
    // Backward needs the values before the norm as well; inference normalises in place.
    Tensor normed, rstd;
    if (saved) {
      normed = Tensor(backend, act, {t, r + 2 * n});
      rstd = Tensor(backend, DType::f32, {3, t});
    }
    const Parts raw = split(dbc, config), out = split(saved ? normed.view() : dbc.view(), config);
    const View from[] = {raw.dt, raw.B, raw.C}, to[] = {out.dt, out.B, out.C};
    for (int i = 0; i < 3; ++i)
      backend.run(Norm{.x = from[i],
                       .y = to[i],
                       .rstd = saved ? rstd.view().slice(i, 1).reshape({t}) : View{},
                       .eps = config.mixer_eps});
    if (saved) {
      saved->dbc = std::move(dbc);
      saved->norm_rstd = std::move(rstd);
      dbc = std::move(normed);
    }
  }
  const Parts parts = split(dbc, config);

  Tensor dt(backend, act, {t, e});
  backend.run(Gemm{.a = parts.dt, .b = weights.dt_proj, .c = dt, .tb = true});

  Tensor kept_y;  // (t, e) in training; otherwise y takes the place of dt
  if (saved) {
    saved->checkpoints = Tensor(backend, DType::f32, {scan_checkpoints(backend, rows), e, n});
    kept_y = Tensor(backend, act, {t, e});
  }
  const View y = saved ? kept_y.view() : dt.view();
  backend.run(SelectiveScan{.x = conv,
                            .dt = dt,
                            .A_log = weights.A_log,
                            .B = parts.B,
                            .C = parts.C,
                            .D = weights.D,
                            .dt_bias = weights.dt_bias,
                            .y = y,
                            .z = z,
                            .state = state ? state->ssm.view() : View{},
                            .checkpoints = saved ? saved->checkpoints.view() : View{},
                            .rows = &rows,
                            .reverse = reverse});
  if (!saved) return dt;
  saved->conv = std::move(conv);
  (config.mixer_norms ? saved->dbc_normed : saved->dbc) = std::move(dbc);
  saved->dt = std::move(dt);
  saved->y = std::move(kept_y);
  return {};
}

}  // namespace

Tensor forward(Backend& backend, const Config& config, const Mamba1Weights& weights, Tensor u,
               const Rows& rows, Mamba1State* state, Mamba1Saved* saved) {
  const int64_t t = rows.total();
  const DType act = backend.activations(weights.in_proj.view().dtype);
  if (config.bidirectional) state = nullptr;  // the ops refuse pieces that would read or write it

  Tensor xz(backend, act, {t, 2 * config.e});
  backend.run(Gemm{.a = u,
                   .b = weights.in_proj,
                   .c = xz,
                   .bias = view_or_none(weights.in_proj_bias),
                   .tb = true});
  if (saved) saved->u = std::move(u);
  u = Tensor();
  Tensor y = forward(backend, config, weights, xz, rows, state, saved, false), back;  // (t, e)
  if (config.bidirectional)
    back = forward(backend, config, weights.back, xz, rows, nullptr, saved ? &saved->back : nullptr,
                   true);
  if (saved) saved->xz = std::move(xz);
  xz = Tensor();

  Tensor out(backend, act, {t, config.d});
  backend.run(Gemm{.a = saved ? saved->y : y,
                   .b = weights.out_proj,
                   .c = out,
                   .bias = view_or_none(weights.out_proj_bias),
                   .tb = true});
  if (config.bidirectional)
    backend.run(Gemm{
        .a = saved ? saved->back.y : back, .b = weights.out_proj, .c = out, .tb = true, .beta = 1});
  return out;
}

MambaStep::Layer step_operands(const Mamba1Weights& weights, const Mamba1State* state,
                               const Tensor& norm) {
  return {.norm = norm,
          .in_proj = weights.in_proj,
          .in_proj_bias = view_or_none(weights.in_proj_bias),
          .conv_weight = conv_taps(weights.conv_weight),
          .conv_bias = view_or_none(weights.conv_bias),
          .x_proj = weights.x_proj,
          .dt_proj = weights.dt_proj,
          .dt_bias = weights.dt_bias,
          .A_log = weights.A_log,
          .D = weights.D,
          .out_proj = weights.out_proj,
          .out_proj_bias = view_or_none(weights.out_proj_bias),
          .conv_state = state ? state->conv.view() : View{},
          .ssm_state = state ? state->ssm.view() : View{}};
}

namespace {

// dW += dout^T in, for out = in W^T.
void add_weight_gradient(Backend& backend, const View& dout, const View& in,
                         const Tensor& dweight) {
  backend.run(Gemm{.a = dout, .b = in, .c = dweight, .ta = true, .beta = 1});
}

// dgated (t, e), the gradient of y → dxz (t, 2e).
Tensor backward(Backend& backend, const Config& config, const Mamba1Direction& weights, View xz,
                const Mamba1DirectionSaved& saved, const Rows& rows, View dgated,
                const Mamba1State* initial, Mamba1State* dstate, Mamba1Direction& grad,
                bool reverse) {
  const int64_t t = rows.total(), e = config.e, n = config.n, r = config.dt_rank;
  const DType act = backend.activations(weights.x_proj.view().dtype);
  Tensor dxz(backend, act, {t, 2 * e});
  Tensor dconv(backend, act, {t, e});
  Tensor ddt(backend, act, {t, e});
  Tensor ddbc(backend, act, {t, r + 2 * n});
  const Parts parts = split(config.mixer_norms ? saved.dbc_normed : saved.dbc, config);
  const Parts dparts = split(ddbc, config);
  backend.run(SelectiveScanBackward{.x = saved.conv,
                                    .dt = saved.dt,
                                    .A_log = weights.A_log,
                                    .B = parts.B,
                                    .C = parts.C,
                                    .D = weights.D,
                                    .dt_bias = weights.dt_bias,
                                    .dy = dgated,
                                    .z = xz.columns(e, e),
                                    .checkpoints = saved.checkpoints,
                                    .dx = dconv,
                                    .ddt = ddt,
                                    .dB = dparts.B,
                                    .dC = dparts.C,
                                    .dz = dxz.view().columns(e, e),
                                    .dA_log = grad.A_log,
                                    .dD = grad.D,
                                    .ddt_bias = grad.dt_bias,
                                    .dstate = dstate ? dstate->ssm.view() : View{},
                                    .rows = &rows,
                                    .reverse = reverse});

  add_weight_gradient(backend, ddt, parts.dt, grad.dt_proj);
  backend.run(Gemm{.a = ddt, .b = weights.dt_proj, .c = dparts.dt});
  ddt = Tensor();

  if (config.mixer_norms) {
    const Parts raw = split(saved.dbc, config);
    const View from[] = {raw.dt, raw.B, raw.C}, to[] = {dparts.dt, dparts.B, dparts.C};
    for (int i = 0; i < 3; ++i)
      backend.run(NormBackward{.x = from[i],
                               .rstd = saved.norm_rstd.view().slice(i, 1).reshape({t}),
                               .dy = to[i],
                               .dx = to[i],
                               .eps = config.mixer_eps});
  }

  add_weight_gradient(backend, ddbc, saved.conv, grad.x_proj);
  backend.run(Gemm{.a = ddbc, .b = weights.x_proj, .c = dconv, .beta = 1});
  ddbc = Tensor();

  backend.run(Conv1dBackward{.x = xz.columns(0, e),
                             .weight = conv_taps(weights.conv_weight),
                             .dy = dconv,
                             .bias = view_or_none(weights.conv_bias),
                             .state = initial ? initial->conv.view() : View{},
                             .dx = dxz.view().columns(0, e),
                             .dweight = conv_taps(grad.conv_weight),
                             .dbias = view_or_none(grad.conv_bias),
                             .dstate = dstate ? dstate->conv.view() : View{},
                             .rows = &rows,
                             .reverse = reverse});
  return dxz;
}

}  // namespace

Tensor backward(Backend& backend, const Config& config, const Mamba1Weights& weights,
                const Mamba1Saved& saved, const Rows& rows, View dy, const Mamba1State* initial,
                Mamba1State* dstate, Mamba1Weights& grad) {
  const int64_t t = rows.total();
  const DType act = backend.activations(weights.in_proj.view().dtype);
  const auto add_bias_gradient = [&](const View& dout, const Tensor& dbias) {
    if (dbias) backend.run(SumRows{.x = dout, .out = dbias});
  };
  if (config.bidirectional) initial = dstate = nullptr;

  add_weight_gradient(backend, dy, saved.y, grad.out_proj);
  if (config.bidirectional) add_weight_gradient(backend, dy, saved.back.y, grad.out_proj);
  add_bias_gradient(dy, grad.out_proj_bias);
  Tensor dgated(backend, act, {t, config.e});  // of y and of y_b alike
  backend.run(Gemm{.a = dy, .b = weights.out_proj, .c = dgated});

  Tensor du;  // (t, d)
  const auto through_in_proj = [&](const Tensor& dxz, float beta) {
    if (!du) du = Tensor(backend, act, {t, config.d});
    add_weight_gradient(backend, dxz, saved.u, grad.in_proj);
    add_bias_gradient(dxz, grad.in_proj_bias);
    backend.run(Gemm{.a = dxz, .b = weights.in_proj, .c = du, .beta = beta});
  };
  through_in_proj(backward(backend, config, weights, saved.xz, saved, rows, dgated, initial, dstate,
                           grad, false),
                  0);
  if (config.bidirectional)
    through_in_proj(backward(backend, config, weights.back, saved.xz, saved.back, rows, dgated,
                             nullptr, nullptr, grad.back, true),
                    1);
  return du;
}

}  // namespace coil
