// Mamba's first mixer (Gu and Dao 2023). A mixer is a file, not a class: weights, forward,
// backward.
//   x|z = in_proj(u);  x = silu(conv1d(x));  dt|B|C = x_proj(x);  y = scan(x, dt_proj(dt), A, B, C,
//   D, z) out = out_proj(y).   Tensor names: Hugging Face's and state-spaces/mamba's.
// Both ways (config.bidirectional; Caduceus: Schiff et al. 2024, Vim: Zhu et al. 2024): one in_proj
// and one out_proj, between them a second set of the rest that reads each sequence from its end,
//   out = out_proj(y + y_b).   Names of the second set: Vim's.
#pragma once

#include "kernels/ops.h"
#include "model/config.h"
#include "model/params.h"

namespace coil {

struct Mamba1Direction {  // what reads a sequence one way
  Tensor conv_weight;     // (e, 1, w)
  Tensor conv_bias;       // (e) with config.conv_bias
  Tensor x_proj;          // (r + 2n, e)
  Tensor dt_proj;         // (e, r)
  Tensor dt_bias;         // (e)
  Tensor A_log;           // (e, n)
  Tensor D;               // (e)
};
struct Mamba1Weights : Mamba1Direction {
  Tensor in_proj;        // (2e, d)
  Tensor in_proj_bias;   // (2e) with config.bias
  Tensor out_proj;       // (d, e)
  Tensor out_proj_bias;  // (d) with config.bias
  Mamba1Direction back;  // with config.bidirectional
};

struct Mamba1State {
  Tensor conv;  // (s, w-1, e) f32
  Tensor ssm;   // (s, e, n) f32
  // Where given, forward of one piece leaves here what they are before its steps every, 2 every, …
  View conv_marks, ssm_marks;  // (m, w-1, e), (m, e, n) f32
  View ssm_starts;             // or reads them here: (1+m, e, n) f32, as SelectiveScan does
  int64_t conv_every = 0, ssm_every = 0;  // the latter of marks or starts
};

struct Mamba1DirectionSaved {
  Tensor conv;                   // (t, e) after SiLU
  Tensor dbc;                    // (t, r + 2n)
  Tensor dt;                     // (t, e) before bias and softplus; backward leaves its gradient
  Tensor checkpoints;            // (scan_checkpoints, e, n)
  Tensor dbc_normed, norm_rstd;  // falcon_mamba only: (t, r + 2n), (3, t)
};
struct Mamba1Saved : Mamba1DirectionSaved {  // what backward needs; activations of one layer
  Tensor u;                                  // (t, d) input of in_proj
  Tensor xz;                                 // (t, 2e)
  Mamba1DirectionSaved back;                 // with config.bidirectional
};

// One row per tensor; `prefix` ends in a dot.
std::vector<Param> declare(const Config& config, Mamba1Weights& weights, const std::string& prefix);

// u (t,d) → (t,d). state: null starts every piece from zero. saved: null for inference. Not
// `whole`: only what it does to the state, and nothing is returned. Bidirectional: pieces are whole
// sequences (from = to = -1), else an error.
Tensor forward(Backend& backend, const Config& config, const Mamba1Weights& weights, Tensor u,
               const Rows& rows, Mamba1State* state, Mamba1Saved* saved, bool whole = true);
// A layer's operands for decoding in one op; `norm` is that of its block.
MambaStep::Layer step_operands(const Mamba1Weights& weights, const Mamba1State* state,
                               const Tensor& norm);
// dy (t,d) → du (t,d); adds to grad and uses `saved` up. `initial` is the state forward read (null:
// zero); dstate: in, of the final state, out, of the initial one (null: neither).
Tensor backward(Backend& backend, const Config& config, const Mamba1Weights& weights,
                Mamba1Saved& saved, const Rows& rows, View dy, const Mamba1State* initial,
                Mamba1State* dstate, Mamba1Weights& grad);

}  // namespace coil
