// What the step kernel is made of: copies that run ahead of their use, a barrier over some blocks,
// products of 16 rows, and how a step is cut for the blocks of a grid.
#pragma once

#include <algorithm>

#include "kernels/cuda/scan.cuh"

namespace coil::cuda {

constexpr int kStepThreads = 512, kStepWarps = kStepThreads / 32;
constexpr int kSlice = 8;        // channels, or columns of d, that are cut together: a tile's width
constexpr int kGroupRows = 16;   // sequences of a group at most: a tile's height
constexpr int kMostGroups = 4;   // of one launch
constexpr int kStepLayers = 64;  // their addresses are parameters of the kernel
constexpr int kNormWords = 8;    // 4 floats of a row that a lane of its warp holds: d <= 1024
constexpr int kChunk = 32;       // of the inner dimension of a product, between two loads

// 16 bytes from global to shared memory, not waited for.
__device__ inline void copy_async(void* to, const void* from) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups of copies of this thread but the last kLater have arrived.
template <int kLater>
__device__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}
// `bytes` bytes, a multiple of 16, by all threads; zeros where `from` is null.
__device__ inline void copy_block(void* to, const void* from, int bytes) {
  for (int i = threadIdx.x * 16; i < bytes; i += kStepThreads * 16)
    if (from)
      copy_async(static_cast<char*>(to) + i, static_cast<const char*>(from) + i);
    else
      *reinterpret_cast<uint4*>(static_cast<char*>(to) + i) = {};
}
// As many rows, `pitch` bytes apart in shared memory, a warp each, from source(row).
template <class F>
__device__ void copy_rows(void* to, int pitch, int rows, int bytes, F&& source) {
  for (int row = threadIdx.x / 32; row < rows; row += kStepWarps) {
    char* const place = static_cast<char*>(to) + row * pitch;
    const auto* const from = reinterpret_cast<const char*>(source(row));
    for (int i = threadIdx.x % 32 * 16; i < bytes; i += 32 * 16)
      if (from)
        copy_async(place + i, from + i);
      else
        *reinterpret_cast<uint4*>(place + i) = {};
  }
}

__device__ inline void add_release(unsigned* at, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
__device__ inline unsigned load_acquire(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

constexpr int kBarrierWords =
    64;  // of a group: the counter and, 128 bytes on, that of who has left

// All blocks of a group, which must all be running. What a block wrote before arrive() the others
// read after wait(), past the L1 cache (__ldcg). The work between the two hides the way there.
struct StepBarrier {
  unsigned* counter;  // 0 before the launch, and after it
  unsigned blocks, expected = 0;

  __device__ void arrive() {
    __syncthreads();
    expected += blocks;
    if (threadIdx.x == 0) add_release(counter, 1);
  }
  __device__ void wait() const {
    if (threadIdx.x == 0)
      while (load_acquire(counter) < expected) {
      }
    __syncthreads();
  }
  // After the last wait(): who leaves last sets both counters back for the next launch.
  __device__ void leave() const {
    if (threadIdx.x != 0) return;
    unsigned* const left = counter + kBarrierWords / 2;
    if (atomicAdd(left, 1u) + 1 != blocks) return;
    *counter = 0;
    *left = 0;
  }
};

__device__ inline void mma_bf16(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// a (16,k) times the transpose of w (8 tiles,k), both in shared memory, k a multiple of kChunk. A
// warp makes one tile (16,8) of one of `splits` parts of k and hands it to
//   done(tile, split, row, column, sum):  sum[0..1] stand at (row, column), (row, column + 1),
//   sum[2..3] at row + 8. The order in which columns of a and w meet is free as long as both agree,
// so a lane reads 16 bytes of a row at once instead of the scattered pairs the instruction names.
template <class T, class F>
__device__ void products(const T* a, int a_stride, const T* w, int w_stride, int tiles, int k,
                         int splits, F&& done) {
  const int lane = threadIdx.x % 32, row = lane / 4, q = lane % 4;
  for (int i = threadIdx.x / 32; i < tiles * splits; i += kStepWarps) {
    const int tile = i % tiles, split = i / tiles;
    float sum[4] = {};
    if constexpr (std::is_same_v<T, bf16>) {
      float other[4] = {};
      const T* const low_row = a + row * a_stride + q * 8;
      const T* const high_row = low_row + 8 * a_stride;
      const T* const weights = w + (tile * 8 + row) * w_stride + q * 8;
#pragma unroll 4
      for (int at = split * kChunk; at < k; at += splits * kChunk) {
        const uint4 low = *reinterpret_cast<const uint4*>(low_row + at);
        const uint4 high = *reinterpret_cast<const uint4*>(high_row + at);
        const uint4 b = *reinterpret_cast<const uint4*>(weights + at);
        mma_bf16(sum, low.x, high.x, low.y, high.y, b.x, b.y);
        mma_bf16(other, low.z, high.z, low.w, high.w, b.z, b.w);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += other[j];
    } else {
      const float* const rows[] = {a + row * a_stride, a + (row + 8) * a_stride};
      const float* const columns[] = {w + (tile * 8 + 2 * q) * w_stride,
                                      w + (tile * 8 + 2 * q + 1) * w_stride};
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

// How a step of some sequences is cut. The sequences form groups that never meet, each on blocks of
// its own. Within a group every phase has its own cut:
//   mix   all sequences, `slices` slices of channels a block
//   scan  `part_rows` sequences, `scan_slices` slices of channels a block
//   out   all sequences, `tiles` slices of d a block
// Blocks past a phase's last have nothing to do in it. Offsets are bytes of shared memory; strides,
// elements.
struct StepCut {
  int rows, groups, group_rows, blocks;
  int slices, mix_blocks;
  int parts, part_rows, scan_slices, scan_blocks;
  int tiles, out_blocks;
  int in_splits, out_splits;                     // of the inner dimension, over the warps
  int d_stride, mix_stride, r_stride, e_stride;  // of (…,d), (…,channels), (…,r), (…,e)
  // Fetched ahead, for mix, for scan, for out:
  int in_proj, x_proj, conv_weight, conv_bias, in_bias, conv_state, norm;
  int dt_proj, A_log, dt_bias, D, ssm_state;
  int out_proj;
  // Made here: rows that a product reads; of the scan; partial sums of products; this block's
  // columns of the residual stream.
  int act, mixed, dt_low, BC, dt, xz, sums, residual;
  int bytes;
};

struct StepShape {
  int d, e, n, w, r;
};

template <class T>
StepCut cut_step(const StepShape& shape, int rows, int groups, int processors) {
  const auto up = [](int a, int b) { return static_cast<int>(div_up(a, b)); };
  const int channel_slices = shape.e / kSlice, column_slices = shape.d / kSlice;
  StepCut cut{};
  cut.rows = rows;
  cut.group_rows = up(rows, groups);
  cut.groups = up(rows, cut.group_rows);
  const int blocks = std::max(1, processors / cut.groups);
  cut.slices = up(channel_slices, blocks);
  cut.mix_blocks = up(channel_slices, cut.slices);
  cut.parts = 1;
  while (2 * cut.parts <= std::min({kMostGroups, cut.group_rows, blocks})) cut.parts *= 2;
  cut.part_rows = up(cut.group_rows, cut.parts);
  cut.scan_slices = up(channel_slices, blocks / cut.parts);
  cut.scan_blocks = up(channel_slices, cut.scan_slices);
  cut.tiles = up(column_slices, blocks);
  cut.out_blocks = up(column_slices, cut.tiles);
  cut.blocks = std::max({cut.mix_blocks, cut.parts * cut.scan_blocks, cut.out_blocks});
  cut.in_splits = std::clamp(kStepWarps / (2 * cut.slices), 1, shape.d / kChunk);
  cut.out_splits = std::clamp(kStepWarps / cut.tiles, 1, shape.e / kChunk);

  const int mixed = up(cut.slices * kSlice, kChunk) * kChunk, channels = cut.slices * kSlice;
  const int scanned = cut.scan_slices * kSlice, low = up(shape.r, kChunk) * kChunk;
  const int outputs = shape.r + 2 * shape.n;
  cut.d_stride = padded<T>(shape.d);
  cut.e_stride = padded<T>(shape.e);
  cut.mix_stride = padded<T>(mixed);
  cut.r_stride = padded<T>(low);
  const auto take = [&](int count, int size) {
    const int offset = cut.bytes;
    cut.bytes += up(count * size, 128) * 128;
    return offset;
  };
  cut.in_proj = take(2 * channels * cut.d_stride, sizeof(T));
  cut.x_proj = take(outputs * cut.mix_stride, sizeof(T));
  cut.conv_weight = take(channels * shape.w, 4);
  cut.conv_bias = take(channels, 4);
  cut.in_bias = take(2 * channels, 4);
  cut.conv_state = take(cut.group_rows * (shape.w - 1) * channels, 4);
  cut.norm = take(shape.d, 4);
  cut.dt_proj = take(scanned * cut.r_stride, sizeof(T));
  cut.A_log = take(scanned * shape.n, 4);
  cut.dt_bias = take(scanned, 4);
  cut.D = take(scanned, 4);
  cut.ssm_state = take(cut.part_rows * scanned * shape.n, 4);
  cut.out_proj = take(cut.tiles * kSlice * cut.e_stride, sizeof(T));
  cut.act = take(kGroupRows * std::max(cut.d_stride, cut.e_stride), sizeof(T));
  cut.mixed = take(kGroupRows * cut.mix_stride, sizeof(T));
  cut.dt_low = take(kGroupRows * cut.r_stride, sizeof(T));
  cut.BC = take(cut.part_rows * 2 * shape.n, 4);
  cut.dt = take(cut.part_rows * scanned, 4);
  cut.xz = take(2 * cut.part_rows * scanned, sizeof(T));
  cut.sums = take(std::max({cut.in_splits * 2 * cut.slices * kGroupRows * kSlice,
                            cut.out_splits * cut.tiles * kGroupRows * kSlice, 4 * kStepThreads}),
                  4);
  cut.residual = take(kGroupRows * cut.tiles * kSlice, 4);
  return cut;
}

}  // namespace coil::cuda
