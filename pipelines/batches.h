// What a step of training sees. Whole records: shuffled epochs, as many records as fit in a batch.
// Windows: drawn anew every step, class first (each equally often), then a place in the class's
// sequence, then a length, log-uniform. Everything is a function of (seed, step) and of the cursor:
// a resumed run draws the same.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "kernels/tensor.h"
#include "model/batch.h"
#include "model/config.h"
#include "pipelines/front_end.h"
#include "pipelines/masks.h"

namespace coil {

// Training examples (with windows: stretches that windows are drawn from) and held-out examples.
struct Partition {
  std::vector<Example> train, held_out;
};
// Whole records: a stratified split. Windows: one contiguous stretch of `fraction` of every long
// record is held out, so that no training window overlaps it, and cut into windows of drawn
// lengths; sets of short records are split by record. fraction 0: everything is for training.
Partition partition(Examples& all, double fraction, int64_t min_length, int64_t max_length,
                    uint64_t seed);
// The same with whole records held out, some of each class: recordings are split by file. Which,
// the names of the records say, so that one more or less moves no other one.
Partition partition_records(const Examples& all, double fraction, int64_t min_length,
                            int64_t max_length, int64_t step, uint64_t seed);
// The stretches and windows of a set of its own. Lengths in bases or samples of `step` codes.
std::vector<Example> whole_records(const Examples& all);
std::vector<Example> cut_windows(std::span<const Example> stretches, int64_t min_length,
                                 int64_t max_length, uint64_t seed, int64_t step = 1);
// At most `tokens` in all (0: no limit), taken evenly.
std::vector<Example> thin(std::vector<Example> items, int64_t tokens);

struct Batch {
  std::vector<int32_t> ids;  // (t)
  // (t): lm the next id, mlm that of the place, -1 not counted; classify: (m).
  std::vector<int32_t> targets;
  int64_t codes = 0;  // of the sequences; ids has what a front end adds to them too
  std::vector<Piece> pieces;
  int64_t epoch = 0, next = 0;  // the cursor after it
  // The first `context` codes are of a window's past: see FrontEnd::append.
  void add(std::span<const uint8_t> codes, int32_t label, Objective objective,
           const FrontEnd& front = FrontEnd(), int64_t context = 0);
  // Another sequence, which shares the label of the one before it.
  void add_strand(std::span<const uint8_t> codes, const FrontEnd& front);
  // mlm: targets of the places, kUncounted or a code.
  void add(std::span<const uint8_t> codes, std::span<const uint8_t> places, const FrontEnd& front);
};

struct BatchOptions {
  Objective objective = Objective::classify;
  int64_t batch_tokens = 16384;            // codes
  int64_t min_length = 0, max_length = 0;  // bases or samples
  // Windows: the longest of so many epochs, then of the next; 0: to the end. Empty: max_length.
  std::vector<std::pair<int64_t, double>> lengths = {};
  bool reverse_complement = true;
  bool pairs = false;                // every sequence, and behind it its reverse complement
  double mutate = 0, mutate_to = 0;  // substitutions per base, see TrainOptions
  double condition_dropout = 0;      // share of examples without their label
  Masking masking = {};              // mlm; share 0: targets are those of the data
  uint64_t seed = 1;
  FrontEnd front = {};
};

class Batches {
 public:
  Batches(const Examples& all, std::vector<Example> train, const BatchOptions& options);
  Batch draw(int64_t step);  // counted from 1: of batches, not of what is made of several
  int64_t longest(int64_t step) const;        // window of that batch
  int64_t tokens() const { return tokens_; }  // of one epoch

  int64_t epoch = 0, next = 0;  // the cursor: of whole records

 private:
  void draw_records(int64_t step, Batch& batch);
  void draw_windows(int64_t step, Batch& batch) const;
  struct Draws {  // of a batch: augmentation; masks, which change nothing in the former
    Philox augment, mask;
  };
  Draws draws(int64_t step) const;
  void add(Batch& batch, const Example& item, Draws& draws) const;

  struct Pool {  // a class's stretches
    std::vector<Example> stretches;
    std::vector<int64_t> ends;  // running sum of lengths
  };
  const Examples& all_;
  std::vector<Example> train_;
  BatchOptions options_;
  std::vector<Pool> pools_;
  std::vector<int64_t> order_;  // of epoch order_epoch_
  int64_t order_epoch_ = -1, tokens_ = 0;
};

}  // namespace coil
