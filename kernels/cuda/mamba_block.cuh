// The phases of a decoding step (mamba_step.cu), as one block does them: what threads of their own
// fetch ahead for each, and each.
//
// Ways through L2 that wait for one another: one a phase, the words that it receives, all asked for
// at once. Weights, states and addresses lie in shared memory by then, and states are written back
// after a phase's results are on their way.
#pragma once

#include "kernels/cuda/mamba_step.cuh"

namespace coil::cuda {

struct StepLayer {
  const void *in_proj, *x_proj, *dt_proj, *out_proj;
  const float *norm, *in_bias, *conv_weight, *conv_bias, *dt_bias, *A_log, *D, *out_bias;
  float *conv_state, *ssm_state;
};
static_assert(sizeof(StepLayer) == kLayerBytes);

template <class T>
struct Step {
  StepCut cut;
  StepShape shape;
  int layer_count, generation;  // the first layer's
  float eps;
  const StepLayer* layers;
  const float* x;            // (rows, d), or null:
  const T* table;            // (table_rows, d), of which row ids[i] is x[i]; NaN past its end
  const int32_t* ids_there;  // in global memory, or null: ids
  int64_t table_rows;
  const float* norm_f;
  T* y;           // (rows, d), without a head
  const T* head;  // (v, d)
  float* logits;  // (rows, v)
  char* handed;   // generations of what blocks hand on
  int32_t from[kMostRows], to[kMostRows], ids[kMostRows];
};

template <class T>
constexpr int kVector = 16 / sizeof(T);

// Four neighbours at once.
__device__ inline void store4(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }
__device__ inline void store4(bf16* to, float4 x) {
  __nv_bfloat162 pairs[] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(to) = *reinterpret_cast<uint2*>(pairs);
}
__device__ inline float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }
__device__ inline float4 load4(const bf16* from) {
  const float2 low = pair(from), high = pair(from + 2);
  return {low.x, low.y, high.x, high.y};
}
__device__ inline float4 as_floats(const uint4& word) {
  return {__uint_as_float(word.x), __uint_as_float(word.y), __uint_as_float(word.z),
          __uint_as_float(word.w)};
}

enum StepSignal { kMixThere, kScanThere, kOutThere, kMixUsed, kScanUsed, kOutUsed, kCleared };

// What one block does. Rows count within the group unless an array is of all rows.
template <class T>
struct StepBlock {
  const Step<T>& s;
  unsigned char* const memory;
  const int group, block, first_row, rows;
  const int mix_channel, mix_channels;                         // of mix
  const int scan_row, scan_rows, scan_channel, scan_channels;  // of scan
  const int column, columns;                                   // of out
  const int word, words;                                       // of head

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
        scan_channels(scan_rows > 0 && block < s.cut.parts * s.cut.scan_blocks
                          ? clipped(scan_channel, s.cut.scan_slices * kSlice, s.shape.e)
                          : 0),
        column((block - s.cut.out_first) * s.cut.tiles * kSlice),
        columns(column < 0 ? 0 : clipped(column, s.cut.tiles * kSlice, s.shape.d)),
        word(block * s.cut.head_tiles * kSlice),
        words(clipped(word, s.cut.head_tiles * kSlice, s.shape.v)) {}

  __device__ static int clipped(int first, int count, int end) {
    return max(0, min(count, end - first));
  }
  __device__ T* act_at(int offset) const { return reinterpret_cast<T*>(memory + offset); }
  __device__ float* float_at(int offset) const { return reinterpret_cast<float*>(memory + offset); }
  __device__ uint64_t* signal(StepSignal which) const {
    return reinterpret_cast<uint64_t*>(memory + s.cut.signals) + which;
  }
  __device__ const StepLayer& layer_at(int offset) const {
    return *reinterpret_cast<const StepLayer*>(memory + offset);
  }
  __device__ int outputs() const { return s.shape.r + 2 * s.shape.n; }
  // Of what layer l hands on.
  template <class V>
  __device__ V* handed(int64_t offset, int l) const {
    const unsigned generation = static_cast<unsigned>(s.generation + l) % kGenerations;
    return reinterpret_cast<V*>(s.handed + generation * s.cut.generation + offset);
  }
  __device__ float* partial(int l, int from_block) const {
    return handed<float>(s.cut.partial, l) +
           (group * s.cut.mix_blocks + from_block) * s.cut.group_rows * outputs();
  }
  __device__ const T* embedded(int row) const {  // null: no such id
    const int64_t id = s.ids_there ? s.ids_there[first_row + row] : s.ids[first_row + row];
    return id < 0 || id >= s.table_rows ? nullptr : s.table + id * s.shape.d;
  }

  // Copies of rows of `bytes` bytes by the threads that fetch; from(row) null: zeros.
  __device__ static int fetcher() { return static_cast<int>(threadIdx.x) - kStepThreads; }
  template <class F>
  __device__ void fetch(void* to, int to_stride, int rows_there, int bytes, F&& from) const {
    const unsigned words = static_cast<unsigned>(bytes) / 16, reciprocal = ~0u / words + 1;
    const int all = rows_there * static_cast<int>(words);
#pragma unroll 1
    for (int i = fetcher(); i < all; i += kFetchThreads) {
      const int row = words == 1 ? i : static_cast<int>(__umulhi(i, reciprocal));
      const int at = (i - row * static_cast<int>(words)) * 16;
      const char* const row_from = reinterpret_cast<const char*>(from(row));
      copy_ahead(static_cast<char*>(to) + row * to_stride + at,
                 row_from ? row_from + at : reinterpret_cast<const char*>(s.layers),
                 row_from ? 16 : 0);
    }
  }
  template <class V>
  __device__ void fetch(void* to, const V* from, int count) const {
    fetch(to, 0, 1, count * static_cast<int>(sizeof(V)), [&](int) { return from; });
  }

  __device__ void fetch_for_mix(int l) const {
    const int c = mix_channel, count = mix_channels;
    if (count > 0) {
      constexpr int kSize = sizeof(T);
      const int d = s.shape.d, w = s.shape.w, taps = w - 1, channels = s.cut.slices * kSlice;
      const int64_t e = s.shape.e;
      const StepLayer& layer = s.layers[l];
      const T* const in_proj = static_cast<const T*>(layer.in_proj);
      // Tiles of x and z take turns.
      fetch(act_at(s.cut.in_proj), s.cut.d_stride * kSize, 2 * count, d * kSize, [&](int i) {
        const int tile = i / kSlice, channel = c + tile / 2 * kSlice + i % kSlice;
        return in_proj + (tile % 2 * e + channel) * d;
      });
      if (taps > 0)
        fetch(float_at(s.cut.conv_state), channels * 4, rows * taps, count * 4,
              [&](int i) -> const float* {
                const int64_t slot = s.from[first_row + i / taps];
                return slot < 0 ? nullptr : layer.conv_state + (slot * taps + i % taps) * e + c;
              });
      fetch(act_at(s.cut.x_proj), s.cut.mix_stride * kSize, outputs(), count * kSize,
            [&](int i) { return static_cast<const T*>(layer.x_proj) + i * e + c; });
      float* const bias = float_at(s.cut.in_bias);
      fetch(float_at(s.cut.norm), layer.norm, d);
      fetch(float_at(s.cut.conv_weight), layer.conv_weight + c * w, count * w);
      fetch(float_at(s.cut.conv_bias), layer.conv_bias ? layer.conv_bias + c : nullptr, count);
      fetch(bias, layer.in_bias ? layer.in_bias + c : nullptr, count);
      fetch(bias + channels, layer.in_bias ? layer.in_bias + e + c : nullptr, count);
      fetch(memory + s.cut.mix_layer, reinterpret_cast<const char*>(&layer), kLayerBytes);
    }
    signal_arrive_copied(signal(kMixThere));
  }

  __device__ void fetch_for_scan(int l) const {
    const int c = scan_channel, count = scan_channels;
    if (count > 0) {
      constexpr int kSize = sizeof(T);
      const int n = s.shape.n, r = s.shape.r;
      const StepLayer& layer = s.layers[l];
      fetch(float_at(s.cut.ssm_state), s.cut.scan_slices * kSlice * n * 4, scan_rows, count * n * 4,
            [&](int i) -> const float* {
              const int64_t slot = s.from[first_row + scan_row + i];
              return slot < 0 ? nullptr : layer.ssm_state + (slot * s.shape.e + c) * n;
            });
      const T* const dt_proj = static_cast<const T*>(layer.dt_proj) + static_cast<int64_t>(c) * r;
      fetch(act_at(s.cut.dt_proj), s.cut.r_stride * kSize, count, r * kSize,
            [&](int i) { return dt_proj + i * r; });
      fetch(float_at(s.cut.A_log), layer.A_log + static_cast<int64_t>(c) * n, count * n);
      fetch(float_at(s.cut.dt_bias), layer.dt_bias + c, count);
      fetch(float_at(s.cut.D), layer.D + c, count);
      fetch(memory + s.cut.scan_layer, reinterpret_cast<const char*>(&layer), kLayerBytes);
    }
    signal_arrive_copied(signal(kScanThere));
  }

  __device__ void fetch_for_out(int l) const {
    if (columns > 0) {
      constexpr int kSize = sizeof(T);
      const int64_t e = s.shape.e;
      const StepLayer& layer = s.layers[l];
      fetch(act_at(s.cut.out_proj), s.cut.e_stride * kSize, columns, static_cast<int>(e) * kSize,
            [&](int i) { return static_cast<const T*>(layer.out_proj) + (column + i) * e; });
      fetch(float_at(s.cut.out_bias), layer.out_bias ? layer.out_bias + column : nullptr, columns);
    }
    signal_arrive_copied(signal(kOutThere));
  }

  __device__ void fetch_for_head() const {
    constexpr int kSize = sizeof(T);
    const int d = s.shape.d;
    if (words > 0)
      fetch(act_at(s.cut.in_proj), s.cut.d_stride * kSize, words, d * kSize,
            [&](int i) { return s.head + static_cast<int64_t>(word + i) * d; });
    fetch(float_at(s.cut.norm), s.norm_f, d);
    signal_arrive_copied(signal(kMixThere));
  }

  // What this block will hand on in layer l: all ones again. All have read what stands there.
  __device__ void clear(int l) const {
    const int e = s.shape.e;
    const auto clear_rows = [&](auto* at, int64_t stride, int first, int count, int width) {
      const int per_row = width * static_cast<int>(sizeof(*at)) / 16;
#pragma unroll 1
      for (int i = fetcher(); i < count * per_row; i += kFetchThreads)
        clear_word(reinterpret_cast<uint4*>(at + (first + i / per_row) * stride) + i % per_row);
    };
    if (columns > 0)
      clear_rows(handed<float>(s.cut.x, l) + column, s.shape.d, first_row, rows, columns);
    if (mix_channels > 0) {
      clear_rows(handed<T>(s.cut.mixed_rows, l) + mix_channel, e, first_row, rows, mix_channels);
      clear_rows(handed<T>(s.cut.z_rows, l) + mix_channel, e, first_row, rows, mix_channels);
      clear_rows(partial(l, block), outputs(), 0, rows, outputs());
    }
    if (scan_channels > 0)
      clear_rows(handed<T>(s.cut.gated, l) + scan_channel, e, first_row + scan_row, scan_rows,
                 scan_channels);
    __threadfence();
    signal_arrive(signal(kCleared));
  }

  // What the fetching threads do all along. A block that has passed out(l - 1) has received words
  // that depend on all that was handed on in layer l - 2 and on its having been read, so layer
  // l + 1 may use its place. Nothing of layer l is handed on before that place is cleared, so who
  // has a word of layer l never finds an old one of layer l + 1.
  __device__ void fetch_all() const {
    const int last = s.layer_count - 1;
#pragma unroll 1
    for (int l = 0; l <= last; ++l) {
      if (l > 0) signal_wait(signal(kMixUsed), l - 1);
      fetch_for_mix(l);
      if (l > 0) signal_wait(signal(kScanUsed), l - 1);
      fetch_for_scan(l);
      if (l > 0) signal_wait(signal(kOutUsed), l - 1);
      clear(l + 1);
      fetch_for_out(l);
    }
    signal_wait(signal(kMixUsed), last);
    fetch_for_head();
  }

  // The end of a phase: what was fetched for it and what it made is no longer needed. All threads
  // meet, so that none still waits for what the fetching threads then goes past.
  __device__ void used(StepSignal which) const {
    sync_step();
    if (threadIdx.x == 0) signal_arrive(signal(which));
  }

  // Partial sums of a product into shared memory, (splits, 16, columns and kSlice more, so that
  // rows meet in no bank), and their sum.
  __device__ void keep(int split, int row, int at, int width, const float (&sum)[4]) const {
    const int pitch = width + kSlice;
    float* const to = float_at(s.cut.sums) + (split * kGroupRows + row) * pitch + at;
    if (row < rows) *reinterpret_cast<float2*>(to) = {sum[0], sum[1]};
    if (row + 8 < rows) *reinterpret_cast<float2*>(to + 8 * pitch) = {sum[2], sum[3]};
  }
  __device__ float kept(int splits, int row, int at, int width) const {
    const int pitch = width + kSlice;
    const float* const from = float_at(s.cut.sums) + row * pitch + at;
    float sum = 0;
#pragma unroll 1
    for (int i = 0; i < splits; i += 8) {  // eight loads at once
      float part[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) part[k] = i + k < splits ? from[(i + k) * kGroupRows * pitch] : 0;
      sum +=
          ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
    }
    return sum;
  }

  // The residual stream before the first layer.
  __device__ float4 first_x(int row, int at) const {
    if (s.x) return load4(s.x + static_cast<int64_t>(first_row + row) * s.shape.d + at);
    const T* const from = embedded(row);
    const float nan = __uint_as_float(0x7fffffff);
    return from ? load4(from + at) : float4{nan, nan, nan, nan};
  }
  __device__ void load_residual() const {
    const int width = s.cut.tiles * kSlice;
    float* const residual = float_at(s.cut.residual);
#pragma unroll 1
    for (int i = threadIdx.x * 4; i < rows * width; i += kStepThreads * 4) {
      const int row = s.cut.by_out(i), c = i - row * width;
      if (c < columns) store4(residual + i, first_x(row, column + c));
    }
  }

  // One warp: to = norm of a row of the residual stream before layer l.
  __device__ void norm_row(int l, int row, T* to) const {
    const int lane = threadIdx.x % 32, d = s.shape.d;
    const float* const weight = float_at(s.cut.norm);
    float4 x[kNormWords];
    if (l > 0) {
      const float* const from_row =
          handed<float>(s.cut.x, l - 1) + static_cast<int64_t>(first_row + row) * d;
      uint4 word_of[kNormWords];
      const int count = clipped(lane * 4, d, d) + 127;  // floats from this lane's first, rounded up
      receive<float>((1u << count / 128) - 1, [&](int k) { return from_row + (k * 32 + lane) * 4; },
                     word_of);
#pragma unroll
      for (int i = 0; i < kNormWords; ++i) x[i] = as_floats(word_of[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kNormWords; ++i) {
        const int at = (i * 32 + lane) * 4;
        x[i] = at < d ? first_x(row, at) : float4{};
      }
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kNormWords; ++i)
      sum += (x[i].x * x[i].x + x[i].y * x[i].y) + (x[i].z * x[i].z + x[i].w * x[i].w);
#pragma unroll
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    const float rstd = rsqrtf(sum / static_cast<float>(d) + s.eps);
#pragma unroll
    for (int i = 0; i < kNormWords; ++i)
      if (const int at = (i * 32 + lane) * 4; at < d) {
        const float4 w = load4(weight + at);
        store4(to + at, make_float4(x[i].x * rstd * w.x, x[i].y * rstd * w.y, x[i].z * rstd * w.z,
                                    x[i].w * rstd * w.w));
      }
  }

  __device__ void mix(int l) const {
    const int e = s.shape.e, w = s.shape.w, taps = w - 1, channels = s.cut.slices * kSlice;
    const int width = 2 * channels;
    const bool busy = mix_channels > 0;
    signal_wait(signal(kMixThere), l);
    if (busy) {
      T* const act = act_at(s.cut.act);
      if (const int row = threadIdx.x / 32; row < rows)
        norm_row(l, row, act + row * s.cut.d_stride);
      sync_step();
      products<4>(act, s.cut.d_stride, act_at(s.cut.in_proj), s.cut.d_stride, width / kSlice,
                  s.shape.d, s.cut.in_splits,
                  [&](int tile, int split, int row, int at, const float(&sum)[4]) {
                    keep(split, row, tile * kSlice + at, width, sum);
                  });
      sync_step();
    }
    signal_wait(signal(kCleared), l);
    if (!busy) {
      // Keep up with the others: what stands in layer l + 1's place is cleared by who has this
      // word.
      if (l > 0 && threadIdx.x == 0) {
        uint4 word_of[1];
        receive<float>(
            1, [&](int) { return handed<float>(s.cut.x, l - 1) + int64_t{first_row} * s.shape.d; },
            word_of);
      }
      return used(kMixUsed);
    }

    T* const mixed = act_at(s.cut.mixed);
    float* const xs = float_at(s.cut.mix_x);
    const float *const weight = float_at(s.cut.conv_weight), *const bias = float_at(s.cut.in_bias);
    const float* const state = float_at(s.cut.conv_state);
    // Half of the threads for x, half for z.
    constexpr int kHalf = kStepThreads / 2;
    const bool is_z = threadIdx.x >= kHalf;
#pragma unroll 1
    for (int i = threadIdx.x % kHalf; i < rows * channels; i += kHalf) {
      const int row = s.cut.by_mix(2 * i), c = i - row * channels;
      const int at = c / kSlice * 2 * kSlice + (is_z ? kSlice : 0) + c % kSlice;
      if (c >= mix_channels) continue;
      const int64_t place = static_cast<int64_t>(first_row + row) * e + mix_channel + c;
      const float value = kept(s.cut.in_splits, row, at, width) + bias[c + (is_z ? channels : 0)];
      if (is_z) {
        send(handed<T>(s.cut.z_rows, l) + place, from_float<T>(value));
      } else {
        const float x = to_float(from_float<T>(value));
        float sum = float_at(s.cut.conv_bias)[c];
#pragma unroll 3
        for (int k = 0; k < taps; ++k)
          sum = fmaf(weight[c * w + k], state[(row * taps + k) * channels + c], sum);
        sum = fmaf(weight[c * w + taps], x, sum);
        const T result = from_float<T>(sum * sigmoid_of(sum));
        mixed[row * s.cut.mix_stride + c] = result;
        send(handed<T>(s.cut.mixed_rows, l) + place, result);
        xs[row * channels + c] = x;
      }
    }
    sync_step();
    float* const to_rows = partial(l, block);
    products<1>(mixed, s.cut.mix_stride, act_at(s.cut.x_proj), s.cut.mix_stride, outputs() / kSlice,
                (channels + kChunk - 1) / kChunk * kChunk, 1,
                [&](int tile, int, int row, int at, const float(&sum)[4]) {
                  float* const to = to_rows + row * outputs() + tile * kSlice + at;
                  if (row < rows) send_pair(to, sum[0], sum[1]);
                  if (row + 8 < rows) send_pair(to + 8 * outputs(), sum[2], sum[3]);
                });
    float* const conv_state = layer_at(s.cut.mix_layer).conv_state;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * channels; i += kStepThreads) {
      const int row = s.cut.by_mix(2 * i), c = i - row * channels;
      const int64_t slot = s.to[first_row + row];
      if (slot < 0 || c >= mix_channels) continue;
      float* const to = conv_state + slot * taps * e + mix_channel + c;
#pragma unroll 1
      for (int k = 0; k < taps; ++k)
        to[static_cast<int64_t>(k) * e] =
            k + 1 < taps ? state[(row * taps + k + 1) * channels + c] : xs[i];
    }
    used(kMixUsed);
  }

  // Where word i of (2, part_rows, scanned channels) of x and z comes from; null: nowhere.
  __device__ const T* xz_from(int l, int i) const {
    const int per_row = s.cut.scan_slices * kSlice / kVector<T>;
    if (i >= 2 * s.cut.part_rows * per_row) return nullptr;
    const int both = s.cut.by_scan_words(i), at = (i - both * per_row) * kVector<T>;
    const bool is_z = both >= s.cut.part_rows;
    const int row = both - (is_z ? s.cut.part_rows : 0);
    if (row >= scan_rows || at >= scan_channels) return nullptr;
    return handed<T>(is_z ? s.cut.z_rows : s.cut.mixed_rows, l) +
           static_cast<int64_t>(first_row + scan_row + row) * s.shape.e + scan_channel + at;
  }

  __device__ void scan(int l) const {
    if (scan_channels == 0) return used(kScanUsed);
    const int e = s.shape.e, n = s.shape.n, r = s.shape.r, count = s.cut.scan_slices * kSlice;
    signal_wait(signal(kScanThere), l);
    float* const rates = float_at(s.cut.A_log);
#pragma unroll 1
    for (int i = threadIdx.x; i < count * n; i += kStepThreads)
      rates[i] = ScanOperands<T>::rate(rates[i]);

    // dt|B|C (part_rows, r + 2n): a thread adds 4 columns of every lanes-th block, then `adders`
    // threads the sums of a column. With the first of them x and z are asked for.
    T* const xz = act_at(s.cut.xz);  // (2, part_rows, count)
    float* const sums = float_at(s.cut.sums);
    const int part_words = s.cut.part_rows * outputs() / 4, pitch = part_words * 4 + 4;
    const int lanes = min(kStepThreads / part_words, s.cut.mix_blocks);
    const int thread = static_cast<int>(threadIdx.x);
    const T* const xz_first = xz_from(l, thread);
    uint4 xz_word = xz_first ? load_word(xz_first) : uint4{};
    const int lane = s.cut.by_part_words(thread), at = thread - lane * part_words;
    if (lane < lanes) {
      const bool there = s.cut.by_outputs(at * 4) < scan_rows;
      const int step = s.cut.group_rows * outputs();
      const float* const first = partial(l, 0) + scan_row * outputs() + at * 4;
      float4 sum{};
      constexpr int kAhead = 4;
#pragma unroll 1
      for (int k = lane; k < s.cut.mix_blocks; k += kAhead * lanes) {
        uint4 part[kAhead];
        unsigned asked = 0;
#pragma unroll
        for (int j = 0; j < kAhead; ++j)
          if (there && k + j * lanes < s.cut.mix_blocks) asked |= 1u << j;
        receive<float>(
            asked, [&](int j) { return first + (k + j * lanes) * step; }, part);
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const float4 x = as_floats(part[j]);
          sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
        }
      }
      store4(sums + lane * pitch + at * 4, sum);
    }
    while (missing<T>(xz_word)) xz_word = load_word(xz_first);
    const int xz_words = 2 * s.cut.part_rows * count / kVector<T>;
    auto* const xz_to = reinterpret_cast<uint4*>(xz);
    if (thread < xz_words) xz_to[thread] = xz_word;
#pragma unroll 1
    for (int i = thread + kStepThreads; i < xz_words; i += kStepThreads) {
      const T* const from = xz_from(l, i);
      uint4 more[1];
      receive<T>(
          from ? 1 : 0, [&](int) { return from; }, more);
      xz_to[i] = more[0];
    }
    sync_step();
    T* const dt_low = act_at(s.cut.dt_low);  // (16, r)
    float* const BC = float_at(s.cut.BC);    // (part_rows, 2n)
    const int adders = s.cut.adders, shift = __ffs(adders) - 1;
#pragma unroll 1
    for (int begin = 0; begin < part_words * 4 * adders; begin += kStepThreads) {
      const int i = (begin + thread) >> shift;
      const bool active = i < part_words * 4;
      float sum = 0;
      if (active)
#pragma unroll 4
        for (int k = thread & (adders - 1); k < lanes; k += adders) sum += sums[k * pitch + i];
#pragma unroll 1
      for (int by = adders / 2; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
      if (!active || (thread & (adders - 1)) != 0) continue;
      const int row = s.cut.by_outputs(i), column_of = i - row * outputs();
      const T value = from_float<T>(sum);
      if (column_of < r)
        dt_low[row * s.cut.r_stride + column_of] = value;
      else
        BC[row * 2 * n + column_of - r] = to_float(value);
    }
    sync_step();
    float* const dt = float_at(s.cut.dt);  // (part_rows, count), after softplus
    products<1>(dt_low, s.cut.r_stride, act_at(s.cut.dt_proj), s.cut.r_stride, count / kSlice,
                (r + kChunk - 1) / kChunk * kChunk, 1,
                [&](int tile, int, int row, int at_column, const float(&sum)[4]) {
                  const int c = tile * kSlice + at_column;
                  const float2 bias = *reinterpret_cast<const float2*>(float_at(s.cut.dt_bias) + c);
#pragma unroll
                  for (int high = 0; high < 2; ++high)
                    if (row + 8 * high < scan_rows)
                      *reinterpret_cast<float2*>(dt + (row + 8 * high) * count + c) = {
                          softplus_of(sum[2 * high] + bias.x),
                          softplus_of(sum[2 * high + 1] + bias.y)};
                });
    sync_step();

    // n / 4 lanes a channel, four states each.
    float* const ssm_state = layer_at(s.cut.scan_layer).ssm_state;
    const int quarters = n / 4, by_quarters = __ffs(quarters) - 1;
    const int items = scan_rows * count * quarters;
#pragma unroll 1
    for (int begin = 0; begin < items; begin += kStepThreads) {
      const int i = begin + thread, quarter = i & (quarters - 1);
      const int place = i < items ? i >> by_quarters : 0;  // (row, channel)
      const int row = s.cut.by_scan(place), c = place - row * count;
      const bool active = i < items && c < scan_channels;
      const float delta = dt[place];
      const float x = to_float(xz[place]), z = to_float(xz[s.cut.part_rows * count + place]);
      const auto four = [&](int offset, int from) {
        return load4(float_at(offset) + from + quarter * 4);
      };
      const float4 rate = four(s.cut.A_log, c * n), B = four(s.cut.BC, row * 2 * n);
      const float4 C = four(s.cut.BC, row * 2 * n + n), before = four(s.cut.ssm_state, place * n);
      const float input = delta * x;
      const auto step = [&](float h, float a, float b) {
        return fmaf(fast_exp2(a * delta), h, input * b);
      };
      const float4 h{step(before.x, rate.x, B.x), step(before.y, rate.y, B.y),
                     step(before.z, rate.z, B.z), step(before.w, rate.w, B.w)};
      float y = fmaf(C.x, h.x, C.y * h.y) + fmaf(C.z, h.z, C.w * h.w);
#pragma unroll 1
      for (int by = quarters / 2; by > 0; by /= 2) y += __shfl_xor_sync(~0u, y, by);
      if (!active) continue;
      const int all_row = first_row + scan_row + row;
      if (quarter == 0)
        send(handed<T>(s.cut.gated, l) + static_cast<int64_t>(all_row) * e + scan_channel + c,
             from_float<T>(fmaf(float_at(s.cut.D)[c], x, y) * z * sigmoid_of(z)));
      if (const int64_t slot = s.to[all_row]; slot >= 0)
        store4(ssm_state + (slot * e + scan_channel + c) * n + quarter * 4, h);
    }
    used(kScanUsed);
  }

  // out_proj: every warp receives the chunks of gated rows that it multiplies, and no others.
  __device__ void out_products(int l) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, q = lane % 4;
    const int e = s.shape.e, width = s.cut.tiles * kSlice;
    if (warp >= s.cut.out_splits) return;
    const T* const low = handed<T>(s.cut.gated, l) + static_cast<int64_t>(first_row + row) * e;
    const T* const high = low + 8 * static_cast<int64_t>(e);
    constexpr int kTiles = 2, kHop = kStepWarps * kChunk;
#pragma unroll 1
    for (int tile = 0; tile < s.cut.tiles; tile += kTiles) {
      float sum[kTiles][4] = {};
      const T* const w = act_at(s.cut.out_proj) + tile * kSlice * s.cut.e_stride;
      if constexpr (std::is_same_v<T, bf16>) {
        constexpr int kAhead = 4;
#pragma unroll 1
        for (int begin = warp * kChunk; begin < e; begin += kAhead * kHop) {
          uint4 word_of[2 * kAhead];
          unsigned asked = 0;
#pragma unroll
          for (int k = 0; k < kAhead; ++k)
            if (begin + k * kHop < e)
              asked |= (row < rows ? 1u : 0) << 2 * k | (row + 8 < rows ? 2u : 0) << 2 * k;
          receive<T>(
              asked, [&](int k) { return (k % 2 ? high : low) + begin + k / 2 * kHop + q * 8; },
              word_of);
#pragma unroll
          for (int k = 0; k < kAhead; ++k)
            if (const int p = begin + k * kHop; p < e)
#pragma unroll
              for (int j = 0; j < kTiles; ++j)
                if (tile + j < s.cut.tiles)
                  add_chunk(sum[j], word_of[2 * k], word_of[2 * k + 1],
                            *reinterpret_cast<const uint4*>(
                                w + (j * kSlice + row) * s.cut.e_stride + p + q * 8));
        }
      } else {
#pragma unroll 1
        for (int begin = warp * kChunk; begin < e; begin += kHop)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint4 word_of[kChunk / 4];
            receive<T>(
                row + half * 8 < rows ? 0xffu : 0,
                [&](int k) { return (half ? high : low) + begin + k * 4; }, word_of);
#pragma unroll
            for (int j = 0; j < 2 * kTiles; ++j)
              if (tile + j / 2 < s.cut.tiles) {
                const float* const column_of =
                    w + (j / 2 * kSlice + 2 * q + j % 2) * s.cut.e_stride + begin;
                float& add = sum[j / 2][2 * half + j % 2];
#pragma unroll
                for (int k = 0; k < kChunk / 4; ++k) {
                  const float4 x = as_floats(word_of[k]), y = load4(column_of + k * 4);
                  add = fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, add))));
                }
              }
          }
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        if (tile + j < s.cut.tiles) keep(warp, row, (tile + j) * kSlice + 2 * q, width, sum[j]);
    }
  }

  __device__ void out(int l) const {
    if (columns == 0) return used(kOutUsed);
    const int d = s.shape.d, width = s.cut.tiles * kSlice;
    signal_wait(signal(kOutThere), l);
    out_products(l);
    sync_step();
    float *const residual = float_at(s.cut.residual), *const bias = float_at(s.cut.out_bias);
    float* const to = handed<float>(s.cut.x, l) + static_cast<int64_t>(first_row) * d + column;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * width; i += kStepThreads) {
      const int row = s.cut.by_out(i), c = i - row * width;
      if (c >= columns) continue;
      const float x = residual[i] + (kept(s.cut.out_splits, row, c, width) + bias[c]);
      send(to + static_cast<int64_t>(row) * d + c, x);
      residual[i] = x;
    }
    used(kOutUsed);
  }

  // The last norm, and the head where there is one.
  __device__ void end() const {
    const int warp = threadIdx.x / 32, l = s.layer_count, d = s.shape.d;
    signal_wait(signal(kMixThere), l);
    T* const act = act_at(s.cut.act);
    const int row_of = s.head ? warp : block + warp * s.cut.blocks;
    if (row_of < rows && (s.head == nullptr || words > 0))
      norm_row(l, row_of,
               s.head ? act + row_of * s.cut.d_stride
                      : s.y + static_cast<int64_t>(first_row + row_of) * d);
    if (words == 0) return;
    const int width = s.cut.head_tiles * kSlice;
    sync_step();
    products<2>(act, s.cut.d_stride, act_at(s.cut.in_proj), s.cut.d_stride, s.cut.head_tiles, d,
                s.cut.head_splits, [&](int tile, int split, int row, int at, const float(&sum)[4]) {
                  keep(split, row, tile * kSlice + at, width, sum);
                });
    sync_step();
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * width; i += kStepThreads) {
      const int row = s.cut.by_head(i), c = i - row * width;
      if (c < words)
        s.logits[static_cast<int64_t>(first_row + row) * s.shape.v + word + c] =
            kept(s.cut.head_splits, row, c, width);
    }
  }
};

}  // namespace coil::cuda
