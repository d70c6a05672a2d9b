// A few rows times a bf16 weight matrix that lies (n, k): decoding, one step of each sequence.
//
// The time is that of reading the weights, so they are read once, row by row as they lie (four rows
// at a time stop the processor's prefetching: 10 GB/s instead of 22 on one core of a Zen 4), and
// unpacked in registers: of a pair of bf16 in 32 bits the second is what a mask leaves and the
// first what a shift does. (For f32 weights such a loop gains nothing over oneDNN.)
#include "kernels/cpu/skinny.h"

#include <algorithm>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/skinny.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

using BitsTag = hn::RebindToUnsigned<FloatTag>;
using Floats = hn::Vec<FloatTag>;

float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// kM rows of a with one row of b. Each pair of vectors of b has sums of its own.
template <int kM>
HWY_INLINE void row_products(const SkinnyProduct& op, int64_t row, int64_t column) {
  const FloatTag tag;
  const BitsTag bits;
  const int64_t lanes = hn::Lanes(tag), k = op.k;
  const float* a = op.a + row * k;
  const uint16_t* b = op.b + column * op.b_stride;
  Floats sums[kM][2], others[kM][2];
  for (int i = 0; i < kM; ++i)
    for (int j = 0; j < 2; ++j) sums[i][j] = others[i][j] = hn::Zero(tag);
  const auto add = [&](int64_t p, Floats(&to)[kM][2]) HWY_ATTR {
    const auto pairs = hn::LoadU(bits, reinterpret_cast<const uint32_t*>(b + p));
    const auto first = hn::BitCast(tag, hn::ShiftLeft<16>(pairs));
    const auto second = hn::BitCast(tag, hn::And(pairs, hn::Set(bits, 0xffff0000u)));
    for (int i = 0; i < kM; ++i) {
      to[i][0] = hn::MulAdd(hn::LoadU(tag, a + i * k + p), first, to[i][0]);
      to[i][1] = hn::MulAdd(hn::LoadU(tag, a + i * k + p + lanes), second, to[i][1]);
    }
  };
  int64_t p = 0;
  for (; p + 4 * lanes <= k; p += 4 * lanes) {
    add(p, sums);
    add(p + 2 * lanes, others);
  }
  for (; p + 2 * lanes <= k; p += 2 * lanes) add(p, sums);
  for (int i = 0; i < kM; ++i) {
    float* c = op.c + (row + i) * op.c_stride + column;
    const Floats all =
        hn::Add(hn::Add(sums[i][0], sums[i][1]), hn::Add(others[i][0], others[i][1]));
    float sum = hn::GetLane(hn::SumOfLanes(tag, all));
    for (int64_t q = p; q < k; ++q) sum += a[i * k + q] * widened(b[q]);
    sum *= op.alpha;
    if (op.beta != 0) sum += op.beta * *c;
    if (op.bias) sum += op.bias[column];
    *c = sum;
  }
}

void skinny(const SkinnyProduct& op, int64_t begin, int64_t end) {
  for (int64_t column = begin; column < end; ++column) {
    int64_t row = 0;
    for (; row + 4 <= op.m; row += 4) row_products<4>(op, row, column);
    if (row + 2 <= op.m) row_products<2>(op, row, column), row += 2;
    if (row < op.m) row_products<1>(op, row, column);
  }
}

void split_rows(const float* a, int64_t m, int64_t k, int64_t a_stride, float* split) {
  const int64_t lanes = hn::Lanes(FloatTag());
  for (int64_t i = 0; i < m; ++i, a += a_stride, split += k) {
    int64_t p = 0;
    for (; p + 2 * lanes <= k; p += 2 * lanes)
      for (int64_t q = 0; q < lanes; ++q) {
        split[p + q] = a[p + 2 * q];
        split[p + lanes + q] = a[p + 2 * q + 1];
      }
    std::copy(a + p, a + k, split + p);
  }
}

void widen_row(const uint16_t* x, int64_t count, float* y) {
  for_each(count, [=](auto tag, int64_t i) HWY_ATTR {
    const hn::RebindToUnsigned<decltype(tag)> bits;
    const hn::Rebind<uint16_t, decltype(tag)> half;
    const auto value = hn::ShiftLeft<16>(hn::PromoteTo(bits, hn::LoadU(half, x + i)));
    hn::StoreU(hn::BitCast(tag, value), tag, y + i);
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(skinny);
HWY_EXPORT(split_rows);
HWY_EXPORT(widen_row);

void skinny_product(const SkinnyProduct& op, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(skinny)(op, begin, end);
}

void split_pairs(const float* a, int64_t m, int64_t k, int64_t a_stride, float* split) {
  HWY_DYNAMIC_DISPATCH(split_rows)(a, m, k, a_stride, split);
}

void widen(const uint16_t* x, int64_t count, float* y) {
  HWY_DYNAMIC_DISPATCH(widen_row)(x, count, y);
}

}  // namespace coil
#endif  // HWY_ONCE
