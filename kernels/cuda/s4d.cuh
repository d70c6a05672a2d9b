// What the forward and backward of S4D's scan share on a GPU (ops.h has the equation, s4d_scan.cc
// of the CPU how four steps go at once): tables of powers, who holds what, the checks of operands.
//
// A channel's states lie in the registers of kLanes lanes of a warp, a few each; 32 / kLanes
// channels lie side by side. Eight steps are read at once: lanes of a channel fetch one or more
// each, hand them round, and share out the sums over states in the same way, so that no activation
// goes through shared memory. Steps that are left over, and decoding, go one by one.
#pragma once

#include "kernels/cuda/fast_math.cuh"

namespace coil::cuda {

constexpr int kThreads = 128;
constexpr int kAtOnce = 8;    // steps
constexpr int kTogether = 4;  // steps of one update of a state
constexpr int64_t kMostStates = 128;
static_assert(kS4dBlock % kAtOnce == 0);

// A complex number is a float2; products of one with a real.
__device__ inline float2 times(float2 a, float2 b) {
  return {fmaf(-a.y, b.y, a.x * b.x), fmaf(a.x, b.y, a.y * b.x)};
}
__device__ inline float2 plus(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ inline float2 add_scaled(float2 a, float by, float2 sum) {
  return {fmaf(a.x, by, sum.x), fmaf(a.y, by, sum.y)};
}
__device__ inline float add_real(float2 a, float2 b, float sum) {  // sum + Re(a b)
  return fmaf(-a.y, b.y, fmaf(a.x, b.x, sum));
}
__device__ inline float2 add_product(float2 a, float2 b, float2 sum) {
  return {add_real(a, b, sum.x), fmaf(a.x, b.y, fmaf(a.y, b.x, sum.y))};
}
// h + z h + more, h added last: one rounding of its size.
__device__ inline float2 advanced(float2 h, float2 z, float2 more) {
  return plus(h, add_product(z, h, more));
}

// The parameters of a state in f64; z = a - 1 is exact where a is close to 1.
struct Complex {
  double re, im;
};
__device__ inline Complex operator*(Complex a, Complex b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
__device__ inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
__device__ inline Complex operator*(double a, Complex b) { return {a * b.re, a * b.im}; }
__device__ inline Complex exp_minus_one(Complex w) {
  double sine, cosine;
  sincos(w.im / 2, &sine, &cosine);
  const double less = expm1(w.re), twice = 2 * sine * (less + 1);
  return {less - twice * sine, twice * cosine};
}

struct S4dParameters {
  const float *log_A_real, *A_imag, *C, *log_dt, *D;  // (d,n) (d,n) (d,n,2) (d) (d)
  int64_t A_real_stride, A_imag_stride, C_stride;
  int n;
  int64_t d;

  __device__ Complex A(int64_t channel, int i) const {
    return {-exp(static_cast<double>(log_A_real[channel * A_real_stride + i])),
            static_cast<double>(A_imag[channel * A_imag_stride + i])};
  }
  __device__ Complex C_at(int64_t channel, int i) const {
    const float* const at = C + channel * C_stride + 2 * i;
    return {static_cast<double>(at[0]), static_cast<double>(at[1])};
  }
  __device__ double delta(int64_t channel) const {
    return exp(static_cast<double>(log_dt[channel]));
  }
  // a^steps - 1.
  __device__ float2 power(int64_t channel, int i, int64_t steps) const {
    const Complex z = exp_minus_one(static_cast<double>(steps) * delta(channel) * A(channel, i));
    return {static_cast<float>(z.re), static_cast<float>(z.im)};
  }
};
__device__ inline Complex divided(Complex a, Complex b) {
  const double square = b.re * b.re + b.im * b.im;
  return (1 / square) * (a * Complex{b.re, -b.im});
}

// table (3, n, d) of complex numbers: a - 1, a^4 - 1, K = 2 C (a - 1) / A.
static __global__ void __launch_bounds__(kThreads)
    s4d_table_kernel(const S4dParameters of, float2* table) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= of.n * of.d) return;
  const int64_t channel = index % of.d;
  const int i = static_cast<int>(index / of.d);
  const Complex A = of.A(channel, i), z = exp_minus_one(of.delta(channel) * A);
  const Complex K = 2 * (of.C_at(channel, i) * divided(z, A));
  const float2 z4 = of.power(channel, i, kTogether);
  const int64_t size = of.n * of.d;
  table[index] = {static_cast<float>(z.re), static_cast<float>(z.im)};
  table[size + index] = z4;
  table[2 * size + index] = {static_cast<float>(K.re), static_cast<float>(K.im)};
}

// Operands of both directions. Arrays of tiles are (tiles, n, d) of complex numbers.
template <class T>
struct S4dOperands {
  S4dParameters of;
  const float2* table;
  const T* x;  // (t,d)
  int64_t x_stride;
  T* before;  // (t,d) or null: y before GELU
  int64_t before_stride;
  const Piece* pieces;
  const int32_t* first;  // first tile of each piece
  int pieces_count;
  int64_t tile_length;
  bool reverse, gelu;
  float2* checkpoints;              // (checkpoints, n, d) or null
  const int32_t* first_checkpoint;  // of each piece
  float2* carry;                    // (tiles, n, d) or null: what tiles end in, then begin with

  __device__ int64_t row(const Piece& piece, int64_t step) const {
    return piece.begin + (reverse ? piece.length - 1 - step : step);
  }
  __device__ int64_t in_tile(int64_t tile, int i, int64_t channel) const {
    return (tile * of.n + i) * of.d + channel;
  }
};

// Some states of a channel, what a thread has of them, and its part of the response among four
// steps: r_l = sum over its states of Re(K a^l), and D in r_0 of one of the lanes.
template <int kStates>
struct System {
  float2 z4[kStates], p[3][kStates], k[4][kStates];  // a^4 - 1, a^1…3, K a^1…4
  float impulse[4];

  // Of states that are not there a = K = 0.
  template <class T>
  __device__ void load(const S4dOperands<T>& op, int64_t channel, int first, bool with_D) {
    const int64_t size = op.of.n * op.of.d;
#pragma unroll
    for (int l = 0; l < 4; ++l) impulse[l] = 0;
    if (with_D && channel < op.of.d) impulse[0] = op.of.D[channel];
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      float2 z = {-1, 0}, K = {0, 0};
      z4[s] = z;
      if (channel < op.of.d && first + s < op.of.n) {
        const int64_t at = (first + s) * op.of.d + channel;
        z = op.table[at];
        z4[s] = op.table[size + at];
        K = op.table[2 * size + at];
      }
      const float2 a = {z.x + 1, z.y};
      p[0][s] = a;
      p[1][s] = times(a, a);
      p[2][s] = times(p[1][s], a);
      impulse[0] += K.x;
#pragma unroll
      for (int l = 0; l < 4; ++l) {
        K = times(K, a);
        k[l][s] = K;
        if (l < 3) impulse[l + 1] += K.x;
      }
    }
  }
  // h after four steps.
  __device__ float2 driven(int s, float2 h, const float* x) const {
    const float2 two = {fmaf(p[0][s].x, x[2], x[3]), p[0][s].y * x[2]};
    return advanced(h, z4[s], add_scaled(p[2][s], x[0], add_scaled(p[1][s], x[1], two)));
  }
};

// A warp: channel `across` of it and lane `group` of that channel, which owns kOwned of every
// kAtOnce steps: group, group + kOwners, … Above kAtOnce lanes, several own the same.
template <int kLanes>
struct Lanes {
  static constexpr int kAcross = 32 / kLanes;
  static constexpr int kOwners = kLanes < kAtOnce ? kLanes : kAtOnce;
  static constexpr int kOwned = kAtOnce / kOwners;
  static constexpr int kChannels = kThreads / kLanes;  // of a block
  int across, group, own;

  __device__ Lanes() {
    across = threadIdx.x % kAcross;
    group = threadIdx.x % 32 / kAcross;
    own = group % kOwners;
  }
  __device__ int64_t channel() const {
    return blockIdx.y * static_cast<int64_t>(kChannels) + threadIdx.x / 32 * kAcross + across;
  }
  __device__ bool stores() const { return group < kOwners; }
  // This lane's steps of eight, the first at `from`.
  template <class T>
  __device__ void fetch(const T* from, int64_t stride, bool there, T (&to)[kOwned]) const {
#pragma unroll
    for (int m = 0; m < kOwned; ++m) to[m] = there ? from[m * kOwners * stride] : from_float<T>(0);
  }
  // All eight, from those who own them.
  __device__ void hand_round(const float (&owned)[kOwned], float (&all)[kAtOnce]) const {
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j)
      all[j] = kLanes == 1 ? owned[j / kOwners]
                           : __shfl_sync(~0u, owned[j / kOwners], j % kOwners * kAcross + across);
  }
  // The sum over lanes of each step, to its owner. In each round a lane hands on half of its sums.
  __device__ void share_out(float (&sums)[kAtOnce], float (&owned)[kOwned]) const {
#pragma unroll
    for (int half = kOwners / 2; half > 0; half /= 2) {
      const bool upper = group & half;
#pragma unroll
      for (int m = 0; m < kOwned; ++m)
#pragma unroll
        for (int j = 0; j < half; ++j) {
          const float low = sums[m * kOwners + j], high = sums[m * kOwners + j + half];
          sums[m * kOwners + j] =
              (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, half * kAcross);
        }
    }
#pragma unroll
    for (int m = 0; m < kOwned; ++m) {
      owned[m] = sums[m * kOwners];
#pragma unroll
      for (int far = kAtOnce; far < kLanes; far *= 2)
        owned[m] += __shfl_xor_sync(~0u, owned[m], far * kAcross);
    }
  }
  // The sum of a step, to all lanes.
  __device__ float sum(float x) const {
#pragma unroll
    for (int far = 1; far < kLanes; far *= 2) x += __shfl_xor_sync(~0u, x, far * kAcross);
    return x;
  }
};

// Calls f with the number of lanes, a constant, for n states of which each lane has some.
template <class F>
void with_lanes(int64_t n, int64_t states, F&& f) {
  const int64_t lanes = div_up(n, states);
  if (lanes <= 1) return f(std::integral_constant<int, 1>{});
  if (lanes <= 2) return f(std::integral_constant<int, 2>{});
  if (lanes <= 4) return f(std::integral_constant<int, 4>{});
  if (lanes <= 8) return f(std::integral_constant<int, 8>{});
  if (lanes <= 16) return f(std::integral_constant<int, 16>{});
  return f(std::integral_constant<int, 32>{});
}

// g, the gradient of y before GELU.
template <class T>
__device__ float gradient_of(T dy, T before, bool gelu) {
  float slope = 1;
  if (gelu) gelu_of(to_float(before), &slope);
  return to_float(dy) * slope;
}

// Steps of a tile, a multiple of kS4dBlock: whole pieces where they fill the card or are short;
// else so long that blocks of threads come in whole waves of `at_once`.
inline int64_t s4d_tile_length(const Rows& rows, int64_t channel_blocks, int64_t at_once) {
  int64_t longest = 1;
  for (const Piece& piece : rows.pieces()) longest = std::max(longest, piece.length);
  const int64_t whole = div_up(longest, kS4dBlock) * kS4dBlock;
  const auto pieces = static_cast<int64_t>(rows.pieces().size());
  if (whole <= 4 * kS4dBlock || pieces * channel_blocks >= at_once) return whole;
  constexpr int64_t kBegin = 64;  // a block's beginning takes as long as about so many steps
  int64_t best = 0, best_cost = 0;
  for (int64_t length = 4 * kS4dBlock; length <= 64 * kS4dBlock; length += kS4dBlock) {
    const int64_t tiles = rows.total() / length + (pieces + 1) / 2;
    const int64_t cost = div_up(tiles * channel_blocks, at_once) * (length + kBegin);
    if (best == 0 || cost < best_cost) best = length, best_cost = cost;
  }
  return std::min(best, whole);
}

inline void check_s4d_state(const char* name, const char* operand, const CudaBackend& backend,
                            const View& state, const Rows& rows, int64_t d, int64_t n) {
  expect_rank(name, operand, state, 4);
  expect_pairs(name, operand, state, {state.rows(), d, n, 2});
  expect_here(name, operand, state, backend.device());
  coil::check(state.rows() >= rows.slots(), "{}: {} is {}, expected {} slots or more", name,
              operand, state.shape(), rows.slots());
}

template <class Op>
void check_s4d(const char* name, const CudaBackend& backend, const Op& op) {
  coil::check(op.rows != nullptr, "{}: rows are missing", name);
  coil::check(op.rows->device_pieces() != nullptr, "{}: rows are of the host", name);
  expect_rank(name, "x", op.x, 2);
  expect_rank(name, "A_imag", op.A_imag, 2);
  const int64_t t = op.rows->total(), d = op.x.cols(), n = op.A_imag.cols();
  const DType act = activation(op.x);
  const auto here = [&](const char* operand, const View& view, DType dtype,
                        std::initializer_list<int64_t> shape) {
    expect(name, operand, view, dtype, shape);
    expect_here(name, operand, view, backend.device());
  };
  here("x", op.x, act, {t, d});
  here("log_A_real", op.log_A_real, DType::f32, {d, n});
  here("A_imag", op.A_imag, DType::f32, {d, n});
  here("C", op.C, DType::f32, {d, n, 2});
  expect_pairs(name, "C", op.C, {d, n, 2});
  here("log_dt", op.log_dt, DType::f32, {d});
  here("D", op.D, DType::f32, {d});
  coil::check(n <= kMostStates, "{}: {} states, expected at most {}", name, n, kMostStates);
  if (op.checkpoints) {
    here("checkpoints", op.checkpoints, DType::f32, {s4d_checkpoints(*op.rows), d, n, 2});
    coil::check(op.checkpoints.contiguous(), "{}: checkpoints are not contiguous", name);
  }
  coil::check(!op.reverse || op.rows->slots() == 0,
              "{}: a piece carries state, expected whole sequences with reverse", name);
  coil::check(op.gelu || !op.before_gelu, "{}: before_gelu is given without gelu", name);
  if (op.before_gelu) here("before_gelu", op.before_gelu, act, {t, d});
}

template <class T, class Op>
void fill_s4d_operands(const Op& op, S4dOperands<T>& to) {
  to.of = {.log_A_real = op.log_A_real.template as<float>(),
           .A_imag = op.A_imag.template as<float>(),
           .C = op.C.template as<float>(),
           .log_dt = op.log_dt.template as<float>(),
           .D = op.D.template as<float>(),
           .A_real_stride = op.log_A_real.stride[0],
           .A_imag_stride = op.A_imag.stride[0],
           .C_stride = op.C.stride[0],
           .n = static_cast<int>(op.A_imag.cols()),
           .d = op.x.cols()};
  to.x = op.x.template as<T>();
  to.x_stride = op.x.stride[0];
  to.before = op.before_gelu.template as<T>();
  to.before_stride = op.before_gelu.stride[0];
  to.pieces = op.rows->device_pieces();
  to.pieces_count = static_cast<int>(op.rows->pieces().size());
  to.reverse = op.reverse;
  to.gelu = op.gelu;
  to.checkpoints = op.checkpoints.template as<float2>();
  to.first_checkpoint =
      op.checkpoints ? op.rows->tiles(kS4dBlock).first.template as<int32_t>() : nullptr;
}

inline unsigned blocks_of(int64_t threads) {
  return static_cast<unsigned>(div_up(threads, kThreads));
}

}  // namespace coil::cuda
