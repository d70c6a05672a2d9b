// A matrix for tests of ops, and what an op says of a wrong one.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/error.h"
#include "kernels/tensor.h"

namespace coil {

// A matrix standing inside a larger one, as a column view does: what lies around it must stay as it
// is.
class Field {
 public:
  Field(int64_t rows, int64_t cols, bool inside = true)
      : rows_(rows), cols_(cols), margin_(inside ? 3 : 0), stride_(cols + 2 * margin_) {
    memory_.assign((rows + 2) * stride_ + 2 * kGuard, kSentinel);
    view_ = host_view(memory_.data() + kGuard + stride_ + margin_, DType::f32, {rows, cols});
    view_.stride[0] = stride_;
  }
  Field(int64_t rows, int64_t cols, std::mt19937& random, bool inside = true)
      : Field(rows, cols, inside) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) at(i, j) = normal(random);
  }

  Field(const Field& other)
      : rows_(other.rows_),
        cols_(other.cols_),
        margin_(other.margin_),
        stride_(other.stride_),
        memory_(other.memory_),
        view_(other.view_) {
    view_.data = memory_.data() + kGuard + stride_ + margin_;
  }

  operator const View&() const { return view_; }
  const View& view() const { return view_; }
  View row(int64_t i = 0) const { return view_.slice(i, 1).reshape({cols_}); }
  View column() const { return view_.reshape({rows_}); }
  View rows(int64_t begin, int64_t count) const { return view_.slice(begin, count); }
  float& at(int64_t i, int64_t j) { return view_.row<float>(i)[j]; }
  float at(int64_t i, int64_t j) const { return view_.row<float>(i)[j]; }
  std::vector<double> values(int64_t i) const {
    return {view_.row<float>(i), view_.row<float>(i) + cols_};
  }
  std::vector<float> bits() const { return memory_; }

  // Nothing outside was written.
  void expect_intact(const char* name) const {
    const float* first = view_.as<float>();
    for (size_t k = 0; k < memory_.size(); ++k) {
      const int64_t offset = memory_.data() + k - first;
      const bool inside = offset >= 0 && offset / stride_ < rows_ && offset % stride_ < cols_;
      if (inside) continue;
      ASSERT_EQ(memory_[k], kSentinel) << name << ", element " << offset;
    }
  }

 private:
  static constexpr float kSentinel = 12345.f;
  static constexpr int64_t kGuard = 64;
  int64_t rows_, cols_, margin_, stride_;
  std::vector<float> memory_;
  View view_;
};

inline std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace coil
