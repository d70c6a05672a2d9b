// A backend that only counts: addresses that are never read or written, and what the operations
// would have to do. The model's own code run on it says what a run will hold and how fast it could
// be at best.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "kernels/cost.h"
#include "kernels/ops.h"

namespace coil {

class CountingBackend final : public Backend {
 public:
  explicit CountingBackend(Device device) : device_(device) {}
  Device device() const override { return device_; }
  int threads() const override { return 1; }
  DType activations(DType matrices) const override { return on_cpu() ? DType::f32 : matrices; }
  void* alloc(int64_t bytes) override;
  void free(void* data) override;
  Memory memory() const override { return {.in_use = in_use_, .peak = peak_}; }
  void restart_peak() override { peak_ = in_use_; }
  void copy(View, View) override {}
  void fill(View, double) override {}
  void sync() override {}
  void run(const Gemm& op) override { costs.push_back(cost_of(op)); }
  void run(const SumRows& op) override { costs.push_back(cost_of(op)); }
  void run(const Embed& op) override { costs.push_back(cost_of(op)); }
  void run(const EmbedBackward& op) override { costs.push_back(cost_of(op)); }
  void run(const Norm& op) override { costs.push_back(cost_of(op)); }
  void run(const NormBackward& op) override { costs.push_back(cost_of(op)); }
  void run(const Conv1d& op) override { costs.push_back(cost_of(op)); }
  void run(const Conv1dBackward& op) override { costs.push_back(cost_of(op)); }
  void run(const SelectiveScan& op) override;
  void run(const SelectiveScanBackward& op) override;
  void run(const S4dScan& op) override { costs.push_back(cost_of(op)); }
  void run(const S4dScanBackward& op) override { costs.push_back(cost_of(op)); }
  void run(const S4dTable& op) override { costs.push_back(cost_of(op)); }
  void run(const Glu& op) override { costs.push_back(cost_of(op)); }
  void run(const GluBackward& op) override { costs.push_back(cost_of(op)); }
  void run(const Downsample& op) override { costs.push_back(cost_of(op)); }
  void run(const DownsampleBackward& op) override { costs.push_back(cost_of(op)); }
  void run(const Upsample& op) override { costs.push_back(cost_of(op)); }
  void run(const UpsampleBackward& op) override { costs.push_back(cost_of(op)); }
  void run(const Pool& op) override { costs.push_back(cost_of(op)); }
  void run(const PoolBackward& op) override { costs.push_back(cost_of(op)); }
  void run(const CrossEntropy& op) override { costs.push_back(cost_of(op)); }
  void run(const Sample& op) override { costs.push_back(cost_of(op)); }
  void run(const SumSquares& op) override { costs.push_back(cost_of(op)); }
  void run(const AdamW& op) override { costs.push_back(cost_of(op)); }

  std::vector<Cost> costs;  // of the operations so far

 private:
  static constexpr uintptr_t kGap = 256;
  bool on_cpu() const { return device_.kind == Device::Kind::cpu; }
  Device device_;
  uintptr_t next_ = 1 << 20;
  int64_t in_use_ = 0, peak_ = 0;
  std::unordered_map<void*, int64_t> blocks_;
};

}  // namespace coil
