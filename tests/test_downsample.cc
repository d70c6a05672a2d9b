// Down- and up-pooling of a backend, forward and backward, against the scalar oracle: ragged
// batches at every phase, states carried, forked and discarded, chunks, the coarse batch.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <limits>
#include <memory>

#include "kernels/error.h"
#include "kernels/ops.h"
#include "tests/gradcheck.h"

namespace coil {
namespace {

using reference::Arrays;

struct Case {
  std::vector<Piece> pieces;
  int64_t d = 12, p = 4;
};

// As ragged_pieces(), each in the middle of a sequence; a slot read by two pieces, one of which
// finishes no coarse step.
std::vector<Piece> placed(std::vector<Piece> pieces, int64_t p) {
  for (size_t i = 0; i < pieces.size(); ++i)
    pieces[i].position = static_cast<int64_t>(i) * (2 * p + 1) + (i == 1 ? p - 1 : 0);
  return pieces;
}

struct Operands {
  Case c;
  std::unique_ptr<Backend> backend;
  Rows rows;
  int64_t t, m;
  Guarded x, down, rest, rest_start, lifted, residual, up, next, next_start;
  Guarded ddown, dresidual, dx, drest, dup, dlifted, dnext;

  explicit Operands(const Case& c, int threads = 2)
      : c(c), backend(make_cpu_backend(threads)), rows(*backend, c.pieces) {
    t = rows.total();
    m = rows.pooled(c.p).rows.total();
    const int64_t s = rows.slots() + 1, d = c.d, p = c.p;
    std::mt19937 random(5);
    const auto make = [&](std::initializer_list<int64_t> shape) {
      Guarded g(shape);
      g.normal(random);
      return g;
    };
    x = make({t, d});
    rest_start = make({s, p - 1, d});
    lifted = make({m, p * d});
    residual = make({t, d});
    next_start = make({s, p * d});
    ddown = make({m, p * d});
    dresidual = make({t, d});
    drest = make({s, p - 1, d});
    dup = make({t, d});
    dnext = make({s, p * d});
    down = Guarded({m, p * d});
    up = Guarded({t, d});
    dx = Guarded({t, d});
    dlifted = Guarded({m, p * d});
    reset_state();
  }
  void reset_state() {
    const int64_t s = rows.slots() + 1;
    rest = Guarded({s, c.p - 1, c.d});
    next = Guarded({s, c.p * c.d});
    for (int64_t i = 0; i < rest.count(); ++i) rest.at(i) = rest_start.at(i);
    for (int64_t i = 0; i < next.count(); ++i) next.at(i) = next_start.at(i);
  }
  View or_none(const Guarded& state) const { return rows.slots() > 0 ? state.view() : View{}; }
  Downsample downsample() const {
    return {.x = x, .y = down, .state = or_none(rest), .rows = &rows, .p = c.p};
  }
  Upsample upsample() const {
    return {.x = lifted,
            .residual = residual,
            .y = up,
            .state = or_none(next),
            .rows = &rows,
            .p = c.p};
  }
  DownsampleBackward downsample_backward() const {
    return {.dy = ddown,
            .dresidual = dresidual,
            .dx = dx,
            .dstate = or_none(drest),
            .rows = &rows,
            .p = c.p};
  }
  UpsampleBackward upsample_backward() const {
    return {.dy = dup, .dx = dlifted, .dstate = or_none(dnext), .rows = &rows, .p = c.p};
  }
  reference::CoarseShape shape() const { return {.d = c.d, .p = c.p}; }
  Arrays<double> down_arrays() const { return {{"x", x.values()}, {"state", rest_start.values()}}; }
  Arrays<double> up_arrays() const {
    return {
        {"x", lifted.values()}, {"residual", residual.values()}, {"state", next_start.values()}};
  }
  void run_all() {
    backend->run(downsample());
    backend->run(upsample());
    backend->run(downsample_backward());
    backend->run(upsample_backward());
  }
};

void expect_forward(const Case& c, int threads = 2) {
  Operands o(c, threads);
  o.backend->run(o.downsample());
  const auto down = reference::downsample(o.shape(), c.pieces, o.down_arrays());
  EXPECT_EQ(o.down.values(), down.at("y"));
  EXPECT_EQ(o.rest.values(), down.at("state"));
  o.backend->run(o.upsample());
  const auto up = reference::upsample(o.shape(), c.pieces, o.up_arrays());
  expect_close("y", o.up.values(), up.at("y"), 1e-7);
  EXPECT_EQ(o.next.values(), up.at("state"));
  for (const Guarded* g : {&o.down, &o.rest, &o.up, &o.next}) g->expect_intact("an output");
}

// Gradients of <dy, y> + <dstate of the slots written, state>; `most` entries of each operand.
template <class Oracle>
void expect_gradients(const Operands& o, const Oracle& oracle, const Arrays<double>& arrays,
                      const std::vector<double>& dy, const std::vector<double>& before,
                      const std::vector<double>& after, const char* operand,
                      const std::vector<double>& got, int64_t most) {
  const SlotUse use(o.c.pieces, o.rows.slots() + 1);
  const auto slot_size = static_cast<int64_t>(before.size()) / (o.rows.slots() + 1);
  std::vector<double> weight = before;
  for (size_t i = 0; i < weight.size(); ++i) weight[i] *= use.written[i / slot_size];
  const auto functional = [&](const Arrays<Complex>& in) {
    const auto out = oracle(o.shape(), o.c.pieces, in);
    Complex sum = 0;
    for (size_t i = 0; i < dy.size(); ++i) sum += dy[i] * out.at("y")[i];
    for (size_t i = 0; i < weight.size(); ++i) sum += weight[i] * out.at("state")[i];
    return sum;
  };
  const auto in = to_complex(arrays);
  expect_gradient(functional, in, operand, got, probes(got.size(), most), 1e-6);
  std::vector<int64_t> of_read, some;
  for (size_t i = 0; i < after.size(); ++i)
    if (use.read[i / slot_size])
      of_read.push_back(i);
    else
      ASSERT_EQ(after[i], before[i]) << "dstate of a slot that no piece reads";
  for (const int64_t i : probes(of_read.size(), most)) some.push_back(of_read[i]);
  expect_gradient(functional, in, "state", after, some, 1e-6);
}

void expect_backward(const Case& c, int64_t most, int threads = 2) {
  Operands o(c, threads);
  const auto drest = o.drest.values(), dnext = o.dnext.values();
  o.run_all();
  expect_gradients(
      o, [](auto&&... all) { return reference::downsample(all...); }, o.down_arrays(),
      o.ddown.values(), drest, o.drest.values(), "x",
      difference(o.dx.values(), o.dresidual.values()), most);
  expect_gradients(
      o, [](auto&&... all) { return reference::upsample(all...); }, o.up_arrays(), o.dup.values(),
      dnext, o.dnext.values(), "x", o.dlifted.values(), most);
  for (const Guarded* g : {&o.dx, &o.dlifted, &o.drest, &o.dnext}) g->expect_intact("a gradient");
}

TEST(Downsample, RaggedBatchAgreesWithTheOracle) {
  for (const int64_t p : {2, 3, 4, 16, 100})
    for (const int64_t d : {1, 20, 64}) {
      expect_forward({.pieces = ragged_pieces(700), .d = d, .p = p});
      expect_forward({.pieces = placed(ragged_pieces(700), p), .d = d, .p = p}, 1);
    }
  expect_forward({.pieces = whole_pieces({1, 2, 3, 4, 5, 300}), .p = 4});
  expect_forward({.pieces = whole_pieces({1, 2, 3}), .p = 4});  // no coarse step at all
}

TEST(Downsample, GradientsOfARaggedBatch) {
  for (const int64_t p : {2, 3, 4, 16}) {
    expect_backward({.pieces = ragged_pieces(130), .d = 6, .p = p}, 60);
    expect_backward({.pieces = placed(ragged_pieces(130), p), .d = 6, .p = p}, 60, 1);
  }
  expect_backward({.pieces = whole_pieces({1, 2, 3, 4, 5, 30})}, 60);
}

TEST(Downsample, EveryGradientOfASmallCase) {
  const std::vector<Piece> pieces = {
      {.begin = 0, .length = 1, .position = 5, .from = 0, .to = 1},
      {.begin = 1, .length = 2, .position = 9, .from = 2, .to = 2},
      {.begin = 3, .length = 7, .position = 6, .from = 0, .to = 3},
      {.begin = 10, .length = 1, .position = 3, .from = 0, .to = -1},
      {.begin = 11, .length = 4, .position = 2, .from = -1, .to = -1}};
  for (const int64_t p : {2, 3, 4, 5}) expect_backward({.pieces = pieces, .d = 3, .p = p}, 1000);
}

TEST(Downsample, SameBitsTwiceAndForAnyNumberOfThreads) {
  const Case c{.pieces = placed(ragged_pieces(5000), 4), .d = 33};
  std::vector<std::vector<double>> first;
  for (const int threads : {2, 2, 1, 3}) {
    Operands o(c, threads);
    o.run_all();
    const std::vector<std::vector<double>> all = {
        o.down.values(), o.rest.values(),    o.up.values(),    o.next.values(),
        o.dx.values(),   o.dlifted.values(), o.drest.values(), o.dnext.values()};
    if (first.empty()) first = all;
    for (size_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i], first[i]) << "output " << i;
  }
}

// In chunks of any length, in place, coarse rows and sums are those of one shot.
TEST(Downsample, ChunksAgreeWithOneShot) {
  Operands o({.pieces = {{.begin = 0, .length = 301, .from = -1, .to = 0}}});
  o.run_all();
  const auto down = o.down.values(), up = o.up.values(), rest = o.rest.values(),
             next = o.next.values();
  for (const int64_t chunk : {1, 2, 3, 5, 7, 64, 100}) {
    o.reset_state();
    o.down.fill(0);
    o.up.fill(0);
    for (int64_t begin = 0, coarse = 0; begin < 301; begin += chunk) {
      const int64_t length = std::min<int64_t>(chunk, 301 - begin);
      const Rows rows(*o.backend, {{.begin = 0,
                                    .length = length,
                                    .position = begin,
                                    .from = begin == 0 ? -1 : 0,
                                    .to = 0}});
      const int64_t m = rows.pooled(4).rows.total();
      Downsample op = o.downsample();
      op.rows = &rows;
      op.x = op.x.slice(begin, length);
      op.y = op.y.slice(coarse, m);
      o.backend->run(op);
      Upsample back = o.upsample();
      back.rows = &rows;
      back.x = back.x.slice(coarse, m);
      back.residual = back.residual.slice(begin, length);
      back.y = back.y.slice(begin, length);
      o.backend->run(back);
      coarse += m;
    }
    EXPECT_EQ(o.down.values(), down) << "chunks of " << chunk;
    EXPECT_EQ(o.up.values(), up) << "chunks of " << chunk;
    EXPECT_EQ(o.rest.values(), rest) << "chunks of " << chunk;
    EXPECT_EQ(o.next.values(), next) << "chunks of " << chunk;
  }
}

// Rows that stand 2^31 elements apart, in a mapping of which only the pages touched exist.
TEST(Downsample, StridesMayPassTwoToThe31) {
  const int64_t stride = (int64_t{1} << 31) + 4096, t = 9, bytes = t * stride * sizeof(float);
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  Operands o({.pieces = whole_pieces({t})});
  o.run_all();
  const auto down = o.down.values(), up = o.up.values();
  View far = o.x.view();
  far.data = memory;
  far.stride[0] = stride;
  for (int64_t i = 0; i < t; ++i) std::copy_n(o.x.view().row<float>(i), o.c.d, far.row<float>(i));
  Downsample op = o.downsample();
  op.x = far;
  o.down.fill(0);
  o.backend->run(op);
  EXPECT_EQ(o.down.values(), down);
  for (int64_t i = 0; i < t; ++i)
    std::copy_n(o.residual.view().row<float>(i), o.c.d, far.row<float>(i));
  Upsample back = o.upsample();
  back.residual = back.y = far;
  o.backend->run(back);
  EXPECT_EQ(Guarded::values(far), up);
  munmap(memory, bytes);
}

TEST(Downsample, TheCoarseBatchHoldsThePiecesThatAreDue) {
  const auto backend = make_cpu_backend(1);
  const Rows rows(*backend, {{.begin = 0, .length = 1, .position = 7, .from = 0, .to = 0},
                             {.begin = 1, .length = 1, .position = 6, .from = 1, .to = 1},
                             {.begin = 2, .length = 9, .position = 3, .from = 2, .to = 3},
                             {.begin = 11, .length = 3, .from = -1, .to = 4, .last = false},
                             {.begin = 14, .length = 4, .to = 5, .last = false}});
  const Rows::Pooled& pooled = rows.pooled(4);
  EXPECT_EQ(&pooled, &rows.pooled(4));
  const std::vector<Piece> expected = {
      {.begin = 0, .length = 1, .position = 1, .from = 0, .to = 0},
      {.begin = 1, .length = 3, .position = 0, .from = -1, .to = 3},
      {.begin = 4, .length = 1, .position = 0, .from = -1, .to = 5, .last = false}};
  const auto found = pooled.rows.pieces();
  EXPECT_EQ(std::vector<Piece>(found.begin(), found.end()), expected);
  EXPECT_EQ(pooled.first, (std::vector<int64_t>{0, 1, 1, 4, 4}));
}

TEST(Downsample, ErrorsNameOpAndOperand) {
  Operands o({.pieces = {{.begin = 0, .length = 9, .from = 0, .to = 2}}, .d = 8});
  Downsample op = o.downsample();
  op.y = op.y.slice(0, 1);
  EXPECT_EQ(message_of(*o.backend, op), "downsample: y is (1, 32) f32, expected (2, 32) f32");
  op = o.downsample();
  op.state = {};
  EXPECT_EQ(message_of(*o.backend, op), "downsample: state is missing");
  op = o.downsample();
  op.p = 1;
  EXPECT_EQ(message_of(*o.backend, op), "downsample: p is 1, expected 2 or more");
  Upsample up = o.upsample();
  up.state = up.state.slice(0, 1);
  EXPECT_EQ(message_of(*o.backend, up), "upsample: state is (1, 32) f32, expected 3 slots or more");
  UpsampleBackward back = o.upsample_backward();
  back.rows = nullptr;
  EXPECT_EQ(message_of(*o.backend, back), "upsample backward: rows are missing");
}

}  // namespace
}  // namespace coil
