#include "genomics/read_ahead.h"

#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace coil {
namespace {

// A lock for each short read would cost more than the read: segments travel in batches.
constexpr size_t kBatches = 4, kSegments = 512;
constexpr size_t kLong = 8, kShort = 8192;

struct Batch {
  std::vector<Segment>
      segments;  // [0, used) are filled; the rest keep their buffers for the next turn
  size_t used = 0;
  double fraction = 0;  // of the input read when it was filled
};

class ReadAhead final : public Source {
 public:
  explicit ReadAhead(std::unique_ptr<Source> source)
      : source_(std::move(source)), worker_([this] { work(); }) {}

  ~ReadAhead() override {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    worker_.join();
  }

  bool next(Segment& segment) override {
    if (taken_ == batch_.used && !take_batch()) return false;
    std::swap(segment, batch_.segments[taken_++]);
    return true;
  }

  double fraction() const override { return batch_.fraction; }

 private:
  bool take_batch() {
    std::unique_lock lock(mutex_);
    if (!batch_.segments.empty()) free_.push_back(std::exchange(batch_, {}));
    taken_ = 0;
    changed_.wait(lock, [this] { return !ready_.empty() || done_; });
    if (ready_.empty()) {
      if (error_) std::rethrow_exception(error_);
      return false;
    }
    batch_ = std::move(ready_.front());
    ready_.pop_front();
    lock.unlock();
    changed_.notify_all();
    return true;
  }

  void work() {
    bool more = true;
    std::exception_ptr error;
    while (more) {
      Batch batch;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return ready_.size() < kBatches || stop_; });
        if (stop_) return;
        if (!free_.empty()) {
          batch = std::move(free_.back());
          free_.pop_back();
        }
      }
      try {
        more = fill(batch);
      } catch (...) {
        error = std::current_exception();
        more = false;
      }
      {
        std::lock_guard lock(mutex_);
        if (batch.used > 0) ready_.push_back(std::move(batch));
        done_ = !more;
        error_ = error;
      }
      changed_.notify_all();
    }
  }

  bool fill(Batch& batch) {
    int64_t codes = 0;
    batch.used = 0;
    while (batch.used < kSegments && codes < kRun) {
      if (batch.used == batch.segments.size()) batch.segments.emplace_back();
      Segment& segment = batch.segments[batch.used];
      // Among short reads a slot that once held a long run gives its memory back.
      if (batch.used >= kLong && segment.codes.capacity() > kShort) segment.codes = {};
      if (!source_->next(segment)) {
        batch.fraction = source_->fraction();
        return false;
      }
      codes += static_cast<int64_t>(segment.codes.size());
      ++batch.used;
    }
    batch.fraction = source_->fraction();
    return true;
  }

  std::unique_ptr<Source> source_;
  Batch batch_;       // the consumer's
  size_t taken_ = 0;  // of batch_
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Batch> ready_;
  std::vector<Batch> free_;
  bool stop_ = false, done_ = false;
  std::exception_ptr error_;
  std::thread worker_;  // last: it uses all of the above
};

}  // namespace

std::unique_ptr<Source> read_ahead(std::unique_ptr<Source> source) {
  return std::make_unique<ReadAhead>(std::move(source));
}

}  // namespace coil
