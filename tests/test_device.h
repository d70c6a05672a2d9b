// The backend that a test runs on. test_cuda compiles some files of test_model once more with
// COIL_TEST_CUDA: they then run on the first GPU, and skip, saying so, where there is none.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "kernels/ops.h"

namespace coil {

#ifdef COIL_TEST_CUDA
inline std::unique_ptr<Backend> make_test_backend(int64_t limit = kNoLimit) {
  return make_cuda_backend(0, limit);
}
// How far apart two ways to the same answer may be. A GPU's powers of two are good to 2^-22.
constexpr double kSameAnswer = 2e-5;
#define COIL_NEEDS_TEST_DEVICE() \
  if (cuda_devices() == 0) GTEST_SKIP() << "no GPU"
#else
inline std::unique_ptr<Backend> make_test_backend(int64_t limit = kNoLimit) {
  return make_cpu_backend(0, limit);
}
constexpr double kSameAnswer = 1e-5;
#define COIL_NEEDS_TEST_DEVICE()
#endif

// The numbers of a view of any type, in host memory, row-major.
template <class T = float>
std::vector<T> values_of(Backend& backend, const View& view) {
  std::vector<T> values(view.count());
  View host = view;
  host.data = values.data();
  host.dtype = std::is_same_v<T, float> ? DType::f32 : DType::f64;
  host.device = Device{};
  int64_t stride = 1;
  for (int i = host.rank - 1; i >= 0; --i) {
    host.stride[i] = stride;
    stride *= host.size[i];
  }
  if (values.empty()) return values;
  backend.copy(view, host);
  backend.sync();
  return values;
}

}  // namespace coil
