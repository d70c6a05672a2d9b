// Sums over rows: out(c) += sum_t x(t,c), of chunks of rows and then of their partial sums.
//
// Bytes: x once. Memory is the limit.
#include "kernels/cuda/sum_rows.cuh"

#include <algorithm>

#include "kernels/cuda/words.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kThreads = 256;
constexpr int kWide = 4;                    // elements moved at once: 16 bytes of f32, 8 of bf16
constexpr int kAhead = 8;                   // rows asked for before the first of them is added
constexpr int kBlocks = 8;                  // of a multiprocessor
constexpr int kColumns = 32, kSlices = 32;  // of a block that adds partial sums

// partial(chunks, c). Columns go to `lanes` threads, kWidth each, and the other threads of a block
// to other rows.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const T* x, int64_t x_stride, int64_t rows, int64_t c, int64_t chunk, int lanes,
                    float* partial) {
  take_turn();
  __shared__ float sums[kThreads * kWidth];
  const int groups = kThreads / lanes, group = threadIdx.x / lanes;
  const int first = threadIdx.x % lanes * kWidth, width = lanes * kWidth;
  const int64_t column = blockIdx.y * static_cast<int64_t>(width) + first;
  const int64_t end = min((blockIdx.x + int64_t{1}) * chunk, rows);
  float sum[kWidth] = {};
  if (column < c) {
    for (int64_t row = blockIdx.x * chunk + group; row < end; row += kAhead * groups) {
      Words<T, kWidth> words[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (row + a * groups < end)
          words[a].load_constant(x + (row + a * groups) * x_stride + column);
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (row + a * groups < end)
#pragma unroll
          for (int k = 0; k < kWidth; ++k) sum[k] += words[a].at(k);
    }
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) sums[group * width + first + k] = sum[k];
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += kThreads) {
    const int64_t to = blockIdx.y * static_cast<int64_t>(width) + i;
    if (to >= c) continue;
    float total = 0;
    for (int k = 0; k < groups; ++k) total += sums[k * width + i];
    partial[blockIdx.x * c + to] = total;
  }
}

__global__ void __launch_bounds__(kColumns* kSlices)
    add_partials_kernel(const float* partial, int64_t count, int64_t elements, int64_t columns,
                        float* out, int64_t out_stride) {
  take_turn();
  __shared__ float sums[kSlices][kColumns];
  const int64_t i = blockIdx.x * int64_t{kColumns} + threadIdx.x % kColumns;
  const int slice = threadIdx.x / kColumns;
  float sum = 0;
  if (i < elements) {
#pragma unroll 8
    for (int64_t k = slice; k < count; k += kSlices) sum += partial[k * elements + i];
  }
  sums[slice][threadIdx.x % kColumns] = sum;
  __syncthreads();
  if (slice != 0 || i >= elements) return;
  for (int k = 1; k < kSlices; ++k) sum += sums[k][threadIdx.x];
  out[i / columns * out_stride + i % columns] += sum;
}

}  // namespace

void cuda::add_partials(const char* op, const float* partial, int64_t count, const View& out,
                        cudaStream_t stream) {
  const int64_t elements = out.count();
  launch_in_turn(add_partials_kernel, static_cast<unsigned>(div_up(elements, kColumns)),
                 kColumns * kSlices, 0, stream, partial, count, elements, out.cols(),
                 out.as<float>(), out.rank > 1 ? out.stride[0] : 0);
  check_launch(op);
}

void CudaBackend::run(const SumRows& op) {
  const char* const name = "sum_rows";
  expect_rank(name, "x", op.x, 2);
  const int64_t t = op.x.rows(), c = op.x.cols();
  expect(name, "x", op.x, activation(op.x), {t, c});
  expect(name, "out", op.out, DType::f32, {c});
  expect_here(name, "x", op.x, device());
  expect_here(name, "out", op.out, device());
  if (t * c == 0) return;
  const bool wide = c % kWide == 0 && aligned(op.x, kWide);
  const int width = wide ? kWide : 1;
  int lanes = 1;
  while (lanes < 32 && lanes * width < c) lanes *= 2;
  const int64_t slices = div_up(c, lanes * width);
  check(slices <= 65535, "{}: {} columns, expected less than 2^21", name, c);
  // The card gets several blocks a multiprocessor, and each thread of a block several rows.
  const int64_t wanted = std::max<int64_t>(1, kBlocks * processors_ / slices);
  const int64_t chunk = std::max<int64_t>(4 * (kThreads / lanes), div_up(t, wanted));
  const int64_t chunks = div_up(t, chunk);
  const Tensor partial(*this, DType::f32, {chunks, c});
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(slices));
  with_type(name, op.x, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto kernel_width) {
      launch_in_turn(sum_rows_kernel<T, kernel_width()>, grid, kThreads, 0, stream_, op.x.as<T>(),
                     op.x.stride[0], t, c, chunk, lanes, partial.as<float>());
    };
    if (wide)
      run(std::integral_constant<int, kWide>{});
    else
      run(std::integral_constant<int, 1>{});
  });
  check_launch(name);
  add_partials(name, partial.as<float>(), chunks, op.out, stream_);
}

}  // namespace coil
