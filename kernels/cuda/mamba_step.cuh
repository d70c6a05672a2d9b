// What the step kernel is made of: copies that run ahead of their use, words handed from block to
// block, products of 16 rows.
#pragma once

#include "kernels/cuda/step_cut.cuh"

namespace coil::cuda {

// Whole words of 16 bytes: contiguous, at a multiple of 16.
inline bool whole_words(const View& view) {
  return !view || (view.contiguous() && reinterpret_cast<uintptr_t>(view.data) % 16 == 0);
}

// A counter in shared memory. Its phase ends when as many have arrived as it was made for.
__device__ inline unsigned shared_address(const void* at) {
  return static_cast<unsigned>(__cvta_generic_to_shared(at));
}
__device__ inline void signal_init(uint64_t* signal, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(signal)),
               "r"(arrivals)
               : "memory");
}
__device__ inline void signal_arrive(uint64_t* signal) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(signal)) : "memory");
}
// Arrives when all that this thread copied with copy_ahead() is there.
__device__ inline void signal_arrive_copied(uint64_t* signal) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(signal))
               : "memory");
}
__device__ inline bool signal_done(const uint64_t* signal, unsigned parity) {
  unsigned done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; "
      "}"
      : "=r"(done)
      : "r"(shared_address(signal)), "r"(parity)
      : "memory");
  return done != 0;
}
// Until phase `phase` (0, 1, …) has ended; the one after it must not have.
__device__ inline void signal_wait(const uint64_t* signal, int phase) {
  while (!signal_done(signal, phase & 1)) {
  }
}
// 16 bytes from global to shared memory, `bytes` of them (16 or 0) read, the others zeros. A bulk
// copy takes some 80 cycles of a multiprocessor's one unit, whatever its size; a block has a
// hundred of them a layer.
__device__ inline void copy_ahead(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
// Of the threads that compute.
__device__ inline void sync_step() {
  asm volatile("barrier.sync 1, %0;" ::"n"(kStepThreads) : "memory");
}

// Words that blocks hand to each other carry no flag: a word that has not come yet is all ones, in
// f32 and in bf16 a NaN that is never sent. So one way through L2 brings the data and says that it
// is there, where a barrier takes three (writes are done, the counter, the data).
template <class T>
__device__ bool missing(const uint4& word) {
  const unsigned parts[] = {word.x, word.y, word.z, word.w};
  unsigned found = 0;
  for (const unsigned bits : parts)
    if constexpr (sizeof(T) == 2)
      found |= (~bits - 0x00010001u) & bits & 0x80008000u;  // a half that is all ones
    else
      found |= bits == ~0u;
  return found != 0;
}
__device__ inline uint4 load_word(const void* from) {
  uint4 word;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(from)
               : "memory");
  return word;
}
// Those of kWords words that bits of `there` name, all asked for at once from at(k), and again what
// has not come; zeros for the others.
template <class T, int kWords, class F>
__device__ void receive(unsigned there, F&& at, uint4 (&word)[kWords]) {
#pragma unroll
  for (int k = 0; k < kWords; ++k) word[k] = there >> k & 1 ? load_word(at(k)) : uint4{};
  while (true) {
    unsigned left = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) left |= missing<T>(word[k]) ? 1u << k : 0;
    if (left == 0) return;
#pragma unroll
    for (int k = 0; k < kWords; ++k)
      if (left >> k & 1) word[k] = load_word(at(k));
  }
}
__device__ inline void clear_word(void* at) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %1, %1, %1};" ::"l"(at), "r"(~0u)
               : "memory");
}
__device__ inline unsigned present(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits == ~0u ? 0x7fffffffu : bits;
}
__device__ inline void send(float* to, float x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(present(x)) : "memory");
}
__device__ inline void send_pair(float* to, float x, float y) {
  asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(present(x)),
               "r"(present(y))
               : "memory");
}
__device__ inline void send(bf16* to, bf16 x) {
  const unsigned short bits = __bfloat16_as_ushort(x);
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(to),
               "h"(bits == 0xffff ? static_cast<unsigned short>(0x7fff) : bits)
               : "memory");
}

__device__ inline void mma_bf16(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// A chunk of 32 of the inner dimension, of which this lane holds 8 of two rows and of a column. The
// order in which columns of a and w meet is free as long as both agree, so a lane reads 16 bytes of
// a row at once instead of the scattered pairs that the instruction names.
__device__ inline void add_chunk(float (&sum)[4], const uint4& low, const uint4& high,
                                 const uint4& b) {
  mma_bf16(sum, low.x, high.x, low.y, high.y, b.x, b.y);
  mma_bf16(sum, low.z, high.z, low.w, high.w, b.z, b.w);
}

// a (rows <= 16,k) times the transpose of w (8 tiles,k), both in shared memory, k a multiple of
// kChunk. A warp makes kTiles neighbouring tiles (16,8) of one of `splits`, a power of two, parts
// of k and hands each to
//   done(tile, split, row, column, sum):  sum[0..1] stand at (row, column), (row, column + 1),
//   sum[2..3] at row + 8.
template <int kTiles, class T, class F>
__device__ void products(const T* a, int a_stride, int rows, const T* w, int w_stride, int tiles,
                         int k, int splits, F&& done) {
  const int lane = threadIdx.x % 32, row = lane / 4, q = lane % 4, shift = __ffs(splits) - 1;
#pragma unroll 1
  for (int i = threadIdx.x / 32; (i >> shift) * kTiles < tiles; i += kStepWarps) {
    const int split = i & (splits - 1), tile = (i >> shift) * kTiles;
    float sum[kTiles][4] = {};
    if constexpr (std::is_same_v<T, bf16>) {
      const T* const low_row = a + row * a_stride + q * 8;
      const T* const high_row = low_row + 8 * a_stride;
      const T* const weights = w + (tile * 8 + row) * w_stride + q * 8;
#pragma unroll 2
      for (int at = split * kChunk; at < k; at += splits * kChunk) {
        const uint4 low = row < rows ? *reinterpret_cast<const uint4*>(low_row + at) : uint4{};
        const uint4 high =
            row + 8 < rows ? *reinterpret_cast<const uint4*>(high_row + at) : uint4{};
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
          if (j == 0 || tile + j < tiles)
            add_chunk(sum[j], low, high,
                      *reinterpret_cast<const uint4*>(weights + j * 8 * w_stride + at));
      }
    } else {
      const float* const rows_of[] = {a + row * a_stride, a + (row + 8) * a_stride};
      const float* const columns = w + (tile * 8 + 2 * q) * w_stride;
#pragma unroll 1
      for (int at = split * kChunk; at < k; at += splits * kChunk)
#pragma unroll 2
        for (int p = at; p < at + kChunk; p += 4)
#pragma unroll
          for (int j = 0; j < 4 * kTiles; ++j) {
            if (j >= 4 && tile + j / 4 >= tiles) break;
            const float4 x = *reinterpret_cast<const float4*>(rows_of[j / 2 % 2] + p);
            const float4 y =
                *reinterpret_cast<const float4*>(columns + (j / 4 * 8 + j % 2) * w_stride + p);
            float& add = sum[j / 4][j % 4];
            add = fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, add))));
          }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      if (j == 0 || tile + j < tiles) done(tile + j, split, row, 2 * q, sum[j]);
  }
}

}  // namespace coil::cuda
