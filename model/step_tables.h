// What decoding makes of a model's weights once, and with it a step of a U-Net of S4D stages as one
// op (kernels/ops.h: UnetStep).
#pragma once

#include "model/head.h"

namespace coil {

// Stale where the model's weights change.
struct StepTables {
  // S4dTable of every layer, the outermost stage's first, (d,4,n) each. Empty where a layer has
  // another mixer: such a model is no UnetStep.
  std::vector<Tensor> layers;
  // Of a conditional model, for each softmax whose ids are read: its rows with the label's
  // embedding and, where streams are guided, behind them once more without: (count or 2 count, d).
  std::vector<std::pair<Softmax, Tensor>> embeddings;
};
// label: -1, or of a conditional model one of its labels.
StepTables step_tables(Backend& backend, const Model& model, int32_t label = -1,
                       bool guided = false);

// ends: ids, table, head and logits. False, and nothing done, where pieces are longer than a step
// or the backend has no such op for this network; the ops then go one by one.
bool try_step(Backend& backend, const Model& model, const StepTables& tables, UnetStep ends,
              const Rows& rows, const State* state);

}  // namespace coil
