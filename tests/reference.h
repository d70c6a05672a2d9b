// Scalar oracle of the ops that look along time, one step after another as their definitions read,
// in double. Templated, so that std::complex<double> gives every derivative by complex step
// (gradcheck.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "kernels/tensor.h"

namespace coil::reference {

// Operands by their name in ops.h, row-major. An operand that is left out is absent or empty.
template <class T>
using Arrays = std::map<std::string, std::vector<T>>;

inline double real_part(double x) { return x; }
inline double real_part(std::complex<double> x) { return x.real(); }

inline double log1p(double x) { return std::log1p(x); }
inline std::complex<double> log1p(
    std::complex<double> x) {  // Kahan's correction of what 1 + x loses
  const std::complex<double> u = 1.0 + x;
  if (u.real() == 1.0) return x;
  return std::log(u) * (x / (u - 1.0));
}

template <class T>
T softplus(T x) {
  return real_part(x) > 0 ? x + log1p(std::exp(-x)) : log1p(std::exp(x));
}

template <class T>
T silu(T x) {
  return x / (1.0 + std::exp(-x));
}

// Of a complex number to first order in its imaginary part, which is all that a complex step sees.
inline double erf(double x) { return std::erf(x); }
inline std::complex<double> erf(std::complex<double> x) {
  constexpr double kSlope = 1.1283791670955126;  // 2 / sqrt(pi)
  return {std::erf(x.real()), x.imag() * kSlope * std::exp(-x.real() * x.real())};
}

template <class T>
T gelu(T x) {
  return 0.5 * x * (1.0 + erf(x * 0.7071067811865476));
}

inline int64_t row_of(const Piece& piece, int64_t step, bool reverse) {
  return reverse ? piece.begin + piece.length - 1 - step : piece.begin + step;
}

struct ConvShape {
  int64_t c = 1, w = 4;
  bool silu = true, reverse = false;
};

// In: x weight [bias] [state]. Out: y, state.
template <class T>
Arrays<T> conv1d(const ConvShape& shape, std::span<const Piece> pieces, const Arrays<T>& in) {
  const auto [c, w, with_silu, reverse] = shape;
  const std::vector<T>&x = in.at("x"), &weight = in.at("weight");
  Arrays<T> out;
  std::vector<T>& y = out["y"];
  std::vector<T>& state = out["state"];
  y.resize(x.size());
  if (in.count("state")) state = in.at("state");
  for (const Piece& piece : pieces)
    for (int64_t j = 0; j < c; ++j) {
      std::vector<T> inputs;  // the w - 1 of the state, then the piece's
      for (int64_t k = 0; k < w - 1; ++k)
        inputs.push_back(piece.from < 0 ? T(0)
                                        : in.at("state")[(piece.from * (w - 1) + k) * c + j]);
      for (int64_t s = 0; s < piece.length; ++s)
        inputs.push_back(x[row_of(piece, s, reverse) * c + j]);
      for (int64_t s = 0; s < piece.length; ++s) {
        T sum = in.count("bias") ? in.at("bias")[j] : T(0);
        for (int64_t k = 0; k < w; ++k) sum += weight[j * w + k] * inputs[s + k];
        y[row_of(piece, s, reverse) * c + j] = with_silu ? silu(sum) : sum;
      }
      for (int64_t k = 0; k < w - 1 && piece.to >= 0; ++k)
        state[(piece.to * (w - 1) + k) * c + j] = inputs[piece.length + k];
    }
  return out;
}

struct CoarseShape {
  int64_t d = 1, p = 2;
};

// In: x [state]. Out: y, state.
template <class T>
Arrays<T> downsample(const CoarseShape& shape, std::span<const Piece> pieces, const Arrays<T>& in) {
  const auto [d, p] = shape;
  Arrays<T> out;
  std::vector<T>&y = out["y"], &state = out["state"];
  if (in.count("state")) state = in.at("state");
  for (const Piece& piece : pieces) {
    std::vector<T> step(piece.position % p * d, T(0));  // of the coarse step so far
    for (size_t i = 0; i < step.size() && piece.from >= 0; ++i)
      step[i] = in.at("state")[piece.from * (p - 1) * d + i];
    for (int64_t row = piece.begin; row < piece.begin + piece.length; ++row) {
      for (int64_t j = 0; j < d; ++j) step.push_back(in.at("x")[row * d + j]);
      if (static_cast<int64_t>(step.size()) < p * d) continue;
      y.insert(y.end(), step.begin(), step.end());
      step.clear();
    }
    step.resize((p - 1) * d, T(0));
    for (size_t i = 0; i < step.size() && piece.to >= 0; ++i)
      state[piece.to * (p - 1) * d + i] = step[i];
  }
  return out;
}

// In: x residual [state]. Out: y, state.
template <class T>
Arrays<T> upsample(const CoarseShape& shape, std::span<const Piece> pieces, const Arrays<T>& in) {
  const auto [d, p] = shape;
  Arrays<T> out;
  std::vector<T>&y = out["y"], &state = out["state"];
  y = in.at("residual");
  if (in.count("state")) state = in.at("state");
  auto next = in.at("x").begin();
  for (const Piece& piece : pieces) {
    std::vector<T> current(p * d, T(0));  // what the last coarse step put out
    for (size_t i = 0; i < current.size() && piece.from >= 0; ++i)
      current[i] = in.at("state")[piece.from * p * d + i];
    int64_t phase = piece.position % p;
    for (int64_t row = piece.begin; row < piece.begin + piece.length; ++row) {
      for (int64_t j = 0; j < d; ++j) y[row * d + j] += current[phase * d + j];
      if (++phase < p) continue;
      phase = 0;
      std::copy_n(next, p * d, current.begin());
      next += p * d;
    }
    for (size_t i = 0; i < current.size() && piece.to >= 0; ++i)
      state[piece.to * p * d + i] = current[i];
  }
  return out;
}

struct ScanShape {
  int64_t e = 1, n = 1;
  bool reverse = false;
};

// In: x dt A_log B C D dt_bias [z] [state]. Out: y, state, sum_dt.
template <class T>
Arrays<T> selective_scan(const ScanShape& shape, std::span<const Piece> pieces,
                         const Arrays<T>& in) {
  const auto [e, n, reverse] = shape;
  const std::vector<T>&x = in.at("x"), &dt = in.at("dt"), &A_log = in.at("A_log"), &B = in.at("B"),
        &C = in.at("C"), &D = in.at("D"), &dt_bias = in.at("dt_bias");
  Arrays<T> out;
  std::vector<T>& y = out["y"];
  std::vector<T>& state = out["state"];
  std::vector<T>& sum_dt = out["sum_dt"];
  y.resize(x.size());
  if (in.count("state")) state = in.at("state");
  for (const Piece& piece : pieces)
    for (int64_t c = 0; c < e; ++c) {
      std::vector<T> h(n), A(n);
      for (int64_t i = 0; i < n; ++i) {
        A[i] = -std::exp(A_log[c * n + i]);
        if (piece.from >= 0) h[i] = in.at("state")[(piece.from * e + c) * n + i];
      }
      T sum = 0;
      for (int64_t s = 0; s < piece.length; ++s) {
        const int64_t row = row_of(piece, s, reverse);
        const T delta = softplus(dt[row * e + c] + dt_bias[c]), input = delta * x[row * e + c];
        T value = D[c] * x[row * e + c];
        for (int64_t i = 0; i < n; ++i) {
          h[i] = std::exp(delta * A[i]) * h[i] + input * B[row * n + i];
          value += C[row * n + i] * h[i];
        }
        if (in.count("z")) value *= silu(in.at("z")[row * e + c]);
        y[row * e + c] = value;
        sum += delta;
      }
      sum_dt.push_back(sum);
      for (int64_t i = 0; i < n && piece.to >= 0; ++i) state[(piece.to * e + c) * n + i] = h[i];
    }
  return out;
}

struct S4dShape {
  int64_t d = 1, n = 1;
  bool gelu = false, reverse = false;
};

// Real and imaginary part, each perhaps complex itself for a complex step.
template <class T>
struct Pair {
  T re, im;
};
template <class T>
Pair<T> operator*(Pair<T> a, Pair<T> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T>
Pair<T> operator/(Pair<T> a, Pair<T> b) {
  const T square = b.re * b.re + b.im * b.im;
  return a * Pair<T>{b.re / square, -b.im / square};
}

// In: x log_A_real A_imag C log_dt D [state]. Out: y, before_gelu, state.
template <class T>
Arrays<T> s4d_scan(const S4dShape& shape, std::span<const Piece> pieces, const Arrays<T>& in) {
  const auto [d, n, with_gelu, reverse] = shape;
  const std::vector<T>&x = in.at("x"), &C = in.at("C");
  Arrays<T> out;
  std::vector<T>& y = out["y"];
  std::vector<T>& before = out["before_gelu"];
  std::vector<T>& state = out["state"];
  y.resize(x.size());
  before.resize(x.size());
  if (in.count("state")) state = in.at("state");
  for (int64_t c = 0; c < d; ++c) {
    const T delta = std::exp(in.at("log_dt")[c]);
    std::vector<Pair<T>> a(n), K(n);
    for (int64_t i = 0; i < n; ++i) {
      const Pair<T> A = {-std::exp(in.at("log_A_real")[c * n + i]), in.at("A_imag")[c * n + i]};
      const T size = std::exp(delta * A.re), angle = delta * A.im;
      a[i] = {size * std::cos(angle), size * std::sin(angle)};
      const Pair<T> twice = {2.0 * C[(c * n + i) * 2], 2.0 * C[(c * n + i) * 2 + 1]};
      K[i] = twice * Pair<T>{a[i].re - 1.0, a[i].im} / A;
    }
    for (const Piece& piece : pieces) {
      std::vector<Pair<T>> h(n);
      for (int64_t i = 0; i < n && piece.from >= 0; ++i) {
        const int64_t place = ((piece.from * d + c) * n + i) * 2;
        h[i] = {in.at("state")[place], in.at("state")[place + 1]};
      }
      for (int64_t s = 0; s < piece.length; ++s) {
        const int64_t at = row_of(piece, s, reverse) * d + c;
        T value = in.at("D")[c] * x[at];
        for (int64_t i = 0; i < n; ++i) {
          h[i] = a[i] * h[i];
          h[i].re += x[at];
          value += (K[i] * h[i]).re;
        }
        before[at] = value;
        y[at] = with_gelu ? gelu(value) : value;
      }
      for (int64_t i = 0; i < n && piece.to >= 0; ++i) {
        const int64_t place = ((piece.to * d + c) * n + i) * 2;
        state[place] = h[i].re;
        state[place + 1] = h[i].im;
      }
    }
  }
  return out;
}

}  // namespace coil::reference
