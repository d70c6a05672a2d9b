// Checks at the entry of an op: the message names op, operand, what was found and what was
// expected.
//   norm: weight is (512) f32, expected (256) f32
#pragma once

#include <initializer_list>

#include "kernels/error.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"

namespace coil {

inline void expect(const char* op, const char* operand, const View& view, DType dtype,
                   std::initializer_list<int64_t> shape) {
  bool ok = view.data && view.dtype == dtype && view.rank == static_cast<int>(shape.size());
  int i = 0;
  for (const int64_t size : shape) ok = ok && view.size[i++] == size;
  if (ok && (view.cols() <= 1 || view.stride[view.rank - 1] == 1)) [[likely]]
    return;
  View expected = view;
  expected.dtype = dtype;
  expected.rank = static_cast<int>(shape.size());
  i = 0;
  for (const int64_t size : shape) expected.size[i++] = size;
  check(view.data != nullptr, "{}: {} is missing, expected {}", op, operand, expected.shape());
  check(ok, "{}: {} is {}, expected {}", op, operand, view.shape(), expected.shape());
  fail("{}: {} has a last stride of {}, expected 1", op, operand, view.stride[view.rank - 1]);
}

// As expect(), where the operand may be left out.
inline void expect_if(const char* op, const char* operand, const View& view, DType dtype,
                      std::initializer_list<int64_t> shape) {
  if (view) expect(op, operand, view, dtype, shape);
}

// For complex numbers, whose last dimensions (n,2) lie together.
inline void expect_pairs(const char* op, const char* operand, const View& view,
                         std::initializer_list<int64_t> shape) {
  expect(op, operand, view, DType::f32, shape);
  check(view.stride[view.rank - 2] == 2, "{}: {} has a stride of {} between pairs, expected 2", op,
        operand, view.stride[view.rank - 2]);
}

// For the operand that the other shapes are taken from.
inline void expect_rank(const char* op, const char* operand, const View& view, int rank) {
  check(view.data != nullptr, "{}: {} is missing", op, operand);
  if (view.rank != rank) [[unlikely]]
    fail("{}: {} is {}, expected {} dimensions", op, operand, view.shape(), rank);
}

// The marks and starts of a selective scan.
inline void expect_marks(const char* op, const SelectiveScan& scan) {
  if (!scan.marks && !scan.starts) return;
  const int64_t block = scan_block(scan.x.device), t = scan.rows->total();
  check(scan.rows->pieces().size() == 1 && t > 0 && scan.every > 0 && scan.every % block == 0,
        "{}: marks or starts every {} steps of {} pieces, expected a multiple of {} and one piece",
        op, scan.every, scan.rows->pieces().size(), block);
  check(!scan.starts || (!scan.marks && !scan.sum_dt && scan.y),
        "{}: starts are given, expected y, and neither marks nor sum_dt", op);
  const int64_t marks = (t - 1) / scan.every, e = scan.x.cols(), n = scan.A_log.cols();
  expect_if(op, "marks", scan.marks, DType::f32, {marks, e, n});
  expect_if(op, "starts", scan.starts, DType::f32, {1 + marks, e, n});
  check((scan.marks ? scan.marks : scan.starts).contiguous(),
        "{}: marks or starts are not contiguous", op);
}

}  // namespace coil
