// Embedding in front of the backbone, a head behind it: logits of the next token (tied to the
// embedding or not) or of the classes (pooled over the sequence). The loss of a batch and its
// gradient.
#include "model/head.h"

#include <utility>

#include "kernels/error.h"
#include "model/step_tables.h"

namespace coil {
namespace {

// dlogits → dhidden for logits = hidden W^T, and dW += dlogits^T hidden.
void linear_backward(Backend& backend, const View& dlogits, const View& hidden, const View& weight,
                     const View& dweight, const Tensor& dhidden) {
  backend.run(Gemm{.a = dlogits, .b = hidden, .c = dweight, .ta = true, .beta = 1});
  backend.run(Gemm{.a = dlogits, .b = weight, .c = dhidden});
}

}  // namespace

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
    add(model.lm_head, "lm_head.weight", {config.vocab, config.d}, Init::linear, true);
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
              const Rows& rows, State* state, Saved* saved) {
  Tensor kept;
  Tensor x(backend, DType::f32, {rows.total(), model.config.d});
  backend.run(Embed{.ids = brought(backend, ids, kept), .table = table, .y = x, .labels = labels});
  return model.backbone.forward(backend, model.config, std::move(x), rows, state, saved);
}
Tensor logits_of(Backend& backend, View head, View hidden) {
  Tensor logits(backend, DType::f32, {hidden.rows(), head.rows()});
  backend.run(Gemm{.a = hidden, .b = head, .c = logits, .tb = true});
  return logits;
}

}  // namespace

Tensor hidden(Backend& backend, const Model& model, View ids, const Rows& rows, State* state,
              Saved* saved) {
  return hidden(backend, model, model.embedding, model.labels, ids, rows, state, saved);
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
  return logits_of(backend, head, hidden(backend, model, table, {}, ids, rows, state, nullptr));
}

Tensor step_logits(Backend& backend, const Model& model, const StepTables& tables, View ids,
                   const Rows& rows, State* state) {
  return step_logits(backend, model, tables, ids, rows, state, {0, model.config.vocab},
                     {0, model.config.predicted()});
}

std::vector<Softmax> softmaxes(const Config& config) {
  if (config.audio.rate == 0) return {{0, config.vocab}};
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

Tensor class_logits(Backend& backend, const Model& model, View hidden, const Rows& rows,
                    State* state, Tensor* pooled) {
  const int64_t m = rows.finished();
  Tensor features(backend, DType::f32, {m, model.config.d});
  backend.run(Pool{.x = hidden,
                   .y = features,
                   .state = state ? state->pool.view() : View{},
                   .rows = &rows,
                   .pooling = model.config.pooling});
  Tensor logits(backend, DType::f32, {m, static_cast<int64_t>(model.config.labels.size())});
  if (m > 0)
    backend.run(
        Gemm{.a = features, .b = model.score, .c = logits, .bias = model.score_bias, .tb = true});
  if (pooled) *pooled = std::move(features);
  return logits;
}

BatchLoss batch_loss(Backend& backend, const Model& model, View ids, const Rows& rows, View targets,
                     View class_weights, Model* grad, Tensor* logits, double scale) {
  const Tensor total(backend, DType::f64, {1});
  backend.fill(total, 0);
  BatchLoss result;
  result.weight =
      add_loss(backend, model, ids, rows, targets, class_weights, total, grad, logits, scale);
  std::vector<std::byte> kept;
  result.sum = *on_host(backend, total, kept).as<double>();
  return result;
}

double add_loss(Backend& backend, const Model& model, View ids, const Rows& rows, View targets,
                View class_weights, View total, Model* grad, Tensor* logits_out, double scale) {
  const bool lm = model.config.objective == Objective::lm;
  COIL_ASSERT(targets.device.kind ==
              Device::Kind::cpu);  // the mean needs the number of counted targets first
  double weight = 0;
  for (int64_t i = 0; i < targets.rows(); ++i) {
    const int32_t target = *targets.row<int32_t>(i);
    if (target < 0) continue;
    const bool weighted =
        class_weights && target < class_weights.rows();  // a target too high: the op refuses it
    weight += weighted ? *class_weights.row<float>(target) : 1.0;
  }
  if (!(weight > 0)) grad = nullptr;

  Saved saved;
  const DType act = activations(backend, model.backbone);
  Tensor kept_ids, kept_weights;
  ids = brought(backend, ids, kept_ids);
  Tensor h = hidden(backend, model, ids, rows, nullptr, grad ? &saved : nullptr);  // (t, d)
  Tensor pooled;                                                                   // (m, d)
  Tensor logits = lm ? lm_logits(backend, model, h)  // (t, v) or (m, classes)
                     : class_logits(backend, model, h, rows, nullptr, grad ? &pooled : nullptr);
  if (!lm) h = Tensor();

  Tensor loss(backend, DType::f32, {logits.view().rows()});
  Tensor dlogits;  // in place unless the caller wants the logits, or products want another type
  const bool in_place = !logits_out && (!lm || act == DType::f32);
  if (grad && !in_place)
    dlogits = Tensor(backend, lm ? act : DType::f32, {logits.view().rows(), logits.view().cols()});
  const View gradient = !grad ? View{} : (in_place ? logits : dlogits).view();
  const View weights = brought(backend, class_weights, kept_weights);
  const auto columns = [](const View& all, const Softmax& part) {
    return all ? all.columns(part.begin, part.count) : all;
  };
  const std::vector<Softmax> parts =
      lm ? softmaxes(model.config) : std::vector<Softmax>{{0, logits.view().cols()}};
  for (const Softmax& part : parts) {
    std::vector<int32_t> inside;
    View own = targets;
    if (parts.size() > 1) {
      inside = targets_in(part, targets);
      own = host_view(inside.data(), DType::i32, {targets.rows()});
    }
    Tensor kept_targets;
    backend.run(CrossEntropy{.logits = columns(logits, part),
                             .targets = brought(backend, own, kept_targets),
                             .loss = loss,
                             .dlogits = columns(gradient, part),
                             .class_weights = weights,
                             .total = total,
                             .scale = grad ? static_cast<float>(scale / weight) : 1.0f});
  }
  loss = Tensor();
  if (grad && in_place) dlogits = std::move(logits);
  if (logits_out) *logits_out = std::move(logits);
  if (!grad) return weight;

  logits = Tensor();
  Tensor dh(backend, act, {rows.total(), model.config.d});
  if (lm) {
    const Tensor& dweight = model.config.tie ? grad->embedding : grad->lm_head;
    const int64_t v = model.config.predicted();
    linear_backward(backend, dlogits, h, model.output().view().slice(0, v),
                    dweight.view().slice(0, v), dh);
    h = Tensor();
  } else {
    Tensor dpooled(backend, DType::f32, {rows.finished(), model.config.d});
    linear_backward(backend, dlogits, pooled, model.score, grad->score, dpooled);
    backend.run(SumRows{.x = dlogits, .out = grad->score_bias});
    backend.run(
        PoolBackward{.dy = dpooled, .dx = dh, .rows = &rows, .pooling = model.config.pooling});
  }
  dlogits = Tensor();
  Tensor dx =
      model.backbone.backward(backend, model.config, saved, rows, dh, nullptr, grad->backbone);
  backend.run(
      EmbedBackward{.ids = ids, .dy = dx, .dtable = grad->embedding, .dlabels = grad->labels});
  return weight;
}

}  // namespace coil
