// The system of S4D's scan at single steps, for those that keep it (ops.h: S4dTable). In f64, once
// a model: no limit matters.
#include "kernels/cuda/s4d.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

__global__ void __launch_bounds__(kThreads)
    step_table_kernel(const S4dParameters of, float* table) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= of.n * of.d) return;
  const int64_t channel = index / of.n;
  const int i = static_cast<int>(index % of.n);
  const Complex A = of.A(channel, i), z = exp_minus_one(of.delta(channel) * A);
  const Complex K = 2 * (of.C_at(channel, i) * divided(z, A));
  float* const to = table + channel * 4 * of.n + i;
  to[0] = static_cast<float>(z.re);
  to[of.n] = static_cast<float>(z.im);
  to[2 * of.n] = static_cast<float>(K.re);
  to[3 * of.n] = static_cast<float>(K.im);
}

}  // namespace

void CudaBackend::run(const S4dTable& op) {
  const char* const name = "s4d_table";
  expect_rank(name, "A_imag", op.A_imag, 2);
  const int64_t d = op.A_imag.rows(), n = op.A_imag.cols();
  const auto here = [&](const char* operand, const View& view,
                        std::initializer_list<int64_t> shape) {
    expect(name, operand, view, DType::f32, shape);
    expect_here(name, operand, view, device());
  };
  here("log_A_real", op.log_A_real, {d, n});
  here("A_imag", op.A_imag, {d, n});
  here("C", op.C, {d, n, 2});
  expect_pairs(name, "C", op.C, {d, n, 2});
  here("log_dt", op.log_dt, {d});
  here("table", op.table, {d, 4, n});
  check(op.table.contiguous(), "{}: table is not contiguous", name);
  if (d * n == 0) return;
  const S4dParameters of{.log_A_real = op.log_A_real.as<float>(),
                         .A_imag = op.A_imag.as<float>(),
                         .C = op.C.as<float>(),
                         .log_dt = op.log_dt.as<float>(),
                         .D = nullptr,
                         .A_real_stride = op.log_A_real.stride[0],
                         .A_imag_stride = op.A_imag.stride[0],
                         .C_stride = op.C.stride[0],
                         .n = static_cast<int>(n),
                         .d = d};
  step_table_kernel<<<blocks_of(n * d), kThreads, 0, stream_>>>(of, op.table.as<float>());
  check_launch(name);
}

}  // namespace coil
