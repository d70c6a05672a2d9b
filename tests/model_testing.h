// Small random models and comparisons that the tests of model/ share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <span>
#include <string>
#include <vector>

#include "model/head.h"
#include "tests/test_device.h"

namespace coil {

inline Config small_config(bool falcon) {
  Config config;
  config.vocab = 11;
  config.d = 24;
  config.e = 40;
  config.n = 5;
  config.w = 3;
  config.dt_rank = 3;
  config.layers.resize(2);
  config.model_type = falcon ? "falcon_mamba" : "mamba";
  config.mixer_norms = falcon;
  config.bias = !falcon;
  config.tie = !falcon;
  return config;
}

// Layers of these mixers in turn.
inline Config mixed_config(const std::string& mixers, int64_t layers) {
  Config config = small_config(false);
  config.model_type = "coil";
  config.layers = parse_mixers(mixers, layers);
  config.s4d_states = 7;
  return config;
}

// A U-Net of three stages: pooling 4 then 2, other widths and mixers inside, MLPs.
inline Config unet_config(const std::string& mixers, const std::string& pool = "4,2") {
  Config config = small_config(false);
  config.model_type = "coil";
  config.s4d_states = 7;
  config.mlp = 1;
  config.tie = false;
  add_stages(config, pool, pool.find(',') == pool.npos ? "20" : "20,36", mixers);
  return config;
}

inline Config classifier_config(Pooling pooling) {
  Config config = small_config(false);
  config.objective = Objective::classify;
  config.pooling = pooling;
  config.labels = {"a", "b", "c"};
  return config;
}

// D = 1, zero biases and unit norms would hide mistakes, and so would the small dt of a new model:
// its state hardly changes.
inline Model random_model(Backend& backend, const Config& config, uint64_t seed) {
  Model model = make_model(backend, config, seed);
  Philox random(seed, 1, 1);
  for (const Param& param : declare(model)) {
    const double scale = param.info.init == Init::embedding ? 1 : 0.2;
    const double mean = param.info.init == Init::dt_bias ? 3 : 0;
    std::vector<float> values = values_of(backend, *param.tensor);
    for (float& value : values) value += static_cast<float>(mean + scale * random.normal());
    View host = param.tensor->view();  // same shape, other memory
    host.data = values.data();
    host.device = Device{};
    backend.copy(host, *param.tensor);
    backend.sync();
  }
  return model;
}

// On a CPU. Other values than a new model's where those would hide mistakes (see random_model), but
// for the matrices, which at these widths would only amplify rounding.
inline Model lively_model(Backend& backend, const Config& config, uint64_t seed) {
  Model model = make_model(backend, config, seed);
  Philox random(seed, 1, 1);
  for (const Param& param : declare(model)) {
    if (param.info.matrix && param.info.init != Init::embedding) continue;
    const double scale = param.info.init == Init::embedding ? 1 : 0.2;
    const double mean = param.info.init == Init::dt_bias ? 3 : 0;
    for (float& value : param.tensor->span<float>())
      value += static_cast<float>(mean + scale * random.normal());
  }
  return model;
}

inline std::vector<int32_t> random_ids(int64_t length, int64_t vocab, uint64_t seed) {
  Philox random(seed, 2, 0);
  std::vector<int32_t> ids(static_cast<size_t>(length));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab)));
  return ids;
}

inline View ids_view(std::vector<int32_t>& ids) {
  return host_view(ids.data(), DType::i32, {static_cast<int64_t>(ids.size())});
}

inline Tensor random_tensor(Backend& backend, std::initializer_list<int64_t> shape, uint64_t seed) {
  Tensor tensor(backend, DType::f32, shape);
  Philox random(seed, 3, 0);
  std::vector<float> values(tensor.count());
  for (float& value : values) value = static_cast<float>(random.normal());
  backend.copy(host_view(values.data(), DType::f32, shape), tensor);
  backend.sync();
  return tensor;
}

inline double largest_difference(std::span<const float> a, std::span<const float> b) {
  EXPECT_EQ(a.size(), b.size());
  double most = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(a[i]) - b[i]);
    if (!(difference <= most)) most = difference;  // keeps NaN
  }
  return most;
}

inline double relative_difference(std::span<const float> a, std::span<const float> b) {
  EXPECT_EQ(a.size(), b.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    norm += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(difference / norm);
}

// Of a model on a CPU: along its own gradient g, each tensor's loss must rise by |g| per unit; and
// single entries by theirs.
template <class Loss>
void expect_slopes(Model& model, Model& grad, const Loss& mean_loss) {
  const std::vector<Param> weights = declare(model), gradients = declare(grad);
  const auto difference = [&](std::span<float> w, const std::vector<float>& direction,
                              double step) {
    const std::vector<float> before(w.begin(), w.end());
    const auto at = [&](double h) {
      for (size_t i = 0; i < w.size(); ++i) w[i] = static_cast<float>(before[i] + h * direction[i]);
      return mean_loss();
    };
    const auto central = [&](double h) { return (at(h) - at(-h)) / (2 * h); };
    const double slope =
        (4 * central(step / 2) - central(step)) / 3;  // Richardson: error of step^4
    std::copy(before.begin(), before.end(), w.begin());
    return slope;
  };
  for (size_t p = 0; p < weights.size(); ++p) {
    const std::span<float> w = weights[p].tensor->span<float>(),
                           g = gradients[p].tensor->span<float>();
    double norm = 0;
    for (float value : g) norm += static_cast<double>(value) * value;
    norm = std::sqrt(norm);
    ASSERT_GT(norm, 2e-4) << weights[p].info.name;
    std::vector<float> direction(g.size());
    for (size_t i = 0; i < g.size(); ++i) direction[i] = static_cast<float>(g[i] / norm);
    EXPECT_NEAR(difference(w, direction, 1e-2), norm, 0.01 * norm + 1e-5) << weights[p].info.name;

    const auto i = static_cast<size_t>(std::max_element(g.begin(), g.end()) - g.begin());
    std::vector<float> unit(g.size(), 0.0f);
    unit[i] = 1;
    EXPECT_NEAR(difference(w, unit, 1e-2), g[i], 0.01 * std::fabs(g[i]) + 1e-5)
        << weights[p].info.name << " at " << i;
  }
}

inline bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size_bytes()) == 0;
}

}  // namespace coil
