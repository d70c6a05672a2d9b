// Cross-entropy of a softmax, with its gradient in the same kernel.
//   loss = -weight * (logits[target] - log sum exp(logits));
//   dlogits = scale * weight * (softmax - onehot)
// The largest logit is subtracted first. A row with NaN, without a finite largest logit, or with a
// target that is neither -1 nor below v gives NaN: the targets are in the card's memory, and to
// refuse one would mean to wait for it. (The CPU refuses it.)
//
// A row of up to 256 logits stays in the registers of a warp or of a part of one; a block goes over
// a longer row three times, the second and third time mostly in L1 and L2. Bytes: logits are read
// once and dlogits written once; memory is the limit.
#include <cmath>

#include "kernels/cuda/device.cuh"

namespace coil {
namespace {

using cuda::activation;
using cuda::bf16;
using cuda::div_up;
using cuda::from_float;
using cuda::to_float;

constexpr int kThreads = 256;
constexpr int kHeld = 8;  // logits of a lane, where a warp holds the row

template <class T, class G>
struct Operands {
  const T* logits;         // (m,v)
  const int32_t* targets;  // (m)
  float* loss;             // (m)
  G* dlogits;              // (m,v), may be logits; null: not asked for
  const float* weights;    // (v); null: ones
  int64_t m, v, logits_stride, dlogits_stride;
  float scale;
};

// NaN if one of them is.
__device__ float larger(float a, float b) { return a > b || a != a ? a : b; }

// What the elements of a row have in common.
struct RowFactors {
  float most, scale, own;  // dlogits[i] = scale * exp(logits[i] - most) - (i == target ? own : 0)
  int32_t target;
};

// The row's loss, and the factors of its gradient. `own`: its target's logit.
template <class T, class G>
__device__ RowFactors finish_row(const Operands<T, G>& op, int64_t row, int32_t target, float most,
                                 float sum, float own, bool writes) {
  const float nan = NAN;
  const float weight = !op.weights || target < 0 || target >= op.v ? 1.f : op.weights[target];
  // most - most is NaN where most is NaN or infinite.
  const bool valid = most - most == 0 && target >= -1 && target < op.v;
  if (writes) {
    // In f64, since log sum and most may be large and cancel.
    const double value = weight * (log(static_cast<double>(sum)) + most - own);
    op.loss[row] = target == -1 ? 0.f : valid ? static_cast<float>(value) : nan;
  }
  return {most, valid ? op.scale * weight / sum : nan, op.scale * weight, target};
}

template <class G>
__device__ G gradient_of(const RowFactors& row, int64_t i, float power) {
  if (row.target == -1) return from_float<G>(0.f);
  const float gradient = power * row.scale;
  return from_float<G>(i == row.target ? gradient - row.own : gradient);
}

// `lanes` threads a row, a power of two up to 32.
template <class T, class G>
__global__ void __launch_bounds__(kThreads) short_rows_kernel(const Operands<T, G> op, int lanes) {
  const int lane = threadIdx.x % lanes;
  const int64_t row = blockIdx.x * static_cast<int64_t>(kThreads / lanes) + threadIdx.x / lanes;
  const bool valid = row < op.m;  // all lanes take part in the sums
  const int32_t target = valid ? op.targets[row] : -1;
  const T* const logits = op.logits + row * op.logits_stride;
  float x[kHeld], most = -INFINITY, sum = 0, own = 0;
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int i = h * lanes + lane;
    if (!valid || i >= op.v) continue;
    x[h] = to_float(logits[i]);
    most = larger(most, x[h]);
    if (i == target) own = x[h];
  }
  for (int step = lanes / 2; step > 0; step /= 2)
    most = larger(most, __shfl_xor_sync(~0u, most, step));
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    if (!valid || h * lanes + lane >= op.v) continue;
    x[h] = expf(x[h] - most);
    sum += x[h];
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(~0u, sum, step);
    own += __shfl_xor_sync(~0u, own, step);  // zero in all lanes but one
  }
  if (!valid) return;
  const RowFactors factors = finish_row(op, row, target, most, sum, own, lane == 0);
  if (!op.dlogits) return;
  G* const dlogits = op.dlogits + row * op.dlogits_stride;
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const int i = h * lanes + lane;
    if (i < op.v) dlogits[i] = gradient_of<G>(factors, i, x[h]);
  }
}

// The block's result in all its threads, in a fixed order.
template <class F>
__device__ float over_block(float value, F&& f) {
  __shared__ float values[kThreads];
  __syncthreads();  // until the last result has been read
  values[threadIdx.x] = value;
  for (int step = kThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step)
      values[threadIdx.x] = f(values[threadIdx.x], values[threadIdx.x + step]);
  }
  __syncthreads();
  return values[0];
}

// A block a row.
template <class T, class G>
__global__ void __launch_bounds__(kThreads) long_rows_kernel(const Operands<T, G> op) {
  const int64_t row = blockIdx.x;
  const int32_t target = op.targets[row];
  const T* const logits = op.logits + row * op.logits_stride;
  // Read before dlogits, which may be logits, is written: the sums wait for all threads.
  const float own = target >= 0 && target < op.v ? to_float(logits[target]) : 0.f;
  float most = -INFINITY, sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < op.v; i += kThreads) most = larger(most, to_float(logits[i]));
  most = over_block(most, [](float a, float b) { return larger(a, b); });
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < op.v; i += kThreads) sum += expf(to_float(logits[i]) - most);
  sum = over_block(sum, [](float a, float b) { return a + b; });
  const RowFactors factors = finish_row(op, row, target, most, sum, own, threadIdx.x == 0);
  if (!op.dlogits) return;
  G* const dlogits = op.dlogits + row * op.dlogits_stride;
  for (int64_t i = threadIdx.x; i < op.v; i += kThreads)
    dlogits[i] = gradient_of<G>(factors, i, expf(to_float(logits[i]) - most));
}

}  // namespace

void CudaBackend::run(const CrossEntropy& op) {
  const char* const name = "cross_entropy";
  expect_rank(name, "logits", op.logits, 2);
  const int64_t m = op.logits.rows(), v = op.logits.cols();
  expect(name, "logits", op.logits, activation(op.logits), {m, v});
  expect(name, "targets", op.targets, DType::i32, {m});
  expect(name, "loss", op.loss, DType::f32, {m});
  expect_if(name, "dlogits", op.dlogits, activation(op.dlogits), {m, v});
  expect_if(name, "class_weights", op.class_weights, DType::f32, {v});
  check(op.dlogits.data != op.logits.data || op.dlogits.dtype == op.logits.dtype,
        "{}: dlogits is logits, of another type", name);
  for (const auto& [operand, view] : {std::pair{"logits", op.logits},
                                      {"targets", op.targets},
                                      {"loss", op.loss},
                                      {"dlogits", op.dlogits},
                                      {"class_weights", op.class_weights}})
    check(!view || view.device == device(), "{}: {} is not in memory of cuda:{}", name, operand,
          index_);
  if (m == 0) return;

  cuda::with_type(name, op.logits, [&](auto logits) {
    cuda::with_type(name, op.dlogits ? op.dlogits : op.logits, [&](auto dlogits) {
      using T = decltype(logits);
      using G = decltype(dlogits);
      const Operands<T, G> operands{.logits = op.logits.as<T>(),
                                    .targets = op.targets.as<int32_t>(),
                                    .loss = op.loss.as<float>(),
                                    .dlogits = op.dlogits.as<G>(),
                                    .weights = op.class_weights.as<float>(),
                                    .m = m,
                                    .v = v,
                                    .logits_stride = op.logits.stride[0],
                                    .dlogits_stride = op.dlogits.stride[0],
                                    .scale = op.scale};
      if (v <= 32 * kHeld) {
        int lanes = 1;
        while (lanes < 32 && lanes < v) lanes *= 2;
        const auto blocks = static_cast<unsigned>(div_up(m, kThreads / lanes));
        short_rows_kernel<T, G><<<blocks, kThreads, 0, stream_>>>(operands, lanes);
      } else {
        long_rows_kernel<T, G><<<static_cast<unsigned>(m), kThreads, 0, stream_>>>(operands);
      }
    });
  });
  cuda::check_launch(name);
}

}  // namespace coil
