// S4D's scan, forward (ops.h has the equation; s4d.cuh who holds what). Four steps at once, from h
// before them:
//   y_j = Re(K a^{j+1} h) + sum_{l<=j} r_l x_{j-l},   h' = a^4 h + a^3 x_0 + a^2 x_1 + a x_2 + x_3.
//
// Where pieces fill the card together each is walked whole. Where one long sequence would leave it
// idle, time is cut into tiles: the state that each tile ends in if it begins at zero; the carry
// over the tiles of a piece, with a^length; and the walk from the states carried in.
//
// Limit: issue slots. Four steps of a state take 20 in the walk and 12 in the pass before it, so a
// channel's step of 32 states 160 and 96; the loops issue about 260 and 115, with handing x round,
// sums over lanes, responses, GELU and addresses. 8 bytes a channel's step of bf16 with checkpoints
// are a third of what memory brings meanwhile.
#include "kernels/cuda/s4d.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kStates = 8;                    // of a lane
constexpr int kBlocks = 2, kLocalBlocks = 3;  // of a multiprocessor at once, by registers

template <class T>
struct Scan : S4dOperands<T> {
  T* y;  // (t,d); may be x
  int64_t y_stride;
  float* state;  // (s,d,n,2) or null
  int64_t slot_stride, state_stride;

  __device__ float* state_at(int32_t slot, int64_t channel, int i) const {
    return state + slot * slot_stride + channel * state_stride + 2 * i;
  }
};

// A block takes kThreads / kLanes channels over one tile. kLocal: from zero, no output but the end
// state.
template <class T, int kLanes, bool kLocal>
__global__ void __launch_bounds__(kThreads, kLocal ? kLocalBlocks : kBlocks)
    scan_kernel(const Scan<T> op) {
  using Warp = Lanes<kLanes>;
  const Warp lanes;
  const int64_t tile = blockIdx.x, channel = lanes.channel(), d = op.of.d;
  const int p = piece_of(op.first, op.pieces_count, static_cast<int32_t>(tile));
  const Piece piece = op.pieces[p];
  const int64_t begin = (tile - op.first[p]) * op.tile_length;
  const int steps = static_cast<int>(min(op.tile_length, piece.length - begin));
  const int64_t row = op.row(piece, begin), direction = op.reverse ? -1 : 1;
  const int64_t x_step = direction * op.x_stride, y_step = direction * op.y_stride;
  const int64_t before_step = direction * op.before_stride;
  const bool here = channel < d;
  const T* x_at = op.x + row * op.x_stride + channel;
  T* y_at = op.y + row * op.y_stride + channel;
  T* before_at = op.before ? op.before + row * op.before_stride + channel : nullptr;
  const auto move = [&](int64_t by) {
    x_at += by * x_step;
    y_at += by * y_step;
    if (before_at) before_at += by * before_step;
  };
  move(lanes.own);  // until single steps come
  float2* checkpoint = nullptr;
  const int first = lanes.group * kStates;
  if (!kLocal && op.checkpoints)
    checkpoint = op.checkpoints +
                 ((op.first_checkpoint[p] + begin / kS4dBlock) * op.of.n + first) * d + channel;

  T next[Warp::kOwned];
  lanes.fetch(x_at, x_step, here && steps >= kAtOnce, next);
  System<kStates> system;
  system.load(op, channel, first, lanes.group == 0);
  float2 h[kStates];
#pragma unroll
  for (int s = 0; s < kStates; ++s) {
    h[s] = {0, 0};
    if (kLocal || !here || first + s >= op.of.n) continue;
    if (op.carry) {
      h[s] = op.carry[op.in_tile(tile, first + s, channel)];
    } else if (piece.from >= 0) {
      const float* const from = op.state_at(piece.from, channel, first + s);
      h[s] = {from[0], from[1]};
    }
  }
  const auto keep = [&] {
    if constexpr (!kLocal) {
      if (!op.checkpoints) return;
#pragma unroll
      for (int s = 0; s < kStates; ++s)
        if (here && first + s < op.of.n) checkpoint[s * d] = h[s];
      checkpoint += op.of.n * d;
    }
  };
  const auto put = [&](float y, int64_t step) {
    if (before_at) before_at[step * before_step] = from_float<T>(y);
    y_at[step * y_step] = from_float<T>(op.gelu ? gelu_of(y) : y);
  };

  int done = 0;
  for (; done + kAtOnce <= steps; done += kAtOnce) {
    if (done % kS4dBlock == 0) keep();
    float owned[Warp::kOwned], x[kAtOnce], y[kAtOnce];
#pragma unroll
    for (int m = 0; m < Warp::kOwned; ++m) owned[m] = to_float(next[m]);
    lanes.fetch(x_at + kAtOnce * x_step, x_step, here && done + 2 * kAtOnce <= steps, next);
    lanes.hand_round(owned, x);
#pragma unroll
    for (int four = 0; four < kAtOnce; four += kTogether) {
      if constexpr (!kLocal) {
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          y[four + j] = system.impulse[0] * x[four + j];
#pragma unroll
          for (int l = 1; l <= j; ++l)
            y[four + j] = fmaf(system.impulse[l], x[four + j - l], y[four + j]);
#pragma unroll
          for (int s = 0; s < kStates; ++s)
            y[four + j] = add_real(system.k[j][s], h[s], y[four + j]);
        }
      }
#pragma unroll
      for (int s = 0; s < kStates; ++s) h[s] = system.driven(s, h[s], x + four);
    }
    if constexpr (!kLocal) {
      lanes.share_out(y, owned);
      if (here && lanes.stores()) {
#pragma unroll
        for (int m = 0; m < Warp::kOwned; ++m) put(owned[m], m * Warp::kOwners);
      }
    }
    move(kAtOnce);
  }
  move(-lanes.own);
  if (done % kS4dBlock == 0 && done < steps) keep();
#pragma unroll 1
  for (; done < steps; ++done) {
    const float x = here ? to_float(*x_at) : 0;
    if constexpr (!kLocal) {
      float y = system.impulse[0] * x;
#pragma unroll
      for (int s = 0; s < kStates; ++s) y = add_real(system.k[0][s], h[s], y);
      y = lanes.sum(y);
      if (here && lanes.group == 0) put(y, 0);
    }
    move(1);
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      const bool there = here && first + s < op.of.n;
      const float2 z = there ? op.table[(first + s) * d + channel] : float2{-1, 0};
      h[s] = advanced(h[s], z, {x, 0});
    }
  }
#pragma unroll
  for (int s = 0; s < kStates; ++s) {
    if (!here || first + s >= op.of.n) continue;
    if (kLocal) {
      op.carry[op.in_tile(tile, first + s, channel)] = h[s];
    } else if (!op.carry && piece.to >= 0) {
      float* const to = op.state_at(piece.to, channel, first + s);
      to[0] = h[s].x;
      to[1] = h[s].y;
    }
  }
}

// A thread per piece, state and channel. Reads and writes the slots' states: nothing else does.
template <class T>
__global__ void __launch_bounds__(kThreads) carry_kernel(const Scan<T> op) {
  constexpr int kAhead = 8;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t channel = index % op.of.d, p = index / (op.of.d * op.of.n);
  const int i = static_cast<int>(index / op.of.d % op.of.n);
  if (p >= op.pieces_count) return;
  const Piece piece = op.pieces[p];
  const float2 z = op.of.power(channel, i, op.tile_length);
  float2 h = {0, 0};
  if (piece.from >= 0) {
    const float* const from = op.state_at(piece.from, channel, i);
    h = {from[0], from[1]};
  }
  const int64_t last = op.first[p] + (piece.length - 1) / op.tile_length;
  float2 end = {0, 0};  // what the last tile ends in, from zero
  for (int64_t tile = op.first[p]; tile <= last; tile += kAhead) {
    float2 local[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (tile + k <= last) local[k] = op.carry[op.in_tile(tile + k, i, channel)];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (tile + k > last) break;
      op.carry[op.in_tile(tile + k, i, channel)] = h;
      if (tile + k == last)
        end = local[k];
      else
        h = advanced(h, z, local[k]);
    }
  }
  if (piece.to < 0) return;
  const int64_t steps = piece.length - (last - op.first[p]) * op.tile_length;
  h = advanced(h, op.of.power(channel, i, steps), end);
  float* const to = op.state_at(piece.to, channel, i);
  to[0] = h.x;
  to[1] = h.y;
}

template <class T, int kLanes, bool kLocal>
void launch(const Scan<T>& scan, int64_t tiles, cudaStream_t stream) {
  const int64_t slices = div_up(scan.of.d, Lanes<kLanes>::kChannels);
  check(slices <= 65535, "s4d_scan: {} channels, expected less than 2^18", scan.of.d);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(slices));
  scan_kernel<T, kLanes, kLocal><<<grid, kThreads, 0, stream>>>(scan);
  check_launch("s4d_scan");
}

}  // namespace

void CudaBackend::run(const S4dScan& op) {
  const char* const name = "s4d_scan";
  check_s4d(name, *this, op);
  const int64_t t = op.rows->total(), d = op.x.cols(), n = op.A_imag.cols();
  const auto pieces = static_cast<int64_t>(op.rows->pieces().size());
  expect(name, "y", op.y, op.x.dtype, {t, d});
  expect_here(name, "y", op.y, device());
  if (op.state || op.rows->slots() > 0)
    check_s4d_state(name, "state", *this, op.state, *op.rows, d, n);
  if (t * d * n == 0) return;

  const Tensor table(*this, DType::f32, {3, n, d, 2});
  cuda::with_type(name, op.x, [&](auto type) {
    using T = decltype(type);
    Scan<T> scan{};
    fill_s4d_operands(op, scan);
    scan.table = table.as<float2>();
    scan.y = op.y.as<T>();
    scan.y_stride = op.y.stride[0];
    scan.state = op.state.as<float>();
    scan.slot_stride = op.state.stride[0];
    scan.state_stride = op.state.stride[1];
    s4d_table_kernel<<<blocks_of(n * d), kThreads, 0, stream_>>>(scan.of, table.as<float2>());
    check_launch(name);
    with_lanes(n, kStates, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      scan.tile_length = s4d_tile_length(*op.rows, div_up(d, Lanes<kLanes>::kChannels),
                                         kBlocks * int64_t{processors_});
      const Rows::Tiles& tiles = op.rows->tiles(scan.tile_length);
      scan.first = tiles.first.template as<int32_t>();
      Tensor carry;
      if (tiles.count > pieces) {
        carry = Tensor(*this, DType::f32, {tiles.count, n, d, 2});
        scan.carry = carry.as<float2>();
        launch<T, kLanes, true>(scan, tiles.count, stream_);
        carry_kernel<T><<<blocks_of(pieces * n * d), kThreads, 0, stream_>>>(scan);
        check_launch(name);
      }
      launch<T, kLanes, false>(scan, tiles.count, stream_);
    });
  });
}

}  // namespace coil
