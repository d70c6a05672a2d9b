// What decoding in one op (mamba_step.cc, unet_step.cc) shares: how a team of threads parts the
// columns and meets, and products of a few rows.
#pragma once

#include <hwy/cache_control.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernels/tensor.h"

namespace coil {

constexpr int64_t kUnit = 16;                 // channels that no two threads share: a cache line
constexpr int64_t kTermsOfThread = 48 << 10;  // multiplications of a layer that a thread is worth

struct Range {
  int64_t begin, end;
};

// Of `count` in units of a cache line, the share of one thread.
inline Range share(int64_t count, int64_t thread, int64_t threads) {
  const int64_t units = (count + kUnit - 1) / kUnit;
  return {std::min(count, units * thread / threads * kUnit),
          std::min(count, units * (thread + 1) / threads * kUnit)};
}

// OpenMP's calls the kernel each time, of one thread too. Threads are here within microseconds of
// each other unless other programs want the cores too, when they often share one: each then waits
// for a core that the other spins on. So this one sleeps after kTurns, some 25 us (after 5 us, a
// step of audio-base would be 12 % slower where all is quiet).
class Barrier {
 public:
  void wait(int64_t team) {
    if (team == 1) return;
    const int now = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(now + 1, std::memory_order_release);
      round_.notify_all();  // a look at whether anyone sleeps
      return;
    }
    for (int turn = 0; turn < kTurns; ++turn) {
      if (round_.load(std::memory_order_acquire) != now) return;
      hwy::Pause();
    }
    round_.wait(now, std::memory_order_acquire);
  }

 private:
  static constexpr int kTurns = 500;
  std::atomic<int64_t> arrived_ = 0;
  std::atomic<int> round_ = 0;
};

// c[i,j] = a[i] b[j] + bias[j], or added to c, for j of a range.
struct StepProduct {
  View a, b, c;
  View bias;
  bool add = false;
};
void step_product(const StepProduct& op, Range columns);  // step_product.cc

}  // namespace coil
