// What both backends' AdamW share: the checks at its entry and the numbers of one step.
#pragma once

#include <cmath>

#include "kernels/expect.h"
#include "kernels/ops.h"

namespace coil {

// w *= shrink;  m += (g - m) * add1;  v = v * keep2 + add2 * g * g;
// w -= step * m / (sqrt(v) / root2 + eps)
struct AdamWFactors {
  float keep2, add1, add2, step, root2, eps;
};

inline AdamWFactors factors_of(const AdamW& op) {
  const auto decayed = [&](float beta) {
    return 1 - std::pow(static_cast<double>(beta), static_cast<double>(op.step));
  };
  return {.keep2 = op.beta2,
          .add1 = static_cast<float>(1 - static_cast<double>(op.beta1)),
          .add2 = static_cast<float>(1 - static_cast<double>(op.beta2)),
          .step = static_cast<float>(op.lr / decayed(op.beta1)),
          .root2 = static_cast<float>(std::sqrt(decayed(op.beta2))),
          .eps = op.eps};
}

inline float shrink_of(const AdamW& op, const AdamW::Item& item) {
  return static_cast<float>(1 - static_cast<double>(op.lr) * item.decay);
}

inline void expect_flat(const char* op, const char* operand, const View& view, DType dtype,
                        int64_t count) {
  if (view && view.dtype == dtype && view.contiguous() && view.count() == count) [[likely]]
    return;
  fail("{}: {} is {}, expected {} of {}, contiguous", op, operand, view.shape(), count,
       name_of(dtype));
}

inline void check_operands(const AdamW& op) {
  check(op.step >= 1, "adamw: step {}, expected 1 or more", op.step);
  check(op.clip == 0 || op.squares, "adamw: squares is missing, expected it beside clip");
  expect_if("adamw", "squares", op.squares, DType::f64, {1});
  for (const AdamW::Item& item : op.items) {
    const int64_t count = item.w.count();
    expect_flat("adamw", "w", item.w, DType::f32, count);
    expect_flat("adamw", "g", item.g, DType::f32, count);
    expect_flat("adamw", "m", item.m, DType::f32, count);
    expect_flat("adamw", "v", item.v, DType::f32, count);
    const DType copied = item.copy.dtype == DType::bf16 ? DType::bf16 : DType::f32;
    if (item.copy) expect_flat("adamw", "copy", item.copy, copied, count);
  }
}

inline void check_operands(const SumSquares& op) {
  expect("sum_squares", "out", op.out, DType::f64, {1});
  for (const View& x : op.x) expect_flat("sum_squares", "x", x, DType::f32, x.count());
}

}  // namespace coil
