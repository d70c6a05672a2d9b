// Products of a few rows with f32 or bf16 matrices that lie (n, k) in a cache: what a step of
// decoding (mamba_step.cc, unet_step.cc) does most, in the time of reading the weights once. A
// vector's worth of outputs is computed at once, each with a sum of its own along k, in an order
// that depends on neither rows nor threads: a sequence gets the same bits alone and beside others.
#include <algorithm>

#include "kernels/cpu/step_team.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/step_product.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/scan_blocks-inl.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

HWY_INLINE V load_weights(const float* from) { return hn::LoadU(d, from); }
HWY_INLINE V load_weights(const uint16_t* from) {  // bf16
  const hn::RebindToUnsigned<FloatTag> bits;
  const hn::Rebind<uint16_t, FloatTag> half;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(bits, hn::LoadU(half, from))));
}

// The first `count` of a vector's weights, then zeros.
HWY_INLINE V load_weights(const float* from, int64_t count) { return load_part(d, from, count); }
HWY_INLINE V load_weights(const uint16_t* from, int64_t count) {
  HWY_ALIGN uint16_t part[kLanes] = {};
  std::copy_n(from, count, part);
  return load_weights(part);
}

// Lane q: the sum of sums[q].
HWY_INLINE V sum_of_each(V* sums) {
#if HWY_TARGET != HWY_SCALAR
#pragma GCC unroll 4
  for (int64_t width = kLanes / 2; width >= 1; width /= 2)
#pragma GCC unroll 8
    for (int64_t q = 0; q < width; ++q)
      sums[q] = hn::Add(hn::ConcatEven(d, sums[2 * q + 1], sums[2 * q]),
                        hn::ConcatOdd(d, sums[2 * q + 1], sums[2 * q]));
#endif
  return sums[0];
}

// kRows rows of a times kLanes / kRows rows of b, as many sums as a vector has lanes. Four rows of
// b side by side: a word of a is read once for them, and no sum is waited for. (One after the other
// a step of two sequences takes twice as long as of one; with four, 1.3 times.)
template <int kRows, class T>
HWY_INLINE V row_products(const float* HWY_RESTRICT a, int64_t a_stride, const T* HWY_RESTRICT b,
                          int64_t b_stride, int64_t k) {
  constexpr int64_t kColumns = kLanes / kRows, kSide = std::min<int64_t>(kColumns, 4);
  const int64_t whole = k / kLanes * kLanes;
  V sums[kLanes];
#pragma GCC unroll 16
  for (int64_t q = 0; q < kColumns; q += kSide, b += kSide * b_stride) {
    V sum[kRows * kSide];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kRows * kSide; ++i) sum[i] = hn::Zero(d);
    const auto add = [&](int64_t p, auto load_a, auto load_b) HWY_ATTR {
      V from[kRows];
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i) from[i] = load_a(a + i * a_stride + p);
#pragma GCC unroll 4
      for (int64_t s = 0; s < kSide; ++s) {
        const V weights = load_b(b + s * b_stride + p);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kRows; ++i)
          sum[i * kSide + s] = hn::MulAdd(from[i], weights, sum[i * kSide + s]);
      }
    };
    for (int64_t p = 0; p < whole; p += kLanes)
      add(
          p, [](const float* from) HWY_ATTR { return hn::LoadU(d, from); },
          [](const T* from) HWY_ATTR { return load_weights(from); });
    if (whole < k)
      add(
          whole, [=](const float* from) HWY_ATTR { return load_part(d, from, k - whole); },
          [=](const T* from) HWY_ATTR { return load_weights(from, k - whole); });
#pragma GCC unroll 4
    for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int64_t s = 0; s < kSide; ++s) sums[i * kColumns + q + s] = sum[i * kSide + s];
  }
  return sum_of_each(sums);
}

HWY_INLINE void store_sums(const StepProduct& op, int64_t row, int64_t column, int64_t count,
                           V sum) {
  float* const c = op.c.row<float>(row) + column;
  if (op.bias) sum = hn::Add(sum, load_part(d, op.bias.as<float>() + column, count));
  if (op.add) sum = hn::Add(sum, load_part(d, c, count));
  store_part(d, sum, c, count);
}

// Of row i on, kRows of them, and columns j … j + count.
template <int kRows, class T>
HWY_INLINE void multiply_block(const StepProduct& op, int64_t i, int64_t j, int64_t count) {
  constexpr int64_t kColumns = kLanes / kRows;
  const int64_t k = op.a.cols(), end = j + count;
  const float* const bias = op.bias.as<float>();
  HWY_ALIGN float sums[kLanes];
  for (; j < end; j += kColumns) {
    const int64_t width = std::min(kColumns, end - j);
    // Where fewer rows of b are left than are read: one by one, each as all of them.
    const bool all = j + kColumns <= op.b.rows();
    for (int64_t q = 0; q < (all ? 1 : width); ++q) {
      const V sum = row_products<kRows, T>(op.a.row<float>(i), op.a.stride[0], op.b.row<T>(j + q),
                                           all ? op.b.stride[0] : 0, k);
      if (kRows == 1 && all) {
        store_sums(op, i, j, width, sum);
        continue;
      }
      hn::Store(sum, d, sums);
      for (int64_t r = 0; r < kRows; ++r) {
        float* const c = op.c.row<float>(i + r) + j + q;
        for (int64_t s = 0; s < (all ? width : 1); ++s) {
          float value = sums[r * kColumns + s];
          if (bias) value += bias[j + q + s];
          c[s] = op.add ? c[s] + value : value;
        }
      }
    }
  }
}

// A vector's worth of columns for all rows, then the next.
template <class T>
void products(const StepProduct& op, Range columns) {
  const int64_t m = op.c.rows();
  for (int64_t j = columns.begin; j < columns.end; j += kLanes) {
    const int64_t count = std::min(kLanes, columns.end - j);
    int64_t i = 0;
    if constexpr (kLanes >= 4) {
      for (; i + 4 <= m; i += 4) multiply_block<4, T>(op, i, j, count);
      if (i + 2 <= m) multiply_block<2, T>(op, i, j, count), i += 2;
    }
    for (; i < m; ++i) multiply_block<1, T>(op, i, j, count);
  }
}

void any_products(const StepProduct& op, Range columns) {
  if (op.b.dtype == DType::bf16)
    products<uint16_t>(op, columns);
  else
    products<float>(op, columns);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(any_products);

void step_product(const StepProduct& op, Range columns) {
  HWY_DYNAMIC_DISPATCH(any_products)(op, columns);
}

}  // namespace coil
#endif  // HWY_ONCE
