// Embedding: y[i] = table[ids[i]]; backward: dtable[ids[i]] += dy[i]. With labels (ops.h) backward
// is that of two tables.
//
// An id outside 0 … v-1 gives a row of NaN, and backward leaves its gradient out: the ids are in
// the card's memory, and to refuse one would mean to wait for it. (The CPU refuses it.)
//
// Bytes: forward writes y once, the table mostly comes from L2; backward reads dy once. Memory is
// the limit. Backward in a fixed order, without atomics:
//   * a small table (DNA, bytes of sound): a block keeps a table of kColumns columns in shared
//     memory, each column belongs to one thread, which adds its share of the rows in order; then
//     the tables of all shares are added in order.
//   * a large one: the rows are sorted by id (a radix sort keeps the order of equals) and cut into
//     chunks of equal size, so that a frequent word is many warps' work; what a chunk has of a run
//     that goes beyond it is kept apart and added in order. dy is read once, a row of dtable that
//     occurs is read and written: 50 MB of the former at 16,384 tokens of 768, up to 100 MB of the
//     latter, 17 to 50 us at 3 TB/s, and about 20 us for the launches of the sort. (Estimates for
//     an H100.)
#include <algorithm>
#include <bit>
#include <cmath>
#include <cub/device/device_radix_sort.cuh>

#include "kernels/cuda/sum_rows.cuh"
#include "kernels/cuda/words.cuh"

namespace coil {
namespace {

using cuda::bf16;
using cuda::div_up;
using cuda::expect_here;
using cuda::to_float;
using cuda::Words;

constexpr int kThreads = 256;
constexpr int kWide = 4;                    // elements moved at once
constexpr int64_t kSharedFloats = 8 << 10;  // of a block's small table: six blocks and more fit
constexpr int64_t kColumns = 128, kFewest = 32;  // columns of a small table
constexpr int kAhead = 8;                        // rows asked for while as many are added

template <int kWidth, class T>
__device__ void add_word(const T* from, float (&sum)[kWidth]) {
  if constexpr (kWidth == 1) {
    sum[0] += to_float(*from);
  } else if constexpr (std::is_same_v<T, float>) {
    const float4 word = __ldg(reinterpret_cast<const float4*>(from));
    sum[0] += word.x, sum[1] += word.y, sum[2] += word.z, sum[3] += word.w;
  } else {
    const uint2 word = __ldg(reinterpret_cast<const uint2*>(from));
    const T* const half = reinterpret_cast<const T*>(&word);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum[k] += to_float(half[k]);
  }
}

// `lanes` threads a row. labels: null without any, else (l,d); ids below v * (l + 1), or v.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    embed_kernel(const int32_t* ids, const T* table, int64_t table_stride, float* y,
                 int64_t y_stride, int64_t t, int64_t v, int64_t d, int lanes, const T* labels,
                 int64_t labels_stride, int64_t l) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(kThreads / lanes) + threadIdx.x / lanes;
  if (row >= t) return;
  const int64_t id = ids[row];
  float* const to = y + row * y_stride;
  const int64_t first = static_cast<int64_t>(threadIdx.x % lanes) * kWidth, step = lanes * kWidth;
  if (id < 0 || id >= v * (l + 1)) {
    for (int64_t i = first; i < d; i += step)
      for (int k = 0; k < kWidth; ++k) to[i + k] = NAN;
    return;
  }
  const T* const from = table + (labels ? id % v : id) * table_stride;
  const T* const label = id / v < l ? labels + id / v * labels_stride : nullptr;
#pragma unroll 2
  for (int64_t i = first; i < d; i += step) {
    float sum[kWidth] = {};
    add_word<kWidth>(from + i, sum);
    if (label) add_word<kWidth>(label + i, sum);
    if constexpr (kWidth == 1)
      to[i] = sum[0];
    else
      *reinterpret_cast<float4*>(to + i) = make_float4(sum[0], sum[1], sum[2], sum[3]);
  }
}

// ids of rows with labels → (2,t): the row of the table, that of the labels; -1 where there is
// none.
__global__ void __launch_bounds__(kThreads)
    split_kernel(const int32_t* ids, int64_t t, int64_t v, int64_t l, int32_t* split) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= t) return;
  const int64_t id = ids[i];
  const bool there = id >= 0 && id < v * (l + 1);
  split[i] = there ? static_cast<int32_t>(id % v) : -1;
  split[t + i] = there && id < v * l ? static_cast<int32_t>(id / v) : -1;
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

// A row of dy by its id: id << 32 | row, id v where there is none. Sorted by id, rows stay in
// order.
__global__ void __launch_bounds__(kThreads)
    places_kernel(const int32_t* ids, int64_t t, int64_t v, uint64_t* places) {
  const int64_t row = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (row >= t) return;
  const int64_t id = ids[row];
  places[row] = static_cast<uint64_t>(id < 0 || id >= v ? v : id) << 32 | row;
}

struct Sorted {
  const uint64_t* places;  // (t)
  int64_t t, v, d, chunk;  // rows that a warp adds
  float* dtable;           // (v,d)
  int64_t dtable_stride;
  float* partial;  // (chunks, 2, d)

  __device__ int64_t id(int64_t place) const {
    return static_cast<int64_t>(__ldg(places + place) >> 32);
  }
  // Whether the run of one id that holds this place holds the one before it too.
  __device__ bool goes_on(int64_t place) const {
    return place > 0 && place < t && id(place - 1) == id(place);
  }
  template <int kWidth>
  __device__ void add(int64_t to, int64_t column, const float (&sums)[kWidth]) const {
    if (to == v) return;
    float* const row = dtable + to * dtable_stride + column;
    Words<float, kWidth> words;
    words.load(row);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) words.set(k, words.at(k) + sums[k]);
    words.store(row);
  }
};

// A warp for each chunk of the sorted rows and 32 * kWidth columns. A run of one id that lies
// within the chunk is added to dtable. partial[chunk][0]: the sum of the run that comes from the
// chunk before, [1]: of one that begins here and goes on.
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    sorted_rows_kernel(const Sorted op, const float* dy, int64_t dy_stride) {
  const int64_t chunk = blockIdx.x * static_cast<int64_t>(kThreads / 32) + threadIdx.x / 32;
  const int64_t begin = chunk * op.chunk, end = min(begin + op.chunk, op.t);
  const int64_t column = (blockIdx.y * 32 + threadIdx.x % 32) * static_cast<int64_t>(kWidth);
  if (begin >= op.t || column >= op.d) return;
  float* const partial = op.partial + chunk * 2 * op.d + column;
  int64_t open = op.id(begin);  // the run that is being added
  bool before = op.goes_on(begin);
  float sums[kWidth] = {};
  const auto keep = [&](float* to) {
    Words<float, kWidth> words;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) words.set(k, sums[k]);
    words.store(to);
  };
  for (int64_t at = begin; at < end; at += kAhead) {
    int64_t id[kAhead];
    Words<float, kWidth> words[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (at + a >= end) break;
      const uint64_t place = __ldg(op.places + at + a);
      id[a] = static_cast<int64_t>(place >> 32);
      words[a].load_constant(dy + static_cast<int64_t>(place & 0xffffffffu) * dy_stride + column);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (at + a >= end) break;
      if (id[a] != open) {
        if (before)
          keep(partial);
        else
          op.add(open, column, sums);
        open = id[a];
        before = false;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sums[k] = 0;
      }
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sums[k] += words[a].at(k);
    }
  }
  if (before)
    keep(partial);
  else if (op.goes_on(end))
    keep(partial + op.d);
  else
    op.add(open, column, sums);
}

// Adds up the runs that lie in several chunks: a warp for each chunk in which one may begin.
template <int kWidth>
__global__ void __launch_bounds__(kThreads) long_runs_kernel(const Sorted op, int64_t chunks) {
  const int lane = threadIdx.x % 32;
  const int64_t chunk = blockIdx.x * static_cast<int64_t>(kThreads / 32) + threadIdx.x / 32;
  const int64_t begin = chunk * op.chunk, end = begin + op.chunk;
  if (end >= op.t || !op.goes_on(end)) return;
  const int64_t id = op.id(end);
  if (op.goes_on(begin) && op.id(begin) == id) return;  // began further up
  int64_t more = 0;                                     // chunks
  for (unsigned same = ~0u; same == ~0u;) {
    const int64_t next = chunk + 1 + more + lane;
    same = __ballot_sync(~0u, next < chunks && op.id(next * op.chunk) == id);
    more += same == ~0u ? 32 : __ffs(static_cast<int>(~same)) - 1;
  }
  const int64_t column = (blockIdx.y * 32 + lane) * static_cast<int64_t>(kWidth);
  if (column >= op.d) return;
  const float* const partial = op.partial + chunk * 2 * op.d + column;
  float sums[kWidth] = {};
#pragma unroll 8
  for (int64_t i = 0; i <= more; ++i) {
    Words<float, kWidth> word;
    word.load_constant(partial + (i == 0 ? op.d : i * 2 * op.d));
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sums[k] += word.at(k);
  }
  op.add(id, column, sums);
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
  if (op.labels) expect("embed", "labels", op.labels, op.table.dtype, {op.labels.rows(), d});
  expect_here("embed", "labels", op.labels, device());
  expect_here("embed", "ids", op.ids, device());
  expect_here("embed", "table", op.table, device());
  expect_here("embed", "y", op.y, device());
  if (t * d == 0) return;
  const bool wide =
      d % kWide == 0 && aligned(op.table) && aligned(op.y) && (!op.labels || aligned(op.labels));
  int lanes = 1;
  while (lanes < 32 && lanes * (wide ? kWide : 1) < d) lanes *= 2;
  const auto blocks = static_cast<unsigned>(div_up(t, kThreads / lanes));
  cuda::with_type("embed", op.table, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto width) {
      embed_kernel<T, width()><<<blocks, kThreads, 0, stream_>>>(
          op.ids.as<int32_t>(), op.table.as<T>(), op.table.stride[0], op.y.as<float>(),
          op.y.stride[0], t, v, d, lanes, op.labels.as<T>(), op.labels.stride[0],
          op.labels ? op.labels.rows() : 0);
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
  if (op.dlabels) {
    const Tensor split(*this, DType::i32, {2, t});
    split_kernel<<<static_cast<unsigned>(div_up(t, kThreads)), kThreads, 0, stream_>>>(
        op.ids.as<int32_t>(), t, v, op.dlabels.rows(), split.as<int32_t>());
    cuda::check_launch(name);
    const auto part = [&](int64_t i) { return split.view().slice(i, 1).reshape({t}); };
    run(EmbedBackward{.ids = part(0), .dy = op.dy, .dtable = op.dtable});
    run(EmbedBackward{.ids = part(1), .dy = op.dy, .dtable = op.dlabels});
    return;
  }
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
  check(t < int64_t{1} << 31, "{}: {} rows, expected less than 2^31", name, t);
  const bool wide = d % kWide == 0 && aligned(op.dy) && aligned(op.dtable);
  const int64_t slices = div_up(d, 32 * (wide ? kWide : 1));
  check(slices <= 65535, "{}: {} columns, expected less than 2^21", name, d);
  const int64_t places = t * static_cast<int64_t>(sizeof(uint64_t));
  const Tensor unsorted(*this, DType::u8, {places}), sorted(*this, DType::u8, {places});
  places_kernel<<<static_cast<unsigned>(div_up(t, kThreads)), kThreads, 0, stream_>>>(
      ids, t, v, unsorted.as<uint64_t>());
  cuda::check_launch(name);
  size_t bytes = 0;
  const auto sort = [&](void* work) {
    cuda::check_call(
        cub::DeviceRadixSort::SortKeys(work, bytes, unsorted.as<uint64_t>(), sorted.as<uint64_t>(),
                                       static_cast<int>(t), 32,
                                       32 + std::bit_width(static_cast<uint64_t>(v)), stream_),
        name);
  };
  sort(nullptr);  // says how much it needs
  const Tensor work(*this, DType::u8, {std::max<int64_t>(1, static_cast<int64_t>(bytes))});
  sort(work.view().data);
  // 16 warps a multiprocessor.
  const int64_t chunk = std::max<int64_t>(16, div_up(t * slices, int64_t{16} * processors_));
  const int64_t chunks = div_up(t, chunk);
  const Tensor partial(*this, DType::f32, {chunks, 2, d});
  const Sorted operands{.places = sorted.as<uint64_t>(),
                        .t = t,
                        .v = v,
                        .d = d,
                        .chunk = chunk,
                        .dtable = op.dtable.as<float>(),
                        .dtable_stride = op.dtable.stride[0],
                        .partial = partial.as<float>()};
  const dim3 grid(static_cast<unsigned>(div_up(chunks, kThreads / 32)),
                  static_cast<unsigned>(slices));
  const auto run = [&](auto width) {
    sorted_rows_kernel<width()>
        <<<grid, kThreads, 0, stream_>>>(operands, op.dy.as<float>(), op.dy.stride[0]);
    long_runs_kernel<width()><<<grid, kThreads, 0, stream_>>>(operands, chunks);
  };
  if (wide)
    run(std::integral_constant<int, kWide>{});
  else
    run(std::integral_constant<int, 1>{});
  cuda::check_launch(name);
}

}  // namespace coil
