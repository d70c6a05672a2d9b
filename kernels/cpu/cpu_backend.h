// The CPU backend: oneDNN for matrix products, Highway (run-time dispatch) for everything else,
// OpenMP threads. One file per op beside this header.
#pragma once

#include <memory>

#include "kernels/cpu/grid.h"
#include "kernels/ops.h"

namespace coil {

// Steps that the scan walks with one block of channels.
constexpr int64_t kScanBlock = scan_block(Device{});

Blocks::Device cpu_memory(int64_t limit);  // backend.cc

// What MambaStep and UnetStep take of other ops, on the calling thread and without their checks;
// `scratch` is the thread's own.
constexpr int64_t kMostConvTaps = 8;
void norm_rows_of(const Norm& op, int64_t begin, int64_t end);
void conv1d_cell(const Conv1d& op, const Cell& cell, float* scratch);  // channels x taps
void selective_scan_cell(const SelectiveScan& op, const Cell& cell, float* scratch);
int64_t scan_cell_floats(int64_t channels, int64_t n);  // of its scratch

class CpuBackend final : public Backend {
 public:
  CpuBackend(int threads, int64_t limit);
  ~CpuBackend() override;
  Device device() const override { return {}; }
  int threads() const override { return threads_; }

  void* alloc(int64_t bytes) override { return blocks_.alloc(bytes); }
  void free(void* data) override { blocks_.free(data); }
  Memory memory() const override { return blocks_.memory(); }
  void restart_peak() override { blocks_.restart_peak(); }
  void release_kept() override { blocks_.release_kept(); }
  void copy(View from, View to) override;
  void fill(View x, double value) override;
  void sync() override {}

  void run(const Gemm&) override;
  void run(const SumRows&) override;
  void run(const Embed&) override;
  void run(const EmbedBackward&) override;
  void run(const Norm&) override;
  void run(const NormBackward&) override;
  void run(const Conv1d&) override;
  void run(const Conv1dBackward&) override;
  void run(const SelectiveScan&) override;
  void run(const SelectiveScanBackward&) override;
  void run(const S4dScan&) override;
  void run(const S4dScanBackward&) override;
  void run(const S4dTable&) override;
  void run(const Glu&) override;
  void run(const GluBackward&) override;
  void run(const Downsample&) override;
  void run(const DownsampleBackward&) override;
  void run(const Upsample&) override;
  void run(const UpsampleBackward&) override;
  bool try_run(const MambaStep&) override;
  bool try_run(const UnetStep&) override;
  void run(const Pool&) override;
  void run(const PoolBackward&) override;
  void run(const CrossEntropy&) override;
  void run(const Sample&) override;
  void run(const SumSquares&) override;
  void run(const AdamW&) override;

 private:
  struct Products;  // oneDNN engine, stream and primitives by shape: gemm.cc, as constructor and
                    // destructor
  int threads_;
  std::unique_ptr<Products> products_;
  Blocks blocks_;
};

}  // namespace coil
