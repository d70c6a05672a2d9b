// Embedding in front of the backbone, a head behind it: logits of the next token (tied to the
// embedding or not) or of the classes (pooled over the sequence).
#include "model/head.h"

#include <utility>

#include "kernels/error.h"
#include "model/step_tables.h"

namespace coil {

std::vector<Param> declare(Model& model) {
  const Config& config = model.config;
  std::vector<Param> params;
  auto add = [&](Tensor& tensor, const char* name, std::vector<int64_t> shape, Init init,
                 bool matrix) {
    const bool decay = shape.size() > 1;
    params.push_back({.info = {.name = name,
                               .shape = std::move(shape),
                               .init = init,
                               .decay = decay,
                               .matrix = matrix},
                      .tensor = &tensor});
  };
  add(model.embedding, "backbone.embeddings.weight", {config.vocab, config.d}, Init::embedding,
      true);
  if (config.condition)
    add(model.labels, "backbone.label_embeddings.weight",
        {static_cast<int64_t>(config.labels.size()), config.d}, Init::embedding, true);
  std::vector<Param> stack = declare(config, model.backbone, "backbone.");
  params.insert(params.end(), stack.begin(), stack.end());
  if (config.objective == Objective::classify) {
    const int64_t classes = static_cast<int64_t>(config.labels.size());
    add(model.score, "score.weight", {classes, config.d}, Init::linear, false);
    add(model.score_bias, "score.bias", {classes}, Init::zeros, false);
  } else if (!config.tie) {
    add(model.lm_head, "lm_head.weight",
        {config.kmer > 1 ? config.predicted() : config.vocab, config.d}, Init::linear, true);
  }
  return params;
}

Model make_model(Backend& backend, const Config& config, uint64_t seed) {
  Model model;
  model.config = config;
  for (const Param& param : declare(model)) {
    allocate(backend, param);
    std::vector<float> values = initial_values(param.info, config, seed);
    View from = param.tensor->view();
    from.data = values.data();
    from.device = Device{};
    backend.copy(from, *param.tensor);
    backend.sync();
  }
  return model;
}

Model zeros_like(Backend& backend, const Model& model) {
  Model zeros;
  zeros.config = model.config;
  for (const Param& param : declare(zeros)) {
    allocate(backend, param);
    backend.fill(*param.tensor, 0);
  }
  return zeros;
}

int64_t parameters(const Config& config) {
  Model model;
  model.config = config;
  int64_t total = 0;
  for (const Param& param : declare(model)) {
    int64_t count = 1;
    for (int64_t size : param.info.shape) count *= size;
    total += count;
  }
  return total;
}

Model converted(Backend& backend, const Model& model, DType matrices) {
  Model result;
  result.config = model.config;
  for (const Param& param : declare(result))
    allocate(backend, param, param.info.matrix ? matrices : DType::f32);
  copy_values(backend, model, result);
  return result;
}

void copy_values(Backend& backend, const Model& from, Model& to) {
  const std::vector<Param> sources = declare(const_cast<Model&>(from)), targets = declare(to);
  for (size_t i = 0; i < sources.size(); ++i) backend.copy(*sources[i].tensor, *targets[i].tensor);
}

namespace {

// hidden() of ids that are rows of `table`, with labels or none, and logits by the rows of `head`.
Tensor hidden(Backend& backend, const Model& model, View table, View labels, View ids,
              const Rows& rows, State* state, Saved* saved, bool whole) {
  Tensor kept;
  Tensor x(backend, DType::f32, {rows.total(), model.config.d});
  backend.run(Embed{.ids = brought(backend, ids, kept), .table = table, .y = x, .labels = labels});
  return model.backbone.forward(backend, model.config, std::move(x), rows, state, saved, whole);
}
Tensor logits_of(Backend& backend, View head, View hidden) {
  Tensor logits(backend, DType::f32, {hidden.rows(), head.rows()});
  backend.run(Gemm{.a = hidden, .b = head, .c = logits, .tb = true});
  return logits;
}

}  // namespace

Tensor hidden(Backend& backend, const Model& model, View ids, const Rows& rows, State* state,
              Saved* saved, bool whole) {
  return hidden(backend, model, model.embedding, model.labels, ids, rows, state, saved, whole);
}

Tensor lm_logits(Backend& backend, const Model& model, View hidden) {
  return logits_of(backend, model.output().view().slice(0, model.config.predicted()), hidden);
}

Tensor step_logits(Backend& backend, const Model& model, const StepTables& tables, View ids,
                   const Rows& rows, State* state, Softmax read, Softmax drawn) {
  View table;
  for (const auto& [rows, embedding] : tables.embeddings)
    if (rows == read) table = embedding;
  COIL_ASSERT(!model.config.condition || table);
  if (!table) table = model.embedding.view().slice(read.begin, read.count);
  const View head = model.output().view().slice(drawn.begin, drawn.count);
  Tensor logits(backend, DType::f32, {rows.total(), head.rows()});
  const MambaStep ends{.ids = ids, .table = table, .head = head, .logits = logits};
  if (try_step(backend, model.config, model.backbone, ends, rows, state)) return logits;
  const UnetStep unet_ends{.ids = ids, .table = table, .head = head, .logits = logits};
  if (try_step(backend, model, tables, unet_ends, rows, state)) return logits;
  return logits_of(backend, head,
                   hidden(backend, model, table, {}, ids, rows, state, nullptr, true));
}

Tensor step_logits(Backend& backend, const Model& model, const StepTables& tables, View ids,
                   const Rows& rows, State* state) {
  return step_logits(backend, model, tables, ids, rows, state, {0, model.config.vocab},
                     {0, model.config.predicted()});
}

std::vector<Softmax> softmaxes(const Config& config) {
  if (config.audio.rate == 0) return {{0, config.predicted()}};
  std::vector<Softmax> all;
  for (int64_t begin = 0; begin < config.predicted(); begin += 256) all.push_back({begin, 256});
  return all;
}

std::vector<int32_t> targets_in(const Softmax& softmax, View targets) {
  std::vector<int32_t> inside(targets.rows(), -1);
  for (size_t i = 0; i < inside.size(); ++i) {
    const int64_t target = *targets.row<int32_t>(static_cast<int64_t>(i)) - softmax.begin;
    if (target >= 0 && target < softmax.count) inside[i] = static_cast<int32_t>(target);
  }
  return inside;
}

View strand_of(const Tensor& pooled, int strand, int strands) {
  const int64_t m = pooled.view().rows(), d = pooled.view().cols();
  return pooled.view().reshape({m / strands, strands * d}).columns(strand * d, d);
}

Tensor class_logits(Backend& backend, const Model& model, View hidden, const Rows& rows,
                    State* state, Tensor* pooled, int strands) {
  const int64_t m = rows.finished();
  COIL_ASSERT(m % strands == 0);
  Tensor features(backend, DType::f32, {m, model.config.d});
  backend.run(Pool{.x = hidden,
                   .y = features,
                   .state = state ? state->pool.view() : View{},
                   .rows = &rows,
                   .pooling = model.config.pooling});
  Tensor logits(backend, DType::f32,
                {m / strands, static_cast<int64_t>(model.config.labels.size())});
  for (int strand = 0; m > 0 && strand < strands; ++strand)
    backend.run(Gemm{.a = strand_of(features, strand, strands),
                     .b = model.score,
                     .c = logits,
                     .bias = strand == 0 ? model.score_bias.view() : View{},
                     .tb = true,
                     .alpha = 1.0f / static_cast<float>(strands),
                     .beta = strand == 0 ? 0.0f : 1.0f});
  if (pooled) *pooled = std::move(features);
  return logits;
}

}  // namespace coil
