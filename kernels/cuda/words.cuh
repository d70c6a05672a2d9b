// Neighbouring elements of a row, moved as words of up to 16 bytes.
#pragma once

#include <cstdint>

#include "kernels/cuda/device.cuh"

namespace coil::cuda {

template <class T, int kWidth>
struct Words {
  static constexpr int kBytes = sizeof(T) * kWidth;
  using Word = std::conditional_t<
      kBytes >= 16, uint4,
      std::conditional_t<kBytes == 8, uint2,
                         std::conditional_t<kBytes == 4, unsigned, unsigned short>>>;
  static constexpr int kCount = kBytes / static_cast<int>(sizeof(Word));
  Word words[kCount];

  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) words[i] = reinterpret_cast<const Word*>(from)[i];
  }
  // For memory that nothing writes once the kernel has taken its turn.
  __device__ void load_constant(const T* from) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) words[i] = __ldg(reinterpret_cast<const Word*>(from) + i);
  }
  __device__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) reinterpret_cast<Word*>(to)[i] = words[i];
  }
  // bf16 is the upper half of a float: one instruction each.
  __device__ float at(int i) const {
    if constexpr (std::is_same_v<T, bf16> && kWidth > 1) {
      const unsigned pair = reinterpret_cast<const unsigned*>(words)[i / 2];
      return __builtin_bit_cast(float, i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    } else {
      return to_float(reinterpret_cast<const T*>(words)[i]);
    }
  }
  __device__ void set(int i, float value) { reinterpret_cast<T*>(words)[i] = from_float<T>(value); }
};

// Whether `width` elements from any multiple of `width` columns on are whole aligned words.
inline bool aligned(const View& view, int64_t width) {
  if (!view) return true;
  const int64_t bytes = std::min<int64_t>(16, width * size_of(view.dtype));
  bool ok = reinterpret_cast<uintptr_t>(view.data) % bytes == 0;
  for (int i = 0; i + 1 < view.rank; ++i)
    ok = ok && view.stride[i] * size_of(view.dtype) % bytes == 0;
  return ok;
}

}  // namespace coil::cuda
