// Functions of one instruction of the special unit, a relative error of 2^-22 or so. The intrinsics
// __expf and __fdividef take several more to treat denormals, which are 0 here.
#pragma once

#include "kernels/cuda/device.cuh"

namespace coil::cuda {

constexpr float kLog2OfE = 1.44269504088896341f;

__device__ inline float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ inline float fast_exp(float x) { return fast_exp2(kLog2OfE * x); }

__device__ inline float fast_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

}  // namespace coil::cuda
