// What the selective scan's forward and backward share: the walk along a piece, the table of A,
// states of a block of channels, and the checks of operands. Included once per Highway target,
// after hwy/foreach_target.h.
#ifndef COIL_KERNELS_CPU_SCAN_BLOCKS_INL_H_
#define COIL_KERNELS_CPU_SCAN_BLOCKS_INL_H_

#include <algorithm>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/track.h"
#include "kernels/expect.h"
#include "kernels/ops.h"

namespace coil {

constexpr int64_t kParallelWork = 8 << 10;  // channels x states x steps from which threads pay

inline std::vector<int64_t> first_checkpoints(const Rows& rows) {
  std::vector<int64_t> first;
  int64_t count = 0;
  for (const Piece& piece : rows.pieces()) {
    first.push_back(count);
    count += (piece.length + kScanBlock - 1) / kScanBlock;
  }
  return first;
}

// The operands that forward and backward share.
template <class Op>
void check_scan_operands(const char* name, const Backend& backend, const Op& op) {
  check(op.rows != nullptr, "{}: rows are missing", name);
  expect_rank(name, "x", op.x, 2);
  expect_rank(name, "A_log", op.A_log, 2);
  const int64_t t = op.rows->total(), e = op.x.cols(), n = op.A_log.cols();
  expect(name, "x", op.x, DType::f32, {t, e});
  expect(name, "dt", op.dt, DType::f32, {t, e});
  expect(name, "A_log", op.A_log, DType::f32, {e, n});
  expect(name, "B", op.B, DType::f32, {t, n});
  expect(name, "C", op.C, DType::f32, {t, n});
  expect(name, "D", op.D, DType::f32, {e});
  expect(name, "dt_bias", op.dt_bias, DType::f32, {e});
  expect_if(name, "z", op.z, DType::f32, {t, e});
  expect_if(name, "checkpoints", op.checkpoints, DType::f32,
            {scan_checkpoints(backend, *op.rows), e, n});
  check(!op.checkpoints || op.checkpoints.contiguous(), "{}: checkpoints are not contiguous", name);
  check(!op.reverse || op.rows->slots() == 0,
        "{}: a piece carries state, expected whole sequences with reverse", name);
}

inline void check_scan_state(const char* name, const char* operand, const View& state,
                             const Rows& rows, int64_t e, int64_t n) {
  expect_rank(name, operand, state, 3);
  expect(name, operand, state, DType::f32, {state.rows(), e, n});
  check(state.rows() >= rows.slots(), "{}: {} is {}, expected {} slots or more", name, operand,
        state.shape(), rows.slots());
}

}  // namespace coil
#endif  // COIL_KERNELS_CPU_SCAN_BLOCKS_INL_H_

#if defined(COIL_SCAN_BLOCKS_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef COIL_SCAN_BLOCKS_TARGET_
#undef COIL_SCAN_BLOCKS_TARGET_
#else
#define COIL_SCAN_BLOCKS_TARGET_
#endif

#include "kernels/cpu/simd_math.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {

using FloatTag = hn::ScalableTag<float>;
using V = hn::Vec<FloatTag>;
constexpr FloatTag d;
constexpr int64_t kLanes = hn::MaxLanes(FloatTag());

// A log2(e) = -exp(A_log) log2(e).
HWY_INLINE V decay_rate(V A_log) { return hn::Mul(exp(d, A_log), hn::Set(d, -kLog2e)); }

// table[i, lane] of one block of channels; lanes past `valid` are 0.
HWY_INLINE void load_decay_rates(const View& A_log, int64_t channel, int64_t valid, float* table) {
  const int64_t n = A_log.cols();
  std::fill_n(table, n * kLanes, 0.f);
  HWY_ALIGN float rates[kLanes];
  for (int64_t lane = 0; lane < valid; ++lane)
    for (int64_t i = 0; i < n; i += kLanes) {
      const int64_t states = std::min(kLanes, n - i);
      hn::Store(decay_rate(load_part(d, A_log.row<float>(channel + lane) + i, states)), d, rates);
      for (int64_t k = 0; k < states; ++k) table[(i + k) * kLanes + lane] = rates[k];
    }
}

// h[i, lane] from and to a slot's rows (e, n).
HWY_INLINE void load_state(const View& state, int32_t slot, int64_t channel, int64_t valid,
                           float* h) {
  const int64_t n = state.size[2];
  std::fill_n(h, n * kLanes, 0.f);
  if (slot < 0) return;
  for (int64_t lane = 0; lane < valid; ++lane) {
    const float* from = state.row<float>(slot) + (channel + lane) * state.stride[1];
    for (int64_t i = 0; i < n; ++i) h[i * kLanes + lane] = from[i];
  }
}
HWY_INLINE void store_state(const View& state, int32_t slot, int64_t channel, int64_t valid,
                            const float* h, bool add = false) {
  const int64_t n = state.size[2];
  for (int64_t lane = 0; lane < valid; ++lane) {
    float* to = state.row<float>(slot) + (channel + lane) * state.stride[1];
    for (int64_t i = 0; i < n; ++i)
      to[i] = add ? to[i] + h[i * kLanes + lane] : h[i * kLanes + lane];
  }
}

// to[i] = sum over lanes of from[i, lane], kLanes sums at a time: halves of pairs are added until
// one vector is left. Of `from` and `to`, whole vectors are read and written.
HWY_INLINE void sum_lanes(const float* from, int64_t count, float* to) {
#if HWY_TARGET == HWY_SCALAR
  std::copy_n(from, count, to);
#else
  for (int64_t i = 0; i < count; i += kLanes) {
    V part[kLanes];
#pragma GCC unroll 16
    for (int64_t k = 0; k < kLanes; ++k) part[k] = hn::Load(d, from + (i + k) * kLanes);
#pragma GCC unroll 4
    for (int64_t width = kLanes / 2; width >= 1; width /= 2)
#pragma GCC unroll 8
      for (int64_t k = 0; k < width; ++k)
        part[k] = hn::Add(hn::ConcatEven(d, part[2 * k + 1], part[2 * k]),
                          hn::ConcatOdd(d, part[2 * k + 1], part[2 * k]));
    hn::Store(part[0], d, to + i);
  }
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
