// Sum of squares in f64 and AdamW (Loshchilov and Hutter 2019), in torch's order of operations:
//   w *= 1 - lr * decay;  m += (g - m) * (1 - b1);  v = v * b2 + (1 - b2) * g * g
//   w -= lr / (1 - b1^step) * m / (sqrt(v) / sqrt(1 - b2^step) + eps)
// All tensors of a model in one launch: they are cut into chunks of kChunk elements, a block each,
// and a block finds its tensor in a table that is sent with the launch (64 bytes a tensor).
// Bytes: 4 an element for the sum; 34 for AdamW, which reads w, g, m and v and writes them and a
// copy in bf16. Memory is the limit.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cuda/device.cuh"
// after device.cuh
#include "kernels/adamw.h"

namespace coil {
namespace {

using cuda::bf16;
using cuda::div_up;
using cuda::expect_here;

constexpr int kThreads = 256;
constexpr int64_t kChunk = 8192;  // elements; fixed, so that the sum is the same on any card

struct Entry {  // a tensor; of the sum's only g is used
  float *w, *g, *m, *v;
  void* copy;
  int64_t count, first;  // elements; its first chunk
  float shrink;
  bool half;  // copy is bf16
  bool wide;  // words of four elements
};

// The tensor of this block's chunk: the last entry with first <= block.
__device__ const Entry& entry_of_block(const Entry* entries, int count) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (entries[middle].first <= blockIdx.x)
      low = middle;
    else
      high = middle - 1;
  }
  return entries[low];
}

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

// partial(blocks)
__global__ void __launch_bounds__(kThreads)
    sum_squares_kernel(const Entry* entries, int count, double* partial) {
  const Entry entry = entry_of_block(entries, count);
  const int64_t begin = (blockIdx.x - entry.first) * kChunk;
  const int length = static_cast<int>(min(kChunk, entry.count - begin));
  const float* const x = entry.g + begin;
  const int words = entry.wide ? length / 4 : 0;
  double sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < words; i += kThreads) {
    const float4 word = __ldg(reinterpret_cast<const float4*>(x) + i);
    sum += (square(word.x) + square(word.y)) + (square(word.z) + square(word.w));
  }
  for (int i = 4 * words + threadIdx.x; i < length; i += kThreads) sum += square(x[i]);
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    add_squares_kernel(const double* partial, int64_t count, double* out) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) *out += sum;
}

// No product is merged into a following sum but where the CPU merges it, so that both devices go
// the same way.
__device__ void update(const AdamWFactors& f, float shrink, float scale, float& g, float& w,
                       float& m, float& v) {
  const float gradient = __fmul_rn(g, scale);
  m = fmaf(__fsub_rn(gradient, m), f.add1, m);
  v = fmaf(__fmul_rn(gradient, f.add2), gradient, __fmul_rn(v, f.keep2));
  const float root = sqrtf(v) / f.root2;
  const float change = __fmul_rn(m, f.step) / __fadd_rn(root, f.eps);
  w = __fsub_rn(__fmul_rn(w, shrink), change);
  g = 0;
}

// What all gradients are multiplied by; NaN: the norm is not finite.
__device__ float clip_scale(const double* squares, double clip) {
  if (!squares) return 1;
  const double norm = sqrt(*squares);
  if (!isfinite(norm)) return NAN;
  return clip > 0 ? static_cast<float>(fmin(1.0, clip / (norm + 1e-6))) : 1.f;
}

__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const Entry* entries, int count, const AdamWFactors f, const double* squares,
                 double clip) {
  __shared__ float shared_scale;
  if (threadIdx.x == 0) shared_scale = clip_scale(squares, clip);
  const Entry entry = entry_of_block(entries, count);
  __syncthreads();
  const float scale = shared_scale;
  if (isnan(scale)) return;
  const int64_t begin = (blockIdx.x - entry.first) * kChunk;
  const int length = static_cast<int>(min(kChunk, entry.count - begin));
  float* const w = entry.w + begin;
  float* const g = entry.g + begin;
  float* const m = entry.m + begin;
  float* const v = entry.v + begin;
  bf16* const half = entry.half ? static_cast<bf16*>(entry.copy) + begin : nullptr;
  float* const full = entry.copy && !entry.half ? static_cast<float*>(entry.copy) + begin : nullptr;
  const int wide = entry.wide ? length / 4 * 4 : 0;
#pragma unroll 2
  for (int i = 4 * threadIdx.x; i < wide; i += 4 * kThreads) {
    float4 gradient = *reinterpret_cast<const float4*>(g + i);
    float4 weight = *reinterpret_cast<const float4*>(w + i);
    float4 mean = *reinterpret_cast<const float4*>(m + i);
    float4 spread = *reinterpret_cast<const float4*>(v + i);
    update(f, entry.shrink, scale, gradient.x, weight.x, mean.x, spread.x);
    update(f, entry.shrink, scale, gradient.y, weight.y, mean.y, spread.y);
    update(f, entry.shrink, scale, gradient.z, weight.z, mean.z, spread.z);
    update(f, entry.shrink, scale, gradient.w, weight.w, mean.w, spread.w);
    *reinterpret_cast<float4*>(w + i) = weight;
    *reinterpret_cast<float4*>(g + i) = gradient;
    *reinterpret_cast<float4*>(m + i) = mean;
    *reinterpret_cast<float4*>(v + i) = spread;
    if (full) *reinterpret_cast<float4*>(full + i) = weight;
    if (half) {
      *reinterpret_cast<__nv_bfloat162*>(half + i) = __floats2bfloat162_rn(weight.x, weight.y);
      *reinterpret_cast<__nv_bfloat162*>(half + i + 2) = __floats2bfloat162_rn(weight.z, weight.w);
    }
  }
  for (int i = wide + threadIdx.x; i < length; i += kThreads) {
    update(f, entry.shrink, scale, g[i], w[i], m[i], v[i]);
    if (full) full[i] = w[i];
    if (half) half[i] = __float2bfloat16_rn(w[i]);
  }
}

bool aligned(const View& view) { return reinterpret_cast<uintptr_t>(view.data) % 16 == 0; }

// Adds a tensor to the table and its chunks to those so far.
void add(std::vector<Entry>& entries, int64_t& chunks, Entry entry) {
  if (entry.count == 0) return;
  entry.first = chunks;
  chunks += div_up(entry.count, kChunk);
  entries.push_back(entry);
}

Tensor send(CudaBackend& backend, std::vector<Entry>& entries) {
  const auto bytes = static_cast<int64_t>(entries.size() * sizeof(Entry));
  Tensor table(backend, DType::u8, {bytes});
  backend.copy(host_view(entries.data(), DType::u8, {bytes}), table);
  return table;
}

}  // namespace

void CudaBackend::run(const SumSquares& op) {
  check_operands(op);
  expect_here("sum_squares", "out", op.out, device());
  std::vector<Entry> entries;
  int64_t chunks = 0;
  for (const View& x : op.x) {
    expect_here("sum_squares", "x", x, device());
    add(entries, chunks, {.g = x.as<float>(), .count = x.count(), .wide = aligned(x)});
  }
  if (chunks == 0) return;
  const Tensor table = send(*this, entries), partial(*this, DType::f64, {chunks});
  sum_squares_kernel<<<static_cast<unsigned>(chunks), kThreads, 0, stream_>>>(
      table.as<Entry>(), static_cast<int>(entries.size()), partial.as<double>());
  cuda::check_launch("sum_squares");
  add_squares_kernel<<<1, kThreads, 0, stream_>>>(partial.as<double>(), chunks,
                                                  op.out.as<double>());
  cuda::check_launch("sum_squares");
}

void CudaBackend::run(const AdamW& op) {
  check_operands(op);
  expect_here("adamw", "squares", op.squares, device());
  std::vector<Entry> entries;
  int64_t chunks = 0;
  for (const AdamW::Item& item : op.items) {
    bool wide = aligned(item.copy);
    for (const View& view : {item.w, item.g, item.m, item.v, item.copy})
      expect_here("adamw", "a tensor", view, device());
    for (const View& view : {item.w, item.g, item.m, item.v}) wide = wide && aligned(view);
    add(entries, chunks,
        {.w = item.w.as<float>(),
         .g = item.g.as<float>(),
         .m = item.m.as<float>(),
         .v = item.v.as<float>(),
         .copy = item.copy.data,
         .count = item.w.count(),
         .shrink = shrink_of(op, item),
         .half = item.copy.dtype == DType::bf16,
         .wide = wide});
  }
  if (chunks == 0) return;
  const Tensor table = send(*this, entries);
  adamw_kernel<<<static_cast<unsigned>(chunks), kThreads, 0, stream_>>>(
      table.as<Entry>(), static_cast<int>(entries.size()), factors_of(op), op.squares.as<double>(),
      op.clip);
  cuda::check_launch("adamw");
}

}  // namespace coil
