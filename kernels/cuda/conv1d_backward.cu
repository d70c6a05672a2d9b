// Gradients of the causal convolution (conv1d.cu).
//   dpre = dy silu'(pre),  dx[t] = sum_k weight[k] dpre[t+w-1-k],
//   dweight[k] += sum_t dpre[t] x[t-w+1+k],  dbias += sum_t dpre[t]
// dx of a row is finished w - 1 steps later; the w - 1 unfinished rows wait in registers. So a tile
// writes dx of its rows and for that walks w - 1 steps on into the next one. Its share of dweight
// and dbias is from the step on at which it begins to write: steps w - 1 to the end of its walk,
// and all of them where the piece begins. Partial sums of a block, then of all blocks, are added in
// a fixed order.
//
// Bytes: x and dy are read and dx written once, 6 an element in bf16, but for the overlap of tiles,
// which are as long as the card stays full. An element takes 27 operations with four taps; at
// 3.9 TB/s that is half of what a multiprocessor can issue, so memory is the limit.
//
// dstate is read by the first kernel and written by the last: `from` = `to` is fine.
#include <vector>

#include "kernels/cuda/conv1d.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kAhead = 4;                       // rows in flight, of x and dy each
constexpr int kGroups = 32;                     // of channels in a block,
constexpr int kLanes = kConvThreads / kGroups;  // each in this many threads at different times
constexpr int kBlocks = 4;  // of a multiprocessor: 128 registers a thread, enough for four taps

template <class T>
struct Backward : ConvOperands<T> {
  const T* dy;
  T* dx;
  int64_t dy_stride, dx_stride;
  float* dstate;  // (s,w-1,c) or null
  int64_t dslot_stride, dstate_stride;
  float* partial;  // (blocks of one group of channels, w + 1, c): their dweight | dbias
  int lanes, slices;

  __device__ float* dstate_at(int64_t slot, int64_t k, int64_t channel) const {
    return dstate + slot * dslot_stride + k * dstate_stride + channel;
  }
};

// d silu(x) / dx = sigmoid + x sigmoid (1 - sigmoid)
__device__ float silu_slope(float x, float gate) {
  const float part = sigmoid(x, gate);
  return fmaf(x * part, 1 - part, part);
}

// What a thread keeps along its walk.
template <int kWidth, int kTaps>
struct Walk {
  float taps[kTaps][kWidth], bias[kWidth];
  float kept[kTaps][kWidth], open[kTaps][kWidth];  // the last inputs, the next rows of dx
  float dpre[kWidth];
  float dtaps[kTaps][kWidth] = {}, dbias[kWidth] = {};  // of all its tiles

  template <class T>
  __device__ void take(const Words<T, kWidth>& x, const Words<T, kWidth>& dy) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) kept[kTaps - 1][j] = x.at(j), dpre[j] = dy.at(j);
  }
  // The step taken; open[0] is finished then.
  __device__ void step(float gate, bool counts) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      dpre[j] *= silu_slope(sum_at(taps, kept, bias[j], j), gate);
#pragma unroll
      for (int k = 0; k + 1 < kTaps; ++k) open[k][j] = fmaf(dpre[j], taps[k][j], open[k][j]);
      open[kTaps - 1][j] = dpre[j] * taps[kTaps - 1][j];
    }
    if (!counts) return;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      dbias[j] += dpre[j];
#pragma unroll
      for (int k = 0; k < kTaps; ++k) dtaps[k][j] = fmaf(dpre[j], kept[k][j], dtaps[k][j]);
    }
  }
};

template <class T, int kWidth, int kTaps>
__device__ void walk_tile(const Backward<T>& op, int tile, int64_t channel,
                          Walk<kWidth, kTaps>& walk) {
  constexpr int kKept = kTaps - 1;
  const auto [piece, begin, end] = span_of(op, tile);
  const float gate = gate_of(op.silu);
  const int64_t direction = op.reverse ? -1 : 1;
  const int64_t x_step = direction * op.x_stride, dy_step = direction * op.dy_stride;
  const int64_t dx_step = direction * op.dx_stride;
  const int64_t reach = min(end + kKept, piece.length);
  const T* x = op.x_at(piece, begin, channel);
  const T* dy = op.dy + op.row(piece, begin) * op.dy_stride + channel;
  T* dx = op.dx + op.row(piece, begin) * op.dx_stride + channel;

  Words<T, kWidth> in[kAhead], gradient[kAhead];
  const auto ask = [&](int a) { in[a].load_constant(x), gradient[a].load_constant(dy); };
  const auto give = [&] {
    Words<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out.set(j, walk.open[0][j]);
    out.store(dx);
    dx += dx_step;
    shift(walk.kept);
    shift(walk.open);
  };
  // The first w - 1 steps finish no row of this tile.
  const int early = static_cast<int>(min(reach - begin, int64_t{kKept}));
  int left = static_cast<int>(reach - begin) - early;
  Words<T, kWidth> early_x[kTaps], early_dy[kTaps];
#pragma unroll
  for (int a = 0; a < kKept; ++a)
    if (a < early) {
      early_x[a].load_constant(x), early_dy[a].load_constant(dy);
      x += x_step, dy += dy_step;
    }
#pragma unroll
  for (int a = 0; a < kAhead; ++a, x += x_step, dy += dy_step)
    if (a < left) ask(a);
  load_kept(op, piece, begin, channel, walk.kept);
#pragma unroll
  for (int k = 0; k < kTaps; ++k)
#pragma unroll
    for (int j = 0; j < kWidth; ++j) walk.open[k][j] = 0;
#pragma unroll
  for (int a = 0; a < kKept; ++a)
    if (a < early) {
      walk.take(early_x[a], early_dy[a]);
      walk.step(gate, begin == 0);
      shift(walk.kept);
      shift(walk.open);
    }
  for (; left >= kAhead; left -= kAhead) {
    // Past the end the last row again: no branch between loads.
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      walk.take(in[a], gradient[a]);
      if (a + kAhead == left) x -= x_step, dy -= dy_step;
      ask(a);
      if (a + kAhead < left) x += x_step, dy += dy_step;
      walk.step(gate, true);
      give();
    }
  }
#pragma unroll
  for (int a = 0; a + 1 < kAhead; ++a)
    if (a < left) {
      walk.take(in[a], gradient[a]);
      walk.step(gate, true);
      give();
    }

    // Only at the end of the piece are there rows left: those that its final state holds.
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int64_t step = reach - kKept + k;
    if (step < begin || step >= end) continue;
    Words<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      out.set(j, walk.open[k][j] +
                     (op.dstate && piece.to >= 0 ? *op.dstate_at(piece.to, k, channel + j) : 0.f));
    out.store(op.dx + op.row(piece, step) * op.dx_stride + channel);
  }
}

// A block takes kGroups groups of channels and kLanes lanes, each of which takes every so many
// tiles; `slices` blocks take all channels.
template <class T, int kWidth, int kTaps>
__global__ void __launch_bounds__(kConvThreads, kTaps > 4 ? 1 : kBlocks)
    conv_backward_kernel(const Backward<T> op) {
  take_turn();
  const int group = threadIdx.x % kGroups, lane = threadIdx.x / kGroups;
  const int64_t channel = (static_cast<int64_t>(blockIdx.x % op.slices) * kGroups + group) * kWidth;
  const bool active = channel < op.c;
  Walk<kWidth, kTaps> walk;
  if (active) load_taps(op, channel, walk.taps, walk.bias);
  for (int tile = blockIdx.x / op.slices * kLanes + lane; active && tile < op.tiles;
       tile += op.lanes)
    walk_tile(op, tile, channel, walk);

  __shared__ float sums[kLanes][kGroups][kWidth + 1];  // + 1: neighbours in other banks
  float* const to = op.partial + blockIdx.x / op.slices * int64_t{kTaps + 1} * op.c + channel;
#pragma unroll
  for (int k = 0; k <= kTaps; ++k) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kWidth; ++j)
      sums[lane][group][j] = k < kTaps ? walk.dtaps[k < kTaps ? k : 0][j] : walk.dbias[j];
    __syncthreads();
    if (lane > 0 || !active) continue;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      float sum = sums[0][group][j];
#pragma unroll
      for (int l = 1; l < kLanes; ++l) sum += sums[l][group][j];
      to[k * op.c + j] = sum;
    }
  }
}

// dweight(c,w) and dbias(c) += the partials (count, w + 1, c). A block takes kColumns columns of
// the partials, kSlices threads each; the order of the sum depends on `count` only.
constexpr int kColumns = 32, kSlices = 32;
__global__ void add_partials_kernel(const float* partial, int64_t count, int64_t c, int w,
                                    float* dweight, int64_t dweight_stride, float* dbias) {
  take_turn();
  __shared__ float sums[kSlices][kColumns];
  const int64_t column = blockIdx.x * static_cast<int64_t>(kColumns) + threadIdx.x;
  const int64_t columns = (w + 1) * c;
  float sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t i = threadIdx.y; i < count; i += kSlices) sum += partial[i * columns + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
  for (int k = 1; k < kSlices; ++k) sum += sums[k][threadIdx.x];
  const int64_t k = column / c, channel = column % c;
  if (k < w)
    dweight[channel * dweight_stride + k] += sum;
  else if (dbias)
    dbias[channel] += sum;
}

// sum[i] += the gradient of input i of the state that the piece starts from, i = 0 … w - 2.
template <class T>
__device__ void add_initial(const Backward<T>& op, const Piece& piece, int64_t channel,
                            float (&sum)[kMostTaps]) {
  const int kept = op.w - 1, steps = static_cast<int>(min(piece.length, int64_t{kept}));
  const float* const taps = op.weight + channel * op.weight_stride;
  float input[2 * kMostTaps];  // those of the state, then the first steps'
  for (int k = 0; k < kept; ++k) input[k] = *op.state_at(piece.from, k, channel);
  for (int s = 0; s < steps; ++s) input[kept + s] = to_float(*op.x_at(piece, s, channel));
  for (int s = 0; s < steps; ++s) {
    float dpre = to_float(op.dy[op.row(piece, s) * op.dy_stride + channel]);
    float pre = op.bias ? op.bias[channel] : 0.f;
    for (int k = 0; k < op.w; ++k) pre = fmaf(taps[k], input[s + k], pre);
    dpre *= silu_slope(pre, gate_of(op.silu));
    for (int k = 0; s + k < kept; ++k) sum[s + k] = fmaf(dpre, taps[k], sum[s + k]);
  }
  if (piece.to < 0) return;  // a short piece hands inputs of its initial state on to the final one
  for (int i = steps; i < kept; ++i) sum[i] += *op.dstate_at(piece.to, i - steps, channel);
}

// dstate of the states that pieces start from: a thread for each piece and channel or, where pieces
// share a state (`shared`), for each slot and channel, which adds up its readers in order.
template <class T>
__global__ void __launch_bounds__(kConvThreads)
    initial_state_kernel(const Backward<T> op, int64_t count, bool shared) {
  take_turn();
  const int64_t i = blockIdx.x * static_cast<int64_t>(kConvThreads) + threadIdx.x;
  if (i >= count * op.c) return;
  const int64_t item = i / op.c, channel = i % op.c;
  const int64_t slot = shared ? item : op.pieces[item].from;
  if (slot < 0) return;
  float sum[kMostTaps] = {};
  bool read = false;
  for (int64_t p = shared ? 0 : item; p < (shared ? op.pieces_count : item + 1); ++p) {
    if (op.pieces[p].from != slot) continue;
    add_initial(op, op.pieces[p], channel, sum);
    read = true;
  }
  for (int k = 0; k < op.w - 1 && read; ++k) *op.dstate_at(slot, k, channel) = sum[k];
}

}  // namespace

void CudaBackend::run(const Conv1dBackward& op) {
  const char* const name = "conv1d backward";
  check_operands(name, op, device());
  const int64_t t = op.rows->total(), c = op.x.cols(), w = op.weight.cols();
  expect(name, "dy", op.dy, op.x.dtype, {t, c});
  expect(name, "dx", op.dx, op.x.dtype, {t, c});
  check(op.dx.data != op.dy.data, "{}: dx is dy, expected another tensor", name);
  check(op.dx.data != op.x.data, "{}: dx is x, expected another tensor", name);
  expect(name, "dweight", op.dweight, DType::f32, {c, w});
  expect_if(name, "dbias", op.dbias, DType::f32, {c});
  expect_here(name, "dy", op.dy, device());
  expect_here(name, "dx", op.dx, device());
  expect_here(name, "dweight", op.dweight, device());
  expect_here(name, "dbias", op.dbias, device());
  const auto pieces = op.rows->pieces();
  std::vector<uint8_t> read(op.rows->slots(), 0);
  bool reads = false, shared = false;
  for (const Piece& piece : pieces) {
    if (piece.from < 0) continue;
    reads = true;
    shared = shared || read[piece.from];
    read[piece.from] = 1;
  }
  if (op.state || reads) check_state(name, "state", op.state, *op.rows, w, c, device());
  if (op.dstate) check_state(name, "dstate", op.dstate, *op.rows, w, c, device());
  if (t == 0 || c == 0) return;

  with_type(name, op.x, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = 4;  // 8 bytes of bf16: twice as many do not leave registers for the rest
    const bool wide = c % kWide == 0 && aligned(op.x, kWide) && aligned(op.dy, kWide) &&
                      aligned(op.dx, kWide) && aligned(op.state, kWide);
    const int64_t slices = div_up(wide ? c / kWide : c, kGroups);
    // As many lanes as fill the card; one tile each, if sequences are long enough.
    const int64_t most = std::max(int64_t{1}, processors_ * kBlocks / slices) * kLanes;
    Backward<T> backward;
    set_operands(backward, op, std::max(kShortestTile, div_up(div_up(t, most), kAhead) * kAhead));
    backward.dy = op.dy.as<T>();
    backward.dx = op.dx.as<T>();
    backward.dy_stride = op.dy.stride[0];
    backward.dx_stride = op.dx.stride[0];
    backward.dstate = op.dstate.as<float>();
    backward.dslot_stride = op.dstate.stride[0];
    backward.dstate_stride = op.dstate.stride[1];
    const int64_t blocks = div_up(std::min<int64_t>(backward.tiles, most), kLanes);
    backward.lanes = static_cast<int>(blocks * kLanes);
    backward.slices = static_cast<int>(slices);
    const Tensor partial(*this, DType::f32, {blocks, w + 1, c});
    backward.partial = partial.as<float>();
    const auto grid = static_cast<unsigned>(blocks * slices);
    with_taps(w, [&](auto taps) {
      if (wide)
        launch_in_turn(conv_backward_kernel<T, kWide, taps()>, grid, kConvThreads, 0, stream_,
                       backward);
      else
        launch_in_turn(conv_backward_kernel<T, 1, taps()>, grid, kConvThreads, 0, stream_,
                       backward);
    });
    check_launch(name);
    launch_in_turn(add_partials_kernel, static_cast<unsigned>(div_up((w + 1) * c, kColumns)),
                   dim3(kColumns, kSlices), 0, stream_, backward.partial, blocks, c,
                   static_cast<int>(w), op.dweight.as<float>(), op.dweight.stride[0],
                   op.dbias.as<float>());
    check_launch(name);
    if (!op.dstate || !reads || w == 1) return;
    const int64_t count = shared ? op.rows->slots() : backward.pieces_count;
    launch_in_turn(initial_state_kernel<T>, static_cast<unsigned>(div_up(count * c, kConvThreads)),
                   kConvThreads, 0, stream_, backward, count, shared);
    check_launch(name);
  });
}

}  // namespace coil
