// Runs a source on a worker thread, a few batches of segments ahead of its consumer.
#pragma once

#include <memory>

#include "model/batch.h"

namespace coil {

// What `source` throws is thrown by next() after the segments that came before it. The destructor
// stops the worker after the batch it is reading. Batches hold about kRun codes; at most four wait.
std::unique_ptr<Source> read_ahead(std::unique_ptr<Source> source);

}  // namespace coil
