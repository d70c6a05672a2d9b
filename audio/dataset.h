// Folders and files of recordings: what they are, what class each has, and their codes, streamed or
// held in memory for training.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model/batch.h"

namespace coil::audio {

struct LabelOptions {
  bool labelled = false;
  std::string table;  // file<TAB>label; the file as path below the folder, as name, or without
                      // its ending; a header line is a row whose file no recording has
  std::string
      pattern;  // extended regular expression over the file's name: its first group, else the match
  // Neither: the folder below the one given. Of a model: a label outside is an error.
  std::vector<std::string> known = {};
  bool complete = true;  // to train on: at least two classes of two recordings each
};

struct Recording {
  std::string path;    // to open it, and for messages
  std::string name;    // below the folder given; a file given by itself: without its folder
  int32_t label = -1;  // index into Recordings::labels
};
struct Recordings {
  std::vector<Recording> files;     // in the order given, those of a folder sorted by name
  std::vector<std::string> labels;  // sorted, or those known
};
// Files are taken whatever their names; of folders, searched to the bottom, what is named like
// audio and not hidden. Throws on a folder without any, on a file without label or with an unknown
// one and, where `complete` and no labels are known, on fewer than two classes or one with a single
// recording.
Recordings list_recordings(const std::vector<std::string>& paths, const LabelOptions& options);

// The rate that most of them have, the lower of two.
int64_t common_rate(const Recordings& recordings);

struct ReadOptions {
  int64_t rate = 16'000;
  SampleCodes codes = SampleCodes::mulaw;
  double trim = 0;  // dB: begin and end that stay this far below full scale are left out; 0: none
  // Told once of every combination of rate and channels that is resampled or mixed down.
  std::function<void(const std::string&)> note = {};
};
// One record per file, named by its path; memory is a block of it. Positions count codes.
std::unique_ptr<Source> open_recordings(Recordings recordings, const ReadOptions& options);
// All in memory, a byte a code; one item per recording.
Examples read_recordings(const Recordings& recordings, const ReadOptions& options);

}  // namespace coil::audio
