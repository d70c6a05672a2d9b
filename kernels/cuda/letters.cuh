// Letters between the warps of a block: four states of 32 channels and a barrier that says that
// they are there.
#pragma once

#include "kernels/cuda/scan.cuh"

namespace coil::cuda {

constexpr int kLetterStates = 4;

// Mail of one warp, four states of 32 channels; by hand, since a barrier that the compiler knows of
// would have it read B and C once more. Waits for the end of a round; reads; writes and ends it.
__device__ inline void wait_for_letter(uint64_t* mail, uint32_t round) {
#ifdef __CUDA_ARCH__
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(mail));
  uint32_t there = 0;
  while (!there)
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n\t"
#else
        "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n\t"
#endif
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(there)
        : "r"(at), "r"(round));
#endif
}
__device__ inline void read_letter(const float4& letter, float (&to)[kLetterStates]) {
#ifdef __CUDA_ARCH__
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(&letter))));
#endif
}
__device__ inline void post_letter(uint64_t* mail) {
  __syncwarp();
#ifdef __CUDA_ARCH__
  if (threadIdx.x % 32 == 0)
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(
                     static_cast<uint32_t>(__cvta_generic_to_shared(mail)))
                 : "memory");
#endif
}
__device__ inline void empty_mail(uint64_t* mail) {
#ifdef __CUDA_ARCH__
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(mail)))
               : "memory");
#endif
}

}  // namespace coil::cuda
