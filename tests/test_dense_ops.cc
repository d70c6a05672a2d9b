// The dense ops of a backend but products against the scalar oracle: embedding, norm, pooling,
// cross-entropy, AdamW.
#include <cmath>
#include <deque>
#include <limits>

#include "kernels/ops.h"
#include "tests/field.h"
#include "tests/reference_dense.h"

namespace coil {
namespace {

using Complex = std::complex<double>;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class DenseOps : public testing::TestWithParam<int> {
 protected:
  std::unique_ptr<Backend> backend = make_cpu_backend(GetParam());
  std::mt19937 random{7};
};
INSTANTIATE_TEST_SUITE_P(Threads, DenseOps, testing::Values(1, 2));

std::vector<int32_t> random_ids(int64_t count, int32_t below, std::mt19937& random) {
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % below);
  return ids;
}

View ids_view(std::vector<int32_t>& ids) {
  return host_view(ids.data(), DType::i32, {static_cast<int64_t>(ids.size())});
}

TEST_P(DenseOps, Embed) {
  for (const auto& [t, v, d] : {std::tuple{1, 1, 1}, {7, 5, 19}, {700, 16, 64}}) {
    Field table(v, d, random), y(t, d), from_half(t, d);
    auto ids = random_ids(t, v, random);
    Tensor half(*backend, DType::bf16, {v, d});
    backend->copy(table, half);
    backend->run(Embed{.ids = ids_view(ids), .table = table, .y = y});
    backend->run(Embed{.ids = ids_view(ids), .table = half, .y = from_half});
    for (int i = 0; i < t; ++i)
      for (int j = 0; j < d; ++j) {
        ASSERT_EQ(y.at(i, j), table.at(ids[i], j));
        ASSERT_NEAR(from_half.at(i, j), table.at(ids[i], j), 4e-3 * std::abs(y.at(i, j)));
      }
    y.expect_intact("y");
  }
}

TEST_P(DenseOps, EmbedBackward) {
  // Small tables are summed in blocks of rows, the last one is too large for that.
  for (const auto& [t, v, d] : {std::tuple{1, 1, 1}, {7, 5, 19}, {2500, 16, 40}, {300, 3000, 33}}) {
    Field dy(t, d, random), dtable(v, d, random);
    const Field before = dtable;
    auto ids = random_ids(t, v, random);
    backend->run(EmbedBackward{.ids = ids_view(ids), .dy = dy, .dtable = dtable});
    std::vector<double> want(v * d);
    for (int i = 0; i < t; ++i)
      for (int j = 0; j < d; ++j) want[ids[i] * d + j] += dy.at(i, j);
    for (int i = 0; i < v; ++i)
      for (int j = 0; j < d; ++j)
        ASSERT_NEAR(dtable.at(i, j), want[i * d + j] + before.at(i, j), 2e-5) << t << ' ' << v;
    dtable.expect_intact("dtable");
    Field again = before;
    backend->run(EmbedBackward{.ids = ids_view(ids), .dy = dy, .dtable = again});
    EXPECT_EQ(dtable.bits(), again.bits());
  }
}

// Every step is the sum of two rows, and gives its gradient to both; one without a label is a row.
TEST_P(DenseOps, EmbedWithLabels) {
  for (const auto& [t, v, l, d] :
       {std::tuple{7, 5, 3, 19}, {700, 16, 10, 64}, {300, 3000, 4, 33}}) {
    Field table(v, d, random), labels(l, d, random), y(t, d), dy(t, d, random);
    Field dtable(v, d), dlabels(l, d), alone(v, d), labels_alone(l + 1, d);
    auto ids = random_ids(t, v * (l + 1), random);
    std::vector<int32_t> row(ids), label(ids);
    for (int32_t& id : row) id %= v;
    for (int32_t& id : label) id /= v;
    backend->run(Embed{.ids = ids_view(ids), .table = table, .y = y, .labels = labels});
    for (const Field* field : {&dtable, &dlabels, &alone, &labels_alone}) backend->fill(*field, 0);
    backend->run(
        EmbedBackward{.ids = ids_view(ids), .dy = dy, .dtable = dtable, .dlabels = dlabels});
    backend->run(EmbedBackward{.ids = ids_view(row), .dy = dy, .dtable = alone});
    backend->run(EmbedBackward{.ids = ids_view(label), .dy = dy, .dtable = labels_alone});
    for (int i = 0; i < t; ++i)
      for (int j = 0; j < d; ++j)
        ASSERT_EQ(y.at(i, j), table.at(row[i], j) + (label[i] < l ? labels.at(label[i], j) : 0));
    EXPECT_EQ(dtable.bits(), alone.bits());
    for (int i = 0; i < l; ++i)
      for (int j = 0; j < d; ++j) ASSERT_EQ(dlabels.at(i, j), labels_alone.at(i, j));
    y.expect_intact("y");
  }
}

TEST_P(DenseOps, EmbedRefusesIds) {
  Field table(16, 8, random), y(3, 8);
  std::vector<int32_t> ids = {3, 16, 0};
  const auto run = [&] { backend->run(Embed{.ids = ids_view(ids), .table = table, .y = y}); };
  EXPECT_EQ(message_of(run), "embed: id 16 in row 1, expected 0 to 15");
  ids[1] = -1;
  EXPECT_EQ(message_of(run), "embed: id -1 in row 1, expected 0 to 15");
  EXPECT_EQ(message_of([&] {
              backend->run(EmbedBackward{.ids = ids_view(ids), .dy = y, .dtable = table});
            }),
            "embed backward: id -1 in row 1, expected 0 to 15");
}

std::vector<double> weights_of(const Field& weight, bool given) {
  return given ? weight.values(0) : std::vector<double>{};
}

TEST_P(DenseOps, Norm) {
  const double eps = 1e-3;
  for (const auto& [t, d] : {std::pair{1, 1}, {5, 31}, {3, 256}, {300, 200}, {3, 1500}, {2, 7000}})
    for (const bool residual : {false, true})
      for (const bool weighted : {false, true}) {
        Field x(t, d, random), add(t, d, random), weight(1, d, random, false);
        Field y(t, d), sum(t, d), rstd(t, 1, false);
        backend->run(Norm{.x = x,
                          .residual = residual ? static_cast<const View&>(add) : View{},
                          .weight = weighted ? weight.row() : View{},
                          .y = y,
                          .residual_out = sum,
                          .rstd = rstd.column(),
                          .eps = static_cast<float>(eps)});
        for (int i = 0; i < t; ++i) {
          std::vector<double> r = x.values(i);
          double square = 0;
          for (int j = 0; j < d; ++j) {
            if (residual) r[j] += add.at(i, j);
            ASSERT_FLOAT_EQ(sum.at(i, j), static_cast<float>(r[j]));
            square += r[j] * r[j];
          }
          ASSERT_NEAR(rstd.at(i, 0), 1 / std::sqrt(square / d + eps), 1e-5 * rstd.at(i, 0));
          const auto want = reference::norm(r, weights_of(weight, weighted), eps);
          for (int j = 0; j < d; ++j)
            ASSERT_NEAR(y.at(i, j), want[j], 2e-6 * std::abs(want[j]) + 1e-7);
        }
        y.expect_intact("y");
        sum.expect_intact("residual_out");
        rstd.expect_intact("rstd");

        // In place: y on x, and the sum on the residual.
        Field x_own = x, sum_own = add;
        backend->run(Norm{.x = x_own,
                          .residual = residual ? static_cast<const View&>(sum_own) : View{},
                          .weight = weighted ? weight.row() : View{},
                          .y = x_own,
                          .residual_out = residual ? static_cast<const View&>(sum_own) : View{},
                          .eps = static_cast<float>(eps)});
        for (int i = 0; i < t; ++i)
          for (int j = 0; j < d; ++j) {
            ASSERT_EQ(x_own.at(i, j), y.at(i, j));
            ASSERT_TRUE(!residual || sum_own.at(i, j) == sum.at(i, j));
          }
      }
}

TEST_P(DenseOps, NormBackwardByComplexStep) {
  const double eps = 1e-3;
  for (const auto& [t, d] : {std::pair{1, 1}, {5, 31}, {1100, 40}, {2, 1100}})
    for (const bool residual : {false, true})
      for (const bool weighted : {false, true}) {
        Field x(t, d, random), weight(1, d, random, false), dy(t, d, random), up(t, d, random);
        Field y(t, d), rstd(t, 1, false), dx(t, d), dweight(1, d, random, false);
        const Field before = dweight;
        backend->run(Norm{.x = x,
                          .weight = weighted ? weight.row() : View{},
                          .y = y,
                          .rstd = rstd.column(),
                          .eps = static_cast<float>(eps)});
        const NormBackward op{.x = x,
                              .weight = weighted ? weight.row() : View{},
                              .rstd = rstd.column(),
                              .dy = dy,
                              .dresidual = residual ? static_cast<const View&>(up) : View{},
                              .dx = dx,
                              .dweight = weighted ? dweight.row() : View{},
                              .eps = static_cast<float>(eps)};
        backend->run(op);
        std::vector<double> want_dweight = before.values(0);
        for (int i = 0; i < t; ++i) {
          const auto values = x.values(i), scale = weights_of(weight, weighted);
          if (t < 100 || i % 97 == 0) {
            for (int j = 0; j < d; ++j) {
              std::vector<Complex> r(values.begin(), values.end());
              r[j] += Complex(0, reference::kStep);
              const auto out =
                  reference::norm(r, std::vector<Complex>(scale.begin(), scale.end()), eps);
              double want = residual ? up.at(i, j) : 0;
              for (int l = 0; l < d; ++l) want += dy.at(i, l) * out[l].imag() / reference::kStep;
              ASSERT_NEAR(dx.at(i, j), want, 2e-5) << i << ' ' << j;
            }
          }
          const auto normed = reference::norm(values, {}, eps);
          for (int j = 0; j < d; ++j) want_dweight[j] += dy.at(i, j) * normed[j];
        }
        for (int j = 0; j < d && weighted; ++j)
          ASSERT_NEAR(dweight.at(0, j), want_dweight[j], 1e-5 * std::sqrt(t) + 1e-5);
        dx.expect_intact("dx");
        dweight.expect_intact("dweight");

        // dx may be dy or dresidual, and the same bits come out.
        Field dy_own = dy, up_own = up;
        NormBackward own = op;
        own.dweight = {};
        own.dy = own.dx = dy_own;
        backend->run(own);
        EXPECT_EQ(dy_own.at(t - 1, d - 1), dx.at(t - 1, d - 1));
        if (!residual) continue;
        own = op;
        own.dweight = {};
        own.dresidual = own.dx = up_own;
        backend->run(own);
        EXPECT_EQ(up_own.at(t - 1, 0), dx.at(t - 1, 0));
      }
}

TEST_P(DenseOps, NormKeepsNanInItsRow) {
  Field x(4, 50, random), y(4, 50);
  x.at(2, 33) = kNan;
  backend->run(Norm{.x = x, .y = y});
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 50; ++j) ASSERT_EQ(std::isnan(y.at(i, j)), i == 2);
  EXPECT_EQ(message_of([&] { backend->run(Norm{.x = x, .residual = y, .y = y}); }),
            "norm: residual_out is missing, expected (4, 50) f32 with residual");
}

// The same sequences whole, and cut into pieces with the state carried and forked.
TEST_P(DenseOps, PoolInPieces) {
  const int64_t d = 75;
  for (const Pooling pooling : {Pooling::last, Pooling::mean}) {
    Field x(2000, d, random), y(3, d), whole(3, d);
    Tensor state(*backend, DType::f64, {4, d + 1});
    backend->fill(state, 1e9);  // what is not read does not matter
    const Rows all(
        *backend,
        {{.begin = 0, .length = 1}, {.begin = 1, .length = 63}, {.begin = 64, .length = 1936}});
    backend->run(Pool{.x = x, .y = whole, .rows = &all, .pooling = pooling});
    const Rows first(*backend, {{.begin = 0, .length = 1},
                                {.begin = 1, .length = 40, .to = 2, .last = false},
                                {.begin = 41, .length = 1, .to = 0, .last = false}});
    Field none(1, d);
    backend->run(
        Pool{.x = x.rows(0, 42), .y = none, .state = state, .rows = &first, .pooling = pooling});
    for (int64_t j = 0; j < d; ++j) ASSERT_FLOAT_EQ(none.at(0, j), whole.at(0, j));
    const Rows second(*backend, {{.begin = 0, .length = 23, .position = 40, .from = 2, .to = 3},
                                 {.begin = 23, .length = 1936, .position = 0}});
    Field rest(2, d);
    backend->run(Pool{
        .x = x.rows(41, 1959), .y = rest, .state = state, .rows = &second, .pooling = pooling});
    for (int64_t i = 0; i < 3; ++i) {
      const Piece& piece = all.pieces()[i];
      for (int64_t j = 0; j < d; ++j) {
        double sum = 0;
        for (int64_t t = 0; t < piece.length; ++t) sum += x.at(piece.begin + t, j);
        const double want = pooling == Pooling::mean ? sum / static_cast<double>(piece.length)
                                                     : x.at(piece.begin + piece.length - 1, j);
        ASSERT_NEAR(whole.at(i, j), want, 1e-6);
        ASSERT_TRUE(i == 0 || rest.at(i - 1, j) == whole.at(i, j));
      }
    }
    rest.expect_intact("y");
    if (pooling == Pooling::mean) {
      EXPECT_EQ(state.view().row<double>(2)[d], 40);  // the forked state stays
      EXPECT_EQ(state.view().row<double>(3)[d], 63);
      EXPECT_EQ(state.view().row<double>(1)[0], 1e9);
    }
  }
}

TEST_P(DenseOps, PoolBackward) {
  const int64_t d = 75;
  const Rows rows(
      *backend,
      {{.begin = 0, .length = 1}, {.begin = 1, .length = 63}, {.begin = 64, .length = 936}});
  Field dy(3, d, random);
  for (const Pooling pooling : {Pooling::last, Pooling::mean}) {
    Field dx(1000, d);
    backend->run(PoolBackward{.dy = dy, .dx = dx, .rows = &rows, .pooling = pooling});
    for (int64_t i = 0; i < 3; ++i) {
      const Piece& piece = rows.pieces()[i];
      for (int64_t t = 0; t < piece.length; ++t)
        for (int64_t j = 0; j < d; ++j) {
          const double own = pooling == Pooling::mean ? 1. / static_cast<double>(piece.length)
                                                      : (t + 1 == piece.length ? 1. : 0.);
          ASSERT_FLOAT_EQ(dx.at(piece.begin + t, j), static_cast<float>(dy.at(i, j) * own));
        }
    }
    dx.expect_intact("dx");
  }
  const Rows cut(*backend, {{.begin = 0, .length = 1000, .last = false}});
  Field dx(1000, d), no_dy(0, d);
  EXPECT_EQ(message_of([&] { backend->run(PoolBackward{.dy = no_dy, .dx = dx, .rows = &cut}); }),
            "pool backward: piece 0 is not a whole sequence");
}

TEST_P(DenseOps, CrossEntropyByComplexStep) {
  const float scale = 0.7f;
  for (const auto& [m, v] : {std::pair{1, 1}, {9, 5}, {600, 16}, {4, 300}, {2, 1203}})
    for (const bool weighted : {false, true}) {
      Field logits(m, v, random), loss(m, 1, false), dlogits(m, v), weights(1, v, random, false);
      for (int j = 0; j < v; ++j) weights.at(0, j) = std::abs(weights.at(0, j));
      for (int j = 0; j < v; ++j) logits.at(0, j) *= 50;
      auto targets = random_ids(m, v, random);
      if (m > 3) targets[3] = -1;
      const CrossEntropy op{.logits = logits,
                            .targets = ids_view(targets),
                            .loss = loss.column(),
                            .dlogits = dlogits,
                            .class_weights = weighted ? weights.row() : View{},
                            .scale = scale};
      backend->run(op);
      for (int i = 0; i < m; ++i) {
        if (targets[i] < 0) {
          ASSERT_EQ(loss.at(i, 0), 0);
          for (int j = 0; j < v; ++j) ASSERT_EQ(dlogits.at(i, j), 0);
          continue;
        }
        const double weight = weighted ? weights.at(0, targets[i]) : 1;
        const double want = reference::cross_entropy(logits.values(i), targets[i], weight);
        ASSERT_NEAR(loss.at(i, 0), want, 2e-6 * std::abs(want) + 1e-6);
        const auto values = logits.values(i);
        for (int j = 0; j < v; ++j) {
          std::vector<Complex> x(values.begin(), values.end());
          x[j] += Complex(0, reference::kStep);
          const double slope =
              reference::cross_entropy(x, targets[i], weight).imag() / reference::kStep;
          ASSERT_NEAR(dlogits.at(i, j), scale * slope, 2e-6);
        }
      }
      dlogits.expect_intact("dlogits");
      loss.expect_intact("loss");
      Field own = logits, alone(m, 1, false);
      CrossEntropy in_place = op;
      in_place.logits = in_place.dlogits = own;
      backend->run(in_place);
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < v; ++j) ASSERT_EQ(own.at(i, j), dlogits.at(i, j));
      CrossEntropy loss_only = op;
      loss_only.dlogits = {};
      loss_only.loss = alone.column();
      backend->run(loss_only);
      EXPECT_EQ(alone.bits(), loss.bits());
    }
}

TEST_P(DenseOps, CrossEntropyOfNanAndInfinity) {
  const float inf = std::numeric_limits<float>::infinity();
  Field logits(5, 33, random), loss(5, 1, false), dlogits(5, 33);
  logits.at(1, 20) = kNan;
  logits.at(2, 32) = kNan;
  logits.at(3, 4) = inf;
  for (int j = 5; j < 30; ++j) logits.at(4, j) = -inf;  // ruled out: an ordinary case
  std::vector<int32_t> targets = {0, 1, 2, 3, 4};
  backend->run(CrossEntropy{
      .logits = logits, .targets = ids_view(targets), .loss = loss.column(), .dlogits = dlogits});
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(std::isnan(loss.at(i, 0)), i >= 1 && i <= 3) << i;
    EXPECT_EQ(std::isnan(dlogits.at(i, 0)), i >= 1 && i <= 3) << i;
  }
  EXPECT_EQ(dlogits.at(4, 7), 0);
  targets[2] = 33;
  EXPECT_EQ(message_of([&] {
              backend->run(CrossEntropy{
                  .logits = logits, .targets = ids_view(targets), .loss = loss.column()});
            }),
            "cross_entropy: target 33 in row 2, expected -1 to 32");
}

TEST_P(DenseOps, SumSquaresIsTheSameForAnyThreads) {
  for (const int count : {1, 100, 200'001}) {
    Field x(1, count, random, false);
    double out = 2, alone = 2, want = 2;
    backend->run(SumSquares{.x = {{x.row()}}, .out = host_view(&out, DType::f64, {1})});
    make_cpu_backend(1)->run(
        SumSquares{.x = {{x.row()}}, .out = host_view(&alone, DType::f64, {1})});
    for (int i = 0; i < count; ++i) want += static_cast<double>(x.at(0, i)) * x.at(0, i);
    EXPECT_NEAR(out, want, 1e-12 * want);
    EXPECT_EQ(out, alone);
  }
  Field x(1, 5, random, false);
  x.at(0, 4) = kNan;
  double out = 0;
  backend->run(SumSquares{.x = {{x.row()}}, .out = host_view(&out, DType::f64, {1})});
  EXPECT_TRUE(std::isnan(out));
}

TEST_P(DenseOps, GluByComplexStep) {
  for (const auto& [t, d] : {std::pair{1, 1}, {7, 19}, {600, 64}}) {
    Field x(t, 2 * d, random), y(t, d), dy(t, d, random), dx(t, 2 * d);
    backend->run(Glu{.x = x, .y = y});
    backend->run(GluBackward{.x = x, .dy = dy, .dx = dx});
    for (int i = 0; i < t; ++i)
      for (int j = 0; j < d; ++j) {
        const double a = x.at(i, j), b = x.at(i, d + j), g = dy.at(i, j);
        ASSERT_NEAR(y.at(i, j), reference::glu(a, b), 1e-6 * (1 + std::abs(a)));
        const Complex step(0, reference::kStep);
        ASSERT_NEAR(dx.at(i, j), g * reference::glu(a + step, Complex(b)).imag() / reference::kStep,
                    1e-6 * (1 + std::abs(g)));
        ASSERT_NEAR(dx.at(i, d + j),
                    g * reference::glu(Complex(a), b + step).imag() / reference::kStep,
                    1e-6 * (1 + std::abs(a * g)));
      }
    y.expect_intact("y");
    dx.expect_intact("dx");
    backend->run(GluBackward{.x = x, .dy = dy, .dx = x});
    for (int i = 0; i < t; ++i)
      for (int j = 0; j < 2 * d; ++j) ASSERT_EQ(x.at(i, j), dx.at(i, j));
  }
  Field x(2, 6, random), y(2, 3);
  x.at(0, 4) = kNan;
  backend->run(Glu{.x = x, .y = y});
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 3; ++j) EXPECT_EQ(std::isnan(y.at(i, j)), i == 0 && j == 1);
  Field narrow(2, 5, random);
  EXPECT_EQ(message_of([&] { backend->run(Glu{.x = narrow, .y = y}); }),
            "glu: x is (2, 5) f32, expected (2, 6) f32");
}

TEST_P(DenseOps, TenStepsOfAdamW) {
  // Tensors of several lengths, one in many blocks; the second is not decayed.
  struct Tensors {
    Field w, m, v, copy;
    std::vector<reference::AdamWElement> want;
  };
  std::deque<Tensors> all;
  for (const int count : {70'003, 1, 100}) {
    Tensors& t = all.emplace_back(Field(1, count, random, false), Field(1, count, false),
                                  Field(1, count, false), Field(1, count, false));
    backend->fill(t.m, 0);
    backend->fill(t.v, 0);
    for (int i = 0; i < count; ++i) t.want.push_back({.w = t.w.at(0, i)});
  }
  for (int step = 1; step <= 10; ++step) {
    std::deque<Field> gradients;
    std::vector<View> views;
    std::vector<AdamW::Item> items;
    for (Tensors& t : all) {
      views.push_back(gradients.emplace_back(1, t.want.size(), random, false).row());
      items.push_back({.w = t.w.row(),
                       .g = views.back(),
                       .m = t.m.row(),
                       .v = t.v.row(),
                       .copy = t.copy.row(),
                       .decay = t.want.size() == 1 ? 0 : 0.1f});
    }
    const std::deque<Field> before = gradients;
    double squares = 0;
    backend->run(SumSquares{.x = views, .out = host_view(&squares, DType::f64, {1})});
    const bool clipped = step % 2 == 0;
    const double scale = clipped ? 20 / (std::sqrt(squares) + 1e-6) : 1;
    ASSERT_TRUE(!clipped || scale < 1);
    const float lr = 1e-2f / static_cast<float>(step);
    backend->run(AdamW{.items = items,
                       .squares = host_view(&squares, DType::f64, {1}),
                       .clip = clipped ? 20. : 0.,
                       .lr = lr,
                       .beta1 = 0.9f,
                       .beta2 = 0.95f,
                       .eps = 1e-8f,
                       .step = step});
    for (size_t k = 0; k < all.size(); ++k)
      for (size_t i = 0; i < all[k].want.size(); ++i) {
        all[k].want[i].step(before[k].at(0, i) * scale, lr, 0.9f, 0.95f, 1e-8f, items[k].decay,
                            step);
        ASSERT_EQ(gradients[k].at(0, i), 0);
      }
  }
  for (Tensors& t : all) {
    for (size_t i = 0; i < t.want.size(); ++i) {
      ASSERT_NEAR(t.w.at(0, i), t.want[i].w, 2e-6);
      ASSERT_NEAR(t.m.at(0, i), t.want[i].m, 1e-6);
      ASSERT_NEAR(t.v.at(0, i), t.want[i].v, 1e-6);
      ASSERT_EQ(t.copy.at(0, i), t.w.at(0, i));
    }
    t.w.expect_intact("w");
    t.copy.expect_intact("copy");
  }
}

TEST_P(DenseOps, AdamWWritesNothingWhereTheNormIsNotFinite) {
  Field w(1, 9, random, false), g(1, 9, random, false), m(1, 9, random, false),
      v(1, 9, random, false);
  const auto bits = [&] { return std::vector{w.bits(), g.bits(), m.bits(), v.bits()}; };
  const auto before = bits();
  const AdamW::Item item{.w = w.row(), .g = g.row(), .m = m.row(), .v = v.row()};
  for (double squares : {static_cast<double>(kNan), std::numeric_limits<double>::infinity()})
    for (const double clip : {0., 1.})
      backend->run(AdamW{.items = {&item, 1},
                         .squares = host_view(&squares, DType::f64, {1}),
                         .clip = clip,
                         .lr = 1});
  EXPECT_EQ(bits(), before);
}

TEST_P(DenseOps, AdamWRefusesWhatDoesNotFit) {
  Field w(1, 9, random, false), other(1, 3, random, false);
  AdamW::Item item{.w = w.row(), .g = other.row(), .m = w.row(), .v = w.row()};
  const auto message = [&](double clip) {
    return message_of([&] { backend->run(AdamW{.items = {&item, 1}, .clip = clip, .lr = 1}); });
  };
  EXPECT_EQ(message(0), "adamw: g is (3) f32, expected 9 of f32, contiguous");
  EXPECT_EQ(message(1), "adamw: squares is missing, expected it beside clip");
}

}  // namespace
}  // namespace coil
