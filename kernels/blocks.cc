#include "kernels/blocks.h"

#include <algorithm>
#include <bit>

#include "kernels/error.h"

namespace coil {

int64_t size_class(int64_t bytes, int64_t alignment) {
  if (bytes <= 8 * alignment)
    return std::max(alignment, (bytes + alignment - 1) / alignment * alignment);
  const int64_t step = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(bytes - 1))) / 8;
  return (bytes + step - 1) / step * step;
}

std::string binary_size(int64_t bytes) {
  const auto value = static_cast<double>(bytes);
  if (value >= 0x1p30) return fmt::format("{:.2f} GiB", value * 0x1p-30);
  if (value >= 0x1p20) return fmt::format("{:.0f} MiB", value * 0x1p-20);
  return fmt::format("{:.0f} KiB", value * 0x1p-10);
}

Blocks::~Blocks() {
  for (const auto& [data, size] : blocks_) device_.release(data);
}

void* Blocks::alloc(int64_t bytes) {
  int64_t size = size_class(bytes, device_.alignment);
  const std::lock_guard lock(mutex_);
  const int64_t most = std::max(most_in_use_, in_use_ + size);
  const int64_t bound = most +
                        static_cast<int64_t>(device_.kept_share * static_cast<double>(most)) +
                        device_.kept_always;
  void* data = nullptr;
  auto kept = kept_.lower_bound(size);
  // Where as much again is kept, since giving blocks back costs much, a larger one is better.
  const bool larger = device_.kept_share >= 1 && in_use_ + size + kept_bytes_ > bound;
  if (kept != kept_.end() && kept->first > (larger ? 2 * size : size)) kept = kept_.end();
  if (kept != kept_.end()) {
    size = kept->first;
    data = kept->second.back().data;
    kept->second.pop_back();
    if (kept->second.empty()) kept_.erase(kept);
    kept_bytes_ -= size;
  } else {
    while (kept_bytes_ > 0 && in_use_ + size + kept_bytes_ > bound) release_oldest();
    data = obtain(size);
    if (!data && !kept_.empty()) {
      while (!kept_.empty()) release_oldest();
      data = obtain(size);
    }
    if (!data) out_of_memory(bytes);
    blocks_[data] = size;
  }
  in_use_ += size;
  most_in_use_ = std::max(most_in_use_, in_use_);
  peak_ = std::max(peak_, in_use_);
  return data;
}

// Null beyond the limit as where the device has no room.
void* Blocks::obtain(int64_t size) {
  if (size > device_.limit - in_use_ - kept_bytes_) return nullptr;
  return device_.allocate(size);
}

void Blocks::free(void* data) {
  if (!data) return;
  const std::lock_guard lock(mutex_);
  const auto block = blocks_.find(data);
  COIL_ASSERT(block != blocks_.end());
  kept_[block->second].push_back({data, ++frees_});
  kept_bytes_ += block->second;
  in_use_ -= block->second;
}

void Blocks::release_oldest() {
  auto oldest = kept_.begin();  // each class is in order of age
  for (auto kept = kept_.begin(); kept != kept_.end(); ++kept)
    if (kept->second.front().freed < oldest->second.front().freed) oldest = kept;
  void* data = oldest->second.front().data;
  kept_bytes_ -= oldest->first;
  oldest->second.erase(oldest->second.begin());
  if (oldest->second.empty()) kept_.erase(oldest);
  blocks_.erase(data);
  device_.release(data);
}

void Blocks::release_kept() {
  const std::lock_guard lock(mutex_);
  while (!kept_.empty()) release_oldest();
}

Memory Blocks::look() const {
  Memory memory{.in_use = in_use_, .kept = kept_bytes_, .peak = peak_};
  if (device_.look) device_.look(memory);
  if (device_.limit != kNoLimit) {
    const int64_t left = std::max<int64_t>(0, device_.limit - in_use_ - kept_bytes_);
    memory.free = memory.free < 0 ? left : std::min(memory.free, left);
    memory.total = device_.limit;
  }
  return memory;
}

Memory Blocks::memory() const {
  const std::lock_guard lock(mutex_);
  return look();
}

void Blocks::restart_peak() {
  const std::lock_guard lock(mutex_);
  peak_ = in_use_;
}

void Blocks::out_of_memory(int64_t bytes) const {
  const Memory memory = look();
  std::string message = fmt::format("{}: out of memory: {} ({} bytes) asked for, ", device_.name,
                                    binary_size(bytes), bytes);
  if (memory.free >= 0)
    message +=
        fmt::format("{} free of {}, ", binary_size(memory.room()), binary_size(memory.total));
  throw OutOfMemory(message + binary_size(memory.in_use) + " held by coil",
                    "coil info MODEL --length … plans memory");
}

}  // namespace coil
