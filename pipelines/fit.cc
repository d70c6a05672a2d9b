#include "pipelines/fit.h"

#include <unistd.h>

#include <algorithm>

#include "kernels/error.h"
#include "model/memory_plan.h"

namespace coil {
namespace {

constexpr int64_t kLeast = 256 << 20;  // bytes left free on a GPU
constexpr int64_t kSlots = 8;          // state slots of a batch that is one chunk, spare ones too

// Of a batch that is one piece; what many pieces add is small beside it.
MemoryPlan plan_of(const Config& config, DType matrices, Device device, int64_t rows) {
  MemoryPlan plan = plan_memory(config, {.length = rows, .matrices = matrices, .device = device});
  plan.state *= kSlots;
  return plan;
}

// Of what a device has room for, or of a CPU, whose room is not known, half of all there is.
int64_t usable(int64_t room, Device device) {
  if (room >= 0) return plannable(room, device);
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) / 2 * sysconf(_SC_PAGESIZE);
}

}  // namespace

int64_t plannable(int64_t room, Device device) {
  const int64_t least = device.kind == Device::Kind::cpu ? 0 : kLeast;
  return room - std::max(room / 16, least);
}

int64_t fitting_batch(const Backend& backend, const Config& config, DType matrices,
                      const Note* note) {
  const int64_t wanted = auto_batch(config, backend.device());
  const int64_t room = backend.memory().room();
  if (room < 0) return wanted;
  const int64_t usable = plannable(room, backend.device());
  int64_t rows = wanted;
  for (; rows / 2 >= kFewestRows; rows /= 2) {
    const MemoryPlan plan = plan_of(config, matrices, backend.device(), rows);
    if (plan.state + plan.activations <= usable) break;
  }
  if (rows < wanted && note)
    (*note)(fmt::format("{} of device memory are free: {} rows at a time instead of {}",
                        binary_size(room), rows, wanted));
  return rows;
}

int64_t longest_whole(const Backend& backend, const Config& config, DType matrices) {
  constexpr int64_t kSteps = 1 << 16;  // what a step takes is measured over these
  const int64_t most = usable(backend.memory().room(), backend.device());
  const MemoryPlan plan = plan_of(config, matrices, backend.device(), kSteps);
  return std::max<int64_t>(kFewestRows, most / (plan.activations / kSteps + 1));
}

int64_t fitting_chunk(const Backend& backend, const Config& config, DType matrices, int64_t longest,
                      int64_t rows) {
  const Memory memory = backend.memory();
  const int64_t most =
      usable(memory.room() >= 0 ? memory.room() + memory.in_use : -1, backend.device());
  const auto fits = [&](int64_t chunk) {
    return plan_memory(config, {.length = std::max(longest, chunk > 0 ? chunk : rows),
                                .chunk = chunk,
                                .matrices = matrices,
                                .train = true,
                                .device = backend.device()})
               .total() <= most;
  };
  if (fits(0)) return 0;
  int64_t chunk = rows;
  while (chunk / 2 >= kFewestRows && !fits(chunk)) chunk /= 2;
  return chunk;
}

std::string fitting_hint(const Backend& backend, const Config& config, DType matrices,
                         const std::string& option, int64_t asked) {
  const Memory memory = backend.memory();
  if (memory.room() < 0) return "coil info MODEL --length … plans memory";
  const int64_t usable = plannable(memory.room() + memory.in_use, backend.device());
  MemoryPlan plan;
  for (int64_t rows = asked / 2; rows >= 1; rows /= 2) {
    plan = plan_of(config, matrices, backend.device(), rows);
    if (plan.total() <= usable) return fmt::format("{} {} would fit", option, rows);
  }
  return fmt::format("the model alone takes {}, more than is free: --device cpu, or free the GPU",
                     binary_size(plan.weights + plan.state + plan.workspace));
}

namespace {

// `count` rows of a batch from `begin` on. A piece that goes on behind them leaves its state in
// spare slot `to`, one that began before them finds it in `from`.
Stream::Batch cut(const Stream::Batch& batch, int64_t begin, int64_t count, int32_t from,
                  int32_t to) {
  Stream::Batch part;
  const int64_t end = begin + count;
  for (const Piece& whole : batch.pieces) {
    const int64_t first = std::max(begin, whole.begin);
    const int64_t last = std::min(end, whole.begin + whole.length);
    if (first >= last) continue;
    const bool begins = first == whole.begin, ends = last == whole.begin + whole.length;
    part.pieces.push_back({.begin = first - begin,
                           .length = last - first,
                           .position = whole.position + first - whole.begin,
                           .from = begins ? whole.from : from,
                           .to = ends ? whole.to : to,
                           .last = whole.last && ends});
  }
  part.ids.assign(batch.ids.begin() + begin, batch.ids.begin() + end);
  part.next.assign(batch.next.begin() + begin, batch.next.begin() + end);
  return part;
}

}  // namespace

std::vector<float> Parts::run(Backend& backend, Stream::Batch& batch, int worker,
                              const std::function<std::vector<float>(Stream::Batch&)>& compute) {
  const auto total = static_cast<int64_t>(batch.ids.size());
  std::vector<float> all;
  int32_t from = slots_ + kSpare * worker, to = from + 1;
  for (int64_t begin = 0; begin < total;) {
    const int64_t most = most_;
    const int64_t rows = most > 0 ? std::min(most, total - begin) : total - begin;
    try {
      if (rows == total) return compute(batch);
      Stream::Batch part = cut(batch, begin, rows, from, to);
      const std::vector<float> found = compute(part);
      all.insert(all.end(), found.begin(), found.end());
      begin += rows;
      std::swap(from, to);
    } catch (const OutOfMemory&) {
      if (!may_halve_ || rows / 2 < kFewestRows) throw;
      halve(backend, rows / 2);
    }
  }
  return all;
}

void Parts::halve(Backend& backend, int64_t rows) {
  backend.release_kept();
  const std::lock_guard lock(mutex_);
  if (most_ > 0 && most_ <= rows) return;  // another worker was first
  most_ = rows;
  if (note_) (*note_)(fmt::format("out of device memory: {} rows at a time from here on", rows));
}

}  // namespace coil
