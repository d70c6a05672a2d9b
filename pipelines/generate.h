// Audio drawn from a language model, code by code:
//   code t ~ p(. | label if the model has one, codes before it),  a softmax over the codes that can
//   stand at t (mu-law; coarse and fine bytes of 16 bits in turns), by temperature, top_k and
//   top_p. With guidance g the logits are those without label + g times what the label adds
//   (ops.h: Sample), each stream being read twice, with its label and without.
//
// Ids stay on the device: what Sample writes the next step reads, and the host asks for blocks of
// steps, the next one under way while it looks at the last. The draw of a code is a function of
// (seed, stream, place in the stream): the same whatever the blocks, and whatever other streams
// there are. Logits are the same as far as products give a row the same bits beside other rows.
//
// The guard looks at every half second of each stream (of one that a run begins or ends in, at half
// of it or more). It is a runaway where it is louder than -9 dB of full scale, which speech and
// music hardly are, or louder than -20 dB and hardly foreseen by the model itself, with more than
// 0.85 of the bits that a code has: noise.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/step_tables.h"
#include "pipelines/front_end.h"

namespace coil {

// What the guard does with a runaway: nothing, tell, end the stream, or draw that half second anew
// (up to kGuardTries times).
enum class Guard : uint8_t { off, warn, stop, resample };
constexpr int kGuardTries = 3;
bool is_runaway(double mean_square, double bits_of_code);  // of samples from -1 to 1; of 8

struct GenerateOptions {
  int64_t count = 1;    // streams, drawn side by side
  int64_t samples = 0;  // of each; 0: without end
  int32_t label = -1;   // of a conditional model
  float temperature = 1, top_p = 1;
  int64_t top_k = 0;
  float guidance = 1;  // of a conditional model; 1: none
  uint64_t seed = 1;
  Guard guard = Guard::warn;
};

struct GenerateHooks {
  // The next samples of a stream. False: no more are wanted, and the run ends.
  std::function<bool(int64_t stream, std::span<const float> samples)> emit;
  // A runaway, ending at this sample of the stream; once for each time that the guard fires.
  std::function<void(int64_t stream, int64_t sample)> runaway = {};
  std::function<bool()> interrupted = {};
};

struct Generated {
  int64_t samples = 0;  // emitted, of all streams
  double nats = 0;      // -log p of what was drawn, at temperature 1
  int64_t runaways = 0;
  int64_t kept = 0;       // of them, with `resample`: the last try was one too
  bool unwanted = false;  // emit said so
};

class Generator {
 public:
  Generator(Backend& backend, const Model& model, const GenerateOptions& options);

  // One of both, before run(), or none.
  void read_prompt(Source& prompt, int64_t chunk);  // codes of one recording, `chunk` at a time
  void load_state(const std::string& path);

  Generated run(const GenerateHooks& hooks);

  // After run(): what load_state needs to go on with the same samples. Throws where a stream was
  // stopped. How codes are drawn is kept with it.
  void save_state(const std::string& path) const;
  static GenerateOptions saved_options(const std::string& path);

 private:
  struct Block {
    int64_t begin = 0, steps = 0;  // codes
    Softmax read{};                // where the code before them stands
    Tensor ids, log_probs;         // (steps + 1, rows) i32, that code first; (steps, count)
    std::unique_ptr<Fetch> ids_there, log_probs_there;
  };
  // Of one stream since the last half second ended.
  struct Heard {
    double squares = 0, nats = 0;
    int64_t samples = 0;
  };

  std::string fingerprint() const;
  bool guided() const { return rows_ > options_.count; }
  void set_pending(std::vector<int32_t> tokens);  // (count)
  Rows rows_of_step(int32_t from, int32_t to, int64_t position) const;
  std::unique_ptr<Block> start();
  void draw(Block& block);
  void finish(Block& block, const GenerateHooks& hooks);
  void listen(Block& block);
  std::vector<int64_t> runaways(const Block& block) const;

  Backend& backend_;
  const Model& model_;
  GenerateOptions options_;
  FrontEnd front_end_;
  std::vector<Softmax> softmaxes_;
  int64_t window_ = 0;  // codes of half a second
  StepTables tables_;   // from run() on
  // Sequences that the network reads: the streams and, with guidance, behind them once more without
  // their label, whose ids count from that of the softmax's codes on.
  int64_t rows_;
  // With `resample` a block forks its states, so that it can be drawn anew from where it began:
  // slots 0 … rows-1 and rows … 2 rows-1 take turns.
  State state_;
  int32_t from_ = 0, to_ = 0;       // the first slots read and written by the block under way
  int64_t position_ = 0, end_ = 0;  // of the next code, and behind the last; without end: -1
  Tensor pending_;                  // (rows) i32: the code before the next one,
  Softmax pending_in_{};            // which counts from the begin of this
  std::vector<Heard> heard_;
  std::vector<int32_t> tries_;  // at the block under way
  std::vector<bool> stopped_;
  std::vector<std::vector<float>> samples_;  // of the block that is looked at, by stream
  std::vector<double> nats_;                 // likewise
  Generated made_;
};

}  // namespace coil
