// The stack of pre-norm residual blocks:  h = h + mixer(norm(h)) per layer, then norm_f.
// The sum and the norm that reads it are one op, so the residual stream is read and written once
// per layer.
#include "model/backbone.h"

#include <algorithm>
#include <utility>

#include "kernels/error.h"

namespace coil {

State::State(Backend& backend, const Config& config, int32_t slots) : slots(slots) {
  auto zeros = [&](DType dtype, std::initializer_list<int64_t> shape) {
    Tensor tensor(backend, dtype, shape);
    backend.fill(tensor, 0);
    return tensor;
  };
  for (size_t i = 0; i < config.layers.size(); ++i)
    layers.emplace_back(Mamba1State{.conv = zeros(DType::f32, {slots, config.w - 1, config.e}),
                                    .ssm = zeros(DType::f32, {slots, config.e, config.n})});
  pool = zeros(DType::f64, {slots, config.d + 1});
}

std::vector<Param> declare(const Config& config, Backbone& backbone, const std::string& prefix) {
  if (backbone.layers.size() != config.layers.size())
    backbone.layers = std::vector<Layer>(config.layers.size());
  auto norm = [&](Tensor& tensor, std::string name) {
    return Param{.info = {.name = std::move(name), .shape = {config.d}, .init = Init::ones},
                 .tensor = &tensor};
  };
  std::vector<Param> params;
  for (size_t i = 0; i < backbone.layers.size(); ++i) {
    Layer& layer = backbone.layers[i];
    const std::string name = fmt::format("{}layers.{}.", prefix, i);
    params.push_back(norm(layer.norm, name + "norm.weight"));
    std::vector<Param> mixer = std::visit(
        [&](auto& weights) { return declare(config, weights, name + "mixer."); }, layer.mixer);
    params.insert(params.end(), mixer.begin(), mixer.end());
  }
  params.push_back(norm(backbone.norm_f, prefix + "norm_f.weight"));
  return params;
}

// Of what the mixers read and write.
DType activations(Backend& backend, const Backbone& backbone) {
  if (backbone.layers.empty()) return DType::f32;
  return std::visit(
      [&](const auto& weights) { return backend.activations(weights.in_proj.view().dtype); },
      backbone.layers[0].mixer);
}

bool try_step(Backend& backend, const Config& config, const Backbone& backbone, View x,
              const Rows& rows, const State* state, View y) {
  const bool one_step =
      std::ranges::all_of(rows.pieces(), [](const Piece& piece) { return piece.length == 1; });
  if (!one_step || config.mixer_norms || backbone.layers.empty()) return false;
  std::vector<MambaStep::Layer> operands;
  operands.reserve(backbone.layers.size());
  for (size_t i = 0; i < backbone.layers.size(); ++i)
    operands.push_back(step_operands(std::get<Mamba1Weights>(backbone.layers[i].mixer),
                                     state ? &std::get<Mamba1State>(state->layers[i]) : nullptr,
                                     backbone.layers[i].norm));
  return backend.try_run(MambaStep{.layers = operands,
                                   .x = x,
                                   .norm_f = backbone.norm_f,
                                   .y = y,
                                   .rows = &rows,
                                   .eps = config.eps});
}

Tensor Backbone::forward(Backend& backend, const Config& config, Tensor x, const Rows& rows,
                         State* state, Saved* saved) const {
  const int64_t t = rows.total(), d = config.d;
  const DType act = activations(backend, *this);
  if (state && saved)
    for (const Piece& piece : rows.pieces())
      check(
          piece.from < 0 || piece.from != piece.to,
          "forward for backward: the piece at row {} reads and writes state slot {}; it must fork",
          piece.begin, piece.to);
  if (saved) {
    saved->blocks = std::vector<Saved::Block>(layers.size());
    saved->initial = state;
  } else {
    Tensor y(backend, act, {t, d});
    if (try_step(backend, config, *this, x, rows, state, y)) return y;
  }

  Tensor sum = std::move(x);  // (t, d), the residual stream
  View residual = sum;        // the same, or where it is kept
  Tensor h;                   // (t, d), what the last mixer put out; empty before the first
  // Adds h to the residual stream and norms the sum. Inference reuses the two buffers throughout;
  // training leaves each sum where backward finds it.
  auto add_and_norm = [&](const Tensor& weight, Tensor* kept_sum, Tensor* kept_rstd) {
    if (kept_rstd) *kept_rstd = Tensor(backend, DType::f32, {t});
    const View rstd = kept_rstd ? kept_rstd->view() : View{};
    if (!h) {
      h = Tensor(backend, act, {t, d});
      backend.run(Norm{.x = residual, .weight = weight, .y = h, .rstd = rstd, .eps = config.eps});
    } else {
      if (kept_sum) sum = Tensor(backend, DType::f32, {t, d});
      backend.run(Norm{.x = h,
                       .residual = residual,
                       .weight = weight,
                       .y = h,
                       .residual_out = sum,
                       .rstd = rstd,
                       .eps = config.eps});
    }
    if (kept_sum) {
      residual = sum;
      *kept_sum = std::move(sum);
    }
  };

  for (size_t i = 0; i < layers.size(); ++i) {
    Saved::Block* block = saved ? &saved->blocks[i] : nullptr;
    add_and_norm(layers[i].norm, block ? &block->residual : nullptr,
                 block ? &block->rstd : nullptr);
    if (block) block->mixer = Mamba1Saved{};
    h = std::visit(
        [&](const auto& weights) {
          return coil::forward(backend, config, weights, std::move(h), rows,
                               state ? &std::get<Mamba1State>(state->layers[i]) : nullptr,
                               block ? &std::get<Mamba1Saved>(block->mixer) : nullptr);
        },
        layers[i].mixer);
  }
  add_and_norm(norm_f, saved ? &saved->residual : nullptr, saved ? &saved->rstd : nullptr);
  return h;
}

Tensor Backbone::backward(Backend& backend, const Config& config, const Saved& saved,
                          const Rows& rows, View dy, State* dstate, Backbone& grad) const {
  const DType act = activations(backend, *this);
  const int64_t t = rows.total(), d = config.d;
  Tensor dresidual(backend, DType::f32, {t, d});  // gradient of the residual stream
  Tensor rounded;                                 // the same for the mixers' products
  if (act != DType::f32) rounded = Tensor(backend, act, {t, d});
  backend.run(NormBackward{.x = saved.residual,
                           .weight = norm_f,
                           .rstd = saved.rstd,
                           .dy = dy,
                           .dx = dresidual,
                           .dweight = grad.norm_f,
                           .dx_act = rounded,
                           .eps = config.eps});
  for (size_t i = layers.size(); i-- > 0;) {
    const Saved::Block& block = saved.blocks[i];
    Tensor dnormed = std::visit(
        [&](const auto& weights) {
          return coil::backward(
              backend, config, weights, std::get<Mamba1Saved>(block.mixer), rows,
              rounded ? rounded : dresidual,
              saved.initial ? &std::get<Mamba1State>(saved.initial->layers[i]) : nullptr,
              dstate ? &std::get<Mamba1State>(dstate->layers[i]) : nullptr,
              std::get<Mamba1Weights>(grad.layers[i].mixer));
        },
        layers[i].mixer);
    backend.run(NormBackward{.x = block.residual,
                             .weight = layers[i].norm,
                             .rstd = block.rstd,
                             .dy = dnormed,
                             .dresidual = dresidual,
                             .dx = dresidual,
                             .dweight = grad.layers[i].norm,
                             .dx_act = rounded,
                             .eps = config.eps});
  }
  return dresidual;
}

}  // namespace coil
