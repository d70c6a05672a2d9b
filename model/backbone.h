// The stack: residual blocks norm → mixer, then a final norm. (t,d) → (t,d). Knows no vocabulary
// and no head.
#pragma once

#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "model/mamba1.h"
#include "model/s4d.h"

namespace coil {

using MixerWeights = std::variant<Mamba1Weights, S4dWeights>;
using MixerState = std::variant<Mamba1State, S4dState>;
using MixerSaved = std::variant<Mamba1Saved, S4dSaved>;

struct Layer {
  Tensor norm;  // (d)
  MixerWeights mixer;
};

// Everything carried between pieces of a sequence, plain tensors with one row per slot: snapshot,
// fork, save and resume are copies.
struct State {
  State(Backend& backend, const Config& config, int32_t slots);
  int32_t slots = 0;
  std::vector<MixerState> layers;
  Tensor pool;  // (s, d+1) f64: Pool's running sum and count

  // Of the layers, (s, …) f32 each: layers.0.conv, layers.0.ssm, …
  std::vector<std::pair<std::string, View>> tensors() const;
};

struct Saved {  // of one forward, for one backward
  struct Block {
    Tensor residual;  // (t,d) sum that the block's norm read
    Tensor rstd;      // (t)
    MixerSaved mixer;
  };
  std::vector<Block> blocks;
  Tensor residual, rstd;           // of the final norm
  const State* initial = nullptr;  // the state forward read; must stay unchanged until backward
};

class Backbone {
 public:
  std::vector<Layer> layers;
  Tensor norm_f;  // (d)

  // x (t,d) is consumed. state null: start from zero, discard. saved null: inference. With both,
  // pieces must fork (from != to), since backward reads the initial state again.
  Tensor forward(Backend& backend, const Config& config, Tensor x, const Rows& rows, State* state,
                 Saved* saved) const;
  // dy (t,d) → dx (t,d); adds to grad. dstate: in, of the final state, out, of the initial one;
  // null: neither.
  Tensor backward(Backend& backend, const Config& config, const Saved& saved, const Rows& rows,
                  View dy, State* dstate, Backbone& grad) const;
};

// Forward of pieces that are all one step long, as one op from ends.x or ends.ids to ends.y or
// ends.logits. False, and nothing done, where the pieces are longer or the backend has no such op
// for this network; Backbone::forward then takes the ops one by one.
bool try_step(Backend& backend, const Config& config, const Backbone& backbone, MambaStep ends,
              const Rows& rows, const State* state);

// The type of activations in the stack: f32, or bf16 on a device that computes in it.
DType activations(Backend& backend, const Backbone& backbone);

std::vector<Param> declare(const Config& config, Backbone& backbone, const std::string& prefix);

}  // namespace coil
