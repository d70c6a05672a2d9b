// Stands for the CUDA backend in a build without it.
#include "kernels/error.h"
#include "kernels/ops.h"

namespace coil {

std::unique_ptr<Backend> make_cuda_backend(int index, int64_t /* limit */) {
  throw Error(fmt::format("cuda:{}: this coil was built without CUDA", index),
              "use --device cpu, or build with -DCOIL_CUDA=ON where nvcc is");
}

int cuda_devices() { return 0; }

}  // namespace coil
