// Gradients of the norm (norm.cu).
//   dx = rstd * (dy * weight) - r * rstd^3 * mean(dy * weight * r) + dresidual;
//   dweight += sum_t dy * r * rstd
//
// Bytes: each operand once, 16 an element with bf16 activations, a residual stream in f32 and dx
// written in both types; memory is the limit. dweight costs nothing more while rows stay in
// registers, since a team adds up the rows it takes.
#include <algorithm>

#include "kernels/cuda/norm.cuh"
#include "kernels/cuda/sum_rows.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kBlocks = 4;  // of a multiprocessor, for partial sums

// dx and dx_act may be dy or dresidual: each element is read before it is written, in one thread.
template <class X, class Y, class Dx>
struct Backward {
  const X* x;
  const float* weight;  // null: ones
  const float* rstd;
  const Y* dy;
  const Dx* dresidual;  // null: none
  Dx* dx;
  Y* dx_act;       // null: not asked for
  float* partial;  // dweight (blocks, d) or, where rows are not held, (teams, d); null: not asked
                   // for
  int64_t rows, d, x_stride, dy_stride, dresidual_stride, dx_stride, dx_act_stride;
  int lanes;
};

// As forward; each team takes every so many rows.
template <class X, class Y, class Dx, int kWidth, int kHeld>
__global__ void __launch_bounds__(kNormThreads) norm_backward_kernel(const Backward<X, Y, Dx> op) {
  take_turn();
  const int lane = threadIdx.x % op.lanes, team = threadIdx.x / op.lanes;
  const int teams = kNormThreads / op.lanes;
  const int64_t first = static_cast<int64_t>(lane) * kWidth, step = op.lanes * kWidth;
  Values<kWidth> dweight[kHeld > 0 ? kHeld : 1] = {};
  for (int64_t block = blockIdx.x; block * teams < op.rows; block += gridDim.x) {
    const int64_t row = block * teams + team;
    const bool valid = row < op.rows;
    const X* const x = op.x + row * op.x_stride;
    const Y* const dy = op.dy + row * op.dy_stride;
    const float rstd = valid ? op.rstd[row] : 0.f;
    float dot = 0;
    const auto above = [&](int64_t i, Values<kWidth>& up) {
      if (op.dresidual)
        up.load(op.dresidual + row * op.dresidual_stride + i);
      else
        up = {};
    };
    // dy becomes dy * weight.
    const auto weigh = [&](int64_t i, const Values<kWidth>& r, Values<kWidth>& g) {
      if (op.weight) {
        Values<kWidth> weight;
        weight.load(op.weight + i);
        for (int k = 0; k < kWidth; ++k) g.at[k] *= weight.at[k];
      }
      for (int k = 0; k < kWidth; ++k) dot = fmaf(g.at[k], r.at[k], dot);
    };
    const auto back = [&] {
      return sum_of_team(dot, op.lanes) * rstd * rstd * rstd / static_cast<float>(op.d);
    };
    const auto write = [&](int64_t i, float part, const Values<kWidth>& r, Values<kWidth>& g,
                           const Values<kWidth>& up) {
      for (int k = 0; k < kWidth; ++k)
        g.at[k] = fmaf(-r.at[k], part, fmaf(g.at[k], rstd, up.at[k]));
      g.store(op.dx + row * op.dx_stride + i);
      if (op.dx_act) g.store(op.dx_act + row * op.dx_act_stride + i);
    };
    if constexpr (kHeld > 0) {
      Values<kWidth> r[kHeld], g[kHeld], up[kHeld];
#pragma unroll
      for (int h = 0; h < kHeld; ++h)
        if (valid && first + h * step < op.d) {
          r[h].load(x + first + h * step);
          g[h].load(dy + first + h * step);
          above(first + h * step, up[h]);  // asked for with the others, long before its use
        }
#pragma unroll
      for (int h = 0; h < kHeld; ++h)
        if (valid && first + h * step < op.d) {
          for (int k = 0; k < kWidth; ++k)
            dweight[h].at[k] = fmaf(g[h].at[k], r[h].at[k] * rstd, dweight[h].at[k]);
          weigh(first + h * step, r[h], g[h]);
        }
      const float part = back();
#pragma unroll
      for (int h = 0; h < kHeld; ++h)
        if (valid && first + h * step < op.d) write(first + h * step, part, r[h], g[h], up[h]);
    } else {
      Values<kWidth> r, g, up;
      float* const partial = op.partial ? op.partial + (blockIdx.x * teams + team) * op.d : nullptr;
      for (int64_t i = first; i < op.d && (valid || block == blockIdx.x); i += step) {
        if (valid) r.load(x + i), g.load(dy + i);
        if (partial)
          for (int k = 0; k < kWidth; ++k)
            partial[i + k] = (block == blockIdx.x ? 0 : partial[i + k]) +
                             (valid ? g.at[k] * (r.at[k] * rstd) : 0);
        if (valid) weigh(i, r, g);
      }
      const float part = back();
      for (int64_t i = first; valid && i < op.d; i += step) {
        r.load(x + i);
        g.load(dy + i);
        above(i, up);
        weigh(i, r, g);
        write(i, part, r, g, up);
      }
    }
  }
  if constexpr (kHeld > 0) {
    if (!op.partial) return;
    // The teams of the block in order, one word of all lanes after another.
    __shared__ float sums[kNormThreads * kWidth];
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      __syncthreads();
      for (int k = 0; k < kWidth; ++k) sums[team * step + first + k] = dweight[h].at[k];
      __syncthreads();
      for (int64_t i = threadIdx.x; i < step; i += kNormThreads) {
        if (h * step + i >= op.d) continue;
        float sum = 0;
        for (int k = 0; k < teams; ++k) sum += sums[k * step + i];
        op.partial[blockIdx.x * op.d + h * step + i] = sum;
      }
    }
  }
}

}  // namespace

void CudaBackend::run(const NormBackward& op) {
  const char* const name = "norm backward";
  expect_rank(name, "x", op.x, 2);
  expect_rank(name, "dy", op.dy, 2);
  expect_rank(name, "dx", op.dx, 2);
  const int64_t t = op.x.rows(), d = op.x.cols();
  const DType act = activation(op.dy), stream = activation(op.dx);
  expect(name, "x", op.x, activation(op.x), {t, d});
  expect_if(name, "weight", op.weight, DType::f32, {d});
  expect(name, "rstd", op.rstd, DType::f32, {t});
  expect(name, "dy", op.dy, act, {t, d});
  expect_if(name, "dresidual", op.dresidual, stream, {t, d});
  expect(name, "dx", op.dx, stream, {t, d});
  expect_if(name, "dweight", op.dweight, DType::f32, {d});
  expect_if(name, "dx_act", op.dx_act, act, {t, d});
  check(op.dx.data != op.dy.data || act == stream, "{}: dx is dy, of another type", name);
  bool wide = d % kWide == 0;
  for (const auto& [operand, view] : {std::pair{"x", op.x},
                                      {"weight", op.weight},
                                      {"rstd", op.rstd},
                                      {"dy", op.dy},
                                      {"dresidual", op.dresidual},
                                      {"dx", op.dx},
                                      {"dweight", op.dweight},
                                      {"dx_act", op.dx_act}}) {
    expect_here(name, operand, view, device());
    wide = wide && (view.rank < 2 || aligned(view, kWide));
  }
  wide = wide && aligned(op.weight, kWide);
  if (t * d == 0) return;
  const Team team = team_for(wide, d);
  const int64_t teams = kNormThreads / team.lanes;
  const int64_t blocks = std::min<int64_t>(div_up(t, teams), kBlocks * processors_);
  const int64_t partials = team.held > 0 ? blocks : blocks * teams;
  Tensor partial;
  if (op.dweight) partial = Tensor(*this, DType::f32, {partials, d});
  const auto run = [&](auto x, auto dy, auto dx) {
    using X = decltype(x);
    using Y = decltype(dy);
    using Dx = decltype(dx);
    const Backward<X, Y, Dx> backward{.x = op.x.as<X>(),
                                      .weight = op.weight.as<float>(),
                                      .rstd = op.rstd.as<float>(),
                                      .dy = op.dy.as<Y>(),
                                      .dresidual = op.dresidual.as<Dx>(),
                                      .dx = op.dx.as<Dx>(),
                                      .dx_act = op.dx_act.as<Y>(),
                                      .partial = partial.as<float>(),
                                      .rows = t,
                                      .d = d,
                                      .x_stride = op.x.stride[0],
                                      .dy_stride = op.dy.stride[0],
                                      .dresidual_stride = op.dresidual.stride[0],
                                      .dx_stride = op.dx.stride[0],
                                      .dx_act_stride = op.dx_act.stride[0],
                                      .lanes = team.lanes};
    with_words(wide, team.held, [&](auto width, auto held) {
      launch_in_turn(norm_backward_kernel<X, Y, Dx, width(), held()>, static_cast<unsigned>(blocks),
                     kNormThreads, 0, stream_, backward);
    });
  };
  with_type(name, op.x, [&](auto x) {
    with_type(name, op.dy,
              [&](auto dy) { with_type(name, op.dx, [&](auto dx) { run(x, dy, dx); }); });
  });
  check_launch(name);
  if (partial) add_partials(name, partial.as<float>(), partials, op.dweight, stream_);
}

}  // namespace coil
