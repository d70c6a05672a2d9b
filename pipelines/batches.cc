// Partition, windows, shuffling, augmentation: see batches.h.

#include "pipelines/batches.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>

#include "genomics/alphabet.h"
#include "genomics/dataset.h"
#include "kernels/error.h"
#include "model/params.h"
#include "pipelines/hash.h"

namespace coil {
namespace {

// Streams of random numbers; the network's initialisation uses others.
constexpr uint32_t kOrderStream = 101, kDrawStream = 102, kAugmentStream = 103,
                   kHoldOutStream = 104, kCutStream = 105, kHoldOutNameStream = 106,
                   kMaskStream = 107;
// A record is held out in part if a tenth of it still gives several windows, else as a whole.
constexpr int64_t kStretchWindows = 20;
constexpr int kTries = 16;  // draws before a window that is mostly N is taken all the same

int64_t draw_length(int64_t shortest, int64_t longest, Philox& random) {
  const double low = std::log(static_cast<double>(shortest));
  const double high = std::log(static_cast<double>(longest) + 1);
  const auto length = static_cast<int64_t>(std::exp(low + (high - low) * random.uniform()));
  return std::clamp(length, shortest, longest);
}

}  // namespace

std::vector<Example> whole_records(const Examples& all) {
  std::vector<Example> records;
  int64_t last = -1;
  for (const Example& item : all.items) {  // items of one record stand together
    if (item.record == last) continue;
    last = item.record;
    records.push_back({.record = item.record,
                       .begin = 0,
                       .length = static_cast<int64_t>(all.codes[item.record].size()),
                       .label = item.label});
  }
  return records;
}

std::vector<Example> cut_windows(std::span<const Example> stretches, int64_t min_length,
                                 int64_t max_length, uint64_t seed, int64_t step) {
  std::vector<Example> windows;
  Philox random(seed, kCutStream, 0);
  for (const Example& stretch : stretches) {
    const int64_t end = stretch.begin + stretch.length;
    int64_t at = stretch.begin;
    do {  // a stretch shorter than a window is one
      const int64_t length = std::min(end - at, step * draw_length(min_length, max_length, random));
      windows.push_back({stretch.record, at, length, stretch.label});
      at += length;
    } while (end - at >= step * min_length);
  }
  return windows;
}

Partition partition(Examples& all, double fraction, int64_t min_length, int64_t max_length,
                    uint64_t seed) {
  Partition parts;
  if (max_length == 0) {
    if (fraction > 0)
      split(all, fraction, seed, parts.train, parts.held_out);
    else
      parts.train = all.items;
    return parts;
  }
  const std::vector<Example> records = whole_records(all);
  if (fraction <= 0) {
    parts.train = records;
    return parts;
  }
  std::vector<Example> held_out, brief;
  for (const Example& record : records) {
    if (record.length < kStretchWindows * max_length) {
      brief.push_back(record);
      continue;
    }
    const auto length = static_cast<int64_t>(fraction * static_cast<double>(record.length));
    Philox random(seed, kHoldOutStream, static_cast<uint64_t>(record.record));
    const auto begin = static_cast<int64_t>(random.below(record.length - length + 1));
    const int64_t end = begin + length;
    held_out.push_back({record.record, begin, length, record.label});
    if (begin >= min_length) parts.train.push_back({record.record, 0, begin, record.label});
    if (record.length - end >= min_length)
      parts.train.push_back({record.record, end, record.length - end, record.label});
  }
  // Short records (contigs, reads) beside long ones of the same class go to training; where a class
  // has none that is long, they are split by record.
  std::map<int32_t, std::vector<Example>> by_class;
  for (const Example& record : brief) by_class[record.label].push_back(record);
  for (auto& [label, group] : by_class) {
    const bool covered = std::any_of(held_out.begin(), held_out.end(),
                                     [&, l = label](const Example& e) { return e.label == l; });
    const auto every = static_cast<size_t>(std::max(2.0, std::round(1 / fraction)));
    Philox random(seed, kHoldOutStream, (uint64_t{1} << 40) + static_cast<uint32_t>(label + 1));
    for (size_t i = group.size(); i > 1; --i) std::swap(group[i - 1], group[random.below(i)]);
    for (size_t i = 0; i < group.size(); ++i) {
      const bool out = !covered && i % every == every - 1;
      (out ? held_out : parts.train).push_back(group[i]);
    }
  }
  parts.held_out = cut_windows(held_out, min_length, max_length, seed);
  return parts;
}

Partition partition_records(const Examples& all, double fraction, int64_t min_length,
                            int64_t max_length, int64_t step, uint64_t seed) {
  struct Drawn {
    uint64_t number;
    Example record;
  };
  std::map<int32_t, std::vector<Drawn>> by_class;
  for (const Example& record : whole_records(all)) {
    const std::string& name = all.names[record.record];
    const uint64_t hash = hash_bytes(name.data(), name.size());
    Philox random(seed, kHoldOutNameStream, hash);
    by_class[record.label].push_back({random.next(), record});
  }
  Partition parts;
  for (auto& [label, group] : by_class) {
    std::stable_sort(group.begin(), group.end(),
                     [](const Drawn& a, const Drawn& b) { return a.number < b.number; });
    const auto n = static_cast<int64_t>(group.size());
    const int64_t wanted =
        fraction > 0 ? std::max<int64_t>(1, std::llround(fraction * static_cast<double>(n))) : 0;
    for (int64_t i = 0; i < n; ++i)
      (i < std::min(wanted, n - 1) ? parts.held_out : parts.train).push_back(group[i].record);
  }
  const auto in_order = [](const Example& a, const Example& b) { return a.record < b.record; };
  std::sort(parts.train.begin(), parts.train.end(), in_order);
  std::sort(parts.held_out.begin(), parts.held_out.end(), in_order);
  if (max_length > 0)
    parts.held_out = cut_windows(parts.held_out, min_length, max_length, seed, step);
  return parts;
}

std::vector<Example> thin(std::vector<Example> items, int64_t tokens) {
  int64_t total = 0;
  for (const Example& item : items) total += item.length;
  if (tokens == 0 || total <= tokens) return items;
  // Every k-th, with k a fraction: error diffusion keeps the spacing even through all classes.
  const double keep = static_cast<double>(tokens) / static_cast<double>(total);
  std::vector<Example> kept;
  double due = 0.5;
  for (const Example& item : items) {
    due += keep;
    if (due < 1) continue;
    due -= 1;
    kept.push_back(item);
  }
  return kept;
}

void Batch::add(std::span<const uint8_t> codes, int32_t label, Objective objective,
                const FrontEnd& front, int64_t context) {
  const auto begin = static_cast<int64_t>(ids.size());
  const size_t before = targets.size();
  front.append(codes, context, label, ids, targets);
  pieces.push_back({.begin = begin, .length = static_cast<int64_t>(ids.size()) - begin});
  this->codes += static_cast<int64_t>(codes.size()) - context;
  if (objective == Objective::lm) return;
  targets.resize(before);
  targets.push_back(label);
}

void Batch::add_strand(std::span<const uint8_t> codes, const FrontEnd& front) {
  const auto begin = static_cast<int64_t>(ids.size());
  std::vector<int32_t> next;
  front.append(codes, 0, -1, ids, next);
  pieces.push_back({.begin = begin, .length = static_cast<int64_t>(ids.size()) - begin});
}

void Batch::add(std::span<const uint8_t> codes, std::span<const uint8_t> places,
                const FrontEnd& front) {
  const auto begin = static_cast<int64_t>(ids.size());
  front.append(codes, places, ids, targets);
  pieces.push_back({.begin = begin, .length = std::ssize(codes)});
  this->codes += std::ssize(codes);
}

Batches::Batches(const Examples& all, std::vector<Example> train, const BatchOptions& options)
    : all_(all), train_(std::move(train)), options_(options) {
  for (const Example& item : train_) tokens_ += item.length;
  if (options_.max_length == 0) {
    for (const Example& item : train_)
      if (item.length > options_.batch_tokens)
        throw Error(fmt::format("record '{}' has {} {}s, more than a batch of {} holds",
                                all_.names[item.record], item.length / options_.front.step(),
                                options_.front.unit(), options_.batch_tokens),
                    "cut windows with --max-length, or raise --batch-tokens");
    return;
  }
  if (options_.max_length * options_.front.step() > options_.batch_tokens)
    throw Error(fmt::format("--max-length {} is more than a batch of {} tokens holds",
                            options_.max_length, options_.batch_tokens),
                "raise --batch-tokens");
  std::map<int32_t, Pool> pools;
  for (const Example& item : train_) {
    Pool& pool = pools[item.label];
    pool.stretches.push_back(item);
    pool.ends.push_back((pool.ends.empty() ? 0 : pool.ends.back()) + item.length);
  }
  for (auto& [label, pool] : pools) pools_.push_back(std::move(pool));
}

Batch Batches::draw(int64_t step) {
  Batch batch;
  if (options_.max_length == 0)
    draw_records(step, batch);
  else
    draw_windows(step, batch);
  batch.epoch = epoch;
  batch.next = next;
  return batch;
}

int64_t Batches::longest(int64_t step) const {
  double epochs = 0;
  for (const auto& [length, more] : options_.lengths) {
    epochs += more;
    const double batches =
        epochs * static_cast<double>(tokens_) / static_cast<double>(options_.batch_tokens);
    if (more == 0 || static_cast<double>(step) <= std::ceil(batches)) return length;
  }
  return options_.lengths.empty() ? options_.max_length : options_.lengths.back().first;
}

void Batches::draw_records(int64_t step, Batch& batch) {
  Draws draws = this->draws(step);
  while (true) {
    if (next == static_cast<int64_t>(train_.size())) {
      next = 0;
      ++epoch;
    }
    if (order_epoch_ != epoch) {
      order_.resize(train_.size());
      std::iota(order_.begin(), order_.end(), int64_t{0});
      Philox random(options_.seed, kOrderStream, static_cast<uint64_t>(epoch));
      for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random.below(i)]);
      order_epoch_ = epoch;
    }
    const Example& item = train_[order_[next]];
    if (batch.codes + item.length > options_.batch_tokens) return;
    add(batch, item, draws);
    ++next;
  }
}

void Batches::draw_windows(int64_t step, Batch& batch) const {
  const int64_t unit = options_.front.step();  // codes of a base or sample: windows hold whole ones
  Philox random(options_.seed, kDrawStream, static_cast<uint64_t>(step));
  Draws draws = this->draws(step);
  const int64_t longest = this->longest(step), shortest = std::min(options_.min_length, longest);
  while (true) {
    const Pool& pool = pools_[random.below(pools_.size())];
    Example window;
    for (int i = 0; i < kTries; ++i) {
      const auto at = static_cast<int64_t>(random.below(pool.ends.back()));
      const size_t which =
          std::upper_bound(pool.ends.begin(), pool.ends.end(), at) - pool.ends.begin();
      const Example& stretch = pool.stretches[which];
      const int64_t drawn = draw_length(shortest, longest, random);
      const int64_t length = std::min(stretch.length, unit * drawn);
      const auto places = static_cast<uint64_t>((stretch.length - length) / unit + 1);
      window = {stretch.record, stretch.begin + unit * static_cast<int64_t>(random.below(places)),
                length, stretch.label};
      if (!options_.front.dna()) break;
      const auto from = all_.codes[window.record].begin() + window.begin;
      if (2 * std::count(from, from + length, dna::kN) <= length) break;
    }
    const int64_t left = (options_.batch_tokens - batch.codes) / unit * unit;
    if (window.length > left) {  // cut to fit, or the batch is full
      if (left < unit * shortest) return;
      window.length = left;
    }
    add(batch, window, draws);
    if (batch.codes + unit > options_.batch_tokens) return;
  }
}

Batches::Draws Batches::draws(int64_t step) const {
  const auto at = static_cast<uint64_t>(step);
  return {.augment = Philox(options_.seed, kAugmentStream, at),
          .mask = Philox(options_.seed, kMaskStream, at)};
}

void Batches::add(Batch& batch, const Example& item, Draws& draws) const {
  Philox& random = draws.augment;
  const int64_t context = options_.front.context(item);
  const auto from = all_.codes[item.record].begin() + item.begin;
  std::vector<uint8_t> codes(from - context, from + item.length);
  if (options_.reverse_complement && (random.next() & 1)) dna::reverse_complement(codes);
  double rate = options_.mutate;
  if (options_.mutate_to > rate) rate += (options_.mutate_to - rate) * random.uniform();
  if (rate > 0) {
    for (uint8_t& code : codes) {
      if (random.uniform() >= rate || code < dna::kA || code > dna::kT) continue;
      code = static_cast<uint8_t>(dna::kA +
                                  (code - dna::kA + 1 + random.below(3)) % 4);  // another base
    }
  }
  if (options_.objective == Objective::mlm) {
    std::vector<uint8_t> targets;
    if (options_.masking.share > 0) {
      targets = mask(options_.masking, codes, draws.mask);
    } else {
      const auto first = all_.targets[item.record].begin() + item.begin;
      targets.assign(first, first + item.length);
    }
    batch.add(codes, targets, options_.front);
    return;
  }
  int32_t label = item.label;
  if (options_.condition_dropout > 0 && random.uniform() < options_.condition_dropout)
    label = options_.front.no_label();
  batch.add(codes, label, options_.objective, options_.front, context);
  if (!options_.pairs) return;
  dna::reverse_complement(codes);
  batch.add_strand(codes, options_.front);
}

}  // namespace coil
