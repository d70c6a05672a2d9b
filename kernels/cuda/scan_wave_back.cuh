// The walk of the selective scan's backward in one pass, for batches whose sequences fill the card
// together. A block of eight warps takes 32 channels (a lane each) of one piece, its warps tiles of
// kScanSteps steps in turn, from the last to the first, then the next 32 channels. What needs
// nothing of later steps, decays and states from the checkpoint, a warp computes ahead; the
// gradient carried to the step before goes from warp to warp, four states at a time, by mail in
// shared memory. Nothing else ties warps together: no barrier of the block, no second pass.
// Backward of B8 E1536 L2048, n 16, bf16 on an H200: 0.53 ms, in chunks 0.66.
//
// A warp without a tile in a piece's last round only hands the mail on, so that mail goes round the
// warps without end: nobody overwrites what its reader may still need, since the letter before came
// all the way round, and one bit tells a round from the next.
#pragma once

#include "kernels/cuda/letters.cuh"
#include "kernels/cuda/scan_walk_back.cuh"

namespace coil::cuda {

constexpr int kBackWarps = 8, kFours = kStates / kFew;

// Of each step the slope of softplus, that of the gate times dy, and the gate. f32 leaves no room
// for them: they take the places of dt, z and dy, which are used up by then.
template <class T>
struct SlopeAndGate {
  float slope[kScanSteps][32], gate[kScanSteps][32], silu[kScanSteps][32];
};
template <>
struct SlopeAndGate<float> {};

template <class T>
struct WaveBackWarp {           // a warp's shared memory
  T act[2][4][kScanSteps][32];  // x, dt, dy, z: of this tile and of the next
  T before[2][kStates][32];     // states before a tile's first step
  // Of each quad the steps, in them dB | dC, four values at a place whose last three bits are
  // flipped by step and quad: neither lanes that store at once nor those that read meet in a bank.
  float4 sums[8][kScanSteps][8];
  float4 rate[kFours][32], dA[kFours][32];
  float4 mail[kFours][32];  // carried to the step before this warp's tile
  Matrices matrices;
  SlopeAndGate<T> more;
};

template <class T>
struct WaveBack {
  WaveBackWarp<T> warp[kBackWarps];
  float4 begin[kFours][32];           // what comes in at the piece's end
  uint64_t mail[kBackWarps][kFours];  // barriers
};

// A block takes `groups` times 32 channels of one piece, one after the other; partial_BC has a
// plane for each block of channels, partial_A and partial_D a tile for each piece and warp.
// Requires what wave_groups (selective_scan_backward.cu) checks.
template <class T>
__global__ void __launch_bounds__(kBackWarps * 32, 1)
    wave_back_kernel(const ScanBack<T> op, int groups) {
  take_turn();
  extern __shared__ float4 memory[];
  using Four = std::conditional_t<std::is_same_v<T, float>, float4, uint2>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int after = (warp + kBackWarps - 1) % kBackWarps;  // takes the tile after
  WaveBack<T>& shared = *reinterpret_cast<WaveBack<T>*>(memory);
  WaveBackWarp<T>& own = shared.warp[warp];
  const Piece piece = op.pieces[blockIdx.x];
  const int direction = op.reverse ? -1 : 1, e = static_cast<int>(op.e);
  const int steps = static_cast<int>(piece.length);
  const int tiles = (steps + kScanSteps - 1) / kScanSteps;
  const int begin_channel = static_cast<int>(blockIdx.y) * groups * 32;
  const int end_channel = min(begin_channel + groups * 32, e);
  const int64_t first_row = op.row(piece, 0);
  constexpr int kHop = kBackWarps * kScanSteps;  // steps from a warp's tile to its next

  if (lane < kFours) empty_mail(&shared.mail[warp][lane]);
  __syncthreads();
  if (warp == kBackWarps - 1)  // the first letter, like the first of any piece, is not read
    for (int f = 0; f < kFours; ++f) post_letter(&shared.mail[warp][f]);

  // What this lane copies: words of a row of an activation, of a row of checkpoints, and four
  // states of B and C. Tiles are counted from the piece's begin.
  constexpr int kWord = 16 / sizeof(T), kWords = 32 / kWord, kRows = 32 / kWords;
  const int word_row = lane / kWords, word = lane % kWords * kWord;
  const int four_row = lane / kFours, four = lane % kFours * kFew;
  const int last_tile = tiles - 1 - warp;  // this warp's first
  const auto row_of = [&](int tile, int step) {
    return first_row + direction * (int64_t{kScanSteps} * tile + step);
  };
  const T *from[4], *from_B, *from_C;
  const T* from_before;
  int next = last_tile, next_channel = begin_channel;  // tile to fetch next
  Four B{}, C{};
  const auto aim = [&] {
    const int64_t row = row_of(last_tile, word_row), column = next_channel + word;
    from[0] = op.x + row * op.x_stride + column;
    from[1] = op.dt + row * op.dt_stride + column;
    from[2] = op.dy + row * op.dy_stride + column;
    from[3] = op.z + row * op.z_stride + column;
    from_B = op.B + row_of(last_tile, four_row) * op.B_stride + four;
    from_C = op.C + row_of(last_tile, four_row) * op.C_stride + four;
    const int64_t checkpoint = op.first_checkpoint[blockIdx.x] + last_tile;
    from_before = op.checkpoints + (checkpoint * kStates + word_row) * op.e + next_channel + word;
  };
  const int hop[4] = {
      direction * static_cast<int>(op.x_stride), direction * static_cast<int>(op.dt_stride),
      direction * static_cast<int>(op.dy_stride), direction * static_cast<int>(op.z_stride)};
  const auto fetch = [&](int buffer) {
    if (next_channel >= end_channel) return;
    if (next >= 0) {
#pragma unroll
      for (int r = 0; r < kScanSteps; r += kRows)
#pragma unroll
        for (int a = 0; a < 4; ++a)
          copy_later(&own.act[buffer][a][r + word_row][word],
                     from[a] + static_cast<int64_t>(r) * hop[a],
                     next * kScanSteps + r + word_row < steps);
#pragma unroll
      for (int i = 0; i < kStates; i += kRows)
        copy_later(&own.before[buffer][i + word_row][word],
                   from_before + static_cast<int64_t>(i) * e, true);
      if (next * kScanSteps + four_row < steps) {  // else times 0
        B = *reinterpret_cast<const Four*>(from_B);
        C = *reinterpret_cast<const Four*>(from_C);
      }
    }
    end_of_slot();
    next -= kBackWarps;
    if (next + warp < 0) {
      next = last_tile;
      next_channel += 32;
      aim();
    } else {
#pragma unroll
      for (int a = 0; a < 4; ++a) from[a] -= static_cast<int64_t>(kHop) * hop[a];
      from_B -= direction * int64_t{kHop} * op.B_stride;
      from_C -= direction * int64_t{kHop} * op.C_stride;
      from_before -= int64_t{kBackWarps} * kStates * e;
    }
  };
  const auto widened = [](const Four& from) -> float4 {
    if constexpr (std::is_same_v<T, float>)
      return from;
    else
      return {__uint_as_float(from.x << 16), __uint_as_float(from.x & 0xffff0000u),
              __uint_as_float(from.y << 16), __uint_as_float(from.y & 0xffff0000u)};
  };
  aim();
  fetch(0);

  const int quad = lane / 4, in_quad = lane % 4;
  const int sum_place = (quad * kScanSteps + in_quad) * 8 + (in_quad + quad % 2 * 4);
  int buffer = 0;
  uint32_t parity = 0;  // of the round
  for (int block_channel = begin_channel; block_channel < end_channel; block_channel += 32) {
    const int channel = block_channel + lane;
    {
      float rate[kStates];
      op.rates(channel, rate);
#pragma unroll
      for (int f = 0; f < kFours; ++f) {
        own.rate[f][lane] = {rate[4 * f], rate[4 * f + 1], rate[4 * f + 2], rate[4 * f + 3]};
        own.dA[f][lane] = {0, 0, 0, 0};
      }
    }
    if (warp == 0) {
      const bool there = op.dstate && piece.to >= 0;
      const float* const from = there ? op.dstate_at(piece.to, channel) : nullptr;
#pragma unroll
      for (int f = 0; f < kFours; ++f) {
        float4 begin = {0, 0, 0, 0};
        if (there) begin = {from[4 * f], from[4 * f + 1], from[4 * f + 2], from[4 * f + 3]};
        shared.begin[f][lane] = begin;
      }
    }
    const float bias = op.dt_bias[channel], D = op.D[channel];
    float dD = 0, dbias = 0;
    // Where this lane writes: words of rows of dx, ddt, dz and y, four of a row's sums.
    const int64_t out_row = row_of(last_tile, word_row);
    constexpr int kOut = 4;
    T* to[kOut] = {op.dx + out_row * op.dx_stride + block_channel + word,
                   op.ddt + out_row * op.ddt_stride + block_channel + word,
                   op.dz + out_row * op.dz_stride + block_channel + word,
                   op.y + out_row * op.y_stride + block_channel + word};
    const int to_hop[kOut] = {
        direction * static_cast<int>(op.dx_stride), direction * static_cast<int>(op.ddt_stride),
        direction * static_cast<int>(op.dz_stride), direction * static_cast<int>(op.y_stride)};
    float4* sum_at = reinterpret_cast<float4*>(op.partial_BC) +
                     (blockIdx.y * op.t + row_of(last_tile, lane / 8)) * 8 + lane % 8;
    const bool add = block_channel > begin_channel;  // to sums of the channels before

    for (int tile = last_tile; tile + warp >= 0; tile -= kBackWarps) {
      wait_for_all();
      *reinterpret_cast<float4*>(&own.matrices.B[four_row][four]) = widened(B);
      *reinterpret_cast<float4*>(&own.matrices.C[four_row][four]) = widened(C);
      __syncwarp();  // all have come for all lanes; what the tile before used is free
      fetch(buffer ^ 1);
      if (tile < 0) {
        for (int f = 0; f < kFours; ++f) {
          wait_for_letter(&shared.mail[after][f], parity);
          post_letter(&shared.mail[warp][f]);
        }
        buffer ^= 1;
        parity ^= 1;
        continue;
      }
      T(&in)[4][kScanSteps][32] = own.act[buffer];
      const auto kept = [&](int i) -> float(&)[kScanSteps][32] {
        if constexpr (std::is_same_v<T, float>)
          return in[i == 0 ? 1 : i == 1 ? 3 : 2];
        else
          return i == 0 ? own.more.slope : i == 1 ? own.more.gate : own.more.silu;
      };
      float(&kept_slope)[kScanSteps][32] = kept(0);
      float(&kept_gate)[kScanSteps][32] = kept(1);
      float(&kept_silu)[kScanSteps][32] = kept(2);
      const int left = steps - tile * kScanSteps;  // kScanSteps or more, except at the end
      // All loads before the first store, which the compiler may not move them over.
      float dt[kScanSteps], x[kScanSteps], z[kScanSteps], dy[kScanSteps];
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s) {
        x[s] = to_float(in[0][s][lane]);
        dt[s] = to_float(in[1][s][lane]) + bias;
        dy[s] = to_float(in[2][s][lane]);
        z[s] = to_float(in[3][s][lane]);
      }
      // Steps past the end have delta, slope, x and dy of 0: a decay of 1 and nothing to add.
      float delta[kScanSteps], u[kScanSteps];
      float y[kScanSteps], dx[kScanSteps], ddelta[kScanSteps];
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s) {
        y[s] = dx[s] = ddelta[s] = 0;
        float slope;
        delta[s] = softplus_of(dt[s], &slope);
        kept_slope[s][lane] = slope;
        u[s] = delta[s] * x[s];
        const float sigmoid = sigmoid_of(z[s]), silu = z[s] * sigmoid;
        kept_gate[s][lane] = dy[s] * fmaf(silu, 1 - sigmoid, sigmoid);
        kept_silu[s][lane] = silu;
        dy[s] *= silu;
      }
      if (left < kScanSteps) {
#pragma unroll
        for (int s = 0; s < kScanSteps; ++s)
          if (s >= left) delta[s] = kept_slope[s][lane] = 0;
      }
      const auto& letters = tile == tiles - 1 ? shared.begin : shared.warp[after].mail;
#pragma unroll 1
      for (int f = 0; f < kFours; ++f) {
        float h[32], a[32], before[kFew];  // (steps, states)
#pragma unroll
        for (int i = 0; i < kFew; ++i) before[i] = to_float(own.before[buffer][f * kFew + i][lane]);
        const auto four = [&](float4(&of)[kFours][32]) -> float(&)[kFew] {
          return *reinterpret_cast<float(*)[kFew]>(&of[f][lane]);
        };
        float rate[kFew], carried[kFew], dA[kFew];
#pragma unroll
        for (int i = 0; i < kFew; ++i) {
          rate[i] = four(own.rate)[i];
          dA[i] = four(own.dA)[i];
        }
#pragma unroll
        for (int s = 0; s < kScanSteps; ++s) {
#pragma unroll
          for (int i = 0; i < kFew; ++i) {
            const float decay = fast_exp2(delta[s] * rate[i]);
            const float state = s > 0 ? h[(s - 1) * kFew + i] : before[i];
            a[s * kFew + i] = decay;
            h[s * kFew + i] = fmaf(decay, state, u[s] * own.matrices.B[s][f * kFew + i]);
            y[s] = fmaf(h[s * kFew + i], own.matrices.C[s][f * kFew + i], y[s]);
          }
        }
        wait_for_letter(&shared.mail[after][f], parity);
        read_letter(letters[f][lane], carried);
        // From here on a and h give way to what is summed over channels, dB and dC.
#pragma unroll
        for (int s = kScanSteps - 1; s >= 0; --s) {
#pragma unroll
          for (int i = 0; i < kFew; ++i) {
            const int k = s * kFew + i;
            const float g = fmaf(dy[s], own.matrices.C[s][f * kFew + i], carried[i]);
            dx[s] = fmaf(g, own.matrices.B[s][f * kFew + i], dx[s]);
            carried[i] = a[k] * g;
            const float through = carried[i] * (s > 0 ? h[k - kFew] : before[i]);
            ddelta[s] = fmaf(through, rate[i], ddelta[s]);  // A log2(e): made good below
            dA[i] = fmaf(through, delta[s], dA[i]);
            a[k] = g * u[s];
            h[k] *= dy[s];
          }
        }
        own.mail[f][lane] = {carried[0], carried[1], carried[2], carried[3]};
        post_letter(&shared.mail[warp][f]);
#pragma unroll
        for (int i = 0; i < kFew; ++i) four(own.dA)[i] = dA[i];
        float4* const to = &own.sums[0][0][0];
        to[sum_place ^ f] = sum_quads<T>(a);
        to[(sum_place ^ f) + 4 * 8] = sum_quads<T>(a + 16);
        to[sum_place ^ f ^ 4] = sum_quads<T>(h);
        to[(sum_place ^ f ^ 4) + 4 * 8] = sum_quads<T>(h + 16);
      }
      if (tile == 0 && op.dinitial) {
#pragma unroll
        for (int i = 0; i < kStates; ++i)
          op.dinitial[op.in_tile(blockIdx.x, i, channel)] =
              reinterpret_cast<const float*>(&own.mail[i / kFew][lane])[i % kFew];
      }
      __syncwarp();  // sums are whole
      float slope[kScanSteps];
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s) {  // loads first, again
        x[s] = to_float(in[0][s][lane]);
        slope[s] = kept_slope[s][lane];
        z[s] = kept_gate[s][lane];
      }
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s) {
        // dx holds sum g B.
        ddelta[s] = fmaf(ddelta[s], 1 / kLog2OfE, x[s] * dx[s]) * slope[s];  // ddt
        dD = fmaf(dy[s], x[s], dD);
        dbias += ddelta[s];
        in[1][s][lane] = from_float<T>(ddelta[s]);
        y[s] = fmaf(D, x[s], y[s]);  // before the gate
        in[2][s][lane] = from_float<T>(kept_silu[s][lane] * y[s]);
        in[3][s][lane] = from_float<T>(z[s] * y[s]);
        in[0][s][lane] = from_float<T>(fmaf(D, dy[s], dx[s] * delta[s]));
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int s = half * 4 + lane / 8;
        float4 part[8];
#pragma unroll
        for (int q = 0; q < 8; ++q) part[q] = own.sums[q][s][lane % 8 ^ (s % 4 + q % 2 * 4)];
        float4* const at = sum_at + int64_t{direction} * half * 32;
        float4 sum = {0, 0, 0, 0};
        if (add && s < left) sum = *at;
#pragma unroll
        for (int q = 0; q < 8; ++q) {
          sum.x += part[q].x;
          sum.y += part[q].y;
          sum.z += part[q].z;
          sum.w += part[q].w;
        }
        if (s < left) *at = sum;
      }
      sum_at -= direction * int64_t{kHop} * 8;
      __syncwarp();  // what goes out is there
      constexpr int kFrom[kOut] = {0, 1, 3, 2};
#pragma unroll
      for (int a = 0; a < kOut; ++a) {
        if (a == 3 && !op.y) continue;
#pragma unroll
        for (int r = 0; r < kScanSteps; r += kRows)
          if (r + word_row < left)
            *reinterpret_cast<float4*>(to[a] + static_cast<int64_t>(r) * to_hop[a]) =
                *reinterpret_cast<const float4*>(&in[kFrom[a]][r + word_row][word]);
        to[a] -= static_cast<int64_t>(kHop) * to_hop[a];
      }
      buffer ^= 1;
      parity ^= 1;
    }
    const int64_t place = blockIdx.x * int64_t{kBackWarps} + warp;
#pragma unroll
    for (int f = 0; f < kFours; ++f) {
      const float4 dA = own.dA[f][lane];
      op.partial_A[op.in_tile(place, 4 * f, channel)] = dA.x;
      op.partial_A[op.in_tile(place, 4 * f + 1, channel)] = dA.y;
      op.partial_A[op.in_tile(place, 4 * f + 2, channel)] = dA.z;
      op.partial_A[op.in_tile(place, 4 * f + 3, channel)] = dA.w;
    }
    op.partial_D[place * 2 * op.e + channel] = dD;
    op.partial_D[(place * 2 + 1) * op.e + channel] = dbias;
  }
}

}  // namespace coil::cuda
