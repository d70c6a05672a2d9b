// S4D's mixer (Gu, Gupta, Goel and Ré 2022), as in S4's and SaShiMi's blocks. A mixer is a file,
// not a class: weights, forward, backward.
//   y = gelu(s4d_scan(u, A, C, dt, D));   a|b = output_linear(y);   out = a sigmoid(b).
// Tensor names: those of state-spaces/s4 (models/s4/s4d.py).
#pragma once

#include "kernels/ops.h"
#include "model/config.h"
#include "model/params.h"

namespace coil {

struct S4dWeights {
  Tensor log_dt;              // (d)
  Tensor C;                   // (d, n, 2): real and imaginary part; n is config.s4d_states
  Tensor log_A_real, A_imag;  // (d, n)
  Tensor D;                   // (d)
  Tensor output_linear;       // (2d, d, 1)
  Tensor output_bias;         // (2d)
};

struct S4dState {
  Tensor ssm;  // (s, d, n, 2) f32
};

struct S4dSaved {      // what backward needs; activations of one layer
  Tensor u;            // (t, d) input of the scan
  Tensor before_gelu;  // (t, d)
  Tensor y;            // (t, d) after GELU
  Tensor ab;           // (t, 2d)
  Tensor checkpoints;  // (s4d_checkpoints, d, n, 2)
};

std::vector<Param> declare(const Config& config, S4dWeights& weights, const std::string& prefix);

// As those of mamba1.h.
Tensor forward(Backend& backend, const Config& config, const S4dWeights& weights, Tensor u,
               const Rows& rows, S4dState* state, S4dSaved* saved, bool whole = true);
Tensor backward(Backend& backend, const Config& config, const S4dWeights& weights,
                const S4dSaved& saved, const Rows& rows, View dy, const S4dState* initial,
                S4dState* dstate, S4dWeights& grad);

}  // namespace coil
