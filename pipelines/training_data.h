// What a run trains and validates on, read whole: DNA or recordings.
#pragma once

#include <string>

#include "pipelines/batches.h"
#include "pipelines/train.h"

namespace coil {

struct TrainingData {
  Examples all, validation;  // validation: where it is given, not held out
  Partition parts;           // held_out refers to validation where that is given, else to all
  std::string fingerprint;   // of all of it: a resumed run must see the same, wherever it lies now
  const Examples& held_out_of(const TrainOptions& options) const {
    return options.validation.empty() ? all : validation;
  }
};

// Settles the window lengths and, of audio, the rate in `options`. `note` is told what a person
// should know.
TrainingData read_training_data(TrainOptions& options,
                                const std::function<void(const std::string&)>& note);

SampleCodes parse_codes(const std::string& name);  // throws UsageError

}  // namespace coil
