// Of a step of a U-Net the scan and the gates, for the channels of one thread: unet_step.cc.
#include <algorithm>

#include "kernels/cpu/unet_step.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/unet_cells.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/scan_blocks-inl.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

// One step of kLanes states of a channel from state i on, h += z h + x: Re(K h) + more.
HWY_INLINE V scan_states(const float* table, int64_t n, int64_t i, float* h, V x, bool begins,
                         V more) {
  const auto at = [&](int64_t k) HWY_ATTR { return hn::LoadU(d, table + k * n + i); };
  V re = hn::Zero(d), im = hn::Zero(d);
  if (!begins) hn::LoadInterleaved2(d, h + 2 * i, re, im);
  const V zr = at(0), zi = at(1);
  const V next_re = hn::NegMulAdd(zi, im, hn::Add(hn::MulAdd(zr, re, re), x));
  const V next_im = hn::MulAdd(zi, re, hn::MulAdd(zr, im, im));
  hn::StoreInterleaved2(next_re, next_im, d, h + 2 * i);
  return hn::NegMulAdd(at(3), next_im, hn::MulAdd(at(2), next_re, more));
}

// Lanes are states, then channels of which each has its sum over states.
void scan_step(const UnetStep::Block& op, const UnetWalk& stage, const View& u, Range channels) {
  const int64_t n = op.table.size[2], whole = n / kLanes * kLanes, rest = n - whole;
  const FlushDenormals flush;
  HWY_ALIGN float sums[kLanes * kLanes] = {}, summed[kLanes];
  HWY_ALIGN float padded[6 * kLanes] = {};  // the table and the states past whole vectors
  for (int64_t first = channels.begin; first < channels.end; first += kLanes) {
    const int64_t count = std::min(kLanes, channels.end - first);
    for (int64_t row = 0; row < stage.rows(); ++row) {
      const UnetMember& member = stage.members[row];
      const float* const in = u.row<float>(row) + first;
      for (int64_t q = 0; q < count; ++q) {
        const float* const table = op.table.row<float>(first + q);
        float* const h = op.state.row<float>(member.slot) + (first + q) * op.state.stride[1];
        const V x = hn::Set(d, in[q]);
        V sum = hn::Zero(d);
        for (int64_t i = 0; i < whole; i += kLanes)
          sum = scan_states(table, n, i, h, x, member.begins, sum);
        if (rest > 0) {
          float* const state = padded + 4 * kLanes;
          for (int64_t k = 0; k < 4; ++k)
            std::copy_n(table + k * n + whole, rest, padded + k * kLanes);
          std::copy_n(h + 2 * whole, 2 * rest, state);
          std::fill_n(state + 2 * rest, 2 * (kLanes - rest), 0.f);
          sum = scan_states(padded, kLanes, 0, state, x, member.begins, sum);
          std::copy_n(state, 2 * rest, h + 2 * whole);
        }
        hn::Store(sum, d, sums + q * kLanes);
      }
      sum_lanes(sums, kLanes, summed);
      const V D = load_part(d, op.D.as<float>() + first, count);
      const V value = hn::MulAdd(D, load_part(d, in, count), hn::Load(d, summed));
      store_part(d, gelu(d, value), stage.y.row<float>(row) + first, count);
    }
  }
}

void gate(const View& ab, const View& to, bool add, Range columns) {
  const int64_t width = ab.cols() / 2;
  for (int64_t row = 0; row < ab.rows(); ++row) {
    const float *const a = ab.row<float>(row), *const b = a + width;
    float* const y = to.row<float>(row);
    for (int64_t j = columns.begin; j < columns.end; j += kLanes) {
      const int64_t count = std::min(kLanes, columns.end - j);
      V value = hn::Mul(load_part(d, a + j, count), sigmoid(d, load_part(d, b + j, count)));
      if (add) value = hn::Add(load_part(d, y + j, count), value);
      store_part(d, value, y + j, count);
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(scan_step);
HWY_EXPORT(gate);

void unet_scan(const UnetStep::Block& op, const UnetWalk& stage, const View& u, Range channels) {
  HWY_DYNAMIC_DISPATCH(scan_step)(op, stage, u, channels);
}
void unet_gate(const View& ab, const View& to, bool add, Range columns) {
  HWY_DYNAMIC_DISPATCH(gate)(ab, to, add, columns);
}

}  // namespace coil
#endif  // HWY_ONCE
