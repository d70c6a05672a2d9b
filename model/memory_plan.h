// What a run will hold in memory, before it runs. Not a formula: the model's own code runs on a
// backend that only counts what is allocated, so the plan follows the code.
#pragma once

#include "model/head.h"

namespace coil {

struct MemoryRequest {
  int64_t length = 1;     // steps of a sequence
  int64_t sequences = 1;  // in a batch
  int64_t chunk = 0;      // most steps of a sequence at once; 0: the length. See Cut in loss.h
  DType matrices = DType::f32;
  bool train = false;
  Device device;  // a GPU's activations have the type of the matrices
};

// Bytes. On a GPU as its blocks are allocated: within some percent of the peak that the backend
// counts (tests/test_memory_fit.cc); context and kernels of the driver, some 500 MB, come on top.
struct MemoryPlan {
  int64_t weights = 0;
  int64_t state = 0;        // of all sequences; in training what is kept of each chunk
  int64_t activations = 0;  // the most at any moment
  int64_t gradients = 0, moments = 0, copy = 0;  // training only; copy: of the weights, in bf16
  int64_t workspace = 0;                         // of the matrix library, on a GPU
  int64_t chunk = 0, tile = 0;                   // training in chunks: as Chunks in loss.h
  int64_t total() const {
    return weights + state + activations + gradients + moments + copy + workspace;
  }
};

MemoryPlan plan_memory(const Config& config, const MemoryRequest& request);

}  // namespace coil
