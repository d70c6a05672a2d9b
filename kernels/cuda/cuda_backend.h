// The CUDA backend: cuBLASLt for matrix products, our own kernels for everything else, one file per
// op with the basename of its CPU twin. One stream; nothing in here waits for the device but
// sync(), wait() and copy() to host memory that is not of alloc_host(). Matrices and activations
// are f32 or bf16, both of one type in an op; see ops.h for what stays f32.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "kernels/ops.h"

namespace coil {

Blocks::Device cuda_memory(int index, int64_t limit);  // backend.cu

class CudaBackend final : public Backend {
 public:
  CudaBackend(int index, int64_t limit);
  ~CudaBackend() override;
  Device device() const override { return {Device::Kind::cuda, index_}; }
  int threads() const override { return 1; }
  DType activations(DType matrices) const override { return matrices; }

  void* alloc(int64_t bytes) override { return blocks_.alloc(bytes); }
  void free(void* data) override { blocks_.free(data); }
  Memory memory() const override { return blocks_.memory(); }
  void restart_peak() override { blocks_.restart_peak(); }
  void release_kept() override { blocks_.release_kept(); }
  void copy(View from, View to) override;
  void fill(View x, double value) override;
  void sync() override;
  double powers_per_second() override;
  void* alloc_host(int64_t bytes) override;
  void free_host(void* data) override;
  int64_t mark() override;
  void wait(int64_t mark) override;

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

  cudaStream_t stream() const { return stream_; }
  int processors() const { return processors_; }  // multiprocessors of the card

 private:
  struct Products;  // cuBLASLt: gemm.cu
  void release_host_memory();
  void upload(const void* from, void* to, int64_t bytes);
  int index_, processors_ = 0;
  Blocks blocks_;
  cudaStream_t stream_ = nullptr;
  void* workspace_ = nullptr;  // of matrix products: kDeviceWorkspace bytes
  std::unique_ptr<Products, void (*)(Products*)> products_;  // from the first Gemm on

  // Bytes of shared memory that a block of the steps in one launch may have; 0: the card lacks what
  // they need; -1: not asked yet.
  int most_shared_ = -1;
  int most_shared();
  bool unet_ready_[2] = {};  // unet_step.cu: the kernel of f32, of bf16

  // Of mamba_step.cu, from launch to launch.
  struct StepBytes {
    std::vector<char> here;
    void* there = nullptr;  // the same in the card's memory
  };
  struct {
    bool ready[2] = {};                        // the kernel of f32, of bf16
    StepBytes layers, copies;                  // operands; what blocks copy
    char* handed = nullptr;                    // what blocks hand to each other
    std::vector<char> copied_for, handed_for;  // StepKey that these are of
    int64_t handed_bytes = 0;
    int generation = 0;  // of the next launch's first words
  } step_;

  // Host memory that the card reads by itself: bytes on their way there, one half filled while the
  // other is read.
  struct Staging {
    char* data = nullptr;
    int half = 0;
    int64_t filled = 0;        // bytes of this half
    cudaEvent_t read[2] = {};  // all that was sent from a half has arrived
  } staging_;
  std::unordered_map<void*, int64_t> host_blocks_;  // of alloc_host: size classes
  std::map<int64_t, std::vector<void*>> host_kept_;
  static constexpr int kMarks = 16;
  cudaEvent_t marks_[kMarks] = {};  // the last ones, in turn
  int64_t marked_ = 0;
};

}  // namespace coil
