// Device memory in blocks, as both backends hand it out.
//
// A block is kept after free() for the next of its size class: fresh memory costs a page fault per
// 4 KiB on a CPU, and on a GPU a call that waits for the device. Size classes are eighths of a
// power of two: at most 12.5 % of a block is unused. What is in use plus what is kept stays below a
// bound; beyond it a GPU takes a kept block of up to twice the size. Else, and where the device has
// no room, the oldest kept blocks go back.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace coil {

constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();
// What the CUDA backend allocates beside tensors: work space of the matrix library, what NVIDIA
// advises for Hopper.
constexpr int64_t kDeviceWorkspace = 32 << 20;
constexpr int64_t kDeviceAlignment = 256;

// The smallest multiple of an eighth of a power of two that holds `bytes`.
int64_t size_class(int64_t bytes, int64_t alignment);
std::string binary_size(int64_t bytes);  // "1.25 GiB", "310 MiB", "12 KiB"

struct Memory {  // bytes
  int64_t in_use = 0;
  int64_t kept = 0;               // freed, for the next of their size
  int64_t peak = 0;               // the most in use since restart_peak()
  int64_t free = -1, total = -1;  // of the device; -1: not known
  int64_t room() const { return free < 0 ? -1 : free + kept; }  // what can still be allocated
};

class Blocks {
 public:
  struct Device {
    std::string name;  // for messages
    int64_t alignment = 64;
    double kept_share = 0;                   // of the most ever in use, kept beyond it,
    int64_t kept_always = 0;                 // and so many bytes
    int64_t limit = kNoLimit;                // bytes in use and kept
    std::function<void*(int64_t)> allocate;  // null where there is no room
    std::function<void(void*)> release;
    std::function<void(Memory&)> look;  // optional: sets free and total
  };
  explicit Blocks(Device device) : device_(std::move(device)) {}
  ~Blocks();
  Blocks(const Blocks&) = delete;
  Blocks& operator=(const Blocks&) = delete;

  void* alloc(int64_t bytes);  // throws OutOfMemory
  void free(void* data);
  void release_kept();
  Memory memory() const;
  void restart_peak();

 private:
  struct Kept {
    void* data;
    int64_t freed;  // frees_ when it came back: its age
  };
  void* obtain(int64_t size);
  void release_oldest();
  Memory look() const;
  [[noreturn]] void out_of_memory(int64_t bytes) const;

  Device device_;
  mutable std::mutex mutex_;
  std::unordered_map<void*, int64_t> blocks_;  // size class of every block handed out or kept
  std::map<int64_t, std::vector<Kept>> kept_;  // by size class, oldest first
  int64_t in_use_ = 0, most_in_use_ = 0, peak_ = 0, kept_bytes_ = 0, frees_ = 0;
};

}  // namespace coil
