// Every case of op_cases.h and op_variants.h on the GPU against the CPU backend: f32 to rounding,
// bf16 within its own; ragged batches with states carried, forked and discarded, long sequences,
// decoding. The same bits twice, also over many repeats at odd sizes, where an order between blocks
// that nothing enforces would show.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

#include "kernels/error.h"
#include "tests/gradcheck.h"
#include "tests/op_variants.h"
#include "tests/test_device.h"

namespace coil {
namespace {

struct Shape {
  const char* name;
  OpShape shape;
};

std::vector<Piece> decoding(int64_t count) {
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < count; ++i) {
    const auto slot = static_cast<int32_t>(i);
    pieces.push_back({.begin = i, .length = 1, .from = slot, .to = slot, .last = false});
  }
  return pieces;
}

// So many of about one length that a scan takes them in one pass, backward several times 32
// channels a block; states read, written, forked.
std::vector<Piece> together() {
  std::vector<Piece> pieces;
  int64_t begin = 0;
  for (int32_t i = 0; i < 33; ++i) {
    const int64_t length = 200 + 7 * (i % 8);
    pieces.push_back({.begin = begin,
                      .length = length,
                      .from = i % 3 ? i : -1,
                      .to = i % 4 ? 33 + i : -1,
                      .last = i % 4 == 0});
    begin += length;
  }
  return pieces;
}

std::vector<Shape> shapes() {
  return {
      {"one", {.d = 64, .e = 128, .n = 16, .r = 4, .pieces = whole_pieces({1000})}},
      {"ragged", {.d = 64, .e = 128, .n = 16, .r = 4, .v = 5, .pieces = ragged_pieces(5000)}},
      {"odd", {.d = 37, .e = 75, .n = 11, .r = 5, .w = 3, .v = 23, .pieces = ragged_pieces(700)}},
      {"states", {.d = 40, .e = 36, .n = 37, .r = 3, .w = 2, .pieces = ragged_pieces(300)}},
      {"few states", {.d = 70, .e = 48, .n = 3, .r = 3, .pieces = ragged_pieces(2000)}},
      {"many states", {.d = 44, .e = 20, .n = 70, .r = 3, .pieces = ragged_pieces(1500)}},
      {"batch", {.d = 256, .e = 512, .n = 16, .pieces = whole_pieces({2048, 2048, 2048, 2048})}},
      {"together", {.d = 256, .e = 512, .n = 16, .pieces = together()}},
      {"long", {.d = 32, .e = 64, .n = 16, .r = 2, .pieces = whole_pieces({100'000})}},
      {"decode", {.d = 128, .e = 256, .n = 16, .r = 8, .pieces = decoding(64)}},
      {"vocabulary", {.d = 32, .e = 64, .r = 2, .v = 5000, .pieces = whole_pieces({513, 1})}},
      {"wide", {.d = 2048, .e = 64, .r = 2, .pieces = whole_pieces({300})}},
      {"words", {.d = 32, .e = 64, .r = 2, .v = 50'280, .pieces = whole_pieces({9})}},
      {"more words", {.d = 32, .e = 64, .r = 2, .v = 60'001, .pieces = whole_pieces({9})}},
  };
}

// Of an output as it was before a run, to be set again.
struct Kept {
  std::vector<double> values;
  void restore(Backend& backend, const View& view) {
    Tensor packed(backend, view.dtype, std::span<const int64_t>(view.size, view.rank));
    backend.copy(host_view(values.data(), DType::f64, {view.count()}),
                 packed.view().reshape({view.count()}));
    backend.copy(packed, view);
    backend.sync();
  }
};

std::vector<std::vector<double>> run(Backend& backend, const OpCase& op) {
  std::vector<Kept> before;
  for (const View& view : op.outputs) before.push_back({values_of<double>(backend, view)});
  op.run(backend);
  std::vector<std::vector<double>> after;
  for (const View& view : op.outputs) after.push_back(values_of<double>(backend, view));
  for (size_t i = 0; i < before.size(); ++i) before[i].restore(backend, op.outputs[i]);
  return after;
}

bool is_private(const OpCase& op, size_t output) {  // checkpoints
  return op.name.ends_with("scan for training") && output == 1;
}

class Cuda : public testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    COIL_NEEDS_TEST_DEVICE();
    gpu = make_test_backend();
  }
  std::unique_ptr<Backend> cpu = make_cpu_backend(), gpu;
};
INSTANTIATE_TEST_SUITE_P(Types, Cuda, testing::Values(DType::f32, DType::bf16),
                         [](const auto& info) { return name_of(info.param); });

TEST_P(Cuda, EveryOpAgreesWithTheCpu) {
  const bool small = std::getenv("COIL_SMALL_SHAPES") != nullptr;  // under compute-sanitizer
  for (auto [name, shape] : shapes()) {
    const Piece& last = shape.pieces.back();
    if (small && (last.begin + last.length) * std::max(shape.e, shape.v) > 4'000'000) continue;
    shape.matrices = GetParam();
    const EveryOpCase on_cpu(*cpu, shape), on_gpu(*gpu, shape);
    double worst = 0;
    std::string worst_op;
    for (const OpCase& op : on_gpu.cases) {
      const OpCase* twin = nullptr;
      for (const OpCase& other : on_cpu.cases)
        if (other.name == op.name || other.name + " bf16" == op.name) twin = &other;
      ASSERT_TRUE(twin) << op.name;
      if (op.name.find("one row") != std::string::npos && GetParam() == DType::bf16) continue;
      const auto expected = run(*cpu, *twin), found = run(*gpu, op);
      for (size_t i = 0; i < expected.size(); ++i) {
        if (is_private(op, i)) continue;
        ASSERT_EQ(found[i].size(), expected[i].size()) << op.name;
        const double error = relative(found[i], expected[i]);
        // A copy in bf16 of what differs by rounding in f32 may fall to the other side.
        const bool rounded = GetParam() == DType::bf16 || op.outputs[i].dtype == DType::bf16;
        EXPECT_LE(error, rounded ? 1e-2 : 2e-5)
            << name << ", " << op.name << ", output " << i << " " << op.outputs[i].shape();
        if (!(error <= worst)) worst = error, worst_op = op.name;
      }
      for (size_t i = expected.size(); i < found.size(); ++i) {  // dx once more, in bf16
        EXPECT_LE(relative(found[i], expected[0]), 1e-2) << name << ", " << op.name;
      }
    }
    fmt::print("[ cuda     ] {} {}: largest relative difference {:.1e} ({})\n", name,
               name_of(GetParam()), worst, worst_op);
  }
}

TEST_P(Cuda, SameBitsTwice) {
  for (auto [name, shape] : shapes()) {
    shape.matrices = GetParam();
    const EveryOpCase all(*gpu, shape);
    for (const OpCase& op : all.cases) {
      if (op.name.find("one row") != std::string::npos) continue;  // other weights every time
      const auto first = run(*gpu, op), second = run(*gpu, op);
      for (size_t i = 0; i < first.size(); ++i)
        EXPECT_EQ(std::memcmp(first[i].data(), second[i].data(), first[i].size() * sizeof(double)),
                  0)
            << name << ", " << op.name << ", output " << i;
    }
  }
}

// Racecheck sees shared memory only. Every repeat begins with the outputs as they were and is
// looked at: many of them come to the host in one piece.
TEST_P(Cuda, SameBitsAThousandTimes) {
  for (const auto& [longest, repeats] : {std::pair{501, 1000}, {3001, 100}}) {
    OpShape shape{.d = 72, .e = 150, .n = 16, .r = 5, .v = 7, .pieces = ragged_pieces(longest)};
    shape.matrices = GetParam();
    const EveryOpCase all(*gpu, shape);
    for (const OpCase& op : all.cases) {
      if (op.name.find("one row") != std::string::npos) continue;  // other weights every time
      int64_t count = 0;
      std::vector<Tensor> before;
      for (const View& view : op.outputs) {
        before.emplace_back(*gpu, view.dtype, std::span<const int64_t>(view.size, view.rank));
        gpu->copy(view, before.back());
        count += view.count();
      }
      const int64_t at_once = std::clamp<int64_t>(4'000'000 / count, 1, repeats);
      const Tensor found(*gpu, DType::f64, {at_once, count});
      std::vector<double> first;
      for (int64_t begin = 0; begin < repeats; begin += at_once) {
        const int64_t here = std::min(at_once, repeats - begin);
        for (int64_t k = 0; k < here; ++k) {
          op.run(*gpu);
          auto* to = found.as<double>() + k * count;
          for (size_t i = 0; i < before.size(); ++i) {
            View packed = before[i];
            packed.dtype = DType::f64;
            packed.data = to;
            gpu->copy(op.outputs[i], packed);
            gpu->copy(before[i], op.outputs[i]);
            to += packed.count();
          }
        }
        const auto values = values_of<double>(*gpu, found.view().slice(0, here));
        if (begin == 0) first.assign(values.begin(), values.begin() + count);
        for (int64_t k = 0; k < here; ++k)
          ASSERT_EQ(std::memcmp(first.data(), &values[k * count], count * sizeof(double)), 0)
              << op.name << ", repeat " << begin + k << ", longest piece " << longest;
      }
    }
  }
}

// The states of a scan in one pass go from warp to warp; every repeat is looked at. What a
// parameter's gradient adds up to is another one every time: those come last.
TEST_P(Cuda, OnePassGivesTheSameBitsAThousandTimes) {
  OpShape shape{.d = 256, .e = 512, .n = 16, .pieces = together()};
  shape.matrices = GetParam();
  const OpCases all(*gpu, shape, "selective_scan");
  for (const OpCase& op : all.cases) {
    const bool backward = op.name == "selective_scan backward";
    if (op.name != "selective_scan" && !backward) continue;
    const auto outputs = [&] {
      op.run(*gpu);
      std::vector<std::vector<float>> found;
      for (size_t i = 0; i < (backward ? 5 : 1); ++i)
        found.push_back(values_of<float>(*gpu, op.outputs[i]));
      return found;
    };
    const auto first = outputs();
    for (int repeat = 0; repeat < 1000; ++repeat) {
      const auto again = outputs();
      for (size_t i = 0; i < first.size(); ++i)
        ASSERT_EQ(std::memcmp(first[i].data(), again[i].data(), first[i].size() * sizeof(float)), 0)
            << op.name << ", output " << i << ", repeat " << repeat;
    }
  }
}

TEST_P(Cuda, AGradientThatIsNotFiniteChangesNothing) {
  const int64_t count = 9001;
  const auto make = [&](DType dtype, double value) {
    Tensor x(*gpu, dtype, {count});
    gpu->fill(x, value);
    return x;
  };
  const Tensor w = make(DType::f32, 1), g = make(DType::f32, 2), m = make(DType::f32, 3);
  const Tensor v = make(DType::f32, 4), copy = make(GetParam(), 5);
  const Tensor squares(*gpu, DType::f64, {1});
  const View gradients[] = {g};
  const AdamW::Item items[] = {{.w = w, .g = g, .m = m, .v = v, .copy = copy, .decay = 0.1f}};
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    gpu->fill(g.view().slice(4098, 1), bad);
    gpu->fill(squares, 0);
    gpu->run(SumSquares{.x = gradients, .out = squares});
    gpu->run(AdamW{.items = items, .squares = squares, .clip = 1, .lr = 0.1f});
    EXPECT_FALSE(std::isfinite(values_of<double>(*gpu, squares)[0]));
    for (const auto& [view, value] : {std::pair{&w, 1.f}, {&m, 3.f}, {&v, 4.f}, {&copy, 5.f}})
      for (const float x : values_of<float>(*gpu, *view)) ASSERT_EQ(x, value);
    EXPECT_EQ(values_of<float>(*gpu, g)[0], 2);
  }
}

// More than the staging memory holds; what it came from changes at once.
TEST_P(Cuda, CopiesFromTheHostArriveWhole) {
  const int64_t count = 5'000'003;
  const Tensor first(*gpu, DType::f32, {count}), second(*gpu, DType::f32, {count});
  std::vector<float> host(count);
  for (const Tensor* to : {&first, &second}) {
    const float sign = to == &first ? 1 : -1;
    for (int64_t i = 0; i < count; ++i) host[i] = sign * static_cast<float>(i);
    gpu->copy(host_view(host.data(), DType::f32, {count}), *to);
  }
  std::ranges::fill(host, 0.5f);
  for (const Tensor* to : {&first, &second}) {
    const std::vector<float> found = values_of<float>(*gpu, *to);
    const float sign = to == &first ? 1 : -1;
    for (int64_t i = 0; i < count; ++i) ASSERT_EQ(found[i], sign * static_cast<float>(i));
  }
}

// Words as frequent as in a text, some rows without one; runs that end in a chunk, beside and
// beyond.
TEST_P(Cuda, GradientOfAnEmbeddingOfWords) {
  if (GetParam() != DType::f32) return;  // neither dy nor dtable is anything else
  for (const auto& [t, v, d, words] : {std::tuple{5000, 50'280, 96, 50'280},
                                       {5000, 50'280, 37, 50'280},
                                       {3000, 1000, 64, 1},
                                       {3001, 1000, 33, 3},
                                       {16, 300, 8, 2},
                                       {1, 300, 4, 1}}) {
    std::mt19937 random(t);
    std::uniform_real_distribution<float> draw(-1, 1), rank(0, 1);
    std::vector<int32_t> ids(t);
    for (int32_t& id : ids)
      id = v - 1 - static_cast<int32_t>(std::pow(static_cast<float>(words), rank(random)) - 1);
    if (t > 20) ids[7] = -1, ids[8] = v, ids[19] = std::numeric_limits<int32_t>::min();
    std::vector<float> dy(t * d), before(v * d);
    for (float& value : dy) value = draw(random);
    for (float& value : before) value = draw(random);
    std::vector<double> expected(before.begin(), before.end());
    for (int i = 0; i < t; ++i)
      for (int j = 0; j < d && ids[i] >= 0 && ids[i] < v; ++j)
        expected[ids[i] * d + j] += dy[i * d + j];
    const Tensor here(*gpu, DType::i32, {t}), gradient(*gpu, DType::f32, {t, d + 4});
    const Tensor dtable(*gpu, DType::f32, {v, d + 4});
    gpu->copy(host_view(ids.data(), DType::i32, {t}), here);
    gpu->copy(host_view(dy.data(), DType::f32, {t, d}), gradient.view().columns(4, d));
    std::vector<float> first;
    for (int repeat = 0; repeat < 2; ++repeat) {
      gpu->fill(dtable, 5);
      gpu->copy(host_view(before.data(), DType::f32, {v, d}), dtable.view().columns(4, d));
      gpu->run(EmbedBackward{
          .ids = here, .dy = gradient.view().columns(4, d), .dtable = dtable.view().columns(4, d)});
      for (const float edge : values_of(*gpu, dtable.view().columns(0, 4))) ASSERT_EQ(edge, 5);
      const std::vector<float> found = values_of(*gpu, dtable.view().columns(4, d));
      ASSERT_TRUE(repeat == 0 || found == first);
      first = found;
    }
    for (size_t i = 0; i < expected.size(); ++i)
      ASSERT_NEAR(first[i], expected[i], 1e-5 * (1 + std::abs(expected[i])) + 2e-7 * t)
          << t << ' ' << d << ' ' << words << ": " << i / d << ' ' << i % d;
  }
}

TEST_P(Cuda, HostMemoryIsRefusedNotRead) {
  OpShape shape{.d = 32, .e = 64, .r = 2, .pieces = whole_pieces({10})};
  const EveryOpCase on_cpu(*cpu, shape);
  for (const OpCase& op : on_cpu.cases) {
    if (op.name == "gemm in_proj bf16") continue;
    EXPECT_THROW(op.run(*gpu), Error) << op.name;
  }
  gpu->sync();
}

TEST_P(Cuda, MoreThanTheCardHoldsIsAnErrorThatSaysSo) {
  try {
    const Tensor all(*gpu, DType::u8, {int64_t{1} << 42});
    FAIL() << "4 TB were allocated";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("out of memory"), std::string::npos) << error.what();
  }
  const Tensor some(*gpu, DType::u8, {1 << 20});
  gpu->fill(some, 1);
  gpu->sync();
}

}  // namespace
}  // namespace coil
