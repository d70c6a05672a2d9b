// RMS norm with the residual addition in front of it, forward and backward; sums over rows.
//   r = x + residual;  y = r * rstd * weight,  rstd = 1 / sqrt(mean(r^2) + eps)
//   dx = rstd * (dy * weight) - r * rstd^3 * mean(dy * weight * r) + dresidual;
//   dweight += sum_t dy * r * rstd;  sum_rows: out += sum_t x
// Zhang and Sennrich 2019, "Root Mean Square Layer Normalization". A row belongs to one warp or, if
// it is short, to a part of one, and stays in registers between its sum and its scaling up to 1024
// columns; longer rows are read a second time, mostly from L1 and L2.
//
// Bytes: each operand once. With bf16 activations and a residual stream in f32 that is 12 an
// element forward and 14 backward; memory is the limit. dweight costs backward nothing more while
// rows stay in registers, since a warp adds up the rows it takes; otherwise dy and x are read once
// more, as in sum_rows.
#include <algorithm>

#include "kernels/cuda/device.cuh"

namespace coil {
namespace {

using cuda::activation;
using cuda::bf16;
using cuda::div_up;
using cuda::expect_here;
using cuda::from_float;
using cuda::to_float;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWide = 4;      // elements moved at once: 16 bytes of f32, 8 of bf16
constexpr int kMostHeld = 8;  // words of a row in a lane's registers
constexpr int kBlocks = 4;    // of a multiprocessor, for partial sums

// kWidth neighbouring elements as floats.
template <int kWidth>
struct Values {
  float at[kWidth];

  template <class T>
  __device__ void load(const T* from) {
    if constexpr (kWidth == 1) {
      at[0] = to_float(*from);
    } else if constexpr (std::is_same_v<T, float>) {
      const float4 word = *reinterpret_cast<const float4*>(from);
      at[0] = word.x, at[1] = word.y, at[2] = word.z, at[3] = word.w;
    } else {
      const uint2 word = *reinterpret_cast<const uint2*>(from);
      const T* const half = reinterpret_cast<const T*>(&word);
      for (int k = 0; k < kWidth; ++k) at[k] = to_float(half[k]);
    }
  }
  template <class T>
  __device__ void store(T* to) const {
    if constexpr (kWidth == 1) {
      *to = from_float<T>(at[0]);
    } else if constexpr (std::is_same_v<T, float>) {
      *reinterpret_cast<float4*>(to) = make_float4(at[0], at[1], at[2], at[3]);
    } else {
      uint2 word;
      T* const half = reinterpret_cast<T*>(&word);
      for (int k = 0; k < kWidth; ++k) half[k] = from_float<T>(at[k]);
      *reinterpret_cast<uint2*>(to) = word;
    }
  }
};

// The same in all lanes of a group, in the same order of additions.
__device__ float sum_of_lanes(float value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

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
  int lanes;  // of a row: a power of two up to 32
};

// A row's columns go round the lanes, kWidth at a time; kHeld words of each lane stay in registers,
// 0: none. Operands may be each other, so each element is read before it is written, in one thread.
template <class X, class Y, int kWidth, int kHeld>
__global__ void __launch_bounds__(kThreads) norm_kernel(const Forward<X, Y> op) {
  const int lane = threadIdx.x % op.lanes;
  const int64_t row =
      blockIdx.x * static_cast<int64_t>(kThreads / op.lanes) + threadIdx.x / op.lanes;
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
    const float rstd =
        1 / sqrtf(sum_of_lanes(square, op.lanes) / static_cast<float>(op.d) + op.eps);
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
  float* partial;  // (blocks, d): dweight of the rows of a block; null: not asked for
  int64_t rows, d, x_stride, dy_stride, dresidual_stride, dx_stride, dx_act_stride;
  int lanes;
};

// As forward; each warp takes every so many rows. dweight only where rows are held.
template <class X, class Y, class Dx, int kWidth, int kHeld>
__global__ void __launch_bounds__(kThreads) norm_backward_kernel(const Backward<X, Y, Dx> op) {
  const int lane = threadIdx.x % op.lanes, group = threadIdx.x / op.lanes;
  const int groups = kThreads / op.lanes;
  const int64_t first = static_cast<int64_t>(lane) * kWidth, step = op.lanes * kWidth;
  Values<kWidth> dweight[kHeld > 0 ? kHeld : 1] = {};
  for (int64_t block = blockIdx.x; block * groups < op.rows; block += gridDim.x) {
    const int64_t row = block * groups + group;
    const bool valid = row < op.rows;
    const X* const x = op.x + row * op.x_stride;
    const Y* const dy = op.dy + row * op.dy_stride;
    const float rstd = valid ? op.rstd[row] : 0.f;
    float dot = 0;
    const auto read = [&](int64_t i, Values<kWidth>& r, Values<kWidth>& g) {
      r.load(x + i);
      g.load(dy + i);
    };
    // dy becomes dy * weight.
    const auto weigh = [&](int64_t i, Values<kWidth>& g) {
      if (!op.weight) return;
      Values<kWidth> weight;
      weight.load(op.weight + i);
      for (int k = 0; k < kWidth; ++k) g.at[k] *= weight.at[k];
    };
    const auto multiply = [&](const Values<kWidth>& r, const Values<kWidth>& g) {
      for (int k = 0; k < kWidth; ++k) dot = fmaf(g.at[k], r.at[k], dot);
    };
    const auto back = [&] {
      return sum_of_lanes(dot, op.lanes) * rstd * rstd * rstd / static_cast<float>(op.d);
    };
    const auto above = [&](int64_t i, Values<kWidth>& up) {
      if (op.dresidual)
        up.load(op.dresidual + row * op.dresidual_stride + i);
      else
        up = {};
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
          read(first + h * step, r[h], g[h]);
          above(first + h * step, up[h]);  // asked for with the others, long before its use
        }
#pragma unroll
      for (int h = 0; h < kHeld; ++h)
        if (valid && first + h * step < op.d) {
          for (int k = 0; k < kWidth; ++k)
            dweight[h].at[k] = fmaf(g[h].at[k], r[h].at[k] * rstd, dweight[h].at[k]);
          weigh(first + h * step, g[h]);
          multiply(r[h], g[h]);
        }
      const float part = back();
#pragma unroll
      for (int h = 0; h < kHeld; ++h)
        if (valid && first + h * step < op.d) write(first + h * step, part, r[h], g[h], up[h]);
    } else {
      Values<kWidth> r, g, up;
      for (int64_t i = first; valid && i < op.d; i += step) {
        read(i, r, g);
        weigh(i, g);
        multiply(r, g);
      }
      const float part = back();
      for (int64_t i = first; valid && i < op.d; i += step) {
        read(i, r, g);
        above(i, up);
        weigh(i, g);
        write(i, part, r, g, up);
      }
    }
  }
  if constexpr (kHeld > 0) {
    if (!op.partial) return;
    // The groups of the block in order, one word of all lanes after another.
    __shared__ float sums[kThreads * kWidth];
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      __syncthreads();
      for (int k = 0; k < kWidth; ++k) sums[group * step + first + k] = dweight[h].at[k];
      __syncthreads();
      for (int64_t i = threadIdx.x; i < step; i += kThreads) {
        if (h * step + i >= op.d) continue;
        float sum = 0;
        for (int k = 0; k < groups; ++k) sum += sums[k * step + i];
        op.partial[blockIdx.x * op.d + h * step + i] = sum;
      }
    }
  }
}

// partial(chunks, c): the sum over a chunk of rows of x or, with dy, of dy * x * rstd. Columns go
// to `lanes` threads, kWidth each, and the other threads of a block to other rows.
template <class X, class Y, int kWidth>
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const X* x, int64_t x_stride, const Y* dy, int64_t dy_stride, const float* rstd,
                    int64_t rows, int64_t c, int64_t chunk, int lanes, float* partial) {
  __shared__ float sums[kThreads * kWidth];
  const int groups = kThreads / lanes, group = threadIdx.x / lanes;
  const int first = threadIdx.x % lanes * kWidth, width = lanes * kWidth;
  const int64_t column = blockIdx.y * static_cast<int64_t>(width) + first;
  const int64_t begin = blockIdx.x * chunk, end = min(begin + chunk, rows);
  Values<kWidth> sum = {};
  if (column < c) {
#pragma unroll 4
    for (int64_t row = begin + group; row < end; row += groups) {
      Values<kWidth> value;
      value.load(x + row * x_stride + column);
      if (dy) {
        Values<kWidth> gradient;
        gradient.load(dy + row * dy_stride + column);
        const float scale = rstd[row];
        for (int k = 0; k < kWidth; ++k)
          sum.at[k] = fmaf(gradient.at[k], value.at[k] * scale, sum.at[k]);
      } else {
        for (int k = 0; k < kWidth; ++k) sum.at[k] += value.at[k];
      }
    }
  }
  for (int k = 0; k < kWidth; ++k) sums[group * width + first + k] = sum.at[k];
  __syncthreads();
  for (int i = threadIdx.x; i < width; i += kThreads) {
    const int64_t to = blockIdx.y * static_cast<int64_t>(width) + i;
    if (to >= c) continue;
    float total = 0;
    for (int k = 0; k < groups; ++k) total += sums[k * width + i];
    partial[blockIdx.x * c + to] = total;
  }
}

// out(c) += the partials (count, c), in an order that depends on their number only.
__global__ void add_partials_kernel(const float* partial, int64_t count, int64_t c, float* out) {
  __shared__ float sums[kWarps][32];
  const int64_t column = blockIdx.x * int64_t{32} + threadIdx.x % 32;
  const int slice = threadIdx.x / 32;
  float sum = 0;
  if (column < c) {
#pragma unroll 4
    for (int64_t i = slice; i < count; i += kWarps) sum += partial[i * c + column];
  }
  sums[slice][threadIdx.x % 32] = sum;
  __syncthreads();
  if (slice != 0 || column >= c) return;
  for (int k = 1; k < kWarps; ++k) sum += sums[k][threadIdx.x];
  out[column] += sum;
}

// Threads that a row of c columns is for: a power of two.
int lanes_for(int64_t c, int width) {
  int lanes = 1;
  while (lanes < 32 && lanes * width < c) lanes *= 2;
  return lanes;
}

bool aligned(const View& view) {
  if (!view) return true;
  return reinterpret_cast<uintptr_t>(view.data) % (kWide * size_of(view.dtype)) == 0 &&
         (view.rank < 2 || view.stride[0] % kWide == 0);
}

// out(c) += sum of x(t,c) or of dy * x * rstd.
template <class X, class Y>
void sum_rows(CudaBackend& backend, const View& x, const View& dy, const View& rstd, float* out) {
  const int64_t t = x.rows(), c = x.cols();
  const bool wide = c % kWide == 0 && aligned(x) && aligned(dy);
  const int width = wide ? kWide : 1, lanes = lanes_for(c, width);
  const int64_t slices = div_up(c, lanes * width);
  check(slices <= 65535, "sum_rows: {} columns, expected less than 2^21", c);
  // Each thread of a block gets several rows, and the card several blocks a multiprocessor.
  const int64_t wanted = std::max<int64_t>(1, 2 * kBlocks * backend.processors() / slices);
  const int64_t least = 4 * (kThreads / lanes);
  const int64_t chunk = std::max(least, div_up(t, wanted)), chunks = div_up(t, chunk);
  const Tensor partial(backend, DType::f32, {chunks, c});
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(slices));
  const auto run = [&](auto kernel_width) {
    sum_rows_kernel<X, Y, kernel_width()><<<grid, kThreads, 0, backend.stream()>>>(
        x.as<X>(), x.stride[0], dy.as<Y>(), dy.stride[0], rstd.as<float>(), t, c, chunk, lanes,
        partial.as<float>());
  };
  if (wide)
    run(std::integral_constant<int, kWide>{});
  else
    run(std::integral_constant<int, 1>{});
  cuda::check_launch("sum_rows");
  add_partials_kernel<<<static_cast<unsigned>(div_up(c, 32)), kThreads, 0, backend.stream()>>>(
      partial.as<float>(), chunks, c, out);
  cuda::check_launch("sum_rows");
}

// Calls f with the width of a word and the words of a row that a lane holds, as constants.
template <class F>
void with_words(bool wide, int64_t d, F&& f) {
  using Wide = std::integral_constant<int, kWide>;
  if (!wide) return f(std::integral_constant<int, 1>{}, std::integral_constant<int, 0>{});
  if (d <= 32 * kWide * 2) return f(Wide{}, std::integral_constant<int, 2>{});
  if (d <= 32 * kWide * 6) return f(Wide{}, std::integral_constant<int, 6>{});
  if (d <= 32 * kWide * kMostHeld) return f(Wide{}, std::integral_constant<int, kMostHeld>{});
  f(Wide{}, std::integral_constant<int, 0>{});
}

}  // namespace

void CudaBackend::run(const Norm& op) {
  expect_rank("norm", "x", op.x, 2);
  expect_rank("norm", "y", op.y, 2);
  const int64_t t = op.x.rows(), d = op.x.cols();
  expect("norm", "x", op.x, activation(op.x), {t, d});
  expect_if("norm", "residual", op.residual, DType::f32, {t, d});
  expect_if("norm", "weight", op.weight, DType::f32, {d});
  expect("norm", "y", op.y, activation(op.y), {t, d});
  expect_if("norm", "residual_out", op.residual_out, DType::f32, {t, d});
  expect_if("norm", "rstd", op.rstd, DType::f32, {t});
  check(!op.residual || op.residual_out, "norm: residual_out is missing, expected {} with residual",
        op.residual.shape());
  check(op.y.data != op.x.data || op.y.dtype == op.x.dtype, "norm: y is x, of another type");
  check(op.residual_out.data != op.x.data || op.x.dtype == DType::f32,
        "norm: residual_out is x, of another type");
  expect_here("norm", "x", op.x, device());
  expect_here("norm", "residual", op.residual, device());
  expect_here("norm", "weight", op.weight, device());
  expect_here("norm", "y", op.y, device());
  expect_here("norm", "residual_out", op.residual_out, device());
  expect_here("norm", "rstd", op.rstd, device());
  if (t * d == 0) return;
  const bool wide = d % kWide == 0 && aligned(op.x) && aligned(op.residual) && aligned(op.weight) &&
                    aligned(op.y) && aligned(op.residual_out);
  cuda::with_type("norm", op.x, [&](auto x) {
    cuda::with_type("norm", op.y, [&](auto y) {
      using X = decltype(x);
      using Y = decltype(y);
      Forward<X, Y> forward{.x = op.x.as<X>(),
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
                            .lanes = lanes_for(d, wide ? kWide : 1)};
      const auto blocks = static_cast<unsigned>(div_up(t, kThreads / forward.lanes));
      with_words(wide, d, [&](auto width, auto held) {
        norm_kernel<X, Y, width(), held()><<<blocks, kThreads, 0, stream_>>>(forward);
      });
    });
  });
  cuda::check_launch("norm");
}

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
  for (const auto& [operand, view] : {std::pair{"x", op.x},
                                      {"weight", op.weight},
                                      {"rstd", op.rstd},
                                      {"dy", op.dy},
                                      {"dresidual", op.dresidual},
                                      {"dx", op.dx},
                                      {"dweight", op.dweight},
                                      {"dx_act", op.dx_act}})
    expect_here(name, operand, view, device());
  if (t * d == 0) return;
  const bool wide = d % kWide == 0 && aligned(op.x) && aligned(op.weight) && aligned(op.dy) &&
                    aligned(op.dresidual) && aligned(op.dx) && aligned(op.dx_act);
  const bool held = wide && d <= 32 * kWide * kMostHeld;
  const int lanes = lanes_for(d, wide ? kWide : 1);
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>(div_up(t, kThreads / lanes), kBlocks * processors_));
  const auto run = [&](auto x, auto dy, auto dx) {
    using X = decltype(x);
    using Y = decltype(dy);
    using Dx = decltype(dx);
    Tensor partial;
    if (op.dweight && held) partial = Tensor(*this, DType::f32, {blocks, d});
    // Before dx, which may be dy.
    if (op.dweight && !held) sum_rows<X, Y>(*this, op.x, op.dy, op.rstd, op.dweight.as<float>());
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
                                      .lanes = lanes};
    with_words(wide, d, [&](auto width, auto words) {
      norm_backward_kernel<X, Y, Dx, width(), words()><<<blocks, kThreads, 0, stream_>>>(backward);
    });
    cuda::check_launch(name);
    if (!partial) return;
    add_partials_kernel<<<static_cast<unsigned>(div_up(d, 32)), kThreads, 0, stream_>>>(
        partial.as<float>(), blocks, d, op.dweight.as<float>());
    cuda::check_launch(name);
  };
  cuda::with_type(name, op.x, [&](auto x) {
    cuda::with_type(name, op.dy, [&](auto dy) {
      cuda::with_type(name, op.dx, [&](auto dx) { run(x, dy, dx); });
    });
  });
}

void CudaBackend::run(const SumRows& op) {
  expect_rank("sum_rows", "x", op.x, 2);
  const int64_t t = op.x.rows(), c = op.x.cols();
  expect("sum_rows", "x", op.x, activation(op.x), {t, c});
  expect("sum_rows", "out", op.out, DType::f32, {c});
  expect_here("sum_rows", "x", op.x, device());
  expect_here("sum_rows", "out", op.out, device());
  if (t * c == 0) return;
  cuda::with_type("sum_rows", op.x, [&](auto x) {
    sum_rows<decltype(x), decltype(x)>(*this, op.x, View{}, View{}, op.out.as<float>());
  });
}

}  // namespace coil
