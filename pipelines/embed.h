// Hidden states of a model as vectors: one of every record or window, or one of every position.
//   h = norm_f(residual stream after block `layer`)  (d), of every base or sample
//   pooled: the mean of h over the record, or h of its last position; both strands: the mean of the
//   two strands' vectors.
// A causal model's h of a position knows what stands before it in its record, and itself.
#pragma once

#include <functional>
#include <span>
#include <string>

#include "model/head.h"
#include "pipelines/stream.h"

namespace coil {

struct EmbedOptions {
  StreamOptions stream;
  Pooling pooling = Pooling::mean;
  bool per_position = false;  // forward strand only
};

// Positions begin … end of a record: one vector for all of them, or one for each.
struct Embedding {
  const std::string& name;
  int64_t begin, end;             // bases or samples, 0-based, half open
  bool last;                      // nothing more comes of this record or window
  std::span<const float> values;  // (d), or (end - begin, d)
};

// The model less what comes after block `layers` (1 … all): a stack alone. Throws where there is no
// such block; `where` names the model.
void keep_layers(Model& model, int64_t layers, const std::string& where);

// In input order; per position, in runs of a record, which follow each other.
void embed(Backend& backend, const Model& model, Source& source, const EmbedOptions& options,
           const std::function<void(const Embedding&)>& emit,
           const std::function<void(const Stream&)>& progress = {});

}  // namespace coil
