// Windows in random order: see pipelines/hdf5_read.h.
#include <algorithm>
#include <numeric>

#include "kernels/error.h"
#include "model/params.h"
#include "pipelines/hdf5_read.h"

namespace coil {
namespace {

constexpr uint32_t kBlockStream = 109, kPlaceStream = 110;
constexpr int64_t kBlockChunks = 16;

template <class T>
void shuffle(std::vector<T>& items, Philox& random) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random.below(i)]);
}

}  // namespace

ShuffledWindows::ShuffledWindows(const Dataset& dataset, int64_t window, uint64_t seed,
                                 int64_t pass, const DatasetReading& options)
    : dataset_(dataset),
      window_(window),
      seed_(seed),
      pass_(pass),
      offsets_(dataset.offsets(0, dataset.records() + 1)),
      chunks_(dataset, options) {
  COIL_ASSERT(window > 0 && window <= kBlockChunks * dataset.chunk_size());
  const int64_t block_bytes = kBlockChunks * hdf5::kChunkBytes;
  together_ = static_cast<size_t>(std::max<int64_t>(1, options.memory / 2 / block_bytes));
  Philox random(seed, kBlockStream, static_cast<uint64_t>(pass));
  // The first block has 1 … kBlockChunks chunks, so that borders lie elsewhere in every pass.
  const auto first = static_cast<int64_t>(1 + random.below(kBlockChunks));
  for (int64_t at = 0; at < dataset.chunks(); at = at == 0 ? first : at + kBlockChunks)
    blocks_.push_back({at, std::min(at == 0 ? first : at + kBlockChunks, dataset.chunks())});
  shuffle(blocks_, random);
  std::vector<int64_t> order;
  for (const Block& block : blocks_)
    for (int64_t i = block.begin; i < block.end; ++i) order.push_back(i);
  chunks_.push(order);
}

// The next blocks into memory, and their windows in random order; false where there are none left.
bool ShuffledWindows::fill() {
  if (next_block_ == blocks_.size()) return false;
  places_.clear();
  place_ = 0;
  memory_.clear();
  const int64_t width = hdf5::size_of(dataset_.what().type());
  Philox random(seed_, kPlaceStream,
                (static_cast<uint64_t>(pass_) << 32) + static_cast<uint64_t>(next_block_));
  const size_t end = std::min(blocks_.size(), next_block_ + together_);
  for (; next_block_ < end; ++next_block_) {
    const Block& block = blocks_[next_block_];
    const auto at = static_cast<int64_t>(memory_.size());
    for (int64_t i = block.begin; i < block.end; ++i) {
      const std::vector<uint8_t>& raw = chunks_.next();
      memory_.insert(memory_.end(), raw.begin(), raw.end());
    }
    const int64_t from = block.begin * dataset_.chunk_size();
    const int64_t to = std::min(block.end * dataset_.chunk_size(), dataset_.size());
    auto record = std::upper_bound(offsets_.begin(), offsets_.end(), from) - offsets_.begin() - 1;
    for (; record < dataset_.records() && offsets_[record] < to; ++record) {
      const int64_t begin = std::max(offsets_[record], from);
      const int64_t length = std::min(offsets_[record + 1], to) - begin;
      const auto place = [&](int64_t where, int64_t size) {
        places_.push_back({record, where - offsets_[record], size, at + (where - from) * width});
      };
      if (length < window_) {
        if (length == offsets_[record + 1] - offsets_[record]) place(begin, length);
        continue;
      }
      const int64_t rest = length - window_;
      auto where = static_cast<int64_t>(random.below(std::min(rest, window_ - 1) + 1));
      for (; where <= rest; where += window_) place(begin + where, window_);
    }
  }
  shuffle(places_, random);
  return true;
}

bool ShuffledWindows::next(Window& window) {
  while (place_ == places_.size())
    if (!fill()) return false;
  const Place& place = places_[place_++];
  const int64_t width = hdf5::size_of(dataset_.what().type());
  window = {.record = place.record,
            .begin = place.begin,
            .length = place.length,
            .bytes = {memory_.data() + place.at, static_cast<size_t>(place.length * width)}};
  return true;
}

}  // namespace coil
