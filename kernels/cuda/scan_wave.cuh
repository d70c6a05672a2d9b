// The selective scan's forward in one pass, for batches whose sequences fill the card together.
// A block takes 32 channels (a lane each) of one piece, its warps tiles of kScanSteps steps in
// turn. Decays and inputs need no state, so a warp computes those of four states for all its steps
// ahead, waits for the four states that the warp before ends in, walks, hands on, and only then
// makes y. One wave of states runs around the block's warps for each four of them; barriers, one
// for each warp and four states, keep neighbours in step. No second pass, no other synchronisation.
//
// Limit: issue slots (see selective_scan.cu), 143 instructions and 19 powers and divisions a
// channel's step, 219. H100: 0.200 ms for 8 sequences of 2,048 steps of 1,536 channels, 266 slots,
// 82 % of it.
#pragma once

#include "kernels/cuda/letters.cuh"

namespace coil::cuda {

constexpr int kWaveWarps = 4, kWaveFew = kLetterStates, kWaveFours = kStates / kWaveFew;

template <class T>
struct WaveWarp {               // a warp's shared memory
  T act[2][3][kScanSteps][32];  // x, dt, z: of this tile and of the next
  Matrices matrices;
};
template <class T>
struct WaveBlock {
  WaveWarp<T> warp[kWaveWarps];
  float4 mail[kWaveWarps][kWaveFours][32];  // states that warps end in
  uint64_t posted[kWaveWarps][kWaveFours];  // barriers
};

// Requires a gate, kStates states, e a multiple of 32, whole words in x, dt, z, and B and C that
// can be read four states at a time.
template <class T>
__global__ void __launch_bounds__(kWaveWarps * 32, 3) wave_kernel(const Scan<T> op) {
  take_turn();
  __shared__ WaveBlock<T> shared;
  using Four = std::conditional_t<std::is_same_v<T, float>, float4, uint2>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int before = (warp + kWaveWarps - 1) % kWaveWarps;
  WaveWarp<T>& own = shared.warp[warp];
  const Piece piece = op.pieces[blockIdx.x];
  const int64_t block_channel = blockIdx.y * int64_t{32}, channel = block_channel + lane;
  const int direction = op.reverse ? -1 : 1;
  const int64_t first_row = op.row(piece, 0);
  const int tiles = static_cast<int>((piece.length + kScanSteps - 1) / kScanSteps);

  // What this lane copies: words of a row of x, dt and z; four states of B and C.
  constexpr int kWord = 16 / sizeof(T), kWords = 32 / kWord;  // in a row
  const int word_row = lane / kWords, word = lane % kWords * kWord;
  constexpr int kRows = 32 / kWords;  // at once
  const int steps = static_cast<int>(piece.length);
  const auto first = [&](const T* data, int64_t stride, int64_t row, int64_t column) {
    return data + (first_row + direction * (int64_t{kScanSteps} * warp + row)) * stride + column;
  };
  const T* from[3] = {first(op.x, op.x_stride, word_row, block_channel + word),
                      first(op.dt, op.dt_stride, word_row, block_channel + word),
                      first(op.z, op.z_stride, word_row, block_channel + word)};
  const int hop[3] = {direction * static_cast<int>(op.x_stride),
                      direction * static_cast<int>(op.dt_stride),
                      direction * static_cast<int>(op.z_stride)};
  const auto fetch = [&](int tile, int buffer) {
#pragma unroll
    for (int r = 0; r < kScanSteps; r += kRows)
#pragma unroll
      for (int a = 0; a < 3; ++a)
        copy_later(&own.act[buffer][a][r + word_row][word],
                   from[a] + static_cast<int64_t>(r) * hop[a],
                   tile * kScanSteps + r + word_row < steps);
#pragma unroll
    for (int a = 0; a < 3; ++a) from[a] += static_cast<int64_t>(kWaveWarps * kScanSteps) * hop[a];
    end_of_slot();
  };
  const int four_row = lane / kWaveFours, four = lane % kWaveFours * kWaveFew;
  Four B{}, C{};
  const T* from_B = first(op.B, op.B_stride, four_row, four);
  const T* from_C = first(op.C, op.C_stride, four_row, four);
  const auto fetch_matrices = [&](int tile) {
    if (tile * kScanSteps + four_row < steps) {  // else times 0
      B = *reinterpret_cast<const Four*>(from_B);
      C = *reinterpret_cast<const Four*>(from_C);
    }
    from_B += direction * int64_t{kWaveWarps * kScanSteps} * op.B_stride;
    from_C += direction * int64_t{kWaveWarps * kScanSteps} * op.C_stride;
  };
  const auto widened = [](const Four& from) -> float4 {
    if constexpr (std::is_same_v<T, float>)
      return from;
    else
      return {__uint_as_float(from.x << 16), __uint_as_float(from.x & 0xffff0000u),
              __uint_as_float(from.y << 16), __uint_as_float(from.y & 0xffff0000u)};
  };
  if (warp < tiles) {
    fetch(warp, 0);
    fetch_matrices(warp);
  }
  // Where this warp's next tile is written, and how far the next step is.
  const int64_t own_row = first_row + direction * int64_t{kScanSteps} * warp;
  T* y_at = op.y + own_row * op.y_stride + channel;
  const int y_hop = direction * static_cast<int>(op.y_stride), e = static_cast<int>(op.e);
  T* checkpoint = nullptr;
  if (op.checkpoints)
    checkpoint =
        op.checkpoints + (op.first_checkpoint[blockIdx.x] + warp) * kStates * op.e + channel;
  float rate[kStates];
  op.rates(channel, rate);
  const float bias = op.dt_bias[channel], D = op.D[channel];

  if (lane < kWaveFours) empty_mail(&shared.posted[warp][lane]);
  __syncthreads();
  // The first tile, like any other, finds its states where the warp before puts them.
  if (warp == kWaveWarps - 1) {
    const float* const from = piece.from >= 0 ? op.state_at(piece.from, channel) : nullptr;
#pragma unroll
    for (int f = 0; f < kWaveFours; ++f) {
      float4 state = {0, 0, 0, 0};
      if (from) state = {from[4 * f], from[4 * f + 1], from[4 * f + 2], from[4 * f + 3]};
      shared.mail[warp][f][lane] = state;
      post_letter(&shared.posted[warp][f]);
    }
  }
  int buffer = 0;
  for (int tile = warp; tile < tiles; tile += kWaveWarps, buffer ^= 1) {
    wait_for_all();
    *reinterpret_cast<float4*>(&own.matrices.B[four_row][four]) = widened(B);
    *reinterpret_cast<float4*>(&own.matrices.C[four_row][four]) = widened(C);
    __syncwarp();  // both have come for all lanes
    if (tile + kWaveWarps < tiles) {
      fetch(tile + kWaveWarps, buffer ^ 1);
      fetch_matrices(tile + kWaveWarps);
    }
    const int left = steps - tile * kScanSteps;  // kScanSteps or more, except at the end
    float delta[kScanSteps], u[kScanSteps], y[kScanSteps];
#pragma unroll
    for (int s = 0; s < kScanSteps; ++s) {
      delta[s] = softplus_of(to_float(own.act[buffer][1][s][lane]) + bias);
      u[s] = delta[s] * to_float(own.act[buffer][0][s][lane]);
      y[s] = D * to_float(own.act[buffer][0][s][lane]);
    }
    if (left < kScanSteps) {
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s)
        if (s >= left) delta[s] = u[s] = 0;  // a decay of 1 and nothing to add
    }
#pragma unroll
    for (int f = 0; f < kWaveFours; ++f) {
      float a[kScanSteps][kWaveFew], h[kScanSteps][kWaveFew];
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s)
#pragma unroll
        for (int i = 0; i < kWaveFew; ++i) {
          a[s][i] = fast_exp2(delta[s] * rate[f * kWaveFew + i]);
          h[s][i] = u[s] * own.matrices.B[s][f * kWaveFew + i];
        }
      wait_for_letter(&shared.posted[before][f], buffer);  // rounds take turns as buffers do
      float start[kWaveFew];
      read_letter(shared.mail[before][f][lane], start);
      if (op.checkpoints) {
        T* const to = checkpoint + static_cast<int64_t>(f * kWaveFew) * e;
#pragma unroll
        for (int i = 0; i < kWaveFew; ++i) to[int64_t{i} * e] = from_float<T>(start[i]);
      }
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s)
#pragma unroll
        for (int i = 0; i < kWaveFew; ++i)
          h[s][i] = fmaf(a[s][i], s > 0 ? h[s - 1][i] : start[i], h[s][i]);
      const float* const last = h[kScanSteps - 1];
      shared.mail[warp][f][lane] = {last[0], last[1], last[2], last[3]};
      post_letter(&shared.posted[warp][f]);
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s)
#pragma unroll
        for (int i = 0; i < kWaveFew; ++i)
          y[s] = fmaf(h[s][i], own.matrices.C[s][f * kWaveFew + i], y[s]);
    }
#pragma unroll
    for (int s = 0; s < kScanSteps; ++s) {
      const float z = to_float(own.act[buffer][2][s][lane]);
      y[s] *= z * sigmoid_of(z);
    }
    const auto store = [&](int s) { y_at[static_cast<int64_t>(s) * y_hop] = from_float<T>(y[s]); };
    if (left >= kScanSteps) {
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s) store(s);
    } else {
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s)
        if (s < left) store(s);
    }
    y_at += static_cast<int64_t>(kWaveWarps * kScanSteps) * y_hop;
    checkpoint += static_cast<int64_t>(kWaveWarps * kStates) * e;
    __syncwarp();  // all lanes are done with the matrices
  }
  if (piece.to < 0 || warp != (tiles - 1) % kWaveWarps) return;
  float* const to = op.state_at(piece.to, channel);
#pragma unroll
  for (int f = 0; f < kWaveFours; ++f) {
    const float4 state = shared.mail[warp][f][lane];
    to[4 * f] = state.x, to[4 * f + 1] = state.y, to[4 * f + 2] = state.z, to[4 * f + 3] = state.w;
  }
}

}  // namespace coil::cuda
