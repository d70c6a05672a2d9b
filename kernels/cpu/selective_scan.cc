// Mamba's selective scan (Gu and Dao 2023, section 3). Per channel c and state i,
//   delta = softplus(dt + dt_bias),   h[i] = exp(delta A[c,i]) h[i] + delta x B[i],
//   y = sum_i C[i] h[i] + D x,   then y *= silu(z) where z is given.
// Backward stands in selective_scan_backward.cc.
//
// A vector holds neighbouring channels; the states of a block of channels stay in registers over
// kScanBlock steps, and time is walked in those steps so that rows and scratch stay in L1 and L2.
// Cells of channels and pieces go to threads (grid.h). Pieces of a few steps (decoding) take a path
// with states as lanes, without a table of A.
//
// Checkpoint k, block of channels from c0 with v of them: v * n floats at [k, c0, 0], ordered
// (state, channel).
//
// Measured, best of 100 calls, e 512, n 16, t 512, one thread: 0.75 ms, 7.9 cycles for a vector's
// state and step; the limit of its 11 operations on two ports is 5.5, and softplus, gate and rows
// take most of the rest. Two threads: 0.38 ms, 1.35 M steps/s. (2 cores, AVX-512 Xeon (Emerald
// Rapids class, no AMX), 2026-11-22)
#include <omp.h>

#include <algorithm>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/grid.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/selective_scan.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/scan_blocks-inl.h"

#ifndef COIL_SELECTIVE_SCAN_ONCE
#define COIL_SELECTIVE_SCAN_ONCE
namespace coil {
namespace {

// What a cell needs beside the operands.
struct CellMemory {
  const int64_t* first_checkpoint;  // of each piece
  float* scratch;
};

constexpr int64_t kShortPiece = 4;  // steps up to which states are lanes

// Floats of scratch per cell of `blocks` blocks of channels.
int64_t scratch_floats(int64_t blocks, int64_t n, int64_t lanes) {
  return lanes * (blocks * (2 * n + 1) + 3 * kScanBlock);
}

}  // namespace
}  // namespace coil
#endif  // COIL_SELECTIVE_SCAN_ONCE

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

int64_t lanes() { return kLanes; }

// delta, u = delta x and the D x part of y, for `steps` steps of one block of channels. Returns the
// sum of delta.
HWY_INLINE V prepare(const SelectiveScan& op, Track x, Track dt, int64_t channel, int64_t valid,
                     int64_t steps, float* delta, float* u, float* y) {
  const V bias = load_part(d, op.dt_bias.as<float>() + channel, valid);
  const V D = load_part(d, op.D.as<float>() + channel, valid);
  V sum = hn::Zero(d);
  for (int64_t s = 0; s < steps; ++s) {
    const V step = softplus(d, hn::Add(load_part(d, dt.at(s), valid), bias));
    const V input = load_part(d, x.at(s), valid);
    hn::Store(step, d, delta + s * kLanes);
    hn::Store(hn::Mul(step, input), d, u + s * kLanes);
    hn::Store(hn::Mul(D, input), d, y + s * kLanes);
    sum = hn::Add(sum, step);
  }
  return sum;
}

// y * silu(z) to its place.
HWY_INLINE void finish(const float* y, Track z, Track to, int64_t valid, int64_t steps) {
  if (z.first) {
    for (int64_t s = 0; s < steps; ++s) {
      const V gate = load_part(d, z.at(s), valid);
      const V gated = hn::Mul(hn::Mul(hn::Load(d, y + s * kLanes), gate), sigmoid(d, gate));
      store_part(d, gated, to.at(s), valid);
    }
  } else {
    for (int64_t s = 0; s < steps; ++s) store_part(d, hn::Load(d, y + s * kLanes), to.at(s), valid);
  }
}

// kStates states of one block of channels, in registers over `steps` steps; y is added to. 11
// vector operations a state and step with AVX-512.
template <int kStates>
HWY_INLINE void scan_states(const float* HWY_RESTRICT rates, float* HWY_RESTRICT state, Track B,
                            Track C, const float* HWY_RESTRICT delta, const float* HWY_RESTRICT u,
                            float* HWY_RESTRICT y, int64_t steps, const Ahead<4>& ahead) {
  V h[kStates];
#pragma GCC unroll 16
  for (int i = 0; i < kStates; ++i) h[i] = hn::Load(d, state + i * kLanes);
  for (int64_t s = 0; s < steps; ++s) {
    ahead.fetch(s);
    const V step = hn::Load(d, delta + s * kLanes), input = hn::Load(d, u + s * kLanes);
    const float *b = B.at(s), *c = C.at(s);
    V even = hn::Load(d, y + s * kLanes), odd = hn::Zero(d);
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) {
      const V decay = exp2(d, hn::Mul(step, hn::Load(d, rates + i * kLanes)));
      h[i] = hn::MulAdd(decay, h[i], hn::Mul(input, hn::Set(d, b[i])));
      V& sum = i % 2 ? odd : even;
      sum = hn::MulAdd(h[i], hn::Set(d, c[i]), sum);
    }
    hn::Store(hn::Add(even, odd), d, y + s * kLanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kStates; ++i) hn::Store(h[i], d, state + i * kLanes);
}

void scan_all_states(int64_t n, const float* rates, float* state, Track B, Track C,
                     const float* delta, const float* u, float* y, int64_t steps,
                     const Ahead<4>& ahead) {
  const auto scan = [&](auto count, int64_t i) HWY_ATTR {
    scan_states<count.value>(rates + i * kLanes, state + i * kLanes, B.from(0, i), C.from(0, i),
                             delta, u, y, steps, i == 0 ? ahead : Ahead<4>());
  };
  int64_t i = 0;
  if constexpr (kLanes == 16)  // 32 registers
    for (; i + 16 <= n; i += 16) scan(std::integral_constant<int, 16>(), i);
  for (; i + 8 <= n; i += 8) scan(std::integral_constant<int, 8>(), i);
  for (; i < n; ++i) scan(std::integral_constant<int, 1>(), i);
}

// A piece of at most kShortPiece steps: per channel, states are the lanes.
void scan_short_piece(const SelectiveScan& op, const Piece& piece, int64_t channel, int64_t valid,
                      float* delta, float* u, float* y) {
  const int64_t n = op.A_log.cols();
  const Track B(op.B, piece, op.reverse), C(op.C, piece, op.reverse);
  HWY_ALIGN float products[kShortPiece * kLanes * kLanes];  // (steps, channels, states): h C
  std::fill_n(products, piece.length * kLanes * kLanes, 0.f);
  for (int64_t lane = 0; lane < valid; ++lane) {
    const float* A_log = op.A_log.row<float>(channel + lane);
    const int64_t place = (channel + lane) * (op.state ? op.state.stride[1] : 0);
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t states = std::min(kLanes, n - i);
      const V rates = decay_rate(load_part(d, A_log + i, states));
      V h = piece.from < 0 ? hn::Zero(d)
                           : load_part(d, op.state.row<float>(piece.from) + place + i, states);
      for (int64_t s = 0; s < piece.length; ++s) {
        const V decay = exp2(d, hn::Mul(hn::Set(d, delta[s * kLanes + lane]), rates));
        const V input =
            hn::Mul(hn::Set(d, u[s * kLanes + lane]), load_part(d, B.at(s) + i, states));
        h = hn::MulAdd(decay, h, input);
        float* const to = products + (s * kLanes + lane) * kLanes;
        hn::Store(hn::MulAdd(h, load_part(d, C.at(s) + i, states), hn::Load(d, to)), d, to);
      }
      if (piece.to >= 0) store_part(d, h, op.state.row<float>(piece.to) + place + i, states);
    }
  }
  HWY_ALIGN float sums[kLanes];
  for (int64_t s = 0; s < piece.length; ++s) {
    sum_lanes(products + s * kLanes * kLanes, kLanes, sums);
    hn::Store(hn::Add(hn::Load(d, y + s * kLanes), hn::Load(d, sums)), d, y + s * kLanes);
  }
}

void scan_cell(const SelectiveScan& op, const Cell& cell, const CellMemory& memory) {
  const FlushDenormals flush;
  const int64_t n = op.A_log.cols();
  const int64_t blocks = (cell.end_channel - cell.first_channel + kLanes - 1) / kLanes;
  float* const rates = memory.scratch;  // (blocks, n, lanes), once the first long piece comes
  float* const states = rates + blocks * n * kLanes;  // (blocks, n, lanes)
  float* const sums = states + blocks * n * kLanes;   // (blocks, lanes)
  float* const delta = sums + blocks * kLanes;        // (steps, lanes), as the next two
  float* const u = delta + kScanBlock * kLanes;
  float* const y = u + kScanBlock * kLanes;
  bool have_rates = false;

  for (int64_t p = cell.first_piece; p < cell.end_piece; ++p) {
    const Piece& piece = op.rows->pieces()[p];
    const Track x(op.x, piece, op.reverse), dt(op.dt, piece, op.reverse),
        z(op.z, piece, op.reverse);
    const Track B(op.B, piece, op.reverse), C(op.C, piece, op.reverse),
        out(op.y, piece, op.reverse);
    // And has no marks.
    const bool is_short = piece.length <= kShortPiece && !op.checkpoints && !op.starts;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t channel = cell.first_channel + b * kLanes;
      const int64_t valid = std::min(kLanes, cell.end_channel - channel);
      hn::Store(hn::Zero(d), d, sums + b * kLanes);
      if (is_short) continue;
      if (!have_rates) load_decay_rates(op.A_log, channel, valid, rates + b * n * kLanes);
      if (op.starts)
        load_state(op.starts, 0, channel, valid, states + b * n * kLanes);
      else if (piece.from >= 0)
        load_state(op.state, piece.from, channel, valid, states + b * n * kLanes);
      else
        std::fill_n(states + b * n * kLanes, n * kLanes, 0.f);
    }
    have_rates = have_rates || !is_short;

    for (int64_t first = 0; first < piece.length; first += kScanBlock) {
      const int64_t steps = std::min(kScanBlock, piece.length - first);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t channel = cell.first_channel + b * kLanes;
        const int64_t valid = std::min(kLanes, cell.end_channel - channel);
        float* const h = states + b * n * kLanes;
        if (op.marks && first > 0 && first % op.every == 0)
          store_state(op.marks, static_cast<int32_t>(first / op.every - 1), channel, valid, h);
        if (op.checkpoints) {
          float* to =
              op.checkpoints.as<float>() +
              ((memory.first_checkpoint[p] + first / kScanBlock) * op.x.cols() + channel) * n;
          for (int64_t i = 0; i < n; ++i)
            store_part(d, hn::Load(d, h + i * kLanes), to + i * valid, valid);
        }
        const V sum = prepare(op, x.from(first, channel), dt.from(first, channel), channel, valid,
                              steps, delta, u, y);
        hn::Store(hn::Add(sum, hn::Load(d, sums + b * kLanes)), d, sums + b * kLanes);
        if (is_short) {
          scan_short_piece(op, piece, channel, valid, delta, u, y);
        } else {
          const bool same_steps = b + 1 < blocks;
          const int64_t next = same_steps ? first : first + kScanBlock;
          const int64_t column = same_steps ? channel + kLanes : cell.first_channel;
          const Ahead<4> ahead(next, std::min(kScanBlock, piece.length - next), column,
                               {x, dt, out.first ? out : x, z.first ? z : x});
          scan_all_states(n, rates + b * n * kLanes, h, B.from(first, 0), C.from(first, 0), delta,
                          u, y, steps, ahead);
        }
        if (out.first)
          finish(y, z.first ? z.from(first, channel) : z, out.from(first, channel), valid, steps);
      }
    }

    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t channel = cell.first_channel + b * kLanes;
      const int64_t valid = std::min(kLanes, cell.end_channel - channel);
      if (piece.to >= 0 && !is_short && !op.starts)
        store_state(op.state, piece.to, channel, valid, states + b * n * kLanes);
      if (op.sum_dt)
        store_part(d, hn::Load(d, sums + b * kLanes), op.sum_dt.row<float>(p) + channel, valid);
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(lanes);
HWY_EXPORT(scan_cell);

void selective_scan_cell(const SelectiveScan& op, const Cell& cell, float* scratch) {
  HWY_DYNAMIC_DISPATCH(scan_cell)(op, cell, {.first_checkpoint = nullptr, .scratch = scratch});
}

int64_t scan_cell_floats(int64_t channels, int64_t n) {
  const int64_t width = HWY_DYNAMIC_DISPATCH(lanes)();
  return scratch_floats((channels + width - 1) / width, n, width);
}

void CpuBackend::run(const SelectiveScan& op) {
  check_scan_operands("selective_scan", *this, op);
  const int64_t t = op.rows->total(), e = op.x.cols(), n = op.A_log.cols();
  expect_if("selective_scan", "y", op.y, DType::f32, {t, e});
  check(op.y.data != op.x.data, "selective_scan: y is x, expected another tensor");
  check(op.y || !op.checkpoints, "selective_scan: checkpoints are given without y");
  expect_if("selective_scan", "sum_dt", op.sum_dt, DType::f32,
            {static_cast<int64_t>(op.rows->pieces().size()), e});
  if (!op.starts && (op.state || op.rows->slots() > 0))
    check_scan_state("selective_scan", "state", op.state, *op.rows, e, n);
  expect_marks("selective_scan", op);
  if (t == 0 || e == 0) return;

  // Several cells a thread: which of them runs which makes no difference to the result.
  const bool parallel = threads_ > 1 && t * e * n >= kParallelWork;
  const int64_t width = HWY_DYNAMIC_DISPATCH(lanes)();
  const Grid grid = make_grid(*op.rows, e, width, parallel ? 4 * threads_ : 1);
  const auto checkpoints = first_checkpoints(*op.rows);
  const int64_t size = scratch_floats((grid.most_channels + width - 1) / width, n, width);
  const Tensor scratch(*this, DType::f32, {parallel ? threads_ : 1, size});
  const auto scan = HWY_DYNAMIC_DISPATCH(scan_cell);
  const int64_t cells = grid.cells.size();
#pragma omp parallel for schedule(dynamic) num_threads(threads_) if (parallel)
  for (int64_t i = 0; i < cells; ++i)
    scan(op, grid.cells[i],
         {.first_checkpoint = checkpoints.data(),
          .scratch = scratch.as<float>() + omp_get_thread_num() * size});
}

}  // namespace coil
#endif  // HWY_ONCE
