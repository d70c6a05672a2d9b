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

// x, z (t, e) → y (t, e), read one way. z not given: only the state.
Tensor forward(Backend& backend, const Config& config, const Mamba1Direction& weights, View x,
               View z, const Rows& rows, Mamba1State* state, Mamba1DirectionSaved* saved,
               bool reverse) {
  const int64_t t = rows.total(), e = config.e, n = config.n, r = config.dt_rank;
  const DType act = backend.activations(weights.x_proj.view().dtype);

  Tensor conv(backend, act, {t, e});
  backend.run(Conv1d{.x = x,
                     .weight = conv_taps(weights.conv_weight),
                     .y = conv,
                     .bias = view_or_none(weights.conv_bias),
                     .state = state ? state->conv.view() : View{},
                     .rows = &rows,
                     .reverse = reverse});
  if (state && state->conv_marks)
    for (int64_t i = 0; i < state->conv_marks.rows(); ++i)
      backend.copy(x.slice((i + 1) * state->conv_every - (config.w - 1), config.w - 1),
                   state->conv_marks.slice(i, 1).reshape({config.w - 1, e}));
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

  Tensor y;  // (t, e)
  if (saved) {
    saved->checkpoints = Tensor(backend, act, {scan_checkpoints(backend, rows), e, n});
    saved->dt = std::move(dt);
    y = Tensor(backend, act, {t, e});
  } else {
    y = std::move(dt);  // in its place
  }
  backend.run(SelectiveScan{.x = conv,
                            .dt = saved ? saved->dt : y,
                            .A_log = weights.A_log,
                            .B = parts.B,
                            .C = parts.C,
                            .D = weights.D,
                            .dt_bias = weights.dt_bias,
                            .y = z ? y.view() : View{},
                            .z = z,
                            .state = state ? state->ssm.view() : View{},
                            .checkpoints = saved ? saved->checkpoints.view() : View{},
                            .marks = state ? state->ssm_marks : View{},
                            .starts = state ? state->ssm_starts : View{},
                            .every = state ? state->ssm_every : 0,
                            .rows = &rows,
                            .reverse = reverse});
  if (saved) {
    saved->conv = std::move(conv);
    (config.mixer_norms ? saved->dbc_normed : saved->dbc) = std::move(dbc);
  }
  return y;
}

}  // namespace

Tensor forward(Backend& backend, const Config& config, const Mamba1Weights& weights, Tensor u,
               const Rows& rows, Mamba1State* state, Mamba1Saved* saved, bool whole) {
  const int64_t t = rows.total(), e = config.e;
  const DType act = backend.activations(weights.in_proj.view().dtype);
  if (config.bidirectional) state = nullptr;  // the ops refuse pieces that would read or write it

  const int64_t columns = whole ? 2 * e : e;
  Tensor xz(backend, act, {t, columns});
  backend.run(Gemm{.a = u,
                   .b = weights.in_proj.view().slice(0, columns),
                   .c = xz,
                   .bias = config.bias ? weights.in_proj_bias.view().slice(0, columns) : View{},
                   .tb = true});
  if (saved) saved->u = std::move(u);
  u = Tensor();
  const View x = xz.view().columns(0, e), z = whole ? xz.view().columns(e, e) : View{};
  Tensor y = forward(backend, config, weights, x, z, rows, state, saved, false), back;  // (t, e)
  if (!whole) return {};
  if (config.bidirectional)
    back = forward(backend, config, weights.back, x, z, rows, nullptr,
                   saved ? &saved->back : nullptr, true);
  if (saved) saved->xz = std::move(xz);
  xz = Tensor();

  Tensor out(backend, act, {t, config.d});
  backend.run(Gemm{.a = y,
                   .b = weights.out_proj,
                   .c = out,
                   .bias = view_or_none(weights.out_proj_bias),
                   .tb = true});
  if (config.bidirectional)
    backend.run(Gemm{.a = back, .b = weights.out_proj, .c = out, .tb = true, .beta = 1});
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

// dout (t, d), of out_proj, and dgated (t, e), of y → dxz (t, 2e). y is not kept but comes out of
// the scan's backward, and stands in the half of dxz that the convolution's backward writes after
// it. dconv (t, e) may be dgated.
Tensor backward(Backend& backend, const Config& config, const Mamba1Direction& weights, View xz,
                Mamba1DirectionSaved& saved, const Rows& rows, View dout, View dgated, View dconv,
                const Mamba1State* initial, Mamba1State* dstate, Mamba1Direction& grad,
                const Tensor& dout_proj, bool reverse) {
  const int64_t t = rows.total(), e = config.e, n = config.n, r = config.dt_rank;
  const DType act = backend.activations(weights.x_proj.view().dtype);
  Tensor dxz(backend, act, {t, 2 * e});
  Tensor ddbc(backend, act, {t, r + 2 * n});
  const View dx = dxz.view().columns(0, e), dz = dxz.view().columns(e, e), y = dx;
  const Parts parts = split(config.mixer_norms ? saved.dbc_normed : saved.dbc, config);
  const Parts dparts = split(ddbc, config);
  const Tensor ddt = std::move(saved.dt);
  backend.run(SelectiveScanBackward{.x = saved.conv,
                                    .dt = ddt,
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
                                    .dz = dz,
                                    .y = y,
                                    .dA_log = grad.A_log,
                                    .dD = grad.D,
                                    .ddt_bias = grad.dt_bias,
                                    .dstate = dstate ? dstate->ssm.view() : View{},
                                    .rows = &rows,
                                    .reverse = reverse});
  saved.checkpoints = Tensor();
  add_weight_gradient(backend, dout, y, dout_proj);

  add_weight_gradient(backend, ddt, parts.dt, grad.dt_proj);
  backend.run(Gemm{.a = ddt, .b = weights.dt_proj, .c = dparts.dt});

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

  backend.run(Conv1dBackward{.x = xz.columns(0, e),
                             .weight = conv_taps(weights.conv_weight),
                             .dy = dconv,
                             .bias = view_or_none(weights.conv_bias),
                             .state = initial ? initial->conv.view() : View{},
                             .dx = dx,
                             .dweight = conv_taps(grad.conv_weight),
                             .dbias = view_or_none(grad.conv_bias),
                             .dstate = dstate ? dstate->conv.view() : View{},
                             .rows = &rows,
                             .reverse = reverse});
  return dxz;
}

}  // namespace

Tensor backward(Backend& backend, const Config& config, const Mamba1Weights& weights,
                Mamba1Saved& saved, const Rows& rows, View dy, const Mamba1State* initial,
                Mamba1State* dstate, Mamba1Weights& grad) {
  const int64_t t = rows.total();
  const DType act = backend.activations(weights.in_proj.view().dtype);
  const auto add_bias_gradient = [&](const View& dout, const Tensor& dbias) {
    if (dbias) backend.run(SumRows{.x = dout, .out = dbias});
  };
  if (config.bidirectional) initial = dstate = nullptr;

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
  if (config.bidirectional) {
    const Tensor dconv(backend, act, {t, config.e});
    through_in_proj(backward(backend, config, weights.back, saved.xz, saved.back, rows, dy, dgated,
                             dconv, nullptr, nullptr, grad.back, grad.out_proj, true),
                    0);
  }
  through_in_proj(backward(backend, config, weights, saved.xz, saved, rows, dy, dgated, dgated,
                           initial, dstate, grad, grad.out_proj, false),
                  config.bidirectional ? 1.0f : 0.0f);
  return du;
}

}  // namespace coil
