// Decoding in one launch: all layers of a stack of Mamba blocks, for sequences of one step each.
//
// A persistent grid, a block on each multiprocessor. Sequences form up to four groups of at most 16
// (the height of a tensor core's tile), each with its share of the blocks; groups never meet, so
// their barriers are small and what their blocks exchange is a quarter. Per layer three phases,
// each of which needs all of the one before, and so three barriers:
//   mix   norm of the residual rows (every block for itself, d is small); x and z of this block's
//         channels; conv1d and SiLU; this block's part of the sum over channels that x_proj is
//   scan  the parts of x_proj added in a fixed order; dt_proj, softplus, the step of the scan, gate
//   out   this block's columns of out_proj, added to the residual stream
// Weights and states lie in shared memory before they are needed: what a phase has used up is
// fetched for the next layer as soon as it is over, while the barrier is waited for.
//
// d 512, e 1024, n 16, r 32, 12 layers, bf16, 132 multiprocessors. A layer has 3.3 MB of weights,
// 26 KB a block at one sequence and 103 KB at 64 (groups read the same weights: once from memory,
// then from L2). State: 66 KB in and out for each sequence. At B1 latency is all there is: 36
// barriers of about 1 us and three exchanges through L2 a layer, 0.5 to 1 us each (32 KB a block
// of partial sums is the largest): 60 us. At B64 a layer moves 8.4 MB of states and 3.3 MB of
// weights, 4 us of 3 TB/s, under 7 us of exchanges (32 KB a block and phase) and barriers: 85 us.
#include "kernels/cuda/mamba_step.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int kMostRows = kMostGroups * kGroupRows;  // sequences of one launch
constexpr int64_t kMostSequences = 256;              // four launches; beyond, products are large

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
__device__ void store4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
__device__ void store4(bf16* to, float4 x) {
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
        return fmaf(power_of_two(-expf(a) * kLog2e * delta), h, delta * x * b);
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

template <class T>
__global__ void __launch_bounds__(kStepThreads, 1)
    mamba_step_kernel(const __grid_constant__ Step<T> step) {
  extern __shared__ uint4 shared_memory[];
  // Columns that fill a product up, and rows that are not there, stay zero.
  for (int i = threadIdx.x; i < step.cut.bytes / 16; i += kStepThreads) shared_memory[i] = {};
  __syncthreads();
  const StepBlock<T> block(step, reinterpret_cast<unsigned char*>(shared_memory));
  StepBarrier barrier{step.barriers + block.group * kBarrierWords,
                      static_cast<unsigned>(step.cut.blocks)};
  block.fetch_for_mix(0);
  block.fetch_for_scan(0);
  block.fetch_for_out(0);
  block.load_residual();
  copy_wait<2>();
  __syncthreads();
  // Two fetches are later than the one that the coming phase needs.
  for (int l = 0; l < step.layer_count; ++l) {
    block.mix(l);
    barrier.arrive();
    block.fetch_for_mix(l + 1);
    copy_wait<2>();
    barrier.wait();

    block.scan(l);
    barrier.arrive();
    block.fetch_for_scan(l + 1);
    copy_wait<2>();
    barrier.wait();

    block.out(l);
    barrier.arrive();
    block.fetch_for_out(l + 1);
    copy_wait<2>();
    barrier.wait();
  }
  block.norm_last();
  barrier.leave();
}

void check_operands(const MambaStep& op, const StepShape& shape, Device device) {
  const char* const name = "mamba_step";
  const int64_t t = op.rows->total(), slots = op.rows->slots();
  const auto [d, e, n, w, r] = shape;
  const DType act = activation(op.layers[0].in_proj);
  const auto here = [&](const char* operand, const View& view, DType dtype,
                        std::initializer_list<int64_t> sizes) {
    expect(name, operand, view, dtype, sizes);
    expect_here(name, operand, view, device);
  };
  const auto state = [&](const char* operand, const View& view, int64_t rows, int64_t columns) {
    if (!view && slots == 0) return;
    expect_rank(name, operand, view, 3);
    here(operand, view, DType::f32, {view.rows(), rows, columns});
    check(view.rows() >= slots, "{}: {} is {}, expected {} slots or more", name, operand,
          view.shape(), slots);
  };
  here("x", op.x, DType::f32, {t, d});
  here("y", op.y, act, {t, d});
  here("norm_f", op.norm_f, DType::f32, {d});
  for (const MambaStep::Layer& layer : op.layers) {
    here("norm", layer.norm, DType::f32, {d});
    here("in_proj", layer.in_proj, act, {2 * e, d});
    if (layer.in_proj_bias) here("in_proj_bias", layer.in_proj_bias, DType::f32, {2 * e});
    here("conv_weight", layer.conv_weight, DType::f32, {e, w});
    if (layer.conv_bias) here("conv_bias", layer.conv_bias, DType::f32, {e});
    here("x_proj", layer.x_proj, act, {r + 2 * n, e});
    here("dt_proj", layer.dt_proj, act, {e, r});
    here("dt_bias", layer.dt_bias, DType::f32, {e});
    here("A_log", layer.A_log, DType::f32, {e, n});
    here("D", layer.D, DType::f32, {e});
    here("out_proj", layer.out_proj, act, {d, e});
    if (layer.out_proj_bias) here("out_proj_bias", layer.out_proj_bias, DType::f32, {d});
    state("conv_state", layer.conv_state, w - 1, e);
    state("ssm_state", layer.ssm_state, e, n);
  }
}

// Whole words of 16 bytes: contiguous, at a multiple of 16.
bool in_words(const View& view) {
  return !view || (view.contiguous() && reinterpret_cast<uintptr_t>(view.data) % 16 == 0);
}
bool in_words(const MambaStep& op) {
  bool all = in_words(op.x) && in_words(op.y) && in_words(op.norm_f);
  for (const MambaStep::Layer& layer : op.layers)
    for (const View& view :
         {layer.norm, layer.in_proj, layer.in_proj_bias, layer.conv_weight, layer.conv_bias,
          layer.x_proj, layer.dt_proj, layer.dt_bias, layer.A_log, layer.D, layer.out_proj,
          layer.out_proj_bias, layer.conv_state, layer.ssm_state})
      all = all && in_words(view);
  return all;
}

bool offered(const StepShape& shape) {
  const auto [d, e, n, w, r] = shape;
  return d % kChunk == 0 && d <= kNormWords * 128 && e % kChunk == 0 && n >= 4 && n <= 128 &&
         (n & (n - 1)) == 0 && r % kSlice == 0 && r + 2 * n <= kStepThreads / 4 && w >= 1 &&
         w <= 16;
}

template <class T>
void launch(const Step<T>& step, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(step.cut.groups * step.cut.blocks));
  config.blockDim = dim3(kStepThreads);
  config.dynamicSmemBytes = static_cast<size_t>(step.cut.bytes);
  config.stream = stream;
  cudaLaunchAttribute together{};  // the barrier needs all blocks to run at once
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  config.attrs = &together;
  config.numAttrs = 1;
  check_call(cudaLaunchKernelEx(&config, mamba_step_kernel<T>, step), "mamba_step");
}

}  // namespace

bool CudaBackend::try_run(const MambaStep& op) {
  const char* const name = "mamba_step";
  check(op.rows != nullptr, "{}: rows are missing", name);
  if (op.layers.empty() || op.layers.size() > kStepLayers) return false;
  const MambaStep::Layer& model = op.layers[0];
  expect_rank(name, "x", op.x, 2);
  expect_rank(name, "conv_weight", model.conv_weight, 2);
  expect_rank(name, "dt_proj", model.dt_proj, 2);
  expect_rank(name, "A_log", model.A_log, 2);
  const int64_t t = op.rows->total(),
                sizes[] = {op.x.cols(), model.A_log.rows(), model.A_log.cols(),
                           model.conv_weight.cols(), model.dt_proj.cols()};
  for (const int64_t size : sizes)
    if (size > 1 << 20) return false;
  const StepShape shape{static_cast<int>(sizes[0]), static_cast<int>(sizes[1]),
                        static_cast<int>(sizes[2]), static_cast<int>(sizes[3]),
                        static_cast<int>(sizes[4])};
  check_operands(op, shape, device());
  const std::span<const Piece> pieces = op.rows->pieces();
  check(t == static_cast<int64_t>(pieces.size()), "{}: {} rows in {} pieces, expected one each",
        name, t, pieces.size());
  if (t == 0 || t > kMostSequences || !offered(shape) || !in_words(op)) return false;

  int most_shared = 0;
  check_call(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index_),
             name);
  bool done = false;
  with_type(name, model.in_proj, [&](auto type) {
    using T = decltype(type);
    // As many groups as fit into shared memory: fewer exchange more, and what they save, reading
    // weights from L2 again, is hidden.
    StepCut cut{};
    int64_t per_launch = 0;
    for (int groups = kMostGroups; groups > 0; --groups) {
      per_launch = div_up(t, div_up(t, groups * kGroupRows));
      cut = cut_step<T>(shape, static_cast<int>(per_launch), groups, processors_);
      if (cut.bytes <= most_shared) break;
    }
    if (cut.bytes > most_shared) return;
    if (!step_barriers_) {
      constexpr int64_t kBytes = kMostGroups * kBarrierWords * sizeof(unsigned);
      step_barriers_ = static_cast<unsigned*>(alloc(kBytes));
      check_call(cudaMemsetAsync(step_barriers_, 0, kBytes, stream_), name);
    }
    check_call(cudaFuncSetAttribute(mamba_step_kernel<T>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared),
               name);

    const int64_t e = shape.e, outputs = shape.r + 2 * shape.n;
    const Tensor rows(*this, model.in_proj.dtype, {3, per_launch, e});
    const Tensor partial(*this, DType::f32, {cut.groups, cut.mix_blocks * cut.group_rows, outputs});
    Step<T> step;
    step.shape = shape;
    step.layer_count = static_cast<int>(op.layers.size());
    step.eps = op.eps;
    step.norm_f = op.norm_f.as<float>();
    step.mixed = rows.as<T>();
    step.z = step.mixed + per_launch * e;
    step.gated = step.z + per_launch * e;
    step.partial = partial.as<float>();
    step.barriers = step_barriers_;
    for (size_t l = 0; l < op.layers.size(); ++l) {
      const MambaStep::Layer& from = op.layers[l];
      step.layers[l] = {.in_proj = from.in_proj.data,
                        .x_proj = from.x_proj.data,
                        .dt_proj = from.dt_proj.data,
                        .out_proj = from.out_proj.data,
                        .norm = from.norm.as<float>(),
                        .in_bias = from.in_proj_bias.as<float>(),
                        .conv_weight = from.conv_weight.as<float>(),
                        .conv_bias = from.conv_bias.as<float>(),
                        .dt_bias = from.dt_bias.as<float>(),
                        .A_log = from.A_log.as<float>(),
                        .D = from.D.as<float>(),
                        .out_bias = from.out_proj_bias.as<float>(),
                        .conv_state = from.conv_state.as<float>(),
                        .ssm_state = from.ssm_state.as<float>()};
    }
    for (int64_t begin = 0; begin < t; begin += per_launch) {
      // The last launch may have fewer rows; they are cut for the same blocks and memory.
      step.cut = cut;
      step.cut.rows = static_cast<int>(std::min(per_launch, t - begin));
      step.cut.groups = static_cast<int>(div_up(step.cut.rows, cut.group_rows));
      step.x = op.x.row<float>(begin);
      step.y = op.y.row<T>(begin);
      for (int i = 0; i < step.cut.rows; ++i) {
        step.from[i] = pieces[begin + i].from;
        step.to[i] = pieces[begin + i].to;
      }
      launch(step, stream_);
    }
    done = true;
  });
  return done;
}

}  // namespace coil
