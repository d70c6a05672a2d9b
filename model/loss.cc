// A batch goes through in parts: whole sequences together, or one long sequence, in chunks. A part
// of one chunk is the plain case: forward, head, backward, and no state.
#include "model/loss.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "kernels/error.h"

namespace coil {
namespace {

// dlogits → dhidden, times `share`, for logits = hidden W^T.
void linear_backward(Backend& backend, const View& dlogits, const View& weight, const View& dhidden,
                     double share = 1) {
  backend.run(Gemm{.a = dlogits, .b = weight, .c = dhidden, .alpha = static_cast<float>(share)});
}
// dW += dlogits^T hidden, times `share`.
void add_weight_gradient(Backend& backend, const View& dlogits, const View& hidden,
                         const View& dweight, float share = 1) {
  backend.run(Gemm{.a = dlogits, .b = hidden, .c = dweight, .ta = true, .alpha = share, .beta = 1});
}

void copy_slot(Backend& backend, const State& from, int64_t slot, const State& to, int64_t other) {
  const auto sources = from.tensors(), targets = to.tensors();
  for (size_t i = 0; i < sources.size(); ++i)
    backend.copy(sources[i].second.slice(slot, 1), targets[i].second.slice(other, 1));
}

// Whether states in the middle of what goes through can be had. On a CPU it saves nothing.
bool has_marks(const Backend& backend, const Model& model) {
  const auto mamba = [](const Layer& layer) {
    return std::holds_alternative<Mamba1Weights>(layer.mixer);
  };
  const Backbone& stack = model.backbone;
  return backend.device().kind != Device::Kind::cpu && !stack.inner &&
         std::ranges::all_of(stack.layers, mamba);
}

struct Common {  // what the parts of a batch share
  Backend& backend;
  const Model& model;
  View class_weights, total;
  Model* grad;
  Tensor* logits;
  float scale;  // of the gradient of the sum
  bool truncate;

  bool language() const { return model.config.language(); }
  int strands() const { return !language() && model.config.equivariant ? 2 : 1; }  // of an answer
};

// Adds the losses to the total. Returns the logits' gradient: in their place unless the caller
// wants them, or products want another type.
Tensor cross_entropy(const Common& all, Tensor logits, View targets) {
  const DType act = all.language() ? activations(all.backend, all.model.backbone) : DType::f32;
  const bool in_place = !all.logits && act == DType::f32;
  Tensor dlogits;
  if (all.grad && !in_place)
    dlogits = Tensor(all.backend, act, {logits.view().rows(), logits.view().cols()});
  const View gradient = !all.grad ? View{} : (in_place ? logits : dlogits).view();
  const Tensor loss(all.backend, DType::f32, {logits.view().rows()});
  const auto columns = [](const View& of, const Softmax& part) {
    return of ? of.columns(part.begin, part.count) : of;
  };
  const std::vector<Softmax> parts = all.language()
                                         ? softmaxes(all.model.config)
                                         : std::vector<Softmax>{{0, logits.view().cols()}};
  for (const Softmax& part : parts) {
    std::vector<int32_t> inside;
    View own = targets;
    if (parts.size() > 1) {
      inside = targets_in(part, targets);
      own = host_view(inside.data(), DType::i32, {targets.rows()});
    }
    Tensor kept_targets;
    all.backend.run(CrossEntropy{.logits = columns(logits, part),
                                 .targets = brought(all.backend, own, kept_targets),
                                 .loss = loss,
                                 .dlogits = columns(gradient, part),
                                 .class_weights = all.class_weights,
                                 .total = all.total,
                                 .scale = all.scale});
  }
  if (all.grad && in_place) dlogits = std::move(logits);
  if (all.logits) *all.logits = std::move(logits);
  return dlogits;
}

// Whole sequences together, or one in chunks. Two slots hold the states before and behind the
// chunks at hand, two their gradients, in turn: a chunk reads where the one before it wrote.
class Part {
 public:
  Part(const Common& all, View ids, View targets, const Rows& rows, int64_t chunk)
      : all_(all),
        backend_(all.backend),
        model_(all.model),
        ids_(ids),
        targets_(targets),
        rows_(rows),
        // Truncated gradients end where it was asked for.
        chunks_(chunks_of(all.backend, all.model, rows.total(), chunk, all.truncate)),
        count_((rows.total() + chunks_.length - 1) / chunks_.length),
        by_layer_(rows.total() > chunk) {}

  void add() {
    // Where no gradient comes back from a later chunk, each is done with when its turn comes.
    const bool mean = model_.config.pooling == Pooling::mean;
    const bool once = !all_.grad || (all_.truncate && (all_.language() || !mean));
    const bool whole = once && all_.language();
    if (count_ > 1) {
      state_.emplace(backend_, model_.config, 2);
      if (!once) {
        kept_.emplace(backend_, model_.config, static_cast<int32_t>(count_ - 1));
        kept_->pool = Tensor();
        if (!all_.truncate) dstate_.emplace(backend_, model_.config, 2);
      }
    }
    // In runs of nearly one length, so that blocks of memory are of few sizes.
    const int64_t before = count_ - 1, together = chunks_.together;
    const int64_t runs = (before + together - 1) / together;
    const int64_t in_run = runs > 0 ? (before + runs - 1) / runs : 0;
    if (!once && chunks_.tile > 0)  // of whole runs
      keep_starts((std::max<int64_t>(0, before - Chunks::kKept) + in_run - 1) / in_run * in_run);
    int32_t from = -1, to = 0;
    for (int64_t i = 0, n; i < before; i += n) {
      n = whole ? 1 : std::min(in_run, before - i);
      if (!once) mark(i, n, from);
      compute(i, n, from, to, whole);
      if (!once) copy_slot(backend_, *state_, to, *kept_, i + n - 1);
      from = to;
      to = 1 - from;
    }
    if (!once) start(count_ - 1);
    compute(count_ - 1, 1, from, -1, true);
    if (once) return;
    for (int64_t i = count_ - 1; i-- > 0;) {
      to = from;
      from = i == 0 ? -1 : 1 - to;
      if (i > 0) copy_slot(backend_, *kept_, i - 1, *state_, from);
      start(i);
      compute(i, 1, from, to, true);
    }
  }

 private:
  // Room for the states before each tile of chunks `first` … count - 2, the last but one.
  void keep_starts(int64_t first) {
    first_start_ = first;
    const int64_t tiles = (count_ - 1 - first) * (chunks_.length / chunks_.tile);
    const Config& config = model_.config;
    for (size_t layer = 0; layer < state_->layers.size(); ++layer)
      starts_.push_back(Tensor(backend_, DType::f32, {tiles, config.e, config.n}));
  }
  bool has_starts(int64_t i) const {
    return !starts_.empty() && i >= first_start_ && i < count_ - 1;
  }
  // Of chunks i … i + n - 1.
  View starts_of(size_t layer, int64_t i, int64_t n) const {
    const int64_t tiles = chunks_.length / chunks_.tile;
    return starts_[layer].view().slice((i - first_start_) * tiles, n * tiles);
  }
  // From here on the states behind chunks i … i + n - 2, which begin in slot `from`, are kept as
  // the chunks go through together.
  void mark(int64_t i, int64_t n, int32_t from) {
    for (size_t layer = 0; layer < state_->layers.size(); ++layer) {
      auto* const own = std::get_if<Mamba1State>(&state_->layers[layer]);
      if (!own) continue;
      const auto& kept = std::get<Mamba1State>(kept_->layers[layer]);
      own->conv_every = own->ssm_every = chunks_.length;
      own->conv_marks = n > 1 ? kept.conv.view().slice(i, n - 1) : View{};
      own->ssm_marks = n > 1 ? kept.ssm.view().slice(i, n - 1) : View{};
      if (!has_starts(i)) continue;
      const View all = starts_of(layer, i, n), begin = all.slice(0, 1);
      if (from >= 0)
        backend_.copy(own->ssm.view().slice(from, 1), begin);
      else
        backend_.fill(begin, 0);
      own->ssm_every = chunks_.tile;
      own->ssm_marks = all.slice(1, all.rows() - 1);
    }
  }
  // From here on nothing is kept, and forward of chunk i begins at what was.
  void start(int64_t i) {
    if (!state_) return;
    for (size_t layer = 0; layer < state_->layers.size(); ++layer) {
      auto* const own = std::get_if<Mamba1State>(&state_->layers[layer]);
      if (!own) continue;
      own->conv_marks = own->ssm_marks = {};
      own->ssm_every = chunks_.tile;
      own->ssm_starts = has_starts(i) ? starts_of(layer, i, 1) : View{};
    }
  }

  // Chunks i … i + n - 1, in state slots `from` and `to`: forward; where they are `whole`, loss and
  // backward too.
  void compute(int64_t i, int64_t n, int32_t from, int32_t to, bool whole) {
    const int64_t begin = i * chunks_.length,
                  length = std::min(n * chunks_.length, rows_.total() - begin);
    std::optional<Rows> piece;
    if (count_ > 1)
      piece.emplace(backend_, std::vector<Piece>{{.length = length,
                                                  .position = begin,
                                                  .from = from,
                                                  .to = to,
                                                  .last = i + n == count_}});
    const Rows& rows = piece ? *piece : rows_;
    State* const state = state_ ? &*state_ : nullptr;
    Tensor kept_ids;
    const View ids = brought(backend_, ids_.slice(begin, length), kept_ids);
    Saved saved;
    saved.recompute = by_layer_ && count_ == 1;
    Model* const grad = all_.grad;
    Tensor h = hidden(backend_, model_, ids, rows, state, grad && whole ? &saved : nullptr,
                      whole || !all_.language());
    Tensor dh;  // (t, d)
    if (all_.language()) {
      if (whole) dh = next_token(std::move(h), targets_.slice(begin, length));
    } else {
      if (!dlogits_) classify(h, rows, state);
      h = Tensor();
      if (grad && whole) dh = of_pooling(i, length);
    }
    if (!grad || !whole) return;
    const Tensor dx = model_.backbone.backward(backend_, model_.config, saved, rows, dh,
                                               dstate_ ? &*dstate_ : nullptr, grad->backbone);
    backend_.run(
        EmbedBackward{.ids = ids, .dy = dx, .dtable = grad->embedding, .dlabels = grad->labels});
  }

  // h (t, d) → dh (t, d).
  Tensor next_token(Tensor h, View targets) const {
    const Tensor dlogits =  // (t, v)
        cross_entropy(all_, lm_logits(backend_, model_, h), targets);
    Model* const grad = all_.grad;
    if (!grad) return {};
    const int64_t v = model_.config.predicted();
    const Tensor& dweight = model_.config.tie ? grad->embedding : grad->lm_head;
    add_weight_gradient(backend_, dlogits, h, dweight.view().slice(0, v));
    linear_backward(backend_, dlogits, model_.output().view().slice(0, v), h);
    return h;
  }

  // Pools h (t, d); the classes' loss once the sequences have ended.
  void classify(const Tensor& h, const Rows& rows, State* state) {
    Tensor pooled;   // (m, d)
    Tensor logits =  // (m / strands, classes)
        class_logits(backend_, model_, h, rows, state, &pooled, all_.strands());
    if (rows.finished() == 0) return;
    dlogits_ = cross_entropy(all_, std::move(logits), targets_);
    Model* const grad = all_.grad;
    if (!grad) return;
    const int strands = all_.strands();
    for (int strand = 0; strand < strands; ++strand)
      add_weight_gradient(backend_, dlogits_, strand_of(pooled, strand, strands), grad->score,
                          1.0f / static_cast<float>(strands));
    backend_.run(SumRows{.x = dlogits_, .out = grad->score_bias});
  }

  // dh (t, d) of chunk i. A mean over the sequence is the chunks' means, each by its share of it.
  Tensor of_pooling(int64_t i, int64_t length) const {
    const Pooling pooling = model_.config.pooling;
    Tensor dh(backend_, activations(backend_, model_.backbone), {length, model_.config.d});
    if (pooling == Pooling::last && i + 1 < count_) {
      backend_.fill(dh, 0);
      return dh;
    }
    const bool mean = pooling == Pooling::mean;
    const double share =
        mean ? static_cast<double>(length) / static_cast<double>(rows_.total()) : 1;
    const Tensor dpooled(backend_, DType::f32, {rows_.finished(), model_.config.d});
    const int strands = all_.strands();
    for (int strand = 0; strand < strands; ++strand)
      linear_backward(backend_, dlogits_, model_.score, strand_of(dpooled, strand, strands),
                      share / strands);
    std::optional<Rows> alone;
    if (count_ > 1) alone.emplace(Rows::equal(backend_, 1, length));
    backend_.run(PoolBackward{
        .dy = dpooled, .dx = dh, .rows = alone ? &*alone : &rows_, .pooling = pooling});
    return dh;
  }

  const Common& all_;
  Backend& backend_;
  const Model& model_;
  View ids_, targets_;
  const Rows& rows_;
  Chunks chunks_;
  int64_t count_;
  bool by_layer_;                        // longer than a chunk, where it is not cut
  std::optional<State> state_, dstate_;  // two slots
  std::optional<State> kept_;            // behind each chunk but the last
  int64_t first_start_ = 0;              // chunk
  std::vector<Tensor> starts_;           // of each layer (tiles, e, n), or none
  Tensor dlogits_;                       // (m, classes)
};

}  // namespace

Chunks chunks_of(const Backend& backend, const Model& model, int64_t length, int64_t chunk,
                 bool exact) {
  if (model.config.trains_whole()) return {.length = std::max<int64_t>(length, 1)};
  Chunks cut{.length = chunk};
  if (length <= chunk) return cut;
  const auto up = [](int64_t steps, int64_t unit) { return (steps + unit - 1) / unit * unit; };
  const auto even = [&](int64_t most) {  // of as many chunks as there are of `most` steps
    const int64_t count = (length + most - 1) / most;
    return (length + count - 1) / count;
  };
  constexpr int64_t kFewest = 128;  // steps of a tile: fewer slow the first pass down
  constexpr int64_t kUnit = 1024;   // whole tiles of many lengths
  const bool marks = has_marks(backend, model);
  const int64_t tiles = marks ? scan_tiles(backend.device(), model.config.e) : 0;
  const int64_t unit = scan_block(backend.device());
  const int64_t most = tiles > 0 ? chunk / tiles / unit * unit : 0;  // steps of a tile
  if (!exact && most >= kFewest) {
    const int64_t steps = even(most * tiles);
    cut.tile = std::clamp(up((steps + tiles - 1) / tiles, unit), kFewest, most);
    cut.length = cut.tile * tiles;
  } else if (!exact && chunk % kUnit == 0) {
    cut.length = up(even(chunk), kUnit);
  }
  if (marks && cut.length % unit == 0)
    cut.together = std::clamp<int64_t>(std::ssize(model.backbone.layers), 1, Chunks::kKept);
  return cut;
}

double weight_of(View targets, View class_weights) {
  double weight = 0;
  for (int64_t i = 0; i < targets.rows(); ++i) {
    const int32_t target = *targets.row<int32_t>(i);
    if (target < 0) continue;
    const bool weighted =
        class_weights && target < class_weights.rows();  // a target too high: the op refuses it
    weight += weighted ? *class_weights.row<float>(target) : 1.0;
  }
  return weight;
}

double add_loss(Backend& backend, const Model& model, View ids, const Rows& rows, View targets,
                View class_weights, View total, Model* grad, Tensor* logits, double scale,
                const Cut& cut) {
  COIL_ASSERT(targets.device.kind ==
              Device::Kind::cpu);  // the mean needs the number of counted targets first
  const double weight = weight_of(targets, class_weights);
  if (!(weight > 0)) grad = nullptr;
  Tensor kept_weights;
  const Common all{.backend = backend,
                   .model = model,
                   .class_weights = brought(backend, class_weights, kept_weights),
                   .total = total,
                   .grad = grad,
                   .logits = logits,
                   .scale = grad ? static_cast<float>(scale / weight) : 1,
                   .truncate = cut.truncate};

  const int64_t t = rows.total(), chunk = cut.chunk > 0 ? cut.chunk : std::max<int64_t>(t, 1);
  const int64_t most = std::min(cut.rows > 0 ? cut.rows : t, chunk);
  const std::span<const Piece> sequences = rows.pieces();
  const auto unit = static_cast<size_t>(all.strands());  // sequences that stay together
  COIL_ASSERT(sequences.size() % unit == 0);
  if (t <= most || (sequences.size() == unit && t <= chunk)) {
    Part(all, ids, targets, rows, chunk).add();
    return weight;
  }
  COIL_ASSERT(!logits);
  for (size_t begin = 0, end = 0; begin < sequences.size(); begin = end) {
    std::vector<Piece> pieces;
    int64_t length = 0;
    for (; end < sequences.size(); end += unit) {
      const int64_t own = unit * sequences[end].length;
      if (length > 0 && length + own > most) break;
      for (size_t i = 0; i < unit; ++i) {
        pieces.push_back({.begin = length, .length = sequences[end].length});
        length += sequences[end].length;
      }
    }
    const int64_t first = sequences[begin].begin;
    const View own = all.language() ? targets.slice(first, length)
                                    : targets.slice(static_cast<int64_t>(begin / unit),
                                                    static_cast<int64_t>((end - begin) / unit));
    const Rows part(backend, std::move(pieces));
    Part(all, ids.slice(first, length), own, part, chunk).add();
  }
  return weight;
}

BatchLoss batch_loss(Backend& backend, const Model& model, View ids, const Rows& rows, View targets,
                     View class_weights, Model* grad, Tensor* logits, double scale,
                     const Cut& cut) {
  const Tensor total(backend, DType::f64, {1});
  backend.fill(total, 0);
  BatchLoss result;
  result.weight =
      add_loss(backend, model, ids, rows, targets, class_weights, total, grad, logits, scale, cut);
  std::vector<std::byte> kept;
  result.sum = *on_host(backend, total, kept).as<double>();
  return result;
}

}  // namespace coil
