// Partial sums of many blocks, added in a fixed order: what stands for float atomics here.
#pragma once

#include "kernels/cuda/device.cuh"

namespace coil::cuda {

// out (n) or (m,n) += the sum over the first dimension of partial (count, elements of out), in an
// order that depends on `count` only.
void add_partials(const char* op, const float* partial, int64_t count, const View& out,
                  cudaStream_t stream);

}  // namespace coil::cuda
