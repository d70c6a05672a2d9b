// Decoding a U-Net of S4D stages in one launch: embedding, the stages whose turn it is, and the
// head, for sequences of one step each. A block of threads, or a cluster of up to eight, for each
// sequence; blocks of a cluster take turns, each with layers of its own of every stage, so that all
// of them have asked for their weights by the time the residual stream comes to them.
//
// Four phases a layer, with a barrier of the block between them:
//   scan    u = norm(x) of a channel, its states' step, y = gelu(sum): kStatesOf states a lane
//   linear  a|b = output_linear(y), x += a sigmoid(b);  mlp_norm(x) but for its rstd
//   in      a|b = mlp_in(u) rstd, a sigmoid(b)
//   out     x += mlp_out
// A warp makes eight outputs of a product at once on the tensor core, whose 16 rows are the two
// halves of a pair (a and b), or the two halves of a row, against the vector in all columns: so a
// sum comes out whole, without a shuffle. What each phase reads first is asked for as soon as the
// registers that hold it are free, a whole layer ahead.
//
// Limit: latency and, with one block a sequence, what a multiprocessor reads through L2 (64 bytes a
// cycle). audio-base (d 64, 128, 256; n 32, mlp 2; 8 layers a stage), bf16: 0.9 MB of weights,
// tables and states of the outermost stage a step, 2.9 and 10.3 MB of the others every 4 and 16.
#include <cooperative_groups.h>

#include <algorithm>
#include <bit>

#include "kernels/cuda/fast_math.cuh"
#include "kernels/cuda/mamba_step.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kTeamThreads = 512, kTeamWarps = kTeamThreads / 32;
constexpr int kAhead = 2;                 // of a product: loads of 32 bytes a lane under way
constexpr int kStatesOf = 4;              // of a lane
constexpr int kMostTeam = 8;              // blocks of a cluster
constexpr int64_t kMostSequences = 1024;  // beyond, products are large
constexpr int kMostStages = 4, kMostLayers = 40, kMostWidth = 512;

template <class T>
struct UnetLayer {
  const float *norm, *table, *D;
  float* state;
  const T* linear;
  const float *bias, *mlp_norm;
  const T *mlp_in, *mlp_out;
};
template <class T>
struct UnetStage {
  const float* norm_f;
  const T *down, *up;
  const float *down_bias, *up_bias;
  float *rest, *next;
  int first, layers, d, n, f, p;
  int lane_bits,
      at_once;  // lanes of a channel, a power of two; channels that a block scans at once
};
// Offsets in bytes of shared memory. Vectors of a layer: norm (d), D (d), bias (2d), mlp_norm (d).
struct UnetRoom {
  int inbox, inbox_stride;  // of each stage: x and the sums of squares of eight of x each
  int y, u, gated, steps;   // what products read, in activation type
  int e;                    // x as it came, before the stage inside
  int vectors, norm_f, signals, bytes;
};
template <class T>
struct Unet {
  UnetLayer<T> layers[kMostLayers];
  UnetStage<T> stages[kMostStages];
  int stage_count, team, v;
  float eps;
  const Piece* pieces;
  const int32_t* ids;
  const T *table, *head;
  int64_t table_rows;
  float* logits;
  UnetRoom room;
};

// A product as warps read it: tiles of 8 outputs, warp by warp. A lane reads 16 bytes of one row of
// the matrix and 16 that stand `second` elements further: of the row that makes the other half of a
// pair, or of the other half of the same row.
template <class T>
struct Walk {
  static constexpr int kStep = 64 / sizeof(T);  // elements of a row that four lanes read
  const T* matrix;
  int k, second, steps, tiles;
};
template <class T>
__device__ Walk<T> pairs(const T* matrix, int k, int outputs) {
  return {matrix, k, outputs * k, k / Walk<T>::kStep, outputs / 8};
}
template <class T>
__device__ Walk<T> halves(const T* matrix, int k, int outputs) {
  return {matrix, k, k / 2, k / 2 / Walk<T>::kStep, outputs / 8};
}

__device__ inline uint4 load_weights(const void* from) {
  uint4 word;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(from));
  return word;
}

// Of the same value in all lanes, which the compiler would not see in threadIdx.x / 32: it would
// guard every shuffle.
__device__ inline int warp_index() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
}

// What a warp has asked for of a product.
template <class T>
struct Ahead {
  uint4 low[kAhead], high[kAhead];

  __device__ void fetch(int slot, const Walk<T>& walk, int tile, int step) {
    const int lane = threadIdx.x % 32;
    const T* const at = walk.matrix + static_cast<int64_t>(tile * 8 + lane / 4) * walk.k +
                        step * Walk<T>::kStep + lane % 4 * (16 / static_cast<int>(sizeof(T)));
    low[slot] = load_weights(at);
    high[slot] = load_weights(at + walk.second);
  }
  // The begin of a product.
  __device__ void begin(int slot, const Walk<T>& walk, int warp) {
    if (warp < walk.tiles && slot < walk.steps) fetch(slot, walk, warp, slot);
  }
  __device__ void begin(const Walk<T>& walk, int warp) {
#pragma unroll
    for (int slot = 0; slot < kAhead; ++slot) begin(slot, walk, warp);
  }
};

// Eight sums of a warp, a lane's of row lane / 4: of both rows that it reads.
template <class T>
struct Sums {
  float even[4] = {}, odd[4] = {};  // f32: low in even[0], high in even[3]

  // vector: what the rows are multiplied with, `second` further for the second ones.
  __device__ void add(const uint4& low, const uint4& high, const T* vector, int second) {
    const int lane = threadIdx.x % 32;
    if constexpr (std::is_same_v<T, bf16>) {
      // Odd columns of the tensor core's operand are the vector of the second rows.
      const uint4 b =
          *reinterpret_cast<const uint4*>(vector + (lane / 4 % 2) * second + lane % 4 * 8);
      mma_bf16(even, low.x, high.x, low.y, high.y, b.x, b.y);
      mma_bf16(odd, low.z, high.z, low.w, high.w, b.z, b.w);
    } else {
      const float* const at = vector + lane % 4 * 4;
      const auto dot = [](const uint4& w, const float4& x, float sum) {
        return fmaf(__uint_as_float(w.w), x.w,
                    fmaf(__uint_as_float(w.z), x.z,
                         fmaf(__uint_as_float(w.y), x.y, fmaf(__uint_as_float(w.x), x.x, sum))));
      };
      even[0] = dot(low, *reinterpret_cast<const float4*>(at), even[0]);
      even[3] = dot(high, *reinterpret_cast<const float4*>(at + second), even[3]);
    }
  }
  // Of the first row and of the second, in every lane of a row. `halves`: of the other columns.
  __device__ float2 both(bool halves) const {
    if constexpr (std::is_same_v<T, bf16>)
      return {even[0] + odd[0], halves ? even[3] + odd[3] : even[2] + odd[2]};
    float a = even[0], b = even[3];
    for (const int far : {1, 2}) {
      a += __shfl_xor_sync(~0u, a, far);
      b += __shfl_xor_sync(~0u, b, far);
    }
    return {a, b};
  }
};

// done(output, sums of its two rows) for all outputs of this warp, in every lane of a row. `ahead`
// holds the begin of the product, and that of `next` (null: none) afterwards.
template <class T, class F>
__device__ void multiply(Ahead<T>& ahead, const Walk<T>& walk, const Walk<T>& next, const T* vector,
                         bool halves, int warp, F&& done) {
  const int second = halves ? walk.k / 2 : 0;
#pragma unroll 1
  for (int tile = warp; tile < walk.tiles; tile += kTeamWarps) {
    Sums<T> sums;
#pragma unroll 1
    for (int from = 0; from < walk.steps; from += kAhead) {
#pragma unroll
      for (int slot = 0; slot < kAhead; ++slot) {
        const int step = from + slot;
        if (step >= walk.steps) break;
        sums.add(ahead.low[slot], ahead.high[slot], vector + step * Walk<T>::kStep, second);
        if (step + kAhead < walk.steps)
          ahead.fetch(slot, walk, tile, step + kAhead);
        else if (tile + kTeamWarps < walk.tiles)
          ahead.fetch(slot, walk, tile + kTeamWarps, slot);
        else if (next.matrix)
          ahead.begin(slot, next, warp);
      }
    }
    done(tile * 8 + threadIdx.x % 32 / 4, sums.both(halves));
  }
}

__device__ inline float sigmoid(float x) { return fast_reciprocal(1.f + fast_exp(-x)); }

// Sum of squares of eight outputs that stand in lanes 0, 4, …: every lane gets it.
__device__ inline float squares_of_tile(float x) {
  float sum = x * x;
#pragma unroll
  for (int far = 4; far < 32; far *= 2) sum += __shfl_xor_sync(~0u, sum, far);
  return sum;
}

template <class T>
struct ScanAhead {
  float4 h[2], z_re, z_im, K_re, K_im;

  __device__ void fetch(const UnetLayer<T>& layer, int64_t slot, int d, int n, int channel,
                        int lane) {
    const float4* const state = reinterpret_cast<const float4*>(
        layer.state + ((slot * d + channel) * n + kStatesOf * lane) * 2);
    const float* const table =
        layer.table + static_cast<int64_t>(channel) * 4 * n + kStatesOf * lane;
    h[0] = __ldcg(state);
    h[1] = __ldcg(state + 1);
    z_re = __ldg(reinterpret_cast<const float4*>(table));
    z_im = __ldg(reinterpret_cast<const float4*>(table + n));
    K_re = __ldg(reinterpret_cast<const float4*>(table + 2 * n));
    K_im = __ldg(reinterpret_cast<const float4*>(table + 3 * n));
  }
};
// A state's step; adds its part of y.
__device__ inline float advance(float& re, float& im, float z_re, float z_im, float K_re,
                                float K_im, float u, float y) {
  const float new_re = re + fmaf(-z_im, im, fmaf(z_re, re, u));
  const float new_im = im + fmaf(z_im, re, z_re * im);
  re = new_re;
  im = new_im;
  return fmaf(-K_im, new_im, fmaf(K_re, new_re, y));
}

// One block's part of a sequence's step.
template <class T>
class Team {
 public:
  __device__ Team(const Unet<T>& unet, unsigned char* shared)
      : unet_(unet),
        shared_(shared),
        rank_(static_cast<int>(blockIdx.x) % unet.team),
        warp_(warp_index()) {}

  __device__ void run() {
    const int64_t row = blockIdx.x / unet_.team;
    const bool first = rank_ == 0, last = rank_ == unet_.team - 1;
    if (unet_.team > 1) {
      if (threadIdx.x == 0) {
        for (int s = 0; s < unet_.stage_count; ++s) signal_init(signals() + s, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      }
      __syncthreads();
      cooperative_groups::this_cluster().barrier_arrive();
    }
    const Piece& piece = unet_.pieces[row];
    slot_ = piece.to;
    int64_t position = piece.position;  // in steps of the stage
    if (first) embed(row);
    bool met = unet_.team == 1;
#pragma unroll 1
    for (int s = 0;; ++s) {
      const UnetStage<T>& stage = unet_.stages[s];
      const bool inside = s + 1 < unet_.stage_count;
      const int p = inside ? unet_.stages[s + 1].p : 1;
      begin(stage);
      const int from = first_layer(stage, rank_), end = first_layer(stage, rank_ + 1);
      // First a layer, and what comes after, of no consequence: instructions come from afar when
      // they are executed for the first time, which takes longer than the layer itself. Until x
      // comes there is time.
      rehearsal_ = s == 0 && !first && from < end;
      float* x = rehearsal_ ? at<float>(unet_.room.e) : inbox(s);
#pragma unroll 1
      while (true) {
        if (!rehearsal_) {
          if (!met) cooperative_groups::this_cluster().barrier_wait(), met = true;
          if (first)
            start(stage, s, position, x);
          else
            wait_for_mail(s);
        }
        wait_for_vectors();
        layers(stage, x, s == 0 ? piece.from < 0 : position == 0, from,
               rehearsal_ ? from + 1 : end);
        if (last) finish(stage, s, row, x);
        if (!rehearsal_) break;
        rehearsal_ = false;
        x = inbox(s);
        if (last) linear_.begin(pairs(unet_.layers[from].linear, stage.d, stage.d), warp_);
      }
      if (!last) hand_on(stage.d, s, x);
      if (!inside) break;
      const int in_coarse = static_cast<int>(position % p);
      if (first) keep_or_lift(stage, unet_.stages[s + 1], in_coarse);
      if (in_coarse != p - 1) break;
      position /= p;
    }
  }

 private:
  template <class U>
  __device__ U* at(int offset) const {
    return reinterpret_cast<U*>(shared_ + offset);
  }
  __device__ uint64_t* signals() const { return at<uint64_t>(unet_.room.signals); }
  __device__ float* inbox(int s) const {
    return at<float>(unet_.room.inbox + s * unet_.room.inbox_stride);
  }
  __device__ float* squares(float* x, int d) const { return x + d; }
  __device__ int first_layer(const UnetStage<T>& stage, int rank) const {
    return stage.first + stage.layers * rank / unet_.team;
  }

  __device__ void embed(int64_t row) {
    const int d = unet_.stages[0].d;
    const int32_t id = unet_.ids[row];
    float* const e = at<float>(unet_.room.e);
    const bool known = id >= 0 && id < unet_.table_rows;
#pragma unroll 1
    for (int i = threadIdx.x; i < d; i += kTeamThreads)
      e[i] = known ? to_float(unet_.table[static_cast<int64_t>(id) * d + i]) : NAN;
  }

  // Asks for what the stage's first layer reads, and for the vectors of all of this block's.
  __device__ void begin(const UnetStage<T>& stage) {
    const int d = stage.d, first = first_layer(stage, rank_), end = first_layer(stage, rank_ + 1);
    const int words = 5 * d / 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - first) * words; i += kTeamThreads) {
      const UnetLayer<T>& layer = unet_.layers[first + i / words];
      const int at_word = i % words * 4;
      const float* from = at_word < d       ? layer.norm + at_word
                          : at_word < 2 * d ? layer.D + at_word - d
                          : at_word < 4 * d ? layer.bias + at_word - 2 * d
                          : layer.mlp_norm  ? layer.mlp_norm + at_word - 4 * d
                                            : nullptr;
      copy_ahead(at<float>(unet_.room.vectors) + i * 4, from ? from : layer.norm, from ? 16 : 0);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < d / 4; i += kTeamThreads)
      copy_ahead(at<float>(unet_.room.norm_f) + i * 4, stage.norm_f + i * 4, 16);
    if (first == end) return;
    const UnetLayer<T>& layer = unet_.layers[first];
    fetch_scan(stage, layer);
    linear_.begin(pairs(layer.linear, d, d), warp_);
    if (stage.f == 0) return;
    in_.begin(pairs(layer.mlp_in, d, stage.f), warp_);
    out_.begin(halves(layer.mlp_out, stage.f, d), warp_);
  }
  __device__ void wait_for_vectors() const {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
  }
  __device__ void fetch_scan(const UnetStage<T>& stage, const UnetLayer<T>& layer) {
    const int channel = static_cast<int>(threadIdx.x) >> stage.lane_bits;
    if (channel < stage.d)
      scan_.fetch(layer, slot_, stage.d, stage.n, channel,
                  static_cast<int>(threadIdx.x) & (stage.n / kStatesOf - 1));
  }

  // x of a stage: what came and, of the stage inside, this step's part of what it put out last.
  __device__ void start(const UnetStage<T>& stage, int s, int64_t position, float* x) {
    const int d = stage.d;
    const float* const e = at<float>(unet_.room.e);
    const bool inside = s + 1 < unet_.stage_count;
    const int p = inside ? unet_.stages[s + 1].p : 1;
    float* const next = inside ? unet_.stages[s + 1].next + slot_ * p * d : nullptr;
    const bool lifted = inside && position >= p;
    const float* const part = next + position % p * d;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < d; i += kTeamThreads) {
      const float sum = e[i] + (lifted ? __ldcg(part + i) : 0.f);
      x[i] = sum;
      float square = sum * sum;
#pragma unroll
      for (int far = 1; far < 8; far *= 2) square += __shfl_xor_sync(~0u, square, far);
      if (i % 8 == 0) squares(x, d)[i / 8] = square;
    }
    if (inside && position == 0)
#pragma unroll 1
      for (int i = threadIdx.x; i < p * d; i += kTeamThreads) next[i] = 0;
  }

  __device__ float rstd(float* x, int d) const {
    float sum = 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < d / 8; i += 32) sum += squares(x, d)[i];
#pragma unroll
    for (int far = 1; far < 32; far *= 2) sum += __shfl_xor_sync(~0u, sum, far);
    return rsqrtf(fmaf(sum, __frcp_rn(static_cast<float>(d)), unet_.eps));
  }

  __device__ void layers(const UnetStage<T>& stage, float* x, bool fresh, int first, int end) {
    const int d = stage.d, f = stage.f;
    T* const u = at<T>(unet_.room.u);
    T* const y = at<T>(unet_.room.y);
    T* const gated = at<T>(unet_.room.gated);
#pragma unroll 1
    for (int l = first; l < end; ++l) {
      const UnetLayer<T>& layer = unet_.layers[l];
      const bool more = l + 1 < end || rehearsal_;
      const UnetLayer<T>& after = unet_.layers[l + 1 < end ? l + 1 : l];
      const float* const vectors = at<float>(unet_.room.vectors) + (l - first) * 5 * d;
      const float *const bias = vectors + 2 * d, *const mlp_norm = vectors + 4 * d;
      scan(stage, layer, more ? &after : nullptr, vectors, x, y, fresh);
      __syncthreads();
      multiply(linear_, pairs(layer.linear, d, d), more ? pairs(after.linear, d, d) : Walk<T>{}, y,
               false, warp_, [&](int i, float2 ab) {
                 const float sum = x[i] + (ab.x + bias[i]) * sigmoid(ab.y + bias[d + i]);
                 const float square = squares_of_tile(sum);
                 if (threadIdx.x % 4 == 0) {
                   x[i] = sum;
                   if (f > 0) u[i] = from_float<T>(sum * mlp_norm[i]);
                 }
                 if (threadIdx.x % 32 == 0) squares(x, d)[i / 8] = square;
               });
      __syncthreads();
      if (f == 0) continue;
      const float scale = rstd(x, d);
      multiply(in_, pairs(layer.mlp_in, d, f), more ? pairs(after.mlp_in, d, f) : Walk<T>{}, u,
               false, warp_, [&](int i, float2 ab) {
                 if (threadIdx.x % 4 == 0)
                   gated[i] = from_float<T>(scale * ab.x * sigmoid(scale * ab.y));
               });
      __syncthreads();
      multiply(out_, halves(layer.mlp_out, f, d), more ? halves(after.mlp_out, f, d) : Walk<T>{},
               gated, true, warp_, [&](int i, float2 of_halves) {
                 const float sum = x[i] + of_halves.x + of_halves.y;
                 const float square = squares_of_tile(sum);
                 if (threadIdx.x % 4 == 0) x[i] = sum;
                 if (threadIdx.x % 32 == 0) squares(x, d)[i / 8] = square;
               });
      __syncthreads();
    }
  }

  __device__ void scan(const UnetStage<T>& stage, const UnetLayer<T>& layer,
                       const UnetLayer<T>* after, const float* vectors, float* x, T* y,
                       bool fresh) {
    const int d = stage.d, n = stage.n, lanes = n / kStatesOf, at_once = stage.at_once;
    const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    const float scale = rstd(x, d);
#pragma unroll 1
    for (int c = static_cast<int>(threadIdx.x) >> stage.lane_bits; c < d; c += at_once) {
      const ScanAhead<T> now = scan_;
      if (c + at_once < d)
        scan_.fetch(layer, slot_, d, n, c + at_once, lane);
      else if (after)
        scan_.fetch(*after, slot_, d, n, static_cast<int>(threadIdx.x) >> stage.lane_bits, lane);
      const float u = to_float(from_float<T>(x[c] * vectors[c] * scale));
      float4 h[2] = {now.h[0], now.h[1]};
      if (fresh) h[0] = h[1] = float4{0, 0, 0, 0};
      float sum = lane == 0 ? vectors[d + c] * u : 0.f;
      sum = advance(h[0].x, h[0].y, now.z_re.x, now.z_im.x, now.K_re.x, now.K_im.x, u, sum);
      sum = advance(h[0].z, h[0].w, now.z_re.y, now.z_im.y, now.K_re.y, now.K_im.y, u, sum);
      sum = advance(h[1].x, h[1].y, now.z_re.z, now.z_im.z, now.K_re.z, now.K_im.z, u, sum);
      sum = advance(h[1].z, h[1].w, now.z_re.w, now.z_im.w, now.K_re.w, now.K_im.w, u, sum);
      float4* const state =
          reinterpret_cast<float4*>(layer.state + ((slot_ * d + c) * n + kStatesOf * lane) * 2);
      if (!rehearsal_) state[0] = h[0], state[1] = h[1];
      for (int far = lanes / 2; far > 0; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
      if (lane == 0) y[c] = from_float<T>(gelu_of(sum));
    }
  }

  // x to the block that goes on with it.
  __device__ void hand_on(int d, int s, float* x) {
    auto cluster = cooperative_groups::this_cluster();
    float* const to = cluster.map_shared_rank(x, rank_ + 1);
#pragma unroll 1
    for (int i = threadIdx.x; i < d + d / 8; i += kTeamThreads) to[i] = x[i];
    __syncthreads();
    if (threadIdx.x > 0) return;
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there]; }" ::"r"(
            shared_address(signals() + s)),
        "r"(rank_ + 1)
        : "memory");
  }

  __device__ void wait_for_mail(int s) const {
    unsigned there = 0;
    while (!there)
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; "
          "selp.u32 %0, 1, 0, p; }"
          : "=r"(there)
          : "r"(shared_address(signals() + s))
          : "memory");
  }

  // The final norm, and of the outermost stage the logits, of one inside what it puts out.
  __device__ void finish(const UnetStage<T>& stage, int s, int64_t row, float* x) {
    const int d = stage.d;
    T* const u = at<T>(unet_.room.u);
    const float scale = rstd(x, d);
    const float* const norm_f = at<float>(unet_.room.norm_f);
    const int outputs = s == 0 ? unet_.v : stage.p * unet_.stages[s - 1].d;
    const Walk<T> walk = halves(s == 0 ? unet_.head : stage.up, d, outputs);
    linear_.begin(walk, warp_);
#pragma unroll 1
    for (int i = threadIdx.x; i < d; i += kTeamThreads)
      u[i] = from_float<T>(x[i] * norm_f[i] * scale);
    __syncthreads();
    float* const to = s == 0 ? unet_.logits + row * unet_.v : stage.next + slot_ * outputs;
    multiply(linear_, walk, Walk<T>{}, u, true, warp_, [&](int i, float2 of_halves) {
      if (threadIdx.x % 4 != 0 || rehearsal_) return;
      const float sum = of_halves.x + of_halves.y;
      to[i] = s == 0 ? sum : to_float(from_float<T>(sum + stage.up_bias[i]));
    });
  }

  // Of the stage inside: the step is kept, or the coarse step that it ends becomes its e.
  __device__ void keep_or_lift(const UnetStage<T>& stage, const UnetStage<T>& inner,
                               int in_coarse) {
    const int d = stage.d, p = inner.p;
    float* const rest = inner.rest + slot_ * (p - 1) * d;
    float* const e = at<float>(unet_.room.e);
    if (in_coarse != p - 1) {
#pragma unroll 1
      for (int i = threadIdx.x; i < d; i += kTeamThreads) rest[in_coarse * d + i] = e[i];
      if (in_coarse == 0)
#pragma unroll 1
        for (int i = d + threadIdx.x; i < (p - 1) * d; i += kTeamThreads) rest[i] = 0;
      return;
    }
    T* const steps = at<T>(unet_.room.steps);
    const Walk<T> walk = halves(inner.down, p * d, inner.d);
    linear_.begin(walk, warp_);
#pragma unroll 1
    for (int i = threadIdx.x; i < p * d; i += kTeamThreads) {
      if (i < (p - 1) * d) {
        steps[i] = from_float<T>(__ldcg(rest + i));
        rest[i] = 0;
      } else {
        steps[i] = from_float<T>(e[i - (p - 1) * d]);
      }
    }
    __syncthreads();
    multiply(linear_, walk, Walk<T>{}, steps, true, warp_, [&](int i, float2 of_halves) {
      if (threadIdx.x % 4 == 0) e[i] = of_halves.x + of_halves.y + inner.down_bias[i];
    });
    __syncthreads();
  }

  const Unet<T>& unet_;
  unsigned char* const shared_;
  const int rank_, warp_;
  int64_t slot_ = 0;
  bool rehearsal_ = false;
  ScanAhead<T> scan_;
  Ahead<T> linear_, in_, out_;
};

template <class T>
__global__ void __launch_bounds__(kTeamThreads, 1)
    unet_step_kernel(const __grid_constant__ Unet<T> unet) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint4 shared_memory[];
  Team<T>(unet, reinterpret_cast<unsigned char*>(shared_memory)).run();
#endif
}

// Whole words of 16 bytes: contiguous, at a multiple of 16.
bool in_words(const View& view) {
  return !view || (view.contiguous() && reinterpret_cast<uintptr_t>(view.data) % 16 == 0);
}

void check_operands(const UnetStep& op, Device device) {
  const char* const name = "unet_step";
  const int64_t t = op.rows->total(), slots = op.rows->slots();
  const DType act = activation(op.table);
  const auto here = [&](const char* operand, const View& view, DType dtype,
                        std::initializer_list<int64_t> sizes) {
    expect(name, operand, view, dtype, sizes);
    expect_here(name, operand, view, device);
  };
  const auto state = [&](const char* operand, const View& view, int64_t a, int64_t b, int64_t c) {
    if (c > 0)
      here(operand, view, DType::f32, {view.size[0], a, b, c});
    else if (b > 0)
      here(operand, view, DType::f32, {view.size[0], a, b});
    else
      here(operand, view, DType::f32, {view.size[0], a});
    check(view.size[0] >= slots, "{}: {} is {}, expected {} slots or more", name, operand,
          view.shape(), slots);
  };
  int64_t outer = 0;  // width of the stage around
  for (const UnetStep::Stage& stage : op.stages) {
    expect_rank(name, "norm_f", stage.norm_f, 1);
    const int64_t d = stage.norm_f.size[0], p = stage.p;
    here("norm_f", stage.norm_f, DType::f32, {d});
    if (outer > 0) {
      check(p >= 2, "{}: p is {}, expected 2 or more", name, p);
      here("down", stage.down, act, {d, p * outer});
      here("down_bias", stage.down_bias, DType::f32, {d});
      here("up", stage.up, act, {p * outer, d});
      here("up_bias", stage.up_bias, DType::f32, {p * outer});
      state("rest", stage.rest, p - 1, outer, 0);
      state("next", stage.next, p * outer, 0, 0);
    }
    for (const UnetStep::Block& block : stage.blocks) {
      expect_rank(name, "table", block.table, 3);
      const int64_t n = block.table.size[2];
      here("norm", block.norm, DType::f32, {d});
      here("table", block.table, DType::f32, {d, 4, n});
      here("D", block.D, DType::f32, {d});
      state("state", block.state, d, n, 2);
      here("output_linear", block.output_linear, act, {2 * d, d});
      here("output_bias", block.output_bias, DType::f32, {2 * d});
      if (!block.mlp_in) continue;
      expect_rank(name, "mlp_out", block.mlp_out, 2);
      const int64_t f = block.mlp_out.cols();
      here("mlp_norm", block.mlp_norm, DType::f32, {d});
      here("mlp_in", block.mlp_in, act, {2 * f, d});
      here("mlp_out", block.mlp_out, act, {d, f});
    }
    outer = d;
  }
  const int64_t d = op.stages[0].norm_f.size[0], v = op.head.rows();
  here("table", op.table, act, {op.table.rows(), d});
  expect(name, "ids", op.ids, DType::i32, {t});
  here("head", op.head, act, {v, d});
  here("logits", op.logits, DType::f32, {t, v});
}

// Sizes that the kernel is for: whole tiles, all layers of a stage alike.
bool offered(const UnetStep& op) {
  if (op.stages.size() > kMostStages) return false;
  bool fits = op.head.rows() % 8 == 0 && in_words(op.table) && in_words(op.head) &&
              op.logits.contiguous() && op.ids.contiguous();
  size_t layers = 0;
  int64_t outer = 1;  // width of the stage around
  for (const UnetStep::Stage& stage : op.stages) {
    const int64_t d = stage.norm_f.size[0];
    layers += stage.blocks.size();
    fits = fits && !stage.blocks.empty() && d % 64 == 0 && d <= kMostWidth &&
           stage.p * outer <= 8 * kMostWidth;
    outer = d;
    for (const View& view : {stage.norm_f, stage.down, stage.down_bias, stage.up, stage.up_bias,
                             stage.rest, stage.next})
      fits = fits && in_words(view);
    for (const UnetStep::Block& block : stage.blocks) {
      const UnetStep::Block& first = stage.blocks[0];
      const int64_t n = block.table.size[2], f = block.mlp_out ? block.mlp_out.cols() : 0;
      fits = fits && n == first.table.size[2] && n >= kStatesOf && n <= 32 * kStatesOf &&
             (n & (n - 1)) == 0 && f == (first.mlp_out ? first.mlp_out.cols() : 0) && f % 64 == 0 &&
             f <= 8 * kMostWidth;
      for (const View& view : {block.norm, block.table, block.D, block.state, block.output_linear,
                               block.output_bias, block.mlp_norm, block.mlp_in, block.mlp_out})
        fits = fits && in_words(view);
    }
  }
  for (const Piece& piece : op.rows->pieces())
    fits = fits && piece.to >= 0 &&
           (piece.from == piece.to || (piece.from < 0 && piece.position == 0));
  return fits && layers <= kMostLayers;
}

// Layers of a stage that one block of a team has at most.
int most_layers(int layers, int team) { return (layers + team - 1) / team; }

template <class T>
Unet<T> filled(const UnetStep& op, int team) {
  Unet<T> unet{};
  int layers = 0, widest = 0, longest = 0, vectors = 0, outer = 0;
  for (const UnetStep::Stage& from : op.stages) {
    UnetStage<T>& stage = unet.stages[unet.stage_count++];
    const View& out = from.blocks[0].mlp_out;
    stage = {.norm_f = from.norm_f.as<float>(),
             .down = from.down.as<T>(),
             .up = from.up.as<T>(),
             .down_bias = from.down_bias.as<float>(),
             .up_bias = from.up_bias.as<float>(),
             .rest = from.rest.as<float>(),
             .next = from.next.as<float>(),
             .first = layers,
             .layers = static_cast<int>(from.blocks.size()),
             .d = static_cast<int>(from.norm_f.size[0]),
             .n = static_cast<int>(from.blocks[0].table.size[2]),
             .f = out ? static_cast<int>(out.cols()) : 0,
             .p = static_cast<int>(from.p)};
    stage.lane_bits = std::countr_zero(static_cast<unsigned>(stage.n / kStatesOf));
    stage.at_once = kTeamThreads >> stage.lane_bits;
    for (const UnetStep::Block& block : from.blocks)
      unet.layers[layers++] = {.norm = block.norm.as<float>(),
                               .table = block.table.as<float>(),
                               .D = block.D.as<float>(),
                               .state = block.state.as<float>(),
                               .linear = block.output_linear.as<T>(),
                               .bias = block.output_bias.as<float>(),
                               .mlp_norm = block.mlp_norm.as<float>(),
                               .mlp_in = block.mlp_in.as<T>(),
                               .mlp_out = block.mlp_out.as<T>()};
    widest = std::max(widest, stage.d);
    longest = std::max({longest, stage.d, stage.f, stage.p * outer});
    vectors = std::max(vectors, 5 * stage.d * most_layers(stage.layers, team));
    outer = stage.d;
  }
  const auto take = [&](int count, int size) {
    const int offset = unet.room.bytes;
    unet.room.bytes += (count * size + 127) / 128 * 128;
    return offset;
  };
  constexpr int kSize = sizeof(T);
  unet.room.inbox_stride = (widest + widest / 8 + 31) / 32 * 128;
  unet.room.inbox = take(unet.stage_count, unet.room.inbox_stride);
  unet.room.y = take(longest, kSize);
  unet.room.u = take(longest, kSize);
  unet.room.gated = take(longest, kSize);
  unet.room.steps = take(longest, kSize);
  unet.room.e = take(widest + widest / 8, 4);
  unet.room.vectors = take(vectors, 4);
  unet.room.norm_f = take(widest, 4);
  unet.room.signals = take(kMostStages, sizeof(uint64_t));
  unet.team = team;
  unet.v = static_cast<int>(op.head.rows());
  unet.eps = op.eps;
  unet.table = op.table.as<T>();
  unet.table_rows = op.table.rows();
  unet.head = op.head.as<T>();
  unet.logits = op.logits.as<float>();
  return unet;
}

}  // namespace

bool CudaBackend::try_run(const UnetStep& op) {
  const char* const name = "unet_step";
  check(op.rows != nullptr, "{}: rows are missing", name);
  if (op.stages.empty()) return false;
  expect_rank(name, "table", op.table, 2);
  expect_rank(name, "head", op.head, 2);
  check_operands(op, device());
  const int64_t t = op.rows->total();
  check(t == static_cast<int64_t>(op.rows->pieces().size()),
        "{}: {} rows in {} pieces, expected one each", name, t, op.rows->pieces().size());
  if (t == 0 || t > kMostSequences || !offered(op)) return false;
  size_t most = 0;
  for (const UnetStep::Stage& stage : op.stages) most = std::max(most, stage.blocks.size());
  int team = 1;
  while (2 * team <= std::min<int64_t>(kMostTeam, static_cast<int64_t>(most)) &&
         2 * team * t <= processors_)
    team *= 2;
  bool done = false;
  with_type(name, op.table, [&](auto type) {
    using T = decltype(type);
    Unet<T> unet = filled<T>(op, team);
    if (unet.room.bytes > most_shared()) return;
    Tensor kept;
    unet.ids = brought(*this, op.ids, kept).as<int32_t>();
    unet.pieces = op.rows->device_pieces();
    if (bool& ready = unet_ready_[sizeof(T) == 2]; !ready) {
      allow_shared(unet_step_kernel<T>, most_shared());
      ready = true;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(t * team));
    config.blockDim = dim3(kTeamThreads);
    config.dynamicSmemBytes = static_cast<size_t>(unet.room.bytes);
    config.stream = stream_;
    cudaLaunchAttribute together{};
    together.id = cudaLaunchAttributeClusterDimension;
    together.val.clusterDim = {static_cast<unsigned>(team), 1, 1};
    config.attrs = &together;
    config.numAttrs = 1;
    check_call(cudaLaunchKernelEx(&config, unet_step_kernel<T>, unet), name);
    done = true;
  });
  return done;
}

}  // namespace coil
