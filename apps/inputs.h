// What `classify` and `score` share: which sequences are read, and progress while it happens.
#pragma once

#include <boost/program_options.hpp>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "audio/dataset.h"
#include "genomics/alignment.h"
#include "kernels/error.h"
#include "model/config.h"
#include "pipelines/fit.h"
#include "pipelines/hdf5_read.h"
#include "pipelines/stream.h"

namespace coil {

struct InputOptions {
  std::vector<std::string> inputs;
  std::string reference;             // for CRAM
  std::vector<std::string> regions;  // of one indexed FASTA
  std::string bed;
  bool alignments = false;  // standard input is SAM, BAM or CRAM
  bool secondary = false, supplementary = false;
  bool paired = false;  // classify only
  std::string split;    // of datasets
  AlignmentOptions alignment() const;
};
boost::program_options::options_description describe(InputOptions& options);
// --split, where datasets are read.
boost::program_options::options_description describe_split(std::string& split);

// Of recordings, where the model is conditional or they are to be measured by class.
struct LabelChoice {
  std::string label;           // one for all
  std::string table, pattern;  // audio::LabelOptions
  std::string trim = "auto";   // dB; auto: as in training
};
boost::program_options::options_description describe(LabelChoice& choice);
// The first recording that a path is or, as a folder, holds, by their names' endings; "": none.
std::string recording_in(const std::string& path);
// Of --label, which must be one of the model's.
int32_t find_label(const Config& config, const std::string& label);
// Lists files and folders; `labelled`: with labels, which must be the model's.
audio::Recordings recordings_of(const Config& config, const std::vector<std::string>& inputs,
                                const LabelChoice& choice, bool labelled);
audio::ReadOptions reading_of(const Config& config, const LabelChoice& choice);
// How datasets are read; `labelled`: with labels, which must be the model's, or --label for all.
DatasetReading dataset_reading(const Config& config, const std::string& split,
                               const LabelChoice& choice, bool labelled);
// Recordings, or datasets of them, for a model of audio, with labels where it is conditional.
// Throws where options of DNA were given.
std::unique_ptr<Source> open_sounds(const Config& config, const InputOptions& options,
                                    const LabelChoice& choice);
// Strands of a model of audio: forward. Throws where another one was asked for by name.
void settle_strands(const Config& config, bool defaulted, std::string& strands);
// --min-probability of a classifier: auto (-1) or 0 to 1.
double parse_min_probability(const std::string& text);
std::vector<std::string> files_of(const InputOptions& options);      // all that are read
std::vector<std::string> files_of_model(const std::string& folder);  // config, labels, weights

// Checks that every input can be opened, then opens them one after another as one stream. One that
// turns out to hold no alignment is named on stderr: it may be a SAM file that was cut in its
// header. Datasets must hold DNA.
std::unique_ptr<Source> open_inputs(const InputOptions& options);

// Options of the engine. describe() binds text where "auto" is a choice; resolve() reads it, and
// refuses what the model has no use for.
struct EngineOptions {
  std::string strands, batch = "auto", chunk = "auto";
  StreamOptions resolve(const Config& config) const;
};
boost::program_options::options_description describe(EngineOptions& options);

extern const Note kPrintNote;  // a line on stderr, in place of the one of Progress

// Runs f; where it runs out of memory, the error names the value of `option` that would fit instead
// of `asked` rows (0: what auto stands for).
template <class F>
auto with_memory_hint(const Backend& backend, const Model& model, const std::string& option,
                      int64_t asked, F f) {
  try {
    return f();
  } catch (const OutOfMemory& error) {
    if (asked <= 0) asked = auto_batch(model.config, backend.device());
    throw OutOfMemory(error.what(), fitting_hint(backend, model.config,
                                                 model.embedding.view().dtype, option, asked));
  }
}

// Steps done, rate and, where the end is known, the time left: on stderr when it is a terminal.
class Progress {
 public:
  explicit Progress(std::string command);
  ~Progress();  // clears the line
  void operator()(const Stream& stream);

 private:
  using Clock = std::chrono::steady_clock;
  std::string command_;
  bool terminal_, shown_ = false;
  Clock::time_point begin_ = Clock::now(), last_ = begin_;
};

// "coil classify model x.fa": for a @PG line.
std::string command_line(int argc, char** argv);

}  // namespace coil
