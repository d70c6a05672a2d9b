// Makes a dataset (pipelines/hdf5_dataset.h) of a stream of records. Codes are cut into chunks,
// deflated on all threads and written in parts of a fixed number of chunks (pipelines/parts.h);
// when the input has ended the parts are put together, chunk by chunk as they are. Begun again
// after a kill it reads on from the last file that begins in a finished part, and holds what it
// reads again against the checksums of the parts. Memory: about three parts, whatever the length of
// a record.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "pipelines/hdf5_dataset.h"
#include "pipelines/parts.h"

namespace coil {

// What is known of a record beside its codes and name.
struct Facts {
  std::string label;  // "": none
  int8_t split = -1;  // index into BuildInput::splits
};

struct BuildInput {
  CodesOf what;
  std::vector<std::string> sources;  // files whose size and checksum are kept; "-" has none
  std::vector<std::string> splits;   // names
  // The records from the first one of file `first` on. Segment::file counts from the first of all.
  std::function<std::unique_ptr<Source>(int64_t first)> open;
  std::function<Facts(const Segment&)> facts;  // of the record that begins with this segment
};

struct BuildOptions {
  std::string out;
  std::string how = "{}";  // JSON: the options that make the result what it is
  bool deflate = true;
  int64_t part = 32 << 20;  // bytes of codes in a part: what a kill can cost
  int threads = 0;          // 0: all
  bool force = false;       // see OutputLock
  std::function<void(const std::string&)> note = {};
  std::function<void(int64_t size, double fraction)> progress = {};  // codes read so far
};

struct BuildResult {
  bool stood = false;     // it was there already, made of the same input with the same options
  int64_t continued = 0;  // parts that were there
};

// Throws what the input throws; and where `out` exists or was begun with other input or options,
// where another process writes it, on a full disk: what is finished stays and the next run goes on.
BuildResult build_dataset(const BuildInput& input, const BuildOptions& options);

// Split by group: the same group, wherever it stands, falls into the same split, with a chance of
// each split's share. Adding records moves no other one.
int8_t draw_split(const std::string& group, const std::vector<double>& shares, uint64_t seed);

// What parts hold beside values, see hdf5_build.cc.
struct PartAbout {
  int64_t first = 0, size = 0;  // bases or samples before it, in it
  int64_t records = 0, longest_name = 0;
  std::vector<std::string> labels;          // seen first in it, in the order of their numbers
  std::vector<std::vector<int64_t>> files;  // begun in it: file, bases or samples before it
  bool last = false;
};
std::string to_json(const PartAbout& about);
PartAbout parse_about(const std::string& text);

// Parts 0 … count-1, the last one being the last, as the file `out`.
void assemble_dataset(const BuildInput& input, const BuildOptions& options, const PartStore& parts,
                      int64_t count, const std::vector<int64_t>& bytes,
                      const std::vector<uint32_t>& sums);
// The manifest of parts; without the times and the size of parts, that of the dataset.
std::string manifest_of(const BuildInput& input, const BuildOptions& options, bool of_parts);
// Throws unless the file `out` is what this input and these options make.
void check_stands(const BuildOptions& options, const std::string& manifest,
                  const std::vector<uint32_t>& sums);

}  // namespace coil
