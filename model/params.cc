// Initial values of the parameters and the random numbers they come from.
//   Initialisation: Gu and Dao 2023, section 3.6, and mamba_ssm's mixer_seq_simple.py, which
//   Hugging Face's MambaPreTrainedModel repeats. Random numbers: Salmon, Moraes, Dror and Shaw
//   2011, Philox 4x32-10.
#include "model/params.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "kernels/error.h"
#include "kernels/ops.h"
#include "kernels/philox.h"
#include "model/config.h"

namespace coil {
namespace {

// FNV-1a: gives every tensor its own stream.
uint32_t stream_of(const std::string& name) {
  uint32_t hash = 2166136261u;
  for (unsigned char c : name) hash = (hash ^ c) * 16777619u;
  return hash;
}

int64_t count_of(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (int64_t size : shape) count *= size;
  return count;
}

// The imaginary part of eigenvalue m of HiPPO-LegS's normal matrix of 2 `pairs` states. Of its skew
// part S = (sqrt(2j+1) sqrt(2k+1) / 2 above the diagonal, less that below), S x = i w x gives, with
// sums q_j of what lies above less what lies below j, q_j / q_{j-1} = -exp(-2i atan(2w / (2j+1))),
// and from the first q to the last a change of sign: the angles add up to (m + 1/2) pi.
double legs_frequency(int64_t m, int64_t pairs) {
  const double wanted = (static_cast<double>(m) + 0.5) * std::numbers::pi;
  double low = 0, high = 4 * static_cast<double>(pairs * pairs) + 1;
  for (int step = 0; step < 60; ++step) {  // halves, down to rounding
    const double middle = (low + high) / 2;
    double angle = 0;
    for (int64_t j = 0; j < 2 * pairs; ++j)
      angle += std::atan(2 * middle / (2 * static_cast<double>(j) + 1));
    (angle < wanted ? low : high) = middle;
  }
  return (low + high) / 2;
}

double s4d_frequency(S4dInit init, int64_t i, int64_t pairs) {
  const double both = 2 * static_cast<double>(pairs), at = static_cast<double>(i);
  switch (init) {
    case S4dInit::lin:
      return std::numbers::pi * at;
    case S4dInit::inv:
      return both / std::numbers::pi * (both / (2 * at + 1) - 1);
    case S4dInit::legs:
      return legs_frequency(i, pairs);
  }
  return 0;
}

// x with softplus(x) = dt.
double inverse_softplus(double dt) { return dt + std::log(-std::expm1(-dt)); }

}  // namespace

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text;
  for (int64_t size : shape) text += fmt::format("{}{}", text.empty() ? "" : ", ", size);
  return "(" + text + ")";
}

void allocate(Backend& backend, const Param& param, DType dtype) {
  *param.tensor = Tensor(backend, dtype, std::span<const int64_t>(param.info.shape));
}

std::vector<float> initial_values(const ParamInfo& info, const Config& config, uint64_t seed) {
  const int64_t count = count_of(info.shape);
  std::vector<float> values(static_cast<size_t>(count));
  Philox random(seed, stream_of(info.name), 0);
  auto uniform_within = [&](double bound) {
    for (float& value : values) value = static_cast<float>((2 * random.uniform() - 1) * bound);
  };
  const double fan_in =
      info.shape.empty() || count == 0 ? 1 : static_cast<double>(count / info.shape[0]);
  switch (info.init) {
    case Init::zeros:
      break;
    case Init::ones:
      std::fill(values.begin(), values.end(), 1.0f);
      break;
    case Init::linear:
      uniform_within(1 / std::sqrt(fan_in));
      break;
    case Init::residual_out:
      uniform_within(1 / std::sqrt(fan_in * static_cast<double>(config.layers.size())));
      break;
    case Init::embedding: {
      // The sum over a U-Net's stages is of size 1 from the start, and the last step must show in
      // it. A tied head would make logits of that size out of nothing.
      const double size = config.inner.empty() || config.tie ? 0.02 : 1;
      for (float& value : values) value = static_cast<float>(size * random.normal());
      break;
    }
    case Init::A_log: {
      const int64_t n = info.shape.back();
      for (int64_t i = 0; i < count; ++i)
        values[static_cast<size_t>(i)] =
            static_cast<float>(std::log(static_cast<double>(i % n + 1)));
      break;
    }
    case Init::dt_weight:
      uniform_within(1 / std::sqrt(static_cast<double>(info.shape.back())));
      break;
    case Init::normal:
    case Init::s4d_C:
      for (float& value : values)
        value =
            static_cast<float>(random.normal() * (info.init == Init::normal ? 1 : std::sqrt(0.5)));
      break;
    case Init::s4d_A_real:
      std::fill(values.begin(), values.end(), std::log(0.5f));
      break;
    case Init::s4d_A_imag: {
      const int64_t n = info.shape.back();
      for (int64_t i = 0; i < count; ++i)
        values[static_cast<size_t>(i)] =
            i < n ? static_cast<float>(s4d_frequency(config.s4d_init, i, n))
                  : values[static_cast<size_t>(i - n)];
      break;
    }
    case Init::log_dt: {
      const double low = std::log(static_cast<double>(config.dt_min));
      const double high = std::log(static_cast<double>(config.dt_max));
      for (float& value : values) value = static_cast<float>(low + random.uniform() * (high - low));
      break;
    }
    case Init::dt_bias: {
      const double low = std::log(static_cast<double>(config.dt_min));
      const double high = std::log(static_cast<double>(config.dt_max));
      for (float& value : values) {
        const double dt = std::exp(low + random.uniform() * (high - low));
        value = static_cast<float>(
            inverse_softplus(std::max(dt, static_cast<double>(config.dt_floor))));
      }
      break;
    }
  }
  return values;
}

Philox::Philox(uint64_t seed, uint32_t stream, uint64_t step)
    : key_{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
      counter_{0, stream, static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32)},
      block_{} {}

uint32_t Philox::next() {
  if (used_ == 4) {
    philox4x32(counter_, key_, block_);
    ++counter_[0];
    used_ = 0;
  }
  return block_[used_++];
}

uint64_t Philox::next64() {
  const uint64_t high = next();
  return high << 32 | next();
}

double Philox::uniform() { return static_cast<double>(next64() >> 11) * 0x1p-53; }

double Philox::normal() {
  const double radius = std::sqrt(-2 * std::log(1 - uniform()));  // 1 - u is in (0, 1]
  return radius * std::cos(2 * std::numbers::pi * uniform());
}

uint64_t Philox::below(uint64_t bound) {
  COIL_ASSERT(bound > 0);
  const uint64_t rejected =
      (0 - bound) % bound;  // 2^64 mod bound: the values that would favour small results
  uint64_t value = next64();
  while (value < rejected) value = next64();
  return value % bound;
}

}  // namespace coil
