// declare(config, weights, f): one row per tensor, once. It allocates, initialises, loads with shape checks,
// saves, counts and drives AdamW. Weights, gradients and moments are objects of one type, so that walking
// two of them in step is walking two lists of Param.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/tensor.h"

namespace coil {

enum class Init : uint8_t { zeros, ones, linear /* U(±1/sqrt(fan_in)) */, embedding /* N(0, 0.02) */,
                            A_log /* log(1…n) */, dt_weight /* U(±rank^-1/2) */, dt_bias, residual_out };

struct ParamInfo {
  std::string name;            // as Hugging Face writes it: "backbone.layers.0.mixer.A_log"
  std::vector<int64_t> shape;  // as stored in the file
  Init init = Init::zeros;
  bool decay = false;          // AdamW's weight decay: tensors of two or more dimensions but A_log and conv1d.weight
  bool matrix = false;         // may be bf16
};
struct Param {
  ParamInfo info;
  Tensor* tensor = nullptr;
};

// Philox 4x32-10 (Salmon et al. 2011) keyed by (seed, stream, step): the only random numbers of the program.
class Philox {
 public:
  Philox(uint64_t seed, uint32_t stream, uint64_t step);
  uint32_t next();
  double uniform();               // [0, 1)
  double normal();                // Box-Muller
  uint64_t below(uint64_t bound); // 0 … bound-1, without bias

 private:
  uint32_t key_[2], counter_[4], block_[4];
  int used_ = 4;
};

}  // namespace coil
