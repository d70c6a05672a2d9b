// The gated MLP of a block (Dauphin et al. 2017), behind its mixer:
//   a|b = in(u);   out = out(a sigmoid(b)).
#pragma once

#include "kernels/ops.h"
#include "model/config.h"
#include "model/params.h"

namespace coil {

struct MlpWeights {  // f = config.mlp d; empty where that is 0
  Tensor in;         // (2f, d)
  Tensor out;        // (d, f)
};

struct MlpSaved {  // what backward needs
  Tensor u;        // (t, d)
  Tensor ab;       // (t, 2f)
  Tensor y;        // (t, f)
};

std::vector<Param> declare(const Config& config, MlpWeights& weights, const std::string& prefix);

// u (t,d) → (t,d). saved: null for inference.
Tensor forward(Backend& backend, const Config& config, const MlpWeights& weights, Tensor u,
               MlpSaved* saved);
// dy (t,d) → du (t,d); adds to grad.
Tensor backward(Backend& backend, const Config& config, const MlpWeights& weights,
                const MlpSaved& saved, View dy, MlpWeights& grad);

}  // namespace coil
