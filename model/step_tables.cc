#include "model/step_tables.h"

#include <algorithm>

#include "kernels/error.h"
#include "model/unet.h"

namespace coil {
namespace {

// f(the stage, its state, the stage inside its own or null), from the outermost on.
template <class F>
void each_stage(const Backbone& backbone, const State* state, F f) {
  const InnerStage* in = nullptr;
  const InnerState* in_state = nullptr;
  for (const Backbone* stage = &backbone; stage; stage = in ? &in->stage : nullptr) {
    f(*stage, state, in, in_state);
    in = stage->inner.get();
    in_state = state && state->inner ? state->inner.get() : nullptr;
    state = in_state ? &in_state->stage : nullptr;
  }
}

// Rows of the model's embedding, each label's after the other; -1: without.
Tensor embedding_of(Backend& backend, const Model& model, Softmax rows,
                    std::initializer_list<int32_t> labels) {
  std::vector<int32_t> ids;
  for (const int32_t label : labels) {
    const int64_t row = label < 0 ? model.labels.view().rows() : label;
    for (int64_t i = 0; i < rows.count; ++i)
      ids.push_back(static_cast<int32_t>(row * model.config.vocab + rows.begin + i));
  }
  const auto count = static_cast<int64_t>(ids.size());
  Tensor kept;
  const Tensor sum(backend, DType::f32, {count, model.config.d});
  backend.run(Embed{.ids = brought(backend, host_view(ids.data(), DType::i32, {count}), kept),
                    .table = model.embedding,
                    .y = sum,
                    .labels = model.labels});
  Tensor embedding(backend, model.embedding.view().dtype, {count, model.config.d});
  backend.copy(sum, embedding);
  return embedding;
}

}  // namespace

StepTables step_tables(Backend& backend, const Model& model, int32_t label, bool guided) {
  StepTables tables;
  if (model.config.condition) {
    std::vector<Softmax> all = softmaxes(model.config);
    all.push_back({0, model.config.vocab});
    for (const Softmax& rows : all)
      tables.embeddings.emplace_back(rows, guided ? embedding_of(backend, model, rows, {label, -1})
                                                  : embedding_of(backend, model, rows, {label}));
  }
  bool all = true;
  each_stage(model.backbone, nullptr, [&](const Backbone& stage, auto...) {
    for (const Layer& layer : stage.layers) {
      const auto* const s4d = std::get_if<S4dWeights>(&layer.mixer);
      if (!(all = all && s4d)) return;
      const View C = s4d->C.view();
      Tensor& table =
          tables.layers.emplace_back(Tensor(backend, DType::f32, {C.size[0], 4, C.size[1]}));
      backend.run(S4dTable{.log_A_real = s4d->log_A_real,
                           .A_imag = s4d->A_imag,
                           .C = s4d->C,
                           .log_dt = s4d->log_dt,
                           .table = table});
    }
  });
  if (!all) tables.layers.clear();
  return tables;
}

bool try_step(Backend& backend, const Model& model, const StepTables& tables, UnetStep ends,
              const Rows& rows, const State* state) {
  const auto goes_on = [](const Piece& piece) {
    return piece.length == 1 && piece.to >= 0 &&
           (piece.from == piece.to || (piece.from < 0 && piece.position == 0));
  };
  if (tables.layers.empty() || !state || !std::ranges::all_of(rows.pieces(), goes_on)) return false;
  std::vector<UnetStep::Block> blocks;
  std::vector<UnetStep::Stage> stages;
  blocks.reserve(tables.layers.size());
  each_stage(
      model.backbone, state,
      [&](const Backbone& stage, const State* own, const InnerStage* in,
          const InnerState* in_state) {
        const size_t first = blocks.size();
        for (size_t i = 0; i < stage.layers.size(); ++i) {
          const Layer& layer = stage.layers[i];
          const auto& s4d = std::get<S4dWeights>(layer.mixer);
          const View linear = s4d.output_linear;
          blocks.push_back({.norm = layer.norm,
                            .table = tables.layers[blocks.size()],
                            .D = s4d.D,
                            .state = std::get<S4dState>(own->layers[i]).ssm,
                            .output_linear = linear.reshape({linear.size[0], linear.size[1]}),
                            .output_bias = s4d.output_bias,
                            .mlp_norm = layer.mlp_norm,
                            .mlp_in = layer.mlp.in,
                            .mlp_out = layer.mlp.out});
        }
        UnetStep::Stage& to = stages.emplace_back();
        to.blocks = std::span(blocks).subspan(first);
        to.norm_f = stage.norm_f;
        if (!in) return;
        to.p = in->p;
        to.down = in->down;
        to.down_bias = in->down_bias;
        to.up = in->up;
        to.up_bias = in->up_bias;
        to.rest = in_state->rest;
        to.next = in_state->next;
      });
  ends.stages = stages;
  ends.rows = &rows;
  ends.eps = model.config.eps;
  return backend.try_run(ends);
}

}  // namespace coil
