// Down- and up-pooling between the stages of a U-Net, and their gradients.
//
// Of a piece, with a steps of a coarse step before it and c coarse steps that end in it: coarse row
// first + i holds its steps i p - a …, and those below 0 stand in the state.
//
// A thread for each word of the output; then one for each element of the states written, or of
// those read. Bytes: each operand once. Memory is the limit.
#include "kernels/cuda/words.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kThreads = 256;
constexpr int kWide = 4;  // elements of a word: 16 bytes of f32

// One piece and its coarse steps.
struct Part {
  Piece piece;
  int64_t before, coarse, first;  // a, c, first
};

struct Batch {
  const Piece* pieces;
  const int32_t* first;  // coarse row of each piece
  int64_t d, p, t, m;
  int count;

  __device__ Part part(int i) const {
    Part part;
    part.piece = pieces[i];
    part.before = part.piece.position % p;
    part.coarse = (part.before + part.piece.length) / p;
    part.first = first[i];
    return part;
  }
  __device__ Part part_of_row(int64_t row) const {
    int low = 0, high = count - 1;  // the last piece that begins at the row or before it
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (pieces[middle].begin <= row)
        low = middle;
      else
        high = middle - 1;
    }
    return part(low);
  }
  __device__ Part part_of_coarse_row(int64_t row) const {
    return part(piece_of(first, count, static_cast<int32_t>(row)));
  }
};

// Rows of one matrix, or a state: slots of rows of d.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;     // of a row, or of a slot
  int64_t inner = 0;  // of a state: of a row in it
  __device__ T* at(int64_t row, int64_t column) const { return data + row * stride + column; }
  __device__ T* at(int64_t slot, int64_t k, int64_t column) const {
    return data + slot * stride + k * inner + column;
  }
};

// y[j] = p rows of x; those before the piece from the state.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    downsample_kernel(const Batch batch, const Matrix<const float> x, const Matrix<float> state,
                      const Matrix<T> y) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t words = batch.p * batch.d / kWidth;
  if (index >= batch.m * words) return;
  const int64_t row = index / words, column = index % words * kWidth;
  const int64_t k = column / batch.d, j = column % batch.d;
  const Part part = batch.part_of_coarse_row(row);
  const int64_t step = (row - part.first) * batch.p + k - part.before;
  Words<float, kWidth> in;
  if (step >= 0) {
    in.load(x.at(part.piece.begin + step, j));
  } else if (part.piece.from >= 0) {
    in.load(state.at(part.piece.from, k, j));
  } else {
    for (int i = 0; i < kWidth; ++i) in.set(i, 0.f);
  }
  Words<T, kWidth> out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out.set(i, in.at(i));
  out.store(y.at(row, column));
}

// Behind it: the steps of the coarse step that has not ended. An element of `from` goes to the same
// one of `to`, so the two may be one slot.
__global__ void __launch_bounds__(kThreads)
    keep_rest_kernel(const Batch batch, const Matrix<const float> x, const Matrix<float> state) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t size = (batch.p - 1) * batch.d;
  if (index >= batch.count * size) return;
  const Part part = batch.part(static_cast<int>(index / size));
  if (part.piece.to < 0) return;
  const int64_t k = index % size / batch.d, j = index % batch.d;
  const int64_t rest = (part.before + part.piece.length) % batch.p;
  const int64_t step = part.coarse * batch.p + k - part.before;
  float value = 0;
  if (k < rest) {
    if (step >= 0)
      value = *x.at(part.piece.begin + step, j);
    else if (part.piece.from >= 0)
      value = *state.at(part.piece.from, k, j);
  }
  *state.at(part.piece.to, k, j) = value;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    downsample_backward_kernel(const Batch batch, const Matrix<const T> dy,
                               const Matrix<const float> dresidual, const Matrix<float> dstate,
                               const Matrix<float> dx) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t words = batch.d / kWidth;
  if (index >= batch.t * words) return;
  const int64_t row = index / words, j = index % words * kWidth;
  const Part part = batch.part_of_row(row);
  const int64_t at = part.before + row - part.piece.begin, i = at / batch.p, k = at % batch.p;
  Words<float, kWidth> sum;
  if (dresidual.data) {
    sum.load(dresidual.at(row, j));
  } else {
    for (int n = 0; n < kWidth; ++n) sum.set(n, 0.f);
  }
  if (i < part.coarse) {
    Words<T, kWidth> more;
    more.load(dy.at(part.first + i, k * batch.d + j));
#pragma unroll
    for (int n = 0; n < kWidth; ++n) sum.set(n, sum.at(n) + more.at(n));
  } else if (dstate.data && part.piece.to >= 0) {
    Words<float, kWidth> more;
    more.load(dstate.at(part.piece.to, k, j));
#pragma unroll
    for (int n = 0; n < kWidth; ++n) sum.set(n, sum.at(n) + more.at(n));
  }
  sum.store(dx.at(row, j));
}

// dstate of the states that pieces start from: a thread for each piece and element or, where pieces
// share a state (`shared`), for each slot and element, which adds up its readers in order. A piece
// reads of its slot `to` the element that it writes, so the two may be one slot.
template <class F>
__device__ void add_readers(const Batch& batch, int64_t count, bool shared, int64_t size,
                            const Matrix<float>& dstate, const F& gradient) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count * size) return;
  const int64_t item = index / size, k = index % size / batch.d, j = index % batch.d;
  const int64_t slot = shared ? item : batch.pieces[item].from;
  if (slot < 0) return;
  float sum = 0;
  bool read = false;
  for (int64_t i = shared ? 0 : item; i < (shared ? batch.count : item + 1); ++i) {
    if (batch.pieces[i].from != slot) continue;
    sum += gradient(batch.part(static_cast<int>(i)), k, j);
    read = true;
  }
  if (read) *dstate.at(slot, k, j) = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    initial_rest_kernel(const Batch batch, int64_t count, bool shared, const Matrix<const T> dy,
                        const Matrix<float> dstate) {
  const auto gradient = [&](const Part& part, int64_t k, int64_t j) {
    if (k >= part.before) return 0.f;
    if (part.coarse > 0) return to_float(*dy.at(part.first, k * batch.d + j));
    return part.piece.to >= 0 ? *dstate.at(part.piece.to, k, j) : 0.f;
  };
  add_readers(batch, count, shared, (batch.p - 1) * batch.d, dstate, gradient);
}

// y = residual + the part of the coarse step before, which is a row of x or stands in the state.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    upsample_kernel(const Batch batch, const Matrix<const T> x, const Matrix<const float> residual,
                    const Matrix<float> state, const Matrix<float> y) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t words = batch.d / kWidth;
  if (index >= batch.t * words) return;
  const int64_t row = index / words, j = index % words * kWidth;
  const Part part = batch.part_of_row(row);
  const int64_t at = part.before + row - part.piece.begin, i = at / batch.p - 1, k = at % batch.p;
  Words<float, kWidth> sum;
  sum.load(residual.at(row, j));
  if (i >= 0) {
    Words<T, kWidth> more;
    more.load(x.at(part.first + i, k * batch.d + j));
#pragma unroll
    for (int n = 0; n < kWidth; ++n) sum.set(n, sum.at(n) + more.at(n));
  } else if (part.piece.from >= 0) {
    Words<float, kWidth> more;
    more.load(state.at(part.piece.from, k, j));
#pragma unroll
    for (int n = 0; n < kWidth; ++n) sum.set(n, sum.at(n) + more.at(n));
  }
  sum.store(y.at(row, j));
}

// Behind it: the last coarse row, or that of before.
template <class T>
__global__ void __launch_bounds__(kThreads)
    keep_next_kernel(const Batch batch, const Matrix<const T> x, const Matrix<float> state) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t size = batch.p * batch.d;
  if (index >= batch.count * size) return;
  const Part part = batch.part(static_cast<int>(index / size));
  if (part.piece.to < 0) return;
  const int64_t column = index % size;
  float value = 0;
  if (part.coarse > 0)
    value = to_float(*x.at(part.first + part.coarse - 1, column));
  else if (part.piece.from >= 0)
    value = *state.at(part.piece.from, column);
  *state.at(part.piece.to, column) = value;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    upsample_backward_kernel(const Batch batch, const Matrix<const float> dy,
                             const Matrix<float> dstate, const Matrix<T> dx) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t words = batch.p * batch.d / kWidth;
  if (index >= batch.m * words) return;
  const int64_t row = index / words, column = index % words * kWidth;
  const int64_t k = column / batch.d, j = column % batch.d;
  const Part part = batch.part_of_coarse_row(row);
  const int64_t i = row - part.first, step = (i + 1) * batch.p + k - part.before;
  Words<float, kWidth> sum;
  if (step < part.piece.length) {
    sum.load(dy.at(part.piece.begin + step, j));
  } else {
    for (int n = 0; n < kWidth; ++n) sum.set(n, 0.f);
  }
  if (i + 1 == part.coarse && dstate.data && part.piece.to >= 0) {
    Words<float, kWidth> more;
    more.load(dstate.at(part.piece.to, column));
#pragma unroll
    for (int n = 0; n < kWidth; ++n) sum.set(n, sum.at(n) + more.at(n));
  }
  Words<T, kWidth> out;
#pragma unroll
  for (int n = 0; n < kWidth; ++n) out.set(n, sum.at(n));
  out.store(dx.at(row, column));
}

__global__ void __launch_bounds__(kThreads)
    initial_next_kernel(const Batch batch, int64_t count, bool shared, const Matrix<const float> dy,
                        const Matrix<float> dstate) {
  const auto gradient = [&](const Part& part, int64_t k, int64_t j) {
    const int64_t step = k - part.before;
    float sum = 0;
    if (step >= 0 && step < part.piece.length) sum = *dy.at(part.piece.begin + step, j);
    if (part.coarse == 0 && part.piece.to >= 0) sum += *dstate.at(part.piece.to, k, j);
    return sum;
  };
  add_readers(batch, count, shared, batch.p * batch.d, dstate, gradient);
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(div_up(threads, kThreads)); }

template <class T>
Matrix<T> matrix(const View& view) {
  return {view.as<std::remove_const_t<T>>(), view.stride[0]};
}
// (s,k,d), or (s,k d) as such.
Matrix<float> state_matrix(const View& view, int64_t d) {
  return {view.as<float>(), view.stride[0], view.rank == 3 ? view.stride[1] : d};
}

template <class Op>
Batch batch_of(const char* name, const Op& op, const char* operand, const View& fine, int index) {
  check(op.rows != nullptr, "{}: rows are missing", name);
  check(op.p >= 2, "{}: p is {}, expected 2 or more", name, op.p);
  expect_rank(name, operand, fine, 2);
  expect(name, operand, fine, DType::f32, {op.rows->total(), fine.cols()});
  check(op.rows->device_pieces() != nullptr, "{}: rows are not in memory of cuda:{}", name, index);
  const Rows::Pooled& pooled = op.rows->pooled(op.p);
  return {.pieces = op.rows->device_pieces(),
          .first = pooled.device_first.template as<int32_t>(),
          .d = fine.cols(),
          .p = op.p,
          .t = op.rows->total(),
          .m = pooled.rows.total(),
          .count = static_cast<int>(op.rows->pieces().size())};
}

void expect_slots(const char* name, const char* operand, const View& state, const Rows& rows,
                  Device device) {
  check(state.rows() >= rows.slots(), "{}: {} is {}, expected {} slots or more", name, operand,
        state.shape(), rows.slots());
  expect_here(name, operand, state, device);
}
void expect_rest(const char* name, const char* operand, const View& state, const Rows& rows,
                 const Batch& batch, Device device) {
  expect_rank(name, operand, state, 3);
  expect(name, operand, state, DType::f32, {state.rows(), batch.p - 1, batch.d});
  expect_slots(name, operand, state, rows, device);
}
void expect_next(const char* name, const char* operand, const View& state, const Rows& rows,
                 const Batch& batch, Device device) {
  expect_rank(name, operand, state, 2);
  expect(name, operand, state, DType::f32, {state.rows(), batch.p * batch.d});
  expect_slots(name, operand, state, rows, device);
}

// Whether pieces read states at all, and whether two read one.
struct Readers {
  bool any = false, shared = false;
  int64_t count = 0;  // items of add_readers()
  explicit Readers(const Rows& rows) {
    std::vector<uint8_t> read(rows.slots(), 0);
    for (const Piece& piece : rows.pieces()) {
      if (piece.from < 0) continue;
      any = true;
      shared = shared || read[piece.from];
      read[piece.from] = 1;
    }
    count = shared ? rows.slots() : static_cast<int64_t>(rows.pieces().size());
  }
};

bool writes_state(const Rows& rows) {
  for (const Piece& piece : rows.pieces())
    if (piece.to >= 0) return true;
  return false;
}

// f with the number of elements of a word, where rows of d are whole words of all of these.
template <class F>
void with_width(int64_t d, std::initializer_list<View> views, const F& f) {
  bool wide = d % kWide == 0;
  for (const View& view : views) wide = wide && aligned(view, kWide);
  if (wide)
    f(std::integral_constant<int, kWide>{});
  else
    f(std::integral_constant<int, 1>{});
}

}  // namespace

void CudaBackend::run(const Downsample& op) {
  const char* const name = "downsample";
  const Batch batch = batch_of(name, op, "x", op.x, index_);
  expect(name, "y", op.y, activation(op.y), {batch.m, batch.p * batch.d});
  if (op.state || op.rows->slots() > 0)
    expect_rest(name, "state", op.state, *op.rows, batch, device());
  expect_here(name, "x", op.x, device());
  expect_here(name, "y", op.y, device());
  if (batch.t * batch.d == 0) return;
  const Matrix<float> state = state_matrix(op.state, batch.d);
  if (batch.m > 0) {
    with_type(name, op.y, [&](auto type) {
      using T = decltype(type);
      with_width(batch.d, {op.x, op.y, op.state}, [&](auto width) {
        downsample_kernel<T, width()>
            <<<blocks_for(batch.m * batch.p * batch.d / width()), kThreads, 0, stream_>>>(
                batch, matrix<const float>(op.x), state, matrix<T>(op.y));
      });
    });
    check_launch(name);
  }
  if (!writes_state(*op.rows)) return;
  keep_rest_kernel<<<blocks_for(batch.count * (batch.p - 1) * batch.d), kThreads, 0, stream_>>>(
      batch, matrix<const float>(op.x), state);
  check_launch(name);
}

void CudaBackend::run(const DownsampleBackward& op) {
  const char* const name = "downsample backward";
  const Batch batch = batch_of(name, op, "dx", op.dx, index_);
  expect(name, "dy", op.dy, activation(op.dy), {batch.m, batch.p * batch.d});
  expect_if(name, "dresidual", op.dresidual, DType::f32, {batch.t, batch.d});
  if (op.dstate) expect_rest(name, "dstate", op.dstate, *op.rows, batch, device());
  for (const auto& [operand, view] :
       {std::pair{"dx", &op.dx}, {"dy", &op.dy}, {"dresidual", &op.dresidual}})
    expect_here(name, operand, *view, device());
  if (batch.t * batch.d == 0) return;
  const Matrix<float> dstate = state_matrix(op.dstate, batch.d);
  const Readers readers(*op.rows);
  with_type(name, op.dy, [&](auto type) {
    using T = decltype(type);
    with_width(batch.d, {op.dy, op.dresidual, op.dx, op.dstate}, [&](auto width) {
      downsample_backward_kernel<T, width()>
          <<<blocks_for(batch.t * batch.d / width()), kThreads, 0, stream_>>>(
              batch, matrix<const T>(op.dy), matrix<const float>(op.dresidual), dstate,
              matrix<float>(op.dx));
    });
    check_launch(name);
    if (!op.dstate || !readers.any) return;
    initial_rest_kernel<T>
        <<<blocks_for(readers.count * (batch.p - 1) * batch.d), kThreads, 0, stream_>>>(
            batch, readers.count, readers.shared, matrix<const T>(op.dy), dstate);
    check_launch(name);
  });
}

void CudaBackend::run(const Upsample& op) {
  const char* const name = "upsample";
  const Batch batch = batch_of(name, op, "y", op.y, index_);
  expect(name, "x", op.x, activation(op.x), {batch.m, batch.p * batch.d});
  expect(name, "residual", op.residual, DType::f32, {batch.t, batch.d});
  if (op.state || op.rows->slots() > 0)
    expect_next(name, "state", op.state, *op.rows, batch, device());
  for (const auto& [operand, view] :
       {std::pair{"x", &op.x}, {"residual", &op.residual}, {"y", &op.y}})
    expect_here(name, operand, *view, device());
  if (batch.t * batch.d == 0) return;
  const Matrix<float> state = state_matrix(op.state, batch.d);
  with_type(name, op.x, [&](auto type) {
    using T = decltype(type);
    with_width(batch.d, {op.x, op.residual, op.y, op.state}, [&](auto width) {
      upsample_kernel<T, width()>
          <<<blocks_for(batch.t * batch.d / width()), kThreads, 0, stream_>>>(
              batch, matrix<const T>(op.x), matrix<const float>(op.residual), state,
              matrix<float>(op.y));
    });
    check_launch(name);
    if (!writes_state(*op.rows)) return;
    keep_next_kernel<T><<<blocks_for(batch.count * batch.p * batch.d), kThreads, 0, stream_>>>(
        batch, matrix<const T>(op.x), state);
    check_launch(name);
  });
}

void CudaBackend::run(const UpsampleBackward& op) {
  const char* const name = "upsample backward";
  const Batch batch = batch_of(name, op, "dy", op.dy, index_);
  expect(name, "dx", op.dx, activation(op.dx), {batch.m, batch.p * batch.d});
  if (op.dstate) expect_next(name, "dstate", op.dstate, *op.rows, batch, device());
  expect_here(name, "dy", op.dy, device());
  expect_here(name, "dx", op.dx, device());
  if (batch.t * batch.d == 0) return;
  const Matrix<float> dstate = state_matrix(op.dstate, batch.d);
  if (batch.m > 0) {
    with_type(name, op.dx, [&](auto type) {
      using T = decltype(type);
      with_width(batch.d, {op.dy, op.dx, op.dstate}, [&](auto width) {
        upsample_backward_kernel<T, width()>
            <<<blocks_for(batch.m * batch.p * batch.d / width()), kThreads, 0, stream_>>>(
                batch, matrix<const float>(op.dy), dstate, matrix<T>(op.dx));
      });
    });
    check_launch(name);
  }
  const Readers readers(*op.rows);
  if (!op.dstate || !readers.any) return;
  initial_next_kernel<<<blocks_for(readers.count * batch.p * batch.d), kThreads, 0, stream_>>>(
      batch, readers.count, readers.shared, matrix<const float>(op.dy), dstate);
  check_launch(name);
}

}  // namespace coil
