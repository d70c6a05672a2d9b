// View, Tensor, Rows, and the memory, copies and fills of the CPU backend.
#include "kernels/tensor.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <numeric>

#include "kernels/error.h"
#include "kernels/ops.h"

namespace coil {
namespace {

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

class TensorTest : public testing::Test {
 protected:
  std::unique_ptr<Backend> backend = make_cpu_backend(2);
};

TEST_F(TensorTest, ShapesAndViews) {
  Tensor x(*backend, DType::f32, {6, 10});
  EXPECT_EQ(x.count(), 60);
  EXPECT_EQ(x.view().shape(), "(6, 10) f32");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(x.view().data) % 64, 0u);
  std::iota(x.span<float>().begin(), x.span<float>().end(), 0.f);

  const View rows = x.view().slice(2, 3);
  EXPECT_EQ(rows.shape(), "(3, 10) f32");
  EXPECT_EQ(rows.row<float>(0)[0], 20);
  EXPECT_TRUE(rows.contiguous());

  const View columns = x.view().columns(4, 2);
  EXPECT_EQ(columns.row<float>(5)[1], 55);
  EXPECT_FALSE(columns.contiguous());
  EXPECT_TRUE(columns.slice(1, 1).contiguous());  // one row: its stride does not matter

  const View cube = x.view().reshape({3, 2, 10});
  EXPECT_EQ(cube.row<float>(2)[0], 40);
  EXPECT_EQ(cube.columns(3, 1).count(), 6);
}

TEST_F(TensorTest, EmptyTensorsExist) {
  EXPECT_FALSE(Tensor());
  EXPECT_EQ(Tensor().count(), 0);
  Tensor none(*backend, DType::f32, {0, 5});
  EXPECT_TRUE(none);  // an operand without elements is not a missing operand
  EXPECT_EQ(none.count(), 0);
  backend->fill(none, 1);
  backend->copy(none, none);
}

TEST_F(TensorTest, MovesFreeOnce) {
  Tensor a(*backend, DType::f32, {1000});
  void* data = a.view().data;
  Tensor b = std::move(a);
  EXPECT_FALSE(a);
  EXPECT_EQ(b.view().data, data);
  Tensor c(*backend, DType::f32, {1000});
  c = std::move(b);  // what c held is free again at once
  EXPECT_EQ(c.view().data, data);
  EXPECT_FALSE(b);
}

TEST_F(TensorTest, BadShapesThrow) {
  EXPECT_THROW(Tensor(*backend, DType::f32, {3, -1}), Error);
  EXPECT_THROW(Tensor(*backend, DType::f32, {1, 1, 1, 1, 1}), Error);
  EXPECT_THROW(Tensor(*backend, DType::f32, {int64_t{1} << 40, int64_t{1} << 40}), Error);
}

TEST_F(TensorTest, FreedBlocksAreUsedAgain) {
  void* first = backend->alloc(1000);
  backend->free(first);
  EXPECT_EQ(backend->alloc(1010), first);  // of one size class
  backend->free(first);
  void* other = backend->alloc(100'000);
  EXPECT_NE(other, first);
  backend->free(other);
}

// As on a GPU, where giving a block back waits for the device.
TEST(Blocks, BeyondTheBoundALargerBlockIsTakenBeforeOneGoesBack) {
  int obtained = 0, released = 0;
  Blocks blocks({.kept_share = 1,
                 .allocate =
                     [&](int64_t size) {
                       ++obtained;
                       return std::malloc(size);
                     },
                 .release =
                     [&](void* data) {
                       ++released;
                       std::free(data);
                     }});
  void* const large = blocks.alloc(1000 << 10);
  blocks.free(large);
  void* const middle = blocks.alloc(600 << 10);  // within the bound: of its own size
  EXPECT_NE(middle, large);
  blocks.free(middle);
  EXPECT_EQ(obtained, 2);
  void* const between = blocks.alloc(800 << 10);
  EXPECT_EQ(between, large);
  EXPECT_EQ(blocks.memory().in_use, 1024 << 10);  // what it takes, not what was asked for
  blocks.free(between);
  blocks.free(blocks.alloc(320 << 10));  // within the bound
  EXPECT_EQ(obtained, 3);
  EXPECT_EQ(released, 0);
  blocks.free(blocks.alloc(144 << 10));  // less than half of the smallest that is there
  EXPECT_EQ(obtained, 4);
  EXPECT_EQ(released, 1);
}

TEST_F(TensorTest, KeptMemoryIsBounded) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "the address sanitizer keeps freed memory itself";
#endif
  // Each block is of another size class and freed before the next: without a bound all of them
  // would be kept.
  const auto resident = [] {
    std::FILE* file = std::fopen("/proc/self/statm", "r");
    long total = 0, pages = 0;
    EXPECT_EQ(std::fscanf(file, "%ld %ld", &total, &pages), 2);
    std::fclose(file);
    return pages * 4096;
  };
  const long before = resident();
  for (int i = 0; i < 16; ++i) {
    Tensor x(*backend, DType::u8, {(int64_t{4} << 20) + i * (int64_t{1} << 20)});
    backend->fill(x, 1);
  }
  EXPECT_LT(resident() - before, 60 << 20);  // the largest is 19 MiB, all together are 184
}

TEST_F(TensorTest, CastsRoundToNearestEven) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> from = {1.f, -2.5f, 1.00390625f, 1.01171875f, nan, inf, 3.4e38f, 0.f};
  std::vector<uint16_t> half(from.size());
  std::vector<float> back(from.size());
  const int64_t n = from.size();
  backend->copy(host_view(from.data(), DType::f32, {n}), host_view(half.data(), DType::bf16, {n}));
  backend->copy(host_view(half.data(), DType::bf16, {n}), host_view(back.data(), DType::f32, {n}));
  EXPECT_EQ(half[0], 0x3f80);
  EXPECT_EQ(back[1], -2.5f);
  EXPECT_EQ(back[2], 1.f);        // half way, to even
  EXPECT_EQ(back[3], 1.015625f);  // half way, to even
  EXPECT_TRUE(std::isnan(back[4]));
  EXPECT_EQ(back[5], inf);
  EXPECT_EQ(back[6], inf);
  EXPECT_EQ(back[7], 0.f);
}

TEST_F(TensorTest, CopiesBetweenAllTypes) {
  const DType types[] = {DType::f32, DType::bf16, DType::f64, DType::i32, DType::u8};
  const int64_t rows = 7, cols = 37;
  Tensor source(*backend, DType::f64, {rows, cols});
  for (int64_t i = 0; i < source.count(); ++i) source.as<double>()[i] = i % 128;
  for (const DType from : types) {
    for (const DType to : types) {
      Tensor a(*backend, from, {rows, cols}), b(*backend, to, {rows, cols + 5});
      Tensor back(*backend, DType::f64, {rows, cols + 5});
      backend->copy(source, a);
      backend->fill(b, 77);
      backend->copy(a, b.view().columns(3, cols));  // strided destination
      backend->copy(b, back);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols + 5; ++j)
          ASSERT_EQ(back.view().row<double>(i)[j],
                    j < 3 || j >= cols + 3 ? 77 : (i * cols + j - 3) % 128)
              << name_of(from) << " to " << name_of(to);
    }
  }
}

TEST_F(TensorTest, IntegersAreClipped) {
  std::vector<float> from = {-5.f, 300.f, 7.9f, std::numeric_limits<float>::quiet_NaN()};
  std::vector<uint8_t> to(4);
  backend->copy(host_view(from.data(), DType::f32, {4}), host_view(to.data(), DType::u8, {4}));
  EXPECT_EQ(to, (std::vector<uint8_t>{0, 255, 7, 0}));
}

TEST_F(TensorTest, CopiesOfFourDimensionsKeepTheirPlaces) {
  Tensor a(*backend, DType::f32, {3, 4, 5, 6}), b(*backend, DType::f32, {3, 4, 5, 2});
  std::iota(a.span<float>().begin(), a.span<float>().end(), 0.f);
  backend->copy(a.view().columns(1, 2), b);
  for (int64_t i = 0; i < 60; ++i) {
    ASSERT_EQ(b.as<float>()[2 * i], 6 * i + 1);
    ASSERT_EQ(b.as<float>()[2 * i + 1], 6 * i + 2);
  }
  EXPECT_EQ(message_of([&] { backend->copy(a, b); }),
            "copy: from is (3, 4, 5, 6) f32, to is (3, 4, 5, 2) f32: expected one shape");
}

TEST_F(TensorTest, LargeCopiesAreThreaded) {
  Tensor a(*backend, DType::f32, {1000, 1003}), b(*backend, DType::f32, {1000, 500});
  std::iota(a.span<float>().begin(), a.span<float>().end(), 0.f);
  backend->copy(a.view().columns(500, 500), b);
  for (int64_t i = 0; i < 1000; ++i)
    for (int64_t j = 0; j < 500; ++j)
      ASSERT_EQ(b.view().row<float>(i)[j], static_cast<float>(i * 1003 + 500 + j));
}

// Two rows more than 2^31 elements apart, over a mapping of which only the touched pages exist.
TEST_F(TensorTest, StridesPast31Bits) {
  const int64_t stride = (int64_t{1} << 31) + 4096, bytes = (stride + 4096) * 4;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) GTEST_SKIP() << "no address space for a mapping of " << bytes;
  View far = host_view(memory, DType::f32, {2, 64});
  far.stride[0] = stride;
  Tensor x(*backend, DType::f32, {2, 64}), back(*backend, DType::f32, {2, 64});
  std::iota(x.span<float>().begin(), x.span<float>().end(), 0.f);
  backend->copy(x, far);
  EXPECT_EQ(static_cast<float*>(memory)[stride + 3], 67);
  backend->copy(far, back);
  for (int i = 0; i < 128; ++i) ASSERT_EQ(back.as<float>()[i], i);
  backend->fill(far.slice(1, 1), 5);
  EXPECT_EQ(static_cast<float*>(memory)[stride + 63], 5);
  EXPECT_EQ(static_cast<float*>(memory)[63], 63);

  View weight = host_view(memory, DType::f32, {64, 2});  // b (k, n): its rows far apart
  weight.size[0] = 2, weight.size[1] = 64, weight.stride[0] = stride;
  Tensor a(*backend, DType::f32, {8, 2}), c(*backend, DType::f32, {8, 64});
  backend->fill(a, 1);
  backend->run(Gemm{.a = a, .b = weight, .c = c});
  for (int j = 0; j < 64; ++j) ASSERT_EQ(c.as<float>()[7 * 64 + j], j + 5);

  Tensor ones(*backend, DType::f32, {64});
  backend->fill(ones, 1);
  backend->run(Norm{.x = far, .weight = ones, .y = far, .eps = 0});
  EXPECT_NEAR(static_cast<float*>(memory)[stride], 1, 1e-6);
  munmap(memory, bytes);
}

TEST_F(TensorTest, RowsCountWhatTheyHold) {
  const Rows rows(*backend, {{.begin = 0, .length = 3, .to = 1, .last = false},
                             {.begin = 3, .length = 40, .position = 5, .from = 4, .to = 4},
                             {.begin = 43, .length = 1}});
  EXPECT_EQ(rows.total(), 44);
  EXPECT_EQ(rows.finished(), 2);
  EXPECT_EQ(rows.slots(), 5);
  EXPECT_EQ(scan_checkpoints(*backend, rows), 1 + 2 + 1);
  const Rows equal = Rows::equal(*backend, 3, 33);
  EXPECT_EQ(equal.total(), 99);
  EXPECT_EQ(equal.finished(), 3);
  EXPECT_EQ(equal.slots(), 0);
  EXPECT_EQ(equal.pieces()[2].begin, 66);
  EXPECT_EQ(scan_checkpoints(*backend, equal), 6);
}

TEST_F(TensorTest, RowsRefuseWhatHasNoOrder) {
  const auto build = [&](std::vector<Piece> pieces) {
    return message_of([&] { Rows(*backend, std::move(pieces)); });
  };
  EXPECT_EQ(build({{.begin = 1, .length = 2}}), "rows: piece 0 begins at row 1, expected 0");
  EXPECT_EQ(build({{.begin = 0, .length = 2}, {.begin = 3, .length = 1}}),
            "rows: piece 1 begins at row 3, expected 2");
  EXPECT_EQ(build({{.begin = 0, .length = 0}}), "rows: piece 0 has length 0, expected 1 or more");
  EXPECT_EQ(build({{.begin = 0, .length = 1, .from = -2}}),
            "rows: piece 0 names slots -2 and -1, expected -1 or more");
  EXPECT_EQ(build({{.begin = 0, .length = 1, .position = -1}}),
            "rows: piece 0 has position -1, expected 0 or more");
  EXPECT_EQ(build({{.begin = 0, .length = 1, .to = 2}, {.begin = 1, .length = 1, .to = 2}}),
            "rows: pieces 0 and 1 both write slot 2");
  EXPECT_EQ(build({{.begin = 0, .length = 1, .from = 2}, {.begin = 1, .length = 1, .to = 2}}),
            "rows: piece 0 reads slot 2, which piece 1 writes");
  EXPECT_EQ(
      build({{.begin = 0, .length = 1, .from = 2}, {.begin = 1, .length = 1, .from = 2, .to = 3}}),
      "no error");  // two forks of one state
}

}  // namespace
}  // namespace coil
