// Pooling over a sequence: its last row, or the mean of all its rows, which may arrive in several
// pieces; and its gradient for whole sequences.
//   y = sum_t x[t] / count  or  x[last];   dx[t] = dy / count  or  dy at the last row and else 0
// Sums are kept in f64, so that a sequence of millions of steps gives the same mean however it is
// cut: first of each tile of rows, then of each piece's tiles in order, upon the sum carried so
// far.
//
// Bytes: x is read once, dx written once. Memory is the limit: two additions in f64 an element, of
// which a multiprocessor does 64 a cycle.
#include <algorithm>

#include "kernels/cuda/device.cuh"

namespace coil {
namespace {

using cuda::activation;
using cuda::bf16;
using cuda::div_up;
using cuda::expect_here;
using cuda::from_float;
using cuda::to_float;

constexpr int kThreads = 256;
constexpr int kColumns = 32, kMostSlices = 32;  // of a block that joins a piece's tiles
// Rows of a tile; shorter ones give a short batch more threads.
constexpr int64_t kShortestTile = 64, kLongestTile = 1024;
constexpr int64_t kThreadsWanted = 512;  // of a multiprocessor
constexpr int64_t kBackwardTile = 64;    // rows that share one read of dy

struct Batch {
  const Piece* pieces;
  const int32_t* first;  // first tile of each piece
  int64_t tiles, tile_length, d;
  int piece_count;
  bool all_last;  // every piece is its sequence's last: output row i is piece i's
};

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Word {
  T at[kWidth];
};

// partial (tiles, d): sums of the rows of each tile.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    sum_tiles_kernel(const Batch batch, const T* x, int64_t x_stride, double* partial) {
  const int64_t words = batch.d / kWidth;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= batch.tiles * words) return;
  const int64_t tile = i / words, column = i % words * kWidth;
  const int p = cuda::piece_of(batch.first, batch.piece_count, static_cast<int32_t>(tile));
  const int64_t begin = (tile - batch.first[p]) * batch.tile_length;
  const int64_t rows = min(batch.tile_length, batch.pieces[p].length - begin);
  const T* const from = x + (batch.pieces[p].begin + begin) * x_stride + column;
  double sum[kWidth] = {};
#pragma unroll 8
  for (int64_t row = 0; row < rows; ++row) {
    const auto word = *reinterpret_cast<const Word<T, kWidth>*>(from + row * x_stride);
    for (int k = 0; k < kWidth; ++k) sum[k] += static_cast<double>(to_float(word.at[k]));
  }
  for (int k = 0; k < kWidth; ++k) partial[tile * batch.d + column + k] = sum[k];
}

// The output row of piece p; all threads of the block take part.
__device__ int64_t output_row(const Batch& batch, int p) {
  if (batch.all_last) return p;
  int row = 0;
  for (int begin = 0; begin < p; begin += static_cast<int>(blockDim.x)) {
    const int i = begin + static_cast<int>(threadIdx.x);
    row += __syncthreads_count(i < p && batch.pieces[i].last);
  }
  return row;
}

// Block (piece, columns): the sum carried so far and the tiles' sums, in an order that depends on
// the number of tiles only. The count of the state is left to write_counts_kernel, since other
// blocks read it.
__global__ void __launch_bounds__(kColumns* kMostSlices)
    join_tiles_kernel(const Batch batch, const double* partial, double* state, int64_t state_stride,
                      float* y, int64_t y_stride) {
  __shared__ double sums[kMostSlices][kColumns];
  const int p = static_cast<int>(blockIdx.x), slice = threadIdx.x / kColumns;
  const int slices = blockDim.x / kColumns;
  const int64_t column = blockIdx.y * static_cast<int64_t>(kColumns) + threadIdx.x % kColumns;
  const Piece piece = batch.pieces[p];
  const int64_t first = batch.first[p], length = batch.tile_length;
  const int64_t tiles = (piece.length + length - 1) / length;
  double sum = 0;
  if (column < batch.d) {
#pragma unroll 4
    for (int64_t i = slice; i < tiles; i += slices) sum += partial[(first + i) * batch.d + column];
  }
  sums[slice][threadIdx.x % kColumns] = sum;
  const int64_t row = piece.last ? output_row(batch, p) : 0;
  __syncthreads();
  if (slice != 0 || column >= batch.d) return;
  for (int k = 1; k < slices; ++k) sum += sums[k][threadIdx.x];
  double steps = static_cast<double>(piece.length);
  if (piece.from >= 0) {
    sum = state[piece.from * state_stride + column] + sum;
    steps += state[piece.from * state_stride + batch.d];
  }
  if (piece.to >= 0) state[piece.to * state_stride + column] = sum;
  if (piece.last) y[row * y_stride + column] = static_cast<float>(sum / steps);
}

__global__ void __launch_bounds__(kThreads)
    write_counts_kernel(const Batch batch, double* state, int64_t state_stride) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= batch.piece_count || batch.pieces[i].to < 0) return;
  const Piece piece = batch.pieces[i];
  const double before = piece.from >= 0 ? state[piece.from * state_stride + batch.d] : 0;
  state[piece.to * state_stride + batch.d] = before + static_cast<double>(piece.length);
}

// A block a piece.
template <class T>
__global__ void __launch_bounds__(kThreads)
    last_rows_kernel(const Batch batch, const T* x, int64_t x_stride, float* y, int64_t y_stride) {
  const int p = static_cast<int>(blockIdx.x);
  const Piece piece = batch.pieces[p];
  if (!piece.last) return;
  const int64_t row = output_row(batch, p);
  const T* const from = x + (piece.begin + piece.length - 1) * x_stride;
  for (int64_t j = threadIdx.x; j < batch.d; j += kThreads)
    y[row * y_stride + j] = to_float(from[j]);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    pool_backward_kernel(const Batch batch, const float* dy, int64_t dy_stride, T* dx,
                         int64_t dx_stride, bool mean) {
  const int64_t words = batch.d / kWidth;
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= batch.tiles * words) return;
  const int64_t tile = i / words, column = i % words * kWidth;
  const int p = cuda::piece_of(batch.first, batch.piece_count, static_cast<int32_t>(tile));
  const Piece piece = batch.pieces[p];
  const int64_t begin = (tile - batch.first[p]) * batch.tile_length;
  const int64_t end = min(begin + batch.tile_length, piece.length);
  const float scale = mean ? 1 / static_cast<float>(piece.length) : 1.f;
  Word<T, kWidth> own, other;
  for (int k = 0; k < kWidth; ++k) {
    own.at[k] = from_float<T>(dy[p * dy_stride + column + k] * scale);
    other.at[k] = mean ? own.at[k] : from_float<T>(0.f);
  }
  T* const to = dx + piece.begin * dx_stride + column;
  for (int64_t row = begin; row < end; ++row)
    *reinterpret_cast<Word<T, kWidth>*>(to + row * dx_stride) =
        row + 1 == piece.length ? own : other;
}

bool aligned(const View& view, int64_t width) {
  return view.cols() % width == 0 && view.stride[0] % width == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % (width * size_of(view.dtype)) == 0;
}

Batch batch_of(const Rows& rows, int64_t d) {
  const auto pieces = rows.pieces();
  return {.pieces = rows.device_pieces(),
          .d = d,
          .piece_count = static_cast<int>(pieces.size()),
          .all_last = rows.finished() == static_cast<int64_t>(pieces.size())};
}

void cut(Batch& batch, const Rows& rows, int64_t length) {
  const Rows::Tiles& tiles = rows.tiles(length);
  batch.first = tiles.first.as<int32_t>();
  batch.tiles = tiles.count;
  batch.tile_length = length;
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(div_up(threads, kThreads)); }

}  // namespace

void CudaBackend::run(const Pool& op) {
  check(op.rows != nullptr, "pool: rows are missing");
  expect_rank("pool", "x", op.x, 2);
  const int64_t t = op.rows->total(), d = op.x.cols();
  expect("pool", "x", op.x, activation(op.x), {t, d});
  expect("pool", "y", op.y, DType::f32, {op.rows->finished(), d});
  const auto pieces = op.rows->pieces();
  const bool mean = op.pooling == Pooling::mean;
  if (mean && (op.state || op.rows->slots() > 0)) {
    expect_rank("pool", "state", op.state, 2);
    expect("pool", "state", op.state, DType::f64, {op.state.rows(), d + 1});
    check(op.state.rows() >= op.rows->slots(), "pool: state is {}, expected {} slots or more",
          op.state.shape(), op.rows->slots());
    expect_here("pool", "state", op.state, device());
  }
  expect_here("pool", "x", op.x, device());
  expect_here("pool", "y", op.y, device());
  check(op.rows->device_pieces() != nullptr, "pool: rows are not in memory of cuda:{}", index_);
  if (t == 0) return;
  Batch batch = batch_of(*op.rows, d);
  const auto piece_count = static_cast<unsigned>(batch.piece_count);
  if (!mean) {
    cuda::with_type("pool", op.x, [&](auto type) {
      using T = decltype(type);
      last_rows_kernel<T><<<piece_count, kThreads, 0, stream_>>>(
          batch, op.x.as<T>(), op.x.stride[0], op.y.as<float>(), op.y.stride[0]);
    });
    return cuda::check_launch("pool");
  }
  constexpr int kWide = 4;
  const bool wide = aligned(op.x, kWide);
  const int64_t words = wide ? d / kWide : d, slices = div_up(d, kColumns);
  check(slices <= 65535, "pool: {} columns, expected less than 2^21", d);
  cut(batch, *op.rows,
      std::clamp(div_up(t * words, processors_ * kThreadsWanted), kShortestTile, kLongestTile));
  const Tensor partial(*this, DType::f64, {batch.tiles, d});
  if (d > 0) {
    cuda::with_type("pool", op.x, [&](auto type) {
      using T = decltype(type);
      const auto run = [&](auto width) {
        sum_tiles_kernel<T, width()><<<blocks_for(batch.tiles * words), kThreads, 0, stream_>>>(
            batch, op.x.as<T>(), op.x.stride[0], partial.as<double>());
      };
      if (wide)
        run(std::integral_constant<int, kWide>{});
      else
        run(std::integral_constant<int, 1>{});
    });
    cuda::check_launch("pool");
    // More threads a column where pieces are of many tiles.
    const int threads = kColumns * (batch.tiles > 64 * batch.piece_count ? kMostSlices : 8);
    join_tiles_kernel<<<dim3(piece_count, static_cast<unsigned>(slices)), threads, 0, stream_>>>(
        batch, partial.as<double>(), op.state.as<double>(), op.state.stride[0], op.y.as<float>(),
        op.y.stride[0]);
    cuda::check_launch("pool");
  }
  if (std::none_of(pieces.begin(), pieces.end(), [](const Piece& p) { return p.to >= 0; })) return;
  write_counts_kernel<<<blocks_for(piece_count), kThreads, 0, stream_>>>(
      batch, op.state.as<double>(), op.state.stride[0]);
  cuda::check_launch("pool");
}

void CudaBackend::run(const PoolBackward& op) {
  const char* const name = "pool backward";
  check(op.rows != nullptr, "{}: rows are missing", name);
  expect_rank(name, "dx", op.dx, 2);
  const int64_t t = op.rows->total(), d = op.dx.cols();
  expect(name, "dx", op.dx, activation(op.dx), {t, d});
  expect(name, "dy", op.dy, DType::f32, {op.rows->finished(), d});
  const auto pieces = op.rows->pieces();
  for (size_t i = 0; i < pieces.size(); ++i)
    check(pieces[i].position == 0 && pieces[i].last, "{}: piece {} is not a whole sequence", name,
          i);
  expect_here(name, "dx", op.dx, device());
  expect_here(name, "dy", op.dy, device());
  check(op.rows->device_pieces() != nullptr, "{}: rows are not in memory of cuda:{}", name, index_);
  if (t * d == 0) return;
  Batch batch = batch_of(*op.rows, d);
  cut(batch, *op.rows, kBackwardTile);
  cuda::with_type(name, op.dx, [&](auto type) {
    using T = decltype(type);
    constexpr int kWide = 16 / sizeof(T);
    const bool mean = op.pooling == Pooling::mean;
    const auto run = [&](auto width) {
      pool_backward_kernel<T, width()>
          <<<blocks_for(batch.tiles * (d / width())), kThreads, 0, stream_>>>(
              batch, op.dy.as<float>(), op.dy.stride[0], op.dx.as<T>(), op.dx.stride[0], mean);
    };
    if (aligned(op.dx, kWide))
      run(std::integral_constant<int, kWide>{});
    else
      run(std::integral_constant<int, 1>{});
  });
  cuda::check_launch(name);
}

}  // namespace coil
