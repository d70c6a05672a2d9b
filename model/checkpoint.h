// Training state beside a model: MODEL/train/step-N/ written whole, files and folder fsynced,
// renamed into place, then MODEL/train/latest (a file naming step-N) replaced atomically: weights
// and moments of different steps never meet, whenever the process is killed.
//   step-N/model.safetensors       weights
//   step-N/optimizer.safetensors   moments, m.NAME and v.NAME; either may be in shards
//   step-N/state.json              step, options of the run, cursor; marks a whole checkpoint
#pragma once

#include <string>

#include "model/atomic_file.h"
#include "model/optimizer.h"

namespace coil {

struct Checkpoint {
  int64_t step = 0;
  std::string options;  // JSON: the resolved options of the run, compared on --resume
  std::string cursor;  // JSON: data cursor, best metric so far, evaluations without improvement, …
};

// `folder` is the model folder everywhere. Keeps the `keep` newest checkpoints; those of a later
// step than this one, left by another run in the same folder, are removed. Tensor files are at most
// shard_bytes long; 0: one of weights, one of moments.
void save_checkpoint(Backend& backend, const std::string& folder, const Checkpoint& checkpoint,
                     const Model& model, const Optimizer& optimizer, int keep = 2,
                     int64_t shard_bytes = 0);
bool has_checkpoint(const std::string& folder);
// Loads weights and moments into objects of the right config; throws naming file and difference.
Checkpoint load_checkpoint(Backend& backend, const std::string& folder, Model& model,
                           Optimizer& optimizer);
Checkpoint peek_checkpoint(const std::string& folder);  // without tensors
void remove_checkpoints(
    const std::string& folder);  // a run that starts anew in a folder used before

}  // namespace coil
