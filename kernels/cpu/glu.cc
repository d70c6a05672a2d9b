// Gated linear unit (Dauphin et al. 2017): y = a sigmoid(b) of each row a|b; da = dy sigmoid(b),
// db = dy a sigmoid(b) (1 - sigmoid(b)). One pass over memory, which is the limit.
#include <omp.h>

#include <algorithm>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/expect.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/glu.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/simd_math.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

using FloatTag = hn::ScalableTag<float>;
constexpr FloatTag tag;

void glu_row(const Glu& op, int64_t row) {
  const int64_t width = op.y.cols(), lanes = hn::Lanes(tag);
  const float *const a = op.x.row<float>(row), *const b = a + width;
  float* const y = op.y.row<float>(row);
  for (int64_t i = 0; i < width; i += lanes) {
    const int64_t valid = std::min(lanes, width - i);
    const auto gate = sigmoid(tag, load_part(tag, b + i, valid));
    store_part(tag, hn::Mul(load_part(tag, a + i, valid), gate), y + i, valid);
  }
}

void glu_backward_row(const GluBackward& op, int64_t row) {
  const int64_t width = op.dy.cols(), lanes = hn::Lanes(tag);
  const float *const a = op.x.row<float>(row), *const b = a + width;
  const float* const dy = op.dy.row<float>(row);
  float *const da = op.dx.row<float>(row), *const db = da + width;
  for (int64_t i = 0; i < width; i += lanes) {
    const int64_t valid = std::min(lanes, width - i);
    const auto gate = sigmoid(tag, load_part(tag, b + i, valid));
    const auto gated = hn::Mul(load_part(tag, dy + i, valid), gate);
    const auto rest = hn::Sub(hn::Set(tag, 1.0f), gate);
    const auto value = load_part(tag, a + i, valid);
    store_part(tag, gated, da + i, valid);
    store_part(tag, hn::Mul(hn::Mul(gated, value), rest), db + i, valid);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(glu_row);
HWY_EXPORT(glu_backward_row);

namespace {
constexpr int64_t kParallel = 32 << 10;  // elements from which threads pay
}  // namespace

void CpuBackend::run(const Glu& op) {
  expect_rank("glu", "y", op.y, 2);
  const int64_t t = op.y.rows(), width = op.y.cols();
  expect("glu", "y", op.y, DType::f32, {t, width});
  expect("glu", "x", op.x, DType::f32, {t, 2 * width});
  const auto row = &HWY_DYNAMIC_DISPATCH(glu_row);
#pragma omp parallel for num_threads(threads_) schedule(static) if (t * width >= kParallel)
  for (int64_t i = 0; i < t; ++i) row(op, i);
}

void CpuBackend::run(const GluBackward& op) {
  const char* const name = "glu backward";
  expect_rank(name, "dy", op.dy, 2);
  const int64_t t = op.dy.rows(), width = op.dy.cols();
  expect(name, "dy", op.dy, DType::f32, {t, width});
  expect(name, "x", op.x, DType::f32, {t, 2 * width});
  expect(name, "dx", op.dx, DType::f32, {t, 2 * width});
  const auto row = &HWY_DYNAMIC_DISPATCH(glu_backward_row);
#pragma omp parallel for num_threads(threads_) schedule(static) if (t * width >= kParallel)
  for (int64_t i = 0; i < t; ++i) row(op, i);
}

}  // namespace coil
#endif  // HWY_ONCE
