// Every case of op_cases.h and op_variants.h at small shapes: same bits twice, the same answer on
// one thread and on two, and a NaN in any input comes out.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "tests/op_variants.h"

namespace coil {
namespace {

std::vector<double> numbers(Backend& backend, const View& view) {
  std::vector<double> values(view.count());
  View to = host_view(values.data(), DType::f64, {view.count()});
  Tensor packed(backend, view.dtype, std::span<const int64_t>(view.size, view.rank));
  backend.copy(view, packed);
  backend.copy(packed.view().reshape({view.count()}), to);
  return values;
}

class OpCasesTest : public testing::TestWithParam<bool> {
 protected:
  OpCasesTest() {
    shape.pieces = {
        {.begin = 0, .length = 3}, {.begin = 3, .length = 70}, {.begin = 73, .length = 1}};
    if (!GetParam()) return;
    shape.pieces[0].to = 1;
    shape.pieces[0].last = false;
    shape.pieces[1].from = shape.pieces[1].to = 0;
    shape.pieces[2].from = 2;  // a fork
    shape.pieces[2].to = 3;
  }
  // The outputs after a run from the same beginning.
  std::vector<std::vector<double>> outputs(Backend& on, const OpCase& op) {
    std::vector<std::vector<double>> before, after;
    for (const View& view : op.outputs) before.push_back(numbers(*backend, view));
    op.run(on);
    for (const View& view : op.outputs) after.push_back(numbers(*backend, view));
    for (size_t i = 0; i < before.size(); ++i) {
      Tensor packed(*backend, op.outputs[i].dtype,
                    std::span<const int64_t>(op.outputs[i].size, op.outputs[i].rank));
      const int64_t count = op.outputs[i].count();
      backend->copy(host_view(before[i].data(), DType::f64, {count}),
                    packed.view().reshape({count}));
      backend->copy(packed, op.outputs[i]);
    }
    return after;
  }

  OpShape shape{.d = 40, .e = 72, .n = 16, .r = 5, .w = 4, .v = 11};
  std::unique_ptr<Backend> backend = make_cpu_backend(2), single = make_cpu_backend(1);
};
INSTANTIATE_TEST_SUITE_P(States, OpCasesTest, testing::Bool());

TEST_P(OpCasesTest, SameBitsTwiceAndAnyThreads) {
  const EveryOpCase all(*backend, shape);
  for (const OpCase& op : all.cases) {
    if (op.name.starts_with("gemm in_proj one row")) continue;  // takes other weights every time
    const auto first = outputs(*backend, op), second = outputs(*backend, op);
    const auto alone = outputs(*single, op);
    for (size_t i = 0; i < first.size(); ++i) {
      EXPECT_EQ(std::memcmp(first[i].data(), second[i].data(), first[i].size() * sizeof(double)), 0)
          << op.name << ", output " << i;
      double size = 0;
      for (const double value : first[i]) size = std::max(size, std::abs(value));
      for (size_t j = 0; j < first[i].size(); ++j)
        ASSERT_NEAR(first[i][j], alone[i][j], 1e-5 * size) << op.name << ", output " << i;
    }
  }
}

TEST_P(OpCasesTest, NanComesOut) {
  const EveryOpCase all(*backend, shape);
  for (const OpCase& op : all.cases) {
    for (size_t i = 0; i < op.inputs.size(); ++i) {
      float& value =
          op.inputs[i].row<float>(op.inputs[i].rows() / 2)[op.inputs[i].rank > 1 ? 2 : 0];
      const float before = value;
      value = std::numeric_limits<float>::quiet_NaN();
      bool found = false;
      for (const auto& output : outputs(*backend, op))
        for (const double number : output) found = found || std::isnan(number);
      EXPECT_TRUE(found) << op.name << ", input " << i;
      value = before;
    }
  }
}

}  // namespace
}  // namespace coil
