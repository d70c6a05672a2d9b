// Causal depthwise convolution along each piece with SiLU, forward and backward.
//   pre[t] = bias + sum_k weight[k] x[t-w+1+k],   y = silu(pre) or pre
//   dpre = dy silu'(pre),  dx[t] = sum_k weight[k] dpre[t+w-1-k],  dweight[k] += sum_t dpre[t]
//   x[t-w+1+k]
// A vector holds neighbouring channels; the last w inputs (and in backward the w unfinished dx)
// move through registers, so that every row is read and written once and one pass forwards in time
// serves backward too.
//
// Measured, best of 100 calls, c 512, w 4, t 512, one thread: forward 0.11 ms, 19 cycles a vector
// and step (20 operations on two ports are 10), backward 0.20 ms; a block's rows come from L2 and
// L3. (2 cores, AVX-512 Xeon (Emerald Rapids class, no AMX), 2026-11-22)
#include <omp.h>

#include <algorithm>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/grid.h"
#include "kernels/cpu/track.h"
#include "kernels/expect.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/conv1d.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/simd_math.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

using FloatTag = hn::ScalableTag<float>;
using V = hn::Vec<FloatTag>;
constexpr FloatTag d;
constexpr int64_t kLanes = hn::MaxLanes(FloatTag());
constexpr int64_t kSteps =
    64;  // a block of channels goes on for so many, then the next one: rows stay in cache

int64_t lanes() { return kLanes; }

// weight[k] of one block of channels; 0 past `valid`.
template <int kTaps>
HWY_INLINE void load_taps(const View& weight, int64_t channel, int64_t valid, V* taps) {
  if constexpr (kTaps == 4) {  // the usual case, which decoding would spend most of its time on
    if (valid == kLanes && weight.stride[0] == 4) {
      hn::LoadInterleaved4(d, weight.row<float>(channel), taps[0], taps[1], taps[2], taps[3]);
      return;
    }
  }
  HWY_ALIGN float column[kTaps * kLanes] = {};
  for (int64_t lane = 0; lane < valid; ++lane)
    for (int k = 0; k < kTaps; ++k)
      column[k * kLanes + lane] = weight.row<float>(channel + lane)[k];
  for (int k = 0; k < kTaps; ++k) taps[k] = hn::Load(d, column + k * kLanes);
}

HWY_INLINE float* state_row(const View& state, int32_t slot, int64_t row, int64_t channel) {
  return state.row<float>(slot) + row * state.stride[1] + channel;
}

template <int kTaps>
void conv_cell(const Conv1d& op, const Cell& cell, float* scratch) {
  const FlushDenormals flush;
  constexpr int kKept = kTaps - 1;  // inputs that are remembered
  for (int64_t p = cell.first_piece; p < cell.end_piece; ++p) {
    const Piece& piece = op.rows->pieces()[p];
    const Track x(op.x, piece, op.reverse), y(op.y, piece, op.reverse);
    for (int64_t first = 0; first < piece.length; first += kSteps) {
      const int64_t end = std::min(first + kSteps, piece.length);
      for (int64_t channel = cell.first_channel; channel < cell.end_channel; channel += kLanes) {
        const int64_t valid = std::min(kLanes, cell.end_channel - channel);
        float* const carried = scratch + (channel - cell.first_channel) * kKept;
        V taps[kTaps], kept[kTaps];
        load_taps<kTaps>(op.weight, channel, valid, taps);
        const V bias = op.bias ? load_part(d, op.bias.as<float>() + channel, valid) : hn::Zero(d);
        for (int k = 0; k < kKept; ++k)
          kept[k] = first > 0 ? hn::Load(d, carried + k * kLanes)
                    : piece.from >= 0
                        ? load_part(d, state_row(op.state, piece.from, k, channel), valid)
                        : hn::Zero(d);
        for (int64_t s = first; s < end; ++s) {
          kept[kKept] = load_part(d, x.at(s) + channel, valid);
          V sum = bias;
#pragma GCC unroll 8
          for (int k = 0; k < kTaps; ++k) sum = hn::MulAdd(taps[k], kept[k], sum);
#pragma GCC unroll 8
          for (int k = 0; k < kKept; ++k) kept[k] = kept[k + 1];
          if (op.silu) sum = hn::Mul(sum, sigmoid(d, sum));
          store_part(d, sum, y.at(s) + channel, valid);
        }
        for (int k = 0; k < kKept; ++k) hn::Store(kept[k], d, carried + k * kLanes);
        if (end == piece.length && piece.to >= 0)
          for (int k = 0; k < kKept; ++k)
            store_part(d, kept[k], state_row(op.state, piece.to, k, channel), valid);
      }
    }
  }
}

// Of one block of channels, between its blocks of steps.
template <int kTaps>
struct Carried {
  V kept[kTaps];  // the last w - 1 inputs
  V open[kTaps];  // gradients so far of those inputs; of steps before the piece: of the state read
  V dfinal[kTaps];  // gradient of the state written; read before dstate is, as `from` may be `to`
  V dtaps[kTaps + 1];  // dweight | dbias
};

// params (e, w + 1): this piece group's share of dweight | dbias. Sums are kept by blocks of steps
// first.
template <int kTaps>
void conv_backward_cell(const Conv1dBackward& op, const Cell& cell, const uint8_t* first_reader,
                        float* scratch, float* params) {
  const FlushDenormals flush;
  constexpr int kKept = kTaps - 1;
  const V one = hn::Set(d, 1.0f);
  const int64_t blocks = (cell.end_channel - cell.first_channel + kLanes - 1) / kLanes;
  auto* const all = reinterpret_cast<Carried<kTaps>*>(scratch);
  for (int64_t b = 0; b < blocks; ++b)
    for (V& sum : all[b].dtaps) sum = hn::Zero(d);
  for (int64_t p = cell.first_piece; p < cell.end_piece; ++p) {
    const Piece& piece = op.rows->pieces()[p];
    const Track x(op.x, piece, op.reverse), dy(op.dy, piece, op.reverse),
        dx(op.dx, piece, op.reverse);
    for (int64_t first = 0; first < piece.length; first += kSteps) {
      const int64_t end = std::min(first + kSteps, piece.length);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t channel = cell.first_channel + b * kLanes;
        const int64_t valid = std::min(kLanes, cell.end_channel - channel);
        Carried<kTaps>& carried = all[b];
        V taps[kTaps], kept[kTaps], open[kTaps], dtaps[kTaps], dbias = hn::Zero(d);
        load_taps<kTaps>(op.weight, channel, valid, taps);
        const V bias = op.bias ? load_part(d, op.bias.as<float>() + channel, valid) : hn::Zero(d);
        for (int k = 0; k < kTaps; ++k) dtaps[k] = hn::Zero(d);
        for (int k = 0; k < kKept; ++k) {
          if (first == 0) {
            carried.kept[k] = piece.from >= 0
                                  ? load_part(d, state_row(op.state, piece.from, k, channel), valid)
                                  : hn::Zero(d);
            carried.open[k] = hn::Zero(d);
            carried.dfinal[k] =
                op.dstate && piece.to >= 0
                    ? load_part(d, state_row(op.dstate, piece.to, k, channel), valid)
                    : hn::Zero(d);
          }
          kept[k] = carried.kept[k];
          open[k] = carried.open[k];
        }
        const auto close = [&](V gradient, int64_t step) HWY_ATTR {
          if (step >= 0) {
            store_part(d, gradient, dx.at(step) + channel, valid);
          } else if (op.dstate && piece.from >= 0) {
            float* const to = state_row(op.dstate, piece.from, step + kKept, channel);
            if (!first_reader[p]) gradient = hn::Add(gradient, load_part(d, to, valid));
            store_part(d, gradient, to, valid);
          }
        };
        for (int64_t s = first; s < end; ++s) {
          kept[kKept] = load_part(d, x.at(s) + channel, valid);
          open[kKept] = hn::Zero(d);
          V gradient = load_part(d, dy.at(s) + channel, valid);
          if (op.silu) {
            V sum = bias;
#pragma GCC unroll 8
            for (int k = 0; k < kTaps; ++k) sum = hn::MulAdd(taps[k], kept[k], sum);
            const V part = sigmoid(d, sum);  // silu' = sigmoid + silu (1 - sigmoid)
            gradient = hn::Mul(gradient, hn::MulAdd(hn::Mul(sum, part), hn::Sub(one, part), part));
          }
          dbias = hn::Add(dbias, gradient);
#pragma GCC unroll 8
          for (int k = 0; k < kTaps; ++k) {
            dtaps[k] = hn::MulAdd(gradient, kept[k], dtaps[k]);
            open[k] = hn::MulAdd(gradient, taps[k], open[k]);
          }
          close(open[0], s - kKept);
#pragma GCC unroll 8
          for (int k = 0; k < kKept; ++k) {
            kept[k] = kept[k + 1];
            open[k] = open[k + 1];
          }
        }
        for (int k = 0; k < kKept; ++k) {
          carried.kept[k] = kept[k];
          carried.open[k] = open[k];
          if (end == piece.length)
            close(hn::Add(open[k], carried.dfinal[k]), piece.length - kKept + k);
        }
        for (int k = 0; k < kTaps; ++k) carried.dtaps[k] = hn::Add(carried.dtaps[k], dtaps[k]);
        carried.dtaps[kTaps] = hn::Add(carried.dtaps[kTaps], dbias);
      }
    }
  }
  HWY_ALIGN float sums[kLanes];
  for (int64_t channel = cell.first_channel; channel < cell.end_channel; ++channel) {
    const int64_t b = (channel - cell.first_channel) / kLanes,
                  lane = (channel - cell.first_channel) % kLanes;
    for (int k = 0; k <= kTaps; ++k) {
      hn::Store(all[b].dtaps[k], d, sums);
      params[channel * (kTaps + 1) + k] = sums[lane];
    }
  }
}

// The cell functions by number of taps, 1 to kMostConvTaps.
using ForwardCell = void (*)(const Conv1d&, const Cell&, float*);
using BackwardCell = void (*)(const Conv1dBackward&, const Cell&, const uint8_t*, float*, float*);

ForwardCell forward_cell(int64_t taps) {
  constexpr ForwardCell cells[] = {conv_cell<1>, conv_cell<2>, conv_cell<3>, conv_cell<4>,
                                   conv_cell<5>, conv_cell<6>, conv_cell<7>, conv_cell<8>};
  return cells[taps - 1];
}
BackwardCell backward_cell(int64_t taps) {
  constexpr BackwardCell cells[] = {
      conv_backward_cell<1>, conv_backward_cell<2>, conv_backward_cell<3>, conv_backward_cell<4>,
      conv_backward_cell<5>, conv_backward_cell<6>, conv_backward_cell<7>, conv_backward_cell<8>};
  return cells[taps - 1];
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(lanes);
HWY_EXPORT(forward_cell);
HWY_EXPORT(backward_cell);

namespace {

constexpr int64_t kParallelWork = 32 << 10;  // channels x steps from which threads pay

template <class Op>
void check_operands(const char* name, const Op& op) {
  check(op.rows != nullptr, "{}: rows are missing", name);
  expect_rank(name, "x", op.x, 2);
  expect_rank(name, "weight", op.weight, 2);
  const int64_t t = op.rows->total(), c = op.x.cols(), w = op.weight.cols();
  expect(name, "x", op.x, DType::f32, {t, c});
  expect(name, "weight", op.weight, DType::f32, {c, w});
  check(w >= 1 && w <= kMostConvTaps, "{}: weight is {}, expected 1 to {} taps", name,
        op.weight.shape(), kMostConvTaps);
  expect_if(name, "bias", op.bias, DType::f32, {c});
  check(!op.reverse || op.rows->slots() == 0,
        "{}: a piece carries state, expected whole sequences with reverse", name);
}

void check_state(const char* name, const char* operand, const View& state, const Rows& rows,
                 int64_t w, int64_t c) {
  if (w == 1 && !state) return;  // nothing to remember
  expect_rank(name, operand, state, 3);
  expect(name, operand, state, DType::f32, {state.rows(), w - 1, c});
  check(state.rows() >= rows.slots(), "{}: {} is {}, expected {} slots or more", name, operand,
        state.shape(), rows.slots());
}

}  // namespace

void conv1d_cell(const Conv1d& op, const Cell& cell, float* scratch) {
  HWY_DYNAMIC_DISPATCH(forward_cell)(op.weight.cols())(op, cell, scratch);
}

void CpuBackend::run(const Conv1d& op) {
  check_operands("conv1d", op);
  const int64_t t = op.rows->total(), c = op.x.cols(), w = op.weight.cols();
  expect("conv1d", "y", op.y, DType::f32, {t, c});
  check(op.y.data != op.x.data, "conv1d: y is x, expected another tensor");
  if (op.state || op.rows->slots() > 0) check_state("conv1d", "state", op.state, *op.rows, w, c);
  if (t == 0 || c == 0) return;

  const bool parallel = threads_ > 1 && t * c >= kParallelWork;
  const int64_t width = HWY_DYNAMIC_DISPATCH(lanes)();
  const Grid grid = make_grid(*op.rows, c, width, parallel ? 4 * threads_ : 1);
  const int64_t size = (grid.most_channels + width - 1) / width * width * w;
  const Tensor scratch(*this, DType::f32, {parallel ? threads_ : 1, size});
  const auto convolve = HWY_DYNAMIC_DISPATCH(forward_cell)(w);
  const int64_t cells = grid.cells.size();
#pragma omp parallel for schedule(dynamic) num_threads(threads_) if (parallel)
  for (int64_t i = 0; i < cells; ++i)
    convolve(op, grid.cells[i], scratch.as<float>() + omp_get_thread_num() * size);
}

void CpuBackend::run(const Conv1dBackward& op) {
  const char* const name = "conv1d backward";
  check_operands(name, op);
  const int64_t t = op.rows->total(), c = op.x.cols(), w = op.weight.cols();
  expect(name, "dy", op.dy, DType::f32, {t, c});
  expect(name, "dx", op.dx, DType::f32, {t, c});
  check(op.dx.data != op.dy.data, "{}: dx is dy, expected another tensor", name);
  expect(name, "dweight", op.dweight, DType::f32, {c, w});
  expect_if(name, "dbias", op.dbias, DType::f32, {c});
  const auto pieces = op.rows->pieces();
  const bool reads =
      std::any_of(pieces.begin(), pieces.end(), [](const Piece& p) { return p.from >= 0; });
  if (op.state || reads) check_state(name, "state", op.state, *op.rows, w, c);
  if (op.dstate) check_state(name, "dstate", op.dstate, *op.rows, w, c);
  if (t == 0 || c == 0) return;

  const std::vector<uint8_t> first_reader = first_readers(*op.rows);
  const bool shared = std::count(first_reader.begin(), first_reader.end(), 0) > 0;
  const bool parallel = threads_ > 1 && t * c >= kParallelWork;
  const int64_t width = HWY_DYNAMIC_DISPATCH(lanes)();
  const Grid grid = make_grid(*op.rows, c, width, parallel ? threads_ : 1, !(shared && op.dstate));
  const Tensor params(*this, DType::f32, {grid.piece_groups, c, w + 1});
  const int64_t size =
      (grid.most_channels + width - 1) / width * width * (4 * w + 1);  // of Carried
  const auto convolve = HWY_DYNAMIC_DISPATCH(backward_cell)(w);
  const int64_t cells = grid.cells.size();
  const Tensor scratch(*this, DType::f32, {cells, size});
#pragma omp parallel for schedule(static, 1) num_threads(threads_) if (parallel)
  for (int64_t i = 0; i < cells; ++i)
    convolve(op, grid.cells[i], first_reader.data(), scratch.as<float>() + i * size,
             params.as<float>() + grid.cells[i].piece_group * c * (w + 1));
  for (int64_t channel = 0; channel < c; ++channel)
    for (int64_t group = 0; group < grid.piece_groups; ++group) {
      const float* const part = params.as<float>() + (group * c + channel) * (w + 1);
      for (int64_t k = 0; k < w; ++k) op.dweight.row<float>(channel)[k] += part[k];
      if (op.dbias) op.dbias.as<float>()[channel] += part[w];
    }
}

}  // namespace coil
#endif  // HWY_ONCE
