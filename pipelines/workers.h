// Batches of one network computed side by side. Every op of a batch ends in a barrier of its
// threads, some tens of times a batch; batches apart need one barrier for all of it. On two cores d
// 128 x 4 layers reads 192 k bases a second as two batches on a thread each, 138 k as one batch on
// two threads (Xeon with AVX-512, batches of 1,024).
#pragma once

#include <condition_variable>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/ops.h"

namespace coil {

class Workers {
 public:
  static constexpr int kMost = 16;  // each keeps the activations of a batch

  // As many as `whole` has threads; a device that is no CPU is one worker.
  explicit Workers(Backend& whole);
  ~Workers();
  int count() const { return count_; }
  // Calls work(i, backend) for i = 0 … n-1 at once, n at most count(); the threads of `whole` are
  // shared out evenly over the n. Returns when all are done; throws what the first of them threw.
  void run(int n, const std::function<void(int, Backend&)>& work);

 private:
  struct Worker {
    std::map<int, std::unique_ptr<Backend>> backends;  // by their threads
    std::exception_ptr error;
    std::thread thread;  // of all but the first, which is the caller
  };
  void serve(int i);
  void work_on(int i);

  Backend& whole_;
  int count_ = 1;
  std::vector<Worker> workers_;
  std::mutex mutex_;
  std::condition_variable changed_;
  const std::function<void(int, Backend&)>* work_ = nullptr;
  int n_ = 0, left_ = 0;
  int64_t turn_ = 0;
  bool stop_ = false;
};

}  // namespace coil
