// What a run leaves for people and programs: the log of JSON lines, the line of an evaluation, the
// model card.
#pragma once

#include <cstdint>
#include <string>

#include "pipelines/evaluate.h"
#include "pipelines/train.h"

namespace coil {

// One evaluation.
struct RunPoint {
  const char* unit = "base";                // or "sample"
  int64_t step = 0, steps = 0, tokens = 0;  // tokens trained on so far
  double train_loss = 0;                    // mean since the evaluation before
  double learning_rate = 0, tokens_per_second = 0, seconds = 0, seconds_left = 0;
  Evaluation validation;
  bool best = false;
};
std::string describe(const RunPoint& point, Objective objective);  // one line
std::string to_json(const RunPoint& point, Objective objective);   // one line
std::string duration(double seconds);                              // "4:07", "1:02:33"
std::string with_commas(int64_t value);                            // "12,345"
std::string counted(int64_t count, const char* thing);             // "1 layer", "12,345 layers"

// Appends lines to a file and flushes each. Opened for a resumed run, drops the lines after its
// step.
class RunLog {
 public:
  RunLog(const std::string& path,
         int64_t resumed_step);  // resumed_step -1: a new run, the file is emptied
  void add(const std::string& line);

 private:
  std::string path_;
};

// Layers, widths and states, for a person: "4 layers, d 128, n 16".
std::string network_text(const Config& config);

struct CardFacts {
  int64_t train_examples = 0, train_bases = 0, held_out = 0, held_out_bases = 0;
  std::string metric;
  RunPoint best;
};
std::string model_card(const TrainOptions& options, const Config& config, const CardFacts& facts);

}  // namespace coil
