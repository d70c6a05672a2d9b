// Gated linear unit: y = a sigmoid(b) of each row a|b; da = dy sigmoid(b), db = da a (1 -
// sigmoid(b)).
//
// Bytes: each operand once. Memory is the limit.
#include "kernels/cuda/fast_math.cuh"
#include "kernels/cuda/words.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kThreads = 256;

__device__ float sigmoid_of(float x) { return fast_reciprocal(1.f + fast_exp(-x)); }

// A thread takes kWidth neighbouring columns of a row.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    glu_kernel(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t count, int64_t width) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const int64_t words = width / kWidth, row = index / words, column = index % words * kWidth;
  const T* const from = x + row * x_stride + column;
  Words<T, kWidth> a, b;
  a.load(from);
  b.load(from + width);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) a.set(i, a.at(i) * sigmoid_of(b.at(i)));
  a.store(y + row * y_stride + column);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    glu_backward_kernel(const T* x, int64_t x_stride, const T* dy, int64_t dy_stride, T* dx,
                        int64_t dx_stride, int64_t count, int64_t width) {
  const int64_t index = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (index >= count) return;
  const int64_t words = width / kWidth, row = index / words, column = index % words * kWidth;
  const T* const from = x + row * x_stride + column;
  Words<T, kWidth> a, b, g;
  a.load(from);
  b.load(from + width);
  g.load(dy + row * dy_stride + column);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const float gate = sigmoid_of(b.at(i)), da = g.at(i) * gate;
    b.set(i, da * a.at(i) * (1.f - gate));
    a.set(i, da);
  }
  T* const to = dx + row * dx_stride + column;
  a.store(to);
  b.store(to + width);
}

// Whether halves of rows are whole words of 16 bytes.
template <class T>
constexpr int kWide = 16 / static_cast<int>(sizeof(T));
template <class T>
bool in_words(const View& view, int64_t width) {
  return width % kWide<T> == 0 && aligned(view, kWide<T>);
}

}  // namespace

void CudaBackend::run(const Glu& op) {
  expect_rank("glu", "y", op.y, 2);
  const int64_t t = op.y.rows(), width = op.y.cols();
  const DType act = activation(op.y);
  expect("glu", "y", op.y, act, {t, width});
  expect("glu", "x", op.x, act, {t, 2 * width});
  expect_here("glu", "y", op.y, device());
  expect_here("glu", "x", op.x, device());
  if (t * width == 0) return;
  cuda::with_type("glu", op.y, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto wide) {
      const int64_t count = t * (width / wide());
      glu_kernel<T, wide()>
          <<<static_cast<unsigned>(div_up(count, kThreads)), kThreads, 0, stream_>>>(
              op.x.as<T>(), op.x.stride[0], op.y.as<T>(), op.y.stride[0], count, width);
    };
    if (in_words<T>(op.x, width) && in_words<T>(op.y, width))
      run(std::integral_constant<int, kWide<T>>{});
    else
      run(std::integral_constant<int, 1>{});
  });
  cuda::check_launch("glu");
}

void CudaBackend::run(const GluBackward& op) {
  const char* const name = "glu backward";
  expect_rank(name, "dy", op.dy, 2);
  const int64_t t = op.dy.rows(), width = op.dy.cols();
  const DType act = activation(op.dy);
  expect(name, "dy", op.dy, act, {t, width});
  expect(name, "x", op.x, act, {t, 2 * width});
  expect(name, "dx", op.dx, act, {t, 2 * width});
  for (const auto& [operand, view] : {std::pair{"dy", &op.dy}, {"x", &op.x}, {"dx", &op.dx}})
    expect_here(name, operand, *view, device());
  if (t * width == 0) return;
  cuda::with_type(name, op.dy, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto wide) {
      const int64_t count = t * (width / wide());
      glu_backward_kernel<T, wide()>
          <<<static_cast<unsigned>(div_up(count, kThreads)), kThreads, 0, stream_>>>(
              op.x.as<T>(), op.x.stride[0], op.dy.as<T>(), op.dy.stride[0], op.dx.as<T>(),
              op.dx.stride[0], count, width);
    };
    if (in_words<T>(op.x, width) && in_words<T>(op.dy, width) && in_words<T>(op.dx, width))
      run(std::integral_constant<int, kWide<T>>{});
    else
      run(std::integral_constant<int, 1>{});
  });
  cuda::check_launch(name);
}

}  // namespace coil
