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
// at a time, and keeps them in registers. dB and dC are sums over channels: 32 values a lane (steps
// x states) are summed over a warp by halving, 31 exchanges instead of 160; warps leave partial
// sums of 32 channels, which a last kernel adds in order. So are those of dA, dD and dbias over
// tiles. No atomics: the same bits every time.
//
// Limit (measured on an H200 with a prototype of this design): instructions, about 400 a channel's
// step with 20 powers and divisions; 27 bytes of memory traffic are a quarter of that.
#include "kernels/cuda/scan.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kFew = 4;  // states whose steps are in registers at once
constexpr int kWarps = kThreads / 32;
static_assert(kScanSteps * kFew == 32);  // a value for each lane

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
  float* partial_BC;  // (warps of channels, t, 2 kStates): dB | dC
  float* partial_A;   // (tiles, kStates, e)
  float* partial_D;   // (tiles, 2, e): dD | ddt_bias
  float* between;     // (3, t, e): y before the gate, dx, ddelta of the groups so far; or null
  int64_t t;

  __device__ bool is_last_group() const { return (this->group + 1) * kStates >= this->n; }
  __device__ float* dstate_at(int32_t slot, int64_t channel) const {
    return dstate + slot * dslot_stride + channel * dstate_stride + this->group * kStates;
  }
};

// v[k] of all lanes, summed over the warp: lane k gets the sum of v[k]. A recursion, not a loop, so
// that every index is a constant and v stays in registers.
template <int kHalf = 16>
__device__ float sum_to_lanes(float (&v)[32]) {
  const bool upper = threadIdx.x & kHalf;
#pragma unroll
  for (int k = 0; k < kHalf; ++k) {
    const float send = upper ? v[k] : v[k + kHalf], keep = upper ? v[k + kHalf] : v[k];
    v[k] = keep + __shfl_xor_sync(0xffffffffu, send, kHalf);
  }
  if constexpr (kHalf > 1) return sum_to_lanes<kHalf / 2>(v);
  return v[0];
}

// What a chunk hands on to the one before it if nothing comes in from the one after.
template <class T>
__global__ void __launch_bounds__(kThreads) local_kernel(const ScanBack<T> op) {
  __shared__ float C[kStage][kStates];
  const int64_t tile = blockIdx.x;
  const ScanSpan span = span_of(op, tile);
  const int64_t channel = blockIdx.y * static_cast<int64_t>(kThreads) + threadIdx.x;
  const bool active = channel < op.e;
  float rate[kStates], carried[kStates], sum = 0;
  const float bias = active ? op.dt_bias[channel] : 0;
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    rate[i] = active ? op.rate(channel, i) : 0;
    carried[i] = 0;
  }
  const int64_t stages = (span.end - span.begin + kStage - 1) / kStage;
  for (int64_t q = stages; q-- > 0;) {
    const int64_t staged = span.begin + q * kStage;
    __syncthreads();
    stage(op, op.C, op.C_stride, span, staged, C);
    __syncthreads();
    if (!active) continue;
    for (int64_t begin = staged + kStage - kScanSteps; begin >= staged; begin -= kScanSteps) {
      if (begin >= span.end) continue;
      float delta[kScanSteps], dy[kScanSteps];
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s) {
        delta[s] = dy[s] = 0;
        if (begin + s >= span.end) continue;
        const int64_t row = op.row(span.piece, begin + s);
        delta[s] = softplus_of(to_float(op.dt[row * op.dt_stride + channel]) + bias);
        dy[s] = to_float(op.dy[row * op.dy_stride + channel]);
        if (!op.z) continue;
        const float z = to_float(op.z[row * op.z_stride + channel]);
        dy[s] *= z * sigmoid_of(z);
      }
#pragma unroll
      for (int s = kScanSteps - 1; s >= 0; --s) {
        const float* const c = C[begin - staged + s];
        sum += delta[s];
#pragma unroll
        for (int i = 0; i < kStates; ++i)
          carried[i] = power_of_two(delta[s] * rate[i]) * fmaf(dy[s], c[i], carried[i]);
      }
    }
  }
  if (!active) return;
#pragma unroll
  for (int i = 0; i < kStates; ++i) op.carry[op.in_tile(tile, i, channel)] = carried[i];
  op.sums[tile * op.e + channel] = sum;
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
  for (int64_t tile = end; tile-- > first;) {
    float* const at = op.carry + op.in_tile(tile, i, channel);
    const float local = *at;
    *at = carried;
    carried = fmaf(power_of_two(rate * op.sums[tile * op.e + channel]), carried, local);
  }
  if (op.dinitial) op.dinitial[op.in_tile(p, i, channel)] = carried;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(const ScanBack<T> op) {
  __shared__ float B[kStage][kStates], C[kStage][kStates];
  __shared__ float sums[kWarps][kScanSteps][2 * kStates];  // dB | dC of a warp's channels
  const int64_t tile = blockIdx.x;
  const ScanSpan span = span_of(op, tile);
  const int64_t channel = blockIdx.y * static_cast<int64_t>(kThreads) + threadIdx.x;
  const bool active = channel < op.e;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, states = op.states();
  const bool gate = op.z != nullptr;
  const int64_t direction = op.reverse ? -1 : 1;
  float rate[kStates], carried[kStates], dA[kStates], dD = 0, dbias = 0;
  const float bias = active ? op.dt_bias[channel] : 0, D = active ? op.D[channel] : 0;
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    rate[i] = active ? op.rate(channel, i) : 0;
    carried[i] = dA[i] = 0;
    if (!active || i >= states) continue;
    if (op.carry)
      carried[i] = op.carry[op.in_tile(tile, i, channel)];
    else if (op.dstate && span.piece.to >= 0)
      carried[i] = op.dstate_at(span.piece.to, channel)[i];
  }
  const int64_t stages = (span.end - span.begin + kStage - 1) / kStage;
  for (int64_t q = stages; q-- > 0;) {
    const int64_t staged = span.begin + q * kStage;
    __syncthreads();
    stage(op, op.B, op.B_stride, span, staged, B);
    stage(op, op.C, op.C_stride, span, staged, C);
    __syncthreads();
    for (int64_t begin = staged + kStage - kScanSteps; begin >= staged; begin -= kScanSteps) {
      if (begin >= span.end) continue;  // for all threads alike
      const int64_t row = op.row(span.piece, begin);
      const int left =
          active ? static_cast<int>(min(span.end - begin, static_cast<int64_t>(kScanSteps))) : 0;
      const T* const x_at = op.x + row * op.x_stride + channel;
      const T* const dt_at = op.dt + row * op.dt_stride + channel;
      const T* const dy_at = op.dy + row * op.dy_stride + channel;
      const T* const z_at = op.z + row * op.z_stride + channel;
      const int64_t checkpoint = op.first_checkpoint[span.p] + begin / kScanSteps;
      const float* kept =
          op.checkpoints + (checkpoint * op.n + op.group * kStates) * op.e + channel;
      float before[kFew], next[kFew];  // states before the first step: of these four, of the next
#pragma unroll
      for (int i = 0; i < kFew; ++i, kept += op.e) next[i] = active && i < states ? *kept : 0;
      // Steps past the end have delta, x and dy of 0: a decay of 1 and nothing to add.
      float delta[kScanSteps], x[kScanSteps], dy[kScanSteps];
      float y[kScanSteps], dx[kScanSteps], ddelta[kScanSteps];
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s) {
        delta[s] = x[s] = dy[s] = y[s] = dx[s] = ddelta[s] = 0;
        if (s >= left) continue;
        const int64_t step = direction * s;
        delta[s] = softplus_of(to_float(dt_at[step * op.dt_stride]) + bias);
        x[s] = to_float(x_at[step * op.x_stride]);
        dy[s] = to_float(dy_at[step * op.dy_stride]);
        if (!gate) continue;
        const float z = to_float(z_at[step * op.z_stride]);
        dy[s] *= z * sigmoid_of(z);
      }
      const float(*const b)[kStates] = B + (begin - staged);
      const float(*const c)[kStates] = C + (begin - staged);
#pragma unroll
      for (int few = 0; few < kStates; few += kFew) {
        float h[32], a[32];  // (steps, states)
#pragma unroll
        for (int i = 0; i < kFew; ++i, kept += op.e) {
          before[i] = next[i];
          const int later = few + kFew + i;
          next[i] = later < kStates && active && later < states ? *kept : 0;
        }
#pragma unroll
        for (int i = 0; i < kFew; ++i) {
          float state = before[i];
#pragma unroll
          for (int s = 0; s < kScanSteps; ++s) {
            const float decay = power_of_two(delta[s] * rate[few + i]);
            state = fmaf(decay, state, delta[s] * x[s] * b[s][few + i]);
            a[s * kFew + i] = decay;
            h[s * kFew + i] = state;
            y[s] = fmaf(state, c[s][few + i], y[s]);
          }
        }
        // From here on a and h give way to what is summed over channels, dB and dC.
#pragma unroll
        for (int s = kScanSteps - 1; s >= 0; --s) {
          const float u = delta[s] * x[s];
#pragma unroll
          for (int i = 0; i < kFew; ++i) {
            const int k = s * kFew + i;
            const float g = fmaf(dy[s], c[s][few + i], carried[few + i]);
            const float decayed = a[k] * (s > 0 ? h[k - kFew] : before[i]);  // a h'
            carried[few + i] = a[k] * g;
            dx[s] = fmaf(g, b[s][few + i], dx[s]);
            const float through = g * decayed;
            ddelta[s] = fmaf(through, rate[few + i], ddelta[s]);  // A log2(e): made good below
            dA[few + i] = fmaf(through, delta[s], dA[few + i]);
            a[k] = g * u;
            h[k] *= dy[s];
          }
        }
        const float sum_B = sum_to_lanes(a), sum_C = sum_to_lanes(h);
        sums[warp][lane / kFew][few + lane % kFew] = sum_B;
        sums[warp][lane / kFew][kStates + few + lane % kFew] = sum_C;
      }
      __syncwarp();
      const int64_t warps = (op.e + 31) / 32, own = channel / 32;
      if (own < warps) {
#pragma unroll
        for (int s = 0; s < kScanSteps; ++s)
          if (begin + s < span.end)
            op.partial_BC[(own * op.t + row + direction * s) * 2 * kStates + lane] =
                sums[warp][s][lane];
      }
      __syncwarp();
      if (!active) continue;
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s) {
        if (s >= left) continue;
        const int64_t step = direction * s, at = row + step;
        // dx holds sum g B.
        ddelta[s] = fmaf(ddelta[s], 1 / kLog2e, x[s] * dx[s]);
        dx[s] *= delta[s];
        if (op.between) {
          float* const between = op.between + at * op.e + channel;
          const int64_t part = op.t * op.e;
          if (op.group > 0) {
            y[s] += between[0];
            dx[s] += between[part];
            ddelta[s] += between[2 * part];
          }
          if (!op.is_last_group()) {
            between[0] = y[s];
            between[part] = dx[s];
            between[2 * part] = ddelta[s];
            continue;
          }
        }
        dD = fmaf(dy[s], x[s], dD);
        float slope;
        softplus_of(to_float(dt_at[step * op.dt_stride]) + bias, &slope);
        const float ddt = ddelta[s] * slope;
        dbias += ddt;
        if (gate) {
          const float z = to_float(z_at[step * op.z_stride]), sigmoid = sigmoid_of(z);
          const float dout = to_float(dy_at[step * op.dy_stride]);
          const float dz = dout * fmaf(D, x[s], y[s]) * sigmoid * fmaf(z, 1 - sigmoid, 1.f);
          op.dz[at * op.dz_stride + channel] = from_float<T>(dz);
        }
        op.dx[at * op.dx_stride + channel] = from_float<T>(fmaf(D, dy[s], dx[s]));
        op.ddt[at * op.ddt_stride + channel] = from_float<T>(ddt);
      }
    }
  }
  if (!active) return;
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    op.partial_A[op.in_tile(tile, i, channel)] = dA[i];
    if (op.dinitial && !op.carry) op.dinitial[op.in_tile(span.p, i, channel)] = carried[i];
  }
  if (!op.is_last_group()) return;
  op.partial_D[tile * 2 * op.e + channel] = dD;
  op.partial_D[(tile * 2 + 1) * op.e + channel] = dbias;
}

// dB and dC: sums over the warps of channels, in order. A thread per row and state.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_BC_kernel(const ScanBack<T> op, T* dB, int64_t dB_stride, T* dC, int64_t dC_stride) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int k = static_cast<int>(index % (2 * kStates)), i = k % kStates;
  const int64_t row = index / (2 * kStates);
  if (row >= op.t || i >= op.states()) return;
  const int64_t warps = (op.e + 31) / 32;
  float sum = 0;
  for (int64_t w = 0; w < warps; ++w) sum += op.partial_BC[(w * op.t + row) * 2 * kStates + k];
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
          total * (op.rate(channel, i) / kLog2e);
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

  const int64_t blocks = div_up(e, kThreads), warps = div_up(e, 32);
  const int64_t length = tile_length(*op.rows, blocks, processors_);
  const Rows::Tiles& tiles = op.rows->tiles(length);
  const bool chunked = tiles.count > pieces;
  const Tensor partial_BC(*this, DType::f32, {warps, t, 2 * kStates});
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
    const dim3 grid(static_cast<unsigned>(tiles.count), static_cast<unsigned>(blocks));
    for (; scan.group * kStates < n; ++scan.group) {
      const bool last = (scan.group + 1) * kStates >= n;
      if (chunked) {
        local_kernel<T><<<grid, kThreads, 0, stream_>>>(scan);
        carry_back_kernel<T><<<count(pieces * kStates * e), kThreads, 0, stream_>>>(scan);
      }
      backward_kernel<T><<<grid, kThreads, 0, stream_>>>(scan);
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
