// A step of a stack of Mamba blocks for a few sequences: decoding. The ops one by one would meet at
// the end of each (some 1 to 5 us with two threads, 25 times a step of four layers) and make their
// temporaries anew; here one team of threads walks the layers, each with channels of its own:
//   norm of the rows (every thread for itself, d is small); in_proj and conv1d of its channels;
//   | x_proj of its outputs | dt_proj and the scan of its channels | out_proj of its columns |
// with a barrier at each bar. Convolution and scan are the cells of their ops.
//
// Products are of a few rows (step_product.cc), so that a step takes the time of reading the
// weights once, in whatever cache they lie, and a sequence gets the same bits alone and beside
// others.
#include <omp.h>

#include <algorithm>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/grid.h"
#include "kernels/cpu/step_team.h"
#include "kernels/expect.h"

namespace coil {
namespace {

constexpr int64_t kMostRows = 16;  // beyond, the products of gemm.cc are faster
// Of bf16 matrices, up to which they are in a cache; beyond, skinny.cc reads them faster, row by
// row.
constexpr int64_t kMostHalfBytes = 16 << 20;

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
      step_product(in, own);
      step_product(in, {e + own.begin, e + own.end});
      conv1d_cell({.x = xz.view().columns(0, e),
                   .weight = layer.conv_weight,
                   .y = convolved,
                   .bias = layer.conv_bias,
                   .state = layer.conv_state,
                   .rows = op.rows},
                  cell, room);
      barrier.wait(team);
      step_product({.a = convolved, .b = layer.x_proj, .c = dbc}, share(r + 2 * n, thread, team));
      barrier.wait(team);
      step_product({.a = dt, .b = layer.dt_proj, .c = y}, own);
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
      step_product({.a = y, .b = layer.out_proj, .c = x, .bias = layer.out_proj_bias, .add = true},
                   share(d, thread, team));
      barrier.wait(team);
    }
    norm_rows_of({.x = x, .weight = op.norm_f, .y = u, .eps = op.eps}, 0, t);
    if (op.head)
      step_product({.a = u, .b = op.head, .c = op.logits}, share(op.head.rows(), thread, team));
    if (op.y && thread == 0)
      for (int64_t i = 0; i < t; ++i) std::copy_n(u.row<float>(i), d, op.y.row<float>(i));
  }
  return true;
}

}  // namespace coil
