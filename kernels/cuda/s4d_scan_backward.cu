// S4D's scan, backward. The system is the same at every step, so its gradient is the same system
// transposed, walked from a piece's end; with m the gradient of h (the loss grows by Re(m dh)) and
// g that of y before GELU,
//   dx_k = Re(a^{3-k} m) + sum_{k+l<4} r_l g_{k+l},   m' = a^4 m + sum_j K a^{j+1} g_j,
// and from sums over steps of what each power is multiplied with, of K a^{j+1}: g_j h, of a^{3-k}:
// m x_k, of a^4: m h, of r_l: g_j x_{j-l} (the same for all states), come the gradients of a and K
// at the end of a tile, and after a sum over tiles, in order and in f64, those of the parameters.
//
// As forward, one kernel where pieces are short or many; else tiles of time: the m that each hands
// on if none comes in, the carry from the last tile to the first, the walk. The walk runs every
// kS4dBlock steps forward again from their checkpoint and keeps h before every four in shared
// memory.
//
// Limit: issue slots, 50 for four steps of a state in the walk and 14 in the pass before it: a
// channel's step of 32 states 400 and 112; the loops issue about 680 and 210.
#include "kernels/cuda/s4d.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kStates = 4, kLocalStates = 8;  // of a lane in the walk and before it
constexpr int kBlocks = 2, kLocalBlocks = 3;  // of a multiprocessor at once, by registers
// h before every four steps of a block; a short one has up to 7 single steps.
constexpr int kKept = (kS4dBlock - kAtOnce) / kTogether + kAtOnce - 1;
constexpr int kKeptBytes = kKept * kStates * kThreads * sizeof(float2);

template <class T>
struct ScanBack : S4dOperands<T> {
  const T* dy;
  T* dx;  // may be dy
  int64_t dy_stride, dx_stride;
  float* dstate;  // (s,d,n,2) or null
  int64_t slot_stride, state_stride;
  float2* dinitial;  // (pieces, n, d): the gradient of the state that a piece begins with; or null
  float* partial;    // (tiles, 4 n + 1, d): of each state those of a and of K, then that of D

  // Gradients of h in memory are those of its real and imaginary part: the conjugate of m.
  __device__ float* state_at(int32_t slot, int64_t channel, int i) const {
    return dstate + slot * slot_stride + channel * state_stride + 2 * i;
  }
  __device__ float2 final_gradient(const Piece& piece, int64_t channel, int i) const {
    if (!dstate || piece.to < 0) return {0, 0};
    const float* const from = state_at(piece.to, channel, i);
    return {from[0], -from[1]};
  }
};

// A tile: where it lies, its pointers.
template <class T>
struct TileBack {
  Piece piece;
  int p, steps;
  int64_t begin, x_step, dy_step, dx_step, before_step;
  const T *x, *dy, *before;
  T* dx;

  __device__ TileBack(const ScanBack<T>& op, int64_t tile, int64_t channel) {
    p = piece_of(op.first, op.pieces_count, static_cast<int32_t>(tile));
    piece = op.pieces[p];
    begin = (tile - op.first[p]) * op.tile_length;
    steps = static_cast<int>(min(op.tile_length, piece.length - begin));
    const int64_t row = op.row(piece, begin), direction = op.reverse ? -1 : 1;
    x_step = direction * op.x_stride, dy_step = direction * op.dy_stride;
    dx_step = direction * op.dx_stride, before_step = direction * op.before_stride;
    x = op.x + row * op.x_stride + channel;
    dy = op.dy + row * op.dy_stride + channel;
    dx = op.dx + row * op.dx_stride + channel;
    before = op.gelu ? op.before + row * op.before_stride + channel : nullptr;
  }
  // g of one step, or of those that a lane owns of eight.
  __device__ float gradient(int64_t step) const {
    return gradient_of(dy[step * dy_step], before ? before[step * before_step] : T{}, before);
  }
};

// K a^{j+1} g_j.
template <int kCount>
__device__ float2 driven_back(const System<kCount>& system, int s, const float* g) {
  float2 sum = {system.k[0][s].x * g[0], system.k[0][s].y * g[0]};
#pragma unroll
  for (int j = 1; j < kTogether; ++j) sum = add_scaled(system.k[j][s], g[j], sum);
  return sum;
}

// What a tile hands on to the one before it if nothing comes in from the one after.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, kLocalBlocks) local_kernel(const ScanBack<T> op) {
  using Warp = Lanes<kLanes>;
  const Warp lanes;
  const int64_t channel = lanes.channel(), d = op.of.d;
  const TileBack<T> tile(op, blockIdx.x, channel);
  const bool here = channel < d;
  const int first = lanes.group * kLocalStates;
  System<kLocalStates> system;
  system.load(op, channel, first, false);
  float2 m[kLocalStates] = {};
  int left = tile.steps;
#pragma unroll 1
  for (; left % kAtOnce != 0; --left) {
    const float g = here ? tile.gradient(left - 1) : 0;
#pragma unroll
    for (int s = 0; s < kLocalStates; ++s) {
      const bool there = here && first + s < op.of.n;
      const float2 z = there ? op.table[(first + s) * d + channel] : float2{-1, 0};
      m[s] = advanced(m[s], z, {system.k[0][s].x * g, system.k[0][s].y * g});
    }
  }
  T dy[Warp::kOwned], before[Warp::kOwned];
  const auto fetch = [&] {  // the eight steps before `left`
    const bool there = here && left >= kAtOnce;
    lanes.fetch(tile.dy + (left - kAtOnce + lanes.own) * tile.dy_step, tile.dy_step, there, dy);
    lanes.fetch(tile.before + (left - kAtOnce + lanes.own) * tile.before_step, tile.before_step,
                there && op.gelu, before);
  };
  fetch();
  while (left > 0) {
    float owned[Warp::kOwned], g[kAtOnce];
#pragma unroll
    for (int k = 0; k < Warp::kOwned; ++k) owned[k] = gradient_of(dy[k], before[k], op.gelu);
    left -= kAtOnce;
    fetch();
    lanes.hand_round(owned, g);
#pragma unroll
    for (int four = kAtOnce - kTogether; four >= 0; four -= kTogether)
#pragma unroll
      for (int s = 0; s < kLocalStates; ++s)
        m[s] = advanced(m[s], system.z4[s], driven_back(system, s, g + four));
  }
#pragma unroll
  for (int s = 0; s < kLocalStates; ++s)
    if (here && first + s < op.of.n) op.carry[op.in_tile(blockIdx.x, first + s, channel)] = m[s];
}

// A thread per piece, state and channel, from the last tile to the first.
template <class T>
__global__ void __launch_bounds__(kThreads) carry_back_kernel(const ScanBack<T> op) {
  constexpr int kAhead = 8;
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t channel = index % op.of.d, p = index / (op.of.d * op.of.n);
  const int i = static_cast<int>(index / op.of.d % op.of.n);
  if (p >= op.pieces_count) return;
  const Piece piece = op.pieces[p];
  const int64_t first = op.first[p], last = first + (piece.length - 1) / op.tile_length;
  const float2 z = op.of.power(channel, i, op.tile_length);
  const float2 z_last = op.of.power(channel, i, piece.length - (last - first) * op.tile_length);
  float2 m = op.final_gradient(piece, channel, i);
  for (int64_t tile = last; tile >= first; tile -= kAhead) {
    float2 local[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (tile - k >= first) local[k] = op.carry[op.in_tile(tile - k, i, channel)];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (tile - k < first) break;
      op.carry[op.in_tile(tile - k, i, channel)] = m;
      m = advanced(m, tile - k == last ? z_last : z, local[k]);
    }
  }
  if (op.dinitial) op.dinitial[op.in_tile(p, i, channel)] = m;
}

// A block takes kThreads / kLanes channels over one tile.
template <class T, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocks) walk_kernel(const ScanBack<T> op) {
  using Warp = Lanes<kLanes>;
  extern __shared__ float2 kept[];  // (kKept, kStates, kThreads): each thread reads its own
  const Warp lanes;
  const int64_t channel = lanes.channel(), d = op.of.d;
  const TileBack<T> tile(op, blockIdx.x, channel);
  const bool here = channel < d;
  const int first = lanes.group * kStates;
  System<kStates> system;
  system.load(op, channel, first, lanes.group == 0);
  const auto there = [&](int s) { return here && first + s < op.of.n; };
  const auto single = [&](int s) {  // a - 1, of single steps
    return there(s) ? op.table[(first + s) * d + channel] : float2{-1, 0};
  };
  float2 m[kStates], of_k[kTogether][kStates] = {}, of_p[kTogether][kStates] = {};
  float taps[kTogether] = {};  // of r_l
#pragma unroll
  for (int s = 0; s < kStates; ++s) {
    m[s] = {0, 0};
    if (!there(s)) continue;
    m[s] = op.carry ? op.carry[op.in_tile(blockIdx.x, first + s, channel)]
                    : op.final_gradient(tile.piece, channel, first + s);
  }

  const int64_t checkpoint = op.first_checkpoint[tile.p] + tile.begin / kS4dBlock;
  for (int block = (tile.steps - 1) / static_cast<int>(kS4dBlock); block >= 0; --block) {
    const int begin = block * static_cast<int>(kS4dBlock);
    const int end = min(begin + static_cast<int>(kS4dBlock), tile.steps);
    const int whole = begin + (end - begin) / kAtOnce * kAtOnce;
    float2* keep = kept + threadIdx.x;
    float2 h[kStates];
#pragma unroll
    for (int s = 0; s < kStates; ++s)
      h[s] = there(s) ? op.checkpoints[((checkpoint + block) * op.of.n + first + s) * d + channel]
                      : float2{0, 0};
    const auto keep_all = [&] {
#pragma unroll
      for (int s = 0; s < kStates; ++s) keep[s * kThreads] = h[s];
      keep += kStates * kThreads;
    };
    T next[Warp::kOwned];
    lanes.fetch(tile.x + (begin + lanes.own) * tile.x_step, tile.x_step, here && begin < whole,
                next);
    for (int at = begin; at < whole; at += kAtOnce) {  // forward again
      float owned[Warp::kOwned], x[kAtOnce];
#pragma unroll
      for (int k = 0; k < Warp::kOwned; ++k) owned[k] = to_float(next[k]);
      lanes.fetch(tile.x + (at + kAtOnce + lanes.own) * tile.x_step, tile.x_step,
                  here && at + kAtOnce < whole, next);
      lanes.hand_round(owned, x);
#pragma unroll
      for (int four = 0; four < kAtOnce; four += kTogether) {
        keep_all();
#pragma unroll
        for (int s = 0; s < kStates; ++s) h[s] = system.driven(s, h[s], x + four);
      }
    }
#pragma unroll 1
    for (int at = whole; at < end; ++at) {
      keep_all();
      const float x = here ? to_float(tile.x[at * tile.x_step]) : 0;
#pragma unroll
      for (int s = 0; s < kStates; ++s) h[s] = advanced(h[s], single(s), {x, 0});
    }

    T dy[Warp::kOwned], before[Warp::kOwned];
    const auto fetch = [&](int at) {  // eight steps
      const bool all_there = here && at >= begin;
      lanes.fetch(tile.x + (at + lanes.own) * tile.x_step, tile.x_step, all_there, next);
      lanes.fetch(tile.dy + (at + lanes.own) * tile.dy_step, tile.dy_step, all_there, dy);
      lanes.fetch(tile.before + (at + lanes.own) * tile.before_step, tile.before_step,
                  all_there && op.gelu, before);
    };
    fetch(whole - kAtOnce);
#pragma unroll 1
    for (int at = end - 1; at >= whole; --at) {
      keep -= kStates * kThreads;
      const float x = here ? to_float(tile.x[at * tile.x_step]) : 0;
      const float g = here ? tile.gradient(at) : 0;
      float dx = system.impulse[0] * g;
      taps[0] = fmaf(g, x, taps[0]);
#pragma unroll
      for (int s = 0; s < kStates; ++s) {
        const float2 state = keep[s * kThreads];
        if (there(s)) dx += m[s].x;
        of_k[0][s] = add_scaled(state, g, of_k[0][s]);
        of_p[0][s] = add_product(m[s], state, of_p[0][s]);
        m[s] = advanced(m[s], single(s), {system.k[0][s].x * g, system.k[0][s].y * g});
      }
      dx = lanes.sum(dx);
      if (here && lanes.group == 0) tile.dx[at * tile.dx_step] = from_float<T>(dx);
    }
    for (int at = whole - kAtOnce; at >= begin; at -= kAtOnce) {
      float owned[Warp::kOwned], x[kAtOnce], g[kAtOnce], dx[kAtOnce];
#pragma unroll
      for (int k = 0; k < Warp::kOwned; ++k) owned[k] = to_float(next[k]);
      lanes.hand_round(owned, x);
#pragma unroll
      for (int k = 0; k < Warp::kOwned; ++k) owned[k] = gradient_of(dy[k], before[k], op.gelu);
      fetch(at - kAtOnce);
      lanes.hand_round(owned, g);
#pragma unroll
      for (int four = kAtOnce - kTogether; four >= 0; four -= kTogether) {
        keep -= kStates * kThreads;
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          float sum = 0;
#pragma unroll
          for (int l = 0; k + l < kTogether; ++l) {
            sum = fmaf(system.impulse[l], g[four + k + l], sum);
            taps[l] = fmaf(g[four + k + l], x[four + k], taps[l]);
          }
          dx[four + k] = sum;
        }
#pragma unroll
        for (int s = 0; s < kStates; ++s) {
          const float2 state = keep[s * kThreads];
          dx[four + 3] += m[s].x;
#pragma unroll
          for (int k = 0; k < 3; ++k) {
            dx[four + k] = add_real(system.p[2 - k][s], m[s], dx[four + k]);
            of_p[2 - k][s] = add_scaled(m[s], x[four + k], of_p[2 - k][s]);
          }
          of_p[3][s] = add_product(m[s], state, of_p[3][s]);
#pragma unroll
          for (int j = 0; j < kTogether; ++j)
            of_k[j][s] = add_scaled(state, g[four + j], of_k[j][s]);
          m[s] = advanced(m[s], system.z4[s], driven_back(system, s, g + four));
        }
      }
      lanes.share_out(dx, owned);
      if (here && lanes.stores()) {
#pragma unroll
        for (int k = 0; k < Warp::kOwned; ++k)
          tile.dx[(at + k * Warp::kOwners + lanes.own) * tile.dx_step] = from_float<T>(owned[k]);
      }
    }
  }

  float* const partial =
      op.partial + static_cast<int64_t>(blockIdx.x) * (4 * op.of.n + 1) * d + channel;
  if (here && lanes.group == 0) partial[4 * op.of.n * d] = taps[0];
#pragma unroll
  for (int s = 0; s < kStates; ++s) {
    if (!there(s)) continue;
    if (!op.carry && op.dinitial) op.dinitial[op.in_tile(tile.p, first + s, channel)] = m[s];
    // Of a^{j+1}, K a^{j+1} and r_{j+1} = Re(K a^{j+1}) to a and K.
    float2 da = {0, 0}, dK = {taps[0], 0}, power = {1, 0};
    float2 K = op.table[(2 * static_cast<int64_t>(op.of.n) + first + s) * d + channel];
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      float2 of_power = add_product(K, of_k[j][s], times(power, of_p[j][s]));
      if (j < 3) of_power = add_scaled(K, taps[j + 1], of_power);
      da = add_scaled(of_power, static_cast<float>(j + 1), da);
      K = system.k[j][s];
      power = times(power, system.p[0][s]);
      dK = add_product(power, of_k[j][s], dK);
      if (j < 3) dK = add_scaled(power, taps[j + 1], dK);
    }
    float* const to = partial + 4 * static_cast<int64_t>(first + s) * d;
    to[0] = da.x, to[d] = da.y, to[2 * d] = dK.x, to[3 * d] = dK.y;
  }
}

struct ParameterGradients {
  float *log_A_real, *A_imag, *C, *log_dt, *D;
  int64_t A_real_stride, A_imag_stride, C_stride;
  double* delta;  // (n, d): of delta, each state's part
};

// Sums over tiles, in order: each of kSlices threads takes a run of them, then their sums are added
// in order. A state, or (i = n) D.
constexpr int kSlices = 8;
__global__ void __launch_bounds__(kSlices * 32)
    parameters_kernel(const S4dParameters of, const float* partial, int64_t tiles,
                      const ParameterGradients to) {
  __shared__ double slices[kSlices][4][32];
  const int64_t channel = blockIdx.x * 32 + threadIdx.x, rows = 4 * of.n + 1;
  const int i = blockIdx.y, count = i < of.n ? 4 : 1;
  double sum[4] = {};
  if (channel < of.d) {
    const int64_t begin = tiles * threadIdx.y / kSlices, end = tiles * (threadIdx.y + 1) / kSlices;
#pragma unroll 4
    for (int64_t tile = begin; tile < end; ++tile)
      for (int k = 0; k < count; ++k)
        sum[k] += static_cast<double>(partial[(tile * rows + 4 * i + k) * of.d + channel]);
  }
  for (int k = 0; k < 4; ++k) slices[threadIdx.y][k][threadIdx.x] = sum[k];
  __syncthreads();
  if (threadIdx.y > 0 || channel >= of.d) return;
  for (int s = 1; s < kSlices; ++s)
    for (int k = 0; k < 4; ++k) sum[k] += slices[s][k][threadIdx.x];
  if (i == of.n) {
    to.D[channel] += static_cast<float>(sum[0]);
    return;
  }
  // K = 2 C z/A:  dK = 2 z/A dC + (2 C delta a - K)/A dA + 2 C a ddelta
  const Complex da = {sum[0], sum[1]}, dK = {sum[2], sum[3]};
  const double delta = of.delta(channel);
  const Complex A = of.A(channel, i), C = of.C_at(channel, i), z = exp_minus_one(delta * A);
  const Complex a = {z.re + 1, z.im}, z_A = divided(z, A), C_a = 2 * (C * a);
  const Complex dC = 2 * (dK * z_A);
  const Complex dA = dK * divided(delta * C_a + -2 * (C * z_A), A) + delta * (da * a);
  const Complex ddelta = dK * C_a + da * (A * a);
  to.log_A_real[channel * to.A_real_stride + i] += static_cast<float>(A.re * dA.re);
  to.A_imag[channel * to.A_imag_stride + i] -= static_cast<float>(dA.im);
  float* const dC_at = to.C + channel * to.C_stride + 2 * i;
  dC_at[0] += static_cast<float>(dC.re);
  dC_at[1] -= static_cast<float>(dC.im);
  to.delta[i * of.d + channel] = ddelta.re;
}

__global__ void __launch_bounds__(kThreads)
    log_dt_kernel(const S4dParameters of, const ParameterGradients to) {
  const int64_t channel = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (channel >= of.d) return;
  double sum = 0;
#pragma unroll 8
  for (int i = 0; i < of.n; ++i) sum += to.delta[i * of.d + channel];
  to.log_dt[channel] += static_cast<float>(of.delta(channel) * sum);
}

// The gradient of each slot that is read: the sum over the pieces that read it, in order.
template <class T>
__global__ void __launch_bounds__(kThreads) initial_kernel(const ScanBack<T> op, int64_t slots) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t channel = index % op.of.d, slot = index / (op.of.d * op.of.n);
  const int i = static_cast<int>(index / op.of.d % op.of.n);
  if (slot >= slots) return;
  float2 sum = {0, 0};
  bool read = false;
  for (int p = 0; p < op.pieces_count; ++p) {
    if (op.pieces[p].from != slot) continue;
    sum = plus(sum, op.dinitial[op.in_tile(p, i, channel)]);
    read = true;
  }
  if (!read) return;
  float* const to = op.state_at(static_cast<int32_t>(slot), channel, i);
  to[0] = sum.x;
  to[1] = -sum.y;
}

template <int kLanes>
dim3 grid_of(int64_t tiles, int64_t d) {
  const int64_t slices = div_up(d, Lanes<kLanes>::kChannels);
  check(slices <= 65535, "s4d_scan backward: {} channels, expected less than 2^18", d);
  return {static_cast<unsigned>(tiles), static_cast<unsigned>(slices)};
}

}  // namespace

void CudaBackend::run(const S4dScanBackward& op) {
  const char* const name = "s4d_scan backward";
  check_s4d(name, *this, op);
  const int64_t t = op.rows->total(), d = op.x.cols(), n = op.A_imag.cols();
  const auto pieces = static_cast<int64_t>(op.rows->pieces().size());
  const auto here = [&](const char* operand, const View& view, DType dtype,
                        std::initializer_list<int64_t> shape) {
    expect(name, operand, view, dtype, shape);
    expect_here(name, operand, view, device());
  };
  check(op.checkpoints || t == 0, "{}: checkpoints are missing", name);
  check(op.before_gelu || !op.gelu || t == 0, "{}: before_gelu is missing", name);
  here("dy", op.dy, op.x.dtype, {t, d});
  here("dx", op.dx, op.x.dtype, {t, d});
  here("dlog_A_real", op.dlog_A_real, DType::f32, {d, n});
  here("dA_imag", op.dA_imag, DType::f32, {d, n});
  here("dC", op.dC, DType::f32, {d, n, 2});
  expect_pairs(name, "dC", op.dC, {d, n, 2});
  here("dlog_dt", op.dlog_dt, DType::f32, {d});
  here("dD", op.dD, DType::f32, {d});
  if (op.dstate) check_s4d_state(name, "dstate", *this, op.dstate, *op.rows, d, n);
  if (t * d * n == 0) return;

  const Tensor table(*this, DType::f32, {3, n, d, 2}), delta(*this, DType::f64, {n, d});
  Tensor dinitial;
  if (op.dstate) dinitial = Tensor(*this, DType::f32, {pieces, n, d, 2});
  cuda::with_type(name, op.x, [&](auto type) {
    using T = decltype(type);
    ScanBack<T> scan{};
    fill_s4d_operands(op, scan);
    scan.table = table.as<float2>();
    scan.dy = op.dy.as<T>();
    scan.dx = op.dx.as<T>();
    scan.dy_stride = op.dy.stride[0];
    scan.dx_stride = op.dx.stride[0];
    scan.dstate = op.dstate.as<float>();
    scan.slot_stride = op.dstate.stride[0];
    scan.state_stride = op.dstate.stride[1];
    scan.dinitial = dinitial.as<float2>();
    s4d_table_kernel<<<blocks_of(n * d), kThreads, 0, stream_>>>(scan.of, table.as<float2>());
    check_launch(name);
    with_lanes(n, kStates, [&](auto lanes) {
      const int64_t slices = div_up(d, Lanes<decltype(lanes)::value>::kChannels);
      scan.tile_length = s4d_tile_length(*op.rows, slices, kBlocks * int64_t{processors_});
    });
    const Rows::Tiles& tiles = op.rows->tiles(scan.tile_length);
    scan.first = tiles.first.as<int32_t>();
    const Tensor partial(*this, DType::f32, {tiles.count, 4 * n + 1, d});
    scan.partial = partial.as<float>();
    Tensor carry;
    if (tiles.count > pieces) {
      carry = Tensor(*this, DType::f32, {tiles.count, n, d, 2});
      scan.carry = carry.as<float2>();
      with_lanes(n, kLocalStates, [&](auto lanes) {
        constexpr int kLanes = decltype(lanes)::value;
        local_kernel<T, kLanes><<<grid_of<kLanes>(tiles.count, d), kThreads, 0, stream_>>>(scan);
      });
      check_launch(name);
      carry_back_kernel<T><<<blocks_of(pieces * n * d), kThreads, 0, stream_>>>(scan);
      check_launch(name);
    }
    with_lanes(n, kStates, [&](auto lanes) {
      constexpr int kLanes = decltype(lanes)::value;
      allow_shared(walk_kernel<T, kLanes>, kKeptBytes);
      walk_kernel<T, kLanes>
          <<<grid_of<kLanes>(tiles.count, d), kThreads, kKeptBytes, stream_>>>(scan);
    });
    check_launch(name);
    const ParameterGradients gradients{.log_A_real = op.dlog_A_real.as<float>(),
                                       .A_imag = op.dA_imag.as<float>(),
                                       .C = op.dC.as<float>(),
                                       .log_dt = op.dlog_dt.as<float>(),
                                       .D = op.dD.as<float>(),
                                       .A_real_stride = op.dlog_A_real.stride[0],
                                       .A_imag_stride = op.dA_imag.stride[0],
                                       .C_stride = op.dC.stride[0],
                                       .delta = delta.as<double>()};
    const dim3 of_states(static_cast<unsigned>(div_up(d, 32)), static_cast<unsigned>(n + 1));
    parameters_kernel<<<of_states, dim3(32, kSlices), 0, stream_>>>(scan.of, partial.as<float>(),
                                                                    tiles.count, gradients);
    log_dt_kernel<<<blocks_of(d), kThreads, 0, stream_>>>(scan.of, gradients);
    const int64_t slots = op.rows->slots();
    if (op.dstate && slots > 0)
      initial_kernel<T><<<blocks_of(slots * n * d), kThreads, 0, stream_>>>(scan, slots);
  });
  check_launch(name);
}

}  // namespace coil
