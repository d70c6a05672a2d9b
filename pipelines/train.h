// The training loop: batches, evaluation, early best, checkpoints, resume. Bit-exact on resume with
// the same options and thread count: every random number is Philox keyed by (seed, stream, step).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "model/optimizer.h"

namespace coil {

struct TrainOptions {
  std::vector<std::string> data;  // see genomics/dataset.h, audio/dataset.h
  bool audio = false;             // of the preset, or of the model that --from names
  std::string validation;         // file or folder; empty: a split
  double validation_fraction = 0.1;
  int64_t validation_tokens = 300'000;  // at most; what is more is thinned evenly. 0: no limit
  std::string out;                      // model folder
  std::string preset =
      "dna-small";          // dna-… | audio-tiny, -small, -base: applied before everything else
  std::string from;         // start from this model's weights: as it was named, and where it lies
  std::string from_folder;  // "": where `from` says
  const std::string& found_from() const { return from_folder.empty() ? from : from_folder; }
  Objective objective = Objective::classify;
  std::string sequence_column = "sequence", label_column = "label", table;
  std::string target_column;  // mlm: of a table; nothing is masked then
  std::string alphabet;       // letters of a table, the i-th token i; "": DNA
  double mask_share = 0.15;   // mlm
  // Audio: rate of the model (0: that of most recordings), codes, dB below which begin and end are
  // left out (0: nothing is), labels by table, by name or by folder, a language model with labels.
  int64_t rate = 0;
  std::string codes = "mulaw";  // mulaw | pcm16
  double trim = 0;
  std::string labels, label_pattern;
  bool condition = false;
  double condition_dropout = 0.1;          // share of examples trained without their label
  int64_t min_length = 0, max_length = 0;  // windows, in bases or samples; 0: whole records
  // Longest windows of the run's first epochs, of the next ones, …: pairs of length and epochs. The
  // last stage may say 0 epochs: to the end of the run. Empty: max_length throughout.
  std::vector<std::pair<int64_t, double>> lengths;
  int64_t d = 128, layers = 4, n = 16;
  int64_t dt_rank = 0;            // 0: dt_rank_of(d)
  std::string mixers = "mamba1";  // of the layers, repeated: see parse_mixers, add_stages
  // A U-Net's stages: each of `layers`, `pool` steps of the one around it ("": 4,4), widths of the
  // inner ones ("": doubling).
  std::string topology = "stack";  // stack | unet
  std::string pool, widths;
  int64_t mlp =
      -1;  // inner width of the MLP behind each mixer, in widths; -1: 2 in a U-Net, else 0
  bool bidirectional = false;       // every layer from both ends
  std::string strands = "average";  // average | equivariant: see Config::equivariant
  int64_t kmer = 1;                 // bases that an embedding is of
  int64_t s4d_states = 32;          // complex
  std::string s4d_init = "lin";     // lin | inv | legs
  Pooling pooling = Pooling::mean;
  int64_t steps = 0;  // 0: from epochs
  double epochs = 6;
  int64_t batch_tokens = 8192;  // a batch holds sequences up to this many tokens
  int64_t accumulate = 1;       // batches of a step, whose counted targets count alike
  // Tokens of a sequence computed at once, see Cut in model/loss.h; 0: whole, kAutoChunk: as memory
  // allows, settled when the run begins.
  static constexpr int64_t kAutoChunk = -1;
  int64_t chunk = 0;
  bool truncate = false;  // gradients end where a chunk begins
  double lr = 4e-3, min_lr = 0.05 /* of lr, end of the cosine */, warmup = 0.05 /* of all steps */;
  double weight_decay = 0.1, clip = 1.0;
  bool reverse_complement = true;  // augmentation, and both strands averaged in evaluation
  // Augmentation: substitutions per base; up to mutate_to, where that is more, drawn anew, evenly,
  // for each sequence.
  double mutate = 0, mutate_to = 0;
  bool balance = false;          // class weights inverse to class counts
  int64_t eval_every = 0;        // steps; 0: about twenty times in the run
  int64_t checkpoint_every = 0;  // steps; 0: at every evaluation
  int64_t shard_size = 0;        // most bytes of a file of tensors; 0: one file
  int64_t patience = 0;          // evaluations without improvement before stopping; 0: never
  // mcc | accuracy | auroc | loss: which model is best; "": mcc, of lm and mlm loss.
  std::string metric;
  std::string log;  // JSON lines; empty: OUT/train/log.jsonl
  bool resume = false;
  double max_minutes = 0;  // stop (with a checkpoint) after this; 0: no limit
  uint64_t seed = 1;
  int threads = 0;
  // bf16: products and activations, where the device has them; weights stay f32 beside a copy.
  std::string precision = "f32";
};
void apply_preset(const std::string& name,
                  TrainOptions& options);  // throws UsageError on an unknown name
std::vector<std::string> preset_names();
// Throws UsageError where options do not go together or are out of range.
void check_ranges(const TrainOptions& options);
// What the options say of the network; vocabulary, objective and front end depend on the data.
Config network_of(const TrainOptions& options);

// What a checkpoint keeps of the options, and what --resume starts from.
std::string to_json(const TrainOptions& options);
TrainOptions parse_train_options(const std::string& text);
// "lr (0.004 then, 0.01 now), …": the options that change results and differ. Empty: none.
std::string differences(const TrainOptions& then, const TrainOptions& now);

// Learning rate of step 1 … steps: linear warm-up, then a cosine down to min_lr * lr.
double learning_rate(const TrainOptions& options, int64_t step);

// How the loop speaks to whoever called it. All optional.
struct TrainHooks {
  std::function<void(const std::string&)> line;  // evaluations and notes, for a person
  std::function<void(const std::string&)>
      progress;                      // between evaluations: replaces the last progress
  std::function<int()> interrupted;  // number of the signal that came, else 0
};

// Rows that forward and backward take at once, whole sequences of a batch: gradients of its parts
// add up. A longer sequence is a part of its own.
int64_t training_rows(Device device);

// Returns the exit status: 0 where the run is finished; where --resume would go on (checkpoint
// written) kTimeEnded, as timeout(1) has it, or 128 + signal. A loss that is not finite or explodes
// throws, naming the step; the last good checkpoint stays.
constexpr int kTimeEnded = 124;
int train(Backend& backend, TrainOptions options, const TrainHooks& hooks = {});

}  // namespace coil
