// Sum of squares in f64 and AdamW (Loshchilov and Hutter 2019), in torch's order of operations:
//   w *= 1 - lr * decay;  m += (g - m) * (1 - b1);  v = v * b2 + (1 - b2) * g * g
//   w -= lr / (1 - b1^step) * m / (sqrt(v) / sqrt(1 - b2^step) + eps)
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/adamw.h"
#include "kernels/cpu/cpu_backend.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/optimizer.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

double square_block(const float* x, int64_t count) {
  const hn::ScalableTag<double> wide;
  const hn::Rebind<float, decltype(wide)> narrow;
  const int64_t lanes = hn::Lanes(wide);
  auto even = hn::Zero(wide), odd = hn::Zero(wide);
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    const auto a = hn::PromoteTo(wide, hn::LoadU(narrow, x + i));
    const auto b = hn::PromoteTo(wide, hn::LoadU(narrow, x + i + lanes));
    even = hn::MulAdd(a, a, even);
    odd = hn::MulAdd(b, b, odd);
  }
  double sum = hn::GetLane(hn::SumOfLanes(wide, hn::Add(even, odd)));
  for (; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

void adamw_block(const AdamW::Item& item, const AdamWFactors& f, float shrink, float scale,
                 int64_t begin, int64_t end) {
  float* w = item.w.as<float>() + begin;
  float* g = item.g.as<float>() + begin;
  float* m = item.m.as<float>() + begin;
  float* v = item.v.as<float>() + begin;
  for_each(end - begin, [=](auto tag, int64_t i) HWY_ATTR {
    const auto grad = hn::Mul(hn::LoadU(tag, g + i), hn::Set(tag, scale));
    auto first = hn::LoadU(tag, m + i);
    first = hn::MulAdd(hn::Sub(grad, first), hn::Set(tag, f.add1), first);
    auto second = hn::Mul(hn::LoadU(tag, v + i), hn::Set(tag, f.keep2));
    second = hn::MulAdd(hn::Mul(grad, hn::Set(tag, f.add2)), grad, second);
    hn::StoreU(first, tag, m + i);
    hn::StoreU(second, tag, v + i);
    const auto root = hn::Div(hn::Sqrt(second), hn::Set(tag, f.root2));
    const auto update =
        hn::Div(hn::Mul(first, hn::Set(tag, f.step)), hn::Add(root, hn::Set(tag, f.eps)));
    const auto weight = hn::Mul(hn::LoadU(tag, w + i), hn::Set(tag, shrink));
    hn::StoreU(hn::Sub(weight, update), tag, w + i);
    hn::StoreU(hn::Zero(tag), tag, g + i);
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(square_block);
HWY_EXPORT(adamw_block);

namespace {
constexpr int64_t kBlock = 16 << 10;  // elements; fixed, so that sums do not depend on the threads
}  // namespace

void CpuBackend::run(const SumSquares& op) {
  check_operands(op);
  const auto square = &HWY_DYNAMIC_DISPATCH(square_block);
  for (const View& x : op.x) {
    const int64_t count = x.count(), blocks = (count + kBlock - 1) / kBlock;
    std::vector<double> sums(blocks);
#pragma omp parallel for num_threads(threads_) schedule(static) if (blocks > 4)
    for (int64_t i = 0; i < blocks; ++i)
      sums[i] = square(x.as<float>() + i * kBlock, std::min(kBlock, count - i * kBlock));
    for (const double sum : sums) *op.out.as<double>() += sum;
  }
}

void CpuBackend::run(const AdamW& op) {
  check_operands(op);
  float scale = 1;
  if (op.squares) {
    const double norm = std::sqrt(*op.squares.as<double>());
    if (!std::isfinite(norm)) return;
    if (op.clip > 0) scale = static_cast<float>(std::min(1.0, op.clip / (norm + 1e-6)));
  }
  const AdamWFactors factors = factors_of(op);
  const auto update = &HWY_DYNAMIC_DISPATCH(adamw_block);
  for (const AdamW::Item& item : op.items) {
    const float shrink = shrink_of(op, item);
    const int64_t count = item.w.count(), blocks = (count + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads_) schedule(static) if (blocks > 2)
    for (int64_t i = 0; i < blocks; ++i)
      update(item, factors, shrink, scale, i * kBlock, std::min(count, (i + 1) * kBlock));
    if (item.copy) copy(item.w.reshape({count}), item.copy.reshape({count}));
  }
}

}  // namespace coil
#endif  // HWY_ONCE
