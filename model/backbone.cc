// The stack of pre-norm residual blocks:  h = h + mixer(norm(h)) per layer, with an MLP also
// h = h + mlp(norm(h)), then norm_f.
// The sum and the norm that reads it are one op, so the residual stream is read and written once
// per layer.
#include "model/backbone.h"

#include <algorithm>
#include <utility>

#include "kernels/error.h"
#include "model/unet.h"

namespace coil {

namespace {

// What belongs to the weights of a mixer.
template <class Weights>
struct Of;
template <>
struct Of<Mamba1Weights> {
  using State = Mamba1State;
  using Saved = Mamba1Saved;
};
template <>
struct Of<S4dWeights> {
  using State = S4dState;
  using Saved = S4dSaved;
};

template <class Weights>
auto* state_of(State* state, size_t layer, const Weights&) {
  using Own = typename Of<Weights>::State;
  return state ? &std::get<Own>(state->layers[layer]) : nullptr;
}
template <class Weights>
const auto* state_of(const State* state, size_t layer, const Weights& weights) {
  return state_of(const_cast<State*>(state), layer, weights);
}

DType matrices(const Mamba1Weights& weights) { return weights.in_proj.view().dtype; }
DType matrices(const S4dWeights& weights) { return weights.output_linear.view().dtype; }

}  // namespace

State::State(Backend& backend, const Config& config, int32_t slots) : slots(slots) {
  auto zeros = [&](DType dtype, std::initializer_list<int64_t> shape) {
    Tensor tensor(backend, dtype, shape);
    backend.fill(tensor, 0);
    return tensor;
  };
  for (const LayerConfig& layer : config.layers) switch (layer.mixer) {
      case MixerKind::mamba1:
        layers.emplace_back(Mamba1State{.conv = zeros(DType::f32, {slots, config.w - 1, config.e}),
                                        .ssm = zeros(DType::f32, {slots, config.e, config.n})});
        break;
      case MixerKind::s4d:
        layers.emplace_back(
            S4dState{.ssm = zeros(DType::f32, {slots, config.d, config.s4d_states, 2})});
        break;
    }
  if (!config.inner.empty()) {
    const int64_t p = config.inner[0].pool;
    inner = std::make_unique<InnerState>(
        InnerState{.stage = State(backend, inner_config(config), slots),
                   .rest = zeros(DType::f32, {slots, p - 1, config.d}),
                   .next = zeros(DType::f32, {slots, p * config.d})});
    inner->stage.pool = Tensor();
  }
  pool = zeros(DType::f64, {slots, config.d + 1});
}

std::vector<std::pair<std::string, View>> State::tensors() const {
  std::vector<std::pair<std::string, View>> all;
  for (size_t i = 0; i < layers.size(); ++i) {
    const std::string name = fmt::format("layers.{}.", i);
    if (const auto* mamba = std::get_if<Mamba1State>(&layers[i]))
      all.emplace_back(name + "conv", mamba->conv);
    all.emplace_back(name + "ssm",
                     std::visit([](const auto& own) { return own.ssm.view(); }, layers[i]));
  }
  if (!inner) return all;
  all.emplace_back("inner.rest", inner->rest);
  all.emplace_back("inner.next", inner->next);
  for (const auto& [name, view] : inner->stage.tensors()) all.emplace_back("inner." + name, view);
  return all;
}

std::vector<Param> declare(const Config& config, Backbone& backbone, const std::string& base,
                           int64_t depth) {
  const std::string prefix = depth == 0 ? base : fmt::format("{}stages.{}.", base, depth);
  if (backbone.layers.size() != config.layers.size()) {
    backbone.layers = std::vector<Layer>(config.layers.size());
    for (size_t i = 0; i < config.layers.size(); ++i)
      if (config.layers[i].mixer == MixerKind::s4d) backbone.layers[i].mixer = S4dWeights{};
  }
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
    if (config.mlp == 0) continue;
    params.push_back(norm(layer.mlp_norm, name + "mlp_norm.weight"));
    std::vector<Param> mlp = declare(config, layer.mlp, name + "mlp.");
    params.insert(params.end(), mlp.begin(), mlp.end());
  }
  params.push_back(norm(backbone.norm_f, prefix + "norm_f.weight"));
  if (config.inner.empty()) return params;
  if (!backbone.inner)
    backbone.inner = std::make_unique<InnerStage>(
        InnerStage{.config = inner_config(config), .p = config.inner[0].pool});
  std::vector<Param> inner = declare(*backbone.inner, config.d, base, depth + 1);
  params.insert(params.end(), inner.begin(), inner.end());
  return params;
}

// Of what the mixers read and write.
DType activations(Backend& backend, const Backbone& backbone) {
  if (backbone.layers.empty()) return DType::f32;
  return std::visit([&](const auto& weights) { return backend.activations(matrices(weights)); },
                    backbone.layers[0].mixer);
}

bool try_step(Backend& backend, const Config& config, const Backbone& backbone, MambaStep ends,
              const Rows& rows, const State* state) {
  const bool one_step =
      std::ranges::all_of(rows.pieces(), [](const Piece& piece) { return piece.length == 1; });
  const bool mamba = std::ranges::all_of(backbone.layers, [](const Layer& layer) {
    return std::holds_alternative<Mamba1Weights>(layer.mixer);
  });
  if (!one_step || !mamba || config.mixer_norms || config.mlp > 0 || backbone.layers.empty())
    return false;
  if (config.bidirectional) return false;
  if (ends.ids && backbone.inner) return false;  // another stage stands between ids and layers
  std::vector<MambaStep::Layer> operands;
  operands.reserve(backbone.layers.size());
  for (size_t i = 0; i < backbone.layers.size(); ++i)
    operands.push_back(step_operands(std::get<Mamba1Weights>(backbone.layers[i].mixer),
                                     state ? &std::get<Mamba1State>(state->layers[i]) : nullptr,
                                     backbone.layers[i].norm));
  ends.layers = operands;
  ends.norm_f = backbone.norm_f;
  ends.rows = &rows;
  ends.eps = config.eps;
  return backend.try_run(ends);
}

Tensor Backbone::forward(Backend& backend, const Config& config, Tensor x, const Rows& rows,
                         State* state, Saved* saved, bool whole) const {
  const int64_t t = rows.total(), d = config.d;
  const DType act = activations(backend, *this);
  if (state && saved)
    for (const Piece& piece : rows.pieces())
      check(
          piece.from < 0 || piece.from != piece.to,
          "forward for backward: the piece at row {} reads and writes state slot {}; it must fork",
          piece.begin, piece.to);
  COIL_ASSERT(!saved || !saved->recompute || (!state && !inner));
  if (saved) {
    saved->blocks = std::vector<Saved::Block>(layers.size());
    saved->initial = state;
  }
  if (inner) {
    if (saved) saved->inner = std::make_unique<InnerSaved>();
    x = coil::forward(backend, *inner, act, std::move(x), rows,
                      state ? state->inner.get() : nullptr, saved ? saved->inner.get() : nullptr);
  }
  if (!saved) {
    Tensor y(backend, act, {t, d});
    if (try_step(backend, config, *this, {.x = x, .y = y}, rows, state)) return y;
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

  const bool keep = saved && !saved->recompute;  // all that a block computes
  for (size_t i = 0; i < layers.size(); ++i) {
    Saved::Block* block = saved ? &saved->blocks[i] : nullptr;
    add_and_norm(layers[i].norm, block ? &block->residual : nullptr,
                 block ? &block->rstd : nullptr);
    h = std::visit(
        [&]<class Weights>(const Weights& weights) {
          using Kept = typename Of<Weights>::Saved;
          return coil::forward(
              backend, config, weights, std::move(h), rows, state_of(state, i, weights),
              keep ? &block->mixer.emplace<Kept>() : nullptr, whole || i + 1 < layers.size());
        },
        layers[i].mixer);
    if (!h) return h;  // not whole, and this was the last layer
    if (config.mlp == 0) continue;
    add_and_norm(layers[i].mlp_norm, block ? &block->mlp_residual : nullptr,
                 block ? &block->mlp_rstd : nullptr);
    h = coil::forward(backend, config, layers[i].mlp, std::move(h), keep ? &block->mlp : nullptr);
  }
  add_and_norm(norm_f, saved ? &saved->residual : nullptr, saved ? &saved->rstd : nullptr);
  return h;
}

Tensor Backbone::backward(Backend& backend, const Config& config, Saved& saved, const Rows& rows,
                          View dy, State* dstate, Backbone& grad) const {
  const DType act = activations(backend, *this);
  const int64_t t = rows.total(), d = config.d;
  Tensor dresidual(backend, DType::f32, {t, d});  // gradient of the residual stream
  Tensor rounded;                                 // the same for the mixers' products
  if (act != DType::f32) rounded = Tensor(backend, act, {t, d});
  const View dout = rounded ? rounded : dresidual;  // of what a mixer or an MLP put out
  // dresidual += the gradient that comes through a norm.
  const auto add_through_norm = [&](const Tensor& residual, const Tensor& weight,
                                    const Tensor& rstd, View dnormed, const Tensor& dweight) {
    backend.run(NormBackward{.x = residual,
                             .weight = weight,
                             .rstd = rstd,
                             .dy = dnormed,
                             .dresidual = dresidual,
                             .dx = dresidual,
                             .dweight = dweight,
                             .dx_act = rounded,
                             .eps = config.eps});
  };
  backend.run(NormBackward{.x = saved.residual,
                           .weight = norm_f,
                           .rstd = saved.rstd,
                           .dy = dy,
                           .dx = dresidual,
                           .dweight = grad.norm_f,
                           .dx_act = rounded,
                           .eps = config.eps});
  saved.residual = Tensor();
  // What a mixer or an MLP read, and with it what it kept, once more.
  const auto normed = [&](const Tensor& sum, const Tensor& weight, const Tensor& rstd) {
    Tensor h(backend, act, {t, d});
    backend.run(Norm{.x = sum, .weight = weight, .y = h, .rstd = rstd, .eps = config.eps});
    return h;
  };
  for (size_t i = layers.size(); i-- > 0;) {
    Saved::Block& block = saved.blocks[i];
    if (config.mlp > 0) {
      MlpSaved again;
      if (saved.recompute)
        coil::forward(backend, config, layers[i].mlp,
                      normed(block.mlp_residual, layers[i].mlp_norm, block.mlp_rstd), &again);
      const Tensor dnormed =
          coil::backward(backend, config, layers[i].mlp, saved.recompute ? again : block.mlp, dout,
                         grad.layers[i].mlp);
      add_through_norm(block.mlp_residual, layers[i].mlp_norm, block.mlp_rstd, dnormed,
                       grad.layers[i].mlp_norm);
    }
    const Tensor dnormed = std::visit(
        [&]<class Weights>(const Weights& weights) {
          using Kept = typename Of<Weights>::Saved;
          Kept again;
          if (saved.recompute)
            coil::forward(backend, config, weights,
                          normed(block.residual, layers[i].norm, block.rstd), rows, nullptr,
                          &again);
          return coil::backward(backend, config, weights,
                                saved.recompute ? again : std::get<Kept>(block.mixer), rows, dout,
                                state_of(saved.initial, i, weights), state_of(dstate, i, weights),
                                std::get<Weights>(grad.layers[i].mixer));
        },
        layers[i].mixer);
    add_through_norm(block.residual, layers[i].norm, block.rstd, dnormed, grad.layers[i].norm);
  }
  if (inner)
    coil::backward(backend, *inner, act, *saved.inner, rows, dresidual,
                   dstate ? dstate->inner.get() : nullptr, *grad.inner);
  return dresidual;
}

}  // namespace coil
