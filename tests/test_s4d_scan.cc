// S4D's scan of a backend, forward and backward, against the scalar oracle and against a
// convolution: ragged batches, states carried, forked and discarded, chunks, views, both
// directions.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numbers>

#include "kernels/error.h"
#include "kernels/ops.h"
#include "tests/gradcheck.h"

namespace coil {
namespace {

using reference::Arrays;
constexpr double kForward = 2e-5, kGradient = 1e-4;

struct Case {
  std::vector<Piece> pieces;
  int64_t d = 36, n = 11;
  bool gelu = true, reverse = false;
};

// (…, 2n) as (…, n, 2).
View as_pairs(const View& view) {
  View pairs = view;
  pairs.rank = view.rank + 1;
  pairs.size[view.rank - 1] = view.cols() / 2;
  pairs.size[view.rank] = 2;
  pairs.stride[view.rank - 1] = 2;
  pairs.stride[view.rank] = 1;
  return pairs;
}

// All operands of one case, forward and backward. x is a column view.
struct Operands {
  Case c;
  std::unique_ptr<Backend> backend;
  Rows rows;
  Guarded wide_x, log_A_real, A_imag, C, log_dt, D, y, before, state, checkpoints;
  Guarded wide_dx, dlog_A_real, dA_imag, dC, dlog_dt, dD, dy, dstate;
  Guarded start;  // the state before forward

  explicit Operands(const Case& c, int threads = 2, unsigned seed = 1)
      : c(c), backend(make_cpu_backend(threads)), rows(*backend, c.pieces) {
    const int64_t t = rows.total(), d = c.d, n = c.n, s = rows.slots() + 1;
    std::mt19937 random(seed);
    const auto make = [&](std::initializer_list<int64_t> shape, float mean, float deviation) {
      Guarded x(shape);
      x.normal(random, mean, deviation);
      return x;
    };
    wide_x = make({t, d + 3}, 0, 1);
    log_A_real = make({d, n}, -0.7f, 0.5f);
    A_imag = make({d, n}, 0, 1);
    for (int64_t i = 0; i < d * n; ++i)  // S4D-Lin
      A_imag.at(i) += static_cast<float>(std::numbers::pi * static_cast<double>(i % n));
    C = make({d, 2 * n}, 0, 1);
    log_dt = make({d}, -4.5f, 1);
    D = make({d}, 0, 1);
    start = make({s, d, 2 * n}, 0, 5);
    dy = make({t, d}, 0, 1);
    y = Guarded({t, d});
    before = Guarded({t, d});
    checkpoints = Guarded({s4d_checkpoints(rows), d, 2 * n}, true);
    wide_dx = Guarded({t, d + 3});
    dlog_A_real = make({d, n}, 0, 1);
    dA_imag = make({d, n}, 0, 1);
    dC = make({d, 2 * n}, 0, 1);
    dlog_dt = make({d}, 0, 1);
    dD = make({d}, 0, 1);
    dstate = make({s, d, 2 * n}, 0, 1);
    reset_state();
  }

  void reset_state() {
    state = Guarded({start.view().size[0], c.d, 2 * c.n});
    for (int64_t i = 0; i < state.count(); ++i) state.at(i) = start.at(i);
  }
  View x() const { return wide_x.view().columns(0, c.d); }
  View dx() const { return wide_dx.view().columns(0, c.d); }

  S4dScan forward(bool keep = true) const {
    return {.x = x(),
            .log_A_real = log_A_real,
            .A_imag = A_imag,
            .C = as_pairs(C),
            .log_dt = log_dt,
            .D = D,
            .y = y,
            .state = rows.slots() > 0 ? as_pairs(state) : View{},
            .checkpoints = keep ? as_pairs(checkpoints) : View{},
            .before_gelu = c.gelu && keep ? before.view() : View{},
            .rows = &rows,
            .gelu = c.gelu,
            .reverse = c.reverse};
  }
  S4dScanBackward backward() const {
    return {.x = x(),
            .log_A_real = log_A_real,
            .A_imag = A_imag,
            .C = as_pairs(C),
            .log_dt = log_dt,
            .D = D,
            .dy = dy,
            .checkpoints = as_pairs(checkpoints),
            .before_gelu = c.gelu ? before.view() : View{},
            .dx = dx(),
            .dlog_A_real = dlog_A_real,
            .dA_imag = dA_imag,
            .dC = as_pairs(dC),
            .dlog_dt = dlog_dt,
            .dD = dD,
            .dstate = rows.slots() > 0 ? as_pairs(dstate) : View{},
            .rows = &rows,
            .gelu = c.gelu,
            .reverse = c.reverse};
  }
  Arrays<double> arrays() const {
    return {{"x", Guarded::values(x())}, {"log_A_real", log_A_real.values()},
            {"A_imag", A_imag.values()}, {"C", C.values()},
            {"log_dt", log_dt.values()}, {"D", D.values()},
            {"state", start.values()}};
  }
  reference::S4dShape shape() const {
    return {.d = c.d, .n = c.n, .gelu = c.gelu, .reverse = c.reverse};
  }
};

void expect_forward(const Case& c, bool keep, int threads = 2) {
  Operands o(c, threads);
  o.backend->run(o.forward(keep));
  const auto expected = reference::s4d_scan(o.shape(), c.pieces, o.arrays());
  expect_close("y", o.y.values(), expected.at("y"), kForward);
  expect_close("state", o.state.values(), expected.at("state"), kForward);
  if (keep && c.gelu)
    expect_close("before_gelu", o.before.values(), expected.at("before_gelu"), kForward);
  for (const Guarded* g : {&o.y, &o.before, &o.state, &o.checkpoints})
    g->expect_intact("an output");
}

// Gradients of <dy, y> + <dstate of the slots written, state>; `most` entries of each operand.
void expect_backward(const Case& c, int64_t most, int threads = 2) {
  Operands o(c, threads);
  o.backend->run(o.forward());
  const std::pair<const char*, const Guarded*> parameters[] = {{"log_A_real", &o.dlog_A_real},
                                                               {"A_imag", &o.dA_imag},
                                                               {"C", &o.dC},
                                                               {"log_dt", &o.dlog_dt},
                                                               {"D", &o.dD}};
  std::vector<std::vector<double>> added_to;
  for (const auto& [name, gradient] : parameters) added_to.push_back(gradient->values());
  std::vector<double> weight = o.dstate.values();
  const std::vector<double> before = weight;
  const int64_t slot_size = 2 * c.d * c.n;
  const SlotUse use(c.pieces, o.start.view().size[0]);
  for (size_t i = 0; i < weight.size(); ++i) weight[i] *= use.written[i / slot_size];
  o.backend->run(o.backward());

  const std::vector<double> dy = o.dy.values();
  const auto functional = [&](const Arrays<Complex>& in) {
    const auto out = reference::s4d_scan(o.shape(), c.pieces, in);
    Complex sum = 0;
    for (size_t i = 0; i < dy.size(); ++i) sum += dy[i] * out.at("y")[i];
    for (size_t i = 0; i < weight.size(); ++i) sum += weight[i] * out.at("state")[i];
    return sum;
  };
  const auto in = to_complex(o.arrays());
  const auto expect = [&](const char* name, const std::vector<double>& got) {
    expect_gradient(functional, in, name, got, probes(got.size(), most), kGradient);
  };
  expect("x", Guarded::values(o.dx()));
  for (size_t i = 0; i < added_to.size(); ++i)
    expect(parameters[i].first, difference(parameters[i].second->values(), added_to[i]));
  if (o.rows.slots() > 0) {
    const std::vector<double> after = o.dstate.values();
    std::vector<int64_t> of_read;
    for (size_t i = 0; i < after.size(); ++i)
      if (use.read[i / slot_size])
        of_read.push_back(i);
      else
        ASSERT_EQ(after[i], before[i]) << "dstate of a slot that no piece reads";
    std::vector<int64_t> some;
    for (const int64_t i : probes(of_read.size(), most)) some.push_back(of_read[i]);
    expect_gradient(functional, in, "state", after, some, kGradient);
  }
  for (const Guarded* g :
       {&o.wide_dx, &o.dlog_A_real, &o.dA_imag, &o.dC, &o.dlog_dt, &o.dD, &o.dstate})
    g->expect_intact("a gradient");
  for (int64_t row = 0; row < o.rows.total(); ++row)
    for (int64_t j = 0; j < 3; ++j)
      ASSERT_TRUE(std::isnan(o.wide_dx.view().row<float>(row)[c.d + j])) << "written beside dx";
}

TEST(S4dScan, RaggedBatchAgreesWithTheOracle) {
  for (const bool keep : {false, true}) {
    expect_forward({.pieces = ragged_pieces(5000), .d = 36, .n = 11}, keep);
    expect_forward({.pieces = ragged_pieces(300), .d = 108, .n = 32}, keep);
    expect_forward({.pieces = ragged_pieces(300), .d = 64, .n = 16, .gelu = false}, keep);
    expect_forward({.pieces = ragged_pieces(67), .d = 5, .n = 70}, keep, 1);
    expect_forward({.pieces = ragged_pieces(40), .d = 1, .n = 1}, keep);
  }
}

TEST(S4dScan, ReverseAgreesWithTheOracle) {
  const auto pieces = whole_pieces({1, 2, 31, 64, 66, 130});
  expect_forward({.pieces = pieces, .d = 36, .n = 11, .reverse = true}, true);
  expect_forward({.pieces = pieces, .d = 64, .n = 16, .gelu = false, .reverse = true}, false);
  expect_forward({.pieces = whole_pieces({3, 2, 1}), .d = 36, .n = 8, .reverse = true}, false);
  expect_backward({.pieces = pieces, .d = 20, .n = 5, .reverse = true}, 20);
  expect_backward({.pieces = pieces, .d = 20, .n = 5, .gelu = false, .reverse = true}, 20, 1);
}

TEST(S4dScan, DecodingOfManyStreamsAgreesWithTheOracle) {
  std::vector<Piece> pieces;
  for (int32_t i = 0; i < 50; ++i)
    pieces.push_back({.begin = i, .length = 1, .position = 7, .from = i, .to = i, .last = false});
  expect_forward({.pieces = pieces, .d = 64, .n = 16}, false);
  expect_forward({.pieces = {pieces[0]}, .d = 36, .n = 11}, false);
  expect_forward({.pieces = {pieces[0]}, .d = 36, .n = 33}, true);
}

// K[l] = 2 Re(sum_i C dA^l dB) with the names of S4's code, and y the convolution with it.
TEST(S4dScan, IsAConvolution) {
  const int64_t t = 700;
  for (const bool keep : {false, true}) {
    Operands o({.pieces = whole_pieces({t}), .d = 7, .n = 32, .gelu = false});
    o.backend->run(o.forward(keep));
    std::vector<double> y(t * 7);
    for (int64_t c = 0; c < 7; ++c) {
      const double dt = std::exp(static_cast<double>(o.log_dt.at(c)));
      std::vector<double> kernel(t, 0);
      for (int64_t i = 0; i < 32; ++i) {
        const Complex A(-std::exp(static_cast<double>(o.log_A_real.at(c * 32 + i))),
                        o.A_imag.at(c * 32 + i));
        const Complex C(o.C.at((c * 32 + i) * 2), o.C.at((c * 32 + i) * 2 + 1));
        const Complex dB = (std::exp(A * dt) - 1.0) / A;
        for (int64_t l = 0; l < t; ++l)
          kernel[l] += 2 * (C * dB * std::exp(A * dt * static_cast<double>(l))).real();
      }
      for (int64_t s = 0; s < t; ++s) {
        double sum = static_cast<double>(o.D.at(c)) * o.wide_x.at(s * 10 + c);
        for (int64_t l = 0; l <= s; ++l) sum += kernel[l] * o.wide_x.at((s - l) * 10 + c);
        y[s * 7 + c] = sum;
      }
    }
    expect_close("y", o.y.values(), y, kForward);
  }
}

TEST(S4dScan, EveryGradientOfASmallCase) {
  std::vector<Piece> pieces = {{.begin = 0, .length = 1, .from = 0, .to = 1},
                               {.begin = 1, .length = 2, .from = 2, .to = 2},
                               {.begin = 3, .length = 11, .from = 0, .to = 3},
                               {.begin = 14, .length = 4, .from = -1, .to = -1}};
  expect_backward({.pieces = pieces, .d = 18, .n = 3}, INT64_MAX);
  expect_backward({.pieces = pieces, .d = 18, .n = 3, .gelu = false}, INT64_MAX, 1);
}

TEST(S4dScan, GradientsOfARaggedBatch) {
  expect_backward({.pieces = ragged_pieces(5000), .d = 18, .n = 5}, 3);
  expect_backward({.pieces = ragged_pieces(150), .d = 36, .n = 11}, 8);
  expect_backward({.pieces = ragged_pieces(100), .d = 108, .n = 16}, 3);
  expect_backward({.pieces = ragged_pieces(100), .d = 9, .n = 70}, 5);
  expect_backward({.pieces = ragged_pieces(100), .d = 64, .n = 32, .gelu = false}, 3, 1);
}

// Pieces alone share threads by pieces as well, since no slot is read twice.
TEST(S4dScan, GradientsOfManyShortSequences) {
  std::vector<Piece> pieces;
  for (int32_t i = 0; i < 40; ++i)
    pieces.push_back({.begin = 41 * i, .length = 41, .from = i % 2 ? i : -1, .to = i % 3 ? i : -1});
  expect_backward({.pieces = pieces, .d = 16, .n = 16}, 5, 2);
  expect_backward({.pieces = pieces, .d = 16, .n = 16}, 5, 3);
}

// The same sequence at once, in chunks with carried state, and step by step.
TEST(S4dScan, ChunksAgreeWithOneShot) {
  Operands o({.pieces = {{.begin = 0, .length = 3000, .from = 0, .to = 0}}, .d = 36, .n = 32});
  o.backend->run(o.forward(false));
  const auto y = o.y.values(), state = o.state.values();
  for (const int64_t chunk : {1, 3, 7, 64, 1001}) {
    o.reset_state();
    o.y.fill(0);
    for (int64_t begin = 0; begin < 3000; begin += chunk) {
      const int64_t length = std::min<int64_t>(chunk, 3000 - begin);
      const Rows rows(*o.backend,
                      {{.begin = 0, .length = length, .position = begin, .from = 0, .to = 0}});
      S4dScan op = o.forward(false);
      op.rows = &rows;
      for (View* view : {&op.x, &op.y}) *view = view->slice(begin, length);
      o.backend->run(op);
    }
    // A power rounded to 2^-25 of a - 1 is off by as much of every radian that its state turns
    // while it is remembered: here some hundred.
    expect_close("y", o.y.values(), y, 4e-5);
    expect_close("state", o.state.values(), state, 1e-4);
  }
}

TEST(S4dScan, OutputMayBeInputAndGradientMayBeGradient) {
  for (const int64_t longest : {2, 100}) {
    auto pieces = whole_pieces({longest, 1, 2});
    const Case c{.pieces = pieces, .d = 36, .n = 11};
    Operands plain(c), over(c);
    plain.backend->run(plain.forward(longest > 2));
    S4dScan op = over.forward(longest > 2);
    op.y = over.x();
    over.backend->run(op);
    EXPECT_EQ(Guarded::values(over.x()), plain.y.values());
    if (longest == 2) continue;
    plain.backend->run(plain.backward());
    S4dScanBackward backward = plain.backward();
    backward.dx = plain.dy;
    plain.backend->run(backward);
    EXPECT_EQ(plain.dy.values(), Guarded::values(plain.dx()));
  }
}

TEST(S4dScan, SameBitsTwiceAndCloseForAnyNumberOfThreads) {
  const Case c{.pieces = ragged_pieces(700), .d = 108, .n = 16};
  std::vector<std::vector<double>> first;
  for (const int threads : {2, 2, 1, 3}) {
    Operands o(c, threads);
    o.backend->run(o.forward());
    o.backend->run(o.backward());
    const std::vector<std::vector<double>> all = {
        o.y.values(),           o.state.values(),   Guarded::values(o.dx()),
        o.dlog_A_real.values(), o.dA_imag.values(), o.dC.values(),
        o.dlog_dt.values(),     o.dD.values(),      o.dstate.values()};
    if (first.empty()) first = all;
    for (size_t i = 0; i < all.size(); ++i)
      if (threads == 2)
        EXPECT_EQ(all[i], first[i]) << "output " << i;
      else
        expect_close("an output", all[i], first[i], 1e-4);
  }
}

// Decays to nothing within a step and in none of a million; no turn at all and many in one step.
TEST(S4dScan, ExtremeParameters) {
  Operands o({.pieces = whole_pieces({300}), .d = 6, .n = 4, .gelu = false});
  for (int64_t c = 0; c < 6; ++c) {
    o.log_dt.at(c) = static_cast<float>(c) * 2 - 8;
    for (int64_t i = 0; i < 4; ++i) {
      o.log_A_real.at(c * 4 + i) = static_cast<float>(i * 6) - 12;
      o.A_imag.at(c * 4 + i) = i == 3 ? 1000.f : i == 0 ? 0.f : 3.f * static_cast<float>(i);
    }
  }
  o.backend->run(o.forward());
  const auto expected = reference::s4d_scan(o.shape(), o.c.pieces, o.arrays());
  expect_close("y", o.y.values(), expected.at("y"), kForward);
  for (const double value : o.y.values()) ASSERT_TRUE(std::isfinite(value));
}

TEST(S4dScan, NanInGivesNanOut) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const int64_t length : {2, 50}) {
    const Case c{.pieces = {{.begin = 0, .length = length, .from = 0, .to = 0},
                            {.begin = length, .length = length, .from = 1, .to = 1}},
                 .d = 20,
                 .n = 5};
    for (const char* name : {"x", "log_A_real", "A_imag", "C", "log_dt", "D", "state"}) {
      Operands o(c);
      S4dScan op = o.forward(false);
      const std::map<std::string, View> views = {
          {"x", op.x},        {"log_A_real", op.log_A_real}, {"A_imag", op.A_imag},
          {"C", op.C},        {"log_dt", op.log_dt},         {"D", op.D},
          {"state", op.state}};
      const bool parameter = std::string(name) != "x" && std::string(name) != "state";
      Guarded::at(views.at(name), 0) = nan;
      o.backend->run(op);
      EXPECT_TRUE(std::isnan(o.y.at(0))) << name << ", " << length << " steps";
      EXPECT_FALSE(std::isnan(o.y.at(19))) << name << ": another channel";
      EXPECT_EQ(std::isnan(o.y.at(length * 20)), parameter) << name << ": another sequence";
      if (length < 4) continue;
      o.reset_state();
      op = o.forward(true);
      if (std::string(name) == "state") o.state.at(0) = nan;
      o.backend->run(op);
      o.backend->run(o.backward());
      double sum = 0;
      for (const Guarded* g : {&o.dlog_A_real, &o.dD, &o.dlog_dt, &o.dC})
        for (const double v : g->values()) sum += v;
      for (const double v : Guarded::values(o.dx())) sum += v;
      EXPECT_TRUE(std::isnan(sum)) << name << ", backward";
      EXPECT_EQ(std::isnan(Guarded::at(o.dx(), length * 20)), parameter) << name;
    }
  }
}

TEST(S4dScan, NoRowsAtAll) {
  Operands o({.pieces = {}, .d = 8, .n = 2});
  o.backend->run(o.forward());
  o.backend->run(o.backward());
}

TEST(S4dScan, ErrorsNameOpAndOperand) {
  Operands o({.pieces = {{.begin = 0, .length = 6, .from = 0, .to = 2}}, .d = 8, .n = 4});
  S4dScan op = o.forward();
  op.log_A_real = op.log_A_real.columns(0, 3);
  EXPECT_EQ(message_of(*o.backend, op), "s4d_scan: log_A_real is (8, 3) f32, expected (8, 4) f32");
  op = o.forward();
  op.C.stride[1] = 1;
  EXPECT_EQ(message_of(*o.backend, op), "s4d_scan: C has a stride of 1 between pairs, expected 2");
  op = o.forward();
  op.state = {};
  EXPECT_EQ(message_of(*o.backend, op), "s4d_scan: state is missing");
  op = o.forward();
  op.state = op.state.slice(0, 2);
  EXPECT_EQ(message_of(*o.backend, op),
            "s4d_scan: state is (2, 8, 4, 2) f32, expected 3 slots or more");
  op = o.forward();
  op.reverse = true;
  EXPECT_EQ(message_of(*o.backend, op),
            "s4d_scan: a piece carries state, expected whole sequences with reverse");
  op = o.forward();
  op.gelu = false;
  EXPECT_EQ(message_of(*o.backend, op), "s4d_scan: before_gelu is given without gelu");
  S4dScanBackward backward = o.backward();
  backward.checkpoints = {};
  EXPECT_EQ(message_of(*o.backend, backward), "s4d_scan backward: checkpoints are missing");
  backward = o.backward();
  backward.before_gelu = {};
  EXPECT_EQ(message_of(*o.backend, backward), "s4d_scan backward: before_gelu is missing");
}

}  // namespace
}  // namespace coil
