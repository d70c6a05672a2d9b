// Tensors of more than 2^31 elements on the GPU: the last rows must be what the same op gives for
// them alone, and what is added up over all rows what it is over the first and then the others.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "kernels/ops.h"
#include "tests/gradcheck.h"
#include "tests/test_device.h"

namespace coil {
namespace {

class CudaLarge : public testing::Test {
 protected:
  static constexpr int64_t kRows = 1'100'000, kCols = 2048, kTail = 4000;
  static_assert(kRows * kCols > int64_t{1} << 31);
  void SetUp() override {
    COIL_NEEDS_TEST_DEVICE();
    gpu = make_test_backend();
  }
  // Random rows, repeated.
  Tensor large(DType dtype, int64_t cols, float scale = 1, unsigned seed = 5) {
    constexpr int64_t kOther = 10'007;
    Tensor all(*gpu, dtype, {kRows, cols});
    std::mt19937 random(seed);
    std::normal_distribution<float> draw(0, scale);
    std::vector<float> host(kOther * cols);
    for (float& value : host) value = draw(random);
    const View first = all.view().slice(0, kOther);
    gpu->copy(host_view(host.data(), DType::f32, {kOther, cols}), first);
    for (int64_t begin = kOther; begin < kRows; begin += kOther) {
      const int64_t rows = std::min(kOther, kRows - begin);
      gpu->copy(first.slice(0, rows), all.view().slice(begin, rows));
    }
    gpu->sync();
    return all;
  }
  Tensor zeros(DType dtype, std::initializer_list<int64_t> shape) {
    Tensor tensor(*gpu, dtype, shape);
    gpu->fill(tensor, 0);
    return tensor;
  }
  // Some need more than smaller cards have.
  bool room_for(int64_t gigabytes) const { return gpu->memory().room() >= gigabytes << 30; }
  void expect_scan_backward(const std::vector<Piece>& pieces, int64_t compared);
  Tensor small(std::initializer_list<int64_t> shape, float scale, float offset = 0) {
    Tensor tensor(*gpu, DType::f32, shape);
    std::mt19937 random(6);
    std::normal_distribution<float> draw(offset, scale);
    std::vector<float> host(tensor.count());
    for (float& value : host) value = draw(random);
    gpu->copy(host_view(host.data(), DType::f32, shape), tensor);
    gpu->sync();
    return tensor;
  }
  // The last `rows` rows of both.
  void expect_same_tail(const View& a, const View& b, int64_t rows, double tolerance) {
    const auto last = [&](const View& view) {
      return values_of<double>(*gpu, view.slice(view.rows() - rows, rows));
    };
    EXPECT_LE(relative(last(a), last(b)), tolerance);
  }
  // What was added up over all rows, and over the first of them and then the others.
  void expect_same_sums(std::initializer_list<const Tensor*> whole,
                        std::initializer_list<const Tensor*> halves, double tolerance) {
    for (auto a = whole.begin(), b = halves.begin(); a != whole.end(); ++a, ++b)
      EXPECT_LE(relative(values_of<double>(*gpu, **a), values_of<double>(*gpu, **b)), tolerance)
          << "sum " << a - whole.begin();
  }
  static View last(const View& view, int64_t rows = kTail) {
    return view.slice(view.rows() - rows, rows);
  }
  static constexpr std::pair<int64_t, int64_t> kHalves[] = {{0, kRows / 2},
                                                            {kRows / 2, kRows - kRows / 2}};
  std::unique_ptr<Backend> gpu;
};

TEST_F(CudaLarge, Fill) {
  const Tensor x(*gpu, DType::bf16, {kRows, kCols});
  for (const double value : {3., 0.}) {
    gpu->fill(x, value);
    gpu->fill(x.view().slice(kRows - 2, 1), 5);
    for (const View& view : {x.view().slice(0, 9), last(x), x.view().slice(kRows / 2, 9)}) {
      const auto found = values_of<double>(*gpu, view);
      for (size_t i = 0; i < found.size(); ++i) {
        const bool other = view.rows() == kTail && i / kCols == kTail - 2;
        ASSERT_EQ(found[i], other ? 5 : value) << i;
      }
    }
  }
}

TEST_F(CudaLarge, Norm) {
  const Tensor x = large(DType::bf16, kCols), weight = small({kCols}, 0.1f, 1);
  const Tensor y(*gpu, DType::bf16, {kRows, kCols}), part(*gpu, DType::bf16, {kTail, kCols});
  gpu->run(Norm{.x = x, .weight = weight, .y = y});
  gpu->run(Norm{.x = x.view().slice(kRows - kTail, kTail), .weight = weight, .y = part});
  expect_same_tail(y, part, kTail, 0);
}

TEST_F(CudaLarge, NormBackward) {
  const Tensor x = large(DType::f32, kCols), dy = large(DType::bf16, kCols, 1, 7);
  const Tensor weight = small({kCols}, 0.1f, 1), rstd = small({kRows}, 0.1f, 1);
  const Tensor dx(*gpu, DType::f32, {kRows, kCols}), rounded(*gpu, DType::bf16, {kRows, kCols});
  const Tensor part(*gpu, DType::f32, {kTail, kCols}),
      part_rounded(*gpu, DType::bf16, {kTail, kCols});
  const Tensor dweight = zeros(DType::f32, {kCols}), halves = zeros(DType::f32, {kCols});
  NormBackward op{.x = x,
                  .weight = weight,
                  .rstd = rstd,
                  .dy = dy,
                  .dresidual = x,
                  .dx = dx,
                  .dweight = dweight,
                  .dx_act = rounded};
  gpu->run(op);
  op = {.x = last(x),
        .weight = weight,
        .rstd = last(rstd),
        .dy = last(dy),
        .dresidual = last(x),
        .dx = part,
        .dx_act = part_rounded};
  gpu->run(op);
  expect_same_tail(dx, part, kTail, 1e-6);
  expect_same_tail(rounded, part_rounded, kTail, 1e-3);
  for (const auto& [begin, rows] : kHalves)
    gpu->run(NormBackward{.x = x.view().slice(begin, rows),
                          .weight = weight,
                          .rstd = rstd.view().slice(begin, rows),
                          .dy = dy.view().slice(begin, rows),
                          .dx = dx.view().slice(begin, rows),
                          .dweight = halves});
  expect_same_sums({&dweight}, {&halves}, 1e-4);
}

TEST_F(CudaLarge, ProductAndSumOfRows) {
  const Tensor a = large(DType::bf16, 64), b = large(DType::bf16, 64);
  const View weight = b.view().slice(0, kCols);
  const Tensor c(*gpu, DType::bf16, {kRows, kCols}), part(*gpu, DType::bf16, {kTail, kCols});
  gpu->run(Gemm{.a = a, .b = weight, .c = c, .tb = true});
  gpu->run(Gemm{.a = a.view().slice(kRows - kTail, kTail), .b = weight, .c = part, .tb = true});
  expect_same_tail(c, part, kTail, 4e-3);
  const Tensor sum(*gpu, DType::f32, {kCols}), head(*gpu, DType::f32, {kCols});
  gpu->fill(sum, 0);
  gpu->fill(head, 0);
  gpu->run(SumRows{.x = c, .out = sum});
  for (const auto& [begin, rows] :
       {std::pair{int64_t{0}, kRows / 2}, {kRows / 2, kRows - kRows / 2}})
    gpu->run(SumRows{.x = c.view().slice(begin, rows), .out = head});
  EXPECT_LE(relative(values_of<double>(*gpu, sum), values_of<double>(*gpu, head)), 1e-4);
}

TEST_F(CudaLarge, ConvolutionAndScan) {
  const int64_t e = kCols / 2, n = 16;
  const Tensor xz = large(DType::bf16, kCols), weight = small({e, 4}, 0.5f), bias = small({e}, 1);
  const View x = xz.view().columns(0, e), z = xz.view().columns(e, e);
  const Tensor conv(*gpu, DType::bf16, {kRows, e}), part(*gpu, DType::bf16, {kTail, e});
  const Rows all = Rows::equal(*gpu, 1, kRows), tail = Rows::equal(*gpu, 1, kTail);
  const auto last = [&](const View& view) { return view.slice(kRows - kTail, kTail); };
  gpu->run(Conv1d{.x = x, .weight = weight, .y = conv, .bias = bias, .rows = &all});
  gpu->run(Conv1d{.x = last(x), .weight = weight, .y = part, .bias = bias, .rows = &tail});
  expect_same_tail(conv, part, kTail - 3, 0);

  const Tensor dbc = large(DType::bf16, 2 * n), A_log = small({e, n}, 0.3f, 1);
  const Tensor D = small({e}, 1), dt_bias = small({e}, 0.1f, -2);
  const View B = dbc.view().columns(0, n), C = dbc.view().columns(n, n);
  const Tensor y(*gpu, DType::bf16, {kRows, e});
  gpu->run(SelectiveScan{.x = conv,
                         .dt = x,
                         .A_log = A_log,
                         .B = B,
                         .C = C,
                         .D = D,
                         .dt_bias = dt_bias,
                         .y = y,
                         .z = z,
                         .rows = &all});
  gpu->run(SelectiveScan{.x = last(conv),
                         .dt = last(x),
                         .A_log = A_log,
                         .B = last(B),
                         .C = last(C),
                         .D = D,
                         .dt_bias = dt_bias,
                         .y = part,
                         .z = last(z),
                         .rows = &tail});
  // 3,000 steps on, the state has forgotten where it began.
  expect_same_tail(y, part, kTail - 3000, 4e-3);
}

TEST_F(CudaLarge, ConvolutionBackward) {
  const Tensor x = large(DType::bf16, kCols), dy = large(DType::bf16, kCols, 1, 7);
  const Tensor weight = small({kCols, 4}, 0.5f), bias = small({kCols}, 1);
  const Tensor dx(*gpu, DType::bf16, {kRows, kCols}), part(*gpu, DType::bf16, {kTail, kCols});
  const Tensor dweight = zeros(DType::f32, {kCols, 4}), dbias = zeros(DType::f32, {kCols});
  const Tensor half_weight = zeros(DType::f32, {kCols, 4}), half_bias = zeros(DType::f32, {kCols});
  const Tensor unused_weight = zeros(DType::f32, {kCols, 4});
  // Two sequences: what each of them adds to the parameters is known from itself.
  const Rows all(*gpu, whole_pieces({kHalves[0].second, kHalves[1].second}));
  Conv1dBackward op{.x = x,
                    .weight = weight,
                    .dy = dy,
                    .bias = bias,
                    .dx = dx,
                    .dweight = dweight,
                    .dbias = dbias,
                    .rows = &all};
  gpu->run(op);
  const Rows tail = Rows::equal(*gpu, 1, kTail);
  op = {.x = last(x),
        .weight = weight,
        .dy = last(dy),
        .bias = bias,
        .dx = part,
        .dweight = unused_weight,
        .rows = &tail};
  gpu->run(op);
  expect_same_tail(dx, part, kTail - 3, 1e-3);
  for (const auto& [begin, rows] : kHalves) {
    const Rows half = Rows::equal(*gpu, 1, rows);
    gpu->run(Conv1dBackward{.x = x.view().slice(begin, rows),
                            .weight = weight,
                            .dy = dy.view().slice(begin, rows),
                            .bias = bias,
                            .dx = dx.view().slice(begin, rows),
                            .dweight = half_weight,
                            .dbias = half_bias,
                            .rows = &half});
  }
  expect_same_sums({&dweight, &dbias}, {&half_weight, &half_bias}, 1e-4);
}

// Forward and backward. The last `compared` rows; and where there are several pieces, parameters'
// gradients beside those of the first half of the pieces and of the others.
void CudaLarge::expect_scan_backward(const std::vector<Piece>& pieces, int64_t compared) {
  const int64_t e = kCols, n = 16, tail = std::min(kTail, pieces.back().length);
  const Tensor x = large(DType::bf16, e), z = large(DType::bf16, e, 1, 7),
               dy = large(DType::bf16, e, 1, 8), BC = large(DType::bf16, 2 * n);
  const Tensor A_log = small({e, n}, 0.3f, 1), D = small({e}, 1), dt_bias = small({e}, 0.1f, -2);
  struct Gradients {
    Tensor y, dx, ddt, dz, dBC;
  };
  const auto gradients = [&](int64_t rows) {
    const auto make = [&](int64_t cols) { return Tensor(*gpu, DType::bf16, {rows, cols}); };
    return Gradients{make(e), make(e), make(e), make(e), make(2 * n)};
  };
  struct Sums {
    Tensor dA_log, dD, ddt_bias;
  };
  const auto sums = [&] {
    return Sums{zeros(DType::f32, {e, n}), zeros(DType::f32, {e}), zeros(DType::f32, {e})};
  };
  // Of the rows from `begin` on; dt is x.
  const auto run = [&](const Rows& rows, int64_t begin, const Gradients& to, const Sums& add) {
    const auto part = [&, count = rows.total()](const View& view) {
      return view.slice(begin, count);
    };
    const auto first = [&, count = rows.total()](const View& view) { return view.slice(0, count); };
    const Tensor checkpoints(*gpu, x.view().dtype, {scan_checkpoints(*gpu, rows), e, n});
    const View B = part(BC).columns(0, n), C = part(BC).columns(n, n);
    gpu->run(SelectiveScan{.x = part(x),
                           .dt = part(x),
                           .A_log = A_log,
                           .B = B,
                           .C = C,
                           .D = D,
                           .dt_bias = dt_bias,
                           .y = first(to.y),
                           .z = part(z),
                           .checkpoints = checkpoints,
                           .rows = &rows});
    gpu->run(SelectiveScanBackward{.x = part(x),
                                   .dt = part(x),
                                   .A_log = A_log,
                                   .B = B,
                                   .C = C,
                                   .D = D,
                                   .dt_bias = dt_bias,
                                   .dy = part(dy),
                                   .z = part(z),
                                   .checkpoints = checkpoints,
                                   .dx = first(to.dx),
                                   .ddt = first(to.ddt),
                                   .dB = first(to.dBC).columns(0, n),
                                   .dC = first(to.dBC).columns(n, n),
                                   .dz = first(to.dz),
                                   .dA_log = add.dA_log,
                                   .dD = add.dD,
                                   .ddt_bias = add.ddt_bias,
                                   .rows = &rows});
  };
  const Gradients found = gradients(kRows), part = gradients(tail);
  const Sums whole = sums(), halves = sums(), unused = sums();
  run(Rows(*gpu, pieces), 0, found, whole);
  run(Rows::equal(*gpu, 1, tail), kRows - tail, part, unused);
  expect_same_tail(found.y, part.y, compared, 4e-3);
  expect_same_tail(found.dx, part.dx, compared, 4e-3);
  expect_same_tail(found.ddt, part.ddt, compared, 4e-3);
  expect_same_tail(found.dz, part.dz, compared, 4e-3);
  expect_same_tail(found.dBC, part.dBC, compared, 4e-3);
  if (pieces.size() == 1) return;
  const auto middle = pieces.begin() + static_cast<std::ptrdiff_t>(pieces.size() / 2);
  const int64_t begin = middle->begin;
  std::vector<Piece> others(middle, pieces.end());
  for (Piece& piece : others) piece.begin -= begin;
  run(Rows(*gpu, {pieces.begin(), middle}), 0, found, halves);
  run(Rows(*gpu, others), begin, found, halves);
  expect_same_sums({&whole.dA_log, &whole.dD, &whole.ddt_bias},
                   {&halves.dA_log, &halves.dD, &halves.ddt_bias}, 1e-4);
}

// In chunks of time. 3,000 steps on, the state has forgotten where it began.
TEST_F(CudaLarge, ScanBackward) {
  if (!room_for(64)) GTEST_SKIP() << "less than 64 GB of the GPU are free";
  expect_scan_backward(whole_pieces({kRows}), kTail - 3000);
}

// So many sequences that they go through in one pass, forward and backward.
TEST_F(CudaLarge, ScanOfManyPieces) {
  if (!room_for(72)) GTEST_SKIP() << "less than 72 GB of the GPU are free";
  constexpr int64_t kCount = 500, kLength = kRows / kCount;
  static_assert(kLength * kCount == kRows && kLength <= kTail);
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < kCount; ++i) pieces.push_back({.begin = i * kLength, .length = kLength});
  expect_scan_backward(pieces, kLength);
}

TEST_F(CudaLarge, S4dScan) {
  const int64_t d = kCols, n = 4;
  const Tensor x = large(DType::bf16, d), C = small({d, n, 2}, 1), D = small({d}, 1);
  const Tensor log_A_real = small({d, n}, 0.2f), A_imag = small({d, n}, 3);
  const Tensor log_dt = small({d}, 0.2f, -3);
  const Tensor y(*gpu, DType::bf16, {kRows, d}), part(*gpu, DType::bf16, {kTail, d});
  const Rows all = Rows::equal(*gpu, 1, kRows), tail = Rows::equal(*gpu, 1, kTail);
  S4dScan op{.x = x,
             .log_A_real = log_A_real,
             .A_imag = A_imag,
             .C = C,
             .log_dt = log_dt,
             .D = D,
             .y = y,
             .rows = &all,
             .gelu = true};
  gpu->run(op);
  op.x = x.view().slice(kRows - kTail, kTail);
  op.y = part;
  op.rows = &tail;
  gpu->run(op);
  expect_same_tail(y, part, kTail - 3000, 4e-3);

  const Tensor gated(*gpu, DType::bf16, {kRows, d / 2}), last(*gpu, DType::bf16, {kTail, d / 2});
  gpu->run(Glu{.x = y, .y = gated});
  gpu->run(Glu{.x = y.view().slice(kRows - kTail, kTail), .y = last});
  expect_same_tail(gated, last, kTail, 0);
}

TEST_F(CudaLarge, S4dScanBackward) {
  const int64_t d = kCols, n = 4;
  const Tensor x = large(DType::bf16, d), dy = large(DType::bf16, d, 1, 7);
  const Tensor C = small({d, n, 2}, 1), D = small({d}, 1), log_A_real = small({d, n}, 0.2f);
  const Tensor A_imag = small({d, n}, 3), log_dt = small({d}, 0.2f, -3);
  struct Sums {
    Tensor log_A_real, A_imag, C, log_dt, D;
  };
  const auto sums = [&] {
    return Sums{zeros(DType::f32, {d, n}), zeros(DType::f32, {d, n}), zeros(DType::f32, {d, n, 2}),
                zeros(DType::f32, {d}), zeros(DType::f32, {d})};
  };
  const Tensor dx(*gpu, DType::bf16, {kRows, d}), part(*gpu, DType::bf16, {kTail, d});
  const Tensor before(*gpu, DType::bf16, {kRows, d});
  // y first stands where dx will.
  const auto run = [&](const Rows& rows, int64_t begin, const View& to, const Sums& add) {
    const View own = x.view().slice(begin, rows.total()),
               kept = before.view().slice(begin, rows.total());
    const Tensor checkpoints(*gpu, DType::f32, {s4d_checkpoints(rows), d, n, 2});
    gpu->run(S4dScan{.x = own,
                     .log_A_real = log_A_real,
                     .A_imag = A_imag,
                     .C = C,
                     .log_dt = log_dt,
                     .D = D,
                     .y = to,
                     .checkpoints = checkpoints,
                     .before_gelu = kept,
                     .rows = &rows,
                     .gelu = true});
    gpu->run(S4dScanBackward{.x = own,
                             .log_A_real = log_A_real,
                             .A_imag = A_imag,
                             .C = C,
                             .log_dt = log_dt,
                             .D = D,
                             .dy = dy.view().slice(begin, rows.total()),
                             .checkpoints = checkpoints,
                             .before_gelu = kept,
                             .dx = to,
                             .dlog_A_real = add.log_A_real,
                             .dA_imag = add.A_imag,
                             .dC = add.C,
                             .dlog_dt = add.log_dt,
                             .dD = add.D,
                             .rows = &rows,
                             .gelu = true});
  };
  const Sums whole = sums(), halves = sums(), unused = sums();
  run(Rows(*gpu, whole_pieces({kHalves[0].second, kHalves[1].second})), 0, dx, whole);
  run(Rows::equal(*gpu, 1, kTail), kRows - kTail, part, unused);
  expect_same_tail(dx, part, kTail - 3000, 4e-3);
  for (const auto& [begin, rows] : kHalves)
    run(Rows::equal(*gpu, 1, rows), begin, dx.view().slice(begin, rows), halves);
  expect_same_sums({&whole.log_A_real, &whole.A_imag, &whole.C, &whole.log_dt, &whole.D},
                   {&halves.log_A_real, &halves.A_imag, &halves.C, &halves.log_dt, &halves.D},
                   1e-4);
}

TEST_F(CudaLarge, GluAndPoolBackward) {
  const Tensor x = large(DType::bf16, kCols), dy = large(DType::bf16, kCols / 2, 1, 7);
  const Tensor dx(*gpu, DType::bf16, {kRows, kCols}), part(*gpu, DType::bf16, {kTail, kCols});
  gpu->run(GluBackward{.x = x, .dy = dy, .dx = dx});
  gpu->run(GluBackward{.x = last(x), .dy = last(dy), .dx = part});
  expect_same_tail(dx, part, kTail, 0);

  const Rows rows(*gpu, whole_pieces({kRows - kTail, kTail})), tail = Rows::equal(*gpu, 1, kTail);
  const Tensor pooled = small({2, kCols}, 1);
  for (const Pooling pooling : {Pooling::mean, Pooling::last}) {
    gpu->run(PoolBackward{.dy = pooled, .dx = dx, .rows = &rows, .pooling = pooling});
    gpu->run(PoolBackward{.dy = last(pooled, 1), .dx = part, .rows = &tail, .pooling = pooling});
    expect_same_tail(dx, part, kTail, 0);
  }
}

// A table of few rows and one of many, which take their gradients by different ways; and one that
// is itself so large.
TEST_F(CudaLarge, EmbedBackward) {
  const Tensor dy = large(DType::f32, kCols);
  std::vector<int32_t> words(kRows);
  for (const int64_t v : {int64_t{7}, int64_t{5000}}) {
    for (int64_t i = 0; i < kRows; ++i) words[i] = static_cast<int32_t>(i * i % 10'007 % v);
    Tensor kept;
    const View ids = brought(*gpu, host_view(words.data(), DType::i32, {kRows}), kept);
    const Tensor dtable = zeros(DType::f32, {v, kCols}), halves = zeros(DType::f32, {v, kCols});
    gpu->run(EmbedBackward{.ids = ids, .dy = dy, .dtable = dtable});
    for (const auto& [begin, rows] : kHalves)
      gpu->run(EmbedBackward{
          .ids = ids.slice(begin, rows), .dy = dy.view().slice(begin, rows), .dtable = halves});
    expect_same_sums({&dtable}, {&halves}, 1e-4);
  }
  const Tensor dtable(*gpu, DType::f32, {kRows, kCols});
  gpu->fill(dtable, 3);
  for (int64_t i = 0; i < kTail; ++i) words[i] = static_cast<int32_t>(kRows - 1 - i);
  Tensor kept;
  const View ids = brought(*gpu, host_view(words.data(), DType::i32, {kTail}), kept);
  const View few = dy.view().slice(0, kTail);
  gpu->run(EmbedBackward{.ids = ids, .dy = few, .dtable = dtable});
  const auto found = values_of(*gpu, last(dtable)), added = values_of(*gpu, few);
  for (int64_t i = 0; i < kTail; ++i)
    for (int64_t j = 0; j < kCols; ++j)
      ASSERT_EQ(found[(kTail - 1 - i) * kCols + j], 3 + added[i * kCols + j]) << i << ' ' << j;
  for (const float other : values_of(*gpu, dtable.view().slice(kRows - 2 * kTail, kTail)))
    ASSERT_EQ(other, 3);
}

TEST_F(CudaLarge, Optimizer) {
  if (!room_for(44)) GTEST_SKIP() << "less than 44 GB of the GPU are free";
  const Tensor w = large(DType::f32, kCols), g = large(DType::f32, kCols, 1, 7);
  const Tensor m = large(DType::f32, kCols, 0.1f, 8), v(*gpu, DType::f32, {kRows, kCols});
  gpu->fill(v, 0.5);
  const Tensor copy(*gpu, DType::bf16, {kRows, kCols});
  const Tensor squares = zeros(DType::f64, {1}), halves = zeros(DType::f64, {1});
  const View gradients[] = {g};
  gpu->run(SumSquares{.x = gradients, .out = squares});
  for (const auto& [begin, rows] : kHalves) {
    const View half[] = {g.view().slice(begin, rows)};
    gpu->run(SumSquares{.x = half, .out = halves});
  }
  expect_same_sums({&squares}, {&halves}, 1e-12);
  EXPECT_NEAR(values_of<double>(*gpu, squares)[0] / (kRows * kCols), 1, 0.01);

  std::vector<Tensor> parts;  // w g m v and the copy
  for (const Tensor* whole : {&w, &g, &m, &v, &copy}) {
    parts.emplace_back(*gpu, whole->view().dtype, std::initializer_list<int64_t>{kTail, kCols});
    gpu->copy(last(*whole), parts.back());
  }
  const AdamW::Item all[] = {{.w = w, .g = g, .m = m, .v = v, .copy = copy, .decay = 0.1f}};
  const AdamW::Item tail[] = {{.w = parts[0],
                               .g = parts[1],
                               .m = parts[2],
                               .v = parts[3],
                               .copy = parts[4],
                               .decay = 0.1f}};
  const auto before = values_of<double>(*gpu, last(w));
  for (const std::span<const AdamW::Item> items : {std::span(all), std::span(tail)})
    gpu->run(AdamW{.items = items, .squares = squares, .clip = 1e3, .lr = 0.01f, .step = 3});
  const Tensor* const whole[] = {&w, &g, &m, &v, &copy};
  for (size_t i = 0; i < parts.size(); ++i) expect_same_tail(*whole[i], parts[i], kTail, 0);
  EXPECT_GT(relative(values_of<double>(*gpu, last(w)), before), 1e-4);
  for (const double zero : values_of<double>(*gpu, last(g))) ASSERT_EQ(zero, 0);
}

TEST_F(CudaLarge, EmbedPoolAndLoss) {
  const Tensor table = small({7, kCols}, 1), y(*gpu, DType::f32, {kRows, kCols});
  std::vector<int32_t> codes(kRows);
  for (int64_t i = 0; i < kRows; ++i) codes[i] = static_cast<int32_t>(i * 5 % 7);
  Tensor kept;
  const View ids = brought(*gpu, host_view(codes.data(), DType::i32, {kRows}), kept);
  gpu->run(Embed{.ids = ids, .table = table, .y = y});
  const Tensor part(*gpu, DType::f32, {kTail, kCols});
  gpu->run(Embed{.ids = ids.slice(kRows - kTail, kTail), .table = table, .y = part});
  expect_same_tail(y, part, kTail, 0);

  const Tensor loss(*gpu, DType::f32, {kRows}), last_loss(*gpu, DType::f32, {kTail});
  gpu->run(CrossEntropy{.logits = y, .targets = ids, .loss = loss});
  gpu->run(
      CrossEntropy{.logits = part, .targets = ids.slice(kRows - kTail, kTail), .loss = last_loss});
  expect_same_tail(loss, last_loss, kTail, 0);

  // With gradients; at last in the place of the logits.
  const Tensor dlogits(*gpu, DType::bf16, {kRows, kCols}), tail(*gpu, DType::bf16, {kTail, kCols});
  const Tensor total = zeros(DType::f64, {1}), halves = zeros(DType::f64, {1});
  gpu->run(CrossEntropy{
      .logits = y, .targets = ids, .loss = loss, .dlogits = dlogits, .total = total, .scale = 2});
  gpu->run(CrossEntropy{.logits = part,
                        .targets = ids.slice(kRows - kTail, kTail),
                        .loss = last_loss,
                        .dlogits = tail,
                        .scale = 2});
  expect_same_tail(loss, last_loss, kTail, 1e-6);
  expect_same_tail(dlogits, tail, kTail, 1e-3);
  for (const auto& [begin, rows] : kHalves)
    gpu->run(CrossEntropy{.logits = y.view().slice(begin, rows),
                          .targets = ids.slice(begin, rows),
                          .loss = loss.view().slice(begin, rows),
                          .total = halves});
  expect_same_sums({&total}, {&halves}, 1e-12);

  const Rows all = Rows::equal(*gpu, 1, kRows);
  const Tensor pooled(*gpu, DType::f32, {1, kCols});
  gpu->run(Pool{.x = y, .y = pooled, .rows = &all});
  const std::vector<double> found = values_of<double>(*gpu, pooled),
                            rows = values_of<double>(*gpu, table);
  std::vector<double> expected(kCols, 0);
  for (const int32_t code : codes)
    for (int64_t j = 0; j < 4; ++j) expected[j] += rows[code * kCols + j] / kRows;
  for (int64_t j = 0; j < 4; ++j) EXPECT_NEAR(found[j], expected[j], 1e-6);

  gpu->run(CrossEntropy{.logits = y, .targets = ids, .loss = loss, .dlogits = y, .scale = 2});
  expect_same_tail(y, tail, kTail, 4e-3);
}

TEST_F(CudaLarge, DownsampleAndUpsample) {
  const int64_t p = 4;
  const Tensor x = large(DType::f32, kCols), y(*gpu, DType::f32, {kRows, kCols});
  const Tensor steps(*gpu, DType::bf16, {kRows / p, p * kCols});
  const Tensor last(*gpu, DType::bf16, {kTail / p, p * kCols});
  const Tensor sum(*gpu, DType::f32, {kTail, kCols});
  const Rows all = Rows::equal(*gpu, 1, kRows), tail = Rows::equal(*gpu, 1, kTail);
  const View end = x.view().slice(kRows - kTail, kTail);
  gpu->run(Downsample{.x = x, .y = steps, .rows = &all, .p = p});
  gpu->run(Downsample{.x = end, .y = last, .rows = &tail, .p = p});
  expect_same_tail(steps, last, kTail / p, 0);
  gpu->run(Upsample{.x = steps, .residual = x, .y = y, .rows = &all, .p = p});
  gpu->run(Upsample{.x = last, .residual = end, .y = sum, .rows = &tail, .p = p});
  expect_same_tail(y, sum, kTail - p, 0);
  gpu->run(UpsampleBackward{.dy = x, .dx = steps, .rows = &all, .p = p});
  gpu->run(UpsampleBackward{.dy = end, .dx = last, .rows = &tail, .p = p});
  expect_same_tail(steps, last, kTail / p, 0);
  gpu->run(DownsampleBackward{.dy = steps, .dresidual = x, .dx = y, .rows = &all, .p = p});
  gpu->run(DownsampleBackward{.dy = last, .dresidual = end, .dx = sum, .rows = &tail, .p = p});
  expect_same_tail(y, sum, kTail, 0);
}

}  // namespace
}  // namespace coil
