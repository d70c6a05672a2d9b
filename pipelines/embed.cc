#include "pipelines/embed.h"

#include <algorithm>

#include "kernels/error.h"
#include "pipelines/engine.h"

namespace coil {
namespace {

std::vector<float> values_on_host(Backend& backend, View x) {
  Tensor wide;  // bf16 of a GPU
  if (x.dtype != DType::f32) {
    wide = Tensor(backend, DType::f32, {x.rows(), x.cols()});
    backend.copy(x, wide);
    x = wide;
  }
  std::vector<std::byte> kept;
  const View host = on_host(backend, x, kept);
  return {host.as<float>(), host.as<float>() + host.count()};
}

// Rows (t, d) that a batch reads, or one (m, d) of each sequence that ends in it.
std::vector<float> vectors_of(Backend& backend, const Model& model, const EmbedOptions& options,
                              Stream::Batch& batch, State& state) {
  const Rows rows(backend, batch.pieces);
  const View ids = host_view(batch.ids.data(), DType::i32, {rows.total()});
  const Tensor h = hidden(backend, model, ids, rows, &state);  // (t, d)
  if (options.per_position) return values_on_host(backend, h);
  const Tensor pooled(backend, DType::f32, {rows.finished(), model.config.d});  // (m, d)
  backend.run(
      Pool{.x = h, .y = pooled, .state = state.pool, .rows = &rows, .pooling = options.pooling});
  return values_on_host(backend, pooled);
}

}  // namespace

void keep_layers(Model& model, int64_t layers, const std::string& where) {
  check(!model.backbone.inner, "{}: a U-Net, whose stages are no layers one after another", where);
  const auto all = static_cast<int64_t>(model.backbone.layers.size());
  check(layers >= 1 && layers <= all, "{}: layer {}, expected 1 to {}", where, layers, all);
  model.backbone.layers.erase(model.backbone.layers.begin() + layers, model.backbone.layers.end());
  model.config.layers.resize(static_cast<size_t>(layers));
}

void embed(Backend& backend, const Model& model, Source& source, const EmbedOptions& options,
           const std::function<void(const Embedding&)>& emit,
           const std::function<void(const Stream&)>& progress) {
  COIL_ASSERT(!options.per_position || options.stream.strands == Strands::forward);
  const FrontEnd front(model.config);
  const int64_t d = model.config.d, step = front.step();
  const auto compute = [&](Backend& own, Stream::Batch& batch, State& state) {
    return vectors_of(own, model, options, batch, state);
  };
  // A unit's values: the sum over its strands, or the vectors that are not emitted yet.
  const auto add = [&](const Stream::Batch& batch, const std::vector<float>& vectors) {
    const float* row = vectors.data();
    for (size_t i = 0; i < batch.pieces.size(); i++) {
      const Piece& piece = batch.pieces[i];
      std::vector<double>& values = batch.units[i]->values;
      if (options.per_position) {
        // Of a sample of two codes, the state that has read both.
        for (int64_t r = 0; r < piece.length; r++, row += d)
          if (const int64_t code = piece.position + r - front.prefix();
              (code + 1) % step == 0 && code >= 0)
            values.insert(values.end(), row, row + d);
      } else if (piece.last) {
        values.resize(static_cast<size_t>(d));
        for (int64_t j = 0; j < d; j++) values[j] += row[j];
        row += d;
      }
    }
  };
  Stream::Unit unit;
  std::vector<float> values;
  int64_t emitted = 0;  // positions of the front unit
  const auto give = [&](const Stream::Unit& from, int64_t begin, int64_t end, bool last,
                        double scale) {
    values.clear();
    for (const double value : from.values) values.push_back(static_cast<float>(value * scale));
    emit({.name = from.name, .begin = begin, .end = end, .last = last, .values = values});
  };
  const auto turn = [&](Stream& stream) {
    while (Stream::Unit* first = stream.front()) {
      const bool done = stream.pop(unit);
      const Stream::Unit& now = done ? unit : *first;
      if (!options.per_position) {
        if (!done) break;
        give(now, now.begin, now.end, true, 1. / now.strands);
        continue;
      }
      const auto count = static_cast<int64_t>(now.values.size()) / d;
      const int64_t begin = (done ? now.begin : now.begin / step) + emitted;
      if (count > 0 || done) give(now, begin, begin + count, done, 1);
      emitted = done ? 0 : emitted + count;
      if (done) continue;
      first->values.clear();
      break;
    }
    if (progress) progress(stream);
  };
  run_stream(backend, model, source, options.stream, {compute, add, turn});
}

}  // namespace coil
