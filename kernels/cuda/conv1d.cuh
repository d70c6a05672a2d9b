// What the convolution's forward and backward share on a GPU: how a batch is cut for threads, the
// taps and inputs a thread starts with, the checks of operands.
//
// A thread takes kWidth neighbouring channels and walks along a tile of time: a whole piece, or a
// part of one. It holds the taps and the last w - 1 inputs in registers and asks for kAhead rows
// before it needs them: a row that is used makes room for the next one that is asked for, so that
// as many bytes are always under way.
#pragma once

#include <algorithm>

#include "kernels/cuda/fast_math.cuh"
#include "kernels/cuda/words.cuh"

namespace coil::cuda {

constexpr int kMostTaps = 8;
constexpr int kConvThreads = 128;
// A tile is longer than what a state holds, and as many rows as are asked for ahead fit in.
constexpr int64_t kShortestTile = 16;
static_assert(kShortestTile >= kMostTaps);

template <class T>
struct ConvOperands {
  const T* x;  // (t,c)
  int64_t x_stride;
  const float* weight;  // (c,w)
  int64_t weight_stride;
  const float* bias;  // (c) or null
  float* state;       // (s,w-1,c) or null
  int64_t slot_stride, state_stride;
  const Piece* pieces;
  const int32_t* first;  // first tile of each piece; null where every piece is one tile
  int64_t tile_length, c;
  int tiles, pieces_count, w;
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

struct ConvSpan {
  Piece piece;
  int64_t begin, end;  // steps of the piece
};

template <class T>
__device__ ConvSpan span_of(const ConvOperands<T>& op, int tile) {
  const int p = op.first ? piece_of(op.first, op.pieces_count, tile) : tile;
  const Piece piece = op.pieces[p];
  const int64_t begin = op.first ? (tile - op.first[p]) * op.tile_length : 0;
  return {piece, begin, op.first ? min(begin + op.tile_length, piece.length) : piece.length};
}

template <int kTaps, int kWidth, class T>
__device__ void load_taps(const ConvOperands<T>& op, int64_t channel, float (&taps)[kTaps][kWidth],
                          float (&bias)[kWidth]) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    const float* const from = op.weight + (channel + j) * op.weight_stride;
    if (kTaps == 4 && op.packed_taps) {
      Words<float, 4> four;
      four.load_constant(from);
#pragma unroll
      for (int k = 0; k < kTaps; ++k) taps[k][j] = four.at(k % 4);
    } else {
#pragma unroll
      for (int k = 0; k < kTaps; ++k) taps[k][j] = __ldg(from + k);
    }
    bias[j] = op.bias ? __ldg(op.bias + channel + j) : 0.f;
  }
}

// The w - 1 inputs before step `begin`: of the piece, of the state it starts from, or zero.
template <int kTaps, int kWidth, class T>
__device__ void load_kept(const ConvOperands<T>& op, const Piece& piece, int64_t begin,
                          int64_t channel, float (&kept)[kTaps][kWidth]) {
#pragma unroll
  for (int k = 0; k < kTaps - 1; ++k) {
    const int64_t step = begin - (kTaps - 1) + k;
    if (step >= 0) {
      Words<T, kWidth> row;
      row.load_constant(op.x_at(piece, step, channel));
#pragma unroll
      for (int j = 0; j < kWidth; ++j) kept[k][j] = row.at(j);
    } else if (piece.from >= 0) {
      Words<float, kWidth> row;
      row.load(op.state_at(piece.from, step + kTaps - 1, channel));
#pragma unroll
      for (int j = 0; j < kWidth; ++j) kept[k][j] = row.at(j);
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

template <int kTaps, int kWidth>
__device__ float sum_at(const float (&taps)[kTaps][kWidth], const float (&kept)[kTaps][kWidth],
                        float sum, int j) {
#pragma unroll
  for (int k = 0; k < kTaps; ++k) sum = fmaf(taps[k][j], kept[k][j], sum);
  return sum;
}

// 1 / (1 + 2^(gate - x log2 e)) in four instructions: multiply and add, power, add, reciprocal.
// With a gate of minus infinity this is 1, so that leaving SiLU out costs no branch. Infinity in
// the denominator gives 0, NaN stays.
__device__ inline float gate_of(bool silu) { return silu ? 0.f : -INFINITY; }
__device__ inline float sigmoid(float x, float gate) {
  return fast_reciprocal(1 + fast_exp2(fmaf(-kLog2OfE, x, gate)));
}

// Calls f with the number of taps as a constant.
template <int kTaps = 1, class F>
void with_taps(int64_t w, F&& f) {
  if (w == kTaps) return f(std::integral_constant<int, kTaps>{});
  if constexpr (kTaps < kMostTaps) with_taps<kTaps + 1>(w, f);
}

template <class Op>
void check_operands(const char* name, const Op& op, Device device) {
  check(op.rows != nullptr, "{}: rows are missing", name);
  expect_rank(name, "x", op.x, 2);
  expect_rank(name, "weight", op.weight, 2);
  const int64_t t = op.rows->total(), c = op.x.cols(), w = op.weight.cols();
  expect(name, "x", op.x, activation(op.x), {t, c});
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

inline void check_state(const char* name, const char* operand, const View& state, const Rows& rows,
                        int64_t w, int64_t c, Device device) {
  if (w == 1 && !state) return;  // nothing to remember
  expect_rank(name, operand, state, 3);
  expect(name, operand, state, DType::f32, {state.rows(), w - 1, c});
  check(state.rows() >= rows.slots(), "{}: {} is {}, expected {} slots or more", name, operand,
        state.shape(), rows.slots());
  expect_here(name, operand, state, device);
}

template <class T, class Op>
void set_operands(ConvOperands<T>& to, const Op& op, int64_t tile_length) {
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
  to.pieces_count = static_cast<int>(pieces.size());
  to.c = op.x.cols();
  to.w = static_cast<int>(op.weight.cols());
  to.silu = op.silu;
  to.reverse = op.reverse;
  to.packed_taps = aligned(op.weight, 4);
  to.tile_length = tile_length;
  int64_t longest = 0;
  for (const Piece& piece : pieces) longest = std::max(longest, piece.length);
  const bool cut = longest > tile_length;
  to.tiles = cut ? static_cast<int>(op.rows->tiles(tile_length).count) : to.pieces_count;
  to.first = cut ? op.rows->tiles(tile_length).first.template as<int32_t>() : nullptr;
}

}  // namespace coil::cuda
