// What the CUDA files share: error checks, f32 and bf16 elements, dispatch on an activation's type,
// finding the piece of a tile.
// To be included first.
#pragma once

#ifndef FMT_USE_CONSTEXPR
#define FMT_USE_CONSTEXPR 1  // fmt 9 thinks that nvcc has none
#endif

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <string>
#include <type_traits>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/error.h"
#include "kernels/expect.h"

namespace coil::cuda {

using bf16 = __nv_bfloat16;

// How much memory the current card has left, for messages.
inline std::string free_memory() {
  size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) == cudaSuccess)
    return fmt::format("{} free of {}", binary_size(static_cast<int64_t>(free)),
                       binary_size(static_cast<int64_t>(total)));
  cudaGetLastError();
  return "how much is free is not known";
}
// A call that failed leaves its error behind, which the next check_launch() would take for one of
// its own: it is cleared. One that broke the context comes back by itself.
inline void check_call(cudaError_t status, const char* what) {
  if (status == cudaSuccess) [[likely]]
    return;
  cudaGetLastError();
  if (status == cudaErrorMemoryAllocation)  // kernels are loaded when first used
    throw OutOfMemory(fmt::format("{}: out of memory on the GPU, {}", what, free_memory()));
  fail("{}: {}", what, cudaGetErrorString(status));
}
// After each launch: a refused launch is an error of the op that made it.
inline void check_launch(const char* op) { check_call(cudaGetLastError(), op); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
template <class T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>)
    return x;
  else
    return __float2bfloat16_rn(x);
}

// Calls f with a value of the element type of an f32 or bf16 operand.
template <class F>
void with_type(const char* op, const View& view, F&& f) {
  if (view.dtype == DType::f32) return f(float{});
  if (view.dtype == DType::bf16) return f(bf16{});
  fail("{}: {}, expected f32 or bf16", op, view.shape());
}

// Checks that an operand, where it is given, lies in this GPU's memory.
inline void expect_here(const char* op, const char* operand, const View& view, Device device) {
  coil::check(!view || view.device == device, "{}: {} is not in memory of cuda:{}", op, operand,
              device.index);
}
// For expect(): the type that an activation has, which may be f32 or bf16.
inline DType activation(const View& view) {
  return view.dtype == DType::bf16 ? DType::bf16 : DType::f32;
}

// Of two kernels, the second launched with early_launch(): it is there as soon as all blocks of the
// first have said so, and does what needs nothing from it (instructions come from afar when they
// are executed for the first time) until await_previous(), which returns when the first is done.
// Before that it may read what no kernel writes that was launched since the last copy or wait, such
// as weights: unet_step.cu's tables, too, are made before the first step's ids are copied.
__device__ inline void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void await_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
inline cudaLaunchAttribute early_launch() {
  // Code compiled for older cards alone would not wait on a newer one.
  constexpr bool waits = std::max({__CUDA_ARCH_LIST__}) >= 900;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = waits ? 1 : 0;
  return attribute;
}

// A kernel that says take_turn() before it touches what another may write: its blocks are placed
// while the last ones of the kernel before are at work, which saves some microseconds between two
// short kernels. Errors are check_launch()'s, which names the op.
__device__ inline void take_turn() {
  await_previous();
  let_next_begin();
}
template <class... Parameters>
void launch_in_turn(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, int shared_bytes,
                    cudaStream_t stream, std::type_identity_t<Parameters>... arguments) {
  cudaLaunchAttribute early = early_launch();
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  (void)cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Before a launch whose shared memory, static and dynamic, may be above the 48 KB that need no
// asking.
template <class Kernel>
void allow_shared(Kernel kernel, int bytes) {
  if (bytes <= 32 << 10) return;
  check_call(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "shared memory");
}

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The piece that tile i belongs to: the last p with first[p] <= i. first (pieces) ascending.
__device__ inline int piece_of(const int32_t* first, int pieces, int32_t i) {
  int low = 0, high = pieces - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first[middle] <= i)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

}  // namespace coil::cuda
