// Matrix products and sums of rows of a backend against the scalar oracle.
#include <cmath>
#include <limits>

#include "kernels/ops.h"
#include "tests/field.h"

namespace coil {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class Products : public testing::TestWithParam<int> {
 protected:
  std::unique_ptr<Backend> backend = make_cpu_backend(GetParam());
  std::mt19937 random{7};
};
INSTANTIATE_TEST_SUITE_P(Threads, Products, testing::Values(1, 2));

struct GemmCase {
  int64_t m, n, k;
  bool ta, tb, bf16, bias, inside;
  float alpha, beta;
};

void check_gemm(Backend& backend, const GemmCase& test, std::mt19937& random) {
  const auto [m, n, k, ta, tb, bf16, biased, inside, alpha, beta] = test;
  SCOPED_TRACE(fmt::format("m {} n {} k {} ta {} tb {} bf16 {} bias {} inside {} alpha {} beta {}",
                           m, n, k, ta, tb, bf16, biased, inside, alpha, beta));
  Field a(ta ? k : m, ta ? m : k, random, inside), b(tb ? n : k, tb ? k : n, random, inside);
  Field c(m, n, random, inside), bias(1, n, random, false);
  Tensor half(backend, DType::bf16, {tb ? n : k, tb ? k : n});
  if (bf16) {  // values that bf16 holds, so that the product is the same on every path
    Tensor rounded(backend, DType::bf16, {ta ? k : m, ta ? m : k});
    backend.copy(a, rounded);
    backend.copy(rounded, a);
    backend.copy(b, half);
    backend.copy(half, b);
  }
  const Field before = c;
  if (beta == 0) backend.fill(c, kNan);  // must not be read
  backend.run(Gemm{.a = a,
                   .b = bf16 ? half.view() : static_cast<const View&>(b),
                   .c = c,
                   .bias = biased ? bias.row() : View{},
                   .ta = ta,
                   .tb = tb,
                   .alpha = alpha,
                   .beta = beta});
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0, size = 0;
      for (int64_t p = 0; p < k; ++p) {
        const double term =
            static_cast<double>(ta ? a.at(p, i) : a.at(i, p)) * (tb ? b.at(j, p) : b.at(p, j));
        sum += term;
        size += std::abs(term);
      }
      const double rest = (beta == 0 ? 0. : beta * static_cast<double>(before.at(i, j))) +
                          (biased ? bias.at(0, j) : 0.);
      ASSERT_NEAR(c.at(i, j), alpha * sum + rest,
                  1e-6 * (std::abs(alpha) * size + std::abs(rest) + 1e-3))
          << "row " << i << " column " << j;
    }
  }
  c.expect_intact("c");
}

TEST_P(Products, Gemm) {
  const int64_t shapes[][3] = {{1, 1, 1},     {1, 17, 5},   {2, 64, 33},    {3, 48, 512},
                               {4, 7, 100},   {5, 130, 31}, {8, 9, 64},     {16, 40, 64},
                               {17, 40, 64},  {65, 96, 70}, {120, 51, 130}, {33, 16, 700},
                               {1, 2048, 48}, {2, 600, 70}, {257, 21, 37},  {300, 130, 70}};
  for (const auto& [m, n, k] : shapes)
    for (const bool ta : {false, true})
      for (const bool tb : {false, true})
        for (const bool bf16 : {false, true})
          for (const bool inside : {false, true}) {
            check_gemm(*backend, {m, n, k, ta, tb, bf16, false, inside, 1, 0}, random);
            check_gemm(*backend, {m, n, k, ta, tb, bf16, true, inside, 0.5f, 0}, random);
            check_gemm(*backend, {m, n, k, ta, tb, bf16, false, inside, -2, 1}, random);
            check_gemm(*backend, {m, n, k, ta, tb, bf16, true, inside, 1, 0.25f}, random);
            if (HasFatalFailure()) return;
          }
}

TEST_P(Products, GemmOfManyWeightsIsWidenedInBlocks) {
  check_gemm(*backend, {20, 1100, 1500, false, true, true, false, false, 1, 0}, random);
  check_gemm(*backend, {20, 1100, 1500, false, false, true, true, true, 1, 1}, random);
}

TEST_P(Products, GemmWithoutTerms) {
  Field c(3, 4, random), bias(1, 4, random, false);
  const Field before = c;
  Tensor a(*backend, DType::f32, {3, 0}), b(*backend, DType::f32, {4, 0});
  backend->run(Gemm{.a = a, .b = b, .c = c, .bias = bias.row(), .tb = true, .beta = 2});
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 4; ++j) EXPECT_FLOAT_EQ(c.at(i, j), 2 * before.at(i, j) + bias.at(0, j));
  Tensor none(*backend, DType::f32, {0, 4}), empty(*backend, DType::f32, {0, 5});
  Tensor weight(*backend, DType::f32, {4, 5});
  backend->run(Gemm{.a = empty, .b = weight, .c = none, .tb = true});
}

TEST_P(Products, GemmKeepsNan) {
  for (const int64_t m : {1, 3, 40}) {
    Field a(m, 24, random), b(20, 24, random), c(m, 20);
    b.at(5, 7) = kNan;
    backend->run(Gemm{.a = a, .b = b, .c = c, .tb = true});
    for (int64_t i = 0; i < m; ++i)
      for (int j = 0; j < 20; ++j) ASSERT_EQ(std::isnan(c.at(i, j)), j == 5);
  }
}

TEST_P(Products, SameBitsTwice) {
  for (const int64_t m : {1, 70, 513}) {
    Field a(m, 300, random), b(200, 300, random), c(m, 200), again(m, 200);
    Field weight(300, 200, random), sum(1, 300, random, false);
    backend->run(Gemm{.a = a, .b = b, .c = c, .tb = true});
    backend->run(Gemm{.a = a, .b = b, .c = again, .tb = true});
    EXPECT_EQ(c.bits(), again.bits());
    Field dw(200, 300), dw_again(200, 300);
    backend->run(Gemm{.a = c, .b = a, .c = dw, .ta = true});
    backend->run(Gemm{.a = c, .b = a, .c = dw_again, .ta = true});
    EXPECT_EQ(dw.bits(), dw_again.bits());
    Field sum_again = sum;
    backend->run(SumRows{.x = a, .out = sum.row()});
    backend->run(SumRows{.x = a, .out = sum_again.row()});
    EXPECT_EQ(sum.bits(), sum_again.bits());
  }
}

TEST_P(Products, GemmNamesTheOperand) {
  Field a(3, 16, random, false), b(512, 16, random, false), c(3, 256, random, false);
  EXPECT_EQ(message_of([&] { backend->run(Gemm{.a = a, .b = b, .c = c, .tb = true}); }),
            "gemm: b is (512, 16) f32, expected (256, 16) f32");
  EXPECT_EQ(message_of([&] { backend->run(Gemm{.a = a, .c = c}); }),
            "gemm: b is missing, expected (16, 256) f32");
  EXPECT_EQ(message_of([&] { backend->run(Gemm{.a = a, .b = c, .c = a.row(0)}); }),
            "gemm: c is (16) f32, expected 2 dimensions");
}

TEST_P(Products, SumRows) {
  for (const auto& [t, c] : {std::pair{1, 1}, {3, 17}, {1500, 33}, {2100, 64}}) {
    Field x(t, c, random), out(1, c, random, false);
    const Field before = out;
    backend->run(SumRows{.x = x, .out = out.row()});
    for (int j = 0; j < c; ++j) {
      double sum = before.at(0, j);
      for (int i = 0; i < t; ++i) sum += x.at(i, j);
      ASSERT_NEAR(out.at(0, j), sum, 1e-5 * std::sqrt(t)) << t << " x " << c;
    }
    out.expect_intact("out");
  }
}

}  // namespace
}  // namespace coil
