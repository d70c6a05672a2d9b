// Sum of squares in f64 and AdamW (Loshchilov and Hutter 2019), in torch's order of operations:
//   w *= 1 - lr * decay;  m += (g - m) * (1 - b1);  v = v * b2 + (1 - b2) * g * g
//   w -= lr / (1 - b1^step) * m / (sqrt(v) / sqrt(1 - b2^step) + eps)
// Bytes: 4 an element for the sum; 28 for AdamW, which reads w, g, m and v and writes w, m and v.
// Memory is the limit.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/device.cuh"

namespace coil {
namespace {

using cuda::div_up;
using cuda::expect_here;

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 1024;  // of the sum; fixed, so that it is the same on any card

// The block's sum, in thread 0, in a fixed order.
__device__ double sum_of_block(double value) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = value;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
  }
  return sums[0];  // written by thread 0 itself
}

__device__ double square(float x) { return static_cast<double>(x) * x; }

// partial(blocks). Blocks and threads take the words of x in turn; `wide`: words of 16 bytes.
__global__ void __launch_bounds__(kThreads)
    sum_squares_kernel(const float* x, int64_t count, bool wide, double* partial) {
  const int64_t thread = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t threads = gridDim.x * static_cast<int64_t>(kThreads);
  const int64_t words = wide ? count / 4 : 0;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = thread; i < words; i += threads) {
    const float4 word = __ldg(reinterpret_cast<const float4*>(x) + i);
    sum += (square(word.x) + square(word.y)) + (square(word.z) + square(word.w));
  }
  for (int64_t i = 4 * words + thread; i < count; i += threads) sum += square(x[i]);
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    add_squares_kernel(const double* partial, int count, double* out) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) *out += sum;
}

struct AdamWFactors {
  float shrink, keep2, add1, add2, step, root2, eps, grad_scale;
};

// No product is merged into a following sum but where the CPU merges it, so that both devices go
// the same way.
__device__ void update(const AdamWFactors& f, float g, float& w, float& m, float& v) {
  g = __fmul_rn(g, f.grad_scale);
  m = fmaf(__fsub_rn(g, m), f.add1, m);
  v = fmaf(__fmul_rn(g, f.add2), g, __fmul_rn(v, f.keep2));
  const float root = sqrtf(v) / f.root2;
  const float change = __fmul_rn(m, f.step) / __fadd_rn(root, f.eps);
  w = __fsub_rn(__fmul_rn(w, f.shrink), change);
}

__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const AdamWFactors f, float* w, const float* g, float* m, float* v, int64_t count,
                 bool wide) {
  const int64_t thread = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (!wide) {
    if (thread < count) update(f, g[thread], w[thread], m[thread], v[thread]);
    return;
  }
  const int64_t first = 4 * thread;
  if (first + 4 <= count) {
    const float4 gradient = *reinterpret_cast<const float4*>(g + first);
    float4 weight = *reinterpret_cast<const float4*>(w + first);
    float4 mean = *reinterpret_cast<const float4*>(m + first);
    float4 spread = *reinterpret_cast<const float4*>(v + first);
    update(f, gradient.x, weight.x, mean.x, spread.x);
    update(f, gradient.y, weight.y, mean.y, spread.y);
    update(f, gradient.z, weight.z, mean.z, spread.z);
    update(f, gradient.w, weight.w, mean.w, spread.w);
    *reinterpret_cast<float4*>(w + first) = weight;
    *reinterpret_cast<float4*>(m + first) = mean;
    *reinterpret_cast<float4*>(v + first) = spread;
  } else {
    for (int64_t i = first; i < count; ++i) update(f, g[i], w[i], m[i], v[i]);
  }
}

bool aligned(const View& view) { return reinterpret_cast<uintptr_t>(view.data) % 16 == 0; }

}  // namespace

void CudaBackend::run(const SumSquares& op) {
  check(op.x && op.x.dtype == DType::f32 && op.x.contiguous(),
        "sum_squares: x is {}, expected contiguous f32", op.x.shape());
  expect("sum_squares", "out", op.out, DType::f64, {1});
  expect_here("sum_squares", "x", op.x, device());
  expect_here("sum_squares", "out", op.out, device());
  const int64_t count = op.x.count();
  if (count == 0) return;
  const int64_t blocks = std::min(kBlocks, div_up(count, kThreads));
  const Tensor partial(*this, DType::f64, {blocks});
  sum_squares_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream_>>>(
      op.x.as<float>(), count, aligned(op.x), partial.as<double>());
  cuda::check_launch("sum_squares");
  add_squares_kernel<<<1, kThreads, 0, stream_>>>(partial.as<double>(), static_cast<int>(blocks),
                                                  op.out.as<double>());
  cuda::check_launch("sum_squares");
}

void CudaBackend::run(const AdamW& op) {
  check(op.w && op.w.dtype == DType::f32 && op.w.contiguous(),
        "adamw: w is {}, expected contiguous f32", op.w.shape());
  expect_here("adamw", "w", op.w, device());
  const auto same = [&](const char* name, const View& view) {
    check(view && view.dtype == DType::f32 && view.contiguous() && view.count() == op.w.count(),
          "adamw: {} is {}, expected {}, contiguous", name, view.shape(), op.w.shape());
    expect_here("adamw", name, view, device());
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
  const int64_t count = op.w.count();
  if (count == 0) return;
  const bool wide = aligned(op.w) && aligned(op.g) && aligned(op.m) && aligned(op.v);
  const auto blocks = static_cast<unsigned>(div_up(wide ? div_up(count, 4) : count, kThreads));
  adamw_kernel<<<blocks, kThreads, 0, stream_>>>(factors, op.w.as<float>(), op.g.as<float>(),
                                                 op.m.as<float>(), op.v.as<float>(), count, wide);
  cuda::check_launch("adamw");
}

}  // namespace coil
