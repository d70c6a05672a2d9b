// What the step kernel is made of: copies that run ahead of their use, words handed from block to
// block, products of 16 rows, and how a step is cut for the blocks of a grid.
#pragma once

#include <algorithm>

#include "kernels/cuda/scan.cuh"

namespace coil::cuda {

constexpr int kStepThreads = 512, kStepWarps = kStepThreads / 32;  // that compute
constexpr int kFetchThreads = 128;                                 // that fetch ahead
constexpr int kBlockThreads = kStepThreads + kFetchThreads;
constexpr int kSlice = 8;       // channels, or columns of d, that are cut together: a tile's width
constexpr int kGroupRows = 16;  // sequences of a group at most: a tile's height
constexpr int kMostGroups = 4;  // of one launch
constexpr int kMostRows = kMostGroups * kGroupRows;  // sequences of one launch
constexpr int kNormWords = 8;    // 4 floats of a row that a lane of its warp holds: d <= 1024
constexpr int kChunk = 32;       // of the inner dimension of a product, between two loads
constexpr int kGenerations = 3;  // of the words that are handed on

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
// Those of kWords words that bits of `there` name, all asked for at once from at(k); zeros for the
// others.
template <class T, int kWords, class F>
__device__ void receive(unsigned there, F&& at, uint4 (&word)[kWords]) {
  for (bool all = false; !all;) {
    all = true;
#pragma unroll
    for (int k = 0; k < kWords; ++k) word[k] = there >> k & 1 ? load_word(at(k)) : uint4{};
#pragma unroll
    for (int k = 0; k < kWords; ++k) all = all && !missing<T>(word[k]);
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

// a (16,k) times the transpose of w (8 tiles,k), both in shared memory, k a multiple of kChunk. A
// warp makes one tile (16,8) of one of `splits` parts of k and hands it to
//   done(tile, split, row, column, sum):  sum[0..1] stand at (row, column), (row, column + 1),
//   sum[2..3] at row + 8.
template <int kUnroll, class T, class F>
__device__ void products(const T* a, int a_stride, const T* w, int w_stride, int tiles, int k,
                         int splits, F&& done) {
  const int lane = threadIdx.x % 32, row = lane / 4, q = lane % 4;
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < tiles * splits; i += kStepWarps) {
    const int split = i / tiles, tile = i - split * tiles;
    float sum[4] = {};
    if constexpr (std::is_same_v<T, bf16>) {
      const T* const low_row = a + row * a_stride + q * 8;
      const T* const high_row = low_row + 8 * a_stride;
      const T* const weights = w + (tile * 8 + row) * w_stride + q * 8;
#pragma unroll kUnroll
      for (int at = split * kChunk; at < k; at += splits * kChunk)
        add_chunk(sum, *reinterpret_cast<const uint4*>(low_row + at),
                  *reinterpret_cast<const uint4*>(high_row + at),
                  *reinterpret_cast<const uint4*>(weights + at));
    } else {
      const float* const rows[] = {a + row * a_stride, a + (row + 8) * a_stride};
      const float* const columns[] = {w + (tile * 8 + 2 * q) * w_stride,
                                      w + (tile * 8 + 2 * q + 1) * w_stride};
#pragma unroll 1
      for (int at = split * kChunk; at < k; at += splits * kChunk)
#pragma unroll 2
        for (int p = at; p < at + kChunk; p += 4)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float4 x = *reinterpret_cast<const float4*>(rows[j / 2] + p);
            const float4 y = *reinterpret_cast<const float4*>(columns[j % 2] + p);
            sum[j] = fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, sum[j]))));
          }
    }
    done(tile, split, row, 2 * q, sum);
  }
}

// Elements from row to row of a matrix in shared memory: 64 bytes more than a multiple of 128, so
// that the eight lanes of a 16-byte access, two rows of four, meet no bank twice.
template <class T>
constexpr int padded(int columns) {
  return columns * sizeof(T) % 128 == 0 ? columns + 64 / static_cast<int>(sizeof(T)) : columns;
}

// i / by for i * by < 2^32 and by > 1, without a division.
struct Divider {
  unsigned by, reciprocal;
  __device__ int operator()(int i) const {
    return static_cast<int>(__umulhi(static_cast<unsigned>(i), reciprocal));
  }
};
inline Divider divider(int by) {
  return {static_cast<unsigned>(by), 0xffffffffu / static_cast<unsigned>(by) + 1};
}

// How a step of some sequences is cut. The sequences form groups that never meet, each on blocks of
// its own. Within a group every phase has its own cut:
//   mix   all sequences, `slices` slices of channels a block
//   scan  `part_rows` sequences, `scan_slices` slices of channels a block
//   out   all sequences, `tiles` slices of d a block, from block out_first on
//   head  all sequences, `head_tiles` slices of the vocabulary a block
// Other blocks have nothing to do in the phase. Offsets are bytes of shared memory; strides,
// elements.
struct StepCut {
  int rows, groups, group_rows, blocks;
  int slices, mix_blocks;
  int parts, part_rows, scan_slices, scan_blocks;
  int tiles, out_blocks, out_first;
  int head_tiles;
  int in_splits, out_splits, head_splits;        // of the inner dimension, over the warps
  int d_stride, mix_stride, r_stride, e_stride;  // of (…,d), (…,channels), (…,r), (…,e)
  int adders;                                    // threads that add a column of partial sums
  Divider by_mix, by_out, by_head, by_scan, by_outputs, by_part_words, by_scan_words;
  // Fetched ahead, for mix, for scan, for out:
  int in_proj, conv_weight, conv_bias, in_bias, conv_state, norm, mix_layer;
  int A_log, dt_bias, D, ssm_state, scan_layer;
  int out_proj, out_bias;
  int zeros;  // from here on memory starts as zeros, which fill rows and columns up
  int x_proj, dt_proj;
  // Made here: rows that a product reads; x of mix; of the scan; partial sums of products; this
  // block's columns of the residual stream; signals.
  int act, mixed, mix_x, dt_low, BC, dt, xz, sums, residual, signals;
  int bytes;
  // What is handed on: offsets in a generation, in bytes of global memory.
  int64_t x, partial, mixed_rows, z_rows, gated, generation;
};

struct StepShape {
  int d, e, n, w, r, v;  // v 0: no head
};

constexpr int kLayerBytes = 14 * 8;  // of StepLayer

template <class T>
StepCut cut_step(const StepShape& shape, int rows, int groups, int processors) {
  const auto up = [](int a, int b) { return static_cast<int>(div_up(a, b)); };
  const int channel_slices = shape.e / kSlice, column_slices = shape.d / kSlice;
  const int outputs = shape.r + 2 * shape.n;
  StepCut cut{};
  cut.rows = rows;
  cut.group_rows = up(rows, groups);
  cut.groups = up(rows, cut.group_rows);
  const int blocks = std::max(1, processors / cut.groups);
  // Two slices at least: a block's partial sums are as many whatever its channels, and each block
  // of the scan reads those of all.
  cut.slices = std::max(up(channel_slices, blocks), 2);
  cut.mix_blocks = up(channel_slices, cut.slices);
  cut.parts = 1;
  while (2 * cut.parts <= std::min({kMostGroups, cut.group_rows, blocks})) cut.parts *= 2;
  cut.part_rows = up(cut.group_rows, cut.parts);
  cut.scan_slices = std::max(up(channel_slices, blocks / cut.parts), 2);
  cut.scan_blocks = up(channel_slices, cut.scan_slices);
  cut.tiles = up(column_slices, blocks);
  cut.out_blocks = up(column_slices, cut.tiles);
  const int busy = std::max(cut.mix_blocks, cut.parts * cut.scan_blocks);
  cut.out_first = busy + cut.out_blocks <= blocks ? busy : 0;
  cut.blocks = std::max(busy, cut.out_first + cut.out_blocks);
  cut.head_tiles = shape.v > 0 ? up(up(shape.v, kSlice), cut.blocks) : 0;
  cut.in_splits = std::clamp(kStepWarps / (2 * cut.slices), 1, shape.d / kChunk);
  cut.out_splits = std::min(kStepWarps, shape.e / kChunk);
  cut.head_splits = std::clamp(kStepWarps / std::max(1, cut.head_tiles), 1, shape.d / kChunk);
  const int part_words = cut.part_rows * outputs / 4;
  cut.adders = 1;
  while (cut.adders < 8 && 2 * cut.adders * part_words * 4 <= kStepThreads) cut.adders *= 2;

  const int mixed = up(cut.slices * kSlice, kChunk) * kChunk, channels = cut.slices * kSlice;
  const int scanned = cut.scan_slices * kSlice, low = up(shape.r, kChunk) * kChunk;
  const int columns = cut.tiles * kSlice, head = cut.head_tiles * kSlice;
  cut.by_mix = divider(2 * channels);
  cut.by_out = divider(columns);
  cut.by_head = divider(std::max(2, head));
  cut.by_scan = divider(scanned);
  cut.by_outputs = divider(outputs);
  cut.by_part_words = divider(part_words);
  cut.by_scan_words = divider(scanned * static_cast<int>(sizeof(T)) / 16);
  cut.d_stride = padded<T>(shape.d);
  cut.e_stride = padded<T>(shape.e);
  cut.mix_stride = padded<T>(mixed);
  cut.r_stride = padded<T>(low);
  const auto take = [&](int count, int size) {
    const int offset = cut.bytes;
    cut.bytes += up(count * size, 128) * 128;
    return offset;
  };
  cut.in_proj = take(std::max(2 * channels, head) * cut.d_stride, sizeof(T));
  cut.conv_weight = take(channels * shape.w, 4);
  cut.conv_bias = take(channels, 4);
  cut.in_bias = take(2 * channels, 4);
  cut.conv_state = take(cut.group_rows * (shape.w - 1) * channels, 4);
  cut.norm = take(shape.d, 4);
  cut.mix_layer = take(kLayerBytes, 1);
  cut.A_log = take(scanned * shape.n, 4);
  cut.dt_bias = take(scanned, 4);
  cut.D = take(scanned, 4);
  cut.ssm_state = take(cut.part_rows * scanned * shape.n, 4);
  cut.scan_layer = take(kLayerBytes, 1);
  cut.out_proj = take(columns * cut.e_stride, sizeof(T));
  cut.out_bias = take(columns, 4);
  cut.zeros = cut.bytes;
  cut.x_proj = take(outputs * cut.mix_stride, sizeof(T));
  cut.dt_proj = take(scanned * cut.r_stride, sizeof(T));
  cut.act = take(kGroupRows * cut.d_stride, sizeof(T));
  cut.mixed = take(kGroupRows * cut.mix_stride, sizeof(T));
  cut.mix_x = take(cut.group_rows * channels, 4);
  cut.dt_low = take(kGroupRows * cut.r_stride, sizeof(T));
  cut.BC = take(cut.part_rows * 2 * shape.n, 4);
  cut.dt = take(cut.part_rows * scanned, 4);
  cut.xz = take(2 * cut.part_rows * scanned, sizeof(T));
  const int lanes = std::min(kStepThreads / part_words, cut.mix_blocks);
  cut.sums =
      take(std::max({cut.in_splits * kGroupRows * (2 * channels + kSlice),
                     cut.out_splits * kGroupRows * (columns + kSlice),
                     cut.head_splits * kGroupRows * (head + kSlice), lanes * (part_words + 1) * 4}),
           4);
  cut.residual = take(kGroupRows * columns, 4);
  cut.signals = take(8, sizeof(uint64_t));

  const auto hand_on = [&](int64_t bytes) {
    const int64_t offset = cut.generation;
    cut.generation += div_up(bytes, 128) * 128;
    return offset;
  };
  const int64_t row_bytes = static_cast<int64_t>(sizeof(T)) * rows * shape.e;
  cut.x = hand_on(int64_t{4} * rows * shape.d);
  cut.partial = hand_on(int64_t{4} * cut.groups * cut.mix_blocks * cut.group_rows * outputs);
  cut.mixed_rows = hand_on(row_bytes);
  cut.z_rows = hand_on(row_bytes);
  cut.gated = hand_on(row_bytes);
  return cut;
}

}  // namespace coil::cuda
