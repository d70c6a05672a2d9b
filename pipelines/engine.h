// What classify, score and embed do alike: the records of a source, batch by batch, through a
// model.
#pragma once

#include <functional>
#include <vector>

#include "model/head.h"
#include "pipelines/stream.h"

namespace coil {

struct EngineHooks {
  // Numbers of the rows of a batch or of the sequences that end in it, in order. Called from
  // several threads, each with a backend and batches of its own; the states stand in slots.
  std::function<std::vector<float>(Backend&, Stream::Batch&, State&)> compute;
  // These numbers, for the batch's units. From here on in the caller's thread, batch after batch.
  std::function<void(const Stream::Batch&, const std::vector<float>&)> add;
  // After each turn: what is done may be popped.
  std::function<void(Stream&)> turn;
};

// options.batch 0: what fits in memory, and smaller batches where it runs out all the same.
void run_stream(Backend& backend, const Model& model, Source& source, const StreamOptions& options,
                const EngineHooks& hooks);

}  // namespace coil
