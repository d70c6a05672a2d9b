// The stack: residual blocks norm → mixer [→ norm → MLP], then a final norm. (t,d) → (t,d). Knows
// no vocabulary and no head. A U-Net is a stack with a coarser one inside, which runs first
// (model/unet.h).
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "model/mamba1.h"
#include "model/mlp.h"
#include "model/s4d.h"

namespace coil {

using MixerWeights = std::variant<Mamba1Weights, S4dWeights>;
using MixerState = std::variant<Mamba1State, S4dState>;
using MixerSaved = std::variant<Mamba1Saved, S4dSaved>;

struct Layer {
  Tensor norm;  // (d)
  MixerWeights mixer;
  Tensor mlp_norm;  // (d) with config.mlp, as the MLP
  MlpWeights mlp;
};

struct InnerStage;
struct InnerState;
struct InnerSaved;

// Everything carried between pieces of a sequence, plain tensors with one row per slot: snapshot,
// fork, save and resume are copies.
struct State {
  State(Backend& backend, const Config& config, int32_t slots);
  int32_t slots = 0;
  std::vector<MixerState> layers;
  Tensor pool;                        // (s, d+1) f64: Pool's running sum and count
  std::unique_ptr<InnerState> inner;  // of a U-Net

  // But for `pool`, (s, …) f32 each: layers.0.conv, layers.0.ssm, …, inner.rest, …
  std::vector<std::pair<std::string, View>> tensors() const;
};
struct InnerState {
  State stage;  // without `pool`
  Tensor rest;  // (s, p-1, d) steps of the coarse step that has not ended
  Tensor next;  // (s, p d) what the last coarse step put out
};

struct Saved {  // of one forward, for one backward
  // Set before forward: of each layer only the sums that its norms read are kept; backward computes
  // the rest of it again, one layer at a time. (Chen et al. 2016.)
  bool recompute = false;
  struct Block {
    Tensor residual;  // (t,d) sum that the block's norm read
    Tensor rstd;      // (t)
    MixerSaved mixer;
    Tensor mlp_residual, mlp_rstd;  // of the norm before the MLP
    MlpSaved mlp;
  };
  std::vector<Block> blocks;
  Tensor residual, rstd;           // of the final norm
  const State* initial = nullptr;  // the state forward read; must stay unchanged until backward
  std::unique_ptr<InnerSaved> inner;
};
struct InnerSaved {
  Saved stage;
  Tensor steps;  // (m, p d) what the product down read
  Tensor y;      // (m, d of the stage) what the product up read
};

class Backbone {
 public:
  std::vector<Layer> layers;
  Tensor norm_f;                      // (d)
  std::unique_ptr<InnerStage> inner;  // of a U-Net

  // x (t,d) is consumed. state null: start from zero, discard. saved null: inference. With both,
  // pieces must fork (from != to), since backward reads the initial state again. Not `whole`: only
  // what it does to the state, and nothing is returned.
  Tensor forward(Backend& backend, const Config& config, Tensor x, const Rows& rows, State* state,
                 Saved* saved, bool whole = true) const;
  // dy (t,d) → dx (t,d); adds to grad and uses `saved` up. dstate: in, of the final state, out, of
  // the initial one; null: neither.
  Tensor backward(Backend& backend, const Config& config, Saved& saved, const Rows& rows, View dy,
                  State* dstate, Backbone& grad) const;
};

struct InnerStage {
  Config config;           // of the stage: its d, e, dt_rank and layers
  int64_t p = 0;           // steps of the stage around it that are one here
  Tensor down, down_bias;  // (d, p d of the stage around), (d)
  Tensor up, up_bias;      // (p d of the stage around, d), (p d of the stage around)
  Backbone stage;
};

// Forward of pieces that are all one step long, as one op from ends.x or ends.ids to ends.y or
// ends.logits. False, and nothing done, where the pieces are longer or the backend has no such op
// for this network; Backbone::forward then takes the ops one by one.
bool try_step(Backend& backend, const Config& config, const Backbone& backbone, MambaStep ends,
              const Rows& rows, const State* state);

// The type of activations in the stack: f32, or bf16 on a device that computes in it.
DType activations(Backend& backend, const Backbone& backbone);

// Names begin with `base`, which ends in a dot; those of the stage at `depth` inside the outermost
// with `base` and stages.DEPTH.
std::vector<Param> declare(const Config& config, Backbone& backbone, const std::string& base,
                           int64_t depth = 0);

}  // namespace coil
