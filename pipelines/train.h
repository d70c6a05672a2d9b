// The training loop: batches, evaluation, early best, checkpoints, resume. Bit-exact on resume with the same
// options and thread count: every random number is Philox keyed by (seed, stream, step).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/optimizer.h"

namespace coil {

struct TrainOptions {
  std::vector<std::string> data;         // see genomics/dataset.h
  std::string validation;                // file or folder; empty: a split
  double validation_fraction = 0.1;
  std::string out;                       // model folder
  std::string preset = "dna-small";      // dna-tiny | dna-small | dna-base: applied before everything else
  std::string from;                      // start from this model's weights
  Objective objective = Objective::classify;
  std::string sequence_column = "sequence", label_column = "label", table;
  int64_t min_length = 0, max_length = 0;  // windows; 0: whole records
  int64_t d = 128, layers = 4, n = 16;
  Pooling pooling = Pooling::mean;
  int64_t steps = 0;                     // 0: from epochs
  double epochs = 10;
  int64_t batch_tokens = 16384;          // a batch holds sequences up to this many tokens
  double lr = 4e-3, min_lr = 0.05 /* of lr, end of the cosine */, warmup = 0.05 /* of all steps */;
  double weight_decay = 0.1, clip = 1.0;
  bool reverse_complement = true;        // augmentation
  double mutate = 0;                     // substitution rate, augmentation
  bool balance = false;                  // class weights inverse to class counts
  int64_t eval_every = 0;                // steps; 0: about twenty times in the run
  int64_t checkpoint_every = 0;          // steps; 0: at every evaluation
  int64_t patience = 0;                  // evaluations without improvement before stopping; 0: never
  std::string metric;                    // "mcc" (classify) or "loss": which model is best; "" is by objective
  std::string log;                       // JSON lines; empty: OUT/train.jsonl
  bool resume = false;
  double max_minutes = 0;                // stop (with a checkpoint) after this; 0: no limit
  uint64_t seed = 1;
  int threads = 0;
};
void apply_preset(const std::string& name, TrainOptions& options);  // throws UsageError on an unknown name
std::vector<std::string> preset_names();

int train(TrainOptions options);  // exit status: 0, or 128 + signal after Ctrl-C / SIGTERM (checkpoint written)

}  // namespace coil
