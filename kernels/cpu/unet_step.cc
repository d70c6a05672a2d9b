// A step of a U-Net of S4D stages, or of a stack of them, for a few sequences: decoding. As in
// mamba_step.cc one team of threads walks the network, each with channels of its own. What a stage
// inside puts out is for later steps, so the stages that have a step walk side by side, block by
// block:
//   down of each, the outer first |
//   per block  the norm (every thread for itself) and the scan of its channels |
//              output_linear and gate of its columns |
//              the norm, mlp_in and gate of its columns | mlp_out of its columns |
//   up of its columns, to `next`; the head of its columns
// with a barrier at each bar. Nothing depends on how many sequences or threads there are.
//
// Limit: bytes. audio-base (d 64, 128, 256, pooling 4, 4, 8 blocks each, f32) reads 1.05 MB of
// matrices a sample in each stage and 0.7 MB of tables and states, 24 MB in all, which is most of
// the third-level cache: one core reads 8 MB over and over at 100 GB/s and 24 MB at 60. In one
// thread 9,500 samples/s at best; at 8,600, 107 us in here: 20 us of products in the outer stage,
// 26 and 38 in those inside (28 GB/s), 16 of scans. In two 13,300 at best; at 11,500, 75 us: 14,
// 12, 22, 10, and 13 at 34 barriers. bf16 matrices: 14,800 and 17,800. By the ops: 620 to 750.
// (coil generate, one stream; 2 cores of an AMD EPYC, Zen 4, that others use too, 2026-11-26)
#include <omp.h>

#include <algorithm>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/unet_step.h"
#include "kernels/expect.h"

namespace coil {
namespace {

constexpr const char* kName = "unet_step";
// In one thread, audio-base: 64 sequences take half the time that the ops take. No more are tested.
constexpr int64_t kMostSequences = 64;
constexpr int64_t kTermsOfState = 6;  // what a step of a state takes, in multiplications

int64_t whole_lines(int64_t floats) { return (floats + kUnit - 1) / kUnit * kUnit; }

void check_operands(const UnetStep& op) {
  expect_rank(kName, "norm_f", op.stages[0].norm_f, 1);
  expect_rank(kName, "head", op.head, 2);
  const int64_t t = op.rows->total(), d = op.stages[0].norm_f.size[0];
  const DType type = op.head.dtype;
  check(type == DType::f32 || type == DType::bf16, "{}: matrices are {}, expected f32 or bf16",
        kName, name_of(type));
  expect_rank(kName, "table", op.table, 2);
  expect(kName, "table", op.table, type, {op.table.rows(), d});
  expect(kName, "ids", op.ids, DType::i32, {t});
  expect(kName, "head", op.head, type, {op.head.rows(), d});
  expect(kName, "logits", op.logits, DType::f32, {t, op.head.rows()});
  const auto slots = [&](const char* operand, const View& view) {
    if (view.rows() < op.rows->slots())
      fail("{}: {} is {}, expected {} slots or more", kName, operand, view.shape(),
           op.rows->slots());
  };
  int64_t outer = 0;
  for (const UnetStep::Stage& stage : op.stages) {
    expect_rank(kName, "norm_f", stage.norm_f, 1);
    const int64_t d = stage.norm_f.size[0];
    expect(kName, "norm_f", stage.norm_f, DType::f32, {d});
    for (const UnetStep::Block& block : stage.blocks) {
      expect_rank(kName, "block table", block.table, 3);
      const int64_t n = block.table.size[2];
      expect(kName, "norm", block.norm, DType::f32, {d});
      expect(kName, "block table", block.table, DType::f32, {d, 4, n});
      check(block.table.contiguous(), "{}: a block's table is not contiguous", kName);
      expect(kName, "D", block.D, DType::f32, {d});
      expect_rank(kName, "state", block.state, 4);
      expect_pairs(kName, "state", block.state, {block.state.rows(), d, n, 2});
      slots("state", block.state);
      expect(kName, "output_linear", block.output_linear, type, {2 * d, d});
      expect(kName, "output_bias", block.output_bias, DType::f32, {2 * d});
      if (!block.mlp_norm) continue;
      expect_rank(kName, "mlp_out", block.mlp_out, 2);
      const int64_t f = block.mlp_out.cols();
      expect(kName, "mlp_norm", block.mlp_norm, DType::f32, {d});
      expect(kName, "mlp_in", block.mlp_in, type, {2 * f, d});
      expect(kName, "mlp_out", block.mlp_out, type, {d, f});
    }
    if (outer > 0) {
      const int64_t p = stage.p;
      check(p >= 2, "{}: p is {}, expected 2 or more", kName, p);
      expect(kName, "down", stage.down, type, {d, p * outer});
      expect(kName, "down_bias", stage.down_bias, DType::f32, {d});
      expect(kName, "up", stage.up, type, {p * outer, d});
      expect(kName, "up_bias", stage.up_bias, DType::f32, {p * outer});
      expect_rank(kName, "rest", stage.rest, 3);
      expect(kName, "rest", stage.rest, DType::f32, {stage.rest.rows(), p - 1, outer});
      slots("rest", stage.rest);
      expect_rank(kName, "next", stage.next, 2);
      expect(kName, "next", stage.next, DType::f32, {stage.next.rows(), p * outer});
      slots("next", stage.next);
    }
    outer = d;
  }
}

// Which sequences have a step in which stage; the stages that have one.
std::vector<UnetWalk> plan(const UnetStep& op) {
  std::vector<UnetWalk> walks;
  std::vector<int64_t> steps;  // each member's, of the stage
  for (size_t s = 0; s < op.stages.size(); ++s) {
    const UnetStep::Stage& stage = op.stages[s];
    UnetWalk walk{.op = &stage,
                  .inner = s + 1 < op.stages.size() ? &op.stages[s + 1] : nullptr,
                  .d = stage.norm_f.size[0]};
    for (const UnetStep::Block& block : stage.blocks)
      if (block.mlp_norm) walk.f = std::max(walk.f, block.mlp_out.cols());
    if (s == 0) {
      for (const Piece& piece : op.rows->pieces()) {
        walk.members.push_back({.slot = piece.to, .begins = piece.from < 0});
        steps.push_back(piece.position);
      }
    } else {
      UnetWalk& outer = walks.back();
      std::vector<int64_t> coarse;
      for (int64_t i = 0; i < outer.rows(); ++i) {
        UnetMember& member = outer.members[i];
        const int64_t step = steps[i] / stage.p;
        member.part = steps[i] % stage.p;
        member.heard = step > 0;
        if (member.part < stage.p - 1) continue;
        member.coarse = walk.rows();
        walk.members.push_back({.slot = member.slot, .begins = step == 0});
        coarse.push_back(step);
      }
      steps = std::move(coarse);
    }
    if (walk.members.empty()) break;
    walks.push_back(std::move(walk));
  }
  return walks;
}

// How many threads the network is worth. Of its steps, on the mean: a team is of one size for all,
// since a thread that is left out of some sleeps, and is late for the next (5,000 samples/s of
// audio-base instead of 13,000 where the outer stage alone ran in one thread).
int64_t worth(const UnetStep& op) {
  int64_t terms = 0, period = 1, widest = 0;
  for (const UnetStep::Stage& stage : op.stages) {
    period *= stage.p;
    const int64_t d = stage.norm_f.size[0];
    widest = std::max(widest, d);
    if (stage.blocks.empty()) continue;
    const UnetStep::Block& block = stage.blocks[0];
    const int64_t f = block.mlp_norm ? block.mlp_out.cols() : 0;
    terms += d * (2 * d + 3 * f + kTermsOfState * block.table.size[2]) / period;
  }
  return std::clamp<int64_t>(op.rows->total() * terms / kTermsOfThread, 1,
                             (widest + kUnit - 1) / kUnit);
}

// Where a stage holds another: the step's x goes on to it or waits for the rest of its coarse step,
// and gets its part of what the last one put out. For columns of a range.
void pass(const UnetWalk& stage, const UnetWalk* inside, Range own) {
  if (!stage.inner) return;
  const int64_t p = stage.inner->p, d = stage.d, count = own.end - own.begin;
  if (count == 0) return;
  for (int64_t i = 0; i < stage.rows(); ++i) {
    const UnetMember& member = stage.members[i];
    float* const x = stage.x.row<float>(i) + own.begin;
    float* const rest = stage.inner->rest.row<float>(member.slot) + own.begin;
    float* const next = stage.inner->next.row<float>(member.slot) + own.begin;
    const int64_t stride = stage.inner->rest.stride[1];
    if (member.begins) {
      for (int64_t k = 1; k < p - 1; ++k) std::fill_n(rest + k * stride, count, 0.f);
      for (int64_t k = 0; k < p; ++k) std::fill_n(next + k * d, count, 0.f);
    }
    if (member.coarse >= 0) {
      float* const steps = inside->steps.row<float>(member.coarse) + own.begin;
      for (int64_t k = 0; k < p - 1; ++k) {
        std::copy_n(rest + k * stride, count, steps + k * d);
        std::fill_n(rest + k * stride, count, 0.f);
      }
      std::copy_n(x, count, steps + (p - 1) * d);
    } else {
      std::copy_n(x, count, rest + member.part * stride);
    }
    if (!member.heard) continue;
    for (int64_t j = 0; j < count; ++j) x[j] += next[member.part * d + j];
  }
}

// A thread of the team. What it alone writes are its columns; every step ends at a barrier.
struct Worker {
  const std::vector<UnetWalk>& walks;
  float eps;
  float* room;  // for the norm of every row of a stage
  Barrier& barrier;
  int64_t thread, team;

  Range own(int64_t count) const { return share(count, thread, team); }
  const UnetWalk* inside(size_t s) const { return s + 1 < walks.size() ? &walks[s + 1] : nullptr; }
  View norm(const UnetWalk& stage, const View& weight) const {
    const View u = host_view(room, DType::f32, {stage.rows(), stage.d});
    norm_rows_of({.x = stage.x, .weight = weight, .y = u, .eps = eps}, 0, stage.rows());
    return u;
  }
  // to = glu(b u + bias), or added to it.
  void gated(const UnetWalk& stage, const View& u, const View& b, const View& bias, const View& to,
             bool add) const {
    const int64_t width = b.rows() / 2;
    const Range columns = own(width);
    const StepProduct product{.a = u, .b = b, .c = stage.ab.columns(0, 2 * width), .bias = bias};
    step_product(product, columns);
    step_product(product, {width + columns.begin, width + columns.end});
    unet_gate(product.c, to, add, columns);
  }
  // f(stage, its block i) for every stage that has one.
  template <class F>
  void each(size_t i, const F& f) const {
    for (const UnetWalk& stage : walks)
      if (i < stage.op->blocks.size()) f(stage, stage.op->blocks[i]);
    barrier.wait(team);
  }

  void down() const {
    for (size_t s = 1; s < walks.size(); ++s) {
      const UnetWalk& stage = walks[s];
      const UnetStep::Stage& op = *stage.op;
      const Range columns = own(stage.d);
      step_product({.a = stage.steps, .b = op.down, .c = stage.x, .bias = op.down_bias}, columns);
      pass(stage, inside(s), columns);
      barrier.wait(team);
    }
  }
  void blocks(size_t i, bool mlp) const {
    each(i, [&](const UnetWalk& stage, const UnetStep::Block& op) {
      unet_scan(op, stage, norm(stage, op.norm), own(stage.d));
    });
    each(i, [&](const UnetWalk& stage, const UnetStep::Block& op) {
      gated(stage, stage.y.columns(0, stage.d), op.output_linear, op.output_bias, stage.x, true);
    });
    if (!mlp) return;
    each(i, [&](const UnetWalk& stage, const UnetStep::Block& op) {
      if (op.mlp_norm) gated(stage, norm(stage, op.mlp_norm), op.mlp_in, {}, stage.y, false);
    });
    each(i, [&](const UnetWalk& stage, const UnetStep::Block& op) {
      if (!op.mlp_norm) return;
      const View y = stage.y.columns(0, op.mlp_out.cols());
      step_product({.a = y, .b = op.mlp_out, .c = stage.x, .add = true}, own(stage.d));
    });
  }
  void up(const UnetWalk& stage) const {
    const UnetStep::Stage& op = *stage.op;
    const Range columns = own(op.up.rows());
    step_product({.a = norm(stage, op.norm_f), .b = op.up, .c = stage.lifted, .bias = op.up_bias},
                 columns);
    for (int64_t i = 0; i < stage.rows(); ++i) {
      const float* const lifted = stage.lifted.row<float>(i);
      std::copy(lifted + columns.begin, lifted + columns.end,
                op.next.row<float>(stage.members[i].slot) + columns.begin);
    }
  }
  void run(const UnetStep& op) const {
    down();
    size_t most = 0;
    bool mlp = false;
    for (const UnetWalk& stage : walks) {
      most = std::max(most, stage.op->blocks.size());
      mlp = mlp || stage.f > 0;
    }
    for (size_t i = 0; i < most; ++i) blocks(i, mlp);
    for (size_t s = 1; s < walks.size(); ++s) up(walks[s]);
    step_product({.a = norm(walks[0], walks[0].op->norm_f), .b = op.head, .c = op.logits},
                 own(op.head.rows()));
  }
};

// The arrays of every stage, in memory from `from` on; how many floats they take. Null: only that.
int64_t place(std::vector<UnetWalk>& walks, float* from) {
  int64_t floats = 0;
  const auto next = [&](View& view, int64_t rows, int64_t columns) {
    const int64_t stride = whole_lines(columns);
    if (from) view = host_view(from + floats, DType::f32, {rows, stride}).columns(0, columns);
    floats += rows * stride;
  };
  for (UnetWalk& walk : walks) {
    const int64_t m = walk.rows(), width = std::max(walk.d, walk.f);
    next(walk.x, m, walk.d);
    next(walk.y, m, width);
    next(walk.ab, m, 2 * width);
    if (&walk == &walks[0]) continue;
    next(walk.steps, m, walk.op->down.cols());
    next(walk.lifted, m, walk.op->down.cols());
  }
  return floats;
}

}  // namespace

bool CpuBackend::try_run(const UnetStep& op) {
  check(op.rows != nullptr, "{}: rows are missing", kName);
  const int64_t t = op.rows->total();
  const auto goes_on = [](const Piece& piece) {
    return piece.length == 1 && piece.to >= 0 &&
           (piece.from == piece.to || (piece.from < 0 && piece.position == 0));
  };
  if (op.stages.empty() || t == 0 || t > kMostSequences ||
      !std::ranges::all_of(op.rows->pieces(), goes_on))
    return false;
  check_operands(op);

  std::vector<UnetWalk> walks = plan(op);
  const int64_t threads = std::min<int64_t>(threads_, worth(op));
  int64_t widest = 0;
  for (const UnetWalk& walk : walks) widest = std::max(widest, walk.rows() * whole_lines(walk.d));
  const int64_t floats = place(walks, nullptr);
  const Tensor memory(*this, DType::f32, {floats + threads * widest});
  place(walks, memory.as<float>());

  run(Embed{.ids = op.ids, .table = op.table, .y = walks[0].x});
  pass(walks[0], walks.size() > 1 ? &walks[1] : nullptr, {0, walks[0].d});
  Barrier barrier;
#pragma omp parallel num_threads(static_cast <int>(threads)) if (threads > 1)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    Worker{.walks = walks,
           .eps = op.eps,
           .room = memory.as<float>() + floats + thread * widest,
           .barrier = barrier,
           .thread = thread,
           .team = team}
        .run(op);
  }
  return true;
}

}  // namespace coil
