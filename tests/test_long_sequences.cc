// A million steps: convolution and scan against recurrences in double, in f32 and, on a GPU, bf16;
// and a GPU against the CPU. What must not happen is an error that grows with the length.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "kernels/error.h"
#include "kernels/ops.h"
#include "tests/gradcheck.h"
#include "tests/reference.h"
#include "tests/test_device.h"

namespace coil {
namespace {

constexpr int64_t kSteps = 1 << 20, kStretch = 10'000;

class LongSequences : public testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    COIL_NEEDS_TEST_DEVICE();
    backend = make_test_backend();
  }
  // Uniform, of deviation `scale`; rounded to activation type on every device alike.
  std::vector<float> values(int64_t count, float scale, bool rounded = true) {
    std::vector<float> host(count);
    std::uniform_real_distribution<float> draw(-1.7320508f * scale, 1.7320508f * scale);
    for (float& value : host) value = draw(random);
    if (GetParam() == DType::f32 || !rounded) return host;
    const Tensor half(*cpu, DType::bf16, {count});
    cpu->copy(host_view(host.data(), DType::f32, {count}), half);
    return values_of(*cpu, half);
  }
  static Tensor put(Backend& on, DType dtype, std::initializer_list<int64_t> shape,
                    std::vector<float>& host) {
    Tensor tensor(on, dtype, shape);
    on.copy(host_view(host.data(), DType::f32, shape), tensor);
    on.sync();
    return tensor;
  }
  // |found - expected| / |expected| over these rows of one channel.
  template <class T>
  static double error(const std::vector<float>& found, const std::vector<T>& expected,
                      int64_t channels, int64_t channel, int64_t begin, int64_t end) {
    double difference = 0, norm = 0;
    for (int64_t i = begin * channels + channel; i < end * channels; i += channels) {
      const double d = static_cast<double>(found[i]) - expected[i];
      difference += d * d;
      norm += static_cast<double>(expected[i]) * expected[i];
    }
    return std::sqrt(difference / norm);
  }
  DType type(const Backend& on) const { return on.activations(GetParam()); }
  bool half() const { return GetParam() == DType::bf16; }

  std::unique_ptr<Backend> cpu = make_cpu_backend(), backend;
  std::mt19937 random{17};
};
#ifdef COIL_TEST_CUDA
INSTANTIATE_TEST_SUITE_P(Types, LongSequences, testing::Values(DType::f32, DType::bf16),
                         [](const auto& info) { return name_of(info.param); });
#else
INSTANTIATE_TEST_SUITE_P(Types, LongSequences, testing::Values(DType::f32),
                         [](const auto& info) { return name_of(info.param); });
#endif

// Channels that forget within 10, 100, 1,000 and 10,000 steps: delta of a new model and its floor.
// A power of two good to 2^-22 gives a state that remembers 1 / delta steps an error of as many
// times that, if all err to one side.
TEST_P(LongSequences, ScanOfAMillionSteps) {
  const int64_t e = 4, n = 16;
  const double deltas[] = {1e-1, 1e-2, 1e-3, 1e-4};
  std::vector<float> x = values(kSteps * e, 1), dt = values(kSteps * e, 0.5f),
                     B = values(kSteps * n, 1), C = values(kSteps * n, 1),
                     D = values(e, 0.1f, false), A_log, dt_bias;
  for (int64_t i = 0; i < e * n; ++i) A_log.push_back(std::log(static_cast<float>(1 + i % n)));
  for (const double delta : deltas)
    dt_bias.push_back(static_cast<float>(std::log(std::expm1(delta))));
  const auto run = [&](Backend& on, int64_t t) {
    const Rows rows(on, whole_pieces({t}));
    const DType act = type(on);
    const Tensor y(on, act, {t, e});
    on.run(SelectiveScan{.x = put(on, act, {t, e}, x),
                         .dt = put(on, act, {t, e}, dt),
                         .A_log = put(on, DType::f32, {e, n}, A_log),
                         .B = put(on, act, {t, n}, B),
                         .C = put(on, act, {t, n}, C),
                         .D = put(on, DType::f32, {e}, D),
                         .dt_bias = put(on, DType::f32, {e}, dt_bias),
                         .y = y,
                         .rows = &rows});
    return values_of(on, y);
  };
  const std::vector<float> found = run(*backend, kSteps), early = run(*backend, kStretch);
  const std::vector<float> twin = run(*cpu, kSteps);
  std::vector<double> expected(kSteps * e), h(e * n);
  for (int64_t t = 0; t < kSteps; ++t)
    for (int64_t c = 0; c < e; ++c) {
      const double input = x[t * e + c];
      const double delta = reference::softplus(static_cast<double>(dt[t * e + c]) + dt_bias[c]);
      double y = D[c] * input;
      for (int64_t i = 0; i < n; ++i) {
        double& state = h[c * n + i];
        const double A = -std::exp(static_cast<double>(A_log[c * n + i]));
        state = std::exp(delta * A) * state + delta * input * B[t * n + i];
        y += C[t * n + i] * state;
      }
      expected[t * e + c] = y;
    }
  for (int64_t c = 0; c < e; ++c) {
    const double whole = error(found, expected, e, c, 0, kSteps);
    const double first = error(found, expected, e, c, 0, kStretch);
    const double alone = error(early, expected, e, c, 0, kStretch);
    const double last = error(found, expected, e, c, kSteps - kStretch, kSteps);
    const double apart = error(found, twin, e, c, 0, kSteps);
    fmt::print(
        "[ long     ] delta {}: relative difference {:.1e}; first {} steps {:.1e}, alone {:.1e}, "
        "last {:.1e}; from the CPU {:.1e}\n",
        deltas[c], whole, kStretch, first, alone, last, apart);
    const double bound = half() ? 1e-2 : 1e-6 + 0x1p-22 / deltas[c];
    EXPECT_LE(whole, bound) << c;
    EXPECT_LE(last, bound) << c;
    EXPECT_LE(apart, half() ? bound : 2 * bound) << c;
    // The first steps know less than 1 / delta before them: not yet all of their error.
    EXPECT_LE(last, 3 * std::max(first, alone) + 1e-7) << c;
  }
}

TEST_P(LongSequences, ConvolutionOfAMillionSteps) {
  const int64_t c = 4, w = 4;
  std::vector<float> x = values(kSteps * c, 1), weight = values(c * w, 0.5f, false),
                     bias = values(c, 1, false);
  const auto run = [&](Backend& on) {
    const Rows rows(on, whole_pieces({kSteps}));
    const Tensor y(on, type(on), {kSteps, c});
    on.run(Conv1d{.x = put(on, type(on), {kSteps, c}, x),
                  .weight = put(on, DType::f32, {c, w}, weight),
                  .y = y,
                  .bias = put(on, DType::f32, {c}, bias),
                  .rows = &rows});
    return values_of(on, y);
  };
  const std::vector<float> found = run(*backend), twin = run(*cpu);
  std::vector<double> expected(kSteps * c);
  for (int64_t t = 0; t < kSteps; ++t)
    for (int64_t j = 0; j < c; ++j) {
      double sum = bias[j];
      for (int64_t k = std::max<int64_t>(0, w - 1 - t); k < w; ++k)
        sum += static_cast<double>(weight[j * w + k]) * x[(t - w + 1 + k) * c + j];
      expected[t * c + j] = reference::silu(sum);
    }
  for (int64_t j = 0; j < c; ++j) {
    EXPECT_LE(error(found, expected, c, j, 0, kSteps), half() ? 1e-2 : 1e-6) << j;
    EXPECT_LE(error(found, expected, c, j, kSteps - kStretch, kSteps), half() ? 1e-2 : 1e-6) << j;
    EXPECT_LE(error(found, twin, c, j, 0, kSteps), half() ? 1e-2 : 1e-6) << j;
  }
}

}  // namespace
}  // namespace coil
