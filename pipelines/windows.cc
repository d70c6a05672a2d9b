#include "pipelines/windows.h"

#include <algorithm>
#include <utility>

#include "kernels/error.h"

namespace coil {
namespace {

class Windows final : public Source {
 public:
  Windows(std::unique_ptr<Source> source, int64_t window, int64_t stride)
      : source_(std::move(source)), window_(window), stride_(stride) {
    COIL_ASSERT(window > 0 && stride > 0);
  }

  bool next(Segment& segment) override {
    while (given_ == length_)
      if (!begin_window() && !read()) return false;
    const int64_t count = std::min(kRun, length_ - given_);
    const auto from = codes_.begin() + (start_ - begin_ + given_);
    segment = {.record = record_,
               .file = head_.file,
               .position = given_,
               .offset = head_.offset + start_,
               .first = given_ == 0,
               .last = given_ + count == length_,
               .name = given_ == 0 ? head_.name : "",
               .label = head_.label,
               .split = head_.split,
               .codes = {from, from + count}};
    given_ += count;
    return true;
  }

  double fraction() const override { return source_->fraction(); }

 private:
  int64_t readable() const { return begin_ + static_cast<int64_t>(codes_.size()); }

  bool begin_window() {
    int64_t length = window_;
    if (next_ + length > readable()) {
      length = readable() - next_;
      if (!ended_ || length <= 0 || (2 * length < window_ && next_ > 0)) return false;
    }
    start_ = next_;
    next_ += stride_;
    length_ = length;
    given_ = 0;
    ++record_;
    return true;
  }

  bool read() {
    Segment segment;
    if (!source_->next(segment)) return false;
    if (segment.first) {
      codes_.clear();
      begin_ = next_ = 0;
      head_ = segment;
      head_.codes.clear();
    }
    const int64_t passed = std::min(next_, readable()) - begin_;
    codes_.erase(codes_.begin(), codes_.begin() + passed);
    begin_ += passed;
    codes_.insert(codes_.end(), segment.codes.begin(), segment.codes.end());
    ended_ = segment.last;
    return true;
  }

  std::unique_ptr<Source> source_;
  const int64_t window_, stride_;
  Segment head_;                                // of the record that is being cut
  std::vector<uint8_t> codes_;                  // of it, from begin_ on
  int64_t begin_ = 0, next_ = 0;                // next_: where its next window begins
  bool ended_ = false;                          // all of it is in codes_
  int64_t start_ = 0, length_ = 0, given_ = 0;  // of the window that is handed over
  int64_t record_ = -1;
};

class Kept final : public Source {
 public:
  Kept(std::unique_ptr<Source> source, std::function<bool(const Segment&)> keep)
      : source_(std::move(source)), keep_(std::move(keep)) {}

  bool next(Segment& segment) override {
    do {
      if (!source_->next(segment)) return false;
      if (segment.first && (kept_ = keep_(segment))) ++record_;
    } while (!kept_);
    segment.record = record_;
    return true;
  }
  double fraction() const override { return source_->fraction(); }

 private:
  std::unique_ptr<Source> source_;
  std::function<bool(const Segment&)> keep_;
  bool kept_ = false;
  int64_t record_ = -1;
};

}  // namespace

std::unique_ptr<Source> cut_source(std::unique_ptr<Source> source, int64_t window, int64_t stride) {
  return std::make_unique<Windows>(std::move(source), window, stride);
}

std::unique_ptr<Source> keep_records(std::unique_ptr<Source> source,
                                     std::function<bool(const Segment&)> keep) {
  return std::make_unique<Kept>(std::move(source), std::move(keep));
}

}  // namespace coil
