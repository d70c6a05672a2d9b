#include "genomics/dataset.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "genomics/labelled.h"
#include "kernels/error.h"

namespace coil {
namespace {

class Reader {
 public:
  Reader(const std::vector<std::string>& paths, const DatasetOptions& options)
      : options_(options),
        source_(paths, {.labelling = options.labelled ? Labelling::all : Labelling::none,
                        .sequence_column = options.sequence_column,
                        .label_column = options.label_column,
                        .target_column = options.target_column,
                        .alphabet = options.alphabet,
                        .table = options.table,
                        .known = options.labels}) {}

  Examples read() {
    std::vector<uint8_t> codes, targets;
    for (Segment segment; source_.next(segment);) {
      if (segment.first) all_.names.push_back(segment.name);
      codes.insert(codes.end(), segment.codes.begin(), segment.codes.end());
      targets.insert(targets.end(), segment.targets.begin(), segment.targets.end());
      if (!segment.last) continue;
      codes.shrink_to_fit();
      all_.codes.push_back(std::exchange(codes, {}));
      if (!options_.target_column.empty()) all_.targets.push_back(std::exchange(targets, {}));
      label_of_.push_back(segment.label);
    }
    check(!all_.codes.empty(), "no records in the data given");
    if (options_.labelled) {
      all_.labels = source_.labels();
      if (options_.labels.empty()) order_labels();
    }
    for (size_t record = 0; record < all_.codes.size(); ++record) tile(record);
    if (options_.labelled && options_.labels.empty()) check_classes();
    return std::move(all_);
  }

 private:
  void order_labels() {
    const std::vector<std::string> found = all_.labels;
    sort_labels(all_.labels);
    std::vector<int32_t> place;
    for (const std::string& label : found)
      place.push_back(static_cast<int32_t>(
          std::find(all_.labels.begin(), all_.labels.end(), label) - all_.labels.begin()));
    for (int32_t& label : label_of_) label = place[label];
  }

  void tile(size_t record) {
    const auto length = static_cast<int64_t>(all_.codes[record].size());
    const int64_t step = options_.max_length > 0 ? options_.max_length : length;
    const int64_t shortest = options_.min_length > 0 ? options_.min_length : step;
    for (int64_t begin = 0; begin < length; begin += step) {
      const int64_t size = std::min(step, length - begin);
      if (begin > 0 && size < shortest) break;
      all_.items.push_back({static_cast<int64_t>(record), begin, size, label_of_[record]});
    }
  }

  void check_classes() const {
    const std::vector<std::string>& labels = all_.labels;
    check(labels.size() > 1, "only one class, '{}', in the data given; a classifier needs two",
          labels[0]);
    std::vector<int64_t> counts(labels.size());
    for (const Example& item : all_.items) ++counts[item.label];
    for (size_t i = 0; i < counts.size(); ++i)
      check(counts[i] > 1, "class '{}' is seen once; at least two examples of a class are needed",
            labels[i]);
  }

  const DatasetOptions& options_;
  LabelledSource source_;
  Examples all_;
  std::vector<int32_t> label_of_;  // of the records
};

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a fixed order keyed by (seed, item).
uint64_t mix(uint64_t seed, uint64_t item) {
  uint64_t z = seed + (item + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Gives every held-out item and every stretch of training items between them a record of its own.
void cut_records(Examples& all, const std::vector<bool>& held) {
  std::vector<std::vector<uint8_t>> codes, targets;
  std::vector<std::string> names;
  for (size_t i = 0; i < all.items.size();) {
    const int64_t record = all.items[i].record;
    size_t end = i + 1;
    bool cut = held[i];
    for (; end < all.items.size() && all.items[end].record == record; ++end) cut |= held[end];
    std::vector<uint8_t> whole = std::move(all.codes[record]), whole_targets;
    if (!all.targets.empty()) whole_targets = std::move(all.targets[record]);
    if (!cut || end == i + 1) {
      for (size_t k = i; k < end; ++k) all.items[k].record = static_cast<int64_t>(codes.size());
      codes.push_back(std::move(whole));
      targets.push_back(std::move(whole_targets));
      names.push_back(all.names[record]);
      i = end;
      continue;
    }
    while (i < end) {
      size_t stop = i + 1;
      while (!held[i] && stop < end && !held[stop]) ++stop;
      const int64_t begin = all.items[i].begin;
      const int64_t past = all.items[stop - 1].begin + all.items[stop - 1].length;
      for (; i < stop; ++i) {
        all.items[i].record = static_cast<int64_t>(codes.size());
        all.items[i].begin -= begin;
      }
      codes.emplace_back(whole.begin() + begin, whole.begin() + past);
      targets.emplace_back();
      if (!whole_targets.empty())
        targets.back().assign(whole_targets.begin() + begin, whole_targets.begin() + past);
      names.push_back(all.names[record]);
    }
  }
  all.codes = std::move(codes);
  if (!all.targets.empty()) all.targets = std::move(targets);
  all.names = std::move(names);
}

}  // namespace

Examples read_examples(const std::vector<std::string>& paths, const DatasetOptions& options) {
  check(options.max_length == 0 || options.min_length <= options.max_length,
        "the shortest window ({}) is longer than the longest ({})", options.min_length,
        options.max_length);
  return Reader(paths, options).read();
}

void split(Examples& all, double fraction, uint64_t seed, std::vector<Example>& train,
           std::vector<Example>& held_out) {
  check(fraction >= 0 && fraction < 1,
        "a validation fraction of 0 or more and below 1 was expected, not {}", fraction);
  std::vector<std::vector<size_t>> classes(std::max<size_t>(1, all.labels.size()));
  for (size_t i = 0; i < all.items.size(); ++i)
    classes[std::max(0, all.items[i].label)].push_back(i);
  std::vector<bool> held(all.items.size());
  for (std::vector<size_t>& items : classes) {
    std::sort(items.begin(), items.end(),
              [&](size_t a, size_t b) { return mix(seed, a) < mix(seed, b); });
    const auto n = static_cast<int64_t>(items.size());
    const int64_t wanted =
        fraction > 0 ? std::max<int64_t>(1, std::llround(fraction * static_cast<double>(n))) : 0;
    for (int64_t i = 0; i < std::min(wanted, n - 1); ++i) held[items[i]] = true;
  }
  cut_records(all, held);
  train.clear();
  held_out.clear();
  for (size_t i = 0; i < held.size(); ++i) (held[i] ? held_out : train).push_back(all.items[i]);
}

Example draw_window(const Examples& all, const Example& item, int64_t min_length,
                    int64_t max_length, uint64_t random_length, uint64_t random_begin) {
  if (max_length <= 0) return item;
  const auto whole = static_cast<int64_t>(all.codes[item.record].size());
  const auto low = static_cast<double>(min_length > 0 ? min_length : max_length);
  const double uniform = static_cast<double>(random_length >> 11) * 0x1p-53;
  const auto drawn =
      static_cast<int64_t>(low * std::pow(static_cast<double>(max_length + 1) / low, uniform));
  Example window = item;
  window.length = std::min(std::clamp(drawn, static_cast<int64_t>(low), max_length), whole);
  const auto places = static_cast<unsigned __int128>(whole - window.length + 1);
  window.begin = static_cast<int64_t>((places * random_begin) >> 64);
  return window;
}

}  // namespace coil
