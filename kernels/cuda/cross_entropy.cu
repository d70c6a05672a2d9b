// Cross-entropy of a softmax, with its gradient in the same kernel.
//   loss = -weight * (logits[target] - log sum exp(logits));
//   dlogits = scale * weight * (softmax - onehot)
// The largest logit is subtracted first. A row with NaN, without a finite largest logit, or with a
// target that is neither -1 nor below v gives NaN: the targets are in the card's memory, and to
// refuse one would mean to wait for it. (The CPU refuses it.)
//
// A row of up to 256 logits stays in the registers of a warp or of a part of one. A longer one is
// read once by a block, which takes the largest logit and the sum of powers on the way and keeps
// the row in shared memory: up to 226 KB of it, 57,856 logits of f32, on an H100.
//
// Bytes: logits are read once and dlogits written once, 6 an element from f32 to bf16. An element
// takes about 25 operations of the 50 that a multiprocessor issues in that time at 3.9 TB/s:
// memory is the limit.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/fast_math.cuh"
#include "kernels/cuda/words.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kThreads = 256;
constexpr int kHeld = 8;            // logits of a lane, where a warp holds the row
constexpr int kMostThreads = 1024;  // of a block that holds a row
constexpr int kAhead = 4;           // words of a thread that are asked for at once
constexpr int kReserved = 1024;     // bytes of a block's shared memory for everything else

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
    if (i >= op.v) continue;
    const float gradient = target == -1 ? 0 : x[h] * factors.scale;
    dlogits[i] = from_float<G>(i == target ? gradient - factors.own : gradient);
  }
}

template <class T, class G, int kWidth>
__device__ void write_gradient(const RowFactors& row, int i, const Words<T, kWidth>& logits,
                               G* to) {
  float gradient[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
    gradient[k] = row.target == -1 ? 0 : fast_exp(logits.at(k) - row.most) * row.scale;
  if (row.target >= i && row.target < i + kWidth)
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      if (i + k == row.target) gradient[k] -= row.own;
  Words<G, kWidth> out;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) out.set(k, gradient[k]);
  out.store(to);
}

// The largest of some logits, and the sum of powers of the logits less that. NaN goes into the sum
// alone, logits ruled out add nothing.
struct Sum {
  float most = -INFINITY, sum = 0;

  // To another base; both may be minus infinity.
  __device__ void rebase(float to) {
    sum *= most < to ? fast_exp(most - to) : 1.f;
    most = to;
  }
  __device__ void add(const Sum& other) {
    Sum more = other;
    more.rebase(fmaxf(most, other.most));
    rebase(more.most);
    sum += more.sum;
  }
};

// The block's sum in all its threads, in a fixed order: of each warp, then of the warps, of which
// there are a power of two.
__device__ Sum over_block(Sum own) {
  __shared__ float mosts[kMostThreads / 32], sums[kMostThreads / 32];
  const auto over_lanes = [&](int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2)
      own.add({__shfl_xor_sync(~0u, own.most, step), __shfl_xor_sync(~0u, own.sum, step)});
  };
  over_lanes(32);
  __syncthreads();  // until the last sums have been read
  if (threadIdx.x % 32 == 0) mosts[threadIdx.x / 32] = own.most, sums[threadIdx.x / 32] = own.sum;
  __syncthreads();
  const int warps = blockDim.x / 32;
  own = {mosts[threadIdx.x % warps], sums[threadIdx.x % warps]};
  over_lanes(warps);
  return own;
}

// A block takes every so many rows. While it writes one row's gradient it reads the next row, so
// that memory has always something to do: a thread replaces the words it has used, and the first
// `held` logits wait in shared memory; those beyond are read again.
template <class T, class G, int kWidth>
__global__ void __launch_bounds__(kMostThreads)
    long_rows_kernel(const Operands<T, G> op, int held) {
  extern __shared__ uint4 memory[];
  T* const waiting = reinterpret_cast<T*>(memory);
  const int v = static_cast<int>(op.v), step = static_cast<int>(blockDim.x) * kWidth;
  RowFactors factors;
  for (int64_t row = blockIdx.x, last = -1;; last = row, row += gridDim.x) {
    // The gradient of row `last`, if there is one, and the sum of row `row`, if there is one.
    const bool writes = last >= 0 && op.dlogits, reads = row < op.m;
    if (!writes && !reads) return;
    const T* const logits = op.logits + row * op.logits_stride;
    const T* const again = op.logits + last * op.logits_stride;
    G* const dlogits = op.dlogits + last * op.dlogits_stride;
    const int32_t target = reads ? op.targets[row] : -1;
    const float own = target >= 0 && target < v ? to_float(logits[target]) : 0.f;
    Sum sum;
    for (int begin = static_cast<int>(threadIdx.x) * kWidth; begin < v; begin += kAhead * step) {
      Words<T, kWidth> words[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (reads && begin + a * step < v) words[a].load(logits + begin + a * step);
      if (writes)
#pragma unroll
        for (int a = 0; a < kAhead; ++a)
          if (const int i = begin + a * step; i < v) {
            Words<T, kWidth> word;
            if (i < held)
              word.load(waiting + i);
            else
              word.load(again + i);
            write_gradient(factors, i, word, dlogits + i);
          }
      if (!reads) continue;
      float most = sum.most;
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (const int i = begin + a * step; i < v) {
          if (i < held) words[a].store(waiting + i);
#pragma unroll
          for (int k = 0; k < kWidth; ++k) most = fmaxf(most, words[a].at(k));
        }
      sum.rebase(most);
      const float base = most == -INFINITY ? 0 : most;
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (begin + a * step < v)
#pragma unroll
          for (int k = 0; k < kWidth; ++k) sum.sum += fast_exp(words[a].at(k) - base);
    }
    if (!reads) return;
    sum = over_block(sum);
    factors = finish_row(op, row, target, sum.most, sum.sum, own, threadIdx.x == 0);
  }
}

// As many blocks as the card holds at once, whose shared memory holds a row or as much of it as
// there is.
template <class T, class G, int kWidth>
void run_long_rows(const Operands<T, G>& op, const CudaBackend& backend) {
  const char* const name = "cross_entropy";
  int most = 0;  // bytes of shared memory that a block may ask for
  check_call(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                    backend.device().index),
             name);
  const int64_t room = (most - kReserved) / 16 * 16 / static_cast<int64_t>(sizeof(T));
  const int held = static_cast<int>(std::min(op.v, room));
  const int64_t bytes = held * sizeof(T);
  check_call(
      cudaFuncSetAttribute(long_rows_kernel<T, G, kWidth>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      name);
  int threads = 128;  // for a few words each
  while (threads < kMostThreads && threads * kAhead * kWidth < op.v) threads *= 2;
  int blocks = 0;  // of a multiprocessor
  check_call(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, long_rows_kernel<T, G, kWidth>,
                                                           threads, bytes),
             name);
  const int64_t grid = std::min(op.m, static_cast<int64_t>(blocks) * backend.processors());
  long_rows_kernel<T, G, kWidth>
      <<<static_cast<unsigned>(grid), threads, bytes, backend.stream()>>>(op, held);
}

constexpr int kAddThreads = 1024;

// total(1) += sum of loss(m), one block: each thread its share of the rows in turn, then in halves.
__global__ void __launch_bounds__(kAddThreads)
    add_losses_kernel(const float* loss, int64_t m, double* total) {
  __shared__ double sums[kAddThreads];
  double sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < m; i += kAddThreads) sum += __ldg(loss + i);
  sums[threadIdx.x] = sum;
  for (int step = kAddThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
  }
  if (threadIdx.x == 0) *total += sums[0];
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
  expect_if(name, "total", op.total, DType::f64, {1});
  check(op.dlogits.data != op.logits.data || op.dlogits.dtype == op.logits.dtype,
        "{}: dlogits is logits, of another type", name);
  for (const auto& [operand, view] : {std::pair{"logits", op.logits},
                                      {"targets", op.targets},
                                      {"loss", op.loss},
                                      {"dlogits", op.dlogits},
                                      {"class_weights", op.class_weights},
                                      {"total", op.total}})
    check(!view || view.device == device(), "{}: {} is not in memory of cuda:{}", name, operand,
          index_);
  check(v < int64_t{1} << 30, "{}: {} logits a row, expected less than 2^30", name, v);
  if (m == 0) return;

  with_type(name, op.logits, [&](auto logits) {
    with_type(name, op.dlogits ? op.dlogits : op.logits, [&](auto dlogits) {
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
        constexpr int kWide = 4;
        if (v % kWide == 0 && aligned(op.logits, kWide) && aligned(op.dlogits, kWide))
          run_long_rows<T, G, kWide>(operands, *this);
        else
          run_long_rows<T, G, 1>(operands, *this);
      }
    });
  });
  check_launch(name);
  if (!op.total) return;
  add_losses_kernel<<<1, kAddThreads, 0, stream_>>>(op.loss.as<float>(), m, op.total.as<double>());
  check_launch(name);
}

}  // namespace coil
