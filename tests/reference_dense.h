// Scalar oracle of the dense ops, in double. What has a derivative is templated, so that
// std::complex<double> gives it by complex step: df/dx = Im f(x + ih) / h with h = 1e-30, without
// subtraction and so without rounding.
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdint>
#include <vector>

namespace coil::reference {

constexpr double kStep = 1e-30;

inline double real(double x) { return x; }
inline double real(std::complex<double> x) { return x.real(); }

// y = r * weight / sqrt(mean(r^2) + eps), one row.
template <class T>
std::vector<T> norm(const std::vector<T>& r, const std::vector<T>& weight, double eps) {
  T square = 0;
  for (const T& x : r) square += x * x;
  const T rstd = 1.0 / std::sqrt(square / static_cast<double>(r.size()) + eps);
  std::vector<T> y(r.size());
  for (size_t i = 0; i < r.size(); ++i) y[i] = r[i] * rstd * (weight.empty() ? T(1) : weight[i]);
  return y;
}

// -weight * log softmax(logits)[target], one row.
template <class T>
T cross_entropy(const std::vector<T>& logits, int32_t target, double weight) {
  double most = -1e300;
  for (const T& x : logits) most = std::max(most, real(x));
  T sum = 0;
  for (const T& x : logits) sum += std::exp(x - most);
  return weight * (std::log(sum) + most - logits[target]);
}

// The probability of each id as Sample has it, one row, by sorting. margin: how near to top_p the
// probabilities of the most likely come, where it cuts and elsewhere.
inline std::vector<double> sample(const std::vector<double>& logits, double temperature,
                                  int64_t top_k, double top_p, double* margin) {
  std::vector<size_t> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  if (temperature == 0) top_k = 1;
  if (top_k > 0 && top_k < static_cast<int64_t>(order.size())) order.resize(top_k);
  std::vector<double> weights;
  double total = 0, left = 0;
  for (const size_t i : order) {
    const double less = logits[i] - logits[order[0]];
    weights.push_back(less == 0 ? 1 : std::exp(less / temperature));
    total += weights.back();
  }
  *margin = 1;
  size_t count = 0;
  while (count < order.size() && (top_p == 1 || left < top_p * total)) {
    const double logit = logits[order[count]];
    for (; count < order.size() && logits[order[count]] == logit; ++count) left += weights[count];
    if (top_p < 1) *margin = std::min(*margin, std::abs(left / total - top_p));
  }
  std::vector<double> probabilities(logits.size(), 0.);
  for (size_t i = 0; i < count; ++i) probabilities[order[i]] = weights[i] / left;
  return probabilities;
}

// a sigmoid(b).
template <class T>
T glu(T a, T b) {
  return a / (1.0 + std::exp(-b));
}

// One element of torch.optim.AdamW, in double. step counts from 1.
struct AdamWElement {
  double w = 0, m = 0, v = 0;
  void step(double g, double lr, double beta1, double beta2, double eps, double decay, int step) {
    w *= 1 - lr * decay;
    m += (g - m) * (1 - beta1);
    v = v * beta2 + (1 - beta2) * g * g;
    const double denominator = std::sqrt(v) / std::sqrt(1 - std::pow(beta2, step)) + eps;
    w -= lr / (1 - std::pow(beta1, step)) * m / denominator;
  }
};

}  // namespace coil::reference
