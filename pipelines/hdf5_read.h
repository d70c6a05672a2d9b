// Datasets as the rest of the program reads records: a stream, or all in memory; and windows in
// random order. Chunks are fetched under HDF5's lock, inflated outside of it on all threads, ahead
// of the reader.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "pipelines/hdf5_dataset.h"

namespace coil {

struct DatasetReading {
  std::string split;                // of this split alone; "": all records
  bool labelled = false;            // a record without a label is an error
  int32_t label = -1;               // of all records, where it is not their own that counts
  std::vector<std::string> labels;  // of a model: another one is an error; empty: the dataset's
  int64_t most = 0;                 // records, the first ones; 0: all
  int64_t first = 0, end = -1;      // records of the dataset, of which none may be wanted; -1: all
  int threads = 0;                  // 0: all
  int64_t memory = 16 << 20;        // bytes of chunks read ahead, at most
};

// Chunks in an order that is added to as it becomes known.
class ChunkReader {
 public:
  ChunkReader(const Dataset& dataset, const DatasetReading& options);
  ~ChunkReader();
  void push(std::span<const int64_t> chunks);
  // The next one, as it lies in the dataset, until the call after; throws where it is damaged.
  const std::vector<uint8_t>& next();

 private:
  struct Slot {
    std::vector<uint8_t> raw;
    std::exception_ptr error;
    bool ready = false;
  };
  void work();
  const Dataset& dataset_;
  std::vector<Slot> ring_;
  std::mutex mutex_;
  std::condition_variable wanted_, ready_;
  std::deque<int64_t> order_;            // of the chunks not yet begun
  size_t begun_ = 0, taken_ = 0;         // counts; taken_: chunks handed out and done with
  bool holding_ = false, stop_ = false;  // holding_: the caller has one
  std::vector<std::thread> threads_;     // last: they use all of the above
};

// Segment::label is an index into options.labels, or into the dataset's classes; -1 where there is
// none or none is known. Memory: options.memory and what is known of 16 k records.
std::unique_ptr<Source> open_dataset(std::shared_ptr<const Dataset> dataset,
                                     const DatasetReading& options);
// Whether all of `paths` are datasets; throws where some are and some are not.
bool are_datasets(const std::vector<std::string>& paths);
// Throws unless it holds what is expected; `who` reads that: "'model'", "the preset dna-small".
void check_holds(const Dataset& dataset, const CodesOf& expected, const std::string& who);
// One item per record; labels: those of the options, else the classes of all datasets where
// `labelled`.
Examples read_datasets(const std::vector<std::shared_ptr<const Dataset>>& datasets,
                       const DatasetReading& options);

// Windows at arbitrary places in random order, each chunk inflated once per pass: blocks of sixteen
// chunks are shuffled, and the windows of as many blocks as half the memory holds. Within a block
// each record is tiled from a random place on; where blocks begin is drawn anew for every pass, so
// that in time every window comes. Records shorter than a window come whole, where a block holds
// them. The same seed and pass, the same windows.
class ShuffledWindows {
 public:
  ShuffledWindows(const Dataset& dataset, int64_t window, uint64_t seed, int64_t pass,
                  const DatasetReading& options);
  struct Window {
    int64_t record = 0, begin = 0, length = 0;  // in bases or samples, from the record's begin
    std::span<const uint8_t> bytes;             // as stored, until the next call
  };
  bool next(Window& window);

 private:
  bool fill();
  struct Place {
    int64_t record, begin, length, at;  // at: bytes in memory_
  };
  const Dataset& dataset_;
  const int64_t window_;
  const uint64_t seed_;
  const int64_t pass_;
  std::vector<int64_t> offsets_;
  struct Block {
    int64_t begin, end;  // chunks
  };
  std::vector<Block> blocks_;  // shuffled
  size_t next_block_ = 0, together_ = 1;
  std::vector<uint8_t> memory_;
  std::vector<Place> places_;
  size_t place_ = 0;
  ChunkReader chunks_;
};

}  // namespace coil
