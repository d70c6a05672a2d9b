// Down- and up-pooling between the stages of a U-Net, and their gradients: copies of rows of d
// columns, in blocks of rows over the threads. Memory is the limit.
//
// Of a piece, with a steps of a coarse step before it and c coarse steps that end in it: coarse row
// first + i holds its steps i p - a …, and those below 0 stand in the state.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/grid.h"
#include "kernels/expect.h"

namespace coil {
namespace {

constexpr int64_t kRows = 64;            // of one task
constexpr int64_t kParallel = 32 << 10;  // elements from which threads pay

struct Batch {
  const char* name;
  const Rows& rows;
  const Rows::Pooled& pooled;
  int64_t t, m, d, p;

  template <class Op>
  Batch(const char* name, const Op& op, const char* operand, const View& fine)
      : name(name), rows(given(name, op.rows, op.p)), pooled(rows.pooled(op.p)), p(op.p) {
    expect_rank(name, operand, fine, 2);
    t = rows.total();
    m = pooled.rows.total();
    d = fine.cols();
  }
  static const Rows& given(const char* name, const Rows* rows, int64_t p) {
    check(rows != nullptr, "{}: rows are missing", name);
    check(p >= 2, "{}: p is {}, expected 2 or more", name, p);
    return *rows;
  }
  void expect_state(const char* operand, const View& state, std::initializer_list<int64_t> slot,
                    bool needed) const {
    if (!state && !needed) return;
    expect_rank(name, operand, state, static_cast<int>(slot.size()) + 1);
    if (slot.size() == 2)
      expect(name, operand, state, DType::f32, {state.rows(), slot.begin()[0], slot.begin()[1]});
    else
      expect(name, operand, state, DType::f32, {state.rows(), slot.begin()[0]});
    check(state.rows() >= rows.slots(), "{}: {} is {}, expected {} slots or more", name, operand,
          state.shape(), rows.slots());
  }
};

// One piece and its coarse steps.
struct Part {
  const Piece& piece;
  int64_t before, coarse, first;  // a, c, first
  Part(const Batch& batch, int64_t i)
      : piece(batch.rows.pieces()[i]),
        before(piece.position % batch.p),
        coarse((before + piece.length) / batch.p),
        first(batch.pooled.first[i]) {}
};

// f(i, begin, end) for every piece i and a range of its steps, over the threads.
template <class F>
void for_steps(const Batch& batch, int threads, const F& f) {
  const auto pieces = batch.rows.pieces();
  const int64_t tasks = (batch.t + kRows - 1) / kRows;
#pragma omp parallel for num_threads(threads) schedule(static) if (batch.t * batch.d >= kParallel)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t begin = task * kRows, end = std::min(begin + kRows, batch.t);
    auto piece = std::upper_bound(pieces.begin(), pieces.end(), begin,
                                  [](int64_t row, const Piece& p) { return row < p.begin; }) -
                 1;
    for (; piece != pieces.end() && piece->begin < end; ++piece)
      f(piece - pieces.begin(), std::max<int64_t>(begin - piece->begin, 0),
        std::min(end - piece->begin, piece->length));
  }
}

float* part_of(const View& coarse, int64_t row, int64_t k, int64_t d) {
  return coarse.row<float>(row) + k * d;
}
// Row k of a slot of downsample's state (s,p-1,d).
float* rest_of(const View& state, int64_t slot, int64_t k) {
  return state.row<float>(slot) + k * state.stride[1];
}

void copy_or_clear(float* to, const float* from, int64_t count) {
  if (from)
    std::memmove(to, from, count * sizeof(float));
  else
    std::fill_n(to, count, 0.f);
}

}  // namespace

void CpuBackend::run(const Downsample& op) {
  const Batch batch("downsample", op, "x", op.x);
  const auto [name, rows, pooled, t, m, d, p] = batch;
  expect(name, "x", op.x, DType::f32, {t, d});
  expect(name, "y", op.y, DType::f32, {m, p * d});
  batch.expect_state("state", op.state, {p - 1, d}, rows.slots() > 0);
  for_steps(batch, threads_, [&, p = p, d = d](int64_t i, int64_t begin, int64_t end) {
    const Part part(batch, i);
    for (int64_t step = begin; step < end; ++step) {
      const int64_t coarse = (part.before + step) / p, k = (part.before + step) % p;
      if (coarse < part.coarse)
        std::copy_n(op.x.row<float>(part.piece.begin + step), d,
                    part_of(op.y, part.first + coarse, k, d));
    }
  });
  for (size_t i = 0; i < rows.pieces().size(); ++i) {
    const Part part(batch, static_cast<int64_t>(i));
    const Piece& piece = part.piece;
    const auto earlier = [&](int64_t k) {
      return piece.from >= 0 ? rest_of(op.state, piece.from, k) : nullptr;
    };
    for (int64_t k = 0; k < part.before && part.coarse > 0; ++k)
      copy_or_clear(part_of(op.y, part.first, k, d), earlier(k), d);
    if (piece.to < 0) continue;
    const int64_t rest = (part.before + piece.length) % p;
    for (int64_t k = 0; k < p - 1; ++k) {
      const int64_t step = part.coarse * p + k - part.before;
      copy_or_clear(rest_of(op.state, piece.to, k),
                    k >= rest   ? nullptr
                    : step >= 0 ? op.x.row<float>(piece.begin + step)
                                : earlier(k),
                    d);
    }
  }
}

void CpuBackend::run(const DownsampleBackward& op) {
  const Batch batch("downsample backward", op, "dx", op.dx);
  const auto [name, rows, pooled, t, m, d, p] = batch;
  expect(name, "dx", op.dx, DType::f32, {t, d});
  expect(name, "dy", op.dy, DType::f32, {m, p * d});
  expect_if(name, "dresidual", op.dresidual, DType::f32, {t, d});
  batch.expect_state("dstate", op.dstate, {p - 1, d}, false);
  for_steps(batch, threads_, [&, p = p, d = d](int64_t i, int64_t begin, int64_t end) {
    const Part part(batch, i);
    for (int64_t step = begin; step < end; ++step) {
      const int64_t coarse = (part.before + step) / p, k = (part.before + step) % p;
      const int64_t row = part.piece.begin + step;
      const float* from = nullptr;
      if (coarse < part.coarse)
        from = part_of(op.dy, part.first + coarse, k, d);
      else if (op.dstate && part.piece.to >= 0)
        from = rest_of(op.dstate, part.piece.to, k);
      float* const dx = op.dx.row<float>(row);
      const float* const other = op.dresidual ? op.dresidual.row<float>(row) : nullptr;
      for (int64_t j = 0; j < d; ++j) dx[j] = (other ? other[j] : 0) + (from ? from[j] : 0);
    }
  });
  if (!op.dstate) return;
  const std::vector<uint8_t> first = first_readers(rows);
  for (size_t i = 0; i < rows.pieces().size(); ++i) {
    const Part part(batch, static_cast<int64_t>(i));
    const Piece& piece = part.piece;
    if (piece.from < 0) continue;
    for (int64_t k = 0; k < p - 1; ++k) {
      const float* from = nullptr;
      if (k < part.before && part.coarse > 0)
        from = part_of(op.dy, part.first, k, d);
      else if (k < part.before && piece.to >= 0)
        from = rest_of(op.dstate, piece.to, k);
      float* const to = rest_of(op.dstate, piece.from, k);
      if (first[i])
        copy_or_clear(to, from, d);
      else
        for (int64_t j = 0; j < d && from; ++j) to[j] += from[j];
    }
  }
}

void CpuBackend::run(const Upsample& op) {
  const Batch batch("upsample", op, "y", op.y);
  const auto [name, rows, pooled, t, m, d, p] = batch;
  expect(name, "y", op.y, DType::f32, {t, d});
  expect(name, "residual", op.residual, DType::f32, {t, d});
  expect(name, "x", op.x, DType::f32, {m, p * d});
  batch.expect_state("state", op.state, {p * d}, rows.slots() > 0);
  for_steps(batch, threads_, [&, p = p, d = d](int64_t i, int64_t begin, int64_t end) {
    const Part part(batch, i);
    for (int64_t step = begin; step < end; ++step) {
      const int64_t coarse = (part.before + step) / p - 1, k = (part.before + step) % p;
      const int64_t row = part.piece.begin + step;
      const float* from = nullptr;
      if (coarse >= 0)
        from = part_of(op.x, part.first + coarse, k, d);
      else if (part.piece.from >= 0)
        from = part_of(op.state, part.piece.from, k, d);
      float* const y = op.y.row<float>(row);
      const float* const residual = op.residual.row<float>(row);
      for (int64_t j = 0; j < d; ++j) y[j] = residual[j] + (from ? from[j] : 0);
    }
  });
  for (size_t i = 0; i < rows.pieces().size(); ++i) {
    const Part part(batch, static_cast<int64_t>(i));
    const Piece& piece = part.piece;
    if (piece.to < 0) continue;
    const float* from = nullptr;
    if (part.coarse > 0)
      from = op.x.row<float>(part.first + part.coarse - 1);
    else if (piece.from >= 0)
      from = op.state.row<float>(piece.from);
    copy_or_clear(op.state.row<float>(piece.to), from, p * d);
  }
}

void CpuBackend::run(const UpsampleBackward& op) {
  const Batch batch("upsample backward", op, "dy", op.dy);
  const auto [name, rows, pooled, t, m, d, p] = batch;
  expect(name, "dy", op.dy, DType::f32, {t, d});
  expect(name, "dx", op.dx, DType::f32, {m, p * d});
  batch.expect_state("dstate", op.dstate, {p * d}, false);
  for_steps(batch, threads_, [&, p = p, d = d](int64_t i, int64_t begin, int64_t end) {
    const Part part(batch, i);
    for (int64_t step = begin; step < end; ++step) {
      const int64_t coarse = (part.before + step) / p - 1, k = (part.before + step) % p;
      if (coarse >= 0)
        std::copy_n(op.dy.row<float>(part.piece.begin + step), d,
                    part_of(op.dx, part.first + coarse, k, d));
    }
  });
  std::vector<uint8_t> first;
  if (op.dstate) first = first_readers(rows);
  for (size_t i = 0; i < rows.pieces().size(); ++i) {
    const Part part(batch, static_cast<int64_t>(i));
    const Piece& piece = part.piece;
    const float* const final =
        op.dstate && piece.to >= 0 ? op.dstate.row<float>(piece.to) : nullptr;
    if (part.coarse > 0) {  // the last one's parts beyond the piece, and its place in the state
      const int64_t rest = (part.before + piece.length) % p;
      float* const last = op.dx.row<float>(part.first + part.coarse - 1);
      std::fill(last + rest * d, last + p * d, 0.f);
      for (int64_t j = 0; j < p * d && final; ++j) last[j] += final[j];
    }
    if (!op.dstate || piece.from < 0) continue;
    float* const to = op.dstate.row<float>(piece.from);
    for (int64_t k = 0; k < p; ++k) {
      const int64_t step = k - part.before;
      const float* const dy =
          step >= 0 && step < piece.length ? op.dy.row<float>(piece.begin + step) : nullptr;
      const float* const on = part.coarse == 0 && final ? final + k * d : nullptr;
      for (int64_t j = 0; j < d; ++j) {
        const float sum = (dy ? dy[j] : 0) + (on ? on[j] : 0);
        to[k * d + j] = first[i] ? sum : to[k * d + j] + sum;
      }
    }
  }
}

}  // namespace coil
