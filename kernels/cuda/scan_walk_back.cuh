// The walk of the selective scan's backward, from a tile's last step to its first.
//
// States of kScanSteps steps are computed again from their checkpoint, four states at a time, and
// kept in registers. dB and dC are sums over channels: a tensor core adds each value over the four
// lanes of a quad (sum_quads), quads and warps meet in shared memory.
//
// Limit: instructions, 330 others, 23 powers and divisions (four slots each) and 8 TF32 products
// (five) a channel's step, 462 slots; 27 bytes of memory traffic are a quarter of that. On an H100
// 0.47 ms for 16,384 steps of 1,536 channels, 82 % of it: two blocks of 254 registers a thread do
// not hide every wait. The loop over states stays a loop, what it carries in shared memory:
// unrolled it spills, and its instructions leave their cache.
#pragma once

#include "kernels/cuda/scan.cuh"

namespace coil::cuda {

constexpr int kFew = 4;  // states whose steps are in registers at once
constexpr int kWarps = kThreads / 32;
constexpr int kWalkSlots = 2,
              kWalkBlocks = 2;  // of the ring; of a multiprocessor at once, by registers

// Sums of dB | dC over quads of lanes: a row for each quad of a block, in it the steps, in them
// 2 kStates values. The gaps keep what is stored and read at once in different banks.
constexpr int kStepGap = 2 * kStates + 4, kRowGap = kScanSteps * kStepGap + 16;
using QuadSums = float[kWarps * 8][kRowGap];

// What a block keeps in shared memory beside its ring.
template <class T>
struct Kept {
  QuadSums sums;
  // Of each thread, four states at a time: rates, what is carried to the step before, dA. Here, not
  // in registers, so that the loop over states need not be unrolled: instructions fit their cache.
  float4 rate[kStates / kFew][kThreads], carried[kStates / kFew][kThreads];
  float4 dA[kStates / kFew][kThreads];
  T before[kWalkSlots][kStates][kThreads];  // states before a slot's first step
  // Of each step the slope of softplus, that of the gate times dy, and the gate.
  float slope[kScanSteps][kThreads], gate[kScanSteps][kThreads], silu[kScanSteps][kThreads];
};

template <class T>
struct ScanBack : ScanOperands<T> {
  const T* dy;
  T *dx, *ddt, *dz, *y;  // y null: not asked for
  int64_t dy_stride, dx_stride, ddt_stride, dz_stride, y_stride;
  float* carry;  // (tiles, kStates, e): handed on locally, then carried in; or null
  float* sums;   // (tiles, e): of delta; with carry
  // Of the walk, whose tiles are whole numbers of the others, so that fewer blocks have to begin.
  const int32_t* walk_first;
  int64_t walk_length;
  float* dstate;  // (s,e,n) or null
  int64_t dslot_stride, dstate_stride;
  float* dinitial;    // (pieces, kStates, e) or null
  float* partial_BC;  // (blocks of channels, t, 2 kStates): dB | dC
  float* partial_A;   // (tiles of the walk, kStates, e)
  float* partial_D;   // (tiles of the walk, 2, e): dD | ddt_bias
  float* between;     // (3, t, e): y before the gate, dx, ddelta of the groups so far; or null
  int64_t t, planes;  // rows; blocks of channels in partial_BC

  __device__ bool is_last_group() const { return (this->group + 1) * kStates >= this->n; }
  __device__ float* dstate_at(int32_t slot, int64_t channel) const {
    return dstate + slot * dslot_stride + channel * dstate_stride + this->group * kStates;
  }
};

// v[16 m …] summed over the four lanes of each quad; lane 4 r + q gets those of 4 q … 4 q + 3, of
// quad r. A product with a matrix of zeros and ones: tile j of four values takes columns 2 j and
// 2 j + 1 of the result. TF32 keeps 11 bits of a value, as good as the bf16 that dB and dC become;
// for f32 a second product takes the rest.
template <class T>
__device__ float4 sum_quads(const float* v) {
  const int quad = threadIdx.x % 32 / 4;
  float sum[4] = {0, 0, 0, 0};
  const auto multiply = [&](float a, float b, float c, float d, int j) {
    const float one = quad == 2 * j ? 1.f : 0.f, other = quad == 2 * j + 1 ? 1.f : 0.f;
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(__float_as_uint(a)), "r"(__float_as_uint(c)), "r"(__float_as_uint(b)),
          "r"(__float_as_uint(d)), "r"(__float_as_uint(one)), "r"(__float_as_uint(other)));
  };
  const auto rest = [](float x) { return x - __uint_as_float(__float_as_uint(x) & 0xffffe000u); };
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float* const four = v + 4 * j;
    multiply(four[0], four[1], four[2], four[3], j);
    if constexpr (std::is_same_v<T, float>)
      multiply(rest(four[0]), rest(four[1]), rest(four[2]), rest(four[3]), j);
  }
  return {sum[0], sum[1], sum[2], sum[3]};
}

// A block takes kThreads channels over one tile of the walk. kRare: without gate, or of other than
// kStates states; of more the results come in parts.
template <class T, bool kWords, bool kRare>
__global__ void __launch_bounds__(kThreads, kWalkBlocks) backward_kernel(const ScanBack<T> op) {
  take_turn();
  using Arrays = Ring<T, 4, kThreads, kWalkSlots, kWords, true>;  // x, dt, dy, z
  extern __shared__ float4 memory[];
  __shared__ Matrices matrices[2];
  Kept<T>& keep = *reinterpret_cast<Kept<T>*>(memory);
  const int64_t tile = blockIdx.x;
  const ScanSpan span = span_of(op, op.walk_first, op.walk_length, tile);
  const int direction = op.reverse ? -1 : 1, steps = static_cast<int>(span.end - span.begin);
  const int64_t first_row = op.row(span.piece, span.begin);
  const int64_t block_channel = blockIdx.y * static_cast<int64_t>(kThreads);
  const int64_t channel = block_channel + threadIdx.x;
  const bool active = channel < op.e, gate = !kRare || op.z;
  const int quad = threadIdx.x / 4, in_quad = threadIdx.x % 4, states = op.states();

  Arrays ring(&keep + 1, steps, op.e - block_channel);
  ring.set(0, op.x + first_row * op.x_stride + block_channel, direction * op.x_stride);
  ring.set(1, op.dt + first_row * op.dt_stride + block_channel, direction * op.dt_stride);
  ring.set(2, op.dy + first_row * op.dy_stride + block_channel, direction * op.dy_stride);
  ring.set(3, op.z ? op.z + first_row * op.z_stride + block_channel : nullptr,
           direction * op.z_stride);
  const int last = (steps - 1) / kScanSteps * kScanSteps;  // first step of the last slot
  MatricesOnTheWay<T, true> on_the_way(op, first_row, steps);
  on_the_way.load();
  // The states before each slot's first step come the same way.
  constexpr int kWord = Arrays::kWord;  // channels of a thread, states at once
  const int state_row = threadIdx.x / (kThreads / kWord),
            state_column = threadIdx.x * kWord % kThreads;
  const T* kept = op.checkpoints + block_channel + state_column +
                  ((op.first_checkpoint[span.p] + (span.begin + last) / kScanSteps) * op.n +
                   op.group * kStates + state_row) *
                      op.e;
  const auto fetch = [&](int slot, bool more) {
#pragma unroll
    for (int i = 0; i < kStates; i += kWord) {
      const bool there = more && block_channel + state_column < op.e && i + state_row < states;
      const T* const at = kept + static_cast<int64_t>(i) * static_cast<int>(op.e);
      T* const to = &keep.before[slot][i + state_row][state_column];
      if constexpr (kWords)
        copy_later(to, at, there);
      else
        *to = there ? *at : from_float<T>(0);
    }
    kept -= op.n * op.e;
    ring.fetch(slot);
  };
  fetch(0, true);

  float dD = 0, dbias = 0;
  const float bias = active ? op.dt_bias[channel] : 0, D = active ? op.D[channel] : 0;
  {
    float rate[kStates] = {}, carried[kStates] = {};
    if (active) {
      op.rates(channel, rate);
      if (op.carry) {
        const int64_t last_tile = op.first[span.p] + (span.end - 1) / op.tile_length;
#pragma unroll
        for (int i = 0; i < kStates; ++i) carried[i] = op.carry[op.in_tile(last_tile, i, channel)];
      } else if (op.dstate && span.piece.to >= 0) {
        const float* const from = op.dstate_at(span.piece.to, channel);
#pragma unroll
        for (int i = 0; i < kStates; ++i)
          if (i < states) carried[i] = from[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kStates; i += kFew) {
      keep.rate[i / kFew][threadIdx.x] = {rate[i], rate[i + 1], rate[i + 2], rate[i + 3]};
      keep.carried[i / kFew][threadIdx.x] = {carried[i], carried[i + 1], carried[i + 2],
                                             carried[i + 3]};
      keep.dA[i / kFew][threadIdx.x] = {0, 0, 0, 0};
    }
  }
  on_the_way.keep(matrices[0]);
  on_the_way.load();

  // What goes out lies in the slot that it was computed from and is copied from there as it came,
  // kAtOnce rows of kOutWord channels; where rows are not whole words, each thread writes its
  // own.
  constexpr int kOutWord = 16 / sizeof(T), kAcross = kThreads / kOutWord;
  constexpr int kAtOnce = kThreads / kAcross;
  const int out_row = threadIdx.x / kAcross, out_column = threadIdx.x % kAcross * kOutWord;
  const bool out_there = block_channel + out_column < op.e;
  int slot = 0;
  for (int begin = last, k = 0; begin >= 0; begin -= kScanSteps, ++k) {
    wait_for_slot<kWalkSlots>();
    __syncthreads();  // as forward; and sums are free
    on_the_way.keep(matrices[(k + 1) % 2]);
    on_the_way.load();
    fetch(1 - slot, begin > 0);
    typename Arrays::Slot& in = ring.slots[slot];
    const Matrices& matrix = matrices[k % 2];
    const int left = steps - begin;  // kScanSteps or more, except at the end
    // All loads before the first store, which the compiler may not move them over.
    float dt[kScanSteps], x[kScanSteps], z[kScanSteps], dy[kScanSteps];
#pragma unroll
    for (int s = 0; s < kScanSteps; ++s) {
      x[s] = to_float(in[0][s][threadIdx.x]);
      dt[s] = to_float(in[1][s][threadIdx.x]) + bias;
      dy[s] = to_float(in[2][s][threadIdx.x]);
      z[s] = gate ? to_float(in[3][s][threadIdx.x]) : 0;
    }
    // Steps past the end have delta, slope, x and dy of 0: a decay of 1 and nothing to add.
    float delta[kScanSteps], u[kScanSteps];
    float y[kScanSteps], dx[kScanSteps], ddelta[kScanSteps];
#pragma unroll
    for (int s = 0; s < kScanSteps; ++s) {
      y[s] = dx[s] = ddelta[s] = 0;
      float slope;
      delta[s] = softplus_of(dt[s], &slope);
      keep.slope[s][threadIdx.x] = slope;
      u[s] = delta[s] * x[s];
      if (!gate) continue;
      const float sigmoid = sigmoid_of(z[s]), silu = z[s] * sigmoid;
      keep.gate[s][threadIdx.x] = dy[s] * fmaf(silu, 1 - sigmoid, sigmoid);
      keep.silu[s][threadIdx.x] = silu;
      dy[s] *= silu;
    }
    if (left < kScanSteps) {
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s)
        if (s >= left) delta[s] = keep.slope[s][threadIdx.x] = 0;
    }
#pragma unroll 1
    for (int few = 0; few < kStates; few += kFew) {
      float h[32], a[32], before[kFew];  // (steps, states)
#pragma unroll
      for (int i = 0; i < kFew; ++i) before[i] = to_float(keep.before[slot][few + i][threadIdx.x]);
      const auto four = [&](float4(&of)[kStates / kFew][kThreads]) -> float(&)[kFew] {
        return *reinterpret_cast<float(*)[kFew]>(&of[few / kFew][threadIdx.x]);
      };
      float rate[kFew], carried[kFew], dA[kFew];
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        rate[i] = four(keep.rate)[i];
        carried[i] = four(keep.carried)[i];
        dA[i] = four(keep.dA)[i];
      }
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s) {
#pragma unroll
        for (int i = 0; i < kFew; ++i) {
          const float decay = fast_exp2(delta[s] * rate[i]);
          const float state = s > 0 ? h[(s - 1) * kFew + i] : before[i];
          a[s * kFew + i] = decay;
          h[s * kFew + i] = fmaf(decay, state, u[s] * matrix.B[s][few + i]);
          if (gate) y[s] = fmaf(h[s * kFew + i], matrix.C[s][few + i], y[s]);
        }
      }
      // From here on a and h give way to what is summed over channels, dB and dC.
#pragma unroll
      for (int s = kScanSteps - 1; s >= 0; --s) {
#pragma unroll
        for (int i = 0; i < kFew; ++i) {
          const int k = s * kFew + i;
          const float g = fmaf(dy[s], matrix.C[s][few + i], carried[i]);
          dx[s] = fmaf(g, matrix.B[s][few + i], dx[s]);
          carried[i] = a[k] * g;
          const float through = carried[i] * (s > 0 ? h[k - kFew] : before[i]);
          ddelta[s] = fmaf(through, rate[i], ddelta[s]);  // A log2(e): made good below
          dA[i] = fmaf(through, delta[s], dA[i]);
          a[k] = g * u[s];
          h[k] *= dy[s];
        }
      }
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        four(keep.carried)[i] = carried[i];
        four(keep.dA)[i] = dA[i];
      }
      float* const to = keep.sums[quad] + in_quad * kStepGap + few;
      *reinterpret_cast<float4*>(to) = sum_quads<T>(a);
      *reinterpret_cast<float4*>(to + 4 * kStepGap) = sum_quads<T>(a + 16);
      *reinterpret_cast<float4*>(to + kStates) = sum_quads<T>(h);
      *reinterpret_cast<float4*>(to + 4 * kStepGap + kStates) = sum_quads<T>(h + 16);
    }
    const int64_t row = first_row + static_cast<int64_t>(direction) * begin;
    float slope[kScanSteps], silu[kScanSteps];
#pragma unroll
    for (int s = 0; s < kScanSteps; ++s) {  // loads first, again
      x[s] = to_float(in[0][s][threadIdx.x]);
      slope[s] = keep.slope[s][threadIdx.x];
      if (!gate) continue;
      z[s] = keep.gate[s][threadIdx.x];
      silu[s] = keep.silu[s][threadIdx.x];
    }
#pragma unroll
    for (int s = 0; s < kScanSteps; ++s) {
      // dx holds sum g B.
      ddelta[s] = fmaf(ddelta[s], 1 / kLog2OfE, x[s] * dx[s]);
      dx[s] *= delta[s];
      if (kRare && op.between) {
        float* const between = op.between + (row + direction * s) * op.e + channel;
        const int64_t part = op.t * op.e;
        const bool there = s < left && active;
        if (there && op.group > 0) {
          y[s] += between[0];
          dx[s] += between[part];
          ddelta[s] += between[2 * part];
        }
        if (there && !op.is_last_group()) {
          between[0] = y[s];
          between[part] = dx[s];
          between[2 * part] = ddelta[s];
        }
        if (!op.is_last_group()) continue;
      }
      dD = fmaf(dy[s], x[s], dD);
      ddelta[s] *= slope[s];  // ddt
      dbias += ddelta[s];
      y[s] = fmaf(D, x[s], y[s]);  // before the gate
      in[0][s][threadIdx.x] = from_float<T>(fmaf(D, dy[s], dx[s]));
      in[1][s][threadIdx.x] = from_float<T>(ddelta[s]);
      if (!gate) continue;
      in[2][s][threadIdx.x] = from_float<T>(silu[s] * y[s]);
      in[3][s][threadIdx.x] = from_float<T>(z[s] * y[s]);  // dz
    }
    __syncthreads();  // sums are whole; what goes out is there
    if (!kRare || op.is_last_group()) {
      const auto write = [&](T* to, int64_t stride, int array) {
        if constexpr (kWords) {
#pragma unroll
          for (int r = 0; r < kScanSteps; r += kAtOnce) {
            const int s = r + out_row;
            if (s < left && out_there)
              *reinterpret_cast<float4*>(to + (row + direction * s) * stride + block_channel +
                                         out_column) =
                  *reinterpret_cast<const float4*>(&in[array][s][out_column]);
          }
        } else {
          for (int s = 0; s < kScanSteps; ++s)
            if (s < left && active)
              to[(row + direction * s) * stride + channel] = in[array][s][threadIdx.x];
        }
      };
      write(op.dx, op.dx_stride, 0);
      write(op.ddt, op.ddt_stride, 1);
      if (op.y) write(op.y, op.y_stride, 2);
      if (gate) write(op.dz, op.dz_stride, 3);
    }
    const int s = threadIdx.x / kStates, two = threadIdx.x % kStates * 2;
    float2 sum = {0, 0};
#pragma unroll
    for (int r = 0; r < kWarps * 8; r += 8) {
      float2 part[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        part[i] = *reinterpret_cast<const float2*>(&keep.sums[r + i][s * kStepGap + two]);
#pragma unroll
      for (int half = 4; half > 0; half /= 2)
#pragma unroll
        for (int i = 0; i < half; ++i) {
          part[i].x += part[i + half].x;
          part[i].y += part[i + half].y;
        }
      sum.x += part[0].x;
      sum.y += part[0].y;
    }
    if (s < left)
      *reinterpret_cast<float2*>(
          &op.partial_BC[(blockIdx.y * op.t + row + direction * s) * 2 * kStates + two]) = sum;
    slot = 1 - slot;
  }
  if (!active) return;
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    const auto of = [&](float4(&all)[kStates / kFew][kThreads]) {
      return reinterpret_cast<float*>(&all[i / kFew][threadIdx.x])[i % kFew];
    };
    op.partial_A[op.in_tile(tile, i, channel)] = of(keep.dA);
    if (op.dinitial && !op.carry) op.dinitial[op.in_tile(span.p, i, channel)] = of(keep.carried);
  }
  if (!op.is_last_group()) return;
  op.partial_D[tile * 2 * op.e + channel] = dD;
  op.partial_D[(tile * 2 + 1) * op.e + channel] = dbias;
}

}  // namespace coil::cuda
