// Embedding: y[i] = table[ids[i]]; backward: dtable[ids[i]] += dy[i]. With labels (ops.h) backward
// is that of two tables, the second with a row for those that have none.
//
// Backward splits the columns over the threads, so that no two of them meet in a row of dtable and
// the order of additions does not depend on their number. A vocabulary of DNA is 16 rows, each hit
// by millions of steps: blocks of rows are summed apart and then added, which keeps the sums short
// (and the table in the first-level cache).
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/expect.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/embed.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

// table[id] += dy for rows begin … end of dy; table rows have `stride` floats.
void scatter(const EmbedBackward& op, int64_t begin, int64_t end, int64_t column, int64_t columns,
             float* table, int64_t stride) {
  const int32_t* ids = op.ids.as<int32_t>();
  for (int64_t t = begin; t < end; ++t) {
    const float* dy = op.dy.row<float>(t) + column;
    float* sum = table + ids[t] * stride;
    for_each(columns, [=](auto tag, int64_t i) HWY_ATTR {
      hn::StoreU(hn::Add(hn::LoadU(tag, sum + i), hn::LoadU(tag, dy + i)), tag, sum + i);
    });
  }
}

void add_table(float* sum, float* partial, int64_t count) { add_and_clear(sum, partial, count); }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(scatter);
HWY_EXPORT(add_table);

namespace {

constexpr int64_t kSmallTable = 16 << 10;  // floats per thread summed apart
constexpr int64_t kParallel = 32 << 10;    // elements from which threads pay

void check_ids(const char* op, const View& ids, int64_t v) {
  const int32_t* id = ids.as<int32_t>();
  uint32_t most = 0;  // a negative id becomes a large one
  for (int64_t i = 0; i < ids.rows(); ++i) most = std::max(most, static_cast<uint32_t>(id[i]));
  if (most < static_cast<uint64_t>(v) || ids.rows() == 0) return;
  int64_t i = 0;
  while (id[i] >= 0 && id[i] < v) ++i;
  fail("{}: id {} in row {}, expected 0 to {}", op, id[i], i, v - 1);
}

}  // namespace

void CpuBackend::run(const Embed& op) {
  expect_rank("embed", "table", op.table, 2);
  expect_rank("embed", "ids", op.ids, 1);
  const int64_t t = op.ids.rows(), v = op.table.rows(), d = op.table.cols();
  const DType type = op.table.dtype == DType::bf16 ? DType::bf16 : DType::f32;
  expect("embed", "ids", op.ids, DType::i32, {t});
  expect("embed", "table", op.table, type, {v, d});
  expect("embed", "y", op.y, DType::f32, {t, d});
  if (op.labels) expect("embed", "labels", op.labels, type, {op.labels.rows(), d});
  check_ids("embed", op.ids, v * (op.labels ? op.labels.rows() + 1 : 1));
  const int32_t* ids = op.ids.as<int32_t>();
  const auto value = [&](const View& table, int64_t row, int64_t j) {
    if (type == DType::f32) return table.row<float>(row)[j];
    float result = 0;
    const uint32_t bits = static_cast<uint32_t>(table.row<uint16_t>(row)[j]) << 16;
    std::memcpy(&result, &bits, sizeof bits);
    return result;
  };
#pragma omp parallel for num_threads(threads_) schedule(static) if (t * d >= kParallel)
  for (int64_t i = 0; i < t; ++i) {
    float* y = op.y.row<float>(i);
    const int64_t row = op.labels ? ids[i] % v : ids[i];
    if (type == DType::f32)
      std::memcpy(y, op.table.row<float>(row), d * sizeof(float));
    else
      for (int64_t j = 0; j < d; ++j) y[j] = value(op.table, row, j);
    if (op.labels && ids[i] / v < op.labels.rows())
      for (int64_t j = 0; j < d; ++j) y[j] += value(op.labels, ids[i] / v, j);
  }
}

void CpuBackend::run(const EmbedBackward& op) {
  expect_rank("embed backward", "dtable", op.dtable, 2);
  expect_rank("embed backward", "ids", op.ids, 1);
  const int64_t t = op.ids.rows(), v = op.dtable.rows(), d = op.dtable.cols();
  expect("embed backward", "ids", op.ids, DType::i32, {t});
  expect("embed backward", "dy", op.dy, DType::f32, {t, d});
  expect("embed backward", "dtable", op.dtable, DType::f32, {v, d});
  if (op.dlabels) {
    const int64_t l = op.dlabels.rows();
    check_ids("embed backward", op.ids, v * (l + 1));
    std::vector<int32_t> rows(t), labels(t);
    for (int64_t i = 0; i < t; ++i) {
      const auto id = op.ids.as<int32_t>()[i], count = static_cast<int32_t>(v);
      rows[i] = id % count;
      labels[i] = id / count;
    }
    run(EmbedBackward{
        .ids = host_view(rows.data(), DType::i32, {t}), .dy = op.dy, .dtable = op.dtable});
    const Tensor sums(*this, DType::f32, {l + 1, d});
    fill(sums, 0);
    run(EmbedBackward{
        .ids = host_view(labels.data(), DType::i32, {t}), .dy = op.dy, .dtable = sums});
    for (int64_t i = 0; i < l; ++i)
      for (int64_t j = 0; j < d; ++j) op.dlabels.row<float>(i)[j] += sums.view().row<float>(i)[j];
    return;
  }
  check_ids("embed backward", op.ids, v);
  if (t * d == 0) return;
  const auto add = &HWY_DYNAMIC_DISPATCH(add_table);
  const auto part = &HWY_DYNAMIC_DISPATCH(scatter);
  const int64_t most = (d + threads_ - 1) / threads_ + 15;
  const bool apart = v * most <= kSmallTable;
  std::vector<float> tables(apart ? v * most * threads_ : 0);
#pragma omp parallel num_threads(threads_) if (t * d >= kParallel)
  {
    const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    // Whole cache lines to each thread.
    const int64_t begin = (d * thread / count + 15) / 16 * 16;
    const int64_t end =
        thread + 1 == count ? d : std::min(d, (d * (thread + 1) / count + 15) / 16 * 16);
    const int64_t columns = end - begin;
    if (columns > 0 && apart && count == threads_) {
      float* table = tables.data() + v * most * thread;
      const int64_t block = std::max<int64_t>(1024, 4 * v);
      for (int64_t from = 0; from < t; from += block) {
        part(op, from, std::min(t, from + block), begin, columns, table, columns);
        for (int64_t id = 0; id < v; ++id)
          add(op.dtable.row<float>(id) + begin, table + id * columns, columns);
      }
    } else if (columns > 0) {
      part(op, 0, t, begin, columns, op.dtable.as<float>() + begin, op.dtable.stride[0]);
    }
  }
}

}  // namespace coil
#endif  // HWY_ONCE
