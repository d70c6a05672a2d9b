// Operands inside guarded memory, comparison with the oracle, and gradients by complex step:
// df/dx = Im f(x + ih) / h with h = 1e-30, without subtraction and so without rounding.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <complex>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "kernels/error.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "tests/reference.h"

namespace coil {

using Complex = std::complex<double>;
constexpr double kComplexStep = 1e-30;

// What an op that is refused says.
template <class Op>
std::string message_of(Backend& backend, const Op& op) {
  try {
    backend.run(op);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

// Which slots of a state pieces write and read.
struct SlotUse {
  std::vector<char> written, read;
  SlotUse(const std::vector<Piece>& pieces, int64_t slots) : written(slots, 0), read(written) {
    for (const Piece& piece : pieces) {
      if (piece.to >= 0) written[piece.to] = 1;
      if (piece.from >= 0) read[piece.from] = 1;
    }
  }
};

// An f32 operand whose rows stand apart in a larger buffer of sentinels. The sentinel is a NaN:
// what reads it shows.
class Guarded {
 public:
  Guarded() = default;
  // Filled with the sentinel: an output that is not written shows.
  explicit Guarded(std::initializer_list<int64_t> shape, bool contiguous = false) {
    margin_ = contiguous || shape.size() == 1 ? 0 : 5;
    view_ = host_view(nullptr, DType::f32, shape);
    const int64_t cols = view_.cols(), stride = cols + margin_;
    if (view_.rank == 2) view_.stride[0] = stride;
    if (view_.rank == 3) {
      view_.stride[1] = stride;
      view_.stride[0] = (view_.size[1] + (margin_ > 0)) * stride;
    }
    const int64_t rows =
        view_.rank == 1 ? 1 : view_.size[0] * (view_.rank == 3 ? view_.size[1] + 1 : 1);
    memory_.assign(2 * kOutside + rows * stride, sentinel());
    view_.data = memory_.data() + kOutside;
  }
  Guarded(Guarded&&) = default;
  Guarded& operator=(Guarded&&) = default;

  operator const View&() const { return view_; }
  const View& view() const { return view_; }
  explicit operator bool() const { return bool(view_); }
  int64_t count() const { return view_.count(); }

  float& at(int64_t index) const { return at(view_, index); }
  static float& at(const View& view, int64_t index) {  // row-major
    int64_t place = 0;
    for (int i = view.rank - 1; i >= 0; --i) {
      place += index % view.size[i] * view.stride[i];
      index /= view.size[i];
    }
    return view.as<float>()[place];
  }
  void fill(float value) {
    for (int64_t i = 0; i < count(); ++i) at(i) = value;
  }
  void normal(std::mt19937& random, float mean = 0, float deviation = 1) {
    std::normal_distribution<float> draw(mean, deviation);
    for (int64_t i = 0; i < count(); ++i) at(i) = draw(random);
  }
  std::vector<double> values() const { return values(view_); }
  static std::vector<double> values(const View& view) {
    std::vector<double> out(view.count());
    for (size_t i = 0; i < out.size(); ++i) out[i] = at(view, i);
    return out;
  }
  const std::vector<float>& memory() const { return memory_; }

  // Everything outside the operand still holds the sentinel.
  void expect_intact(const std::string& name) const {
    std::vector<char> inside(memory_.size(), 0);
    for (int64_t i = 0; i < count(); ++i) inside[&at(i) - memory_.data()] = 1;
    for (size_t i = 0; i < memory_.size(); ++i)
      ASSERT_TRUE(inside[i] || std::bit_cast<uint32_t>(memory_[i]) == kSentinel)
          << name << " was written outside, at " << static_cast<int64_t>(i) - kOutside;
  }

 private:
  static constexpr int64_t kOutside = 64;
  static constexpr uint32_t kSentinel = 0x7fc0beef;
  static float sentinel() { return std::bit_cast<float>(kSentinel); }
  int64_t margin_ = 0;
  std::vector<float> memory_;
  View view_;
};

inline double root_mean_square(const std::vector<double>& x) {
  double sum = 0;
  for (const double v : x) sum += v * v;
  return x.empty() ? 0 : std::sqrt(sum / x.size());
}

// |found - expected| / |expected|, L2 over all of both.
inline double relative(const std::vector<double>& found, const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (found[i] - expected[i]) * (found[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-30));
}

// |got - expected| <= tolerance (|expected| + rms of expected), everywhere.
inline void expect_close(const std::string& name, const std::vector<double>& got,
                         const std::vector<double>& expected, double tolerance) {
  ASSERT_EQ(got.size(), expected.size()) << name;
  const double rms = root_mean_square(expected);
  for (size_t i = 0; i < got.size(); ++i)
    ASSERT_LE(std::abs(got[i] - expected[i]), tolerance * (std::abs(expected[i]) + rms))
        << name << "[" << i << "] is " << got[i] << ", expected " << expected[i];
}

template <class T>
reference::Arrays<Complex> to_complex(const reference::Arrays<T>& in) {
  reference::Arrays<Complex> out;
  for (const auto& [name, values] : in) out[name].assign(values.begin(), values.end());
  return out;
}

// All indices below `count`, or `most` of them.
inline std::vector<int64_t> probes(int64_t count, int64_t most) {
  std::vector<int64_t> indices;
  std::mt19937 random(11);
  for (int64_t i = 0; i < std::min(count, most); ++i)
    indices.push_back(count <= most ? i : static_cast<int64_t>(random() % count));
  return indices;
}

// Compares `got`, the gradient of functional(inputs) with respect to inputs[name], at `indices`.
template <class Functional>
void expect_gradient(const Functional& functional, reference::Arrays<Complex> inputs,
                     const std::string& name, const std::vector<double>& got,
                     const std::vector<int64_t>& indices, double tolerance) {
  std::vector<Complex>& operand = inputs.at(name);
  ASSERT_EQ(got.size(), operand.size()) << "d" << name;
  std::vector<double> found, expected;
  for (const int64_t i : indices) {
    const Complex kept = operand[i];
    operand[i] += Complex(0, kComplexStep);
    expected.push_back(functional(inputs).imag() / kComplexStep);
    operand[i] = kept;
    found.push_back(got[i]);
  }
  expect_close("d" + name, found, expected, tolerance);
}

inline std::vector<double> difference(std::vector<double> a, const std::vector<double>& b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] -= b[i];
  return a;
}

// A ragged batch of pieces of 1, 2, 3, 63, 64, 65 and `longest` steps: states carried in place,
// read by two pieces that fork, discarded, started from zero. Slots 0 to 6; 2, 3 and 4 are written
// only, 5 is read only.
inline std::vector<Piece> ragged_pieces(int64_t longest) {
  struct Part {
    int64_t length;
    int32_t from, to;
  };
  const Part parts[] = {{1, 0, 0},   {2, 1, 2},    {3, 1, 3},      {63, -1, 4},
                        {64, 5, -1}, {65, -1, -1}, {longest, 6, 6}};
  std::vector<Piece> pieces;
  int64_t begin = 0;
  for (const Part& part : parts) {
    pieces.push_back({.begin = begin, .length = part.length, .from = part.from, .to = part.to});
    begin += part.length;
  }
  return pieces;
}

// Whole sequences of these lengths.
inline std::vector<Piece> whole_pieces(std::initializer_list<int64_t> lengths) {
  std::vector<Piece> pieces;
  int64_t begin = 0;
  for (const int64_t length : lengths) {
    pieces.push_back({.begin = begin, .length = length});
    begin += length;
  }
  return pieces;
}

}  // namespace coil
