// Mamba's selective scan (Gu and Dao 2023, section 3), forward. Per channel c and state i,
//   delta = softplus(dt + dt_bias),   h[i] = exp(delta A[c,i]) h[i] + delta x B[i],
//   y = sum_i C[i] h[i] + D x,   then y *= silu(z) where z is given.
//
// Where pieces are short or many, one kernel walks each piece. Where one long sequence would leave
// the card idle, time is cut into chunks and three kernels follow each other: the state that each
// chunk ends in if it begins at zero, with its sum of delta; the carry over the chunks of a piece,
//   h_in(k+1) = exp(A sum delta(k)) h_in(k) + h_local(k);
// and the walk from the states carried in. The first and the last do the same arithmetic, so a cut
// changes rounding only.
//
// Limit (measured on an H200 with prototypes of this design): issue slots, not memory. A power of
// two takes 4 of them, so a channel's step costs max(8 M, I + 4 M), M = 19 powers and divisions and
// I about 100 other instructions; 8 bytes of memory traffic are a quarter of that.
#include "kernels/cuda/scan.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

template <class T>
struct Scan : ScanOperands<T> {
  T* y;
  int64_t y_stride;
  float* state;  // (s,e,n) or null
  int64_t slot_stride, state_stride;
  float* carry;   // (tiles, kStates, e): local end states, then states carried in; or null
  float* sums;    // (tiles, e): of delta; with carry
  float* sum_dt;  // (pieces, e) or null
  int64_t sum_dt_stride;
  float* partial_y;  // (t, e): y of the groups of states so far; null with one group

  __device__ bool is_last_group() const { return (this->group + 1) * kStates >= this->n; }
  __device__ float* state_at(int32_t slot, int64_t channel) const {
    return state + slot * slot_stride + channel * state_stride + this->group * kStates;
  }
};

// kLocal: from zero, no output but the end state and the sum of delta. kMany: of more states than a
// thread holds, whose y comes in parts.
template <class T, int kWidth, bool kLocal, bool kMany>
__global__ void __launch_bounds__(kThreads, 3) scan_kernel(const Scan<T> op) {
  __shared__ float B[kStage][kStates], C[kStage][kStates];
  const int64_t tile = blockIdx.x;
  const ScanSpan span = span_of(op, tile);
  const int64_t channel = (blockIdx.y * static_cast<int64_t>(kThreads) + threadIdx.x) * kWidth;
  const bool active = channel < op.e, gate = !kLocal && op.z;
  const int states = op.states();

  float rate[kWidth][kStates], h[kWidth][kStates], bias[kWidth], D[kWidth], sum[kWidth];
#pragma unroll
  for (int w = 0; w < kWidth; ++w) {
    bias[w] = active ? op.dt_bias[channel + w] : 0;
    D[w] = active && !kLocal ? op.D[channel + w] : 0;
    sum[w] = 0;
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      rate[w][i] = active ? op.rate(channel + w, i) : 0;
      h[w][i] = 0;
      if (kLocal || !active) continue;
      if (op.carry)
        h[w][i] = op.carry[op.in_tile(tile, i, channel + w)];
      else if (span.piece.from >= 0 && i < states)
        h[w][i] = op.state_at(span.piece.from, channel + w)[i];
    }
  }

  // Where the next step stands, and how far the one after it: addresses are only ever added to.
  const int64_t first_row = op.row(span.piece, span.begin), direction = op.reverse ? -1 : 1;
  const T* x_at = op.x + first_row * op.x_stride + channel;
  const T* dt_at = op.dt + first_row * op.dt_stride + channel;
  const T* z_at = op.z + first_row * op.z_stride + channel;
  T* y_at = op.y + first_row * op.y_stride + channel;
  float* partial_at = kMany ? op.partial_y + first_row * op.e + channel : nullptr;
  const int64_t x_step = direction * op.x_stride, dt_step = direction * op.dt_stride;
  const int64_t z_step = direction * op.z_stride, y_step = direction * op.y_stride;
  for (int64_t staged = span.begin; staged < span.end; staged += kStage) {
    __syncthreads();
    stage(op, op.B, op.B_stride, span, staged, B);
    if (!kLocal) stage(op, op.C, op.C_stride, span, staged, C);
    __syncthreads();
    if (!active) continue;
    for (int q = 0; q < kStage; q += kScanSteps) {
      const int left =
          static_cast<int>(min(span.end - staged - q, static_cast<int64_t>(kScanSteps)));
      if (left <= 0) break;
      if (!kLocal && op.checkpoints) {
        const int64_t index = op.first_checkpoint[span.p] + (staged + q) / kScanSteps;
        float* to = op.checkpoints + (index * op.n + op.group * kStates) * op.e + channel;
#pragma unroll
        for (int i = 0; i < kStates; ++i, to += op.e)
#pragma unroll
          for (int w = 0; w < kWidth; ++w)
            if (i < states) to[w] = h[w][i];
      }
      // Past the end the last step is read again, and its delta set to 0: nothing changes.
      float x[kScanSteps][kWidth], dt[kScanSteps][kWidth], z[kScanSteps][kWidth];
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s) {
        load_channels(x_at, x[s]);
        load_channels(dt_at, dt[s]);
        if (gate) load_channels(z_at, z[s]);
        if (s + 1 < left || s + 1 == kScanSteps) {
          x_at += x_step;
          dt_at += dt_step;
          if (gate) z_at += z_step;
        }
      }
#pragma unroll
      for (int s = 0; s < kScanSteps; ++s) {
        const float* const b = B[q + s];
        const float* const c = C[q + s];
        float y[kWidth];
#pragma unroll
        for (int w = 0; w < kWidth; ++w) {
          const float delta = s < left ? softplus_of(dt[s][w] + bias[w]) : 0, u = delta * x[s][w];
          sum[w] += delta;
          float even = 0, odd = 0;
#pragma unroll
          for (int i = 0; i < kStates; ++i) {
            h[w][i] = fmaf(power_of_two(delta * rate[w][i]), h[w][i], u * b[i]);
            if (!kLocal) (i % 2 ? odd : even) = fmaf(h[w][i], c[i], i % 2 ? odd : even);
          }
          y[w] = even + odd;
        }
        if (kLocal || s >= left) continue;
        if (kMany) {
#pragma unroll
          for (int w = 0; w < kWidth; ++w) {
            if (op.group > 0) y[w] += partial_at[w];
            if (!op.is_last_group()) partial_at[w] = y[w];
          }
          partial_at += direction * op.e;
        }
#pragma unroll
        for (int w = 0; w < kWidth; ++w) {
          y[w] = fmaf(D[w], x[s][w], y[w]);
          if (gate) y[w] *= z[s][w] * sigmoid_of(z[s][w]);
        }
        if (!kMany || op.is_last_group()) store_channels(y, y_at);
        y_at += y_step;
      }
    }
  }
  if (!active) return;
#pragma unroll
  for (int w = 0; w < kWidth; ++w) {
    if (kLocal) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) op.carry[op.in_tile(tile, i, channel + w)] = h[w][i];
      op.sums[tile * op.e + channel + w] = sum[w];
    } else if (!op.carry) {
      if (span.piece.to >= 0) {
        float* const to = op.state_at(span.piece.to, channel + w);
#pragma unroll
        for (int i = 0; i < kStates; ++i)
          if (i < states) to[i] = h[w][i];
      }
      if (op.sum_dt && op.group == 0) op.sum_dt[span.p * op.sum_dt_stride + channel + w] = sum[w];
    }
  }
}

// A thread per piece, state and channel. Reads and writes the slots' states: nothing else does.
template <class T>
__global__ void __launch_bounds__(kThreads) carry_kernel(const Scan<T> op) {
  constexpr int kAhead = 8;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t channel = index % op.e;
  const int i = static_cast<int>(index / op.e % kStates);
  const int64_t p = index / (op.e * kStates);
  if (p >= op.pieces_count || i >= op.states()) return;
  const Piece piece = op.pieces[p];
  const float rate = op.rate(channel, i);
  float h = piece.from >= 0 ? op.state_at(piece.from, channel)[i] : 0, total = 0;
  const int64_t end = op.first[p] + (piece.length + op.tile_length - 1) / op.tile_length;
  for (int64_t tile = op.first[p]; tile < end; tile += kAhead) {
    float local[kAhead], sum[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (tile + k >= end) break;
      local[k] = op.carry[op.in_tile(tile + k, i, channel)];
      sum[k] = op.sums[(tile + k) * op.e + channel];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (tile + k >= end) break;
      op.carry[op.in_tile(tile + k, i, channel)] = h;
      h = fmaf(power_of_two(rate * sum[k]), h, local[k]);
      total += sum[k];
    }
  }
  if (piece.to >= 0) op.state_at(piece.to, channel)[i] = h;
  if (op.sum_dt && i == 0 && op.group == 0) op.sum_dt[p * op.sum_dt_stride + channel] = total;
}

template <class T, int kWidth>
void run_groups(Scan<T> scan, int64_t tiles, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(div_up(scan.e, kThreads * kWidth)));
  for (; scan.group * kStates < scan.n; ++scan.group) {
    if (scan.carry) {
      scan_kernel<T, kWidth, true, false><<<grid, kThreads, 0, stream>>>(scan);
      const int64_t threads = scan.pieces_count * scan.e * kStates;
      carry_kernel<T>
          <<<static_cast<unsigned>(div_up(threads, kThreads)), kThreads, 0, stream>>>(scan);
    }
    if (scan.partial_y)
      scan_kernel<T, kWidth, false, true><<<grid, kThreads, 0, stream>>>(scan);
    else
      scan_kernel<T, kWidth, false, false><<<grid, kThreads, 0, stream>>>(scan);
  }
  check_launch("selective_scan");
}

}  // namespace

void CudaBackend::run(const SelectiveScan& op) {
  check_scan("selective_scan", *this, op);
  const int64_t t = op.rows->total(), e = op.x.cols(), n = op.A_log.cols();
  const auto pieces = static_cast<int64_t>(op.rows->pieces().size());
  expect("selective_scan", "y", op.y, op.x.dtype, {t, e});
  expect_here("selective_scan", "y", op.y, device());
  check(op.y.data != op.x.data, "selective_scan: y is x, expected another tensor");
  expect_if("selective_scan", "sum_dt", op.sum_dt, DType::f32, {pieces, e});
  if (op.state || op.rows->slots() > 0)
    check_scan_state("selective_scan", "state", *this, op.state, *op.rows, e, n);
  if (t == 0 || e == 0 || n == 0) return;

  const bool pairs =
      e % 2 == 0 && in_pairs(op.x) && in_pairs(op.dt) && in_pairs(op.z) && in_pairs(op.y);
  const int64_t width = pairs ? 2 : 1;
  const int64_t length = tile_length(*op.rows, div_up(e, kThreads * width), processors_);
  const Rows::Tiles& tiles = op.rows->tiles(length);
  Tensor carry, sums, partial;
  if (tiles.count > pieces) {
    carry = Tensor(*this, DType::f32, {tiles.count, kStates, e});
    sums = Tensor(*this, DType::f32, {tiles.count, e});
  }
  if (n > kStates) partial = Tensor(*this, DType::f32, {t, e});
  cuda::with_type("selective_scan", op.x, [&](auto type) {
    using T = decltype(type);
    Scan<T> scan{};
    fill_operands(op, scan);
    scan.first = tiles.first.as<int32_t>();
    scan.tile_length = length;
    scan.y = op.y.as<T>();
    scan.y_stride = op.y.stride[0];
    scan.state = op.state.as<float>();
    scan.slot_stride = op.state.stride[0];
    scan.state_stride = op.state.stride[1];
    scan.carry = carry.as<float>();
    scan.sums = sums.as<float>();
    scan.sum_dt = op.sum_dt.as<float>();
    scan.sum_dt_stride = op.sum_dt.stride[0];
    scan.partial_y = partial.as<float>();
    if (pairs)
      run_groups<T, 2>(scan, tiles.count, stream_);
    else
      run_groups<T, 1>(scan, tiles.count, stream_);
  });
}

}  // namespace coil
