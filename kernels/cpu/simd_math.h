// SIMD exp2, exp, softplus and sigmoid of the CPU kernels, and loads and stores of part of a
// vector. To be included once per Highway target, after hwy/foreach_target.h. Largest relative
// errors over -80 to 80 (exp2: -125 to 126), AVX-512, AVX2 and SSE4 alike: exp2 2e-7, exp 2.3e-7,
// softplus 3e-7, its slope 3e-7, also where the result is small (a delta of 1e-4 is ordinary in a
// selective scan); sigmoid 7e-7 above -10 and 4e-6 at -80. NaN in gives NaN out.
#ifndef COIL_KERNELS_CPU_SIMD_MATH_H_
#define COIL_KERNELS_CPU_SIMD_MATH_H_

#include <hwy/base.h>
#if HWY_ARCH_X86
#include <xmmintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace coil {

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// Flushes subnormal numbers to zero while it lives: a state that decays to nothing would otherwise
// take 150 cycles an operation.
class FlushDenormals {
 public:
  FlushDenormals() {
#if HWY_ARCH_X86
    saved_ = _mm_getcsr();
    _mm_setcsr(saved_ | 0x8040);  // FTZ and DAZ
#endif
  }
  ~FlushDenormals() {
#if HWY_ARCH_X86
    _mm_setcsr(saved_);
#endif
  }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_ = 0;
};

}  // namespace coil
#endif  // COIL_KERNELS_CPU_SIMD_MATH_H_

#if defined(COIL_SIMD_MATH_TARGET_) == defined(HWY_TARGET_TOGGLE)
#ifdef COIL_SIMD_MATH_TARGET_
#undef COIL_SIMD_MATH_TARGET_
#else
#define COIL_SIMD_MATH_TARGET_
#endif

#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// The greater of x and a bound, and NaN where x is NaN. (Max alone gives its second operand there
// on x86, but not on every target.)
template <class D, class V>
HWY_INLINE V at_least(D d, float bound, V x) {
#if HWY_TARGET == HWY_EMU128 || HWY_TARGET == HWY_SCALAR
  return hn::IfThenElse(hn::Lt(x, hn::Set(d, bound)), hn::Set(d, bound), x);
#else
  return hn::Max(hn::Set(d, bound), x);
#endif
}

// 2^f for f in [0, 1]: minimax of relative error 9.2e-8 among the polynomials that are exact at 0
// and at 1, so that a decay close to 1 is not biased over many steps.
template <class D, class V>
HWY_INLINE V exp2_fraction(D d, V f) {
  V p = hn::MulAdd(hn::Set(d, 0.0018793188308999724f), f, hn::Set(d, 0.008990994647461278f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.055818676333802345f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.24015927134729967f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.6931517388405367f));
  return hn::MulAdd(p, f, hn::Set(d, 1.0f));
}

// p * 2^n for whole n; below 2^-126 the result is 0 or of the order of 2^-126. n at most 127.
template <class D, class V>
HWY_INLINE V scale_by_power(D d, V p, V n) {
#if HWY_TARGET == HWY_AVX3
  (void)d;
  return V{_mm512_scalef_ps(p.raw, n.raw)};
#else
  // As a product, so that NaN stays. The sum's lowest bits are n + 127, the exponent field of 2^n.
  const hn::RebindToSigned<D> di;
  const V shifted = hn::Add(at_least(d, -126.0f, n), hn::Set(d, 12582912.0f + 127.0f));
  return hn::Mul(p, hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(di, shifted))));
#endif
}

// 2^x for x at most 127; 0 or about 2^-126 below -126.
template <class D, class V>
HWY_INLINE V exp2(D d, V x) {
#if HWY_TARGET == HWY_AVX3
  const V fraction{_mm512_reduce_ps(x.raw, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  return V{
      _mm512_scalef_ps(exp2_fraction(d, fraction).raw, x.raw)};  // scalef takes the floor itself
#else
  x = at_least(d, -126.0f, x);
  const V n = hn::Floor(x);
  return scale_by_power(d, exp2_fraction(d, hn::Sub(x, n)), n);
#endif
}

// e^x for x at most 87: 2^n e^r, where n log 2 is taken off in two parts (Cody and Waite), as the
// rounding of x log2(e) would cost 4e-7 at x = -10.
template <class D, class V>
HWY_INLINE V exp(D d, V x) {
#if HWY_TARGET != HWY_AVX3
  x = at_least(d, -87.0f, x);
#endif
  const V log2e = hn::Set(d, kLog2e);
  const V n = hn::Floor(hn::Mul(x, log2e));
  const V r =
      hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), hn::NegMulAdd(n, hn::Set(d, 0.693359375f), x));
  return scale_by_power(d, exp2_fraction(d, hn::Mul(r, log2e)), n);
}

// 1 / x for x of 1 to 2^126. AVX-512's estimate of 14 bits and a Newton step take 4 operations, a
// division 9 cycles.
template <class D, class V>
HWY_INLINE V reciprocal(D d, V x) {
#if HWY_TARGET == HWY_AVX3
  const V estimate = hn::ApproximateReciprocal(x);
  return hn::MulAdd(estimate, hn::NegMulAdd(x, estimate, hn::Set(d, 1.0f)), estimate);
#else
  return hn::Div(hn::Set(d, 1.0f), x);
#endif
}

template <class D, class V>
HWY_INLINE V sigmoid(D d, V x) {
  const V power = exp2(d, hn::Mul(at_least(d, -87.0f, x), hn::Set(d, -kLog2e)));
  return reciprocal(d, hn::Add(hn::Set(d, 1.0f), power));
}

// log1p(u) for u in [0, 1]: u times a minimax polynomial for log1p(u) / u of relative error 4.7e-9,
// plus `more`.
template <class D, class V>
HWY_INLINE V log1p_plus(D d, V u, V more) {
  V p = hn::MulAdd(hn::Set(d, -0.0032439805594012446f), u, hn::Set(d, 0.01985125394997478f));
  p = hn::MulAdd(p, u, hn::Set(d, -0.056959126142502745f));
  p = hn::MulAdd(p, u, hn::Set(d, 0.10603611462571036f));
  p = hn::MulAdd(p, u, hn::Set(d, -0.15305565400282417f));
  p = hn::MulAdd(p, u, hn::Set(d, 0.19675929163699077f));
  p = hn::MulAdd(p, u, hn::Set(d, -0.24954131527403114f));
  p = hn::MulAdd(p, u, hn::Set(d, 0.3332996219149118f));
  p = hn::MulAdd(p, u, hn::Set(d, -0.499999024142843f));
  p = hn::MulAdd(p, u, hn::Set(d, 0.9999999952875124f));
  return hn::MulAdd(p, u, more);
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|).
template <class D, class V>
HWY_INLINE V softplus(D d, V x) {
  return log1p_plus(d, exp(d, hn::Neg(hn::Abs(x))), at_least(d, 0.0f, x));
}

// The same with its derivative, sigmoid(x).
template <class D, class V>
HWY_INLINE V softplus(D d, V x, V& slope) {
  const V u = exp(d, hn::Neg(hn::Abs(x))), one = hn::Set(d, 1.0f);
  slope = hn::Mul(hn::IfThenElse(hn::Lt(x, hn::Zero(d)), u, one), reciprocal(d, hn::Add(one, u)));
  return log1p_plus(d, u, at_least(d, 0.0f, x));
}

// x Phi(x), Phi the normal distribution, and its derivative: GELU (Hendrycks and Gimpel 2016) by
// Abramowitz and Stegun's 7.1.26 for erfc, whose error of 1.5e-7 is half that of Phi.
template <class D, class V>
HWY_INLINE V gelu(D d, V x, V* slope = nullptr) {
  const V one = hn::Set(d, 1.0f), most = hn::Set(d, 12.0f);  // beyond, nothing is left
  V size = hn::Abs(x);
  size = hn::IfThenElse(hn::Gt(size, most), most, size);  // NaN stays
  const V t = reciprocal(d, hn::MulAdd(size, hn::Set(d, 0.2316418989f), one));
  V p = hn::MulAdd(hn::Set(d, 0.5307027145f), t, hn::Set(d, -0.7265760135f));
  p = hn::MulAdd(p, t, hn::Set(d, 0.7107068705f));
  p = hn::MulAdd(p, t, hn::Set(d, -0.142248368f));
  p = hn::MulAdd(p, t, hn::Set(d, 0.127414796f));
  const V density = exp(d, hn::Mul(hn::Mul(size, size), hn::Set(d, -0.5f)));
  const V tail = hn::Mul(hn::Mul(p, t), density);
  const V below = hn::IfThenElse(hn::Lt(x, hn::Zero(d)), tail, hn::Sub(one, tail));
  if (slope) {
    const V bounded = hn::CopySign(size, x);
    *slope = hn::MulAdd(hn::Mul(bounded, density), hn::Set(d, 0.3989422804f), below);
  }
  return hn::Mul(x, below);
}

// The first `valid` elements from `from`, the rest 0; nothing past them is touched on any target.
template <class D>
HWY_INLINE hn::Vec<D> load_part(D d, const float* from, size_t valid) {
  if (HWY_LIKELY(valid >= hn::Lanes(d))) return hn::LoadU(d, from);
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
  return hn::MaskedLoad(hn::FirstN(d, valid), d, from);
#else
  HWY_ALIGN float buffer[hn::MaxLanes(d)] = {};
  std::memcpy(buffer, from, valid * sizeof(float));
  return hn::Load(d, buffer);
#endif
}

template <class D, class V>
HWY_INLINE void store_part(D d, V v, float* to, size_t valid) {
  if (HWY_LIKELY(valid >= hn::Lanes(d))) {
    hn::StoreU(v, d, to);
    return;
  }
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
  hn::BlendedStore(v, hn::FirstN(d, valid), d, to);
#else
  HWY_ALIGN float buffer[hn::MaxLanes(d)];
  hn::Store(v, d, buffer);
  std::memcpy(to, buffer, valid * sizeof(float));
#endif
}

}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
