// RMS norm with the residual addition in front of it.
//   r = x + residual;  y = r * rstd * weight,  rstd = 1 / sqrt(mean(r^2) + eps)
// Zhang and Sennrich 2019, "Root Mean Square Layer Normalization". Gradients: norm_backward.cu. How
// a row is held: norm.cuh.
//
// Bytes: each operand once, 12 an element with bf16 activations and a residual stream in f32;
// memory is the limit.
#include "kernels/cuda/norm.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

template <class X, class Y>
struct Forward {
  const X* x;
  const float* residual;  // null: none
  const float* weight;    // null: ones
  Y* y;
  float* residual_out;  // null: not kept
  float* rstd;          // null: not kept
  int64_t rows, d, x_stride, residual_stride, y_stride, out_stride;
  float eps;
  int lanes;  // of a team: a power of two up to kNormThreads
};

// kHeld words of each lane stay in registers, 0: none. Operands may be each other, so each element
// is read before it is written, in one thread.
template <class X, class Y, int kWidth, int kHeld>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(const Forward<X, Y> op) {
  take_turn();
  const int lane = threadIdx.x % op.lanes;
  const int64_t row =
      blockIdx.x * static_cast<int64_t>(kNormThreads / op.lanes) + threadIdx.x / op.lanes;
  const bool valid = row < op.rows;  // all lanes take part in the sum
  const int64_t first = static_cast<int64_t>(lane) * kWidth, step = op.lanes * kWidth;
  const X* const x = op.x + row * op.x_stride;
  const float* const residual = op.residual ? op.residual + row * op.residual_stride : nullptr;
  float* const out = op.residual_out ? op.residual_out + row * op.out_stride : nullptr;
  Y* const y = op.y + row * op.y_stride;
  float square = 0;
  const auto read = [&](int64_t i, Values<kWidth>& r) {
    r.load(x + i);
    if (residual) {
      Values<kWidth> more;
      more.load(residual + i);
      for (int k = 0; k < kWidth; ++k) r.at[k] += more.at[k];
    }
    for (int k = 0; k < kWidth; ++k) square = fmaf(r.at[k], r.at[k], square);
  };
  const auto write = [&](int64_t i, float rstd, Values<kWidth>& r) {
    for (int k = 0; k < kWidth; ++k) r.at[k] *= rstd;
    if (op.weight) {
      Values<kWidth> weight;
      weight.load(op.weight + i);
      for (int k = 0; k < kWidth; ++k) r.at[k] *= weight.at[k];
    }
    r.store(y + i);
  };
  const auto keep = [&] {
    const float rstd = 1 / sqrtf(sum_of_team(square, op.lanes) / static_cast<float>(op.d) + op.eps);
    if (op.rstd && valid && lane == 0) op.rstd[row] = rstd;
    return rstd;
  };
  if constexpr (kHeld > 0) {
    Values<kWidth> held[kHeld];
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
      if (valid && first + h * step < op.d) read(first + h * step, held[h]);
    const float rstd = keep();
#pragma unroll
    for (int h = 0; h < kHeld; ++h)
      if (valid && first + h * step < op.d) {
        if (out) held[h].store(out + first + h * step);
        write(first + h * step, rstd, held[h]);
      }
  } else {
    for (int64_t i = first; valid && i < op.d; i += step) {
      Values<kWidth> r;
      read(i, r);
      if (out) r.store(out + i);
    }
    const float rstd = keep();
    for (int64_t i = first; valid && i < op.d; i += step) {
      Values<kWidth> r;
      if (out)
        r.load(out + i);  // which the same thread wrote
      else
        r.load(x + i);
      write(i, rstd, r);
    }
  }
}

}  // namespace

void CudaBackend::run(const Norm& op) {
  const char* const name = "norm";
  expect_rank(name, "x", op.x, 2);
  expect_rank(name, "y", op.y, 2);
  const int64_t t = op.x.rows(), d = op.x.cols();
  expect(name, "x", op.x, activation(op.x), {t, d});
  expect_if(name, "residual", op.residual, DType::f32, {t, d});
  expect_if(name, "weight", op.weight, DType::f32, {d});
  expect(name, "y", op.y, activation(op.y), {t, d});
  expect_if(name, "residual_out", op.residual_out, DType::f32, {t, d});
  expect_if(name, "rstd", op.rstd, DType::f32, {t});
  check(!op.residual || op.residual_out, "{}: residual_out is missing, expected {} with residual",
        name, op.residual.shape());
  check(op.y.data != op.x.data || op.y.dtype == op.x.dtype, "{}: y is x, of another type", name);
  check(op.residual_out.data != op.x.data || op.x.dtype == DType::f32,
        "{}: residual_out is x, of another type", name);
  bool wide = d % kWide == 0;
  for (const auto& [operand, view] : {std::pair{"x", op.x},
                                      {"residual", op.residual},
                                      {"weight", op.weight},
                                      {"y", op.y},
                                      {"residual_out", op.residual_out},
                                      {"rstd", op.rstd}}) {
    expect_here(name, operand, view, device());
    wide = wide && (view.rank < 2 || aligned(view, kWide));
  }
  wide = wide && aligned(op.weight, kWide);
  if (t * d == 0) return;
  const Team team = team_for(wide, d);
  with_type(name, op.x, [&](auto x) {
    with_type(name, op.y, [&](auto y) {
      using X = decltype(x);
      using Y = decltype(y);
      const Forward<X, Y> forward{.x = op.x.as<X>(),
                                  .residual = op.residual.as<float>(),
                                  .weight = op.weight.as<float>(),
                                  .y = op.y.as<Y>(),
                                  .residual_out = op.residual_out.as<float>(),
                                  .rstd = op.rstd.as<float>(),
                                  .rows = t,
                                  .d = d,
                                  .x_stride = op.x.stride[0],
                                  .residual_stride = op.residual.stride[0],
                                  .y_stride = op.y.stride[0],
                                  .out_stride = op.residual_out.stride[0],
                                  .eps = op.eps,
                                  .lanes = team.lanes};
      const auto blocks = static_cast<unsigned>(div_up(t, kNormThreads / team.lanes));
      with_words(wide, team.held, [&](auto width, auto held) {
        launch_in_turn(norm_kernel<X, Y, width(), held()>, blocks, kNormThreads, 0, stream_,
                       forward);
      });
    });
  });
  check_launch(name);
}

}  // namespace coil
