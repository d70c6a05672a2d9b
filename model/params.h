// declare(config, weights, prefix): one row per tensor, once. It allocates, initialises, loads with
// shape checks, saves, counts and drives AdamW. Weights, gradients and moments are objects of one
// type, so that walking two of them in step is walking two lists of Param.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/tensor.h"

namespace coil {

struct Config;

enum class Init : uint8_t {
  zeros,
  ones,
  linear,        // U(±1/sqrt(fan_in)): torch's nn.Linear and nn.Conv1d
  embedding,     // N(0, 0.02); N(0, 1) of a U-Net with a head of its own
  A_log,         // log(1…n) in every row: S4D-real
  dt_weight,     // U(±rank^-1/2)
  dt_bias,       // softplus^-1 of dt, log-uniform in dt_min…dt_max, at least dt_floor
  residual_out,  // linear / sqrt(layers): the residual stream keeps its size
  normal,        // N(0, 1)
  log_dt,        // log-uniform in dt_min…dt_max
  s4d_C,         // N(0, 1/2): complex numbers of variance 1
  s4d_A_real,    // log(1/2)
  s4d_A_imag     // by config.s4d_init, in every row
};

struct ParamInfo {
  std::string name;            // as Hugging Face writes it: "backbone.layers.0.mixer.A_log"
  std::vector<int64_t> shape;  // as stored in the file
  Init init = Init::zeros;
  bool decay =
      false;  // AdamW's weight decay: tensors of two or more dimensions but A_log and conv1d.weight
  bool matrix = false;  // may be bf16
};
struct Param {
  ParamInfo info;
  Tensor* tensor = nullptr;
};

std::string shape_text(const std::vector<int64_t>& shape);  // "(12, 512)", for messages

// Allocated with the shape of its row; values not set.
void allocate(Backend& backend, const Param& param, DType dtype = DType::f32);
// The values of a new tensor. They depend on the seed and the tensor's name alone, so that a model
// with one more tensor has the others unchanged.
std::vector<float> initial_values(const ParamInfo& info, const Config& config, uint64_t seed);

// Philox (kernels/philox.h) keyed by (seed, stream, step): the only random numbers of the program.
// 2^34 words each.
class Philox {
 public:
  Philox(uint64_t seed, uint32_t stream, uint64_t step);
  uint32_t next();
  double uniform();                // [0, 1)
  double normal();                 // Box-Muller
  uint64_t below(uint64_t bound);  // 0 … bound-1, without bias

 private:
  uint64_t next64();
  uint32_t key_[2], counter_[4], block_[4];
  int used_ = 4;
};

}  // namespace coil
