// Schema "coil results", version 1: what a model says of records or windows, one after another.
//   names           (n)          text
//   starts, ends    (n)          int64: bases or samples, 0-based, half open, in the sequence named
// task "classify"
//   probabilities   (n, classes) float32, of both strands averaged; classes: text
//   labels          (n)          int32: index into classes, -1 unknown
// task "score"
//   log_likelihood  (n)          float64, nats; counted (n) float64: bases or samples it is of
//   and per position  log_likelihoods (positions) float32: nats, NaN where it is not counted
// task "embed"
//   vectors         (n, d)       float32, or (positions, d)
// per position also
//   position_offsets (n + 1)     int64: those of unit i are position_offsets[i] … [i + 1]
// Attributes: schema, version, creator, task; of embed layer and pooling ("mean", "last", "none").
// parts_first, parts_end, parts_all: which parts of the work it holds. sources/path: model and
// input; sources/manifest: all that makes the result what it is, as JSON. docs/hdf5.md.
#pragma once

#include <string>
#include <vector>

#include "pipelines/hdf5_reader.h"
#include "pipelines/hdf5_writer.h"
#include "pipelines/parts.h"

namespace coil {

constexpr const char* kResultsSchema = "coil results";
constexpr int64_t kResultsVersion = 1;

struct ResultColumn {
  std::string name;
  hdf5::Type type = hdf5::Type::f32;
  int64_t columns = 0;  // 0: one dimension
  bool of_positions = false;
};

struct ResultsAbout {
  std::string task;
  std::vector<ResultColumn> columns;  // beside names, starts and ends
  std::vector<std::string> classes;   // of classify
  std::string layer, pooling;         // of embed
  std::vector<std::string> sources;
  std::string manifest;
  int64_t parts_first = 0, parts_end = 0, parts_all = 0;
  bool per_position() const;
};

// Units that have been computed, on their way into a file: columns by name, and
//   starts, ends, positions (units)  int64: positions: how many, where they have values
//   names, name_bytes                of all units: texts without a gap (pipelines/utf8.h), and
//                                    their lengths (uint32)
class ResultPart {
 public:
  void unit(const std::string& name, int64_t start, int64_t end, int64_t positions = 0);
  template <class T>
  void add(const std::string& column, const T* from, size_t count) {
    part_.add(column, from, count);
  }
  int64_t units() const { return units_; }
  int64_t bytes() const;
  Part take();  // with its counts in Part::about; empty afterwards

 private:
  Part part_;
  int64_t units_ = 0, positions_ = 0, longest_ = 1;
};

// Parts parts_first … parts_end - 1 of a store as the file `out`. Throws where one is missing.
void assemble_results(const std::string& out, const ResultsAbout& about, const PartStore& parts);

bool is_results(const std::string& path);
ResultsAbout read_results_about(const hdf5::Reader& file);  // throws on another schema or version
// Results of the shards of one work, in any order, as those of all of it. Throws where they are of
// different works, naming what differs, or where some are missing.
void merge_results(const std::string& out, const std::vector<std::string>& paths);

}  // namespace coil
