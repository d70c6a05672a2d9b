// The causal convolution of a backend, forward and backward, against the scalar oracle: ragged
// batches, states carried, forked and discarded, chunks, views, both directions.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "kernels/error.h"
#include "kernels/ops.h"
#include "tests/gradcheck.h"

namespace coil {
namespace {

using reference::Arrays;
constexpr double kForward = 2e-6, kGradient = 2e-5;

struct Case {
  std::vector<Piece> pieces;
  int64_t c = 36, w = 4;
  bool bias = true, silu = true, reverse = false;
};

// All operands of one case; x is a column view of a wider buffer.
struct Operands {
  Case c;
  std::unique_ptr<Backend> backend;
  Rows rows;
  Guarded wide, weight, bias, y, state, start, dy, dx, dweight, dbias, dstate;

  explicit Operands(const Case& c, int threads = 2)
      : c(c), backend(make_cpu_backend(threads)), rows(*backend, c.pieces) {
    const int64_t t = rows.total(), s = rows.slots() + 1;
    std::mt19937 random(3);
    const auto make = [&](std::initializer_list<int64_t> shape) {
      Guarded x(shape);
      x.normal(random);
      return x;
    };
    wide = make({t, 2 * c.c});
    weight = make({c.c, c.w});
    bias = make({c.c});
    start = make({s, c.w - 1, c.c});
    dy = make({t, c.c});
    dweight = make({c.c, c.w});
    dbias = make({c.c});
    dstate = make({s, c.w - 1, c.c});
    y = Guarded({t, c.c});
    dx = Guarded({t, c.c});
    reset_state();
  }
  void reset_state() {
    state = Guarded({start.view().size[0], c.w - 1, c.c});
    for (int64_t i = 0; i < state.count(); ++i) state.at(i) = start.at(i);
  }
  View x() const { return wide.view().columns(0, c.c); }
  View state_or_none(const Guarded& g) const { return rows.slots() > 0 ? g.view() : View{}; }

  Conv1d forward() const {
    return {.x = x(),
            .weight = weight,
            .y = y,
            .bias = c.bias ? bias.view() : View{},
            .state = state_or_none(state),
            .rows = &rows,
            .silu = c.silu,
            .reverse = c.reverse};
  }
  Conv1dBackward backward() const {
    return {.x = x(),
            .weight = weight,
            .dy = dy,
            .bias = c.bias ? bias.view() : View{},
            .state = state_or_none(start),
            .dx = dx,
            .dweight = dweight,
            .dbias = c.bias ? dbias.view() : View{},
            .dstate = state_or_none(dstate),
            .rows = &rows,
            .silu = c.silu,
            .reverse = c.reverse};
  }
  Arrays<double> arrays() const {
    Arrays<double> in{
        {"x", Guarded::values(x())}, {"weight", weight.values()}, {"state", start.values()}};
    if (c.bias) in["bias"] = bias.values();
    return in;
  }
  reference::ConvShape shape() const {
    return {.c = c.c, .w = c.w, .silu = c.silu, .reverse = c.reverse};
  }
};

void expect_forward(const Case& c, int threads = 2) {
  Operands o(c, threads);
  o.backend->run(o.forward());
  const auto expected = reference::conv1d(o.shape(), c.pieces, o.arrays());
  expect_close("y", o.y.values(), expected.at("y"), kForward);
  EXPECT_EQ(o.state.values(), expected.at("state"));
  for (const Guarded* g : {&o.y, &o.state}) g->expect_intact("an output");
}

// Gradients of <dy, y> + <dstate of the slots written, state>; `most` entries of each operand.
void expect_backward(const Case& c, int64_t most, int threads = 2) {
  Operands o(c, threads);
  const auto dweight = o.dweight.values(), dbias = o.dbias.values(), before = o.dstate.values();
  std::vector<double> weight = before;
  const int64_t slot_size = (c.w - 1) * c.c;
  const SlotUse use(c.pieces, o.start.view().size[0]);
  for (size_t i = 0; i < weight.size(); ++i) weight[i] *= use.written[i / slot_size];
  o.backend->run(o.backward());

  const std::vector<double> dy = o.dy.values();
  const auto functional = [&](const Arrays<Complex>& in) {
    const auto out = reference::conv1d(o.shape(), c.pieces, in);
    Complex sum = 0;
    for (size_t i = 0; i < dy.size(); ++i) sum += dy[i] * out.at("y")[i];
    for (size_t i = 0; i < weight.size(); ++i) sum += weight[i] * out.at("state")[i];
    return sum;
  };
  const auto in = to_complex(o.arrays());
  const auto expect = [&](const char* name, const std::vector<double>& got) {
    expect_gradient(functional, in, name, got, probes(got.size(), most), kGradient);
  };
  expect("x", o.dx.values());
  expect("weight", difference(o.dweight.values(), dweight));  // these two are added to
  if (c.bias) expect("bias", difference(o.dbias.values(), dbias));
  const std::vector<double> after = o.dstate.values();
  std::vector<int64_t> of_read, some;
  for (size_t i = 0; i < after.size(); ++i)
    if (use.read[i / slot_size])
      of_read.push_back(i);
    else
      ASSERT_EQ(after[i], before[i]) << "dstate of a slot that no piece reads";
  for (const int64_t i : probes(of_read.size(), most)) some.push_back(of_read[i]);
  expect_gradient(functional, in, "state", after, some, kGradient);
  for (const Guarded* g : {&o.dx, &o.dweight, &o.dbias, &o.dstate}) g->expect_intact("a gradient");
}

TEST(Conv1d, RaggedBatchAgreesWithTheOracle) {
  expect_forward({.pieces = ragged_pieces(5000)});
  expect_forward({.pieces = ragged_pieces(5000), .c = 64}, 1);
  expect_forward({.pieces = ragged_pieces(130), .c = 108, .w = 3, .bias = false});
  expect_forward({.pieces = ragged_pieces(130), .c = 1, .w = 2, .silu = false});
  for (int64_t w = 1; w <= 8; ++w) expect_forward({.pieces = ragged_pieces(100), .c = 20, .w = w});
}

TEST(Conv1d, ReverseAgreesWithTheOracle) {
  const auto pieces = whole_pieces({1, 2, 3, 63, 64, 65});
  expect_forward({.pieces = pieces, .reverse = true});
  expect_backward({.pieces = pieces, .reverse = true}, 20);
}

TEST(Conv1d, EveryGradientOfASmallCase) {
  std::vector<Piece> pieces = {{.begin = 0, .length = 1, .from = 0, .to = 1},
                               {.begin = 1, .length = 2, .from = 2, .to = 2},
                               {.begin = 3, .length = 5, .from = 0, .to = 3},
                               {.begin = 8, .length = 4, .from = -1, .to = -1}};
  expect_backward({.pieces = pieces, .c = 18}, INT64_MAX);
  expect_backward({.pieces = pieces, .c = 18, .w = 3, .bias = false}, INT64_MAX, 1);
  expect_backward({.pieces = pieces, .c = 18, .w = 6, .silu = false}, INT64_MAX);
}

TEST(Conv1d, GradientsOfARaggedBatch) {
  expect_backward({.pieces = ragged_pieces(5000), .c = 20}, 10);
  expect_backward({.pieces = ragged_pieces(130), .c = 108, .w = 3}, 10);
  expect_backward({.pieces = ragged_pieces(130), .c = 64, .bias = false}, 10, 1);
}

// No slot is read twice, so that threads share the pieces as well.
TEST(Conv1d, GradientsOfManyShortSequences) {
  std::vector<Piece> pieces;
  for (int32_t i = 0; i < 100; ++i)
    pieces.push_back({.begin = 30 * i, .length = 30, .from = i % 2 ? i : -1, .to = i % 3 ? i : -1});
  expect_backward({.pieces = pieces, .c = 16}, 10, 2);
  expect_backward({.pieces = pieces, .c = 16}, 10, 3);
}

TEST(Conv1d, ChunksAgreeWithOneShot) {
  Operands o({.pieces = {{.begin = 0, .length = 300, .from = 0, .to = 0}}});
  o.backend->run(o.forward());
  const auto y = o.y.values(), state = o.state.values();
  for (const int64_t chunk : {1, 2, 3, 7, 64, 100}) {
    o.reset_state();
    o.y.fill(0);
    for (int64_t begin = 0; begin < 300; begin += chunk) {
      const int64_t length = std::min<int64_t>(chunk, 300 - begin);
      const Rows rows(*o.backend,
                      {{.begin = 0, .length = length, .position = begin, .from = 0, .to = 0}});
      Conv1d op = o.forward();
      op.rows = &rows;
      op.x = op.x.slice(begin, length);
      op.y = op.y.slice(begin, length);
      o.backend->run(op);
    }
    EXPECT_EQ(o.y.values(), y) << "chunks of " << chunk;
    EXPECT_EQ(o.state.values(), state) << "chunks of " << chunk;
  }
}

TEST(Conv1d, SameBitsTwiceAndCloseForAnyNumberOfThreads) {
  const Case c{.pieces = ragged_pieces(700), .c = 108};
  std::vector<std::vector<double>> first;
  for (const int threads : {2, 2, 1, 3}) {
    Operands o(c, threads);
    o.backend->run(o.forward());
    o.backend->run(o.backward());
    const std::vector<std::vector<double>> all = {o.y.values(),     o.state.values(),
                                                  o.dx.values(),    o.dweight.values(),
                                                  o.dbias.values(), o.dstate.values()};
    if (first.empty()) first = all;
    for (size_t i = 0; i < all.size(); ++i)
      if (threads == 2)
        EXPECT_EQ(all[i], first[i]) << "output " << i;
      else
        expect_close("an output", all[i], first[i], 1e-5);
  }
}

TEST(Conv1d, NanInGivesNanOut) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const char* name : {"x", "weight", "bias", "state"}) {
    Operands o({.pieces = {{.begin = 0, .length = 5, .from = 0, .to = 0}}});
    const std::map<std::string, View> views = {
        {"x", o.x()}, {"weight", o.weight}, {"bias", o.bias}, {"state", o.start}};
    Guarded::at(views.at(name), 0) = nan;
    o.reset_state();
    o.backend->run(o.forward());
    o.backend->run(o.backward());
    EXPECT_TRUE(std::isnan(o.y.at(0))) << name;
    EXPECT_TRUE(std::isnan(o.dbias.at(0))) << name;
    EXPECT_FALSE(std::isnan(o.y.at(35))) << name << ": another channel";
  }
}

// Rows that stand 2^31 elements apart, in a mapping of which only the pages touched exist.
TEST(Conv1d, StridesMayPassTwoToThe31) {
  const int64_t stride = (int64_t{1} << 31) + 4096, t = 3, bytes = t * stride * sizeof(float);
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  Operands o({.pieces = whole_pieces({t})});
  Conv1d op = o.forward();
  View far = o.x();
  far.data = memory;
  far.stride[0] = stride;
  for (int64_t s = 0; s < t; ++s) std::copy_n(op.x.row<float>(s), o.c.c, far.row<float>(s));
  o.backend->run(op);
  const auto y = o.y.values();
  o.y.fill(0);
  op.x = far;
  o.backend->run(op);
  EXPECT_EQ(o.y.values(), y);
  munmap(memory, bytes);
}

TEST(Conv1d, ExtremeValuesDoNotOverflow) {
  Operands o({.pieces = whole_pieces({4}), .c = 4, .w = 1, .bias = false});
  o.weight.fill(1);
  const float values[] = {-1e30f, -100, 100, 1e30f};
  for (int64_t s = 0; s < 4; ++s)
    for (int64_t j = 0; j < 4; ++j) o.x().row<float>(s)[j] = values[s];
  o.backend->run(o.forward());
  EXPECT_LE(std::abs(o.y.at(0)), 1e-6);
  EXPECT_LE(std::abs(o.y.at(4)), 1e-6);
  EXPECT_EQ(o.y.at(8), 100);
  EXPECT_EQ(o.y.at(12), 1e30f);
}

TEST(Conv1d, ErrorsNameOpAndOperand) {
  Operands o({.pieces = {{.begin = 0, .length = 6, .from = 0, .to = 2}}, .c = 8});
  Conv1d op = o.forward();
  op.weight = op.weight.slice(0, 7);
  EXPECT_EQ(message_of(*o.backend, op), "conv1d: weight is (7, 4) f32, expected (8, 4) f32");
  op = o.forward();
  op.state = {};
  EXPECT_EQ(message_of(*o.backend, op), "conv1d: state is missing");
  op = o.forward();
  op.state = op.state.slice(0, 1);
  EXPECT_EQ(message_of(*o.backend, op), "conv1d: state is (1, 3, 8) f32, expected 3 slots or more");
  op = o.forward();
  op.reverse = true;
  EXPECT_EQ(message_of(*o.backend, op),
            "conv1d: a piece carries state, expected whole sequences with reverse");
  op = o.forward();
  op.y = op.x;
  EXPECT_EQ(message_of(*o.backend, op), "conv1d: y is x, expected another tensor");
  Guarded many({8, 9});
  op = o.forward();
  op.weight = many;
  EXPECT_EQ(message_of(*o.backend, op), "conv1d: weight is (8, 9) f32, expected 1 to 8 taps");
  Conv1dBackward backward = o.backward();
  backward.dx = backward.dy;
  EXPECT_EQ(message_of(*o.backend, backward), "conv1d backward: dx is dy, expected another tensor");
}

}  // namespace
}  // namespace coil
