// Causal depthwise convolution along each piece with SiLU.
//   pre[t] = bias + sum_k weight[k] x[t-w+1+k],   y = silu(pre) or pre
// Gradients: conv1d_backward.cu. How a batch is cut for threads: conv1d.cuh.
//
// Bytes: x is read and y written once, 4 an element in bf16. Tiles overlap by w - 1 rows, which are
// mostly found in L2. Of operations an element takes 11 with four taps (widen, 4 for the taps, 5
// for SiLU, half a rounding, and 4 an eighth of the time for addresses): at 3.9 TB/s a third of
// what a multiprocessor can issue, so memory is the limit.
//
// State in place (`from` = `to`): a piece that is one tile reads and writes its state in one
// thread. Of a longer piece the first tile reads and the last inputs are written by a second
// kernel.
#include "kernels/cuda/conv1d.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kAhead = 5;   // rows of 16 bytes in flight
constexpr int kBlocks = 4;  // of a multiprocessor: 128 registers a thread, enough for four taps
// Overlaps by 2 % of x. A batch of less than a round is cut finer.
constexpr int64_t kLongestTile = 128, kLongestOfOneRound = 64;

template <class T>
struct Forward : ConvOperands<T> {
  T* y;
  int64_t y_stride;
};

template <class T, int kWidth, int kTaps>
__global__ void __launch_bounds__(kConvThreads, kTaps > 4 ? 1 : kBlocks)
    conv_kernel(const Forward<T> op) {
  take_turn();
  const unsigned groups = static_cast<unsigned>(op.c / kWidth);
  const unsigned i = blockIdx.x * kConvThreads + threadIdx.x;
  if (i >= op.tiles * groups) return;
  const int64_t channel = static_cast<int64_t>(i % groups) * kWidth;
  const auto [piece, begin, end] = span_of(op, static_cast<int>(i / groups));
  const int64_t x_step = op.reverse ? -op.x_stride : op.x_stride;
  const int64_t y_step = op.reverse ? -op.y_stride : op.y_stride;
  const T* x = op.x_at(piece, begin, channel);
  T* y = op.y + op.row(piece, begin) * op.y_stride + channel;
  const float gate = gate_of(op.silu);
  float taps[kTaps][kWidth], kept[kTaps][kWidth], bias[kWidth];
  Words<T, kWidth> in[kAhead];
  const auto take = [&](const Words<T, kWidth>& row) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) kept[kTaps - 1][j] = row.at(j);
  };
  const auto give = [&] {
    Words<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float sum = sum_at(taps, kept, bias[j], j);
      out.set(j, sum * sigmoid(sum, gate));
    }
    out.store(y);
    y += y_step;
    shift(kept);
  };
  int left = static_cast<int>(end - begin);
#pragma unroll
  for (int a = 0; a < kAhead; ++a, x += x_step)
    if (a < left) in[a].load_constant(x);
  load_taps(op, channel, taps, bias);
  load_kept(op, piece, begin, channel, kept);
  for (; left >= kAhead; left -= kAhead) {
    // Past the end the last row again: no branch between loads.
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      take(in[a]);
      if (a + kAhead == left) x -= x_step;
      in[a].load_constant(x);
      if (a + kAhead < left) x += x_step;
      give();
    }
  }
#pragma unroll
  for (int a = 0; a + 1 < kAhead; ++a)
    if (a < left) take(in[a]), give();
  if (piece.to < 0 || begin > 0 || end < piece.length) return;
#pragma unroll
  for (int k = 0; k < kTaps - 1; ++k) {
    Words<float, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out.set(j, kept[k][j]);
    out.store(op.state_at(piece.to, k, channel));
  }
}

// The final state of pieces of several tiles, which are longer than a state.
template <class T>
__global__ void __launch_bounds__(kConvThreads) final_state_kernel(const Forward<T> op) {
  take_turn();
  const int64_t i = blockIdx.x * static_cast<int64_t>(kConvThreads) + threadIdx.x;
  if (i >= op.pieces_count * op.c) return;
  const int64_t channel = i % op.c;
  const Piece piece = op.pieces[i / op.c];
  if (piece.to < 0 || piece.length <= op.tile_length) return;
  for (int k = 0; k < op.w - 1; ++k)
    *op.state_at(piece.to, k, channel) =
        to_float(*op.x_at(piece, piece.length - (op.w - 1) + k, channel));
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(div_up(threads, kConvThreads));
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

  with_type("conv1d", op.x, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = 16 / sizeof(T);
    const bool wide =
        c % kWide == 0 && aligned(op.x, kWide) && aligned(op.y, kWide) && aligned(op.state, kWide);
    const int64_t groups = wide ? c / kWide : c;
    // Whole rounds of the card, nearly: what is left for the last one takes as long as a full one.
    // Of a batch that is less than a round, long tiles in half of the threads are faster than short
    // ones in all.
    const int64_t share = div_up(t * groups, processors_ * kBlocks * kConvThreads);
    const int64_t rounds = div_up(share, kLongestTile);
    const int64_t steps =
        rounds > 1 ? div_up(share, rounds) : std::min(2 * share, kLongestOfOneRound);
    Forward<T> forward;
    set_operands(forward, op, std::max(div_up(steps, kAhead) * kAhead, kShortestTile));
    forward.y = op.y.as<T>();
    forward.y_stride = op.y.stride[0];
    check(forward.tiles * groups < int64_t{1} << 31, "conv1d: x is {}, expected less",
          op.x.shape());
    const unsigned blocks = blocks_for(forward.tiles * groups);
    with_taps(w, [&](auto taps) {
      if (wide)
        launch_in_turn(conv_kernel<T, kWide, taps()>, blocks, kConvThreads, 0, stream_, forward);
      else
        launch_in_turn(conv_kernel<T, 1, taps()>, blocks, kConvThreads, 0, stream_, forward);
    });
    check_launch("conv1d");
    const auto pieces = op.rows->pieces();
    const bool late = w > 1 && std::any_of(pieces.begin(), pieces.end(), [&](const Piece& piece) {
                        return piece.to >= 0 && piece.length > forward.tile_length;
                      });
    if (!late) return;
    launch_in_turn(final_state_kernel<T>, blocks_for(forward.pieces_count * c), kConvThreads, 0,
                   stream_, forward);
    check_launch("conv1d");
  });
}

}  // namespace coil
