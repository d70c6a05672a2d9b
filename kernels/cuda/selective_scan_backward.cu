// Mamba's selective scan, backward. With g[i] the gradient of h[i] after a step, walked from a
// piece's end:
//   dypre = dy silu(z),   g[i] = carried[i] + dypre C[i],   carried[i] = a[i] g[i]   (to the step
//   before) dC[i] += dypre h[i],   dB[i] += g[i] delta x,   dx = D dypre + delta sum_i g[i] B[i],
//   ddelta = sum_i g[i] (A[i] a[i] h'[i] + x B[i]),   dA[i] += g[i] delta a[i] h'[i],
// h' the state before the step, a[i] = exp(delta A[i]);  dA_log = A dA,  ddt = ddelta sigmoid(dt +
// bias).
//
// As forward, one kernel where pieces are short or many; else chunks of time: the gradient that
// each chunk hands on if none comes in, the carry over the chunks of a piece from its end, the walk
// (scan_walk_back.cuh). Blocks of the walk leave partial sums of dB and dC over their channels, and
// of dA, dD and dbias over their tile; the last kernels add them in order. No atomics: the same
// bits every time.
//
// Limit: issue slots (see selective_scan.cu), 161 a channel's step in the local kernel and 462 in
// the walk. H100: 4.86 ms for 131,072 steps of 1,536 channels, 810 slots, 77 % of it.
#include "kernels/cuda/scan_wave_back.cuh"

#include <algorithm>
#include <array>

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kLocalSlots = 3, kLocalBlocks = 4;  // of its ring; of a multiprocessor at once

// What a chunk hands on to the one before it if nothing comes in from the one after. Two channels a
// thread.
template <class T, bool kWords>
__global__ void __launch_bounds__(kThreads, kLocalBlocks) local_kernel(const ScanBack<T> op) {
  take_turn();
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

// From the last chunk to the first.
template <class T>
__global__ void __launch_bounds__(32 * kCarrySlices) carry_back_kernel(const ScanBack<T> op) {
  take_turn();
  const int64_t p = blockIdx.x, channel = blockIdx.y * int64_t{32} + threadIdx.x;
  const int i = static_cast<int>(blockIdx.z);
  if (i >= op.states()) return;
  const Piece piece = op.pieces[p];
  const bool here = channel < op.e;
  const float end = here && op.dstate && piece.to >= 0 ? op.dstate_at(piece.to, channel)[i] : 0;
  float total;
  const float carried =
      carry_over<true>(op, p, piece.length, i, channel, end, total, [](int64_t, float) {});
  if (op.dinitial && threadIdx.y == 0 && here) op.dinitial[op.in_tile(p, i, channel)] = carried;
}

// dB and dC: sums over the blocks of channels, in order. A thread per row and state.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_BC_kernel(const ScanBack<T> op, T* dB, int64_t dB_stride, T* dC, int64_t dC_stride) {
  take_turn();
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int k = static_cast<int>(index % (2 * kStates)), i = k % kStates;
  const int64_t row = index / (2 * kStates);
  if (row >= op.t || i >= op.states()) return;
  float sum = 0;
#pragma unroll 8
  for (int64_t b = 0; b < op.planes; ++b) sum += op.partial_BC[(b * op.t + row) * 2 * kStates + k];
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
  take_turn();
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
  take_turn();
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
  launch_in_turn(local_kernel<T, kWords>, grid, kThreads, kBytes, stream, scan);
  check_launch("selective_scan backward");
}
template <class T, bool kWords, bool kRare>
void launch_walk(const ScanBack<T>& scan, int64_t tiles, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Kept<T>) + Ring<T, 4, kThreads, kWalkSlots, kWords, true>::kBytes;
  allow_shared(backward_kernel<T, kWords, kRare>, kBytes);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(div_up(scan.e, kThreads)));
  launch_in_turn(backward_kernel<T, kWords, kRare>, grid, kThreads, kBytes, stream, scan);
  check_launch("selective_scan backward");
}
template <class T>
void launch_wave(const ScanBack<T>& scan, int groups, cudaStream_t stream) {
  constexpr int kBytes = sizeof(WaveBack<T>);
  allow_shared(wave_back_kernel<T>, kBytes);
  const dim3 grid(static_cast<unsigned>(scan.pieces_count), static_cast<unsigned>(scan.planes));
  launch_in_turn(wave_back_kernel<T>, grid, kBackWarps * 32, kBytes, stream, scan, groups);
  check_launch("selective_scan backward");
}

std::array<View, 8> activations_of(const SelectiveScanBackward& op) {
  return {op.x, op.dt, op.dy, op.z, op.dx, op.ddt, op.dz, op.y};
}

// Of how many times 32 channels a block takes one piece in one pass (scan_wave_back.cuh), one block
// on a multiprocessor; 0 where chunks of time are faster, or blocks find no room on this card.
int wave_groups(const SelectiveScanBackward& op, int processors, int device) {
  const int64_t all = op.x.cols() / 32;
  if (op.A_log.cols() != kStates || !op.z || op.x.cols() % 32 != 0) return 0;
  if (!std::ranges::all_of(activations_of(op), in_words)) return 0;
  if (!in_fours(op.B) || !in_fours(op.C)) return 0;
  int shared = 0;
  check_call(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "shared memory");
  if (shared < static_cast<int>(sizeof(WaveBack<float>))) return 0;
  int64_t longest = 1, rounds = 0;  // of the warps
  for (const Piece& piece : op.rows->pieces()) {
    const int64_t own = div_up(piece.length, kBackWarps * kScanSteps);
    longest = std::max(longest, own);
    rounds += own;
  }
  int64_t best = 0, best_cost = 0;
  for (int64_t groups = 1; groups <= all; ++groups) {
    const int64_t blocks = op.rows->pieces().size() * div_up(all, groups);
    const int64_t cost = std::min(div_up(blocks, processors) * groups * longest,
                                  rounds * all / processors + groups * longest);
    if (best == 0 || cost <= best_cost) best = groups, best_cost = cost;
  }
  // Chunks walk each step twice: 161 issue slots beside 462, and two more kernels.
  const double steps = static_cast<double>(op.rows->total() * all) / processors;
  return best_cost * kBackWarps * kScanSteps < 1.3 * steps ? static_cast<int>(best) : 0;
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
  expect_if(name, "y", op.y, act, {t, e});
  expect_here(name, "y", op.y, device());
  check(op.z || !op.y, "{}: y is given without z", name);
  here("dA_log", op.dA_log, DType::f32, {e, n});
  here("dD", op.dD, DType::f32, {e});
  here("ddt_bias", op.ddt_bias, DType::f32, {e});
  if (op.dstate) check_scan_state(name, "dstate", *this, op.dstate, *op.rows, e, n);
  if (t == 0 || e == 0 || n == 0) return;

  const int groups = wave_groups(op, processors_, index_);
  const int64_t planes = groups > 0 ? div_up(e, groups * 32) : div_up(e, kThreads);
  // Of the local kernel, whose blocks are twice as wide.
  const int64_t length = tile_length(*op.rows, planes, 2 * kLocalBlocks, processors_);
  const Rows::Tiles& tiles = op.rows->tiles(length);
  const bool chunked = groups == 0 && tiles.count > pieces;
  const int64_t walk_length =
      chunked ? longer_tiles(*op.rows, length, planes, kWalkBlocks, processors_) : length;
  const Rows::Tiles& walk_tiles = op.rows->tiles(walk_length);
  const int64_t parts = groups > 0 ? pieces * kBackWarps : walk_tiles.count;  // of partial_A
  const bool words = std::ranges::all_of(activations_of(op), in_words);
  const Tensor partial_BC(*this, DType::f32, {planes, t, 2 * kStates});
  const Tensor partial_A(*this, DType::f32, {parts, kStates, e});
  const Tensor partial_D(*this, DType::f32, {parts, 2, e});
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
    scan.walk_first = walk_tiles.first.as<int32_t>();
    scan.walk_length = walk_length;
    scan.dy = op.dy.as<T>();
    scan.dx = op.dx.as<T>();
    scan.ddt = op.ddt.as<T>();
    scan.dz = op.dz.as<T>();
    scan.y = op.y.as<T>();
    scan.dy_stride = op.dy.stride[0];
    scan.dx_stride = op.dx.stride[0];
    scan.ddt_stride = op.ddt.stride[0];
    scan.dz_stride = op.dz.stride[0];
    scan.y_stride = op.y.stride[0];
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
    scan.planes = planes;
    const auto count = [](int64_t threads) {
      return static_cast<unsigned>(div_up(threads, kThreads));
    };
    for (; scan.group * kStates < n; ++scan.group) {
      const bool last = (scan.group + 1) * kStates >= n;
      if (chunked) {
        words ? launch_local<T, true>(scan, tiles.count, stream_)
              : launch_local<T, false>(scan, tiles.count, stream_);
        const CarryGrid grid(*op.rows, length, e, kStates);
        launch_in_turn(carry_back_kernel<T>, grid.blocks, grid.threads, 0, stream_, scan);
      }
      const bool rare = !scan.z || n != kStates;
      groups > 0       ? launch_wave<T>(scan, groups, stream_)
      : words && !rare ? launch_walk<T, true, false>(scan, walk_tiles.count, stream_)
      : words          ? launch_walk<T, true, true>(scan, walk_tiles.count, stream_)
                       : launch_walk<T, false, true>(scan, walk_tiles.count, stream_);
      launch_in_turn(sum_BC_kernel<T>, count(t * 2 * kStates), kThreads, 0, stream_, scan,
                     op.dB.as<T>(), op.dB.stride[0], op.dC.as<T>(), op.dC.stride[0]);
      const dim3 of_tiles(static_cast<unsigned>(div_up(e, 32)), last ? kStates + 2 : kStates);
      launch_in_turn(sum_tiles_kernel<T>, of_tiles, dim3(32, kSlices), 0, stream_, scan, parts,
                     op.dA_log.as<float>(), op.dA_log.stride[0], op.dD.as<float>(),
                     op.ddt_bias.as<float>());
      const int64_t slots = op.rows->slots();
      if (op.dstate && slots > 0)
        launch_in_turn(initial_kernel<T>, count(slots * kStates * e), kThreads, 0, stream_, scan,
                       slots);
    }
  });
  check_launch(name);
}

}  // namespace coil
