// RMS norm with the residual addition in front of it, forward and backward.
//   r = x + residual;  y = r * rstd * weight,  rstd = 1 / sqrt(mean(r^2) + eps)
//   dx = rstd * (dy * weight) - r * rstd^3 * mean(dy * weight * r) + dresidual;  dweight += sum_t
//   dy * r * rstd
// Zhang and Sennrich 2019, "Root Mean Square Layer Normalization". One pass over memory: a row
// stays in cache between its sum and its scaling.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/expect.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/norm.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {

namespace {

void norm_rows(const Norm& op, int64_t begin, int64_t end) {
  const int64_t d = op.x.cols();
  const float* weight = op.weight.as<float>();
  for (int64_t t = begin; t < end; ++t) {
    const float* x = op.x.row<float>(t);
    float square;
    if (op.residual) {
      const float* residual = op.residual.row<float>(t);
      float* sum = op.residual_out.row<float>(t);
      square = sum_over(d, [=](auto tag, int64_t i) HWY_ATTR {
        const auto r = hn::Add(hn::LoadU(tag, x + i), hn::LoadU(tag, residual + i));
        hn::StoreU(r, tag, sum + i);
        return hn::Mul(r, r);
      });
      x = sum;
    } else if (op.residual_out && op.residual_out.row<float>(t) != x) {
      float* sum = op.residual_out.row<float>(t);
      square = sum_over(d, [=](auto tag, int64_t i) HWY_ATTR {
        const auto r = hn::LoadU(tag, x + i);
        hn::StoreU(r, tag, sum + i);
        return hn::Mul(r, r);
      });
    } else {
      square = sum_over(d, [=](auto tag, int64_t i) HWY_ATTR {
        const auto r = hn::LoadU(tag, x + i);
        return hn::Mul(r, r);
      });
    }
    const float rstd = 1 / std::sqrt(square / static_cast<float>(d) + op.eps);
    if (op.rstd) op.rstd.as<float>()[t] = rstd;
    float* y = op.y.row<float>(t);
    if (weight) {
      for_each(d, [=](auto tag, int64_t i) HWY_ATTR {
        const auto scaled = hn::Mul(hn::LoadU(tag, x + i), hn::Set(tag, rstd));
        hn::StoreU(hn::Mul(scaled, hn::LoadU(tag, weight + i)), tag, y + i);
      });
    } else {
      for_each(d, [=](auto tag, int64_t i) HWY_ATTR {
        hn::StoreU(hn::Mul(hn::LoadU(tag, x + i), hn::Set(tag, rstd)), tag, y + i);
      });
    }
  }
}

// Rows begin … end; dweight (d), if not null, += their part.
void norm_backward_rows(const NormBackward& op, int64_t begin, int64_t end, float* dweight) {
  const int64_t d = op.x.cols();
  const float* weight = op.weight.as<float>();
  for (int64_t t = begin; t < end; ++t) {
    const float* x = op.x.row<float>(t);
    const float* dy = op.dy.row<float>(t);
    const float* dresidual = op.dresidual ? op.dresidual.row<float>(t) : nullptr;
    float* dx = op.dx.row<float>(t);
    const float rstd = op.rstd.as<float>()[t];
    const auto dnormed = [=](auto tag, int64_t i) HWY_ATTR {  // dy * weight
      const auto g = hn::LoadU(tag, dy + i);
      return weight ? hn::Mul(g, hn::LoadU(tag, weight + i)) : g;
    };
    const float dot = sum_over(d, [=](auto tag, int64_t i) HWY_ATTR {
      return hn::Mul(dnormed(tag, i), hn::LoadU(tag, x + i));
    });
    const float back = dot * rstd * rstd * rstd / static_cast<float>(d);
    for_each(d, [=](auto tag, int64_t i) HWY_ATTR {
      const auto r = hn::LoadU(tag, x + i);
      const auto normed = hn::Mul(r, hn::Set(tag, rstd));
      if (dweight) {
        const auto sum = hn::LoadU(tag, dweight + i);
        hn::StoreU(hn::MulAdd(hn::LoadU(tag, dy + i), normed, sum), tag, dweight + i);
      }
      auto g = hn::Mul(dnormed(tag, i), hn::Set(tag, rstd));
      g = hn::NegMulAdd(r, hn::Set(tag, back), g);
      if (dresidual) g = hn::Add(g, hn::LoadU(tag, dresidual + i));
      hn::StoreU(g, tag, dx + i);
    });
  }
}

void add_partial(float* sum, float* partial, int64_t count) { add_and_clear(sum, partial, count); }

}  // namespace

}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(norm_rows);
HWY_EXPORT(norm_backward_rows);
HWY_EXPORT(add_partial);

namespace {
constexpr int64_t kRows =
    512;  // summed in one partial of dweight: two short sums instead of a long one
constexpr int64_t kParallel = 32 << 10;  // elements from which threads pay
}  // namespace

void norm_rows_of(const Norm& op, int64_t begin, int64_t end) {
  HWY_DYNAMIC_DISPATCH(norm_rows)(op, begin, end);
}

void CpuBackend::run(const Norm& op) {
  expect_rank("norm", "x", op.x, 2);
  const int64_t t = op.x.rows(), d = op.x.cols();
  expect("norm", "x", op.x, DType::f32, {t, d});
  expect_if("norm", "residual", op.residual, DType::f32, {t, d});
  expect_if("norm", "weight", op.weight, DType::f32, {d});
  expect("norm", "y", op.y, DType::f32, {t, d});
  expect_if("norm", "residual_out", op.residual_out, DType::f32, {t, d});
  expect_if("norm", "rstd", op.rstd, DType::f32, {t});
  check(!op.residual || op.residual_out, "norm: residual_out is missing, expected {} with residual",
        op.residual.shape());
  if (t * d == 0) return;
  const auto rows = &HWY_DYNAMIC_DISPATCH(norm_rows);
  if (t * d < kParallel || threads_ == 1) return rows(op, 0, t);
#pragma omp parallel num_threads(threads_)
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    rows(op, t * thread / count, t * (thread + 1) / count);
  }
}

void CpuBackend::run(const NormBackward& op) {
  expect_rank("norm backward", "x", op.x, 2);
  const int64_t t = op.x.rows(), d = op.x.cols();
  expect("norm backward", "x", op.x, DType::f32, {t, d});
  expect_if("norm backward", "weight", op.weight, DType::f32, {d});
  expect("norm backward", "rstd", op.rstd, DType::f32, {t});
  expect("norm backward", "dy", op.dy, DType::f32, {t, d});
  expect_if("norm backward", "dresidual", op.dresidual, DType::f32, {t, d});
  expect("norm backward", "dx", op.dx, DType::f32, {t, d});
  expect_if("norm backward", "dweight", op.dweight, DType::f32, {d});
  if (t * d == 0) return;
  const auto rows = &HWY_DYNAMIC_DISPATCH(norm_backward_rows);
  const auto add = &HWY_DYNAMIC_DISPATCH(add_partial);
  // Per thread two rows of sums: of a block of kRows, and of the blocks so far; then the threads in
  // order.
  std::vector<float> sums(op.dweight ? 2 * d * threads_ : 0);
#pragma omp parallel num_threads(threads_) if (t * d >= kParallel)
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    const int64_t begin = t * thread / count, end = t * (thread + 1) / count;
    float* total = op.dweight ? sums.data() + 2 * d * thread : nullptr;
    float* block = total ? total + d : nullptr;
    for (int64_t from = begin; from < end; from += kRows) {
      rows(op, from, std::min(end, from + kRows), block);
      if (total) add(total, block, d);
    }
  }
  for (int64_t i = 0; op.dweight && i < threads_; ++i)
    add(op.dweight.as<float>(), sums.data() + 2 * d * i, d);
}

}  // namespace coil
#endif  // HWY_ONCE
