// The system of S4D's scan at single steps, for those that keep it (ops.h: S4dTable).
#include <algorithm>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/expect.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/s4d_table.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/s4d_tables-inl.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

void make_table(const S4dTable& op) {
  const int64_t n = op.A_imag.cols(), stride = (n + kWide - 1) / kWide * kWide;
  std::vector<float> memory(6 * stride);
  for (int64_t channel = 0; channel < op.A_imag.rows(); ++channel) {
    discretise_channel(op, channel, memory.data(), stride);
    float* const to = op.table.as<float>() + channel * 4 * n;
    int64_t row = 0;
    for (const int64_t k : {0, 1, 4, 5}) std::copy_n(&memory[k * stride], n, to + row++ * n);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(make_table);

void CpuBackend::run(const S4dTable& op) {
  const char* const name = "s4d_table";
  expect_rank(name, "A_imag", op.A_imag, 2);
  const int64_t d = op.A_imag.rows(), n = op.A_imag.cols();
  expect(name, "log_A_real", op.log_A_real, DType::f32, {d, n});
  expect(name, "A_imag", op.A_imag, DType::f32, {d, n});
  expect(name, "C", op.C, DType::f32, {d, n, 2});
  expect_pairs(name, "C", op.C, {d, n, 2});
  expect(name, "log_dt", op.log_dt, DType::f32, {d});
  expect(name, "table", op.table, DType::f32, {d, 4, n});
  check(op.table.contiguous(), "{}: table is not contiguous", name);
  if (d * n > 0) HWY_DYNAMIC_DISPATCH(make_table)(op);
}

}  // namespace coil
#endif  // HWY_ONCE
