// Log-likelihood of records under a language model of DNA or audio.
//   DNA    log L = sum over i >= 1 with base i in A C G T of log p(base i | bases before it)
//          p is a softmax over the logits of A C G T alone. The first base is not counted; N and
//          what reads as N is not counted but stays context. Both strands: the mean of the two
//          log-likelihoods (and of the counts: what is counted differs by the first base only).
//   audio  log L = sum over all samples of log p(sample | begin token and samples before it)
#pragma once

#include <functional>
#include <span>
#include <string>

#include "model/head.h"
#include "pipelines/stream.h"

namespace coil {

struct ScoreOptions {
  StreamOptions stream{.strands = Strands::forward};
  // Of the forward strand only: text per base or, of audio, per second; or a number of each base or
  // sample.
  bool per_base = false, per_position = false;
};

struct Score {
  std::string name;
  int64_t begin = 0, end = 0;    // 0-based, half open
  double counted = 0;            // bases or samples; half where the strands count differently
  double log_likelihood = 0;     // natural logarithm
  double bits_per_base() const;  // or sample; NaN where none is counted
};

// Throws where the model is no language model or reads neither DNA nor audio; `where` names it.
void check_language_model(const Config& config, const std::string& where);

// Scores in input order. With per_base, `per_base` receives text in bedGraph: name, start, end and
// the bits -log2 p of each counted base, in input order too, as it is made. Of audio a line per
// second of each recording: name, start and end in seconds, samples, their mean bits. With
// per_position, `per_position` receives log p in nats of every base or sample, NaN where it is not
// counted, before the score that they belong to.
void score(Backend& backend, const Model& model, Source& source, const ScoreOptions& options,
           const std::function<void(const Score&)>& emit,
           const std::function<void(const std::string&)>& per_base = {},
           const std::function<void(const Stream&)>& progress = {},
           const std::function<void(std::span<const float>)>& per_position = {});

}  // namespace coil
