// Pooling over a sequence: its last row, or the mean of all its rows, which may arrive in several
// pieces. Sums are kept in f64, so that a sequence of millions of steps gives the same mean however
// it is cut.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/expect.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/pool.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

// sum(columns) += rows of x, `stride` floats apart.
void sum_columns(const float* x, int64_t rows, int64_t stride, int64_t columns, double* sum) {
  const hn::ScalableTag<double> wide;
  const hn::Rebind<float, decltype(wide)> narrow;
  const int64_t lanes = hn::Lanes(wide);
  for (int64_t t = 0; t < rows; ++t, x += stride) {
    int64_t i = 0;
    for (; i + lanes <= columns; i += lanes) {
      const auto value = hn::PromoteTo(wide, hn::LoadU(narrow, x + i));
      hn::StoreU(hn::Add(hn::LoadU(wide, sum + i), value), wide, sum + i);
    }
    for (; i < columns; ++i) sum[i] += x[i];
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(sum_columns);

namespace {

constexpr int64_t kColumns = 64;         // of one task: a long sequence is split by columns
constexpr int64_t kParallel = 32 << 10;  // elements from which threads pay

// The output row of each piece, counted by `last`.
std::vector<int64_t> output_rows(const Rows& rows) {
  std::vector<int64_t> out;
  int64_t row = 0;
  for (const Piece& piece : rows.pieces()) {
    out.push_back(row);
    row += piece.last;
  }
  return out;
}

}  // namespace

void CpuBackend::run(const Pool& op) {
  check(op.rows != nullptr, "pool: rows are missing");
  expect_rank("pool", "x", op.x, 2);
  const int64_t t = op.rows->total(), d = op.x.cols();
  expect("pool", "x", op.x, DType::f32, {t, d});
  expect("pool", "y", op.y, DType::f32, {op.rows->finished(), d});
  const auto pieces = op.rows->pieces();
  const auto out = output_rows(*op.rows);
  const int64_t count = pieces.size();
  if (op.pooling == Pooling::last) {
    for (int64_t i = 0; i < count; ++i) {
      const Piece& piece = pieces[i];
      if (piece.last)
        std::memcpy(op.y.row<float>(out[i]), op.x.row<float>(piece.begin + piece.length - 1),
                    d * sizeof(float));
    }
    return;
  }
  if (op.state || op.rows->slots() > 0) {
    expect_rank("pool", "state", op.state, 2);
    expect("pool", "state", op.state, DType::f64, {op.state.rows(), d + 1});
    check(op.state.rows() >= op.rows->slots(), "pool: state is {}, expected {} slots or more",
          op.state.shape(), op.rows->slots());
  }
  std::vector<double> steps(count);  // rows of each sequence so far
  for (int64_t i = 0; i < count; ++i)
    steps[i] = static_cast<double>(pieces[i].length) +
               (pieces[i].from < 0 ? 0 : op.state.row<double>(pieces[i].from)[d]);
  const auto add = &HWY_DYNAMIC_DISPATCH(sum_columns);
  const int64_t blocks = (d + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(threads_) schedule(static) if (t * d >= kParallel)
  for (int64_t task = 0; task < count * blocks; ++task) {
    const int64_t i = task / blocks, begin = task % blocks * kColumns;
    const int64_t columns = std::min(kColumns, d - begin);
    const Piece& piece = pieces[i];
    double sum[kColumns] = {};
    if (piece.from >= 0) std::copy_n(op.state.row<double>(piece.from) + begin, columns, sum);
    add(op.x.row<float>(piece.begin) + begin, piece.length, op.x.stride[0], columns, sum);
    if (piece.to >= 0) std::copy_n(sum, columns, op.state.row<double>(piece.to) + begin);
    if (!piece.last) continue;
    float* y = op.y.row<float>(out[i]) + begin;
    for (int64_t j = 0; j < columns; ++j) y[j] = static_cast<float>(sum[j] / steps[i]);
  }
  for (int64_t i = 0; i < count; ++i)
    if (pieces[i].to >= 0) op.state.row<double>(pieces[i].to)[d] = steps[i];
}

void CpuBackend::run(const PoolBackward& op) {
  check(op.rows != nullptr, "pool backward: rows are missing");
  expect_rank("pool backward", "dx", op.dx, 2);
  const int64_t t = op.rows->total(), d = op.dx.cols();
  expect("pool backward", "dx", op.dx, DType::f32, {t, d});
  expect("pool backward", "dy", op.dy, DType::f32, {op.rows->finished(), d});
  const auto pieces = op.rows->pieces();
  for (size_t i = 0; i < pieces.size(); ++i)
    check(pieces[i].position == 0 && pieces[i].last,
          "pool backward: piece {} is not a whole sequence", i);
  const bool mean = op.pooling == Pooling::mean;
  const int64_t count = pieces.size();
#pragma omp parallel num_threads(threads_) if (t * d >= kParallel)
  {
    // Each thread writes its share of the rows, whichever pieces they belong to.
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t begin = t * thread / threads, end = t * (thread + 1) / threads;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t finish = pieces[i].begin + pieces[i].length;
      if (finish <= begin || pieces[i].begin >= end) continue;
      const float* dy = op.dy.row<float>(i);
      const float scale = mean ? 1 / static_cast<float>(pieces[i].length) : 1;
      for (int64_t row = std::max(begin, pieces[i].begin); row < std::min(end, finish); ++row) {
        float* dx = op.dx.row<float>(row);
        if (mean || row == finish - 1)
          for (int64_t j = 0; j < d; ++j) dx[j] = dy[j] * scale;
        else
          std::fill_n(dx, d, 0.f);
      }
    }
  }
}

}  // namespace coil
#endif  // HWY_ONCE
