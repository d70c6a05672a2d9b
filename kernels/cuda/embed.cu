// Embedding: y[i] = table[ids[i]]; backward: dtable[ids[i]] += dy[i].
//
// An id outside 0 … v-1 gives a row of NaN, and backward leaves its gradient out: the ids are in
// the card's memory, and to refuse one would mean to wait for it. (The CPU refuses it.)
//
// Bytes: forward writes y once, the table mostly comes from L2; backward reads dy once. Memory is
// the limit. Backward in a fixed order, without atomics:
//   * a small table (DNA, bytes of sound): a block keeps a table of kColumns columns in shared
//     memory, each column belongs to one thread, which adds its share of the rows in order; then
//     the tables of all shares are added in order.
//   * a large one: a warp for each id looks through all ids and adds the rows it finds. Looking
//     takes v * t / 32 steps of a warp: this is for a vocabulary of words, not for long sequences.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/sum_rows.cuh"

namespace coil {
namespace {

using cuda::bf16;
using cuda::div_up;
using cuda::expect_here;
using cuda::to_float;

constexpr int kThreads = 256;
constexpr int kWide = 4;                    // elements moved at once
constexpr int64_t kSharedFloats = 8 << 10;  // of a block's small table: six blocks and more fit
constexpr int64_t kColumns = 128, kFewest = 32;  // columns of a small table
constexpr int kAhead = 8;                        // rows asked for while as many are added
constexpr int64_t kSlice = 512;                  // columns of dtable that a warp takes at once

template <int kWidth, class T>
__device__ void copy_word(const T* from, float* to) {
  if constexpr (kWidth == 1) {
    *to = to_float(*from);
  } else if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float4*>(to) = __ldg(reinterpret_cast<const float4*>(from));
  } else {
    const uint2 word = __ldg(reinterpret_cast<const uint2*>(from));
    const T* const half = reinterpret_cast<const T*>(&word);
    *reinterpret_cast<float4*>(to) =
        make_float4(to_float(half[0]), to_float(half[1]), to_float(half[2]), to_float(half[3]));
  }
}

// `lanes` threads a row.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    embed_kernel(const int32_t* ids, const T* table, int64_t table_stride, float* y,
                 int64_t y_stride, int64_t t, int64_t v, int64_t d, int lanes) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(kThreads / lanes) + threadIdx.x / lanes;
  if (row >= t) return;
  const int64_t id = ids[row];
  float* const to = y + row * y_stride;
  const int64_t first = static_cast<int64_t>(threadIdx.x % lanes) * kWidth, step = lanes * kWidth;
  if (id < 0 || id >= v) {
    for (int64_t i = first; i < d; i += step)
      for (int k = 0; k < kWidth; ++k) to[i + k] = NAN;
    return;
  }
  const T* const from = table + id * table_stride;
#pragma unroll 2
  for (int64_t i = first; i < d; i += step) copy_word<kWidth>(from + i, to + i);
}

// partial (shares, v, d): the sums of the rows of each share. A thread is a column.
__global__ void small_table_kernel(const int32_t* ids, const float* dy, int64_t dy_stride,
                                   int64_t t, int64_t v, int64_t d, int64_t share, float* partial) {
  extern __shared__ float table[];  // (v, columns)
  const int columns = blockDim.x;
  const int64_t column = blockIdx.y * static_cast<int64_t>(columns) + threadIdx.x;
  if (column >= d) return;  // columns never meet
  float* const sums = table + threadIdx.x;
  for (int64_t id = 0; id < v; ++id) sums[id * columns] = 0;
  const int64_t begin = blockIdx.x * share, end = min(begin + share, t);
  float value[kAhead];
  int32_t id[kAhead];
  const auto ask = [&](int64_t row) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      id[a] = row + a < end ? __ldg(ids + row + a) : -1;
      value[a] = row + a < end ? __ldg(dy + (row + a) * dy_stride + column) : 0.f;
    }
  };
  ask(begin);
  for (int64_t row = begin; row < end; row += kAhead) {
    float now[kAhead];
    int32_t to[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) now[a] = value[a], to[a] = id[a];
    ask(row + kAhead);
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (to[a] >= 0 && to[a] < v) sums[to[a] * columns] += now[a];
  }
  for (int64_t id = 0; id < v; ++id)
    partial[(blockIdx.x * v + id) * d + column] = sums[id * columns];
}

// A warp for each id and kSlice columns. The columns go round the lanes, kWidth at a time.
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    large_table_kernel(const int32_t* ids, const float* dy, int64_t dy_stride, int64_t t, int64_t v,
                       int64_t d, float* dtable, int64_t dtable_stride) {
  constexpr int kWords = kSlice / 32 / kWidth;
  const int lane = threadIdx.x % 32;
  const int64_t id = blockIdx.x * static_cast<int64_t>(kThreads / 32) + threadIdx.x / 32;
  if (id >= v) return;
  const int64_t first = blockIdx.y * kSlice + lane * kWidth;
  float sums[kWords][kWidth] = {};
  bool found = false;
  for (int64_t begin = 0; begin < t; begin += 32 * kAhead) {
    int32_t some[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t row = begin + a * 32 + lane;
      some[a] = row < t ? __ldg(ids + row) : -1;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      unsigned hits = __ballot_sync(~0u, some[a] == id);
      while (hits != 0) {
        const int64_t row = begin + a * 32 + __ffs(static_cast<int>(hits)) - 1;
        hits &= hits - 1;
        found = true;
        const float* const from = dy + row * dy_stride;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const int64_t column = first + w * 32 * kWidth;
          if (column >= d) break;
          float word[kWidth];
          copy_word<kWidth>(from + column, word);
#pragma unroll
          for (int k = 0; k < kWidth; ++k) sums[w][k] += word[k];
        }
      }
    }
  }
  if (!found) return;
#pragma unroll
  for (int w = 0; w < kWords; ++w)
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const int64_t column = first + w * 32 * kWidth + k;
      if (column < d) dtable[id * dtable_stride + column] += sums[w][k];
    }
}

bool aligned(const View& view) {
  return reinterpret_cast<uintptr_t>(view.data) % (kWide * size_of(view.dtype)) == 0 &&
         view.stride[0] % kWide == 0;
}

}  // namespace

void CudaBackend::run(const Embed& op) {
  expect_rank("embed", "table", op.table, 2);
  expect_rank("embed", "ids", op.ids, 1);
  const int64_t t = op.ids.rows(), v = op.table.rows(), d = op.table.cols();
  const bool half = op.table.dtype == DType::bf16;
  expect("embed", "ids", op.ids, DType::i32, {t});
  expect("embed", "table", op.table, half ? DType::bf16 : DType::f32, {v, d});
  expect("embed", "y", op.y, DType::f32, {t, d});
  expect_here("embed", "ids", op.ids, device());
  expect_here("embed", "table", op.table, device());
  expect_here("embed", "y", op.y, device());
  if (t * d == 0) return;
  const bool wide = d % kWide == 0 && aligned(op.table) && aligned(op.y);
  int lanes = 1;
  while (lanes < 32 && lanes * (wide ? kWide : 1) < d) lanes *= 2;
  const auto blocks = static_cast<unsigned>(div_up(t, kThreads / lanes));
  cuda::with_type("embed", op.table, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto width) {
      embed_kernel<T, width()><<<blocks, kThreads, 0, stream_>>>(
          op.ids.as<int32_t>(), op.table.as<T>(), op.table.stride[0], op.y.as<float>(),
          op.y.stride[0], t, v, d, lanes);
    };
    if (wide)
      run(std::integral_constant<int, kWide>{});
    else
      run(std::integral_constant<int, 1>{});
  });
  cuda::check_launch("embed");
}

void CudaBackend::run(const EmbedBackward& op) {
  const char* const name = "embed backward";
  expect_rank(name, "dtable", op.dtable, 2);
  expect_rank(name, "ids", op.ids, 1);
  const int64_t t = op.ids.rows(), v = op.dtable.rows(), d = op.dtable.cols();
  expect(name, "ids", op.ids, DType::i32, {t});
  expect(name, "dy", op.dy, DType::f32, {t, d});
  expect(name, "dtable", op.dtable, DType::f32, {v, d});
  expect_here(name, "ids", op.ids, device());
  expect_here(name, "dy", op.dy, device());
  expect_here(name, "dtable", op.dtable, device());
  if (t * d == 0 || v == 0) return;
  const int32_t* const ids = op.ids.as<int32_t>();

  if (v * kFewest <= kSharedFloats) {
    const int64_t columns = v * kColumns <= kSharedFloats && d > kFewest ? kColumns : kFewest;
    const int64_t slices = div_up(d, columns);
    check(slices <= 65535, "{}: {} columns, expected less than 2^21", name, d);
    // 16 warps a multiprocessor, and partials that are small beside dy.
    const int64_t wanted = std::max<int64_t>(1, 16 * processors_ / slices / (columns / 32));
    const int64_t share = std::max({div_up(t, wanted), 16 * v, int64_t{64}});
    const int64_t shares = div_up(t, share);
    const Tensor partial(*this, DType::f32, {shares, v, d});
    const dim3 grid(static_cast<unsigned>(shares), static_cast<unsigned>(slices));
    small_table_kernel<<<grid, static_cast<unsigned>(columns), v * columns * sizeof(float),
                         stream_>>>(ids, op.dy.as<float>(), op.dy.stride[0], t, v, d, share,
                                    partial.as<float>());
    cuda::check_launch(name);
    cuda::add_partials(name, partial.as<float>(), shares, op.dtable, stream_);
    return;
  }
  const int64_t slices = div_up(d, kSlice);
  check(slices <= 65535, "{}: {} columns, expected less than 2^25", name, d);
  const dim3 grid(static_cast<unsigned>(div_up(v, kThreads / 32)), static_cast<unsigned>(slices));
  const auto run = [&](auto width) {
    large_table_kernel<width()>
        <<<grid, kThreads, 0, stream_>>>(ids, op.dy.as<float>(), op.dy.stride[0], t, v, d,
                                         op.dtable.as<float>(), op.dtable.stride[0]);
  };
  if (d % kWide == 0 && aligned(op.dy))
    run(std::integral_constant<int, kWide>{});
  else
    run(std::integral_constant<int, 1>{});
  cuda::check_launch(name);
}

}  // namespace coil
