#include "pipelines/hdf5_read.h"

#include <algorithm>
#include <utility>

#include "kernels/error.h"

namespace coil {
namespace {

constexpr int64_t kRecords = 8192;  // known at once; two such blocks are

class DatasetSource final : public Source {
 public:
  DatasetSource(std::shared_ptr<const Dataset> dataset, const DatasetReading& options)
      : dataset_(std::move(dataset)),
        labelled_(options.labelled),
        most_(options.most),
        end_(options.end < 0 ? dataset_->records() : options.end),
        whole_(options.first == 0 && options.end < 0),
        label_(options.label),
        split_(dataset_->find_split(options.split)),
        width_(hdf5::size_of(dataset_->what().type())),
        step_(dataset_->what().step()),
        chunk_size_(dataset_->chunk_size()),
        loaded_(options.first),
        chunks_(*dataset_, options) {
    for (const std::string& name : dataset_->classes()) {
      const auto place = std::find(options.labels.begin(), options.labels.end(), name);
      label_of_.push_back(options.labels.empty() ? static_cast<int32_t>(label_of_.size())
                          : place == options.labels.end()
                              ? -1
                              : static_cast<int32_t>(place - options.labels.begin()));
    }
    load();
    load();
  }

  bool next(Segment& segment) override {
    if (position_ == 0 && !seek()) return false;
    const Dataset::Records& block = blocks_.front();
    const int64_t begin = block.offsets[row_], end = block.offsets[row_ + 1];
    segment.record = record_;
    segment.file = 0;
    segment.position = position_ * step_;
    segment.offset = block.starts[row_] * step_;
    segment.first = position_ == 0;
    segment.name = segment.first ? block.names[row_] : "";
    segment.label = label_of(block);
    segment.split = block.split[row_];
    segment.codes.clear();
    at_ = begin + position_;
    while (at_ < end && static_cast<int64_t>(segment.codes.size()) < kRun) {
      const std::vector<uint8_t>& chunk = chunk_of(at_);
      const int64_t inside = at_ % chunk_size_;
      const int64_t count = std::min({end - at_, chunk_size_ - inside,
                                      (kRun - static_cast<int64_t>(segment.codes.size())) / step_});
      append({chunk.data() + inside * width_, static_cast<size_t>(count * width_)}, segment.codes);
      at_ += count;
    }
    segment.last = at_ == end;
    position_ = segment.last ? 0 : at_ - begin;
    if (segment.last) {
      ++row_;
      ++record_;
    }
    return true;
  }

  double fraction() const override {
    return static_cast<double>(at_) / static_cast<double>(std::max<int64_t>(1, dataset_->size()));
  }

 private:
  bool wanted(const Dataset::Records& block, size_t row) const {
    return split_ < 0 || block.split[row] == split_;
  }

  // To the next record that is wanted.
  bool seek() {
    if (most_ > 0 && record_ == most_) return false;
    while (!blocks_.empty()) {
      const Dataset::Records& block = blocks_.front();
      while (row_ < block.names.size() && !wanted(block, row_)) ++row_;
      if (row_ < block.names.size()) return true;
      blocks_.pop_front();
      row_ = 0;
      load();
    }
    check(record_ > 0 || !whole_, "{}: no records{}", dataset_->path(),
          split_ < 0 ? "" : fmt::format(" in split {}", dataset_->splits()[split_]));
    return false;
  }

  // The next block of records, and the chunks that they stand in.
  void load() {
    const int64_t count = std::min(kRecords, end_ - loaded_);
    if (count <= 0) return;
    blocks_.push_back(dataset_->read(loaded_, count));
    loaded_ += count;
    const Dataset::Records& block = blocks_.back();
    std::vector<int64_t> order;
    for (size_t row = 0; row < block.names.size(); ++row) {
      if (!wanted(block, row)) continue;
      const int64_t last = (block.offsets[row + 1] - 1) / chunk_size_;
      for (int64_t i = std::max(block.offsets[row] / chunk_size_, pushed_ + 1); i <= last; ++i)
        order.push_back(pushed_ = i);
    }
    chunks_.push(order);
  }

  const std::vector<uint8_t>& chunk_of(int64_t at) {
    if (at / chunk_size_ != chunk_) {
      raw_ = &chunks_.next();
      chunk_ = at / chunk_size_;
    }
    return *raw_;
  }

  void append(std::span<const uint8_t> stored, std::vector<uint8_t>& codes) const {
    if (step_ == 1) {
      codes.insert(codes.end(), stored.begin(), stored.end());
      return;
    }
    for (size_t i = 0; i + 1 < stored.size(); i += 2) {  // s + 32768: high byte, low byte
      codes.push_back(stored[i + 1] ^ 0x80);
      codes.push_back(stored[i]);
    }
  }

  int32_t label_of(const Dataset::Records& block) const {
    if (label_ >= 0) return label_;
    const int32_t found = block.labels[row_];
    const int32_t label = found < 0 ? -1 : label_of_[static_cast<size_t>(found)];
    if (labelled_ && label < 0)
      fail("{}: record '{}' has {}", dataset_->path(), block.names[row_],
           found < 0 ? "no label"
                     : fmt::format("label '{}', which is not one of the model's",
                                   dataset_->classes()[static_cast<size_t>(found)]));
    return label;
  }

  std::shared_ptr<const Dataset> dataset_;
  const bool labelled_;
  const int64_t most_, end_;
  const bool whole_;
  const int32_t label_;
  const int8_t split_;
  const int64_t width_, step_, chunk_size_;
  std::vector<int32_t> label_of_;  // of the dataset's classes
  std::deque<Dataset::Records> blocks_;
  size_t row_ = 0;       // in the first of them
  int64_t loaded_;       // records
  int64_t pushed_ = -1;  // the last chunk asked for
  int64_t record_ = 0, position_ = 0, at_ = 0, chunk_ = -1;
  const std::vector<uint8_t>* raw_ = nullptr;  // chunk_
  ChunkReader chunks_;
};

}  // namespace

ChunkReader::ChunkReader(const Dataset& dataset, const DatasetReading& options)
    : dataset_(dataset) {
  const int threads = options.threads > 0
                          ? options.threads
                          : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  ring_.resize(
      static_cast<size_t>(std::max<int64_t>(2 + threads, options.memory / hdf5::kChunkBytes)));
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
}

ChunkReader::~ChunkReader() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wanted_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ChunkReader::push(std::span<const int64_t> chunks) {
  {
    std::lock_guard lock(mutex_);
    order_.insert(order_.end(), chunks.begin(), chunks.end());
  }
  wanted_.notify_all();
}

const std::vector<uint8_t>& ChunkReader::next() {
  std::unique_lock lock(mutex_);
  if (holding_) {
    ring_[taken_ % ring_.size()].ready = false;
    ++taken_;
    wanted_.notify_one();
  }
  holding_ = true;
  Slot& slot = ring_[taken_ % ring_.size()];
  COIL_ASSERT(slot.ready || taken_ < begun_ || !order_.empty());
  ready_.wait(lock, [&] { return slot.ready; });
  if (slot.error) std::rethrow_exception(slot.error);
  return slot.raw;
}

void ChunkReader::work() {
  hdf5::Deflater deflater;
  std::vector<uint8_t> stored;
  for (;;) {
    Slot* slot;
    int64_t chunk;
    {
      std::unique_lock lock(mutex_);
      wanted_.wait(lock,
                   [this] { return stop_ || (!order_.empty() && begun_ - taken_ < ring_.size()); });
      if (stop_) return;
      chunk = order_.front();
      order_.pop_front();
      slot = &ring_[begun_++ % ring_.size()];
    }
    try {
      dataset_.chunk(chunk, deflater, stored, slot->raw);
    } catch (...) {
      slot->error = std::current_exception();
    }
    {
      std::lock_guard lock(mutex_);
      slot->ready = true;
    }
    ready_.notify_one();
  }
}

std::unique_ptr<Source> open_dataset(std::shared_ptr<const Dataset> dataset,
                                     const DatasetReading& options) {
  return std::make_unique<DatasetSource>(std::move(dataset), options);
}

bool are_datasets(const std::vector<std::string>& paths) {
  const auto count = std::count_if(paths.begin(), paths.end(), is_dataset);
  if (count == 0) return false;
  for (const std::string& path : paths)
    check(is_dataset(path), "{}: is no dataset, and others are: expected one or the other", path);
  return true;
}

void check_holds(const Dataset& dataset, const CodesOf& expected, const std::string& who) {
  check(dataset.what() == expected, "{}: holds {}; {} reads {}", dataset.path(),
        dataset.what().describe(), who, expected.describe());
}

Examples read_datasets(const std::vector<std::shared_ptr<const Dataset>>& datasets,
                       const DatasetReading& options) {
  DatasetReading reading = options;
  if (options.labelled && options.labels.empty()) {
    for (const auto& dataset : datasets)
      for (const std::string& name : dataset->classes())
        if (std::ranges::count(reading.labels, name) == 0) reading.labels.push_back(name);
    sort_labels(reading.labels);
  }
  Examples all;
  all.labels = options.labelled ? reading.labels : options.labels;
  std::vector<uint8_t> codes;
  for (const auto& dataset : datasets) {
    const std::unique_ptr<Source> source = open_dataset(dataset, reading);
    for (Segment segment; source->next(segment);) {
      if (segment.first) all.names.push_back(segment.name);
      codes.insert(codes.end(), segment.codes.begin(), segment.codes.end());
      if (!segment.last) continue;
      all.items.push_back({.record = static_cast<int64_t>(all.codes.size()),
                           .begin = 0,
                           .length = static_cast<int64_t>(codes.size()),
                           .label = segment.label});
      codes.shrink_to_fit();
      all.codes.push_back(std::exchange(codes, {}));
    }
  }
  return all;
}

}  // namespace coil
