// Causal depthwise convolution along each piece with SiLU, forward and backward.
//   pre[t] = bias + sum_k weight[k] x[t-w+1+k],   y = silu(pre) or pre
//   dpre = dy silu'(pre),  dx[t] = sum_k weight[k] dpre[t+w-1-k],
//   dweight[k] += sum_t dpre[t] x[t-w+1+k],  dbias += sum_t dpre[t]
// A thread takes neighbouring channels, 16 bytes of them where they are aligned, and walks along a
// tile of time with the last w inputs (in backward also the w unfinished dx) in registers. Tiles
// overlap by w - 1 rows, which are read twice and mostly found in L2.
//
// Bytes: forward reads x and writes y, backward reads x and dy and writes dx, each row once but for
// the overlap; 12 (forward) and 25 (backward) operations an element are well below what that takes,
// so memory is the limit.
//
// State in place (`from` = `to`): a piece that is one tile reads and writes its state in one
// thread. Of a longer piece the first tile reads and the last inputs are written by a second
// kernel. In backward dstate is read by the first kernel and written by the second.
#include <algorithm>
#include <vector>

#include "kernels/cuda/device.cuh"

namespace coil {
namespace {

using cuda::bf16;
using cuda::div_up;
using cuda::expect_here;
using cuda::from_float;
using cuda::to_float;

constexpr int kMostTaps = 8;
constexpr int kThreads = 128;
constexpr int kAhead = 4;  // rows asked for before the first of them is used
// Steps of a tile. Longer ones read fewer rows twice, shorter ones give a short batch more threads;
// all are longer than what a state holds.
constexpr int64_t kTiles[] = {64, 32, 16};
static_assert(kTiles[2] >= kMostTaps);
constexpr int64_t kThreadsWanted = 1024;  // of a multiprocessor

// kWidth neighbouring elements, moved in words of up to 16 bytes.
template <class T, int kWidth>
struct Pack {
  static constexpr int kBytes = sizeof(T) * kWidth;
  using Word = std::conditional_t<
      kBytes >= 16, uint4,
      std::conditional_t<kBytes == 8, uint2,
                         std::conditional_t<kBytes == 4, unsigned, unsigned short>>>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));
  Word words[kWords];

  // For memory that nothing writes while the kernel runs.
  __device__ void load_constant(const T* from) {
    for (int i = 0; i < kWords; ++i) words[i] = __ldg(reinterpret_cast<const Word*>(from) + i);
  }
  __device__ void load(const T* from) {
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const Word*>(from)[i];
  }
  __device__ void store(T* to) const {
    for (int i = 0; i < kWords; ++i) reinterpret_cast<Word*>(to)[i] = words[i];
  }
  __device__ float at(int i) const { return to_float(reinterpret_cast<const T*>(words)[i]); }
  __device__ void set(int i, float value) { reinterpret_cast<T*>(words)[i] = from_float<T>(value); }
};

// The batch cut into tiles, and the operands that both directions have.
template <class T>
struct Operands {
  const T* x;  // (t,c)
  int64_t x_stride;
  const float* weight;  // (c,w)
  int64_t weight_stride;
  const float* bias;  // (c) or null
  float* state;       // (s,w-1,c) or null
  int64_t slot_stride, state_stride;
  const Piece* pieces;
  const int32_t* first;  // first tile of each piece; null where every piece is one tile
  int64_t tiles, tile_length, c;
  int piece_count, w;
  bool silu, reverse, packed_taps;  // packed_taps: four taps of a channel are one 16-byte word

  __device__ int64_t row(const Piece& piece, int64_t step) const {
    return piece.begin + (reverse ? piece.length - 1 - step : step);
  }
  __device__ const T* x_at(const Piece& piece, int64_t step, int64_t channel) const {
    return x + row(piece, step) * x_stride + channel;
  }
  __device__ float* state_at(int64_t slot, int64_t k, int64_t channel) const {
    return state + slot * slot_stride + k * state_stride + channel;
  }
};

template <class T>
struct Forward : Operands<T> {
  T* y;
  int64_t y_stride;
};

template <class T>
struct Backward : Operands<T> {
  const T* dy;
  T* dx;
  int64_t dy_stride, dx_stride;
  float* dstate;  // (s,w-1,c) or null
  int64_t dslot_stride, dstate_stride;
  float* partial;  // (lanes, w + 1, c): dweight | dbias of the tiles of each lane
  int64_t lanes;

  __device__ float* dstate_at(int64_t slot, int64_t k, int64_t channel) const {
    return dstate + slot * dslot_stride + k * dstate_stride + channel;
  }
};

struct Span {
  Piece piece;
  int64_t begin, end;  // steps of the piece
};

template <class T>
__device__ Span span_of(const Operands<T>& op, int64_t tile) {
  if (!op.first) {
    const Piece piece = op.pieces[tile];
    return {piece, 0, piece.length};
  }
  const int p = cuda::piece_of(op.first, op.piece_count, static_cast<int32_t>(tile));
  const Piece piece = op.pieces[p];
  const int64_t begin = (tile - op.first[p]) * op.tile_length;
  return {piece, begin, min(begin + op.tile_length, piece.length)};
}

template <int kTaps, int kWidth, class T>
__device__ void load_taps(const Operands<T>& op, int64_t channel, float (&taps)[kTaps][kWidth],
                          float (&bias)[kWidth]) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const float* const from = op.weight + (channel + j) * op.weight_stride;
    if (kTaps == 4 && op.packed_taps) {
      Pack<float, 4> pack;
      pack.load_constant(from);
#pragma unroll
      for (int k = 0; k < kTaps; ++k) taps[k][j] = pack.at(k % 4);
    } else {
#pragma unroll
      for (int k = 0; k < kTaps; ++k) taps[k][j] = __ldg(from + k);
    }
    bias[j] = op.bias ? __ldg(op.bias + channel + j) : 0.f;
  }
}

// The w - 1 inputs before step `begin`: of the piece, of the state it starts from, or zero.
template <int kTaps, int kWidth, class T>
__device__ void load_kept(const Operands<T>& op, const Piece& piece, int64_t begin, int64_t channel,
                          float (&kept)[kTaps][kWidth]) {
#pragma unroll
  for (int k = 0; k < kTaps - 1; ++k) {
    const int64_t step = begin - (kTaps - 1) + k;
    if (step >= 0) {
      Pack<T, kWidth> pack;
      pack.load_constant(op.x_at(piece, step, channel));
#pragma unroll
      for (int j = 0; j < kWidth; ++j) kept[k][j] = pack.at(j);
    } else if (piece.from >= 0) {
      Pack<float, kWidth> pack;
      pack.load(op.state_at(piece.from, step + kTaps - 1, channel));
#pragma unroll
      for (int j = 0; j < kWidth; ++j) kept[k][j] = pack.at(j);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) kept[k][j] = 0;
    }
  }
}

template <int kTaps, int kWidth>
__device__ void shift(float (&window)[kTaps][kWidth]) {
#pragma unroll
  for (int k = 0; k + 1 < kTaps; ++k)
#pragma unroll
    for (int j = 0; j < kWidth; ++j) window[k][j] = window[k + 1][j];
}

// Infinity in the denominator gives 0, NaN stays.
__device__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

template <class T, int kWidth, int kTaps>
__global__ void __launch_bounds__(kThreads) conv_kernel(const Forward<T> op) {
  const int64_t groups = op.c / kWidth;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= op.tiles * groups) return;
  const int64_t channel = i % groups * kWidth;
  const auto [piece, begin, end] = span_of(op, i / groups);
  float taps[kTaps][kWidth], kept[kTaps][kWidth], bias[kWidth];
  load_taps(op, channel, taps, bias);
  load_kept(op, piece, begin, channel, kept);
  const int64_t x_step = op.reverse ? -op.x_stride : op.x_stride;
  const int64_t y_step = op.reverse ? -op.y_stride : op.y_stride;
  const T* x = op.x_at(piece, begin, channel);
  T* y = op.y + op.row(piece, begin) * op.y_stride + channel;
  for (int64_t s = begin; s < end; s += kAhead) {
    Pack<T, kWidth> in[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a)  // past the end the last row again: no branch between loads
      in[a].load_constant(x + min(int64_t{a}, end - 1 - s) * x_step);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (s + a >= end) break;
      Pack<T, kWidth> out;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        kept[kTaps - 1][j] = in[a].at(j);
        float sum = bias[j];
#pragma unroll
        for (int k = 0; k < kTaps; ++k) sum = fmaf(taps[k][j], kept[k][j], sum);
        out.set(j, op.silu ? sum * sigmoid(sum) : sum);
      }
      shift(kept);
      out.store(y + a * y_step);
    }
    x += kAhead * x_step;
    y += kAhead * y_step;
  }
  if (piece.to < 0 || begin > 0 || end < piece.length) return;
#pragma unroll
  for (int k = 0; k < kTaps - 1; ++k) {
    Pack<float, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out.set(j, kept[k][j]);
    out.store(op.state_at(piece.to, k, channel));
  }
}

// The final state of pieces of several tiles, which are longer than a state.
template <class T>
__global__ void __launch_bounds__(kThreads) final_state_kernel(const Forward<T> op) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= op.piece_count * op.c) return;
  const int64_t channel = i % op.c;
  const Piece piece = op.pieces[i / op.c];
  if (piece.to < 0 || piece.length <= op.tile_length) return;
  for (int k = 0; k < op.w - 1; ++k)
    *op.state_at(piece.to, k, channel) =
        to_float(*op.x_at(piece, piece.length - (op.w - 1) + k, channel));
}

template <class T, int kWidth, int kTaps>
__global__ void __launch_bounds__(kThreads) conv_backward_kernel(const Backward<T> op) {
  constexpr int kKept = kTaps - 1;
  const int64_t groups = op.c / kWidth;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= op.lanes * groups) return;
  const int64_t lane = i / groups, channel = i % groups * kWidth;
  const int64_t direction = op.reverse ? -1 : 1;
  const int64_t x_step = direction * op.x_stride, dy_step = direction * op.dy_stride;
  const int64_t dx_step = direction * op.dx_stride;
  float taps[kTaps][kWidth], bias[kWidth];
  float dtaps[kTaps][kWidth] = {}, dbias[kWidth] = {};
  load_taps(op, channel, taps, bias);
  for (int64_t tile = lane; tile < op.tiles; tile += op.lanes) {
    const auto [piece, begin, end] = span_of(op, tile);
    // The first w - 1 steps of the next tile reach back into this one.
    const int64_t reach = min(end + kKept, piece.length);
    float kept[kTaps][kWidth], open[kTaps][kWidth] = {};
    load_kept(op, piece, begin, channel, kept);
    const T* x = op.x_at(piece, begin, channel);
    const T* dy = op.dy + op.row(piece, begin) * op.dy_stride + channel;
    int64_t to = (op.row(piece, begin) - direction * kKept) * op.dx_stride + channel;
    for (int64_t s = begin; s < reach; s += kAhead) {
      Pack<T, kWidth> in[kAhead], gradient[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t ahead = min(int64_t{a}, reach - 1 - s);
        in[a].load_constant(x + ahead * x_step);
        gradient[a].load_constant(dy + ahead * dy_step);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (s + a >= reach) break;
        const bool own = s + a < end;
        Pack<T, kWidth> out;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          kept[kKept][j] = in[a].at(j);
          open[kKept][j] = 0;
          float dpre = gradient[a].at(j);
          if (op.silu) {
            float sum = bias[j];
#pragma unroll
            for (int k = 0; k < kTaps; ++k) sum = fmaf(taps[k][j], kept[k][j], sum);
            const float part = sigmoid(sum);  // silu' = sigmoid + silu (1 - sigmoid)
            dpre *= fmaf(sum * part, 1 - part, part);
          }
          if (own) {
            dbias[j] += dpre;
#pragma unroll
            for (int k = 0; k < kTaps; ++k) dtaps[k][j] = fmaf(dpre, kept[k][j], dtaps[k][j]);
          }
#pragma unroll
          for (int k = 0; k < kTaps; ++k) open[k][j] = fmaf(dpre, taps[k][j], open[k][j]);
          out.set(j, open[0][j]);
        }
        if (s + a - kKept >= begin) out.store(op.dx + to + a * dx_step);
        shift(kept);
        shift(open);
      }
      x += kAhead * x_step;
      dy += kAhead * dy_step;
      to += kAhead * dx_step;
    }
    // Only at the end of the piece are there steps left: those that its final state holds.
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int64_t step = reach - kKept + k;
      if (step < begin || step >= end) continue;
      Pack<T, kWidth> out;
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
        out.set(j,
                open[k][j] +
                    (op.dstate && piece.to >= 0 ? *op.dstate_at(piece.to, k, channel + j) : 0.f));
      out.store(op.dx + op.row(piece, step) * op.dx_stride + channel);
    }
  }
  float* const to = op.partial + lane * (kTaps + 1) * op.c + channel;
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
#pragma unroll
    for (int k = 0; k < kTaps; ++k) to[k * op.c + j] = dtaps[k][j];
    to[kTaps * op.c + j] = dbias[j];
  }
}

// dweight(c,w) and dbias(c) += the partials (lanes, w + 1, c). A block takes kColumns columns of
// the partials, kSlices threads each; the order of the sum depends on the number of lanes only.
constexpr int kColumns = 32, kSlices = 16;
__global__ void add_partials_kernel(const float* partial, int64_t lanes, int64_t c, int w,
                                    float* dweight, int64_t dweight_stride, float* dbias) {
  __shared__ float sums[kSlices][kColumns];
  const int64_t column = blockIdx.x * static_cast<int64_t>(kColumns) + threadIdx.x;
  const int64_t columns = (w + 1) * c;
  float sum = 0;
  if (column < columns)
    for (int64_t lane = threadIdx.y; lane < lanes; lane += kSlices)
      sum += partial[lane * columns + column];
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
    if (op.silu) {
      float pre = op.bias ? op.bias[channel] : 0.f;
      for (int k = 0; k < op.w; ++k) pre = fmaf(taps[k], input[s + k], pre);
      const float part = sigmoid(pre);
      dpre *= fmaf(pre * part, 1 - part, part);
    }
    for (int k = 0; s + k < kept; ++k) sum[s + k] = fmaf(dpre, taps[k], sum[s + k]);
  }
  if (piece.to < 0) return;  // a short piece hands inputs of its initial state on to the final one
  for (int i = steps; i < kept; ++i) sum[i] += *op.dstate_at(piece.to, i - steps, channel);
}

// dstate of the states that pieces start from: a thread for each piece and channel or, where pieces
// share a state (`shared`), for each slot and channel, which adds up its readers in order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    initial_state_kernel(const Backward<T> op, int64_t count, bool shared) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= count * op.c) return;
  const int64_t item = i / op.c, channel = i % op.c;
  const int64_t slot = shared ? item : op.pieces[item].from;
  if (slot < 0) return;
  float sum[kMostTaps] = {};
  bool read = false;
  for (int64_t p = shared ? 0 : item; p < (shared ? op.piece_count : item + 1); ++p) {
    if (op.pieces[p].from != slot) continue;
    add_initial(op, op.pieces[p], channel, sum);
    read = true;
  }
  for (int k = 0; k < op.w - 1 && read; ++k) *op.dstate_at(slot, k, channel) = sum[k];
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(div_up(threads, kThreads)); }

// Calls f with the number of taps as a constant.
template <int kTaps = 1, class F>
void with_taps(int64_t w, F&& f) {
  if (w == kTaps) return f(std::integral_constant<int, kTaps>{});
  if constexpr (kTaps < kMostTaps) with_taps<kTaps + 1>(w, f);
}

// Whether `width` elements from any multiple of `width` channels on are whole aligned words.
bool aligned(const View& view, int64_t width) {
  if (!view) return true;
  const int64_t bytes = std::min<int64_t>(16, width * size_of(view.dtype));
  bool ok = reinterpret_cast<uintptr_t>(view.data) % bytes == 0;
  for (int i = 0; i + 1 < view.rank; ++i)
    ok = ok && view.stride[i] * size_of(view.dtype) % bytes == 0;
  return ok;
}

template <class Op>
void check_operands(const char* name, const Op& op, Device device) {
  check(op.rows != nullptr, "{}: rows are missing", name);
  expect_rank(name, "x", op.x, 2);
  expect_rank(name, "weight", op.weight, 2);
  const int64_t t = op.rows->total(), c = op.x.cols(), w = op.weight.cols();
  expect(name, "x", op.x, op.x.dtype == DType::bf16 ? DType::bf16 : DType::f32, {t, c});
  expect(name, "weight", op.weight, DType::f32, {c, w});
  check(w >= 1 && w <= kMostTaps, "{}: weight is {}, expected 1 to {} taps", name,
        op.weight.shape(), kMostTaps);
  expect_if(name, "bias", op.bias, DType::f32, {c});
  check(!op.reverse || op.rows->slots() == 0,
        "{}: a piece carries state, expected whole sequences with reverse", name);
  expect_here(name, "x", op.x, device);
  expect_here(name, "weight", op.weight, device);
  expect_here(name, "bias", op.bias, device);
  check(op.rows->device_pieces() != nullptr, "{}: rows are not in memory of cuda:{}", name,
        device.index);
}

void check_state(const char* name, const char* operand, const View& state, const Rows& rows,
                 int64_t w, int64_t c, Device device) {
  if (w == 1 && !state) return;  // nothing to remember
  expect_rank(name, operand, state, 3);
  expect(name, operand, state, DType::f32, {state.rows(), w - 1, c});
  check(state.rows() >= rows.slots(), "{}: {} is {}, expected {} slots or more", name, operand,
        state.shape(), rows.slots());
  expect_here(name, operand, state, device);
}

template <class T, class Op>
void set_operands(Operands<T>& to, const Op& op, int64_t width, int processors) {
  const auto pieces = op.rows->pieces();
  to.x = op.x.template as<T>();
  to.x_stride = op.x.stride[0];
  to.weight = op.weight.template as<float>();
  to.weight_stride = op.weight.stride[0];
  to.bias = op.bias.template as<float>();
  to.state = op.state.template as<float>();
  to.slot_stride = op.state.stride[0];
  to.state_stride = op.state.stride[1];
  to.pieces = op.rows->device_pieces();
  to.piece_count = static_cast<int>(pieces.size());
  to.c = op.x.cols();
  to.w = static_cast<int>(op.weight.cols());
  to.silu = op.silu;
  to.reverse = op.reverse;
  to.packed_taps = aligned(op.weight, 4);
  for (const int64_t length : kTiles) {
    to.tile_length = length;
    if (op.rows->total() / length * (to.c / width) >= processors * kThreadsWanted) break;
  }
  int64_t longest = 0;
  for (const Piece& piece : pieces) longest = std::max(longest, piece.length);
  const bool cut = longest > to.tile_length;
  to.tiles = cut ? op.rows->tiles(to.tile_length).count : to.piece_count;
  to.first = cut ? op.rows->tiles(to.tile_length).first.template as<int32_t>() : nullptr;
}

}  // namespace

void CudaBackend::run(const Conv1d& op) {
  check_operands("conv1d", op, device());
  const int64_t t = op.rows->total(), c = op.x.cols(), w = op.weight.cols();
  expect("conv1d", "y", op.y, op.x.dtype, {t, c});
  expect_here("conv1d", "y", op.y, device());
  check(op.y.data != op.x.data, "conv1d: y is x, expected another tensor");
  if (op.state || op.rows->slots() > 0)
    check_state("conv1d", "state", op.state, *op.rows, w, c, device());
  if (t == 0 || c == 0) return;

  cuda::with_type("conv1d", op.x, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = 16 / sizeof(T);
    const bool wide =
        c % kWide == 0 && aligned(op.x, kWide) && aligned(op.y, kWide) && aligned(op.state, kWide);
    Forward<T> forward;
    set_operands(forward, op, wide ? kWide : 1, processors_);
    forward.y = op.y.as<T>();
    forward.y_stride = op.y.stride[0];
    with_taps(w, [&](auto taps) {
      if (wide)
        conv_kernel<T, kWide, taps()>
            <<<blocks_for(forward.tiles * (c / kWide)), kThreads, 0, stream_>>>(forward);
      else
        conv_kernel<T, 1, taps()><<<blocks_for(forward.tiles * c), kThreads, 0, stream_>>>(forward);
    });
    cuda::check_launch("conv1d");
    const auto pieces = op.rows->pieces();
    const bool late = w > 1 && std::any_of(pieces.begin(), pieces.end(), [&](const Piece& piece) {
                        return piece.to >= 0 && piece.length > forward.tile_length;
                      });
    if (!late) return;
    final_state_kernel<T><<<blocks_for(forward.piece_count * c), kThreads, 0, stream_>>>(forward);
    cuda::check_launch("conv1d");
  });
}

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

  cuda::with_type(name, op.x, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = 4;  // 8 bytes of bf16: twice as many do not leave registers for the rest
    const bool wide = c % kWide == 0 && aligned(op.x, kWide) && aligned(op.dy, kWide) &&
                      aligned(op.dx, kWide) && aligned(op.state, kWide);
    const int64_t groups = wide ? c / kWide : c;
    Backward<T> backward;
    set_operands(backward, op, wide ? kWide : 1, processors_);
    backward.dy = op.dy.as<T>();
    backward.dx = op.dx.as<T>();
    backward.dy_stride = op.dy.stride[0];
    backward.dx_stride = op.dx.stride[0];
    backward.dstate = op.dstate.as<float>();
    backward.dslot_stride = op.dstate.stride[0];
    backward.dstate_stride = op.dstate.stride[1];
    backward.lanes = std::min(backward.tiles, div_up(processors_ * kThreadsWanted, groups));
    const Tensor partial(*this, DType::f32, {backward.lanes, w + 1, c});
    backward.partial = partial.as<float>();
    const unsigned blocks = blocks_for(backward.lanes * groups);
    with_taps(w, [&](auto taps) {
      if (wide)
        conv_backward_kernel<T, kWide, taps()><<<blocks, kThreads, 0, stream_>>>(backward);
      else
        conv_backward_kernel<T, 1, taps()><<<blocks, kThreads, 0, stream_>>>(backward);
    });
    cuda::check_launch(name);
    add_partials_kernel<<<static_cast<unsigned>(div_up((w + 1) * c, kColumns)),
                          dim3(kColumns, kSlices), 0, stream_>>>(
        backward.partial, backward.lanes, c, static_cast<int>(w), op.dweight.as<float>(),
        op.dweight.stride[0], op.dbias.as<float>());
    cuda::check_launch(name);
    if (!op.dstate || !reads || w == 1) return;
    const int64_t count = shared ? op.rows->slots() : backward.piece_count;
    initial_state_kernel<T>
        <<<blocks_for(count * c), kThreads, 0, stream_>>>(backward, count, shared);
    cuda::check_launch(name);
  });
}

}  // namespace coil
