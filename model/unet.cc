// The coarser stage inside another: forward, and under it backward, read bottom-up with the same
// names under a `d` prefix. Only pieces that finish a coarse step run it, so that in decoding it
// runs when its turn comes.
#include "model/unet.h"

#include <utility>

#include "kernels/error.h"

namespace coil {
namespace {

// Slots of the coarser stage whose state passes through unread and unwritten: pieces that finish no
// coarse step, of sequences that have finished some.
struct Passing {
  std::vector<Piece> pieces;  // each a fork, or with from or to -1
  std::vector<uint8_t> read;  // slots that the coarser stage itself reads
};
Passing passing(const Rows& rows, int64_t p) {
  Passing found;
  found.read.assign(rows.slots(), 0);
  for (const Piece& piece : rows.pieces()) {
    const int64_t before = piece.position / p;
    const bool due = (piece.position + piece.length) / p > before;
    if (due && before > 0 && piece.from >= 0) found.read[piece.from] = 1;
    if (!due && before > 0 && piece.from != piece.to) found.pieces.push_back(piece);
  }
  return found;
}

void hand_on(Backend& backend, const Rows& rows, int64_t p, const State& state) {
  for (const Piece& piece : passing(rows, p).pieces) {
    if (piece.to < 0) continue;
    for (const auto& [name, view] : state.tensors()) {
      const View to = view.slice(piece.to, 1);
      if (piece.from >= 0)
        backend.copy(view.slice(piece.from, 1), to);
      else
        backend.fill(to, 0);
    }
  }
}

// Gradients of a state that several pieces start from add up.
void hand_back(Backend& backend, const Rows& rows, int64_t p, const State& dstate) {
  Passing all = passing(rows, p);
  for (const Piece& piece : all.pieces) {
    if (piece.from < 0) continue;
    const bool first = !std::exchange(all.read[piece.from], 1);
    for (const auto& [name, view] : dstate.tensors()) {
      const View from = view.slice(piece.from, 1);
      if (piece.to < 0) {
        if (first) backend.fill(from, 0);
        continue;
      }
      const View to = view.slice(piece.to, 1);
      if (first)
        backend.copy(to, from);
      else
        backend.run(SumRows{.x = to.reshape({1, to.count()}), .out = from.reshape({to.count()})});
    }
  }
}

}  // namespace

std::vector<Param> declare(InnerStage& inner, int64_t outer_d, const std::string& base,
                           int64_t depth) {
  const int64_t d = inner.config.d, coarse = inner.p * outer_d;
  const std::string prefix = fmt::format("{}stages.{}.", base, depth);
  std::vector<Param> params;
  const auto add = [&](Tensor& tensor, const char* name, std::vector<int64_t> shape) {
    const bool matrix = shape.size() > 1;
    params.push_back({.info = {.name = prefix + name,
                               .shape = std::move(shape),
                               .init = matrix ? Init::linear : Init::zeros,
                               .decay = matrix,
                               .matrix = matrix},
                      .tensor = &tensor});
  };
  add(inner.down, "down.weight", {d, coarse});
  add(inner.down_bias, "down.bias", {d});
  std::vector<Param> stage = declare(inner.config, inner.stage, base, depth);
  params.insert(params.end(), stage.begin(), stage.end());
  add(inner.up, "up.weight", {coarse, d});
  add(inner.up_bias, "up.bias", {coarse});
  return params;
}

Tensor forward(Backend& backend, const InnerStage& inner, DType act, Tensor x, const Rows& rows,
               InnerState* state, InnerSaved* saved) {
  const int64_t p = inner.p, coarse = p * x.view().cols(), d = inner.config.d;
  const Rows& coarse_rows = rows.pooled(p).rows;
  const int64_t m = coarse_rows.total();
  Tensor steps(backend, act, {m, coarse});  // p steps of x a row
  backend.run(Downsample{
      .x = x, .y = steps, .state = state ? state->rest.view() : View{}, .rows = &rows, .p = p});

  Tensor lifted;  // (m, coarse), what p steps get from the coarse one before them
  if (m > 0) {
    Tensor u(backend, DType::f32, {m, d});
    backend.run(Gemm{.a = steps, .b = inner.down, .c = u, .bias = inner.down_bias, .tb = true});
    if (saved)
      saved->steps = std::move(steps);
    else
      steps = Tensor();
    Tensor y =  // (m, d)
        inner.stage.forward(backend, inner.config, std::move(u), coarse_rows,
                            state ? &state->stage : nullptr, saved ? &saved->stage : nullptr);
    lifted = Tensor(backend, act, {m, coarse});
    backend.run(Gemm{.a = y, .b = inner.up, .c = lifted, .bias = inner.up_bias, .tb = true});
    if (saved) saved->y = std::move(y);
  } else {
    lifted = std::move(steps);
  }
  if (state) hand_on(backend, rows, p, state->stage);
  backend.run(Upsample{.x = lifted,
                       .residual = x,
                       .y = x,
                       .state = state ? state->next.view() : View{},
                       .rows = &rows,
                       .p = p});
  return x;
}

void backward(Backend& backend, const InnerStage& inner, DType act, InnerSaved& saved,
              const Rows& rows, const Tensor& dx, InnerState* dstate, InnerStage& grad) {
  const int64_t p = inner.p, coarse = p * dx.view().cols(), d = inner.config.d;
  const Rows& coarse_rows = rows.pooled(p).rows;
  const int64_t m = coarse_rows.total();
  Tensor dlifted(backend, act, {m, coarse});  // then that of steps
  backend.run(UpsampleBackward{.dy = dx,
                               .dx = dlifted,
                               .dstate = dstate ? dstate->next.view() : View{},
                               .rows = &rows,
                               .p = p});
  if (m > 0) {
    backend.run(Gemm{.a = dlifted, .b = saved.y, .c = grad.up, .ta = true, .beta = 1});
    backend.run(SumRows{.x = dlifted, .out = grad.up_bias});
    Tensor dy(backend, act, {m, d});
    backend.run(Gemm{.a = dlifted, .b = inner.up, .c = dy});

    Tensor du = inner.stage.backward(backend, inner.config, saved.stage, coarse_rows, dy,
                                     dstate ? &dstate->stage : nullptr, grad.stage);  // (m, d)
    if (act != DType::f32) {
      backend.copy(du, dy);
      du = std::move(dy);
    }
    backend.run(Gemm{.a = du, .b = saved.steps, .c = grad.down, .ta = true, .beta = 1});
    backend.run(SumRows{.x = du, .out = grad.down_bias});
    backend.run(Gemm{.a = du, .b = inner.down, .c = dlifted});
  }
  if (dstate) hand_back(backend, rows, p, dstate->stage);
  backend.run(DownsampleBackward{.dy = dlifted,
                                 .dresidual = dx,
                                 .dx = dx,
                                 .dstate = dstate ? dstate->rest.view() : View{},
                                 .rows = &rows,
                                 .p = p});
}

}  // namespace coil
