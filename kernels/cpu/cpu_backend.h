// The CPU backend: oneDNN for matrix products, Highway (run-time dispatch) for everything else,
// OpenMP threads. One file per op beside this header.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "kernels/ops.h"

namespace coil {

// Steps that the scan walks with one block of channels.
constexpr int64_t kScanBlock = scan_block(Device{});

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(int threads);
  ~CpuBackend() override;
  Device device() const override { return {}; }
  int threads() const override { return threads_; }

  void* alloc(int64_t bytes) override;
  void free(void* data) override;
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
  void run(const Glu&) override;
  void run(const GluBackward&) override;
  void run(const Pool&) override;
  void run(const PoolBackward&) override;
  void run(const CrossEntropy&) override;
  void run(const SumSquares&) override;
  void run(const AdamW&) override;

 private:
  struct Products;  // oneDNN engine, stream and primitives by shape: gemm.cc, as constructor and
                    // destructor
  int threads_;
  std::unique_ptr<Products> products_;
  std::mutex memory_mutex_;
  struct Kept {
    void* data;
    int64_t freed;  // frees_ when it came back: its age
  };
  void release_oldest();
  void release_memory();
  std::unordered_map<void*, int64_t> blocks_;  // size class of every block handed out or kept
  std::map<int64_t, std::vector<Kept>> kept_;  // by size class, oldest first
  int64_t in_use_ = 0, most_in_use_ = 0, kept_bytes_ = 0, frees_ = 0;
};

}  // namespace coil
