// Sample: an id for each row of logits, drawn by temperature, top_k and top_p; see ops.h for the
// rules and sample.h for the numbers.
//
// A block takes a row, one warp where it has up to 256 logits; up to 8,192 are held in registers,
// longer rows are read from L2 by every pass. Nothing is sorted: a threshold is found bit by bit,
// each bit a sum over the row, in whole numbers, so that no order matters. Warps have neighbouring
// ids, which makes the draw a search for the warp, the step and the lane.
//
// Latency is the limit. Sampling a row of 256 should take 2 to 3 us, top_k and top_p each 1 us more
// (32 sums of a warp, 60 cycles each); a row of 50,280 takes 3 us a pass, 3 or 4 passes, and 32
// more for each of top_k and top_p. (Estimates for an H100.)
#include <algorithm>
#include <cmath>

#include "kernels/cuda/device.cuh"
#include "kernels/sample.h"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kMostThreads = 1024;
constexpr int kHeld = 8;  // logits of a thread, where a block holds the row

template <class T>
struct Operands {
  const T *logits, *unguided;  // (m,v); unguided null: none
  const int32_t* streams;      // (m); null: the row's number
  int32_t* ids;                // (m), with unguided (2m)
  float* log_probs;            // (m); null: not asked for
  int64_t stride, unguided_stride;
  int v, top_k;  // 0: all
  float guidance;
  float scale, top_p;  // scale 0: temperature 0
  uint64_t seed, step;
};

struct Word {  // a logit; beyond the row, and so never looked at: key 0, weight 0
  int id;
  uint32_t key;
  uint64_t weight;
};

struct Shared {
  uint64_t sums[kMostThreads / 32];
  int id;
};

// x below 2^53 in each lane: the sums of both halves fit 32 bits, whose sum is one instruction.
__device__ uint64_t sum_of_warp(uint64_t x) {
  const unsigned low = __reduce_add_sync(~0u, static_cast<unsigned>(x) & ((1u << 26) - 1));
  const unsigned high = __reduce_add_sync(~0u, static_cast<unsigned>(x >> 26));
  return (uint64_t{high} << 26) + low;
}

// A row, spread over the block: warp w has ids 32 * steps * w and on, a lane every 32nd of them.
template <class T, bool kHolds>
struct Row {
  const T *logits, *unguided;
  Shared& shared;
  int v, first;
  float guidance, most, scale;
  Word held[kHolds ? kHeld : 1];

  __device__ Row(const Operands<T>& op, Shared& shared)
      : logits(op.logits + blockIdx.x * op.stride),
        unguided(op.unguided ? op.unguided + blockIdx.x * op.unguided_stride : nullptr),
        shared(shared),
        v(op.v),
        first(static_cast<int>(threadIdx.x / 32 * 32) * steps() +
              static_cast<int>(threadIdx.x % 32)),
        guidance(op.guidance),
        scale(op.scale) {}

  __device__ int steps() const { return kHolds ? kHeld : (v + kMostThreads - 1) / kMostThreads; }
  __device__ uint32_t plain_key(int id) const {
    return id < v ? sample_key(to_float(logits[id])) : 0;
  }
  __device__ uint32_t key(int id) const {
    if (!unguided || id >= v) return plain_key(id);
    return sample_key(sample_guided(to_float(logits[id]), to_float(unguided[id]), guidance));
  }
  __device__ uint64_t weight(uint32_t key) const {
    return key == 0 ? 0 : sample_weight(sample_logit(key), most, scale);
  }

  // f(word) for each logit of this thread; all lanes of a warp are at the same step.
  template <class F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int h = 0; h < steps(); ++h) {
      if constexpr (kHolds) {
        f(held[h]);
      } else {
        const uint32_t own = key(first + 32 * h);
        f(Word{first + 32 * h, own, weight(own)});
      }
    }
  }

  // Holds the row; the largest key.
  __device__ uint32_t read() {
    uint32_t largest = 0;
#pragma unroll
    for (int h = 0; h < steps(); ++h) {
      const uint32_t own = key(first + 32 * h);
      if constexpr (kHolds) held[h] = {first + 32 * h, own, 0};
      largest = max(largest, own);
    }
    return largest_of_block(largest);
  }
  __device__ uint32_t largest_plain() const {
    uint32_t largest = 0;
    each([&](const Word& word) { largest = max(largest, plain_key(word.id)); });
    return largest_of_block(largest);
  }
  __device__ uint32_t largest_of_block(uint32_t largest) const {
    largest = __reduce_max_sync(~0u, largest);
    __syncthreads();  // until the last sums have been read
    if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = largest;
    __syncthreads();
    for (unsigned w = 0; w < blockDim.x / 32; ++w)
      largest = max(largest, static_cast<uint32_t>(shared.sums[w]));
    return largest;
  }
  __device__ void weigh(float largest) {
    most = largest;
    if constexpr (kHolds)
#pragma unroll
      for (int h = 0; h < kHeld; ++h) held[h].weight = weight(held[h].key);
  }

  // The sum of mass(word) of this thread.
  template <class Mass>
  __device__ uint64_t own_sum(const Mass& mass) const {
    uint64_t own = 0;
    each([&](const Word& word) { own += mass(word); });
    return own;
  }
  // Of the warps below `warps`; every warp brings its own.
  __device__ uint64_t sum_of_warps(uint64_t own, unsigned warps) const {
    __syncthreads();  // until the last sums have been read
    if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = own;
    __syncthreads();
    uint64_t total = 0;
    for (unsigned w = 0; w < warps; ++w) total += shared.sums[w];
    return total;
  }
  template <class Mass>
  __device__ uint64_t sum(const Mass& mass) const {
    const uint64_t own = sum_of_warp(own_sum(mass));
    return blockDim.x == 32 ? own : sum_of_warps(own, blockDim.x / 32);
  }
  // The largest key such that the mass of all keys from it on is `least`; they have that together.
  template <class Mass>
  __device__ uint32_t threshold(const Mass& mass, uint64_t least) const {
    uint32_t low = 0;
    uint64_t above = 0;  // of the keys beyond those in doubt
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t middle = low | 1u << bit;
      const uint64_t some = sum([&](const Word& word) -> uint64_t {
        return word.key - middle < 1u << bit ? mass(word) : 0;
      });
      if (above + some >= least)
        low = middle;
      else
        above += some;
    }
    return low;
  }
  // The first id such that the mass up to it, itself included, is above `place`.
  template <class Mass>
  __device__ int find(const Mass& mass, uint64_t place) const {
    const uint64_t own = sum_of_warp(own_sum(mass));
    const int lane = threadIdx.x % 32;
    uint64_t before = sum_of_warps(own, threadIdx.x / 32);
    if (place >= before && place - before < own)
      each([&](const Word& word) {
        const uint64_t part = mass(word), all = sum_of_warp(part);
        if (place >= before && place - before < all) {
          uint64_t until = part;
          for (int step = 1; step < 32; step *= 2) {
            const uint64_t other = __shfl_up_sync(~0u, until, step);
            if (lane >= step) until += other;
          }
          if (place - before < until && place - before >= until - part) shared.id = word.id;
        }
        before += all;
      });
    __syncthreads();
    return shared.id;
  }
};

// rehearsal: of no consequence.
template <class T, bool kHolds>
__device__ void draw(const Operands<T>& op, Shared& shared, bool rehearsal) {
  Row<T, kHolds> row(op, shared);
  const uint32_t largest = row.read();
  const bool writes = threadIdx.x == 0 && !rehearsal;
  if (!sample_finite(largest)) {
    if (writes) op.ids[blockIdx.x] = -1;
    if (writes && op.unguided) op.ids[gridDim.x + blockIdx.x] = -1;
    if (writes && op.log_probs) op.log_probs[blockIdx.x] = NAN;
    return;
  }
  row.weigh(sample_logit(largest));
  // What is left: keys above the cut, at the cut ids up to `last`, and none below `floor`.
  uint32_t cut = 0, floor = 0;
  int last = 0, id;
  const auto weight = [&](const Word& word) -> uint64_t {
    const bool left = word.key >= floor && (word.key > cut || (word.key == cut && word.id <= last));
    return left ? word.weight : 0;
  };
  if (op.scale == 0) {
    id = row.find([&](const Word& word) -> uint64_t { return word.key == largest; }, 0);
  } else {
    if (op.top_k > 0) {
      const uint32_t at =
          row.threshold([](const Word&) { return uint64_t{1}; }, static_cast<uint64_t>(op.top_k));
      const uint64_t above = row.sum([&](const Word& word) -> uint64_t { return word.key > at; });
      last = row.find([&](const Word& word) -> uint64_t { return word.key == at; },
                      op.top_k - above - 1);
      cut = at;
    }
    uint64_t total = row.sum(weight);
    if (op.top_p < 1) {
      floor = row.threshold(weight, sample_part(op.top_p, total));
      total = row.sum(weight);
    }
    const uint32_t stream = static_cast<uint32_t>(
        op.streams && !rehearsal ? op.streams[blockIdx.x] : static_cast<int>(blockIdx.x));
    id = row.find(weight, sample_place(op.seed, stream, op.step, total));
  }
  if (writes) op.ids[blockIdx.x] = id;
  if (writes && op.unguided) op.ids[gridDim.x + blockIdx.x] = id + op.v;
  if (!op.log_probs) return;
  const float most = op.unguided ? sample_logit(row.largest_plain()) : row.most;
  const uint64_t total = row.sum([&](const Word& word) -> uint64_t {
    const uint32_t key = op.unguided ? row.plain_key(word.id) : word.key;
    return key == 0 ? 0 : sample_weight(sample_logit(key), most, kSampleLog2OfE);
  });
  if (writes) op.log_probs[blockIdx.x] = sample_log_prob(to_float(row.logits[id]), most, total);
}

template <class T, bool kHolds>
__global__ void __launch_bounds__(kMostThreads) sample_kernel(const Operands<T> op) {
  __shared__ Shared shared;
  __shared__ T zeros[kHolds ? 32 * kHeld : 1];
  // One warp is decoding: it draws once from zeros while the logits are still made.
  bool rehearsal = kHolds && blockDim.x == 32;
  Operands<T> from = op;
  if (rehearsal) {
    for (int i = threadIdx.x; i < 32 * kHeld; i += 32) zeros[i] = from_float<T>(0);
    __syncwarp();
    from.logits = zeros;
    from.stride = from.unguided_stride = 0;
    if (op.unguided) from.unguided = zeros;
  }
#pragma unroll 1
  for (bool done = false; !done;) {
    if (!rehearsal) {
      take_turn();
      from = op;
    }
    draw<T, kHolds>(from, shared, rehearsal);
    done = !rehearsal;
    rehearsal = false;
  }
}

}  // namespace

void CudaBackend::run(const Sample& op) {
  const char* const name = "sample";
  check_operands(op, activation(op.logits));
  for (const auto& [operand, view] : {std::pair{"logits", op.logits},
                                      {"unguided", op.unguided},
                                      {"ids", op.ids},
                                      {"streams", op.streams},
                                      {"log_probs", op.log_probs}})
    expect_here(name, operand, view, device());
  const int64_t m = op.logits.rows(), v = op.logits.cols();
  if (m == 0) return;
  check(m < int64_t{1} << 31, "{}: {} rows, expected less than 2^31", name, m);
  int threads = 32;
  while (threads < kMostThreads && threads * kHeld < v) threads *= 2;
  with_type(name, op.logits, [&](auto type) {
    using T = decltype(type);
    const Operands<T> operands{.logits = op.logits.as<T>(),
                               .unguided = op.unguided.as<T>(),
                               .streams = op.streams.as<int32_t>(),
                               .ids = op.ids.as<int32_t>(),
                               .log_probs = op.log_probs.as<float>(),
                               .stride = op.logits.stride[0],
                               .unguided_stride = op.unguided.stride[0],
                               .v = static_cast<int>(v),
                               .top_k = op.top_k < v ? static_cast<int>(op.top_k) : 0,
                               .guidance = op.guidance,
                               .scale = op.temperature > 0 ? sample_scale(op.temperature) : 0,
                               .top_p = op.top_p,
                               .seed = op.seed,
                               .step = op.step};
    const auto kernel =
        v <= kMostThreads * kHeld ? sample_kernel<T, true> : sample_kernel<T, false>;
    launch_in_turn(kernel, static_cast<unsigned>(m), static_cast<unsigned>(threads), 0, stream_,
                   operands);
    check_launch(name);
  });
}

}  // namespace coil
