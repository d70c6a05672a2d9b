// What a block does in a step of S4D stages (unet_step.cu).
#pragma once

#include <cooperative_groups.h>

#include "kernels/cuda/unet_step.cuh"

namespace coil::cuda {

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
    let_next_begin();
    const int64_t row = blockIdx.x / unet_.team;
    const bool first = rank_ == 0, last = rank_ == unet_.team - 1;
    if (unet_.team > 1) {
      if (threadIdx.x == 0) {
        for (int s = 0; s < unet_.stage_count; ++s) {
          signal_init(signals() + s, 1);
          if (!first) expect_mail(signals() + s, mail_of(unet_.stages[s]));
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      }
      __syncthreads();
      cooperative_groups::this_cluster().barrier_arrive();
    }
    const Piece& piece = unet_.pieces[row];
    slot_ = piece.to;
    int64_t position = piece.position;  // in steps of the stage
    bool met = unet_.team == 1;
#pragma unroll 1
    for (int s = 0;; ++s) {
      const UnetStage<T>& stage = unet_.stages[s];
      const bool inside = s + 1 < unet_.stage_count;
      const int p = inside ? unet_.stages[s + 1].p : 1;
      begin(stage);
      const int from = first_layer(stage, rank_), end = first_layer(stage, rank_ + 1);
      // First a layer, and what comes after, of no consequence: instructions come from afar when
      // they are executed for the first time, which takes longer than the layer itself. Until the
      // id is drawn, or x comes, there is time.
      rehearsal_ = s == 0 && from < end;
      float* x = rehearsal_ ? at<float>(unet_.room.e) : inbox(s);
#pragma unroll 1
      while (true) {
        if (!rehearsal_) {
          if (s == 0) {
            await_previous();
            if (from < end) fetch_scan(stage, unet_.layers[from], first_channel(stage));
            if (first) embed(row);
          }
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
      if (!last) hand_on(stage, s, x);
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
    fetch_scan(stage, layer, first_channel(stage));
    linear_.begin(pairs(layer.linear, d, d), warp_);
    if (stage.f == 0) return;
    in_.begin(pairs(layer.mlp_in, d, stage.f), warp_);
    out_.begin(halves(layer.mlp_out, stage.f, d), warp_);
  }
  __device__ void wait_for_vectors() const {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
  }
  __device__ void fetch_scan(const UnetStage<T>& stage, const UnetLayer<T>& layer, int channel) {
    if (channel < stage.d)
      scan_.fetch(layer.state + slot_ * (2 * stage.d * stage.n), layer.table, stage.n, channel,
                  static_cast<int>(threadIdx.x) & (stage.n / kStatesOf - 1));
  }
  __device__ int first_channel(const UnetStage<T>& stage) const {
    return static_cast<int>(threadIdx.x) >> stage.lane_bits;
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
      scan(stage, l, more ? (l + 1 < end ? l + 1 : l) : -1, vectors, x, y, fresh);
      __syncthreads();
      multiply(linear_, pairs(layer.linear, d, d), more ? pairs(after.linear, d, d) : Walk<T>{}, y,
               false, warp_, [&](int i, float2 ab) {
                 const float sum = x[i] + (ab.x + bias[i]) * sigmoid_of(ab.y + bias[d + i]);
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
                   gated[i] = from_float<T>(scale * ab.x * sigmoid_of(scale * ab.y));
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

  // after: the layer whose first channels are asked for, -1: none.
  __device__ void scan(const UnetStage<T>& stage, int l, int after, const float* vectors, float* x,
                       T* y, bool fresh) {
    const int d = stage.d, n = stage.n, lanes = n / kStatesOf,
              at_once = kTeamThreads >> stage.lane_bits;
    const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
    float4* const states = reinterpret_cast<float4*>(unet_.layers[l].state + slot_ * (2 * d * n));
    const float scale = rstd(x, d);
#pragma unroll 1
    for (int c = first_channel(stage); c < d; c += at_once) {
      const float u = to_float(from_float<T>(x[c] * vectors[c] * scale));
      float4 h[2] = {scan_.h[0], scan_.h[1]};
      if (fresh) h[0] = h[1] = float4{0, 0, 0, 0};
      float sum = lane == 0 ? vectors[d + c] * u : 0.f;
      const auto step = [&](float& re, float& im, float z_re, float z_im, float K_re, float K_im) {
        sum = advance(re, im, z_re, z_im, K_re, K_im, u, sum);
      };
      step(h[0].x, h[0].y, scan_.z_re.x, scan_.z_im.x, scan_.K_re.x, scan_.K_im.x);
      step(h[0].z, h[0].w, scan_.z_re.y, scan_.z_im.y, scan_.K_re.y, scan_.K_im.y);
      step(h[1].x, h[1].y, scan_.z_re.z, scan_.z_im.z, scan_.K_re.z, scan_.K_im.z);
      step(h[1].z, h[1].w, scan_.z_re.w, scan_.z_im.w, scan_.K_re.w, scan_.K_im.w);
      float4* const state = states + (c * lanes + lane) * 2;
      if (!rehearsal_) state[0] = h[0], state[1] = h[1];
      if (c + at_once < d)
        fetch_scan(stage, unet_.layers[l], c + at_once);
      else if (after >= 0)
        fetch_scan(stage, unet_.layers[after], first_channel(stage));
      for (int far = lanes / 2; far > 0; far /= 2) sum += __shfl_xor_sync(~0u, sum, far);
      if (lane == 0) y[c] = from_float<T>(gelu_of(sum));
    }
  }

  // Bytes that a block gets of a stage: x and the sums of squares.
  __device__ static int mail_of(const UnetStage<T>& stage) {
    return (stage.d + stage.d / 8) * static_cast<int>(sizeof(float));
  }
  // x to the block that goes on with it, whose signal counts the bytes: nobody waits for a store to
  // have arrived.
  __device__ void hand_on(const UnetStage<T>& stage, int s, float* x) {
    uint32_t to, signal;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(x)), "r"(rank_ + 1));
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(signal)
        : "r"(shared_address(signals() + s)), "r"(rank_ + 1));
#pragma unroll 1
    for (int i = 16 * threadIdx.x; i < mail_of(stage); i += 16 * kTeamThreads) {
      const uint4 word = *reinterpret_cast<const uint4*>(x + i / 4);
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, "
          "%4}, [%5];" ::"r"(to + i),
          "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w), "r"(signal)
          : "memory");
    }
  }

  __device__ static void expect_mail(uint64_t* signal, int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(signal)),
        "r"(bytes)
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

}  // namespace coil::cuda
