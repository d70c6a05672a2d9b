// Records that stream in become ragged batches for a model, and answers come back in input order.
//
//   Stream stream(source, options, k);  std::vector<Batch> batches(k);  Unit unit;
//   while (int n = stream.next(batches)) {
//     compute batches 0 … n-1;  add to batch.units[i]->values;  while (stream.pop(unit)) write; }
//
// A unit is what gets one answer: a record, or a window of one. It is read as one or two sequences
// (strands), and where asked, excerpts of it are, each on its own. Each turn fills up to k batches
// of `batch` rows with the open sequences in order of their begin, at most `chunk` steps of each: a
// long record moves on chunk by chunk with its state in a slot, many short ones share a batch.
// Every piece reads one slot and writes another, so that a batch that failed can be computed again.
// What the batches hold is a function of input, options and k only, never of time.
//
// Memory is bounded whatever the input: a record that comes in several segments is never held. For
// its forward strand alone it is read as it arrives. For both strands, the reverse one, or
// excerpts, a Spill takes 2 bits a base, and the sequences begin when the record has ended, so that
// they are computed side by side. A window is held whole, one byte a base. Answers wait for those
// before them, at most kWindow of them.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "genomics/spill.h"
#include "kernels/tensor.h"
#include "model/batch.h"
#include "model/config.h"
#include "pipelines/front_end.h"

namespace coil {

using Note = std::function<void(const std::string&)>;  // a line for a person

enum class Strands : uint8_t { both, forward, reverse };
Strands parse_strands(const std::string& text);  // throws UsageError

struct StreamOptions {
  Strands strands = Strands::both;
  int64_t window = 0;  // bases or samples; 0: one unit per record
  int64_t stride = 0;  // 0: the window
  int64_t batch = 0;   // rows of a batch; 0: auto_batch
  int64_t chunk = 0;   // most steps of one sequence in a batch; 0: the batch
  // Of DNA: of units that are longer, excerpts of so many bases, end to end, are read as well, each
  // on its own; of units of more than kExcerpts every second, third, …; not those that are N by
  // more than half. They are held when their unit has ended: at most Source::kRun. 0: none.
  int64_t excerpt = 0;
  // Of a bidirectional model: records and windows are never cut, and are at most so long; 0: cut as
  // they must.
  int64_t whole = 0;
  // Told, once, where memory makes batches smaller than they would be.
  const Note* note = nullptr;
};
// Throws where a sequence that is read whole is longer than `limit`.
void check_whole(int64_t length, int64_t limit, const std::string& name);
// A function of the network and the kind of device alone. CPU: rows whose activations in one layer
// stay in the cache. GPU: rows that fill it, within 2 GB.
int64_t auto_batch(const Config& config, Device device);

class Stream {
 public:
  static constexpr int64_t kWindow = 4096;   // units begun and not yet popped
  static constexpr int64_t kSlots = 256;     // of states: twice the most sequences carried at once
  static constexpr int64_t kExcerpts = 256;  // of a unit

  struct Unit {
    int64_t record = 0, file = 0;
    std::string name;    // of the record
    int32_t label = -1;  // likewise, where the source knows it
    // 0-based, half open, Segment::offset added; fresh: of that, what no earlier window of the
    // record held. Codes until the unit is popped, then bases or samples.
    int64_t begin = 0, end = -1, fresh = 0;
    int strands = 0;               // sequences
    std::vector<double> values;    // of whoever computes
    std::vector<double> excerpts;  // likewise, of its excerpts
    std::string text;              // likewise
    int64_t length() const { return end - begin; }

   private:
    friend class Stream;
    int pending = 0;               // sequences not yet at their end
    std::unique_ptr<Spill> spill;  // of a record in several segments, unless only read forward
  };
  struct Batch {
    std::vector<Piece> pieces;
    std::vector<Unit*> units;   // per piece
    std::vector<bool> excerpt;  // per piece: of an excerpt of the unit
    std::vector<int32_t> ids;   // per row: the token
    std::vector<int32_t> next;  // per row: the token after it in its sequence, -1 at the end
  };

  // options.batch resolved. Positions of pieces count tokens, those before the first code too.
  Stream(Source& source, const StreamOptions& options, int parallel = 1,
         const FrontEnd& front = FrontEnd());
  ~Stream();
  // Fills batches from the first on and returns how many hold something; 0: all is read and
  // computed. Batches of one turn share no sequence, so they can be computed at once, with one
  // State.
  int next(std::vector<Batch>& batches);
  bool pop(Unit& unit);  // the next unit in input order, once its last piece was in a batch
  Unit* front() { return units_.empty() ? nullptr : &units_.front(); }
  int32_t slots() const { return slots_; }  // rows of the State that the batches refer to
  int64_t steps() const { return steps_; }  // handed out so far
  // Share of the whole input computed, 0 … 1, as far as it can be told; negative where it cannot.
  double fraction() const;

 private:
  struct Sequence;
  bool read();
  bool cut_window();
  Unit& begin_unit(const Segment& segment);
  Sequence& begin_sequence(Unit& unit, bool reverse);
  void hold(Unit& unit, std::vector<uint8_t> codes);
  bool reads(bool reverse) const {
    return options_.strands != (reverse ? Strands::forward : Strands::reverse);
  }
  void begin_strands(Unit& unit, std::vector<uint8_t> codes, bool excerpt);
  void begin_excerpts(Unit& unit, const std::function<std::vector<uint8_t>(int64_t)>& codes_from);
  void end_open();
  int64_t prepare(Sequence& sequence, int64_t want);
  bool fill(Batch& batch, size_t& i);
  int32_t token(const Sequence& sequence, int64_t position) const;

  Source& source_;
  StreamOptions options_;  // window and stride in codes
  FrontEnd front_;
  int32_t slots_ = 0;
  int64_t steps_ = 0, promised_ = 0;  // handed out; of all that was read
  bool exhausted_ = false;
  std::deque<Unit> units_;                         // in input order
  std::vector<std::unique_ptr<Sequence>> active_;  // in order of their begin
  std::vector<int32_t> free_, released_;           // slots; released ones are free after the batch
  int32_t carried_ = 0;                            // sequences whose state stands in a slot
  Unit* open_ = nullptr;                           // the record being read, if it is not held
  Sequence* open_forward_ = nullptr;
  int64_t open_length_ = 0;
  // Windows: the part of the current record that the next ones need.
  std::vector<uint8_t> rolling_;
  Segment head_;  // of the current record, without codes
  int64_t rolling_begin_ = 0, next_window_ = 0, answered_ = 0;
  bool rolling_ended_ = true;
};

// Several inputs as one stream, opened one after another; `open` gives the source of input i.
// Records and files are counted through.
std::unique_ptr<Source> chain(size_t count, std::function<std::unique_ptr<Source>(size_t)> open);

}  // namespace coil
