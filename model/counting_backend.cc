#include "model/counting_backend.h"

#include <algorithm>

#include "kernels/error.h"

namespace coil {

// A GPU's blocks count as they are allocated. A CPU's are counted as asked for: pages that nothing
// touches are not there.
void* CountingBackend::alloc(int64_t bytes) {
  const int64_t size = on_cpu() ? bytes : size_class(bytes, kDeviceAlignment);
  void* address = reinterpret_cast<void*>(next_);
  next_ += static_cast<uintptr_t>(size) + kGap;
  blocks_[address] = size;
  in_use_ += size;
  peak_ = std::max(peak_, in_use_);
  return address;
}

void CountingBackend::free(void* data) {
  const auto block = blocks_.find(data);
  COIL_ASSERT(block != blocks_.end());
  in_use_ -= block->second;
  blocks_.erase(block);
}

// What the CUDA backend's scans hold while they run, beside which its other operations' partial
// sums are small. A scan in two passes cuts sequences into tiles, which carry 16 states a channel;
// how long they are depends on the card, 128 to 1,024 steps: counted as 512.
namespace {
constexpr int64_t kTile = 512, kStates = 16, kChannels = 128;  // kChannels: of a block
}  // namespace

void CountingBackend::run(const SelectiveScan& op) {
  costs.push_back(cost_of(op));
  const int64_t t = op.rows->total(), e = op.x.cols(), n = op.A_log.cols();
  if (on_cpu() || t == 0) return;
  const int64_t tiles = t / kTile + static_cast<int64_t>(op.rows->pieces().size());
  Tensor carry, partial;
  if (!op.starts) carry = Tensor(*this, DType::f32, {tiles, kStates + 1, e});
  if (n > kStates) partial = Tensor(*this, DType::f32, {t, e});
}

void CountingBackend::run(const SelectiveScanBackward& op) {
  costs.push_back(cost_of(op));
  const int64_t t = op.rows->total(), e = op.x.cols(), n = op.A_log.cols();
  if (on_cpu() || t == 0) return;
  const int64_t tiles = t / kTile + static_cast<int64_t>(op.rows->pieces().size());
  const int64_t blocks = (e + kChannels - 1) / kChannels;
  const Tensor partial_BC(*this, DType::f32, {blocks, t, 2 * kStates});
  const Tensor partial_AD(*this, DType::f32, {tiles, kStates + 2, e});
  const Tensor carry(*this, DType::f32, {tiles, kStates + 1, e});
  Tensor between;
  if (n > kStates) between = Tensor(*this, DType::f32, {3, t, e});
}

}  // namespace coil
