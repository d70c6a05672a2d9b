// What the norm's forward and backward share on a GPU: how a row is held.
//
// A row belongs to a team of threads: a part of a warp, a warp, or several. Its columns go round
// the team, kWidth at a time. Up to 6144 columns stay in registers between the row's sum and its
// scaling; longer rows, and those that are not whole aligned words, are read a second time, mostly
// from L1 and L2.
#pragma once

#include "kernels/cuda/words.cuh"

namespace coil::cuda {

constexpr int kNormThreads = 256;
constexpr int kWide = 4;      // elements moved at once: 16 bytes of f32, 8 of bf16
constexpr int kMostHeld = 6;  // words of a row in a thread's registers

// kWidth neighbouring elements as floats.
template <int kWidth>
struct Values {
  float at[kWidth];

  template <class T>
  __device__ void load(const T* from) {
    Words<T, kWidth> words;
    words.load(from);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) at[k] = words.at(k);
  }
  template <class T>
  __device__ void store(T* to) const {
    Words<T, kWidth> words;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) words.set(k, at[k]);
    words.store(to);
  }
};

// The sum over a team of `lanes` threads, a power of two, in all of them and in one order of
// additions. All threads of the block take part.
__device__ inline float sum_of_team(float value, int lanes) {
  for (int step = min(lanes, 32) / 2; step > 0; step /= 2)
    value += __shfl_xor_sync(~0u, value, step);
  if (lanes <= 32) return value;
  __shared__ float sums[kNormThreads / 32];
  __syncthreads();  // until the last sums have been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  const int warps = lanes / 32, first = threadIdx.x / lanes * warps;
  value = sums[first];
  for (int k = 1; k < warps; ++k) value += sums[first + k];
  return value;
}

// How a row is held: words of a thread (0: not held) and threads of a team.
struct Team {
  int held, lanes;
};
inline Team team_for(bool wide, int64_t d) {
  const int most = wide ? kMostHeld * kWide : 8;
  int lanes = 1;
  while (lanes < kNormThreads && (lanes < 32 ? lanes * (wide ? kWide : 1) : lanes * most) < d)
    lanes *= 2;
  if (!wide || lanes * most < d) return {0, lanes};
  return {static_cast<int>(div_up(div_up(d, lanes * kWide), 2) * 2), lanes};
}

// Calls f with the width of a word and the words that a thread holds, as constants.
template <class F>
void with_words(bool wide, int held, F&& f) {
  using Wide = std::integral_constant<int, kWide>;
  if (!wide) return f(std::integral_constant<int, 1>{}, std::integral_constant<int, 0>{});
  if (held == 0) return f(Wide{}, std::integral_constant<int, 0>{});
  if (held == 2) return f(Wide{}, std::integral_constant<int, 2>{});
  if (held == 4) return f(Wide{}, std::integral_constant<int, 4>{});
  f(Wide{}, std::integral_constant<int, kMostHeld>{});
}

}  // namespace coil::cuda
