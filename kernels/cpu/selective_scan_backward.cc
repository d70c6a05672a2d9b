// Backward of the selective scan (selective_scan.cc has the equation). With g the gradient of y
// before the gate,
//   dh_s = C_s g_s + a_{s+1} dh_{s+1},  a = exp(delta A)
//   dC_s = sum_c h_s g_s,  dB_s = sum_c dh_s u_s,  u = delta x,  du_s = sum_i dh_s B_s
//   d(delta A)_s = dh_s a_s h_{s-1}
// Each block of kScanBlock steps is run forward again from its checkpoint, keeping a and h of a few
// states, then in reverse: a few states of all channels, then the next few, so that everything but
// the operands stays in L1. The sums over channels stay apart by lane while a thread goes over its
// channels, and are added in the order of lanes, then of cells.
//
// Measured, best of 100 calls, e 512, n 16, t 512, one thread: 1.86 ms, 20 cycles for a vector's
// state and step, 2.5 times forward; the limit of its 20 operations on two ports is 10. Asking for
// rows ahead, as forward does, was slower. (2 cores, AVX-512 Xeon (Emerald Rapids class, no AMX),
// 2026-11-22)
#include <omp.h>

#include <algorithm>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/grid.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/selective_scan_backward.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/scan_blocks-inl.h"

#ifndef COIL_SELECTIVE_SCAN_BACKWARD_ONCE
#define COIL_SELECTIVE_SCAN_BACKWARD_ONCE
namespace coil {
namespace {

// What a cell needs beside the operands.
struct CellMemory {
  const int64_t* first_checkpoint;  // of each piece
  const uint8_t* first_reader;      // backward, of each piece: the first that reads its slot `from`
  float* scratch;
  float* dBC;     // backward: (t, 2n), this channel group's share of dB | dC
  float* params;  // backward: (e, n + 2), this piece group's share of dA_log | dD | ddt_bias
};

constexpr int kStatesPerPass = 4;   // so that the scratch of a pass stays in L1
constexpr int64_t kStepArrays = 9;  // of StepScratch

// Floats of scratch per cell of `blocks` blocks of channels.
int64_t scratch_floats(int64_t blocks, int64_t n, int64_t lanes) {
  const int64_t of_block = 3 * n + 2 + kStepArrays * kScanBlock;
  const int64_t of_pass =
      4 * kStatesPerPass * kScanBlock + 2 * kStatesPerPass * kScanBlock / lanes + 1;
  return lanes * (blocks * of_block + of_pass);
}

}  // namespace
}  // namespace coil
#endif  // COIL_SELECTIVE_SCAN_BACKWARD_ONCE

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

int64_t lanes() { return kLanes; }

// Scratch of backward for one block of channels and up to kScanBlock steps, each (steps, lanes).
struct StepScratch {
  float *delta, *u, *slope;  // softplus, delta x, derivative of softplus
  float *dy, *dgate;         // gradient before the gate; gradient of z over y before the gate
  float *y, *ddelta, *du;    // y before the gate; d/d delta (of the decays, per log 2), d/du
  float* silu;               // the gate
};

HWY_INLINE void prepare_backward(const SelectiveScanBackward& op, Track x, Track dt, Track z,
                                 Track dy, int64_t channel, int64_t valid, int64_t steps,
                                 const StepScratch& to) {
  const V bias = load_part(d, op.dt_bias.as<float>() + channel, valid);
  const V D = load_part(d, op.D.as<float>() + channel, valid), one = hn::Set(d, 1.0f);
  for (int64_t s = 0; s < steps; ++s) {
    V slope;
    const V step = softplus(d, hn::Add(load_part(d, dt.at(s), valid), bias), slope);
    const V input = load_part(d, x.at(s), valid);
    hn::Store(step, d, to.delta + s * kLanes);
    hn::Store(slope, d, to.slope + s * kLanes);
    hn::Store(hn::Mul(step, input), d, to.u + s * kLanes);
    hn::Store(hn::Mul(D, input), d, to.y + s * kLanes);
    hn::Store(hn::Zero(d), d, to.ddelta + s * kLanes);
    hn::Store(hn::Zero(d), d, to.du + s * kLanes);
    V gradient = load_part(d, dy.at(s), valid);
    if (z.first) {
      const V gate = load_part(d, z.at(s), valid), part = sigmoid(d, gate),
              silu = hn::Mul(gate, part);
      // silu' = sigmoid + silu (1 - sigmoid)
      hn::Store(hn::Mul(gradient, hn::MulAdd(silu, hn::Sub(one, part), part)), d,
                to.dgate + s * kLanes);
      hn::Store(silu, d, to.silu + s * kLanes);
      gradient = hn::Mul(gradient, silu);
    }
    hn::Store(gradient, d, to.dy + s * kLanes);
  }
}

// Forward again from the checkpoint, keeping decays and states; then the steps in reverse. `carry`
// is the gradient of the state after the last step on entry, before the first one on return; drates
// the sum of d/d(delta rate) delta.
template <int kStates>
HWY_INLINE void scan_states_backward(const float* HWY_RESTRICT rates, float* HWY_RESTRICT carry,
                                     float* HWY_RESTRICT drates,
                                     const float* HWY_RESTRICT checkpoint, int64_t valid, Track B,
                                     Track C, const StepScratch& at, int64_t steps, bool gated,
                                     float* HWY_RESTRICT decays, float* HWY_RESTRICT states,
                                     float* HWY_RESTRICT dBC) {
  {
    V h[kStates], rate[kStates];
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) {
      h[i] = load_part(d, checkpoint + i * valid, valid);
      rate[i] = hn::Load(d, rates + i * kLanes);
    }
    for (int64_t s = 0; s < steps; ++s) {
      const V step = hn::Load(d, at.delta + s * kLanes), input = hn::Load(d, at.u + s * kLanes);
      const float *b = B.at(s), *c = C.at(s);
      const V dy = hn::Load(d, at.dy + s * kLanes);
      V y = hn::Load(d, at.y + s * kLanes);
      float* const dc = dBC + (s * 2 + 1) * kStates * kLanes;
#pragma GCC unroll 16
      for (int i = 0; i < kStates; ++i) {
        hn::Store(h[i], d, states + (s * kStates + i) * kLanes);
        const V decay = exp2(d, hn::Mul(step, rate[i]));
        h[i] = hn::MulAdd(decay, h[i], hn::Mul(input, hn::Set(d, b[i])));
        hn::Store(decay, d, decays + (s * kStates + i) * kLanes);
        hn::Store(hn::MulAdd(dy, h[i], hn::Load(d, dc + i * kLanes)), d, dc + i * kLanes);
        if (gated) y = hn::MulAdd(h[i], hn::Set(d, c[i]), y);
      }
      if (gated) hn::Store(y, d, at.y + s * kLanes);
    }
  }
  V dh[kStates], drate[kStates], rate[kStates];
#pragma GCC unroll 16
  for (int i = 0; i < kStates; ++i) {
    dh[i] = hn::Load(d, carry + i * kLanes);
    drate[i] = hn::Zero(d);  // a sum by blocks first
    rate[i] = hn::Load(d, rates + i * kLanes);
  }
  for (int64_t s = steps - 1; s >= 0; --s) {
    const V step = hn::Load(d, at.delta + s * kLanes), input = hn::Load(d, at.u + s * kLanes);
    const V dy = hn::Load(d, at.dy + s * kLanes);
    V ddelta = hn::Load(d, at.ddelta + s * kLanes), du = hn::Load(d, at.du + s * kLanes);
    const float *b = B.at(s), *c = C.at(s);
    float* const db = dBC + s * 2 * kStates * kLanes;
#pragma GCC unroll 16
    for (int i = 0; i < kStates; ++i) {
      const V before = hn::Load(d, states + (s * kStates + i) * kLanes);
      dh[i] = hn::MulAdd(dy, hn::Set(d, c[i]), dh[i]);
      hn::Store(hn::MulAdd(dh[i], input, hn::Load(d, db + i * kLanes)), d, db + i * kLanes);
      du = hn::MulAdd(dh[i], hn::Set(d, b[i]), du);
      dh[i] = hn::Mul(dh[i], hn::Load(d, decays + (s * kStates + i) * kLanes));
      const V dpower = hn::Mul(dh[i], before);
      ddelta = hn::MulAdd(dpower, rate[i], ddelta);
      drate[i] = hn::MulAdd(dpower, step, drate[i]);
    }
    hn::Store(ddelta, d, at.ddelta + s * kLanes);
    hn::Store(du, d, at.du + s * kLanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kStates; ++i) {
    hn::Store(dh[i], d, carry + i * kLanes);
    hn::Store(hn::Add(hn::Load(d, drates + i * kLanes), drate[i]), d, drates + i * kLanes);
  }
}

// The gradients of x, dt and z of one block, and y; adds to dD and dbias (lanes).
HWY_INLINE void finish_backward(const SelectiveScanBackward& op, Track x, Track dx, Track ddt,
                                Track dz, Track y, int64_t channel, int64_t valid, int64_t steps,
                                const StepScratch& from, float* dD, float* dbias) {
  const V D = load_part(d, op.D.as<float>() + channel, valid), log2 = hn::Set(d, kLn2);
  V sum_D = hn::Zero(d), sum_bias = hn::Zero(d);
  for (int64_t s = 0; s < steps; ++s) {
    const V input = load_part(d, x.at(s), valid), gradient = hn::Load(d, from.dy + s * kLanes);
    const V du = hn::Load(d, from.du + s * kLanes), step = hn::Load(d, from.delta + s * kLanes);
    const V ddelta = hn::MulAdd(hn::Load(d, from.ddelta + s * kLanes), log2, hn::Mul(input, du));
    const V dbefore = hn::Mul(ddelta, hn::Load(d, from.slope + s * kLanes));
    store_part(d, hn::MulAdd(D, gradient, hn::Mul(step, du)), dx.at(s), valid);
    store_part(d, dbefore, ddt.at(s), valid);
    if (dz.first)
      store_part(d, hn::Mul(hn::Load(d, from.dgate + s * kLanes), hn::Load(d, from.y + s * kLanes)),
                 dz.at(s), valid);
    if (y.first)
      store_part(d, hn::Mul(hn::Load(d, from.silu + s * kLanes), hn::Load(d, from.y + s * kLanes)),
                 y.at(s), valid);
    sum_D = hn::MulAdd(gradient, input, sum_D);
    sum_bias = hn::Add(sum_bias, dbefore);
  }
  hn::Store(hn::Add(hn::Load(d, dD), sum_D), d, dD);
  hn::Store(hn::Add(hn::Load(d, dbias), sum_bias), d, dbias);
}

void scan_backward_cell(const SelectiveScanBackward& op, const Cell& cell,
                        const CellMemory& memory) {
  const FlushDenormals flush;
  const int64_t n = op.A_log.cols();
  const int64_t blocks = (cell.end_channel - cell.first_channel + kLanes - 1) / kLanes;
  float* next = memory.scratch;
  const auto take = [&](int64_t count) {
    float* const memory = next;
    next += count * kLanes;
    return memory;
  };
  float* const rates = take(blocks * n);   // (blocks, n, lanes)
  float* const carry = take(blocks * n);   // (blocks, n, lanes)
  float* const drates = take(blocks * n);  // (blocks, n, lanes)
  float* const dD = take(blocks);          // (blocks, lanes)
  float* const dbias = take(blocks);       // (blocks, lanes)
  float* const steps_of_blocks = take(blocks * kStepArrays * kScanBlock);
  const auto at = [=](int64_t b) {
    float* const first = steps_of_blocks + b * kStepArrays * kScanBlock * kLanes;
    const auto part = [=](int64_t k) { return first + k * kScanBlock * kLanes; };
    return StepScratch{part(0), part(1), part(2), part(3), part(4),
                       part(5), part(6), part(7), part(8)};
  };
  float* const decays = take(kScanBlock * kStatesPerPass);  // (steps, states, lanes)
  float* const states =
      take(kScanBlock * kStatesPerPass);  // (steps, states, lanes), each before its step
  float* const dBC = take(kScanBlock * 2 * kStatesPerPass);  // (steps, dB | dC, states, lanes)
  float* const sums =
      take(2 * kStatesPerPass * kScanBlock / kLanes + 1);  // (steps, dB | dC, states)

  std::fill_n(drates, blocks * (n + 2) * kLanes, 0.f);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t channel = cell.first_channel + b * kLanes;
    load_decay_rates(op.A_log, channel, std::min(kLanes, cell.end_channel - channel),
                     rates + b * n * kLanes);
  }

  for (int64_t p = cell.first_piece; p < cell.end_piece; ++p) {
    const Piece& piece = op.rows->pieces()[p];
    const Track x(op.x, piece, op.reverse), dt(op.dt, piece, op.reverse),
        z(op.z, piece, op.reverse);
    const Track B(op.B, piece, op.reverse), C(op.C, piece, op.reverse),
        dy(op.dy, piece, op.reverse);
    const Track dx(op.dx, piece, op.reverse), ddt(op.ddt, piece, op.reverse),
        dz(op.dz, piece, op.reverse), y(op.y, piece, op.reverse);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t channel = cell.first_channel + b * kLanes;
      if (op.dstate && piece.to >= 0)
        load_state(op.dstate, piece.to, channel, std::min(kLanes, cell.end_channel - channel),
                   carry + b * n * kLanes);
      else
        std::fill_n(carry + b * n * kLanes, n * kLanes, 0.f);
    }

    for (int64_t k = (piece.length - 1) / kScanBlock; k >= 0; --k) {
      const int64_t first = k * kScanBlock, steps = std::min(kScanBlock, piece.length - first);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t channel = cell.first_channel + b * kLanes;
        prepare_backward(op, x.from(first, channel), dt.from(first, channel),
                         z.first ? z.from(first, channel) : z, dy.from(first, channel), channel,
                         std::min(kLanes, cell.end_channel - channel), steps, at(b));
      }
      // A few states of all blocks, then the next few: so that dBC stays in L1 as well.
      const auto pass = [&](auto count, int64_t i) HWY_ATTR {
        constexpr int kStates = count.value;
        std::fill_n(dBC, kScanBlock * 2 * kStates * kLanes, 0.f);
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t channel = cell.first_channel + b * kLanes, place = (b * n + i) * kLanes;
          const int64_t valid = std::min(kLanes, cell.end_channel - channel);
          const float* const checkpoint =
              op.checkpoints.as<float>() +
              ((memory.first_checkpoint[p] + k) * op.x.cols() + channel) * n + i * valid;
          scan_states_backward<kStates>(rates + place, carry + place, drates + place, checkpoint,
                                        valid, B.from(first, i), C.from(first, i), at(b), steps,
                                        bool(z.first), decays, states, dBC);
        }
        sum_lanes(dBC, steps * 2 * kStates, sums);
        for (int64_t s = 0; s < steps; ++s) {
          const int64_t row =
              op.reverse ? piece.begin + piece.length - 1 - first - s : piece.begin + first + s;
          float* const to = memory.dBC + row * 2 * n + i;
          std::copy_n(sums + s * 2 * kStates, kStates, to);
          std::copy_n(sums + (s * 2 + 1) * kStates, kStates, to + n);
        }
      };
      int64_t i = 0;
      for (; i + kStatesPerPass <= n; i += kStatesPerPass)
        pass(std::integral_constant<int, kStatesPerPass>(), i);
      for (; i < n; ++i) pass(std::integral_constant<int, 1>(), i);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t channel = cell.first_channel + b * kLanes;
        finish_backward(op, x.from(first, channel), dx.from(first, channel),
                        ddt.from(first, channel), dz.first ? dz.from(first, channel) : dz,
                        y.first ? y.from(first, channel) : y, channel,
                        std::min(kLanes, cell.end_channel - channel), steps, at(b), dD + b * kLanes,
                        dbias + b * kLanes);
      }
    }

    if (op.dstate && piece.from >= 0)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t channel = cell.first_channel + b * kLanes;
        store_state(op.dstate, piece.from, channel, std::min(kLanes, cell.end_channel - channel),
                    carry + b * n * kLanes, !memory.first_reader[p]);
      }
  }

  // d/dA_log = d/d(rate) rate, where d/d(rate) misses a factor of log 2.
  for (int64_t channel = cell.first_channel; channel < cell.end_channel; ++channel) {
    const int64_t b = (channel - cell.first_channel) / kLanes,
                  lane = (channel - cell.first_channel) % kLanes;
    float* const to = memory.params + channel * (n + 2);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t place = (b * n + i) * kLanes + lane;
      to[i] = drates[place] * rates[place] * kLn2;
    }
    to[n] = dD[b * kLanes + lane];
    to[n + 1] = dbias[b * kLanes + lane];
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(lanes);
HWY_EXPORT(scan_backward_cell);

void CpuBackend::run(const SelectiveScanBackward& op) {
  const char* const name = "selective_scan backward";
  check_scan_operands(name, *this, op);
  const int64_t t = op.rows->total(), e = op.x.cols(), n = op.A_log.cols();
  check(op.checkpoints.data != nullptr || t == 0, "{}: checkpoints are missing", name);
  expect(name, "dy", op.dy, DType::f32, {t, e});
  expect(name, "dx", op.dx, DType::f32, {t, e});
  expect(name, "ddt", op.ddt, DType::f32, {t, e});
  expect(name, "dB", op.dB, DType::f32, {t, n});
  expect(name, "dC", op.dC, DType::f32, {t, n});
  expect(name, "dA_log", op.dA_log, DType::f32, {e, n});
  expect(name, "dD", op.dD, DType::f32, {e});
  expect(name, "ddt_bias", op.ddt_bias, DType::f32, {e});
  if (op.z) expect(name, "dz", op.dz, DType::f32, {t, e});
  check(op.z || !op.dz, "{}: dz is given without z", name);
  expect_if(name, "y", op.y, DType::f32, {t, e});
  check(op.z || !op.y, "{}: y is given without z", name);
  if (op.dstate) check_scan_state(name, "dstate", op.dstate, *op.rows, e, n);
  if (t == 0 || e == 0) return;

  const std::vector<uint8_t> first_reader = first_readers(*op.rows);
  const bool shared = std::count(first_reader.begin(), first_reader.end(), 0) > 0;
  const bool parallel = threads_ > 1 && t * e * n >= kParallelWork;
  const int64_t width = HWY_DYNAMIC_DISPATCH(lanes)();
  const Grid grid = make_grid(*op.rows, e, width, parallel ? threads_ : 1, !(shared && op.dstate));
  const auto checkpoints = first_checkpoints(*op.rows);
  const int64_t size = scratch_floats((grid.most_channels + width - 1) / width, n, width);
  const int64_t cells = grid.cells.size();
  const Tensor scratch(*this, DType::f32, {cells, size});
  const Tensor dBC(*this, DType::f32, {grid.channel_groups, t, 2 * n});
  const Tensor params(*this, DType::f32, {grid.piece_groups, e, n + 2});
  const auto scan = HWY_DYNAMIC_DISPATCH(scan_backward_cell);
#pragma omp parallel num_threads(threads_) if (parallel)
  {
#pragma omp for schedule(static, 1)
    for (int64_t i = 0; i < cells; ++i)
      scan(op, grid.cells[i],
           {.first_checkpoint = checkpoints.data(),
            .first_reader = first_reader.data(),
            .scratch = scratch.as<float>() + i * size,
            .dBC = dBC.as<float>() + grid.cells[i].channel_group * t * 2 * n,
            .params = params.as<float>() + grid.cells[i].piece_group * e * (n + 2)});
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < t; ++row) {
      float *const dB = op.dB.row<float>(row), *const dC = op.dC.row<float>(row);
      for (int64_t group = 0; group < grid.channel_groups; ++group) {
        const float* const part = dBC.as<float>() + (group * t + row) * 2 * n;
        for (int64_t i = 0; i < n; ++i) {
          dB[i] = group == 0 ? part[i] : dB[i] + part[i];
          dC[i] = group == 0 ? part[n + i] : dC[i] + part[n + i];
        }
      }
    }
#pragma omp for schedule(static)
    for (int64_t channel = 0; channel < e; ++channel)
      for (int64_t group = 0; group < grid.piece_groups; ++group) {
        const float* const part = params.as<float>() + (group * e + channel) * (n + 2);
        for (int64_t i = 0; i < n; ++i) op.dA_log.row<float>(channel)[i] += part[i];
        op.dD.as<float>()[channel] += part[n];
        op.ddt_bias.as<float>()[channel] += part[n + 1];
      }
  }
}

}  // namespace coil
#endif  // HWY_ONCE
