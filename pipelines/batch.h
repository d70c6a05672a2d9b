// A model over every record of a dataset, results into a file (pipelines/hdf5_results.h), in parts
// that survive a kill (pipelines/parts.h).
//
// A part is the records that begin within so many codes of each other: a function of the dataset
// and of part_size alone. It is computed by itself, by one thread of a CPU or by the GPU, so its
// numbers are the same bits whatever else runs, in whatever shard and with however many threads.
// Run again, what is there is left alone.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model/head.h"
#include "pipelines/hdf5_read.h"
#include "pipelines/hdf5_results.h"
#include "pipelines/stream.h"

namespace coil {

enum class Task : uint8_t { classify, score, embed };
const char* name_of(Task task);

struct BatchWork {
  std::string out;
  Task task = Task::classify;
  StreamOptions stream;             // of a part; batch resolved
  DatasetReading reading;           // split and labels
  double min_probability = -1;      // classify: see ClassifyOptions
  bool per_position = false;        // score, embed
  Pooling pooling = Pooling::mean;  // embed
  std::string layer;                // embed, as it is to be named
  int64_t part_size = 1'000'000;    // bases or samples
  int64_t shard = 1, shards = 1;    // the shard-th of so many
  bool force = false;               // see OutputLock
  std::vector<std::string> sources;
  std::string manifest;  // JSON: all that makes the result what it is, but for the shard
  std::function<bool()> interrupted = {};
  // Bases or samples done, of all that this run has to do; from the caller's thread.
  std::function<void(int64_t done, int64_t all)> progress = {};
};

struct BatchDone {
  bool stood = false;            // it was whole already
  bool interrupted = false;      // parts are kept, there is no result yet
  int64_t found = 0, parts = 0;  // parts that were there, all of the shard
};

// One of `backends` works on one part at a time: several of a CPU, of one thread each.
BatchDone batch(const std::vector<Backend*>& backends, const Model& model,
                std::shared_ptr<const Dataset> dataset, const BatchWork& work);

// What columns the results of a task have.
ResultsAbout results_about(Task task, const Config& config, bool per_position, Pooling pooling,
                           const std::string& layer);
// Computes all units of a source; `some` is called between additions and may take what there is: a
// unit's positions may stand in several parts, before its name.
void compute_results(Backend& backend, const Model& model, Source& source, const BatchWork& work,
                     ResultPart& part, const std::function<void()>& some,
                     const std::function<void(const Stream&)>& progress);

}  // namespace coil
