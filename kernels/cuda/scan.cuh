// What the selective scan's forward and backward share on a GPU: how a batch is cut for threads,
// the arithmetic of one step, the checks of operands.
//
// Threads hold 16 states of a channel in registers; networks of more states go 16 at a time
// (`group`), fewer are filled up with states that stay 0. A block of threads takes kThreads
// (times the width) channels over one tile of time: a whole piece, or a chunk of one. B and C of 32
// steps lie in shared memory, where all lanes read the same word at once.
#pragma once

#include "kernels/cuda/device.cuh"

namespace coil::cuda {

constexpr int kStates = 16;  // in a thread's registers
constexpr int kThreads = 128;
constexpr int kStage = 32;     // steps of B and C in shared memory
constexpr int kScanSteps = 8;  // loaded ahead; also the steps between checkpoints
static_assert(kScanSteps == scan_block({Device::Kind::cuda, 0}));
constexpr float kLog2e = 1.44269504088896341f;

// Operands of both directions. Arrays of tiles are (tiles, kStates, e), of one group of states.
template <class T>
struct ScanOperands {
  const T *x, *dt, *z, *B, *C;  // (t,e) (t,e) (t,e) or null (t,n) (t,n)
  int64_t x_stride, dt_stride, z_stride, B_stride, C_stride;
  const float *A_log, *D, *dt_bias;  // (e,n) (e) (e)
  int64_t A_stride;
  const Piece* pieces;
  const int32_t* first;  // first tile of each piece
  int pieces_count, n, group;
  int64_t tile_length, e;
  bool reverse;
  float* checkpoints;               // (checkpoints, n, e) or null
  const int32_t* first_checkpoint;  // of each piece

  __device__ int64_t row(const Piece& piece, int64_t step) const {
    return piece.begin + (reverse ? piece.length - 1 - step : step);
  }
  __device__ int states() const { return min(kStates, n - group * kStates); }
  __device__ int64_t in_tile(int64_t tile, int i, int64_t channel) const {
    return (tile * kStates + i) * e + channel;
  }
  // A log2(e), so that a decay is one power of two; 0 for states past n, which then stay 0.
  __device__ float rate(int64_t channel, int i) const {
    if (i >= states()) return 0;
    return -expf(A_log[channel * A_stride + group * kStates + i]) * kLog2e;
  }
};

struct ScanSpan {
  Piece piece;
  int p;
  int64_t begin, end;  // steps of the piece
};
template <class T>
__device__ ScanSpan span_of(const ScanOperands<T>& op, int64_t tile) {
  const int p = piece_of(op.first, op.pieces_count, static_cast<int32_t>(tile));
  const Piece piece = op.pieces[p];
  const int64_t begin = (tile - op.first[p]) * op.tile_length;
  return {piece, p, begin, min(begin + op.tile_length, piece.length)};
}

__device__ inline float power_of_two(float x) {
  float y;
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
#else
  y = exp2f(x);
#endif
  return y;
}

// 1 / (1 + e^-x); NaN stays.
__device__ inline float sigmoid_of(float x) {
  return __fdividef(1.f, 1.f + power_of_two(-kLog2e * x));
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), the logarithm as u times a minimax polynomial of
// relative error 4.7e-9, accurate also where the result is small: a delta of 1e-4 is ordinary.
__device__ inline float softplus_of(float x, float* slope = nullptr) {
  // e^-|x| with what the rounding of |x| log2(e) lost.
  const float t = -kLog2e * fabsf(x);
  const float lost = fmaf(-kLog2e, fabsf(x), -t) - 1.92596299e-8f * fabsf(x);
  float u = power_of_two(t);
  u = fmaf(u, lost * 0.693147180559945309f, u);
  if (slope) *slope = __fdividef(x < 0 ? u : 1.f, 1.f + u);
  float p = fmaf(-0.0032439805594012446f, u, 0.01985125394997478f);
  p = fmaf(p, u, -0.056959126142502745f);
  p = fmaf(p, u, 0.10603611462571036f);
  p = fmaf(p, u, -0.15305565400282417f);
  p = fmaf(p, u, 0.19675929163699077f);
  p = fmaf(p, u, -0.24954131527403114f);
  p = fmaf(p, u, 0.3332996219149118f);
  p = fmaf(p, u, -0.499999024142843f);
  p = fmaf(p, u, 0.9999999952875124f);
  return fmaf(p, u, x > 0 ? x : x == x ? 0.f : x);
}

// kWidth neighbouring channels of an activation.
template <class T, int kWidth>
__device__ void load_channels(const T* from, float (&to)[kWidth]) {
  if constexpr (kWidth == 2 && sizeof(T) == 2) {
    const auto pair = *reinterpret_cast<const __nv_bfloat162*>(from);
    to[0] = __low2float(pair);
    to[1] = __high2float(pair);
  } else if constexpr (kWidth == 2) {
    const auto pair = *reinterpret_cast<const float2*>(from);
    to[0] = pair.x;
    to[1] = pair.y;
  } else {
    to[0] = to_float(*from);
  }
}
template <class T, int kWidth>
__device__ void store_channels(const float (&from)[kWidth], T* to) {
  if constexpr (kWidth == 2 && sizeof(T) == 2) {
    *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(from[0], from[1]);
  } else if constexpr (kWidth == 2) {
    *reinterpret_cast<float2*>(to) = {from[0], from[1]};
  } else {
    *to = from_float<T>(from[0]);
  }
}

// Rows of B or C from step `begin` on, this group's states, into shared memory; 0 past the end of
// the tile and past n, so that what is not there adds nothing.
template <class T>
__device__ void stage(const ScanOperands<T>& op, const T* from, int64_t stride,
                      const ScanSpan& span, int64_t begin, float (&to)[kStage][kStates]) {
  const int states = op.states();
  for (int k = threadIdx.x; k < kStage * kStates; k += kThreads) {
    const int s = k / kStates, i = k % kStates;
    float value = 0;
    if (begin + s < span.end && i < states)
      value = to_float(from[op.row(span.piece, begin + s) * stride + op.group * kStates + i]);
    to[s][i] = value;
  }
}

// Whether pairs of channels can be read and written as one word.
inline bool in_pairs(const View& view) {
  if (!view) return true;
  const int64_t bytes = 2 * size_of(view.dtype);
  return reinterpret_cast<uintptr_t>(view.data) % bytes == 0 && view.stride[0] % 2 == 0;
}

template <class Op>
void check_scan(const char* name, const CudaBackend& backend, const Op& op) {
  coil::check(op.rows != nullptr, "{}: rows are missing", name);
  coil::check(op.rows->device_pieces() != nullptr, "{}: rows are of the host", name);
  expect_rank(name, "x", op.x, 2);
  expect_rank(name, "A_log", op.A_log, 2);
  const int64_t t = op.rows->total(), e = op.x.cols(), n = op.A_log.cols();
  const DType act = activation(op.x);
  const auto here = [&](const char* operand, const View& view, DType dtype,
                        std::initializer_list<int64_t> shape) {
    expect(name, operand, view, dtype, shape);
    expect_here(name, operand, view, backend.device());
  };
  here("x", op.x, act, {t, e});
  here("dt", op.dt, act, {t, e});
  here("A_log", op.A_log, DType::f32, {e, n});
  here("B", op.B, act, {t, n});
  here("C", op.C, act, {t, n});
  here("D", op.D, DType::f32, {e});
  here("dt_bias", op.dt_bias, DType::f32, {e});
  if (op.z) here("z", op.z, act, {t, e});
  if (op.checkpoints) {
    here("checkpoints", op.checkpoints, DType::f32, {scan_checkpoints(backend, *op.rows), e, n});
    coil::check(op.checkpoints.contiguous(), "{}: checkpoints are not contiguous", name);
  }
  coil::check(!op.reverse || op.rows->slots() == 0,
              "{}: a piece carries state, expected whole sequences with reverse", name);
}

inline void check_scan_state(const char* name, const char* operand, const CudaBackend& backend,
                             const View& state, const Rows& rows, int64_t e, int64_t n) {
  expect_rank(name, operand, state, 3);
  expect(name, operand, state, DType::f32, {state.rows(), e, n});
  expect_here(name, operand, state, backend.device());
  coil::check(state.rows() >= rows.slots(), "{}: {} is {}, expected {} slots or more", name,
              operand, state.shape(), rows.slots());
}

template <class T, class Op>
void fill_operands(const Op& op, ScanOperands<T>& to) {
  to.x = op.x.template as<T>();
  to.dt = op.dt.template as<T>();
  to.z = op.z.template as<T>();
  to.B = op.B.template as<T>();
  to.C = op.C.template as<T>();
  to.x_stride = op.x.stride[0];
  to.dt_stride = op.dt.stride[0];
  to.z_stride = op.z.stride[0];
  to.B_stride = op.B.stride[0];
  to.C_stride = op.C.stride[0];
  to.A_log = op.A_log.template as<float>();
  to.A_stride = op.A_log.stride[0];
  to.D = op.D.template as<float>();
  to.dt_bias = op.dt_bias.template as<float>();
  to.pieces = op.rows->device_pieces();
  to.pieces_count = static_cast<int>(op.rows->pieces().size());
  to.n = static_cast<int>(op.A_log.cols());
  to.group = 0;
  to.e = op.x.cols();
  to.reverse = op.reverse;
  to.checkpoints = op.checkpoints.template as<float>();
  to.first_checkpoint =
      op.checkpoints ? op.rows->tiles(kScanSteps).first.template as<int32_t>() : nullptr;
}

// Steps of a tile: whole pieces where they fill the card or are short, else so long that about four
// blocks come to a multiprocessor. Returns a multiple of kStage, at least the longest piece where
// pieces stay whole.
inline int64_t tile_length(const Rows& rows, int64_t channel_blocks, int processors) {
  int64_t longest = 1;
  for (const Piece& piece : rows.pieces()) longest = std::max(longest, piece.length);
  const int64_t whole = div_up(longest, kStage) * kStage;
  const auto pieces = static_cast<int64_t>(rows.pieces().size());
  if (whole <= 64 || pieces * channel_blocks >= 3 * processors) return whole;
  int64_t length = 1024;
  while (length > 128 && div_up(rows.total(), length) * channel_blocks < 4 * processors)
    length /= 2;
  return std::min(length, whole);
}

}  // namespace coil::cuda
