// Mamba's selective scan, backward. With g[i] the gradient of h[i] after a step, walked from a
// piece's end:
//   dypre = dy silu(z),   g[i] = carried[i] + dypre C[i],   carried[i] = a[i] g[i]   (to the step
//   before) dC[i] += dypre h[i],   dB[i] += g[i] delta x,   dx = D dypre + delta sum_i g[i] B[i],
//   ddelta = sum_i g[i] (A[i] a[i] h'[i] + x B[i]),   dA[i] += g[i] delta a[i] h'[i],
// h' the state before the step, a[i] = exp(delta A[i]);  dA_log = A dA,  ddt = ddelta sigmoid(dt +
// bias).
//
// As forward, one kernel where pieces are short or many; else chunks of time: the gradient that
// each chunk hands on if none comes in, the carry over the chunks of a piece from its end, the
// walk. The walk computes the states of kScanSteps steps again from their checkpoint, four states
// at a time, and keeps them in registers. dB and dC are sums over channels. A tensor core adds each
// value over the four lanes of a quad (sum_quads), quads and warps meet in shared memory, blocks
// leave partial sums of 128 channels, which a last kernel adds in order. So are those of dA, dD and
// dbias over tiles. No atomics: the same bits every time.
//
// Limit (measured on an H200 with a prototype of this design): instructions, about 400 a channel's
// step with 20 powers and divisions; 27 bytes of memory traffic are a quarter of that.
#include "kernels/cuda/scan.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kFew = 4;  // states whose steps are in registers at once
constexpr int kWarps = kThreads / 32;
constexpr int kLocalSlots = 3, kWalkSlots = 2;    // of the rings
constexpr int kLocalBlocks = 4, kWalkBlocks = 2;  // of a multiprocessor at once, by registers

// Sums of dB | dC over quads of lanes: a row for each quad of a block, in it the steps, in them
// 2 kStates values. The gaps keep what is stored and read at once in different banks.
constexpr int kStepGap = 2 * kStates + 4, kRowGap = kScanSteps * kStepGap + 16;
using QuadSums = float[kWarps * 8][kRowGap];

// What a block keeps in shared memory beside its ring.
struct Kept {
  QuadSums sums;
  // Of each thread, four states at a time: rates, what is carried to the step before, dA. Here, not
  // in registers, so that the loop over states need not be unrolled: instructions fit their cache.
  float4 rate[kStates / kFew][kThreads], carried[kStates / kFew][kThreads];
  float4 dA[kStates / kFew][kThreads];
  float before[kWalkSlots][kStates][kThreads];  // states before a slot's first step
  // Of each step the slope of softplus, and that of the gate times dy.
  float slope[kScanSteps][kThreads], gate[kScanSteps][kThreads];
};

template <class T>
struct ScanBack : ScanOperands<T> {
  const T* dy;
  T *dx, *ddt, *dz;
  int64_t dy_stride, dx_stride, ddt_stride, dz_stride;
  float* carry;   // (tiles, kStates, e): handed on locally, then carried in; or null
  float* sums;    // (tiles, e): of delta; with carry
  float* dstate;  // (s,e,n) or null
  int64_t dslot_stride, dstate_stride;
  float* dinitial;    // (pieces, kStates, e) or null
  float* partial_BC;  // (blocks of channels, t, 2 kStates): dB | dC
  float* partial_A;   // (tiles, kStates, e)
  float* partial_D;   // (tiles, 2, e): dD | ddt_bias
  float* between;     // (3, t, e): y before the gate, dx, ddelta of the groups so far; or null
  int64_t t;

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

// What a chunk hands on to the one before it if nothing comes in from the one after. Two channels a
// thread.
template <class T, bool kWords>
__global__ void __launch_bounds__(kThreads, kLocalBlocks) local_kernel(const ScanBack<T> op) {
  using Arrays = Ring<T, 3, 2 * kThreads, kLocalSlots, kWords, true>;  // dt, dy, z
  extern __shared__ float4 memory[];
  __shared__ Matrices matrices[2];
  const int64_t tile = blockIdx.x;
  const ScanSpan span = span_of(op, tile);
  const int direction = op.reverse ? -1 : 1, steps = static_cast<int>(span.end - span.begin);
  const int64_t row = op.row(span.piece, span.begin);
  const int64_t block_channel = blockIdx.y * static_cast<int64_t>(2 * kThreads);
  const int64_t channel = block_channel + 2 * threadIdx.x;
  Arrays ring(memory, steps, op.e - block_channel);
  ring.set(0, op.dt + row * op.dt_stride + block_channel, direction * op.dt_stride);
  ring.set(1, op.dy + row * op.dy_stride + block_channel, direction * op.dy_stride);
  ring.set(2, op.z ? op.z + row * op.z_stride + block_channel : nullptr, direction * op.z_stride);
  const int last = (steps - 1) / kScanSteps * kScanSteps;  // first step of the last slot
  MatricesOnTheWay<T, true> on_the_way(op, row, steps);
  on_the_way.load();
#pragma unroll
  for (int slot = 0; slot < kLocalSlots - 1; ++slot) ring.fetch(slot);

  float rate[2][kStates], carried[2][kStates], bias[2], sum[2];
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    bias[w] = sum[w] = 0;
#pragma unroll
    for (int i = 0; i < kStates; ++i) rate[w][i] = carried[w][i] = 0;
    if (channel + w >= op.e) continue;
    bias[w] = op.dt_bias[channel + w];
    op.rates(channel + w, rate[w]);
  }
  on_the_way.keep(matrices[0]);
  on_the_way.load();
  const auto step = [&](const typename Arrays::Slot& slot, const Matrices& matrix, int s) {
    const int own = 2 * threadIdx.x;
    const float2 dt = pair(&slot[0][s][own]), dy = pair(&slot[1][s][own]);
    float2 gate = {1, 1};
    if (op.z) {
      const float2 z = pair(&slot[2][s][own]);
      gate = {z.x * sigmoid_of(z.x), z.y * sigmoid_of(z.y)};
    }
    const float* const c = matrix.C[s];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const float delta = softplus_of((w ? dt.y : dt.x) + bias[w]);
      const float dypre = w ? dy.y * gate.y : dy.x * gate.x;
      sum[w] += delta;
#pragma unroll
      for (int i = 0; i < kStates; ++i)
        carried[w][i] = fast_exp2(delta * rate[w][i]) * fmaf(dypre, c[i], carried[w][i]);
    }
  };
  int slot = 0;
  for (int begin = last, k = 0; begin >= 0; begin -= kScanSteps, ++k) {
    wait_for_slot<kLocalSlots>();
    __syncthreads();  // as forward
    on_the_way.keep(matrices[(k + 1) % 2]);
    on_the_way.load();
    ring.fetch(slot == 0 ? kLocalSlots - 1 : slot - 1);
    if (steps - begin >= kScanSteps) {
#pragma unroll kUnrolled
      for (int s = kScanSteps - 1; s >= 0; --s) step(ring.slots[slot], matrices[k % 2], s);
    } else {
#pragma unroll 1
      for (int s = steps - begin - 1; s >= 0; --s) step(ring.slots[slot], matrices[k % 2], s);
    }
    slot = slot + 1 == kLocalSlots ? 0 : slot + 1;
  }
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    if (channel + w >= op.e) continue;
#pragma unroll
    for (int i = 0; i < kStates; ++i) op.carry[op.in_tile(tile, i, channel + w)] = carried[w][i];
    op.sums[tile * op.e + channel + w] = sum[w];
  }
}

// A thread per piece, state and channel, from the last chunk to the first.
template <class T>
__global__ void __launch_bounds__(kThreads) carry_back_kernel(const ScanBack<T> op) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t channel = index % op.e;
  const int i = static_cast<int>(index / op.e % kStates);
  const int64_t p = index / (op.e * kStates);
  if (p >= op.pieces_count || i >= op.states()) return;
  const Piece piece = op.pieces[p];
  const float rate = op.rate(channel, i);
  float carried = op.dstate && piece.to >= 0 ? op.dstate_at(piece.to, channel)[i] : 0;
  const int64_t first = op.first[p];
  const int64_t end = first + (piece.length + op.tile_length - 1) / op.tile_length;
  constexpr int kAhead = 8;
  for (int64_t tile = end; tile > first; tile -= kAhead) {
    float local[kAhead], sum[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t at = max(tile - 1 - k, first);
      local[k] = op.carry[op.in_tile(at, i, channel)];
      sum[k] = op.sums[at * op.e + channel];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (tile - 1 - k < first) break;
      op.carry[op.in_tile(tile - 1 - k, i, channel)] = carried;
      carried = fmaf(fast_exp2(rate * sum[k]), carried, local[k]);
    }
  }
  if (op.dinitial) op.dinitial[op.in_tile(p, i, channel)] = carried;
}

// A block takes kThreads channels over one tile. kRare: without gate, or of other than kStates
// states; of more the results come in parts.
template <class T, bool kWords, bool kRare>
__global__ void __launch_bounds__(kThreads, kWalkBlocks) backward_kernel(const ScanBack<T> op) {
  using Arrays = Ring<T, 4, kThreads, kWalkSlots, kWords, true>;  // x, dt, dy, z
  extern __shared__ float4 memory[];
  __shared__ Matrices matrices[2];
  Kept& keep = *reinterpret_cast<Kept*>(memory);
  const int64_t tile = blockIdx.x;
  const ScanSpan span = span_of(op, tile);
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
  constexpr int kWord = kWords ? 4 : 1;  // channels of a thread, states at once
  const int state_row = threadIdx.x / (kThreads / kWord),
            state_column = threadIdx.x * kWord % kThreads;
  const float* kept = op.checkpoints + block_channel + state_column +
                      ((op.first_checkpoint[span.p] + (span.begin + last) / kScanSteps) * op.n +
                       op.group * kStates + state_row) *
                          op.e;
  const auto fetch = [&](int slot, bool more) {
#pragma unroll
    for (int i = 0; i < kStates; i += kWord) {
      const bool there = more && block_channel + state_column < op.e && i + state_row < states;
      const float* const at = kept + static_cast<int64_t>(i) * static_cast<int>(op.e);
      float* const to = &keep.before[slot][i + state_row][state_column];
      if constexpr (kWords)
        copy_later(to, at, there);
      else
        *to = there ? *at : 0;
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
#pragma unroll
        for (int i = 0; i < kStates; ++i) carried[i] = op.carry[op.in_tile(tile, i, channel)];
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

  // Where a slot's first step is written, and how far the next one is.
  T* dx_at = op.dx + first_row * op.dx_stride + channel;
  T* ddt_at = op.ddt + first_row * op.ddt_stride + channel;
  T* dz_at = op.dz + first_row * op.dz_stride + channel;
  const int dx_hop = direction * static_cast<int>(op.dx_stride);
  const int ddt_hop = direction * static_cast<int>(op.ddt_stride);
  const int dz_hop = direction * static_cast<int>(op.dz_stride);
  dx_at += static_cast<int64_t>(last) * dx_hop;
  ddt_at += static_cast<int64_t>(last) * ddt_hop;
  dz_at += static_cast<int64_t>(last) * dz_hop;
  int slot = 0;
  for (int begin = last, k = 0; begin >= 0; begin -= kScanSteps, ++k) {
    wait_for_slot<kWalkSlots>();
    __syncthreads();  // as forward; and sums are free
    on_the_way.keep(matrices[(k + 1) % 2]);
    on_the_way.load();
    fetch(1 - slot, begin > 0);
    const typename Arrays::Slot& in = ring.slots[slot];
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
      for (int i = 0; i < kFew; ++i) before[i] = keep.before[slot][few + i][threadIdx.x];
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
    float slope[kScanSteps];
#pragma unroll
    for (int s = 0; s < kScanSteps; ++s) {  // loads first, again
      x[s] = to_float(in[0][s][threadIdx.x]);
      slope[s] = keep.slope[s][threadIdx.x];
      if (gate) z[s] = keep.gate[s][threadIdx.x];
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
      y[s] = z[s] * fmaf(D, x[s], y[s]);  // dz
      dx[s] = fmaf(D, dy[s], dx[s]);
    }
    const auto store = [&](int s) {
      if (gate) dz_at[static_cast<int64_t>(s) * dz_hop] = from_float<T>(y[s]);
      dx_at[static_cast<int64_t>(s) * dx_hop] = from_float<T>(dx[s]);
      ddt_at[static_cast<int64_t>(s) * ddt_hop] = from_float<T>(ddelta[s]);
    };
    if (active && (!kRare || op.is_last_group())) {
      if (left >= kScanSteps) {
#pragma unroll
        for (int s = 0; s < kScanSteps; ++s) store(s);
      } else {
#pragma unroll
        for (int s = 0; s < kScanSteps; ++s)
          if (s < left) store(s);
      }
    }
    dx_at -= kScanSteps * dx_hop;
    ddt_at -= kScanSteps * ddt_hop;
    dz_at -= kScanSteps * dz_hop;
    __syncthreads();  // sums are whole
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

// dB and dC: sums over the blocks of channels, in order. A thread per row and state.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_BC_kernel(const ScanBack<T> op, T* dB, int64_t dB_stride, T* dC, int64_t dC_stride) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int k = static_cast<int>(index % (2 * kStates)), i = k % kStates;
  const int64_t row = index / (2 * kStates);
  if (row >= op.t || i >= op.states()) return;
  const int64_t blocks = (op.e + kThreads - 1) / kThreads;
  float sum = 0;
#pragma unroll 8
  for (int64_t b = 0; b < blocks; ++b) sum += op.partial_BC[(b * op.t + row) * 2 * kStates + k];
  T* const to = k < kStates ? dB + row * dB_stride : dC + row * dC_stride;
  to[op.group * kStates + i] = from_float<T>(sum);
}

// Sums over tiles, in order: each of kSlices threads takes a run of tiles, then their sums are
// added in order. dA_log, and with the last group dD and ddt_bias.
constexpr int kSlices = 8;
template <class T>
__global__ void __launch_bounds__(kSlices * 32)
    sum_tiles_kernel(const ScanBack<T> op, int64_t tiles, float* dA_log, int64_t dA_stride,
                     float* dD, float* dbias) {
  __shared__ float slices[kSlices][32];
  const int64_t channel = blockIdx.x * 32 + threadIdx.x;
  const int i = blockIdx.y;  // a state, or kStates + 0: dD, + 1: dbias
  const bool of_state = i < kStates;
  float sum = 0;
  if (channel < op.e) {
    const int64_t begin = tiles * threadIdx.y / kSlices, end = tiles * (threadIdx.y + 1) / kSlices;
    for (int64_t tile = begin; tile < end; ++tile)
      sum += of_state ? op.partial_A[op.in_tile(tile, i, channel)]
                      : op.partial_D[(tile * 2 + i - kStates) * op.e + channel];
  }
  slices[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || channel >= op.e) return;
  float total = 0;
  for (int s = 0; s < kSlices; ++s) total += slices[s][threadIdx.x];
  if (of_state) {
    if (i < op.states())
      dA_log[channel * dA_stride + op.group * kStates + i] +=
          total * (op.rate(channel, i) / kLog2OfE);
  } else {
    (i == kStates ? dD : dbias)[channel] += total;
  }
}

// The gradient of each slot that is read: the sum over the pieces that read it, in order.
template <class T>
__global__ void __launch_bounds__(kThreads) initial_kernel(const ScanBack<T> op, int64_t slots) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t channel = index % op.e;
  const int i = static_cast<int>(index / op.e % kStates);
  const int64_t slot = index / (op.e * kStates);
  if (slot >= slots || i >= op.states()) return;
  float sum = 0;
  bool read = false;
  for (int p = 0; p < op.pieces_count; ++p) {
    if (op.pieces[p].from != slot) continue;
    sum += op.dinitial[op.in_tile(p, i, channel)];
    read = true;
  }
  if (read) op.dstate_at(static_cast<int32_t>(slot), channel)[i] = sum;
}

template <class T, bool kWords>
void launch_local(const ScanBack<T>& scan, int64_t tiles, cudaStream_t stream) {
  constexpr int kBytes = Ring<T, 3, 2 * kThreads, kLocalSlots, kWords, true>::kBytes;
  allow_shared(local_kernel<T, kWords>, kBytes);
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(div_up(scan.e, 2 * kThreads)));
  local_kernel<T, kWords><<<grid, kThreads, kBytes, stream>>>(scan);
  check_launch("selective_scan backward");
}
template <class T, bool kWords, bool kRare>
void launch_walk(const ScanBack<T>& scan, int64_t tiles, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Kept) + Ring<T, 4, kThreads, kWalkSlots, kWords, true>::kBytes;
  allow_shared(backward_kernel<T, kWords, kRare>, kBytes);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(div_up(scan.e, kThreads)));
  backward_kernel<T, kWords, kRare><<<grid, kThreads, kBytes, stream>>>(scan);
  check_launch("selective_scan backward");
}

}  // namespace

void CudaBackend::run(const SelectiveScanBackward& op) {
  const char* const name = "selective_scan backward";
  check_scan(name, *this, op);
  const int64_t t = op.rows->total(), e = op.x.cols(), n = op.A_log.cols();
  const auto pieces = static_cast<int64_t>(op.rows->pieces().size());
  const DType act = op.x.dtype;
  const auto here = [&](const char* operand, const View& view, DType dtype,
                        std::initializer_list<int64_t> shape) {
    expect(name, operand, view, dtype, shape);
    expect_here(name, operand, view, device());
  };
  here("dy", op.dy, act, {t, e});
  check(bool(op.checkpoints), "{}: checkpoints are missing", name);
  here("dx", op.dx, act, {t, e});
  here("ddt", op.ddt, act, {t, e});
  here("dB", op.dB, act, {t, n});
  here("dC", op.dC, act, {t, n});
  if (op.z) here("dz", op.dz, act, {t, e});
  here("dA_log", op.dA_log, DType::f32, {e, n});
  here("dD", op.dD, DType::f32, {e});
  here("ddt_bias", op.ddt_bias, DType::f32, {e});
  if (op.dstate) check_scan_state(name, "dstate", *this, op.dstate, *op.rows, e, n);
  if (t == 0 || e == 0 || n == 0) return;

  const int64_t blocks = div_up(e, kThreads);
  // Three waves of the walk, one of the local kernel, whose blocks are twice as wide.
  const int64_t length = tile_length(*op.rows, blocks, 2 * kLocalBlocks * int64_t{processors_});
  const Rows::Tiles& tiles = op.rows->tiles(length);
  const bool chunked = tiles.count > pieces;
  const bool words = in_words(op.x) && in_words(op.dt) && in_words(op.dy) && in_words(op.z);
  const Tensor partial_BC(*this, DType::f32, {blocks, t, 2 * kStates});
  const Tensor partial_A(*this, DType::f32, {tiles.count, kStates, e});
  const Tensor partial_D(*this, DType::f32, {tiles.count, 2, e});
  Tensor carry, sums, dinitial, between;
  if (chunked) {
    carry = Tensor(*this, DType::f32, {tiles.count, kStates, e});
    sums = Tensor(*this, DType::f32, {tiles.count, e});
  }
  if (op.dstate) dinitial = Tensor(*this, DType::f32, {pieces, kStates, e});
  if (n > kStates) between = Tensor(*this, DType::f32, {3, t, e});
  cuda::with_type(name, op.x, [&](auto type) {
    using T = decltype(type);
    ScanBack<T> scan{};
    fill_operands(op, scan);
    scan.first = tiles.first.as<int32_t>();
    scan.tile_length = length;
    scan.dy = op.dy.as<T>();
    scan.dx = op.dx.as<T>();
    scan.ddt = op.ddt.as<T>();
    scan.dz = op.dz.as<T>();
    scan.dy_stride = op.dy.stride[0];
    scan.dx_stride = op.dx.stride[0];
    scan.ddt_stride = op.ddt.stride[0];
    scan.dz_stride = op.dz.stride[0];
    scan.carry = carry.as<float>();
    scan.sums = sums.as<float>();
    scan.dstate = op.dstate.as<float>();
    scan.dslot_stride = op.dstate.stride[0];
    scan.dstate_stride = op.dstate.stride[1];
    scan.dinitial = dinitial.as<float>();
    scan.partial_BC = partial_BC.as<float>();
    scan.partial_A = partial_A.as<float>();
    scan.partial_D = partial_D.as<float>();
    scan.between = between.as<float>();
    scan.t = t;
    const auto count = [](int64_t threads) {
      return static_cast<unsigned>(div_up(threads, kThreads));
    };
    for (; scan.group * kStates < n; ++scan.group) {
      const bool last = (scan.group + 1) * kStates >= n;
      if (chunked) {
        words ? launch_local<T, true>(scan, tiles.count, stream_)
              : launch_local<T, false>(scan, tiles.count, stream_);
        carry_back_kernel<T><<<count(pieces * kStates * e), kThreads, 0, stream_>>>(scan);
      }
      const bool rare = !scan.z || n != kStates;
      words && !rare ? launch_walk<T, true, false>(scan, tiles.count, stream_)
      : words        ? launch_walk<T, true, true>(scan, tiles.count, stream_)
                     : launch_walk<T, false, true>(scan, tiles.count, stream_);
      sum_BC_kernel<T><<<count(t * 2 * kStates), kThreads, 0, stream_>>>(
          scan, op.dB.as<T>(), op.dB.stride[0], op.dC.as<T>(), op.dC.stride[0]);
      const dim3 of_tiles(static_cast<unsigned>(div_up(e, 32)), last ? kStates + 2 : kStates);
      sum_tiles_kernel<T><<<of_tiles, dim3(32, kSlices), 0, stream_>>>(
          scan, tiles.count, op.dA_log.as<float>(), op.dA_log.stride[0], op.dD.as<float>(),
          op.ddt_bias.as<float>());
      const int64_t slots = op.rows->slots();
      if (op.dstate && slots > 0)
        initial_kernel<T><<<count(slots * kStates * e), kThreads, 0, stream_>>>(scan, slots);
    }
  });
  check_launch(name);
}

}  // namespace coil
