// What S4D's scan needs of its parameters (ops.h has the equation), made anew in every call: its
// tables of powers, and in backward the way from gradients of a and of K = 2 C (a - 1) / A to those
// of the parameters. In f64, since an error of a power would add up over the thousands of steps
// that a state remembers. Included once per Highway target, after scan_blocks-inl.h.
//
// Recurrences use z = a - 1 rather than a: near 1, where a has 24 bits, z has 24 of its own.
#if defined(COIL_S4D_TABLES_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef COIL_S4D_TABLES_TARGET_
#undef COIL_S4D_TABLES_TARGET_
#else
#define COIL_S4D_TABLES_TARGET_
#endif

#include <algorithm>
#include <cmath>

#include "kernels/cpu/scan_blocks-inl.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {

using DoubleTag = hn::ScalableTag<double>;
using W = hn::Vec<DoubleTag>;
constexpr DoubleTag wide;
constexpr int64_t kWide = hn::MaxLanes(DoubleTag());
using HalfTag = hn::Rebind<float, DoubleTag>;
constexpr HalfTag half;

// Of complex numbers, in f32 or f64.
template <class V>
struct Complex {
  V re, im;
};
template <class V>
HWY_INLINE Complex<V> operator*(Complex<V> a, Complex<V> b) {
  return {hn::NegMulAdd(a.im, b.im, hn::Mul(a.re, b.re)),
          hn::MulAdd(a.re, b.im, hn::Mul(a.im, b.re))};
}
template <class V>
HWY_INLINE Complex<V> operator+(Complex<V> a, Complex<V> b) {
  return {hn::Add(a.re, b.re), hn::Add(a.im, b.im)};
}
template <class V>
HWY_INLINE Complex<V> operator-(Complex<V> a, Complex<V> b) {
  return {hn::Sub(a.re, b.re), hn::Sub(a.im, b.im)};
}
template <class V>
HWY_INLINE Complex<V> scaled(Complex<V> a, V by) {
  return {hn::Mul(a.re, by), hn::Mul(a.im, by)};
}

// c[0] + c[1] x + …
template <int kTerms>
HWY_INLINE W polynomial(W x, const double (&c)[kTerms]) {
  W sum = hn::Set(wide, c[kTerms - 1]);
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 0; --i) sum = hn::MulAdd(sum, x, hn::Set(wide, c[i]));
  return sum;
}

// e^x - 1 to a relative 1e-11, for x from -600 to 600; NaN stays.
HWY_INLINE W exp_minus_one(W x) {
  static constexpr double kTaylor[] = {1,        1. / 2,    1. / 6,     1. / 24,     1. / 120,
                                       1. / 720, 1. / 5040, 1. / 40320, 1. / 362880, 1. / 3628800};
  const W most = hn::Set(wide, 600), least = hn::Set(wide, -600);
  x = hn::IfThenElse(hn::Lt(x, least), least, hn::IfThenElse(hn::Gt(x, most), most, x));
  const W k = hn::Round(hn::Mul(x, hn::Set(wide, 1.4426950408889634)));
  const W r = hn::NegMulAdd(k, hn::Set(wide, 0.6931471805599453), x);
  const W power = hn::Mul(r, polynomial(r, kTaylor));
  // The sum's lowest bits are k + 1023, the exponent field of 2^k.
  const hn::RebindToSigned<DoubleTag> bits;
  const W shifted = hn::Add(k, hn::Set(wide, 6755399441055744. + 1023));
  const W two_k = hn::BitCast(wide, hn::ShiftLeft<52>(hn::BitCast(bits, shifted)));
  return hn::MulAdd(power, two_k, hn::Sub(two_k, hn::Set(wide, 1)));
}

// e^w - 1 = (e^x - 1) - 2 sin^2(y/2) e^x + i sin(y) e^x.
HWY_INLINE Complex<W> exp_minus_one(Complex<W> w) {
  static constexpr double kSine[] = {
      1,           -1. / 6,        1. / 120,        -1. / 5040,
      1. / 362880, -1. / 39916800, 1. / 6227020800, -1. / 1307674368000};
  static constexpr double kCosine[] = {1,
                                       -1. / 2,
                                       1. / 24,
                                       -1. / 720,
                                       1. / 40320,
                                       -1. / 3628800,
                                       1. / 479001600,
                                       -1. / 87178291200,
                                       1. / 20922789888000};
  // y/2 less a multiple of pi: sin^2 and sin cos have no other period.
  const W y = hn::Mul(w.im, hn::Set(wide, 0.5));
  const W turns = hn::Round(hn::Mul(y, hn::Set(wide, 0.3183098861837907)));
  const W r = hn::NegMulAdd(turns, hn::Set(wide, 3.141592653589793), y), square = hn::Mul(r, r);
  const W sine = hn::Mul(r, polynomial(square, kSine)), cosine = polynomial(square, kCosine);
  const W less = exp_minus_one(w.re), two = hn::Set(wide, 2);
  const W twice = hn::Mul(two, hn::Mul(sine, hn::Add(less, hn::Set(wide, 1))));  // 2 sin e^x
  return {hn::NegMulAdd(twice, sine, less), hn::Mul(twice, cosine)};
}

// kWide states of a channel from state i on; past n, of some system that is stable.
struct Discrete {
  Complex<W> A, C, a, z, z_A, K;  // z = a - 1, z_A = z / A, K = 2 C z / A
};
template <class Op>
HWY_INLINE Discrete discretise(const Op& op, int64_t channel, int64_t i, double delta) {
  const int64_t states = std::min(kWide, op.A_imag.cols() - i);
  const float* real = op.log_A_real.template row<float>(channel) + i;
  const float* imag = op.A_imag.template row<float>(channel) + i;
  const float* C = op.C.template row<float>(channel) + 2 * i;
  HWY_ALIGN float part[4 * kLanes] = {};
  if (states < kWide) {
    std::copy_n(C, 2 * states, part);
    std::copy_n(real, states, part + 2 * kLanes);
    std::copy_n(imag, states, part + 3 * kLanes);
    C = part;
    real = part + 2 * kLanes;
    imag = part + 3 * kLanes;
  }
  hn::Vec<HalfTag> C_real, C_imag;
  hn::LoadInterleaved2(half, C, C_real, C_imag);
  const W one = hn::Set(wide, 1);
  Discrete result;
  result.A = {hn::Neg(hn::Add(exp_minus_one(hn::PromoteTo(wide, hn::LoadU(half, real))), one)),
              hn::PromoteTo(wide, hn::LoadU(half, imag))};
  result.C = {hn::PromoteTo(wide, C_real), hn::PromoteTo(wide, C_imag)};
  result.z = exp_minus_one(scaled(result.A, hn::Set(wide, delta)));
  result.a = {hn::Add(result.z.re, one), result.z.im};
  const W square = hn::MulAdd(result.A.re, result.A.re, hn::Mul(result.A.im, result.A.im));
  result.z_A =
      scaled(result.z * Complex<W>{result.A.re, hn::Neg(result.A.im)}, hn::Div(one, square));
  result.K = scaled(result.C * result.z_A, hn::Set(wide, 2));
  return result;
}

HWY_INLINE double delta_of(const View& log_dt, int64_t channel) {
  return std::exp(static_cast<double>(log_dt.as<float>()[channel]));
}

// z, z of four steps and K of a channel's states: to[k][…], k real and imaginary parts in turn,
// each of `stride` floats, at least n rounded up to kWide.
template <class Op>
HWY_INLINE void discretise_channel(const Op& op, int64_t channel, float* to, int64_t stride) {
  const double delta = delta_of(op.log_dt, channel);
  const W two = hn::Set(wide, 2);
  const auto more = [&](Complex<W> z) HWY_ATTR {  // of twice the steps: (1 + z)^2 - 1
    return z * Complex<W>{hn::Add(z.re, two), z.im};
  };
  for (int64_t i = 0; i < op.A_imag.cols(); i += kWide) {
    const Discrete part = discretise(op, channel, i, delta);
    const Complex<W> z4 = more(more(part.z));
    int64_t k = 0;
    for (const W& value : {part.z.re, part.z.im, z4.re, z4.im, part.K.re, part.K.im})
      hn::StoreU(hn::DemoteTo(half, value), half, to + k++ * stride + i);
  }
}

// Tables of a block of channels: (n, kEntries, lanes), each a complex number: a^k, a^k - 1, K a^k.
enum Entry { kZ1 = 0, kZ4 = 2, kP1 = 4, kP2 = 6, kP3 = 8, kK = 10, kEntries = 20 };
HWY_INLINE Complex<V> entry(const float* table, int at) {
  return {hn::Load(d, table + at * kLanes), hn::Load(d, table + (at + 1) * kLanes)};
}
HWY_INLINE void set_entry(Complex<V> value, float* table, int at) {
  hn::Store(value.re, d, table + at * kLanes);
  hn::Store(value.im, d, table + (at + 1) * kLanes);
}

// And the first four steps of the response, with D: impulse (4, lanes). `memory`: 6 strides.
template <class Op>
void load_tables(const Op& op, int64_t channel, int64_t valid, float* table, float* impulse,
                 float* memory, int64_t stride) {
  const int64_t n = op.A_imag.cols();
  std::fill_n(table, n * kEntries * kLanes, 0.f);
  for (int64_t lane = 0; lane < valid; ++lane) {
    discretise_channel(op, channel + lane, memory, stride);
    for (int64_t i = 0; i < n; ++i) {
      float* const to = table + i * kEntries * kLanes + lane;
      for (int k = 0; k < 2; ++k) {
        to[(kZ1 + k) * kLanes] = memory[k * stride + i];
        to[(kZ4 + k) * kLanes] = memory[(2 + k) * stride + i];
        to[(kK + k) * kLanes] = memory[(4 + k) * stride + i];
      }
    }
  }
  V response[4] = {load_part(d, op.D.template as<float>() + channel, valid), hn::Zero(d),
                   hn::Zero(d), hn::Zero(d)};
  const V one = hn::Set(d, 1.0f);
  for (int64_t i = 0; i < n; ++i) {
    float* const to = table + i * kEntries * kLanes;
    Complex<V> power = entry(to, kZ1), K = entry(to, kK);
    power.re = hn::Add(power.re, one);
    const Complex<V> first = power;
    for (int k = 1; k <= 4; ++k) {
      response[k - 1] = hn::Add(response[k - 1], K.re);
      K = K * first;
      set_entry(K, to, kK + 2 * k);
      if (k == 4) break;
      set_entry(power, to, kP1 + 2 * (k - 1));
      power = power * first;
    }
  }
  for (int k = 0; k < 4; ++k) hn::Store(response[k], d, impulse + k * kLanes);
}

// From sums (groups, d, 4 n + 1), per channel and state Re and Im of the gradients of a and K, the
// loss growing by Re(da grad), and that of D, to the gradients of the parameters of a channel.
inline void add_parameter_gradients(const S4dScanBackward& op, const float* sums, int64_t groups,
                                    int64_t channel) {
  const int64_t n = op.A_imag.cols(), size = 4 * n + 1;
  const double delta = delta_of(op.log_dt, channel);
  const W step = hn::Set(wide, delta), two = hn::Set(wide, 2);
  double ddelta = 0;
  for (int64_t i = 0; i < n; i += kWide) {
    const int64_t states = std::min(kWide, n - i);
    HWY_ALIGN double sum[4][kWide] = {};
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t k = 0; k < states; ++k)
        for (int64_t j = 0; j < 4; ++j)
          sum[j][k] += sums[(g * op.x.cols() + channel) * size + (i + k) * 4 + j];
    const Complex<W> da = {hn::Load(wide, sum[0]), hn::Load(wide, sum[1])};
    const Complex<W> dK = {hn::Load(wide, sum[2]), hn::Load(wide, sum[3])};
    const Discrete of = discretise(op, channel, i, delta);
    // dK = 2 z/A dC + 2 C/A (delta a - z/A) dA + 2 C a ddelta,  da = delta a dA + A a ddelta
    const Complex<W> dC = scaled(dK * of.z_A, two);
    const Complex<W> C_a = scaled(of.C * of.a, two);
    const W square =
        hn::Div(hn::Set(wide, 1), hn::MulAdd(of.A.re, of.A.re, hn::Mul(of.A.im, of.A.im)));
    const Complex<W> inverse = {hn::Mul(of.A.re, square), hn::Neg(hn::Mul(of.A.im, square))};
    const Complex<W> to_A = (scaled(C_a, step) - of.K) * inverse;
    const Complex<W> dA = dK * to_A + scaled(da * of.a, step);
    const Complex<W> dstep = dK * C_a + da * (of.A * of.a);
    HWY_ALIGN double out[5][kWide];
    hn::Store(hn::Mul(of.A.re, dA.re), wide, out[0]);  // A_real = -exp(log_A_real)
    hn::Store(dA.im, wide, out[1]);
    hn::Store(dC.re, wide, out[2]);
    hn::Store(dC.im, wide, out[3]);
    hn::Store(dstep.re, wide, out[4]);
    for (int64_t k = 0; k < states; ++k) {
      op.dlog_A_real.row<float>(channel)[i + k] += static_cast<float>(out[0][k]);
      op.dA_imag.row<float>(channel)[i + k] -= static_cast<float>(out[1][k]);
      op.dC.row<float>(channel)[2 * (i + k)] += static_cast<float>(out[2][k]);
      op.dC.row<float>(channel)[2 * (i + k) + 1] -= static_cast<float>(out[3][k]);
      ddelta += out[4][k];
    }
  }
  op.dlog_dt.as<float>()[channel] += static_cast<float>(delta * ddelta);
  for (int64_t g = 0; g < groups; ++g)
    op.dD.as<float>()[channel] += sums[(g * op.x.cols() + channel) * size + 4 * n];
}

}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
