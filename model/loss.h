// The loss of a batch of training and its gradient, exact through sequences of any length in memory
// that the length does not set. A sequence longer than a chunk is computed in chunks: forward over
// all of them, on a GPU several together, keeping of each only the state behind it; then from the
// last to the first, forward again from the state before it, kept whole, and backward, the gradient
// of the state handed from chunk to chunk. (Chen et al. 2016 recompute layers so; here it is time.)
// That costs one forward more of all chunks but the last.
// Where sequences cannot be cut in time (Config::trains_whole) they are computed again layer by
// layer instead: memory is that of one layer and of the residual stream between them.
#pragma once

#include "model/head.h"

namespace coil {

// How much of a batch is computed at once. Whatever it says, the gradients are those of the whole
// batch, but for rounding and for `truncate`.
struct Cut {
  int64_t rows = 0;  // steps of whole sequences, taken together; 0: all
  int64_t chunk =
      0;  // steps at most: a longer sequence is cut, or taken layer by layer; 0: none is
  bool truncate = false;  // gradients end where a chunk begins; the state is carried all the same
};

// One training batch of whole sequences. targets i32: per row (lm: the next id, mlm: that of the
// place, -1 not counted) or per sequence (classify; of an equivariant model per pair, a sequence
// and behind it its reverse complement), in host memory, as class_weights. Adds the sum of losses,
// in nats, to total(1) f64 in the backend's memory, and gradients of `scale` times the mean loss
// (sum / weight) to grad; grad null: loss only. logits, if given, receives the (m, classes or t,
// predicted) logits of a batch that is not cut. Returns the weight: counted targets (sum of class
// weights). Waits for nothing.
double add_loss(Backend& backend, const Model& model, View ids, const Rows& rows, View targets,
                View class_weights, View total, Model* grad, Tensor* logits = nullptr,
                double scale = 1, const Cut& cut = {});
// The same, waited for.
struct BatchLoss {
  double sum = 0;     // nats
  double weight = 0;  // counted targets (sum of class weights)
};
BatchLoss batch_loss(Backend& backend, const Model& model, View ids, const Rows& rows, View targets,
                     View class_weights, Model* grad, Tensor* logits = nullptr, double scale = 1,
                     const Cut& cut = {});

// What a sequence is cut into where `chunk` is asked for: as many chunks, nearly of one length, so
// that the last is not a short one and blocks of memory are of few sizes.
struct Chunks {
  int64_t length = 0;  // of each but the last
  // How many go through together where only their states are wanted: it takes as much memory as a
  // layer of one does with all that backward needs. On a CPU one, which may stay in its caches.
  int64_t together = 1;
  // Where forward, run again for backward, saves by it, the first run keeps the scan's states
  // before every so many steps of the last chunks, kKept at most, in whole runs of chunks that go
  // through together; 0: of no chunk.
  int64_t tile = 0;
  static constexpr int64_t kKept = 24;
};
// exact: of the length asked for, whatever becomes of the last.
Chunks chunks_of(const Backend& backend, const Model& model, int64_t length, int64_t chunk,
                 bool exact = false);

// What the mean divides by: counted targets, each by its class's weight if there are any.
double weight_of(View targets, View class_weights);

}  // namespace coil
