// A step of a stack of Mamba blocks for a few sequences: decoding. The ops one by one would meet at
// the end of each (some 1 to 5 us with two threads, 25 times a step of four layers) and make their
// temporaries anew; here one team of threads walks the layers, each with channels of its own:
//   norm of the rows (every thread for itself, d is small); in_proj and conv1d of its channels;
//   | x_proj of its outputs | dt_proj and the scan of its channels | out_proj of its columns |
// with a barrier at each bar. Convolution and scan are the cells of their ops.
//
// Products are of a few rows, so that a step takes the time of reading the weights once, in
// whatever cache they lie. A vector's worth of outputs is computed at once, each with a sum of its
// own along k, in an order that depends on neither rows nor threads: a sequence gets the same bits
// alone and beside others.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/grid.h"
#include "kernels/expect.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/mamba_step.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/scan_blocks-inl.h"

#ifndef COIL_MAMBA_STEP_ONCE
#define COIL_MAMBA_STEP_ONCE
namespace coil {
namespace {

constexpr int64_t kUnit = 16;  // channels that no two threads share: a cache line

struct Range {
  int64_t begin, end;
};

// c[i,j] = a[i] b[j] + bias[j], or added to c, for j of a range.
struct StepProduct {
  View a, b, c;
  View bias;
  bool add = false;
};

}  // namespace
}  // namespace coil
#endif  // COIL_MAMBA_STEP_ONCE

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

HWY_INLINE V load_weights(const float* from) { return hn::LoadU(d, from); }
HWY_INLINE V load_weights(const uint16_t* from) {  // bf16
  const hn::RebindToUnsigned<FloatTag> bits;
  const hn::Rebind<uint16_t, FloatTag> half;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(bits, hn::LoadU(half, from))));
}

// Lane q: the sum of sums[q].
HWY_INLINE V sum_of_each(V* sums) {
#if HWY_TARGET != HWY_SCALAR
#pragma GCC unroll 4
  for (int64_t width = kLanes / 2; width >= 1; width /= 2)
#pragma GCC unroll 8
    for (int64_t q = 0; q < width; ++q)
      sums[q] = hn::Add(hn::ConcatEven(d, sums[2 * q + 1], sums[2 * q]),
                        hn::ConcatOdd(d, sums[2 * q + 1], sums[2 * q]));
#endif
  return sums[0];
}

// kRows rows of a times kLanes / kRows rows of b, as many sums as a vector has lanes.
template <int kRows, class T>
HWY_INLINE V row_products(const float* HWY_RESTRICT a, int64_t a_stride, const T* HWY_RESTRICT b,
                          int64_t b_stride, int64_t k) {
  constexpr int64_t kColumns = kLanes / kRows;
  V sums[kLanes];
#pragma GCC unroll 16
  for (int64_t q = 0; q < kLanes; ++q) sums[q] = hn::Zero(d);
  const auto add = [&](const float* from_a, const T* from_b, int64_t stride_a,
                       int64_t stride_b) HWY_ATTR {
    V in[kRows];
#pragma GCC unroll 4
    for (int64_t i = 0; i < kRows; ++i) in[i] = hn::LoadU(d, from_a + i * stride_a);
#pragma GCC unroll 16
    for (int64_t q = 0; q < kColumns; ++q) {
      const V weights = load_weights(from_b + q % 4 * stride_b + q / 4 * 4 * stride_b);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kRows; ++i)
        sums[i * kColumns + q] = hn::MulAdd(in[i], weights, sums[i * kColumns + q]);
    }
  };
  int64_t p = 0;
  for (; p + kLanes <= k; p += kLanes) add(a + p, b + p, a_stride, b_stride);
  if (p < k) {  // the rest, padded
    HWY_ALIGN float rest_a[kRows * kLanes] = {};
    HWY_ALIGN T rest_b[kColumns * kLanes] = {};
    for (int64_t i = 0; i < kRows; ++i)
      std::copy(a + i * a_stride + p, a + i * a_stride + k, rest_a + i * kLanes);
    for (int64_t q = 0; q < kColumns; ++q)
      std::copy(b + q * b_stride + p, b + q * b_stride + k, rest_b + q * kLanes);
    add(rest_a, rest_b, kLanes, kLanes);
  }
  return sum_of_each(sums);
}

HWY_INLINE void store_sums(const StepProduct& op, int64_t row, int64_t column, int64_t count,
                           V sum) {
  float* const c = op.c.row<float>(row) + column;
  if (op.bias) sum = hn::Add(sum, load_part(d, op.bias.as<float>() + column, count));
  if (op.add) sum = hn::Add(sum, load_part(d, c, count));
  store_part(d, sum, c, count);
}

// Of row i on, kRows of them, and columns j … j + count.
template <int kRows, class T>
HWY_INLINE void multiply_block(const StepProduct& op, int64_t i, int64_t j, int64_t count) {
  constexpr int64_t kColumns = kLanes / kRows;
  const int64_t k = op.a.cols(), end = j + count;
  const float* const bias = op.bias.as<float>();
  HWY_ALIGN float sums[kLanes];
  for (; j < end; j += kColumns) {
    const int64_t width = std::min(kColumns, end - j);
    // Where fewer rows of b are left than are read: one by one, each as all of them.
    const bool all = j + kColumns <= op.b.rows();
    for (int64_t q = 0; q < (all ? 1 : width); ++q) {
      const V sum = row_products<kRows, T>(op.a.row<float>(i), op.a.stride[0], op.b.row<T>(j + q),
                                           all ? op.b.stride[0] : 0, k);
      if (kRows == 1 && all) {
        store_sums(op, i, j, width, sum);
        continue;
      }
      hn::Store(sum, d, sums);
      for (int64_t r = 0; r < kRows; ++r) {
        float* const c = op.c.row<float>(i + r) + j + q;
        for (int64_t s = 0; s < (all ? width : 1); ++s) {
          float value = sums[r * kColumns + s];
          if (bias) value += bias[j + q + s];
          c[s] = op.add ? c[s] + value : value;
        }
      }
    }
  }
}

// A vector's worth of columns for all rows, then the next.
template <class T>
void products(const StepProduct& op, Range columns) {
  const int64_t m = op.c.rows();
  for (int64_t j = columns.begin; j < columns.end; j += kLanes) {
    const int64_t count = std::min(kLanes, columns.end - j);
    int64_t i = 0;
    if constexpr (kLanes >= 4) {
      for (; i + 4 <= m; i += 4) multiply_block<4, T>(op, i, j, count);
      if (i + 2 <= m) multiply_block<2, T>(op, i, j, count), i += 2;
    }
    for (; i < m; ++i) multiply_block<1, T>(op, i, j, count);
  }
}

void step_product(const StepProduct& op, Range columns) {
  if (op.b.dtype == DType::bf16)
    products<uint16_t>(op, columns);
  else
    products<float>(op, columns);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(step_product);

namespace {

constexpr int64_t kMostRows = 16;  // beyond, the products of gemm.cc are faster
// Of bf16 matrices, up to which they are in a cache; beyond, skinny.cc reads them faster, row by
// row.
constexpr int64_t kMostHalfBytes = 16 << 20;
constexpr int64_t kTermsOfThread = 48 << 10;  // multiplications of a layer that a thread is worth

// Of `count` in units of a cache line, the share of one thread.
Range share(int64_t count, int64_t thread, int64_t threads) {
  const int64_t units = (count + kUnit - 1) / kUnit;
  return {std::min(count, units * thread / threads * kUnit),
          std::min(count, units * (thread + 1) / threads * kUnit)};
}

// OpenMP's calls the kernel each time, of one thread too. Threads are here within microseconds of
// each other unless another program has the core: then this one is given away.
class Barrier {
 public:
  void wait(int64_t team) {
    if (team == 1) return;
    const int64_t now = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(now + 1, std::memory_order_release);
      return;
    }
    for (int turn = 0; round_.load(std::memory_order_acquire) == now; ++turn)
      if (turn < kTurns)
        hwy::Pause();
      else
        std::this_thread::yield();
  }

 private:
  static constexpr int kTurns = 1000;
  std::atomic<int64_t> arrived_ = 0, round_ = 0;
};

struct StepSizes {
  int64_t t, d, e, n, w, r;
};

void check_operands(const MambaStep& op, const StepSizes& sizes) {
  const char* const name = "mamba_step";
  const auto [t, d, e, n, w, r] = sizes;
  const DType type = op.layers[0].in_proj.dtype;
  const auto state = [&](const char* operand, const View& view, int64_t rows, int64_t columns) {
    if (!view && op.rows->slots() == 0) return;
    expect_rank(name, operand, view, 3);
    expect(name, operand, view, DType::f32, {view.rows(), rows, columns});
    if (view.rows() < op.rows->slots())
      fail("{}: {} is {}, expected {} slots or more", name, operand, view.shape(),
           op.rows->slots());
  };
  check(!op.x == !!op.table, "{}: expected either x or a table", name);
  check(!op.y == !!op.head, "{}: expected either y or a head", name);
  check(type == DType::f32 || type == DType::bf16, "{}: matrices are {}, expected f32 or bf16",
        name, name_of(type));
  expect_if(name, "x", op.x, DType::f32, {t, d});
  if (op.table) {
    expect(name, "table", op.table, type, {op.table.rows(), d});
    expect(name, "ids", op.ids, DType::i32, {t});
  }
  expect_if(name, "y", op.y, DType::f32, {t, d});
  if (op.head) {
    expect(name, "head", op.head, type, {op.head.rows(), d});
    expect(name, "logits", op.logits, DType::f32, {t, op.head.rows()});
  }
  expect(name, "norm_f", op.norm_f, DType::f32, {d});
  for (const MambaStep::Layer& layer : op.layers) {
    expect(name, "norm", layer.norm, DType::f32, {d});
    expect(name, "in_proj", layer.in_proj, type, {2 * e, d});
    expect_if(name, "in_proj_bias", layer.in_proj_bias, DType::f32, {2 * e});
    expect(name, "conv_weight", layer.conv_weight, DType::f32, {e, w});
    expect_if(name, "conv_bias", layer.conv_bias, DType::f32, {e});
    expect(name, "x_proj", layer.x_proj, type, {r + 2 * n, e});
    expect(name, "dt_proj", layer.dt_proj, type, {e, r});
    expect(name, "dt_bias", layer.dt_bias, DType::f32, {e});
    expect(name, "A_log", layer.A_log, DType::f32, {e, n});
    expect(name, "D", layer.D, DType::f32, {e});
    expect(name, "out_proj", layer.out_proj, type, {d, e});
    expect_if(name, "out_proj_bias", layer.out_proj_bias, DType::f32, {d});
    if (w > 1) state("conv_state", layer.conv_state, w - 1, e);
    state("ssm_state", layer.ssm_state, e, n);
  }
}

}  // namespace

bool CpuBackend::try_run(const MambaStep& op) {
  const char* const name = "mamba_step";
  check(op.rows != nullptr, "{}: rows are missing", name);
  if (op.layers.empty()) return false;
  const MambaStep::Layer& model = op.layers[0];
  expect_rank(name, "norm_f", op.norm_f, 1);
  expect_rank(name, "conv_weight", model.conv_weight, 2);
  expect_rank(name, "dt_proj", model.dt_proj, 2);
  expect_rank(name, "A_log", model.A_log, 2);
  if (op.table) expect_rank(name, "table", op.table, 2);
  if (op.head) expect_rank(name, "head", op.head, 2);
  const StepSizes sizes{op.rows->total(),   op.norm_f.size[0],        model.A_log.rows(),
                        model.A_log.cols(), model.conv_weight.cols(), model.dt_proj.cols()};
  const auto [t, d, e, n, w, r] = sizes;
  const int64_t weights = e * (3 * d + 2 * r + 2 * n) * static_cast<int64_t>(op.layers.size());
  const bool far = model.in_proj.dtype == DType::bf16 && 2 * weights > kMostHalfBytes;
  if (t == 0 || t > kMostRows || w > kMostConvTaps || far) return false;
  check_operands(op, sizes);
  check(t == static_cast<int64_t>(op.rows->pieces().size()),
        "{}: {} rows in {} pieces, expected one each", name, t, op.rows->pieces().size());

  const int64_t terms = t * e * (3 * d + 2 * r + 3 * n);  // of a layer
  const int64_t threads =
      std::clamp<int64_t>(std::min<int64_t>(terms / kTermsOfThread, e / kUnit), 1, threads_);
  // Rows that threads share; then what each has to itself.
  const auto tensor = [&](std::initializer_list<int64_t> shape) {
    return Tensor(*this, DType::f32, shape);
  };
  const Tensor x = tensor({t, d}), xz = tensor({t, 2 * e}), convolved = tensor({t, e}),
               dbc = tensor({t, r + 2 * n}), y = tensor({t, e}), normed = tensor({threads, t, d});
  const int64_t scratch_size = std::max(scan_cell_floats(e, n), (e + kUnit) * w);
  const Tensor scratch = tensor({threads, scratch_size});
  if (op.x)
    copy(op.x, x);
  else
    run(Embed{.ids = op.ids, .table = op.table, .y = x});

  const auto multiply = HWY_DYNAMIC_DISPATCH(step_product);
  Barrier barrier;
#pragma omp parallel num_threads(static_cast <int>(threads)) if (threads > 1)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const Range own = share(e, thread, team);
    const Cell cell{.first_piece = 0,
                    .end_piece = t,
                    .first_channel = own.begin,
                    .end_channel = own.end,
                    .piece_group = 0,
                    .channel_group = thread};
    const View u = normed.view().slice(thread, 1).reshape({t, d});
    float* const room = scratch.as<float>() + thread * scratch_size;
    const View dt = dbc.view().columns(0, r);
    for (const MambaStep::Layer& layer : op.layers) {
      norm_rows_of({.x = x, .weight = layer.norm, .y = u, .eps = op.eps}, 0, t);
      const StepProduct in{.a = u, .b = layer.in_proj, .c = xz, .bias = layer.in_proj_bias};
      multiply(in, own);
      multiply(in, {e + own.begin, e + own.end});
      conv1d_cell({.x = xz.view().columns(0, e),
                   .weight = layer.conv_weight,
                   .y = convolved,
                   .bias = layer.conv_bias,
                   .state = layer.conv_state,
                   .rows = op.rows},
                  cell, room);
      barrier.wait(team);
      multiply({.a = convolved, .b = layer.x_proj, .c = dbc}, share(r + 2 * n, thread, team));
      barrier.wait(team);
      multiply({.a = dt, .b = layer.dt_proj, .c = y}, own);
      selective_scan_cell({.x = convolved,
                           .dt = y,
                           .A_log = layer.A_log,
                           .B = dbc.view().columns(r, n),
                           .C = dbc.view().columns(r + n, n),
                           .D = layer.D,
                           .dt_bias = layer.dt_bias,
                           .y = y,
                           .z = xz.view().columns(e, e),
                           .state = layer.ssm_state,
                           .rows = op.rows},
                          cell, room);
      barrier.wait(team);
      multiply({.a = y, .b = layer.out_proj, .c = x, .bias = layer.out_proj_bias, .add = true},
               share(d, thread, team));
      barrier.wait(team);
    }
    norm_rows_of({.x = x, .weight = op.norm_f, .y = u, .eps = op.eps}, 0, t);
    if (op.head)
      multiply({.a = u, .b = op.head, .c = op.logits}, share(op.head.rows(), thread, team));
    if (op.y && thread == 0)
      for (int64_t i = 0; i < t; ++i) std::copy_n(u.row<float>(i), d, op.y.row<float>(i));
  }
  return true;
}

}  // namespace coil
#endif  // HWY_ONCE
