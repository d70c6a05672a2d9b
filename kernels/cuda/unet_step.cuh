// What a step of S4D stages is made of (unet_step.cu): its operands, products of one vector, and a
// state's step.
#pragma once

#include "kernels/cuda/fast_math.cuh"
#include "kernels/cuda/mamba_step.cuh"

namespace coil::cuda {

constexpr int kTeamThreads = 512, kTeamWarps = kTeamThreads / 32;
constexpr int kAhead = 2;     // of a product: loads of 32 bytes a lane under way
constexpr int kStatesOf = 4;  // of a lane
constexpr int kMostTeam = 8;  // blocks of a cluster
constexpr int kMostStages = 4, kMostLayers = 40, kMostWidth = 512;

template <class T>
struct UnetLayer {
  const float *norm, *table, *D;
  float* state;
  const T* linear;
  const float *bias, *mlp_norm;
  const T *mlp_in, *mlp_out;
};
template <class T>
struct UnetStage {
  const float* norm_f;
  const T *down, *up;
  const float *down_bias, *up_bias;
  float *rest, *next;
  int first, layers, d, n, f, p;
  int lane_bits;  // 2^lane_bits lanes scan a channel
};
// Offsets in bytes of shared memory. Vectors of a layer: norm (d), D (d), bias (2d), mlp_norm (d).
struct UnetRoom {
  int inbox, inbox_stride;  // of each stage: x and the sums of squares of eight of x each
  int y, u, gated, steps;   // what products read, in activation type
  int e;                    // x as it came, before the stage inside
  int vectors, norm_f, signals, bytes;
};
template <class T>
struct Unet {
  UnetLayer<T> layers[kMostLayers];
  UnetStage<T> stages[kMostStages];
  int stage_count, team, v;
  float eps;
  const Piece* pieces;
  const int32_t* ids;
  const T *table, *head;
  int64_t table_rows;
  float* logits;
  UnetRoom room;
};

// A product as warps read it: tiles of 8 outputs, warp by warp. A lane reads 16 bytes of one row of
// the matrix and 16 that stand `second` elements further: of the row that makes the other half of a
// pair, or of the other half of the same row.
template <class T>
struct Walk {
  static constexpr int kStep = 64 / sizeof(T);  // elements of a row that four lanes read
  const T* matrix;
  int k, second, steps, tiles;
};
template <class T>
__device__ Walk<T> pairs(const T* matrix, int k, int outputs) {
  return {matrix, k, outputs * k, k / Walk<T>::kStep, outputs / 8};
}
template <class T>
__device__ Walk<T> halves(const T* matrix, int k, int outputs) {
  return {matrix, k, k / 2, k / 2 / Walk<T>::kStep, outputs / 8};
}

__device__ inline uint4 load_weights(const void* from) {
  uint4 word;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(from));
  return word;
}

// Of the same value in all lanes, which the compiler would not see in threadIdx.x / 32: it would
// guard every shuffle.
__device__ inline int warp_index() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
}

// What a warp has asked for of a product.
template <class T>
struct Ahead {
  uint4 low[kAhead], high[kAhead];

  __device__ void fetch(int slot, const Walk<T>& walk, int tile, int step) {
    const int lane = threadIdx.x % 32;
    const T* const at = walk.matrix + static_cast<int64_t>(tile * 8 + lane / 4) * walk.k +
                        step * Walk<T>::kStep + lane % 4 * (16 / static_cast<int>(sizeof(T)));
    low[slot] = load_weights(at);
    high[slot] = load_weights(at + walk.second);
  }
  // The begin of a product.
  __device__ void begin(int slot, const Walk<T>& walk, int warp) {
    if (warp < walk.tiles && slot < walk.steps) fetch(slot, walk, warp, slot);
  }
  __device__ void begin(const Walk<T>& walk, int warp) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) begin(slot, walk, warp);
  }
};

// Eight sums of a warp, a lane's of row lane / 4: of both rows that it reads.
template <class T>
struct Sums {
  float even[4] = {}, odd[4] = {};  // f32: low in even[0], high in even[3]

  // vector: what the rows are multiplied with, `second` further for the second ones.
  __device__ void add(const uint4& low, const uint4& high, const T* vector, int second) {
    const int lane = threadIdx.x % 32;
    if constexpr (std::is_same_v<T, bf16>) {
      // Odd columns of the tensor core's operand are the vector of the second rows.
      const uint4 b =
          *reinterpret_cast<const uint4*>(vector + (lane / 4 % 2) * second + lane % 4 * 8);
      mma_bf16(even, low.x, high.x, low.y, high.y, b.x, b.y);
      mma_bf16(odd, low.z, high.z, low.w, high.w, b.z, b.w);
    } else {
      const float* const at = vector + lane % 4 * 4;
      const auto dot = [](const uint4& w, const float4& x, float sum) {
        return fmaf(__uint_as_float(w.w), x.w,
                    fmaf(__uint_as_float(w.z), x.z,
                         fmaf(__uint_as_float(w.y), x.y, fmaf(__uint_as_float(w.x), x.x, sum))));
      };
      even[0] = dot(low, *reinterpret_cast<const float4*>(at), even[0]);
      even[3] = dot(high, *reinterpret_cast<const float4*>(at + second), even[3]);
    }
  }
  // Of the first row and of the second, in every lane of a row. `halves`: of the other columns.
  __device__ float2 both(bool halves) const {
    if constexpr (std::is_same_v<T, bf16>)
      return {even[0] + odd[0], halves ? even[3] + odd[3] : even[2] + odd[2]};
    float a = even[0], b = even[3];
    for (const int far : {1, 2}) {
      a += __shfl_xor_sync(~0u, a, far);
      b += __shfl_xor_sync(~0u, b, far);
    }
    return {a, b};
  }
};

// done(output, sums of its two rows) for all outputs of this warp, in every lane of a row. `ahead`
// holds the begin of the product, and that of `next` (null: none), which has the same shape,
// afterwards.
template <class T, class F>
__device__ void multiply(Ahead<T>& ahead, const Walk<T>& walk, const Walk<T>& next, const T* vector,
                         bool halves, int warp, F&& done) {
  const int second = halves ? walk.k / 2 : 0;
#pragma unroll 1
  for (int tile = warp; tile < walk.tiles; tile += kTeamWarps) {
    Sums<T> sums;
#pragma unroll 1
    for (int from = 0; from < walk.steps; from += kAhead) {
#pragma unroll
      for (int slot = 0; slot < kAhead; ++slot) {
        const int step = from + slot;
        if (step >= walk.steps) break;
        sums.add(ahead.low[slot], ahead.high[slot], vector + step * Walk<T>::kStep, second);
        if (step + kAhead < walk.steps)
          ahead.fetch(slot, walk, tile, step + kAhead);
        else if (tile + kTeamWarps < walk.tiles)
          ahead.fetch(slot, walk, tile + kTeamWarps, slot);
        else if (next.matrix)
          ahead.begin(slot, next, warp);
      }
    }
    done(tile * 8 + threadIdx.x % 32 / 4, sums.both(halves));
  }
}

// Sum of squares of eight outputs that stand in lanes 0, 4, …: every lane gets it.
__device__ inline float squares_of_tile(float x) {
  float sum = x * x;
#pragma unroll
  for (int far = 4; far < 32; far *= 2) sum += __shfl_xor_sync(~0u, sum, far);
  return sum;
}

template <class T>
struct ScanAhead {
  float4 h[2], z_re, z_im, K_re, K_im;

  // states: a slot's, (d,n,2); table: (d,4,n).
  __device__ void fetch(const float* states, const float* table, int n, int channel, int lane) {
    const float4* const state =
        reinterpret_cast<const float4*>(states) + (channel * n / kStatesOf + lane) * 2;
    const int quarter = n / kStatesOf;
    const float4* const at = reinterpret_cast<const float4*>(table) + channel * n + lane;
    h[0] = __ldcg(state);
    h[1] = __ldcg(state + 1);
    z_re = __ldg(at);
    z_im = __ldg(at + quarter);
    K_re = __ldg(at + 2 * quarter);
    K_im = __ldg(at + 3 * quarter);
  }
};
// A state's step; adds its part of y.
__device__ inline float advance(float& re, float& im, float z_re, float z_im, float K_re,
                                float K_im, float u, float y) {
  const float new_re = re + fmaf(-z_im, im, fmaf(z_re, re, u));
  const float new_im = im + fmaf(z_im, re, z_re * im);
  re = new_re;
  im = new_im;
  return fmaf(-K_im, new_im, fmaf(K_re, new_re, y));
}

}  // namespace coil::cuda
