// The phases of a decoding step (mamba_step.cu), as one block does them: what is fetched ahead for
// each, and each.
#pragma once

#include "kernels/cuda/mamba_step.cuh"

namespace coil::cuda {

constexpr int kMostRows = kMostGroups * kGroupRows;  // sequences of one launch

struct StepLayer {
  const void *in_proj, *x_proj, *dt_proj, *out_proj;
  const float *norm, *in_bias, *conv_weight, *conv_bias, *dt_bias, *A_log, *D, *out_bias;
  float *conv_state, *ssm_state;
};

template <class T>
struct Step {
  StepCut cut;
  StepShape shape;
  int layer_count;
  float eps;
  float* x;  // (rows, d)
  T* y;      // (rows, d)
  const float* norm_f;
  T *mixed, *z, *gated;  // (rows, e): after conv1d and SiLU; the gate; after the scan
  float* partial;        // (groups, mix_blocks, group_rows, r + 2n)
  unsigned* barriers;
  int32_t from[kMostRows], to[kMostRows];
  StepLayer layers[kStepLayers];
};

template <class T>
constexpr int kVector = 16 / sizeof(T);

// Four or two neighbours at once.
__device__ inline void store4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
__device__ inline void store4(bf16* to, float4 x) {
  __nv_bfloat162 pairs[] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(to) = *reinterpret_cast<uint2*>(pairs);
}

// One warp: to = norm of a row of d floats.
template <class T>
__device__ void norm_row(const float* from, const float* weight, T* to, int d, float eps) {
  const int lane = threadIdx.x % 32;
  float4 x[kNormWords];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kNormWords; ++i)
    if (const int at = (i * 32 + lane) * 4; at < d)
      x[i] = __ldcg(reinterpret_cast<const float4*>(from + at));
#pragma unroll
  for (int i = 0; i < kNormWords; ++i)
    if (const int at = (i * 32 + lane) * 4; at < d)
      sum += x[i].x * x[i].x + x[i].y * x[i].y + x[i].z * x[i].z + x[i].w * x[i].w;
#pragma unroll
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  const float rstd = 1.f / sqrtf(sum / static_cast<float>(d) + eps);
#pragma unroll
  for (int i = 0; i < kNormWords; ++i)
    if (const int at = (i * 32 + lane) * 4; at < d) {
      const float4 w = *reinterpret_cast<const float4*>(weight + at);
      store4(to + at, make_float4(x[i].x * rstd * w.x, x[i].y * rstd * w.y, x[i].z * rstd * w.z,
                                  x[i].w * rstd * w.w));
    }
}

// What one block does. Rows count within the group unless an array is of all rows.
template <class T>
struct StepBlock {
  const Step<T>& s;
  unsigned char* const memory;
  const int group, block, first_row, rows;
  const int mix_channel, mix_channels;                         // of mix
  const int scan_row, scan_rows, scan_channel, scan_channels;  // of scan
  const int column, columns;                                   // of out

  __device__ StepBlock(const Step<T>& step, unsigned char* shared)
      : s(step),
        memory(shared),
        group(blockIdx.x / s.cut.blocks),
        block(blockIdx.x % s.cut.blocks),
        first_row(group * s.cut.group_rows),
        rows(min(s.cut.group_rows, s.cut.rows - first_row)),
        mix_channel(block * s.cut.slices * kSlice),
        mix_channels(clipped(mix_channel, s.cut.slices * kSlice, s.shape.e)),
        scan_row(block / s.cut.scan_blocks * s.cut.part_rows),
        scan_rows(clipped(scan_row, s.cut.part_rows, rows)),
        scan_channel(block % s.cut.scan_blocks * s.cut.scan_slices * kSlice),
        scan_channels(clipped(scan_channel, s.cut.scan_slices * kSlice, s.shape.e)),
        column(block * s.cut.tiles * kSlice),
        columns(clipped(column, s.cut.tiles * kSlice, s.shape.d)) {}

  __device__ static int clipped(int first, int count, int end) {
    return max(0, min(count, end - first));
  }
  __device__ T* act_at(int offset) const { return reinterpret_cast<T*>(memory + offset); }
  __device__ float* float_at(int offset) const { return reinterpret_cast<float*>(memory + offset); }
  __device__ int outputs() const { return s.shape.r + 2 * s.shape.n; }
  __device__ void copy_floats(int offset, const float* from, int count) const {
    copy_block(memory + offset, from, count * 4);
  }

  __device__ void fetch_for_mix(int l) const {
    if (l < s.layer_count && mix_channels > 0) {
      const auto& [d, e, n, w, r] = s.shape;
      const StepLayer& layer = s.layers[l];
      const int c = mix_channel, count = mix_channels;
      // Tiles of x and z take turns.
      copy_rows(act_at(s.cut.in_proj), s.cut.d_stride * sizeof(T), 2 * count, d * sizeof(T),
                [&, d = d, e = e](int i) {
                  const int tile = i / kSlice, channel = c + tile / 2 * kSlice + i % kSlice;
                  return static_cast<const T*>(layer.in_proj) +
                         (tile % 2 * static_cast<int64_t>(e) + channel) * d;
                });
      copy_rows(act_at(s.cut.x_proj), s.cut.mix_stride * sizeof(T), outputs(), count * sizeof(T),
                [&, e = e](int i) {
                  return static_cast<const T*>(layer.x_proj) + i * static_cast<int64_t>(e) + c;
                });
      copy_floats(s.cut.conv_weight, layer.conv_weight + c * w, count * w);
      copy_floats(s.cut.conv_bias, layer.conv_bias ? layer.conv_bias + c : nullptr, count);
      copy_floats(s.cut.in_bias, layer.in_bias ? layer.in_bias + c : nullptr, count);
      copy_floats(s.cut.in_bias + count * 4, layer.in_bias ? layer.in_bias + e + c : nullptr,
                  count);
      copy_floats(s.cut.norm, layer.norm, d);
      const int taps = w - 1;
      copy_rows(float_at(s.cut.conv_state), count * 4, rows * taps, count * 4,
                [&, e = e](int i) -> const float* {
                  const int32_t slot = s.from[first_row + i / taps];
                  if (slot < 0) return nullptr;
                  return layer.conv_state + (static_cast<int64_t>(slot) * taps + i % taps) * e + c;
                });
    }
    copy_commit();
  }

  __device__ void fetch_for_scan(int l) const {
    if (l < s.layer_count && scan_rows > 0 && scan_channels > 0) {
      const auto& [d, e, n, w, r] = s.shape;
      const StepLayer& layer = s.layers[l];
      const int c = scan_channel, count = scan_channels;
      const T* const dt_proj = static_cast<const T*>(layer.dt_proj) + static_cast<int64_t>(c) * r;
      if (s.cut.r_stride == r)
        copy_block(act_at(s.cut.dt_proj), dt_proj, count * r * sizeof(T));
      else
        copy_rows(act_at(s.cut.dt_proj), s.cut.r_stride * sizeof(T), count, r * sizeof(T),
                  [&, r = r](int i) { return dt_proj + i * r; });
      copy_floats(s.cut.A_log, layer.A_log + static_cast<int64_t>(c) * n, count * n);
      copy_floats(s.cut.dt_bias, layer.dt_bias + c, count);
      copy_floats(s.cut.D, layer.D + c, count);
      for (int i = 0; i < scan_rows; ++i) {
        const int32_t slot = s.from[first_row + scan_row + i];
        copy_block(float_at(s.cut.ssm_state) + i * count * n,
                   slot < 0 ? nullptr : layer.ssm_state + (static_cast<int64_t>(slot) * e + c) * n,
                   count * n * 4);
      }
    }
    copy_commit();
  }

  __device__ void fetch_for_out(int l) const {
    if (l < s.layer_count && columns > 0) {
      const int e = s.shape.e;
      copy_rows(act_at(s.cut.out_proj), s.cut.e_stride * sizeof(T), columns, e * sizeof(T),
                [&](int i) {
                  return static_cast<const T*>(s.layers[l].out_proj) +
                         static_cast<int64_t>(column + i) * e;
                });
    }
    copy_commit();
  }

  // Partial sums of a product into shared memory, (splits, 16, columns), and their sum.
  __device__ void keep(int split, int row, int at, int width, const float (&sum)[4]) const {
    float* const to = float_at(s.cut.sums) + (split * kGroupRows + row) * width + at;
    *reinterpret_cast<float2*>(to) = {sum[0], sum[1]};
    *reinterpret_cast<float2*>(to + 8 * width) = {sum[2], sum[3]};
  }
  __device__ float kept(int splits, int row, int at, int width) const {
    const float* const from = float_at(s.cut.sums) + row * width + at;
    float sum = 0;
    for (int i = 0; i < splits; ++i) sum += from[i * kGroupRows * width];
    return sum;
  }

  __device__ void mix(int l) const {
    if (mix_channels == 0) return;
    const int e = s.shape.e, w = s.shape.w, taps = w - 1, count = mix_channels;
    const StepLayer& layer = s.layers[l];
    T* const act = act_at(s.cut.act);
    if (const int row = threadIdx.x / 32; row < rows)
      norm_row(s.x + static_cast<int64_t>(first_row + row) * s.shape.d, float_at(s.cut.norm),
               act + row * s.cut.d_stride, s.shape.d, s.eps);
    __syncthreads();
    const int width = 2 * count;
    products(act, s.cut.d_stride, act_at(s.cut.in_proj), s.cut.d_stride, width / kSlice, s.shape.d,
             s.cut.in_splits, [&](int tile, int split, int row, int at, const float(&sum)[4]) {
               keep(split, row, tile * kSlice + at, width, sum);
             });
    __syncthreads();

    T* const mixed = act_at(s.cut.mixed);
    const float *const weight = float_at(s.cut.conv_weight), *const bias = float_at(s.cut.in_bias);
    const float* const state = float_at(s.cut.conv_state);
    for (int i = threadIdx.x; i < rows * count; i += kStepThreads) {
      const int row = i / count, c = i - row * count;
      const int at = c / kSlice * 2 * kSlice + c % kSlice;  // of x; z is one tile on
      const float x = to_float(from_float<T>(kept(s.cut.in_splits, row, at, width) + bias[c]));
      const float z = kept(s.cut.in_splits, row, at + kSlice, width) + bias[count + c];
      float sum = float_at(s.cut.conv_bias)[c];
      const int32_t slot = s.to[first_row + row];
      for (int k = 0; k < taps; ++k) {
        const float before = state[(row * taps + k) * count + c];
        sum = fmaf(weight[c * w + k], before, sum);
        if (slot >= 0)
          layer.conv_state[(static_cast<int64_t>(slot) * taps + k) * e + mix_channel + c] =
              k + 1 < taps ? state[(row * taps + k + 1) * count + c] : x;
      }
      sum = fmaf(weight[c * w + taps], x, sum);
      const T value = from_float<T>(sum * sigmoid_of(sum));
      mixed[row * s.cut.mix_stride + c] = value;
      const int64_t place = static_cast<int64_t>(first_row + row) * e + mix_channel + c;
      s.mixed[place] = value;
      s.z[place] = from_float<T>(z);
    }
    __syncthreads();
    float* const partial = s.partial + (group * s.cut.mix_blocks + block) *
                                           static_cast<int64_t>(s.cut.group_rows) * outputs();
    products(mixed, s.cut.mix_stride, act_at(s.cut.x_proj), s.cut.mix_stride, outputs() / kSlice,
             (count + kChunk - 1) / kChunk * kChunk, 1,
             [&](int tile, int, int row, int at, const float(&sum)[4]) {
               float* const to = partial + row * outputs() + tile * kSlice + at;
               if (row < rows) *reinterpret_cast<float2*>(to) = {sum[0], sum[1]};
               if (row + 8 < rows)
                 *reinterpret_cast<float2*>(to + 8 * outputs()) = {sum[2], sum[3]};
             });
  }

  __device__ void scan(int l) const {
    if (scan_rows <= 0 || scan_channels == 0) return;
    const int e = s.shape.e, n = s.shape.n, r = s.shape.r, count = scan_channels;
    const StepLayer& layer = s.layers[l];
    // x and z, a warp for each row: asked for first, put down once the partial sums are asked for.
    T* const xz = act_at(s.cut.xz);  // (2, scan_rows, count)
    const int warp = threadIdx.x / 32, warp_lane = threadIdx.x % 32, words = count / kVector<T>;
    const auto word_of = [&](int row, int word) {
      const T* const from = row < scan_rows ? s.mixed : s.z;
      const int64_t place = first_row + scan_row + (row < scan_rows ? row : row - scan_rows);
      return __ldcg(reinterpret_cast<const uint4*>(from + place * e + scan_channel) + word);
    };
    const bool has_word = warp < 2 * scan_rows && warp_lane < words;
    uint4 first_word{};
    if (has_word) first_word = word_of(warp, warp_lane);

    // dt|B|C (scan_rows, r + 2n): a thread adds 4 columns of every lanes-th part, then a thread the
    // sums of a column.
    float* const sums = float_at(s.cut.sums);
    const int columns4 = scan_rows * outputs() / 4;
    const int lanes = min(kStepThreads / columns4, s.cut.mix_blocks);
    if (const int lane = threadIdx.x / columns4; lane < lanes) {
      const int at = threadIdx.x - lane * columns4;
      const int64_t step = static_cast<int64_t>(s.cut.group_rows) * outputs();
      const float* from =
          s.partial + (group * s.cut.mix_blocks + lane) * step + scan_row * outputs() + at * 4;
      float4 sum{};
#pragma unroll 4
      for (int k = lane; k < s.cut.mix_blocks; k += lanes, from += lanes * step) {
        const float4 part = __ldcg(reinterpret_cast<const float4*>(from));
        sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
      }
      *reinterpret_cast<float4*>(sums + threadIdx.x * 4) = sum;
    }
    auto* const xz_words = reinterpret_cast<uint4*>(xz);
    if (has_word) xz_words[warp * words + warp_lane] = first_word;
    for (int row = warp; row < 2 * scan_rows; row += kStepWarps)
      for (int i = warp_lane + (row == warp ? 32 : 0); i < words; i += 32)
        xz_words[row * words + i] = word_of(row, i);
    __syncthreads();
    T* const dt_low = act_at(s.cut.dt_low);  // (16, r)
    float* const BC = float_at(s.cut.BC);    // (scan_rows, 2n)
    for (int i = threadIdx.x; i < scan_rows * outputs(); i += kStepThreads) {
      float sum = 0;
      for (int k = 0; k < lanes; ++k) sum += sums[k * columns4 * 4 + i];
      const int row = i / outputs(), at = i - row * outputs();
      const T value = from_float<T>(sum);
      if (at < r)
        dt_low[row * s.cut.r_stride + at] = value;
      else
        BC[row * 2 * n + at - r] = to_float(value);
    }
    __syncthreads();
    float* const dt = float_at(s.cut.dt);  // (scan_rows, count)
    products(dt_low, s.cut.r_stride, act_at(s.cut.dt_proj), s.cut.r_stride, count / kSlice,
             (r + kChunk - 1) / kChunk * kChunk, 1,
             [&](int tile, int, int row, int at, const float(&sum)[4]) {
               float* const to = dt + row * count + tile * kSlice + at;
               if (row < scan_rows) *reinterpret_cast<float2*>(to) = {sum[0], sum[1]};
               if (row + 8 < scan_rows)
                 *reinterpret_cast<float2*>(to + 8 * count) = {sum[2], sum[3]};
             });
    __syncthreads();

    // n / 4 lanes a channel, four states each.
    const int quarters = n / 4, shift = __ffs(quarters) - 1, items = scan_rows * count * quarters;
    for (int begin = 0; begin < items; begin += kStepThreads) {
      const int i = begin + static_cast<int>(threadIdx.x);
      const bool active = i < items;
      const int place = active ? i >> shift : 0, quarter = i & (quarters - 1);  // (row, channel)
      const int row = place / count, c = place - row * count;
      const float delta = softplus_of(dt[place] + float_at(s.cut.dt_bias)[c]);
      const float x = to_float(xz[place]), z = to_float(xz[scan_rows * count + place]);
      const auto four = [&](int offset, int at) {
        return *reinterpret_cast<const float4*>(float_at(offset) + at + quarter * 4);
      };
      const float4 A = four(s.cut.A_log, c * n), B = four(s.cut.BC, row * 2 * n);
      const float4 C = four(s.cut.BC, row * 2 * n + n), before = four(s.cut.ssm_state, place * n);
      const auto step = [&](float h, float a, float b) {
        return fmaf(fast_exp2(-expf(a) * kLog2OfE * delta), h, delta * x * b);
      };
      const float4 h{step(before.x, A.x, B.x), step(before.y, A.y, B.y), step(before.z, A.z, B.z),
                     step(before.w, A.w, B.w)};
      float y = fmaf(C.x, h.x, fmaf(C.y, h.y, fmaf(C.z, h.z, C.w * h.w)));
      for (int by = quarters / 2; by > 0; by /= 2) y += __shfl_xor_sync(~0u, y, by);
      if (!active) continue;
      const int all_row = first_row + scan_row + row;
      if (const int32_t slot = s.to[all_row]; slot >= 0)
        *reinterpret_cast<float4*>(layer.ssm_state +
                                   (static_cast<int64_t>(slot) * e + scan_channel + c) * n +
                                   quarter * 4) = h;
      if (quarter == 0)
        s.gated[static_cast<int64_t>(all_row) * e + scan_channel + c] =
            from_float<T>(fmaf(float_at(s.cut.D)[c], x, y) * z * sigmoid_of(z));
    }
  }

  __device__ void out(int l) const {
    if (columns == 0) return;
    const int d = s.shape.d, e = s.shape.e;
    const StepLayer& layer = s.layers[l];
    T* const act = act_at(s.cut.act);
    const int words = e / kVector<T>;
    if (const int row = threadIdx.x / 32; row < rows) {
      const auto* const from =
          reinterpret_cast<const uint4*>(s.gated + static_cast<int64_t>(first_row + row) * e);
      auto* const to = reinterpret_cast<uint4*>(act + row * s.cut.e_stride);
      constexpr int kAhead = 4;
      for (int begin = threadIdx.x % 32; begin < words; begin += kAhead * 32) {
        uint4 word[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (const int i = begin + k * 32; i < words) word[k] = __ldcg(from + i);
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (const int i = begin + k * 32; i < words) to[i] = word[k];
      }
    }
    __syncthreads();
    products(act, s.cut.e_stride, act_at(s.cut.out_proj), s.cut.e_stride, columns / kSlice, e,
             s.cut.out_splits, [&](int tile, int split, int row, int at, const float(&sum)[4]) {
               keep(split, row, tile * kSlice + at, columns, sum);
             });
    __syncthreads();
    float* const residual = float_at(s.cut.residual);
    for (int i = threadIdx.x; i < rows * columns; i += kStepThreads) {
      const int row = i / columns, c = i - row * columns;
      float sum = kept(s.cut.out_splits, row, c, columns);
      if (layer.out_bias) sum += layer.out_bias[column + c];
      residual[i] += sum;
      s.x[static_cast<int64_t>(first_row + row) * d + column + c] = residual[i];
    }
  }

  __device__ void load_residual() const {
    float* const residual = float_at(s.cut.residual);
    for (int i = threadIdx.x; i < rows * columns; i += kStepThreads)
      residual[i] =
          s.x[static_cast<int64_t>(first_row + i / columns) * s.shape.d + column + i % columns];
  }

  __device__ void norm_last() const {
    if (threadIdx.x >= 32) return;
    for (int row = block; row < rows; row += s.cut.blocks) {
      const int64_t place = static_cast<int64_t>(first_row + row) * s.shape.d;
      norm_row(s.x + place, s.norm_f, s.y + place, s.shape.d, s.eps);
    }
  }
};

}  // namespace coil::cuda
