// A million steps: convolution and scan, forward and backward, against recurrences in double, in
// f32 and, on a GPU, bf16; and a GPU against the CPU. What must not happen is an error that grows
// with the length.
#include <gtest/gtest.h>

#include <algorithm>
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

// Backward beside the same recurrences walked from the end. What a step's gradients are made of is
// kept for a block of steps at a time, from the state before each block.
TEST_P(LongSequences, ScanBackwardOfAMillionSteps) {
  const int64_t e = 4, n = 16, block = 1024;
  const double deltas[] = {1e-1, 1e-2, 1e-3, 1e-4};
  std::vector<float> x = values(kSteps * e, 1), dt = values(kSteps * e, 0.5f),
                     z = values(kSteps * e, 1), dy = values(kSteps * e, 1),
                     B = values(kSteps * n, 1), C = values(kSteps * n, 1),
                     D = values(e, 0.1f, false), A_log, dt_bias;
  for (int64_t i = 0; i < e * n; ++i) A_log.push_back(std::log(static_cast<float>(1 + i % n)));
  for (const double delta : deltas)
    dt_bias.push_back(static_cast<float>(std::log(std::expm1(delta))));
  struct Gradients {
    std::vector<float> x, dt, B, C, z, A_log, D, dt_bias;
  };
  const auto run = [&](Backend& on) {
    const Rows rows(on, whole_pieces({kSteps}));
    const DType act = type(on);
    const Tensor checkpoints(on, act, {scan_checkpoints(on, rows), e, n});
    const Tensor x_there = put(on, act, {kSteps, e}, x), dt_there = put(on, act, {kSteps, e}, dt),
                 z_there = put(on, act, {kSteps, e}, z), dy_there = put(on, act, {kSteps, e}, dy),
                 B_there = put(on, act, {kSteps, n}, B), C_there = put(on, act, {kSteps, n}, C),
                 A_there = put(on, DType::f32, {e, n}, A_log),
                 D_there = put(on, DType::f32, {e}, D),
                 bias_there = put(on, DType::f32, {e}, dt_bias), y(on, act, {kSteps, e});
    on.run(SelectiveScan{.x = x_there,
                         .dt = dt_there,
                         .A_log = A_there,
                         .B = B_there,
                         .C = C_there,
                         .D = D_there,
                         .dt_bias = bias_there,
                         .y = y,
                         .z = z_there,
                         .checkpoints = checkpoints,
                         .rows = &rows});
    const Tensor dx(on, act, {kSteps, e}), ddt(on, act, {kSteps, e}), dz(on, act, {kSteps, e});
    const Tensor dB(on, act, {kSteps, n}), dC(on, act, {kSteps, n});
    const Tensor dA_log(on, DType::f32, {e, n}), dD(on, DType::f32, {e}),
        ddt_bias(on, DType::f32, {e});
    for (const Tensor* gradient : {&dA_log, &dD, &ddt_bias}) on.fill(*gradient, 0);
    on.run(SelectiveScanBackward{.x = x_there,
                                 .dt = dt_there,
                                 .A_log = A_there,
                                 .B = B_there,
                                 .C = C_there,
                                 .D = D_there,
                                 .dt_bias = bias_there,
                                 .dy = dy_there,
                                 .z = z_there,
                                 .checkpoints = checkpoints,
                                 .dx = dx,
                                 .ddt = ddt,
                                 .dB = dB,
                                 .dC = dC,
                                 .dz = dz,
                                 .dA_log = dA_log,
                                 .dD = dD,
                                 .ddt_bias = ddt_bias,
                                 .rows = &rows});
    return Gradients{values_of(on, dx), values_of(on, ddt),     values_of(on, dB),
                     values_of(on, dC), values_of(on, dz),      values_of(on, dA_log),
                     values_of(on, dD), values_of(on, ddt_bias)};
  };
  const Gradients found = run(*backend), twin = run(*cpu);

  std::vector<double> A, h(e * n, 0), before;  // before: the states before each block
  for (const float a : A_log) A.push_back(-std::exp(static_cast<double>(a)));
  const auto delta_of = [&](int64_t t, int64_t c) {
    return reference::softplus(static_cast<double>(dt[t * e + c]) + dt_bias[c]);
  };
  std::vector<double> decay(block * e * n), state((block + 1) * e * n);  // of a block's steps
  // From `h` at step `begin`; state[s] is that before step s, and h becomes that after the last.
  const auto walk = [&](int64_t begin) {
    for (int64_t s = 0; s < block; ++s)
      for (int64_t c = 0; c < e; ++c) {
        const int64_t t = begin + s;
        const double delta = delta_of(t, c);
        for (int64_t i = c * n; i < (c + 1) * n; ++i) {
          state[s * e * n + i] = h[i];
          decay[s * e * n + i] = std::exp(delta * A[i]);
          h[i] = decay[s * e * n + i] * h[i] + delta * x[t * e + c] * B[t * n + i - c * n];
        }
      }
    std::copy(h.begin(), h.end(), state.begin() + block * e * n);
  };
  for (int64_t begin = 0; begin < kSteps; begin += block) {
    before.insert(before.end(), h.begin(), h.end());
    walk(begin);
  }
  std::vector<double> dx(kSteps * e), ddt(kSteps * e), dz(kSteps * e), dB(kSteps * n, 0),
      dC(kSteps * n, 0), dA_log(e * n, 0), dD(e, 0), ddt_bias(e, 0), carried(e * n, 0);
  std::vector<double> ddt_squares(e, 0), dD_squares(e, 0), dA_squares(e * n, 0);
  for (int64_t begin = kSteps - block; begin >= 0; begin -= block) {
    std::copy_n(before.begin() + begin / block * e * n, e * n, h.begin());
    walk(begin);
    for (int64_t s = block - 1; s >= 0; --s)
      for (int64_t c = 0; c < e; ++c) {
        const int64_t t = begin + s, at = t * e + c;
        const double delta = delta_of(t, c), input = x[at], gate = z[at];
        const double sigmoid = 1 / (1 + std::exp(-gate)), dpre = dy[at] * gate * sigmoid;
        double y = D[c] * input, ddelta = 0, du = 0;
        for (int64_t i = c * n; i < (c + 1) * n; ++i) {
          const int64_t j = t * n + i - c * n;
          const double old = state[s * e * n + i], now = state[(s + 1) * e * n + i];
          const double a = decay[s * e * n + i], g = carried[i] + dpre * C[j];
          y += C[j] * now;
          dC[j] += dpre * now;
          dB[j] += g * delta * input;
          du += g * B[j];
          ddelta += g * (A[i] * a * old + input * B[j]);
          const double of_A = A[i] * g * delta * a * old;
          dA_log[i] += of_A;
          dA_squares[i] += of_A * of_A;
          carried[i] = a * g;
        }
        dz[at] = dy[at] * y * sigmoid * (1 + gate * (1 - sigmoid));
        dx[at] = D[c] * dpre + delta * du;
        ddt[at] = ddelta * (1 - std::exp(-delta));  // softplus' slope is 1 - exp(-softplus)
        dD[c] += dpre * input;
        ddt_bias[c] += ddt[at];
        ddt_squares[c] += ddt[at] * ddt[at];
        dD_squares[c] += dpre * dpre * input * input;
      }
  }

  for (int64_t c = 0; c < e; ++c) {
    // Two walks, each of whose powers may err to one side.
    const double exact = 2e-6 + 0x1p-21 / deltas[c], bound = half() ? 1e-2 : exact;
    const auto expect_rows = [&](const char* name, const std::vector<float>& got,
                                 const std::vector<float>& of_cpu,
                                 const std::vector<double>& expected) {
      const double whole = error(got, expected, e, c, 0, kSteps);
      const double first = error(got, expected, e, c, 0, 10 * kStretch);
      const double last = error(got, expected, e, c, kSteps - 11 * kStretch, kSteps - kStretch);
      const double apart = error(got, of_cpu, e, c, 0, kSteps);
      fmt::print(
          "[ long     ] delta {}: {}: relative difference {:.1e}; first {} steps {:.1e}, last "
          "{:.1e}; "
          "from the CPU {:.1e}\n",
          deltas[c], name, whole, 10 * kStretch, first, last, apart);
      EXPECT_LE(whole, bound) << name << ' ' << c;
      EXPECT_LE(first, bound) << name << ' ' << c;
      EXPECT_LE(apart, half() ? bound : 2 * bound) << name << ' ' << c;
      // Walked back over a million steps, gradients err no more than after a tenth of them.
      EXPECT_LE(first, 3 * last + 1e-7) << name << ' ' << c;
    };
    expect_rows("dx", found.x, twin.x, dx);
    expect_rows("ddt", found.dt, twin.dt, ddt);
    expect_rows("dz", found.z, twin.z, dz);
    // Sums of a million terms of either sign, in f32 beside any activations: errors beside what
    // such a sum comes to. Checkpoints are of the activations' type: half() takes states before
    // every eighth step with 8 bits, and what errs is the same for eight steps.
    double worst = 0;
    const double of_sum = half() ? 2e-2 : 4 * exact;
    const auto expect_sum = [&](const char* name, double got, double expected, double squares) {
      const double off = std::abs(got - expected) / (std::abs(expected) + std::sqrt(squares));
      EXPECT_LE(off, of_sum) << name << ' ' << c << ": " << got << " instead of " << expected;
      worst = std::max(worst, off);
    };
    expect_sum("dD", found.D[c], dD[c], dD_squares[c]);
    expect_sum("ddt_bias", found.dt_bias[c], ddt_bias[c], ddt_squares[c]);
    for (int64_t i = c * n; i < (c + 1) * n; ++i)
      expect_sum("dA_log", found.A_log[i], dA_log[i], dA_squares[i]);
    fmt::print("[ long     ] delta {}: parameters {:.1e}\n", deltas[c], worst);
  }
  // Of all channels together: the ones that forget soonest weigh most.
  for (int64_t i = 0; i < n; ++i) {
    EXPECT_LE(error(found.B, dB, n, i, 0, kSteps), half() ? 1e-2 : 2e-4) << i;
    EXPECT_LE(error(found.C, dC, n, i, 0, kSteps), half() ? 1e-2 : 2e-4) << i;
    EXPECT_LE(error(found.B, dB, n, i, 0, kStretch), half() ? 1e-2 : 2e-4) << i;
    EXPECT_LE(error(found.C, dC, n, i, kSteps - kStretch, kSteps), half() ? 1e-2 : 2e-4) << i;
  }
  fmt::print("[ long     ] dB {:.1e}, dC {:.1e}\n", error(found.B, dB, n, 0, 0, kSteps),
             error(found.C, dC, n, 0, 0, kSteps));
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

TEST_P(LongSequences, ConvolutionBackwardOfAMillionSteps) {
  const int64_t c = 4, w = 4;
  std::vector<float> x = values(kSteps * c, 1), dy = values(kSteps * c, 1),
                     weight = values(c * w, 0.5f, false), bias = values(c, 1, false);
  struct Gradients {
    std::vector<float> x, weight, bias;
  };
  const auto run = [&](Backend& on) {
    const Rows rows(on, whole_pieces({kSteps}));
    const Tensor dx(on, type(on), {kSteps, c}), dweight(on, DType::f32, {c, w}),
        dbias(on, DType::f32, {c});
    on.fill(dweight, 0);
    on.fill(dbias, 0);
    on.run(Conv1dBackward{.x = put(on, type(on), {kSteps, c}, x),
                          .weight = put(on, DType::f32, {c, w}, weight),
                          .dy = put(on, type(on), {kSteps, c}, dy),
                          .bias = put(on, DType::f32, {c}, bias),
                          .dx = dx,
                          .dweight = dweight,
                          .dbias = dbias,
                          .rows = &rows});
    return Gradients{values_of(on, dx), values_of(on, dweight), values_of(on, dbias)};
  };
  const Gradients found = run(*backend), twin = run(*cpu);
  std::vector<double> dx(kSteps * c, 0), dweight(c * w, 0), dbias(c, 0);
  for (int64_t t = 0; t < kSteps; ++t)
    for (int64_t j = 0; j < c; ++j) {
      const int64_t first = std::max<int64_t>(0, w - 1 - t);
      double sum = bias[j];
      for (int64_t k = first; k < w; ++k)
        sum += static_cast<double>(weight[j * w + k]) * x[(t - w + 1 + k) * c + j];
      const double sigmoid = 1 / (1 + std::exp(-sum));
      const double dpre = dy[t * c + j] * sigmoid * (1 + sum * (1 - sigmoid));
      dbias[j] += dpre;
      for (int64_t k = first; k < w; ++k) {
        dx[(t - w + 1 + k) * c + j] += dpre * weight[j * w + k];
        dweight[j * w + k] += dpre * x[(t - w + 1 + k) * c + j];
      }
    }
  for (int64_t j = 0; j < c; ++j) {
    const double bound = half() ? 1e-2 : 1e-6;
    EXPECT_LE(error(found.x, dx, c, j, 0, kSteps), bound) << j;
    EXPECT_LE(error(found.x, dx, c, j, 0, kStretch), bound) << j;
    EXPECT_LE(error(found.x, dx, c, j, kSteps - kStretch, kSteps), bound) << j;
    EXPECT_LE(error(found.x, twin.x, c, j, 0, kSteps), bound) << j;
  }
  // A million terms of either sign come to about 1,000; what they are made of is f32 in any case.
  for (size_t i = 0; i < dweight.size(); ++i) EXPECT_NEAR(found.weight[i], dweight[i], 0.02) << i;
  for (size_t i = 0; i < dbias.size(); ++i) EXPECT_NEAR(found.bias[i], dbias[i], 0.02) << i;
}

}  // namespace
}  // namespace coil
