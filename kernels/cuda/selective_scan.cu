// Mamba's selective scan (Gu and Dao 2023, section 3), forward. Per channel c and state i,
//   delta = softplus(dt + dt_bias),   h[i] = exp(delta A[c,i]) h[i] + delta x B[i],
//   y = sum_i C[i] h[i] + D x,   then y *= silu(z) where z is given.
//
// Where pieces fill the card together, they go through in one pass, a wave of states around a
// block's warps (scan_wave.cuh). Where one long sequence would leave the card idle, time is cut
// into chunks and three kernels follow each other: the state that each chunk ends in if it begins
// at zero, with its sum of delta; the carry over the chunks of a piece,
//   h_in(k+1) = exp(A sum delta(k)) h_in(k) + h_local(k);
// and the walk from the states carried in. The first and the last do the same arithmetic, so a cut
// changes rounding only. Pieces of a few steps are walked whole. Where an earlier run has left the
// states before every tile, they are walked from there.
//
// Limit: issue slots, not memory, of which 8 bytes a channel's step are a quarter. A power of two
// takes 4 slots, so a step costs max(8 M, I + 4 M): 187 in the walk (M = 19 powers and divisions, I
// = 111 other instructions), 143 in the local pass. H100: 2.07 ms for 131,072 steps of 1,536
// channels, 345 slots, 96 % of it.
#include "kernels/cuda/scan_wave.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kSlots = 3;
constexpr int kWalkBlocks = 3, kLocalBlocks = 4;  // of a multiprocessor at once, by registers

// A block takes 2 kThreads channels over one tile. kLocal: from zero, no output but the end state
// and the sum of delta. kRare: without gate, or of more states than a thread holds, whose y comes
// in parts.
template <class T, bool kWords, bool kLocal, bool kRare>
__global__ void __launch_bounds__(kThreads, kLocal ? kLocalBlocks : kWalkBlocks)
    scan_kernel(const Scan<T> op) {
  take_turn();
  using Arrays = Ring<T, kLocal ? 2 : 3, 2 * kThreads, kSlots, kWords, false>;  // x, dt and z
  extern __shared__ float4 memory[];
  __shared__ Matrices matrices[2];
  const int64_t tile = blockIdx.x;
  const ScanSpan span = span_of(op, tile);
  const int direction = op.reverse ? -1 : 1, steps = static_cast<int>(span.end - span.begin);
  const int64_t row = op.row(span.piece, span.begin);
  const int64_t block_channel = blockIdx.y * static_cast<int64_t>(2 * kThreads);
  const int64_t channel = block_channel + 2 * threadIdx.x;
  const int here = static_cast<int>(min(op.e - channel, static_cast<int64_t>(2)));  // of the two

  Arrays ring(memory, steps, op.e - block_channel);
  ring.set(0, op.x + row * op.x_stride + block_channel, direction * op.x_stride);
  ring.set(1, op.dt + row * op.dt_stride + block_channel, direction * op.dt_stride);
  if constexpr (!kLocal)
    ring.set(2, op.z ? op.z + row * op.z_stride + block_channel : nullptr, direction * op.z_stride);
  MatricesOnTheWay<T, false> on_the_way(op, row, steps);
  on_the_way.load();
#pragma unroll
  for (int slot = 0; slot < kSlots - 1; ++slot) ring.fetch(slot);

  float rate[2][kStates], h[2][kStates], bias[2], D[2], sum[2];
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    bias[w] = D[w] = sum[w] = 0;
#pragma unroll
    for (int i = 0; i < kStates; ++i) rate[w][i] = h[w][i] = 0;
    if (w >= here) continue;
    bias[w] = op.dt_bias[channel + w];
    op.rates(channel + w, rate[w]);
    if (kLocal) continue;
    D[w] = op.D[channel + w];
    if (op.starts) {
      const float* const from = op.starts + (tile * op.e + channel + w) * op.n + op.group * kStates;
#pragma unroll
      for (int i = 0; i < kStates; ++i)
        if (i < op.states()) h[w][i] = from[i];
    } else if (op.carry) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) h[w][i] = op.carry[op.in_tile(tile, i, channel + w)];
    } else if (span.piece.from >= 0) {
      const float* const from = op.state_at(span.piece.from, channel + w);
#pragma unroll
      for (int i = 0; i < kStates; ++i)
        if (i < op.states()) h[w][i] = from[i];
    }
  }
  on_the_way.keep(matrices[0]);
  on_the_way.load();

  // Where the next step is written: addresses are only ever added to.
  T* y_at = op.y + row * op.y_stride + channel;
  const int64_t y_step = direction * op.y_stride;
  float* partial_at = op.partial_y + row * op.e + channel;
  T* checkpoint_at = nullptr;
  if (!kLocal && op.checkpoints)
    checkpoint_at =
        op.checkpoints + channel +
        ((op.first_checkpoint[span.p] + span.begin / kScanSteps) * op.n + op.group * kStates) *
            op.e;

  // One step of the two channels, from shared memory.
  const auto step = [&](const typename Arrays::Slot& slot, const Matrices& matrix, int s) {
    const int own = 2 * threadIdx.x;
    const float2 dt = pair(&slot[1][s][own]), x = pair(&slot[0][s][own]);
    const float* const b = matrix.B[s];
    const float* const c = matrix.C[s];
    float y[2];
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const float delta = softplus_of((w ? dt.y : dt.x) + bias[w]), u = delta * (w ? x.y : x.x);
      if (kLocal || kRare) sum[w] += delta;
      float even = kLocal || kRare ? 0 : D[w] * (w ? x.y : x.x), odd = 0;
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        h[w][i] = fmaf(fast_exp2(delta * rate[w][i]), h[w][i], u * b[i]);
        if (!kLocal) (i % 2 ? odd : even) = fmaf(h[w][i], c[i], i % 2 ? odd : even);
      }
      y[w] = even + odd;
    }
    if constexpr (!kLocal) {
      if (kRare && op.partial_y) {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          if (w >= here) continue;
          if (op.group > 0) y[w] += partial_at[w];
          if (!op.is_last_group()) partial_at[w] = y[w];
        }
        partial_at += direction * op.e;
      }
      if (kRare) {
        y[0] = fmaf(D[0], x.x, y[0]);
        y[1] = fmaf(D[1], x.y, y[1]);
      }
      if (!kRare || op.z) {
        const float2 z = pair(&slot[2][s][own]);
        y[0] *= z.x * sigmoid_of(z.x);
        y[1] *= z.y * sigmoid_of(z.y);
      }
      if (!kRare || op.is_last_group()) {
        if constexpr (kWords) {
          if (here > 0) store_pair({y[0], y[1]}, y_at);
        } else {
          if (here > 0) y_at[0] = from_float<T>(y[0]);
          if (here > 1) y_at[1] = from_float<T>(y[1]);
        }
      }
      y_at += y_step;
    }
  };
  int slot = 0;
  for (int begin = 0, k = 0; begin < steps; begin += kScanSteps, ++k) {
    wait_for_slot<kSlots>();
    __syncthreads();  // the slot has come for all; what steps before the last ones used is free
    on_the_way.keep(matrices[(k + 1) % 2]);
    on_the_way.load();
    ring.fetch(slot == 0 ? kSlots - 1 : slot - 1);
    if (!kLocal && op.checkpoints) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        T* const to = checkpoint_at + static_cast<int64_t>(i) * static_cast<int>(op.e);
        if (i >= op.states()) continue;
        if (kWords && here > 0) {
          store_pair({h[0][i], h[1][i]}, to);
        } else {
          if (here > 0) to[0] = from_float<T>(h[0][i]);
          if (here > 1) to[1] = from_float<T>(h[1][i]);
        }
      }
      checkpoint_at += op.n * op.e;
    }
    if (steps - begin >= kScanSteps) {
#pragma unroll kUnrolled
      for (int s = 0; s < kScanSteps; ++s) step(ring.slots[slot], matrices[k % 2], s);
    } else {
#pragma unroll 1
      for (int s = 0; s < steps - begin; ++s) step(ring.slots[slot], matrices[k % 2], s);
    }
    slot = slot + 1 == kSlots ? 0 : slot + 1;
  }
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    if (w >= here) continue;
    if (kLocal) {
#pragma unroll
      for (int i = 0; i < kStates; ++i) op.carry[op.in_tile(tile, i, channel + w)] = h[w][i];
      op.sums[tile * op.e + channel + w] = sum[w];
    } else if (!op.carry && !op.starts) {
      if (span.piece.to >= 0) {
        float* const to = op.state_at(span.piece.to, channel + w);
#pragma unroll
        for (int i = 0; i < kStates; ++i)
          if (i < op.states()) to[i] = h[w][i];
      }
      if (op.sum_dt && op.group == 0) op.sum_dt[span.p * op.sum_dt_stride + channel + w] = sum[w];
    }
  }
}

// Reads and writes the slots' states: nothing else does.
template <class T>
__global__ void __launch_bounds__(32 * kCarrySlices) carry_kernel(const Scan<T> op) {
  take_turn();
  const int64_t p = blockIdx.x, channel = blockIdx.y * int64_t{32} + threadIdx.x;
  const int i = static_cast<int>(blockIdx.z);
  if (i >= op.states()) return;
  const Piece piece = op.pieces[p];
  const bool here = channel < op.e;
  const float begin = here && piece.from >= 0 ? op.state_at(piece.from, channel)[i] : 0;
  float total;
  const auto mark = [&](int64_t tile, float h) {
    if (op.marks && tile > 0 && tile % op.mark_tiles == 0)
      op.marks[((tile / op.mark_tiles - 1) * op.e + channel) * op.n + op.group * kStates + i] = h;
  };
  const float h = carry_over<false>(op, p, piece.length, i, channel, begin, total, mark);
  if (threadIdx.y > 0 || !here) return;
  if (piece.to >= 0) op.state_at(piece.to, channel)[i] = h;
  if (op.sum_dt && i == 0 && op.group == 0) op.sum_dt[p * op.sum_dt_stride + channel] = total;
}

template <class T, bool kWords, bool kLocal, bool kRare>
void launch(const Scan<T>& scan, int64_t tiles, cudaStream_t stream) {
  using Arrays = Ring<T, kLocal ? 2 : 3, 2 * kThreads, kSlots, kWords, false>;
  constexpr int kBytes = Arrays::kBytes;
  allow_shared(scan_kernel<T, kWords, kLocal, kRare>, kBytes);
  const dim3 grid(static_cast<unsigned>(tiles),
                  static_cast<unsigned>(div_up(scan.e, 2 * kThreads)));
  launch_in_turn(scan_kernel<T, kWords, kLocal, kRare>, grid, kThreads, kBytes, stream, scan);
  check_launch("selective_scan");
}

template <class T, bool kWords>
void run_groups(Scan<T> scan, const Rows& rows, int64_t tiles, cudaStream_t stream) {
  for (; scan.group * kStates < scan.n; ++scan.group) {
    if (scan.carry) {
      launch<T, kWords, true, false>(scan, tiles, stream);
      const CarryGrid grid(rows, scan.tile_length, scan.e, kStates);
      launch_in_turn(carry_kernel<T>, grid.blocks, grid.threads, 0, stream, scan);
      check_launch("selective_scan");
    }
    if (!scan.y) continue;
    if (scan.partial_y || !scan.z || (scan.sum_dt && !scan.carry))
      launch<T, kWords, false, true>(scan, tiles, stream);
    else
      launch<T, kWords, false, false>(scan, tiles, stream);
  }
}

// Whether a batch goes through in one pass (scan_wave.cuh): where its sequences, all at once, keep
// the card busier than cutting each in chunks would. A wave around one block of warps takes about
// 90 cycles a step however little else runs, two passes about 310 issue slots a channel's step.
bool in_wave(const SelectiveScan& op, int processors) {
  const int64_t e = op.x.cols();
  if (op.A_log.cols() != kStates || !op.y || !op.z || op.sum_dt || op.marks || op.starts ||
      e % 32 != 0)
    return false;
  if (!in_fours(op.B) || !in_fours(op.C)) return false;
  int64_t longest = 1;
  for (const Piece& piece : op.rows->pieces()) longest = std::max(longest, piece.length);
  return longest > 1 && op.rows->total() * e >= 40 * int64_t{processors} * longest;
}

}  // namespace

void CudaBackend::run(const SelectiveScan& op) {
  check_scan("selective_scan", *this, op);
  const int64_t t = op.rows->total(), e = op.x.cols(), n = op.A_log.cols();
  const auto pieces = static_cast<int64_t>(op.rows->pieces().size());
  expect_if("selective_scan", "y", op.y, op.x.dtype, {t, e});
  expect_here("selective_scan", "y", op.y, device());
  check(op.y.data != op.x.data, "selective_scan: y is x, expected another tensor");
  check(op.y || !op.checkpoints, "selective_scan: checkpoints are given without y");
  expect_if("selective_scan", "sum_dt", op.sum_dt, DType::f32, {pieces, e});
  expect_here("selective_scan", "sum_dt", op.sum_dt, device());
  if (!op.starts && (op.state || op.rows->slots() > 0))
    check_scan_state("selective_scan", "state", *this, op.state, *op.rows, e, n);
  expect_marks("selective_scan", op);
  expect_here("selective_scan", "marks", op.marks, device());
  expect_here("selective_scan", "starts", op.starts, device());
  if (t == 0 || e == 0 || n == 0) return;

  const bool words = in_words(op.x) && in_words(op.dt) && in_words(op.z) && in_words(op.y);
  const auto operands = [&]<class T>(T) {
    Scan<T> scan{};
    fill_operands(op, scan);
    scan.y = op.y.as<T>();
    scan.y_stride = op.y.stride[0];
    scan.state = op.state.as<float>();
    scan.slot_stride = op.state.stride[0];
    scan.state_stride = op.state.stride[1];
    scan.sum_dt = op.sum_dt.as<float>();
    scan.sum_dt_stride = op.sum_dt.stride[0];
    return scan;
  };
  if (words && in_wave(op, processors_)) {
    cuda::with_type("selective_scan", op.x, [&](auto type) {
      const dim3 grid(static_cast<unsigned>(pieces), static_cast<unsigned>(e / 32));
      launch_in_turn(wave_kernel<decltype(type)>, grid, kWaveWarps * 32, 0, stream_,
                     operands(type));
      check_launch("selective_scan");
    });
    return;
  }
  const int64_t length = op.starts ? op.every
                                   : tile_length(*op.rows, div_up(e, 2 * kThreads), kWalkBlocks,
                                                 processors_, op.marks ? op.every : 0);
  const Rows::Tiles& tiles = op.rows->tiles(length);
  Tensor carry, sums, partial;
  if (!op.starts && (tiles.count > pieces || !op.y || op.marks)) {
    carry = Tensor(*this, DType::f32, {tiles.count, kStates, e});
    sums = Tensor(*this, DType::f32, {tiles.count, e});
  }
  if (n > kStates && op.y) partial = Tensor(*this, DType::f32, {t, e});
  cuda::with_type("selective_scan", op.x, [&](auto type) {
    auto scan = operands(type);
    scan.first = tiles.first.as<int32_t>();
    scan.tile_length = length;
    scan.carry = carry.as<float>();
    scan.sums = sums.as<float>();
    scan.marks = op.marks.as<float>();
    scan.mark_tiles = op.every / length;
    scan.starts = op.starts.as<float>();
    scan.partial_y = partial.as<float>();
    if (words)
      run_groups<decltype(type), true>(scan, *op.rows, tiles.count, stream_);
    else
      run_groups<decltype(type), false>(scan, *op.rows, tiles.count, stream_);
  });
}

}  // namespace coil
