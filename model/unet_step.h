// A step of a U-Net of S4D stages as one op (kernels/ops.h: UnetStep), for decoding.
#pragma once

#include "model/head.h"

namespace coil {

// What decoding makes of S4D's parameters once: S4dTable of every layer, the outermost stage's
// first. Stale where the model's weights change.
struct S4dTables {
  std::vector<Tensor> layers;  // (d,4,n) each
};
// Empty where a layer has another mixer: such a model has no step in one op.
S4dTables s4d_tables(Backend& backend, const Model& model);

// ends: ids, table, head and logits. False, and nothing done, where pieces are longer than a step
// or the backend has no such op for this network; the ops then go one by one.
bool try_step(Backend& backend, const Model& model, const S4dTables& tables, UnetStep ends,
              const Rows& rows, const State* state);

}  // namespace coil
