// The selective scan of a backend, forward and backward, against the scalar oracle: ragged batches,
// states carried, forked and discarded, chunks, views, gates, both directions.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "kernels/error.h"
#include "kernels/ops.h"
#include "tests/gradcheck.h"

namespace coil {
namespace {

using reference::Arrays;
constexpr double kForward = 2e-5, kGradient = 1e-4;

struct Case {
  std::vector<Piece> pieces;
  int64_t e = 36, n = 11;
  bool gate = true, reverse = false;
};

// All operands of one case, forward and backward. x and z are column views of one buffer (t, 2e), B
// and C of one (t, 4 + 2n).
struct Operands {
  Case c;
  std::unique_ptr<Backend> backend;
  Rows rows;
  Guarded xz, dt, dbc, A_log, D, dt_bias, y, state, sum_dt, checkpoints;
  Guarded again, dxz, ddt, ddbc, dA_log, dD, ddt_bias, dy, dstate;
  Guarded start;  // the state before forward

  explicit Operands(const Case& c, int threads = 2, unsigned seed = 1)
      : c(c), backend(make_cpu_backend(threads)), rows(*backend, c.pieces) {
    const int64_t t = rows.total(), e = c.e, n = c.n, s = rows.slots() + 1;
    std::mt19937 random(seed);
    const auto make = [&](std::initializer_list<int64_t> shape, float mean, float deviation) {
      Guarded x(shape);
      x.normal(random, mean, deviation);
      return x;
    };
    xz = make({t, 2 * e}, 0, 1);
    dt = make({t, e}, -3, 2);
    dbc = make({t, 4 + 2 * n}, 0, 1);
    A_log = make({e, n}, 0.5f, 0.7f);
    D = make({e}, 0, 1);
    dt_bias = make({e}, 0, 0.5f);
    start = make({s, e, n}, 0, 1);
    dy = make({t, e}, 0, 1);
    y = Guarded({t, e});
    sum_dt = Guarded({static_cast<int64_t>(c.pieces.size()), e});
    checkpoints = Guarded({scan_checkpoints(*backend, rows), e, n}, true);
    again = Guarded({t, e});
    dxz = Guarded({t, 2 * e});
    ddt = Guarded({t, e});
    ddbc = Guarded({t, 4 + 2 * n});
    dA_log = make({e, n}, 0, 1);
    dD = make({e}, 0, 1);
    ddt_bias = make({e}, 0, 1);
    dstate = make({s, e, n}, 0, 1);
    reset_state();
  }

  void reset_state() {
    state = Guarded({start.view().size[0], c.e, c.n});
    for (int64_t i = 0; i < state.count(); ++i) state.at(i) = start.at(i);
  }
  View x() const { return xz.view().columns(0, c.e); }
  View z() const { return c.gate ? xz.view().columns(c.e, c.e) : View{}; }
  View B() const { return dbc.view().columns(4, c.n); }
  View C() const { return dbc.view().columns(4 + c.n, c.n); }

  SelectiveScan forward(bool keep = true) const {
    return {.x = x(),
            .dt = dt,
            .A_log = A_log,
            .B = B(),
            .C = C(),
            .D = D,
            .dt_bias = dt_bias,
            .y = y,
            .z = z(),
            .state = rows.slots() > 0 ? state.view() : View{},
            .checkpoints = keep ? checkpoints.view() : View{},
            .sum_dt = sum_dt,
            .rows = &rows,
            .reverse = c.reverse};
  }
  SelectiveScanBackward backward() const {
    return {.x = x(),
            .dt = dt,
            .A_log = A_log,
            .B = B(),
            .C = C(),
            .D = D,
            .dt_bias = dt_bias,
            .dy = dy,
            .z = z(),
            .checkpoints = checkpoints,
            .dx = dxz.view().columns(0, c.e),
            .ddt = ddt,
            .dB = ddbc.view().columns(4, c.n),
            .dC = ddbc.view().columns(4 + c.n, c.n),
            .dz = c.gate ? dxz.view().columns(c.e, c.e) : View{},
            .y = c.gate ? again.view() : View{},
            .dA_log = dA_log,
            .dD = dD,
            .ddt_bias = ddt_bias,
            .dstate = rows.slots() > 0 ? dstate.view() : View{},
            .rows = &rows,
            .reverse = c.reverse};
  }
  Arrays<double> arrays() const {
    Arrays<double> in{{"x", Guarded::values(x())},   {"dt", dt.values()},
                      {"A_log", A_log.values()},     {"B", Guarded::values(B())},
                      {"C", Guarded::values(C())},   {"D", D.values()},
                      {"dt_bias", dt_bias.values()}, {"state", start.values()}};
    if (c.gate) in["z"] = Guarded::values(z());
    return in;
  }
  reference::ScanShape shape() const { return {.e = c.e, .n = c.n, .reverse = c.reverse}; }
};

void expect_forward(const Case& c, bool keep, int threads = 2) {
  Operands o(c, threads);
  o.backend->run(o.forward(keep));
  const auto expected = reference::selective_scan(o.shape(), c.pieces, o.arrays());
  expect_close("y", o.y.values(), expected.at("y"), kForward);
  expect_close("sum_dt", o.sum_dt.values(), expected.at("sum_dt"), 1e-5);
  expect_close("state", o.state.values(), expected.at("state"), kForward);
  for (const Guarded* g : {&o.y, &o.state, &o.sum_dt, &o.checkpoints})
    g->expect_intact("an output");
}

// Gradients of <dy, y> + <dstate of the slots written, state>; `most` entries of each operand.
void expect_backward(const Case& c, int64_t most, int threads = 2) {
  Operands o(c, threads);
  o.backend->run(o.forward());
  const auto dA_log = o.dA_log.values(), dD = o.dD.values(), ddt_bias = o.ddt_bias.values();
  std::vector<double> weight = o.dstate.values();
  const std::vector<double> before = weight;
  const int64_t slot_size = c.e * c.n;
  const SlotUse use(c.pieces, o.start.view().size[0]);
  for (size_t i = 0; i < weight.size(); ++i) weight[i] *= use.written[i / slot_size];
  o.backend->run(o.backward());

  const std::vector<double> dy = o.dy.values();
  const auto functional = [&](const Arrays<Complex>& in) {
    const auto out = reference::selective_scan(o.shape(), c.pieces, in);
    Complex sum = 0;
    for (size_t i = 0; i < dy.size(); ++i) sum += dy[i] * out.at("y")[i];
    for (size_t i = 0; i < weight.size(); ++i) sum += weight[i] * out.at("state")[i];
    return sum;
  };
  const auto in = to_complex(o.arrays());
  const auto expect = [&](const char* name, const std::vector<double>& got) {
    expect_gradient(functional, in, name, got, probes(got.size(), most), kGradient);
  };
  const SelectiveScanBackward op = o.backward();
  expect("x", Guarded::values(op.dx));
  expect("dt", Guarded::values(op.ddt));
  expect("B", Guarded::values(op.dB));
  expect("C", Guarded::values(op.dC));
  if (c.gate) expect("z", Guarded::values(op.dz));
  if (c.gate) expect_close("y once more", o.again.values(), o.y.values(), kForward);
  expect("A_log", difference(o.dA_log.values(), dA_log));  // these three are added to
  expect("D", difference(o.dD.values(), dD));
  expect("dt_bias", difference(o.ddt_bias.values(), ddt_bias));
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
       {&o.dxz, &o.again, &o.ddt, &o.ddbc, &o.dA_log, &o.dD, &o.ddt_bias, &o.dstate})
    g->expect_intact("a gradient");
  for (int64_t row = 0; row < o.rows.total(); ++row)
    for (int64_t j = 0; j < 4; ++j)
      ASSERT_TRUE(std::isnan(o.ddbc.view().row<float>(row)[j])) << "written beside dB";
}

TEST(SelectiveScan, RaggedBatchAgreesWithTheOracle) {
  for (const bool keep : {false, true}) {
    expect_forward({.pieces = ragged_pieces(5000), .e = 36, .n = 11}, keep);
    expect_forward({.pieces = ragged_pieces(300), .e = 108, .n = 16}, keep);
    expect_forward({.pieces = ragged_pieces(300), .e = 64, .n = 16, .gate = false}, keep);
    expect_forward({.pieces = ragged_pieces(40), .e = 5, .n = 37}, keep, 1);
    expect_forward({.pieces = ragged_pieces(40), .e = 1, .n = 1}, keep);
  }
}

TEST(SelectiveScan, ReverseAgreesWithTheOracle) {
  const auto pieces = whole_pieces({1, 2, 31, 32, 33, 100});
  expect_forward({.pieces = pieces, .e = 36, .n = 11, .reverse = true}, true);
  expect_forward({.pieces = pieces, .e = 64, .n = 16, .reverse = true}, false);
  expect_backward({.pieces = pieces, .e = 20, .n = 5, .reverse = true}, 20);
  expect_backward({.pieces = pieces, .e = 20, .n = 5, .gate = false, .reverse = true}, 20, 1);
}

TEST(SelectiveScan, DecodingOfManyStreamsAgreesWithTheOracle) {
  std::vector<Piece> pieces;
  for (int32_t i = 0; i < 50; ++i)
    pieces.push_back({.begin = i, .length = 1, .position = 7, .from = i, .to = i, .last = false});
  expect_forward({.pieces = pieces, .e = 64, .n = 16}, false);
  expect_forward({.pieces = {pieces[0]}, .e = 36, .n = 11}, false);
}

TEST(SelectiveScan, EveryGradientOfASmallCase) {
  std::vector<Piece> pieces = {{.begin = 0, .length = 1, .from = 0, .to = 1},
                               {.begin = 1, .length = 2, .from = 2, .to = 2},
                               {.begin = 3, .length = 5, .from = 0, .to = 3},
                               {.begin = 8, .length = 4, .from = -1, .to = -1}};
  expect_backward({.pieces = pieces, .e = 18, .n = 3}, INT64_MAX);
  expect_backward({.pieces = pieces, .e = 18, .n = 3, .gate = false}, INT64_MAX, 1);
}

TEST(SelectiveScan, GradientsOfARaggedBatch) {
  expect_backward({.pieces = ragged_pieces(5000), .e = 18, .n = 5}, 3);
  expect_backward({.pieces = ragged_pieces(100), .e = 36, .n = 11}, 8);
  expect_backward({.pieces = ragged_pieces(100), .e = 108, .n = 16}, 3);
  expect_backward({.pieces = ragged_pieces(100), .e = 64, .n = 16, .gate = false}, 4, 1);
}

// Pieces alone share threads by pieces as well, since no slot is read twice.
TEST(SelectiveScan, GradientsOfManyShortSequences) {
  std::vector<Piece> pieces;
  for (int32_t i = 0; i < 40; ++i)
    pieces.push_back({.begin = 40 * i, .length = 40, .from = i % 2 ? i : -1, .to = i % 3 ? i : -1});
  expect_backward({.pieces = pieces, .e = 16, .n = 16}, 5, 2);
  expect_backward({.pieces = pieces, .e = 16, .n = 16}, 5, 3);
}

// The same sequence at once, in chunks with carried state, and step by step.
TEST(SelectiveScan, ChunksAgreeWithOneShot) {
  Operands o({.pieces = {{.begin = 0, .length = 300, .from = 0, .to = 0}}, .e = 36, .n = 16});
  o.backend->run(o.forward(false));
  const auto y = o.y.values(), state = o.state.values();
  for (const int64_t chunk : {1, 3, 7, 64, 100}) {
    o.reset_state();
    o.y.fill(0);
    for (int64_t begin = 0; begin < 300; begin += chunk) {
      const int64_t length = std::min<int64_t>(chunk, 300 - begin);
      const Rows rows(*o.backend,
                      {{.begin = 0, .length = length, .position = begin, .from = 0, .to = 0}});
      SelectiveScan op = o.forward(false);
      op.rows = &rows;
      for (View* view : {&op.x, &op.dt, &op.B, &op.C, &op.y, &op.z})
        *view = view->slice(begin, length);
      op.sum_dt = {};
      o.backend->run(op);
    }
    expect_close("y", o.y.values(), y, 1e-5);
    expect_close("state", o.state.values(), state, 1e-5);
  }
}

TEST(SelectiveScan, MarksAreStatesOfTheOracleAndStartsContinueThere) {
  const int64_t length = 150, every = 32, marks = (length - 1) / every;
  const Case c{.pieces = {{.length = length, .from = 0, .to = 1}}};
  Operands o(c);
  const int64_t e = c.e, n = c.n;
  Guarded kept({1 + marks, e, n}, true);  // the state before steps 0, 32, …
  std::copy_n(o.start.values().begin(), e * n, &kept.at(0));
  SelectiveScan marking = o.forward();
  marking.marks = kept.view().slice(1, marks);
  marking.every = every;
  o.backend->run(marking);
  const std::vector<double> found = kept.values();
  for (int64_t k = 1; k <= marks; ++k) {
    auto in = o.arrays();
    for (const char* name : {"x", "dt", "z"}) in[name].resize(k * every * e);
    for (const char* name : {"B", "C"}) in[name].resize(k * every * n);
    const std::vector<Piece> part = {{.length = k * every, .from = 0, .to = 1}};
    const auto all = reference::selective_scan(o.shape(), part, in).at("state");
    const std::vector<double> mark(found.begin() + k * e * n, found.begin() + (k + 1) * e * n);
    const std::vector<double> state(all.begin() + e * n, all.begin() + 2 * e * n);
    expect_close("marks", mark, state, kForward);
  }
  kept.expect_intact("marks");

  Operands again(c);
  SelectiveScan starting = again.forward();
  starting.state = starting.sum_dt = {};
  starting.starts = kept;
  starting.every = every;
  again.backend->run(starting);
  EXPECT_EQ(again.y.values(), o.y.values());
  EXPECT_EQ(again.checkpoints.values(), o.checkpoints.values());
  starting.sum_dt = again.sum_dt;
  EXPECT_THROW(again.backend->run(starting), Error);
}

// sum_dt joins pieces computed apart: h = h_local + exp(A sum_dt) h_in.
TEST(SelectiveScan, SumOfStepsJoinsPieces) {
  Operands whole({.pieces = {{.begin = 0, .length = 90, .from = 0, .to = 1}}, .e = 20, .n = 4});
  Operands apart({.pieces = {{.begin = 0, .length = 90, .from = -1, .to = 1}}, .e = 20, .n = 4});
  whole.dt_bias.fill(-6);
  apart.dt_bias.fill(-6);  // so that something of the first state is left
  whole.backend->run(whole.forward());
  apart.backend->run(apart.forward());
  std::vector<double> joined, expected;
  for (int64_t c = 0; c < 20; ++c)
    for (int64_t i = 0; i < 4; ++i) {
      const double A = -std::exp(whole.A_log.at(c * 4 + i));
      const int64_t place = (1 * 20 + c) * 4 + i;
      joined.push_back(apart.state.at(place) +
                       std::exp(A * apart.sum_dt.at(c)) * whole.start.at(c * 4 + i));
      expected.push_back(whole.state.at(place));
    }
  expect_close("state", joined, expected, 1e-5);
}

TEST(SelectiveScan, OutputMayBeStepOrGate) {
  const Case c{.pieces = ragged_pieces(100), .e = 36, .n = 11};
  Operands plain(c), over_dt(c), over_z(c);
  plain.backend->run(plain.forward());
  SelectiveScan op = over_dt.forward();
  op.y = over_dt.dt;
  over_dt.backend->run(op);
  EXPECT_EQ(over_dt.dt.values(), plain.y.values());
  op = over_z.forward();
  op.y = over_z.z();
  over_z.backend->run(op);
  EXPECT_EQ(Guarded::values(over_z.z()), plain.y.values());
}

TEST(SelectiveScan, SameBitsTwiceAndCloseForAnyNumberOfThreads) {
  const Case c{.pieces = ragged_pieces(700), .e = 108, .n = 16};
  std::vector<std::vector<double>> first;
  for (const int threads : {2, 2, 1, 3}) {
    Operands o(c, threads);
    o.backend->run(o.forward());
    o.backend->run(o.backward());
    const SelectiveScanBackward op = o.backward();
    const std::vector<std::vector<double>> all = {
        o.y.values(),           o.state.values(),       Guarded::values(op.dx),
        Guarded::values(op.dB), Guarded::values(op.dC), Guarded::values(op.dz),
        o.ddt.values(),         o.dA_log.values(),      o.dD.values(),
        o.ddt_bias.values(),    o.dstate.values()};
    if (first.empty()) first = all;
    for (size_t i = 0; i < all.size(); ++i)
      if (threads == 2)
        EXPECT_EQ(all[i], first[i]) << "output " << i;
      else
        expect_close("an output", all[i], first[i], 1e-4);
  }
}

// The gradients of x and dt in the places of dy and dt.
TEST(SelectiveScan, BackwardInPlace) {
  const Case c{.pieces = ragged_pieces(300), .e = 20, .n = 5};
  Operands apart(c), same(c);
  for (Operands* o : {&apart, &same}) o->backend->run(o->forward());
  apart.backend->run(apart.backward());
  SelectiveScanBackward in_place = same.backward();
  in_place.dx = same.dy;
  in_place.ddt = same.dt;
  same.backend->run(in_place);
  EXPECT_EQ(same.dy.values(), Guarded::values(apart.backward().dx));
  EXPECT_EQ(same.dt.values(), apart.ddt.values());
}

// A very small delta is exact to a few units in the last place, and large ones neither overflow nor
// lose the step.
TEST(SelectiveScan, ExtremeSteps) {
  const int64_t t = 40;
  Operands o({.pieces = whole_pieces({t}), .e = 1, .n = 1, .gate = false});
  o.dt_bias.fill(0);
  for (int64_t s = 0; s < t; ++s) o.dt.at(s) = -60 + 4 * s;
  o.backend->run(o.forward());
  const auto expected = reference::selective_scan(o.shape(), o.c.pieces, o.arrays());
  expect_close("y", o.y.values(), expected.at("y"), 1e-6);
  for (int64_t s = 0; s < t; ++s) {
    Operands one({.pieces = whole_pieces({1}), .e = 1, .n = 1, .gate = false});
    one.dt_bias.fill(0);
    one.dt.at(0) = o.dt.at(s);
    one.backend->run(one.forward());
    const double delta = reference::softplus(double(o.dt.at(s)));
    EXPECT_NEAR(one.sum_dt.at(0), delta, 4e-7 * delta) << "softplus(" << o.dt.at(s) << ")";
  }
}

TEST(SelectiveScan, NanInGivesNanOut) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const int64_t length : {2, 50}) {
    const Case c{.pieces = {{.begin = 0, .length = length, .from = 0, .to = 0}}, .e = 20, .n = 5};
    for (const char* name : {"x", "dt", "A_log", "B", "C", "D", "dt_bias", "z", "state"}) {
      Operands o(c);
      SelectiveScan op = o.forward(false);
      const std::map<std::string, View> views = {
          {"x", op.x},        {"dt", op.dt}, {"A_log", op.A_log},     {"B", op.B},
          {"C", op.C},        {"D", op.D},   {"dt_bias", op.dt_bias}, {"z", op.z},
          {"state", op.state}};
      Guarded::at(views.at(name), 0) = nan;
      o.backend->run(op);
      EXPECT_TRUE(std::isnan(o.y.at(0))) << name << ", " << length << " steps";
      if (name[0] != 'B' && name[0] != 'C') {  // which all channels share
        EXPECT_FALSE(std::isnan(o.y.at(19))) << name << ": another channel";
      }
      if (length < 4) continue;
      o.reset_state();
      op = o.forward(true);
      if (std::string(name) == "state") o.state.at(0) = nan;
      o.backend->run(op);
      o.backend->run(o.backward());
      double sum = 0;
      for (const Guarded* g : {&o.dA_log, &o.dD, &o.ddt_bias, &o.dxz})
        for (const double v : g->values()) sum += v;
      EXPECT_TRUE(std::isnan(sum)) << name << ", backward";
    }
  }
}

TEST(SelectiveScan, NoRowsAtAll) {
  Operands o({.pieces = {}, .e = 8, .n = 2});
  o.backend->run(o.forward());
  o.backend->run(o.backward());
}

TEST(SelectiveScan, ErrorsNameOpAndOperand) {
  Operands o({.pieces = {{.begin = 0, .length = 6, .from = 0, .to = 2}}, .e = 8, .n = 4});
  SelectiveScan op = o.forward();
  op.B = op.B.columns(0, 3);
  EXPECT_EQ(message_of(*o.backend, op), "selective_scan: B is (6, 3) f32, expected (6, 4) f32");
  op = o.forward();
  op.state = {};
  EXPECT_EQ(message_of(*o.backend, op), "selective_scan: state is missing");
  op = o.forward();
  op.state = op.state.slice(0, 2);
  EXPECT_EQ(message_of(*o.backend, op),
            "selective_scan: state is (2, 8, 4) f32, expected 3 slots or more");
  op = o.forward();
  op.reverse = true;
  EXPECT_EQ(message_of(*o.backend, op),
            "selective_scan: a piece carries state, expected whole sequences with reverse");
  op = o.forward();
  op.y = op.x;
  EXPECT_EQ(message_of(*o.backend, op), "selective_scan: y is x, expected another tensor");
  SelectiveScanBackward backward = o.backward();
  backward.checkpoints = {};
  EXPECT_EQ(message_of(*o.backend, backward), "selective_scan backward: checkpoints are missing");
  backward = o.backward();
  backward.dz = {};
  EXPECT_EQ(message_of(*o.backend, backward),
            "selective_scan backward: dz is missing, expected (6, 8) f32");
}

}  // namespace
}  // namespace coil
