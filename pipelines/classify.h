// A class for every record, window, read pair or file.
//   p = softmax of the class logits of the pooled hidden states, in f64. Averages are means of
//   probabilities: the two strands of a unit weigh the same, the units of a pair or a file weigh by
//   their bases or samples. Of an equivariant model the logits of the strands are averaged instead.
// "Unknown" is an answer whose agreement is below a threshold: the probability of its class, or, of
// a model with unknown_excerpt, the mean of that probability over excerpts that are read each on
// its own (of each strand, of an equivariant model too). A carried state makes a model surer of
// whatever it took a sequence for; of what is foreign, excerpts are called by many names.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "model/head.h"
#include "pipelines/stream.h"

namespace coil {

enum class AnswerPer : uint8_t { unit, pair /* of records 2i and 2i+1 */, file };

struct ClassifyOptions {
  StreamOptions stream;
  AnswerPer per = AnswerPer::unit;
  std::vector<std::string> files;  // names of the source's files, for AnswerPer::file
  // Below it the label is "unknown"; -1: by length from config.unknown, which sets stream.excerpt.
  double min_probability = -1;
};

struct Answer {
  std::string name;
  int64_t begin = 0, end = 0;  // 0-based, half open
  int32_t label = -1;          // index into config.labels; -1: unknown
  double probability = 0;      // of the likeliest class, unknown or not
  double agreement = 0;        // of excerpts with that class; where there are none, probability
  std::vector<double> probabilities;
};

// Threshold of "unknown" for a sequence of `length` bases that is called class `label`: linear in
// log(length) between the calibrated lengths, constant beyond them; 0 where the model has none.
double unknown_threshold(const Config& config, int64_t length, int32_t label);

// Throws where the model is no classifier or reads neither DNA nor audio; `where` names it.
void check_classifier(const Config& config, const std::string& where);

// Answers in input order. `progress`, if given, is called after every batch.
void classify(Backend& backend, const Model& model, Source& source, const ClassifyOptions& options,
              const std::function<void(const Answer&)>& emit,
              const std::function<void(const Stream&)>& progress = {});

}  // namespace coil
