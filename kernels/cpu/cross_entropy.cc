// Cross-entropy of a softmax, with its gradient in the same pass.
//   loss = -weight * (logits[target] - log sum exp(logits));  dlogits = scale * weight * (softmax -
//   onehot)
// The largest logit is subtracted first. A row with NaN, or without a finite largest logit, gives
// NaN.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/expect.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/cross_entropy.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include <hwy/contrib/math/math-inl.h>

#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

// The largest of x, or NaN where one of them is.
float largest(const float* x, int64_t count) {
  const FloatTag tag;
  const int64_t lanes = hn::Lanes(tag);
  auto most = hn::Set(tag, -std::numeric_limits<float>::infinity());
  auto doubt = hn::Zero(tag);  // NaN once a NaN was seen
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto value = hn::LoadU(tag, x + i);
    most = hn::Max(most, value);
    doubt = hn::IfThenElse(hn::Eq(value, value), doubt, value);
  }
  float result = hn::GetLane(hn::MaxOfLanes(tag, most));
  bool nan = std::isnan(hn::GetLane(hn::SumOfLanes(tag, doubt)));
  for (; i < count; ++i) {
    nan = nan || std::isnan(x[i]);
    result = std::max(result, x[i]);
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : result;
}

void cross_entropy_rows(const CrossEntropy& op, int64_t begin, int64_t end) {
  const int64_t v = op.logits.cols();
  for (int64_t t = begin; t < end; ++t) {
    const float* x = op.logits.row<float>(t);
    const int32_t target = op.targets.as<int32_t>()[t];
    float& loss = op.loss.as<float>()[t];
    float* dx = op.dlogits ? op.dlogits.row<float>(t) : nullptr;
    if (target < 0) {
      loss = 0;
      if (dx) std::fill_n(dx, v, 0.f);
      continue;
    }
    const float weight = op.class_weights ? op.class_weights.as<float>()[target] : 1.f;
    const float most = largest(x, v);
    if (!std::isfinite(most)) {
      loss = std::numeric_limits<float>::quiet_NaN();
      if (dx) std::fill_n(dx, v, loss);
      continue;
    }
    const float own = x[target];  // read before dlogits, which may be logits, is written
    const float sum = sum_over(v, [=](auto tag, int64_t i) HWY_ATTR {
      const auto power = hn::Exp(tag, hn::Sub(hn::LoadU(tag, x + i), hn::Set(tag, most)));
      if (dx) hn::StoreU(power, tag, dx + i);
      return power;
    });
    loss = static_cast<float>(weight * (std::log(static_cast<double>(sum)) + most - own));
    if (!dx) continue;
    const float factor = op.scale * weight / sum;
    for_each(v, [=](auto tag, int64_t i) HWY_ATTR {
      hn::StoreU(hn::Mul(hn::LoadU(tag, dx + i), hn::Set(tag, factor)), tag, dx + i);
    });
    dx[target] -= op.scale * weight;
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(cross_entropy_rows);

void CpuBackend::run(const CrossEntropy& op) {
  constexpr int64_t kParallel = 8 << 10;  // elements from which threads pay
  expect_rank("cross_entropy", "logits", op.logits, 2);
  const int64_t m = op.logits.rows(), v = op.logits.cols();
  expect("cross_entropy", "logits", op.logits, DType::f32, {m, v});
  expect("cross_entropy", "targets", op.targets, DType::i32, {m});
  expect("cross_entropy", "loss", op.loss, DType::f32, {m});
  expect_if("cross_entropy", "dlogits", op.dlogits, DType::f32, {m, v});
  expect_if("cross_entropy", "class_weights", op.class_weights, DType::f32, {v});
  expect_if("cross_entropy", "total", op.total, DType::f64, {1});
  const int32_t* targets = op.targets.as<int32_t>();
  for (int64_t i = 0; i < m; ++i)
    check(targets[i] >= -1 && targets[i] < v,
          "cross_entropy: target {} in row {}, expected -1 to {}", targets[i], i, v - 1);
  const auto rows = &HWY_DYNAMIC_DISPATCH(cross_entropy_rows);
#pragma omp parallel num_threads(threads_) if (m * v >= kParallel)
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    rows(op, m * thread / count, m * (thread + 1) / count);
  }
  if (!op.total) return;
  double sum = 0;
  for (int64_t i = 0; i < m; ++i) sum += op.loss.as<float>()[i];
  *op.total.as<double>() += sum;
}

}  // namespace coil
#endif  // HWY_ONCE
