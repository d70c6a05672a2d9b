// How many rows at a time a device has memory for: by the memory plan and what is free. And what a
// batch does where memory ran out all the same, because another program took it.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "model/head.h"
#include "pipelines/stream.h"

namespace coil {

constexpr int64_t kFewestRows = 256;  // of a batch that is made smaller

// Of the memory that a device has room for, what may be planned with: a sixteenth, at least 256
// MiB of a GPU's, is left to kernels that are loaded when first used and to how pieces fall.
int64_t plannable(int64_t room, Device device);

// auto_batch, or the largest half, quarter, … of it, at least kFewestRows, that the device has
// memory for beside a model that it holds already. A function of network and device alone unless
// memory is short; then `note` is told.
int64_t fitting_batch(const Backend& backend, const Config& config, DType matrices,
                      const Note* note = nullptr);

// The longest sequence that inference can take in one piece, as a bidirectional model must, beside
// a model that the device holds already; half of a CPU's memory may be planned with.
int64_t longest_whole(const Backend& backend, const Config& config, DType matrices);

// Steps of a sequence that training can take at once, see Cut in model/loss.h: 0, whole, where the
// longest fits beside the rest of training, of which nothing is held yet; else the largest half,
// quarter, … of `rows`, the steps of whole sequences at once, that does. Of a CPU whose memory is
// not known, half may be planned.
int64_t fitting_chunk(const Backend& backend, const Config& config, DType matrices, int64_t longest,
                      int64_t rows);

// "--batch 32768 would fit": the largest half, quarter, … of `asked` rows for which a run with the
// model would fit into what this program holds and what is free. Where none would, says so.
std::string fitting_hint(const Backend& backend, const Config& config, DType matrices,
                         const std::string& option, int64_t asked);

// Computes batches whole or, where memory ran out, in parts of half as many rows, a quarter, …;
// for good once it happened. A part that failed has changed no state that it read: pieces fork (see
// Stream), and what a cut piece carries to the next part goes from one spare slot to another.
class Parts {
 public:
  static constexpr int kSpare = 2;  // slots behind the stream's, for each worker
  // may_halve: false where a person asked for the size of batches.
  Parts(const Stream& stream, bool may_halve, const Note* note)
      : slots_(stream.slots()), may_halve_(may_halve), note_(note) {}
  // compute(part) gives the numbers of its rows or of the sequences that end in it, in order; the
  // parts' numbers are joined.
  std::vector<float> run(Backend& backend, Stream::Batch& batch, int worker,
                         const std::function<std::vector<float>(Stream::Batch&)>& compute);

 private:
  void halve(Backend& backend, int64_t rows);
  int32_t slots_;
  bool may_halve_;
  const Note* note_;
  std::mutex mutex_;               // of note_
  std::atomic<int64_t> most_ = 0;  // rows of a part; 0: no limit
};

}  // namespace coil
