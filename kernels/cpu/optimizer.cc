// Sum of squares in f64 and AdamW (Loshchilov and Hutter 2019), in torch's order of operations:
//   w *= 1 - lr * decay;  m += (g - m) * (1 - b1);  v = v * b2 + (1 - b2) * g * g
//   w -= lr / (1 - b1^step) * m / (sqrt(v) / sqrt(1 - b2^step) + eps)
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/expect.h"

#ifndef COIL_ADAMW_FACTORS  // this file is included once per target
#define COIL_ADAMW_FACTORS
namespace coil {
struct AdamWFactors {
  float shrink, keep2, add1, add2, step, root2, eps, grad_scale;
};
}  // namespace coil
#endif

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

void adamw_block(const AdamW& op, const AdamWFactors& f, int64_t begin, int64_t end) {
  float* w = op.w.as<float>() + begin;
  const float* g = op.g.as<float>() + begin;
  float* m = op.m.as<float>() + begin;
  float* v = op.v.as<float>() + begin;
  for_each(end - begin, [=](auto tag, int64_t i) HWY_ATTR {
    const auto grad = hn::Mul(hn::LoadU(tag, g + i), hn::Set(tag, f.grad_scale));
    auto first = hn::LoadU(tag, m + i);
    first = hn::MulAdd(hn::Sub(grad, first), hn::Set(tag, f.add1), first);
    auto second = hn::Mul(hn::LoadU(tag, v + i), hn::Set(tag, f.keep2));
    second = hn::MulAdd(hn::Mul(grad, hn::Set(tag, f.add2)), grad, second);
    hn::StoreU(first, tag, m + i);
    hn::StoreU(second, tag, v + i);
    const auto root = hn::Div(hn::Sqrt(second), hn::Set(tag, f.root2));
    const auto update =
        hn::Div(hn::Mul(first, hn::Set(tag, f.step)), hn::Add(root, hn::Set(tag, f.eps)));
    const auto weight = hn::Mul(hn::LoadU(tag, w + i), hn::Set(tag, f.shrink));
    hn::StoreU(hn::Sub(weight, update), tag, w + i);
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
  check(op.x && op.x.dtype == DType::f32 && op.x.contiguous(),
        "sum_squares: x is {}, expected contiguous f32", op.x.shape());
  expect("sum_squares", "out", op.out, DType::f64, {1});
  const int64_t count = op.x.count(), blocks = (count + kBlock - 1) / kBlock;
  const auto square = &HWY_DYNAMIC_DISPATCH(square_block);
  std::vector<double> sums(blocks);
#pragma omp parallel for num_threads(threads_) schedule(static) if (blocks > 4)
  for (int64_t i = 0; i < blocks; ++i)
    sums[i] = square(op.x.as<float>() + i * kBlock, std::min(kBlock, count - i * kBlock));
  for (const double sum : sums) *op.out.as<double>() += sum;
}

void CpuBackend::run(const AdamW& op) {
  check(op.w && op.w.dtype == DType::f32 && op.w.contiguous(),
        "adamw: w is {}, expected contiguous f32", op.w.shape());
  const auto same = [&](const char* name, const View& view) {
    check(view && view.dtype == DType::f32 && view.contiguous() && view.count() == op.w.count(),
          "adamw: {} is {}, expected {}, contiguous", name, view.shape(), op.w.shape());
  };
  same("g", op.g);
  same("m", op.m);
  same("v", op.v);
  check(op.step >= 1, "adamw: step {}, expected 1 or more", op.step);
  const auto decayed = [&](float beta) {
    return 1 - std::pow(static_cast<double>(beta), static_cast<double>(op.step));
  };
  const AdamWFactors factors{
      .shrink = static_cast<float>(1 - static_cast<double>(op.lr) * op.decay),
      .keep2 = op.beta2,
      .add1 = static_cast<float>(1 - static_cast<double>(op.beta1)),
      .add2 = static_cast<float>(1 - static_cast<double>(op.beta2)),
      .step = static_cast<float>(op.lr / decayed(op.beta1)),
      .root2 = static_cast<float>(std::sqrt(decayed(op.beta2))),
      .eps = op.eps,
      .grad_scale = op.grad_scale};
  const int64_t count = op.w.count(), blocks = (count + kBlock - 1) / kBlock;
  const auto update = &HWY_DYNAMIC_DISPATCH(adamw_block);
#pragma omp parallel for num_threads(threads_) schedule(static) if (blocks > 2)
  for (int64_t i = 0; i < blocks; ++i)
    update(op, factors, i * kBlock, std::min(count, (i + 1) * kBlock));
}

}  // namespace coil
#endif  // HWY_ONCE
