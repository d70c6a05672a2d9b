// What a front end (DNA, audio) hands to the rest: token codes of records, run by run, in input
// order. The only header of model/ that genomics/ and audio/ include.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <string>
#include <vector>

namespace coil {

// A run of consecutive codes of one record. A record of any length arrives as one or more of them,
// at most Source::kRun codes each, so that no record is ever held whole.
struct Segment {
  int64_t record = 0;  // 0, 1, …: counts the records of the source in input order
  int64_t file = 0;    // which of the source's inputs it stands in, from 0
  int64_t position =
      0;  // of codes[0] in the record as named (a region chr1:1,001-… starts at 0 here)
  int64_t offset =
      0;  // added to positions in output: where the region begins in its sequence, from 0
  bool first = false;            // the record begins here: name is set
  bool last = false;             // the record ends here
  std::string name;              // set where `first`
  int32_t label = -1;            // likewise: its class, where the reader knows it
  int8_t split = -1;             // likewise, of a dataset: training, validation, …
  std::vector<uint8_t> codes;    // token ids; at least 1
  std::vector<uint8_t> targets;  // as many, of a table's column of targets; or none
};

constexpr uint8_t kUncounted = 255;  // a target that does not count

// One of the program's two virtual classes: a stream of records. Throws coil::Error on bad input.
class Source {
 public:
  static constexpr int64_t kRun = 1 << 16;
  virtual ~Source() = default;
  virtual bool next(Segment& segment) = 0;  // false at the end of the input
  // Share of the input read so far, 0 … 1, for a progress line; negative where the size is not
  // known.
  virtual double fraction() const { return -1; }
};

// How a sample of audio becomes codes (audio/codes.h): one of mu-law, or two, the high and the low
// byte of 16-bit PCM.
enum class SampleCodes : uint8_t { mulaw, pcm16 };

// A labelled set held in memory for training and evaluation: records of codes, and the examples cut
// from them.
struct Example {
  int64_t record = 0, begin = 0, length = 0;  // codes[record][begin, begin+length)
  int32_t label = -1;                         // index into labels; -1: none
};
struct Examples {
  std::vector<std::vector<uint8_t>> codes;
  std::vector<std::vector<uint8_t>> targets;  // where the data has them: as long, place by place
  std::vector<std::string> names;             // of the records
  std::vector<std::string> labels;            // class names, sorted; empty for language modelling
  std::vector<Example> items;
};

// The order of class names: by value where all are whole numbers.
inline void sort_labels(std::vector<std::string>& labels) {
  const auto number = [](const std::string& text, int64_t& value) {
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    return error == std::errc() && stop == end && !text.empty();
  };
  int64_t value, other;
  const bool numbers = std::all_of(labels.begin(), labels.end(),
                                   [&](const std::string& x) { return number(x, value); });
  std::sort(labels.begin(), labels.end(), [&](const std::string& x, const std::string& y) {
    if (numbers && number(x, value) && number(y, other) && value != other) return value < other;
    return x < y;
  });
}

}  // namespace coil
