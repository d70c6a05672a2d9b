// Matrix products through oneDNN, and sums of rows.
#include <omp.h>

#include <dnnl.hpp>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/expect.h"

namespace coil {

struct CpuBackend::Products {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
};

CpuBackend::CpuBackend(int threads) : threads_(threads), products_(std::make_unique<Products>()) {}

CpuBackend::~CpuBackend() { release_memory(); }

void CpuBackend::run(const Gemm& op) {
  using dnnl::memory;
  expect_rank("gemm", "c", op.c, 2);
  expect_rank("gemm", "a", op.a, 2);
  const int64_t m = op.c.rows(), n = op.c.cols(), k = op.a.size[op.ta ? 0 : 1];
  const bool half = op.b.dtype == DType::bf16;
  if (op.ta)
    expect("gemm", "a", op.a, DType::f32, {k, m});
  else
    expect("gemm", "a", op.a, DType::f32, {m, k});
  if (op.tb)
    expect("gemm", "b", op.b, half ? DType::bf16 : DType::f32, {n, k});
  else
    expect("gemm", "b", op.b, half ? DType::bf16 : DType::f32, {k, n});
  expect("gemm", "c", op.c, DType::f32, {m, n});
  expect_if("gemm", "bias", op.bias, DType::f32, {n});
  if (m * n == 0) return;
  Tensor wide;
  View b = op.b;
  if (half) {
    wide = Tensor(*this, DType::f32, {b.size[0], b.size[1]});
    copy(b, wide);
    b = wide;
  }
  const auto type = memory::data_type::f32;
  const auto strides = [](const View& view, bool t) {
    return t ? memory::dims{1, view.stride[0]} : memory::dims{view.stride[0], 1};
  };
  const memory::desc a_desc({m, k}, type, strides(op.a, op.ta)),
      b_desc({k, n}, type, strides(b, op.tb)), c_desc({m, n}, type, strides(op.c, false)),
      bias_desc({1, n}, type, memory::dims{n, 1});
  dnnl::primitive_attr attr;
  if (op.alpha != 1) attr.set_output_scales(0, {op.alpha});
  dnnl::post_ops post;
  if (op.beta != 0) post.append_sum(op.beta);
  attr.set_post_ops(post);
  const bool bias = static_cast<bool>(op.bias);
  const auto desc = bias ? dnnl::matmul::desc(a_desc, b_desc, bias_desc, c_desc)
                         : dnnl::matmul::desc(a_desc, b_desc, c_desc);
  const int before = omp_get_max_threads();
  omp_set_num_threads(threads_);
  auto& engine = products_->engine;
  dnnl::matmul product(dnnl::matmul::primitive_desc(desc, attr, engine));
  std::unordered_map<int, memory> arguments{{DNNL_ARG_SRC, memory(a_desc, engine, op.a.data)},
                                            {DNNL_ARG_WEIGHTS, memory(b_desc, engine, b.data)},
                                            {DNNL_ARG_DST, memory(c_desc, engine, op.c.data)}};
  if (bias) arguments.emplace(DNNL_ARG_BIAS, memory(bias_desc, engine, op.bias.data));
  product.execute(products_->stream, arguments);
  products_->stream.wait();
  omp_set_num_threads(before);
}

void CpuBackend::run(const SumRows& op) {
  expect_rank("sum_rows", "x", op.x, 2);
  const int64_t t = op.x.rows(), c = op.x.cols();
  expect("sum_rows", "x", op.x, DType::f32, {t, c});
  expect("sum_rows", "out", op.out, DType::f32, {c});
  std::vector<double> sums(c);
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j < c; ++j) sums[j] += op.x.row<float>(i)[j];
  for (int64_t j = 0; j < c; ++j) op.out.as<float>()[j] += static_cast<float>(sums[j]);
}

}  // namespace coil
