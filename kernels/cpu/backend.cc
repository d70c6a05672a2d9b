// Memory of the CPU backend: where blocks come from (kernels/blocks.h), strided casting copies,
// fill. What is in use plus what is kept never exceeds the most that was ever in use at once, plus
// an eighth and 16 MiB.
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/error.h"

namespace coil {

namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kKeptAlways = 16 << 20;  // bytes kept however little is in use
constexpr int64_t kParallelBytes =
    256 << 10;                        // below this a copy or fill is not worth a parallel region
constexpr int64_t kBlock = 16 << 10;  // elements of a row that one thread copies at a time

// Blocks from half a large page on in pages of 2 MiB: prefetching stops at a page's end, and
// decoding reads weights 1.4 times as fast (32 instead of 23 GB/s on one core of a Zen 4).
void* allocate(int64_t size) {
  if (size < kHugePage / 2) return std::aligned_alloc(kAlignment, size);
  const int64_t whole = (size + kHugePage - 1) / kHugePage * kHugePage;
  void* data = std::aligned_alloc(kHugePage, whole);
  if (data) madvise(data, whole, MADV_HUGEPAGE);  // advice: refused, all goes on as before
  return data;
}

struct BFloat16 {
  uint16_t bits;
};

template <class T>
double to_number(T x) {
  return static_cast<double>(x);
}
template <>
double to_number(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

BFloat16 to_bf16(float x) {  // to nearest, ties to even; NaN stays NaN
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class To, class From>
To cast(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<To, BFloat16>) {
    return to_bf16(static_cast<float>(to_number(x)));
  } else if constexpr (std::is_same_v<From, BFloat16> && std::is_same_v<To, float>) {
    return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
  } else if constexpr (std::is_integral_v<To>) {  // towards zero, clipped; NaN is 0
    const double value = to_number(x);
    if (value != value) return 0;
    return static_cast<To>(
        std::clamp<double>(value, std::numeric_limits<To>::min(), std::numeric_limits<To>::max()));
  } else {
    return static_cast<To>(to_number(x));
  }
}

// Calls f with a value of the C++ type of dtype.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::bf16:
      return f(BFloat16{});
    case DType::f64:
      return f(double{});
    case DType::i32:
      return f(int32_t{});
    case DType::u8:
      return f(uint8_t{});
  }
}

// A view as rows of its last dimension: calls f(row, begin, length) for blocks of rows, over the
// threads.
template <class F>
void for_each_block(int64_t rows, int64_t cols, int64_t bytes, int threads, F&& f) {
  const int64_t blocks = (cols + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static) if (bytes >= kParallelBytes)
  for (int64_t i = 0; i < rows * blocks; ++i) {
    const int64_t begin = i % blocks * kBlock;
    f(i / blocks, begin, std::min(kBlock, cols - begin));
  }
}

// Element offset of row `row`, the leading dimensions counted together.
int64_t row_offset(const View& view, int64_t row) {
  int64_t offset = 0;
  for (int i = view.rank - 2; i >= 0; --i) {
    offset += row % view.size[i] * view.stride[i];
    row /= view.size[i];
  }
  return offset;
}

// Contiguous views become one row, so that blocks are long whatever the shape.
View flat(const View& view) { return view.reshape({view.count()}); }

}  // namespace

Blocks::Device cpu_memory(int64_t limit) {
  return {.name = "cpu",
          .alignment = kAlignment,
          .kept_share = 0.125,
          .kept_always = kKeptAlways,
          .limit = limit,
          .allocate = allocate,
          .release = [](void* data) { std::free(data); }};
}

void CpuBackend::copy(View from, View to) {
  bool same = from.rank == to.rank;
  for (int i = 0; same && i < from.rank; ++i) same = from.size[i] == to.size[i];
  check(same, "copy: from is {}, to is {}: expected one shape", from.shape(), to.shape());
  check(from.device == to.device && from.device == Device{}, "copy: expected host memory");
  if (from.count() == 0) return;
  if (from.contiguous() && to.contiguous()) {
    from = flat(from);
    to = flat(to);
  }
  const int64_t cols = from.cols(), rows = from.count() / cols;
  with_type(from.dtype, [&](auto from_value) {
    with_type(to.dtype, [&](auto to_value) {
      using From = decltype(from_value);
      using To = decltype(to_value);
      const int64_t bytes = from.count() * static_cast<int64_t>(sizeof(From) + sizeof(To));
      for_each_block(rows, cols, bytes, threads_, [&](int64_t row, int64_t begin, int64_t length) {
        const From* x = from.as<From>() + row_offset(from, row) + begin;
        To* y = to.as<To>() + row_offset(to, row) + begin;
        if constexpr (std::is_same_v<From, To>) {
          std::memcpy(y, x, length * sizeof(To));
        } else {
          for (int64_t i = 0; i < length; ++i) y[i] = cast<To>(x[i]);
        }
      });
    });
  });
}

void CpuBackend::fill(View x, double value) {
  check(x.device == Device{}, "fill: expected host memory");
  if (x.count() == 0) return;
  if (x.contiguous()) x = flat(x);
  const int64_t cols = x.cols(), rows = x.count() / cols;
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    const T filling = cast<T>(value);
    const int64_t bytes = x.count() * static_cast<int64_t>(sizeof(T));
    for_each_block(rows, cols, bytes, threads_, [&](int64_t row, int64_t begin, int64_t length) {
      T* y = x.as<T>() + row_offset(x, row) + begin;
      std::fill(y, y + length, filling);
    });
  });
}

std::unique_ptr<Backend> make_cpu_backend(int threads, int64_t limit) {
  check(threads >= 0, "threads: {}, expected 0 (all) or more", threads);
  return std::make_unique<CpuBackend>(threads > 0 ? threads : omp_get_num_procs(), limit);
}

}  // namespace coil
