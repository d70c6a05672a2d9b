// The phases of a decoding step (mamba_step.cu), as one block does them: what threads of their own
// copy for each, and each.
//
// Ways through L2 that wait for one another: one a phase, the words that it receives, all asked for
// at once. Weights and states lie in shared memory by then. A block goes through all of this code
// once a layer, so what is written once is fetched once: copies are a table and one loop, and the
// head is a last round of mix.
#pragma once

#include "kernels/cuda/mamba_step.cuh"

namespace coil::cuda {

template <class T>
struct Step {
  StepCut cut;
  StepShape shape;
  int layer_count, generation;  // of the words that come before the first layer
  float eps, per_d;             // 1 / d
  const StepLayer* layers;      // one more than layer_count
  const StepCopies* copies;     // of each block
  const float* x;               // (rows, d), or null:
  const T* table;               // (table_rows, d), of which row ids[i] is x[i]; NaN past its end
  const int32_t* ids_there;     // in global memory, or null: ids
  int64_t table_rows;
  T* y;                                                    // (rows, d), without a head
  float* logits;                                           // (rows, v)
  char* handed;                                            // generations of what blocks hand on
  int32_t from[kMostRows], to[kMostRows], ids[kMostRows];  // -1 past the last
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
__device__ inline float4 as_floats(const uint4& word) {
  return {__uint_as_float(word.x), __uint_as_float(word.y), __uint_as_float(word.z),
          __uint_as_float(word.w)};
}

enum StepSignal { kMixThere, kScanThere, kCleared, kOutThere, kMixUsed, kScanUsed, kOutUsed };
static_assert(kMixUsed == kStages);

template <class T>
struct StepBlock : StepPart {
  const Step<T>& s;
  unsigned char* const memory;
  const int group, block, first_row, rows;

  __device__ StepBlock(const Step<T>& step, unsigned char* shared)
      : StepPart(part_of(step.cut, step.shape, blockIdx.x % step.cut.blocks)),
        s(step),
        memory(shared),
        group(blockIdx.x / s.cut.blocks),
        block(blockIdx.x % s.cut.blocks),
        first_row(group * s.cut.group_rows),
        rows(min(s.cut.group_rows, s.cut.rows - first_row)) {
    scan_rows = min(scan_rows, rows - scan_row);
  }

  __device__ T* act_at(int offset) const { return reinterpret_cast<T*>(memory + offset); }
  __device__ float* float_at(int offset) const { return reinterpret_cast<float*>(memory + offset); }
  __device__ uint64_t* signal(int which) const {
    return reinterpret_cast<uint64_t*>(memory + s.cut.signals) + which;
  }
  __device__ int outputs() const { return s.shape.r + 2 * s.shape.n; }
  // What layer l hands on; -1: what comes before the first.
  __device__ char* generation(int l) const {
    const unsigned which = static_cast<unsigned>(s.generation + 1 + l) % kGenerations;
    return s.handed + which * s.cut.generation;
  }
  template <class V>
  __device__ V* handed(char* generation, int64_t offset, int row, int width) const {
    return reinterpret_cast<V*>(generation + offset) +
           static_cast<int64_t>(first_row + row) * width;
  }
  // Parts of x_proj, (rows, r + 2n in tiles of 8, mix_blocks, 8), from a row on: a block writes
  // whole sectors of 32 bytes, and neighbouring blocks' are read together.
  __device__ float* partial(char* generation, int row) const {
    return handed<float>(generation, s.cut.partial, row, outputs() * s.cut.mix_blocks);
  }

  // At the start: addresses and copies into shared memory, zeros, signals, and the residual stream
  // before the first layer on its way.
  __device__ void begin() const {
    const int thread = static_cast<int>(threadIdx.x);
    const auto bring = [&](int to, const void* from, int bytes) {
#pragma unroll 1
      for (int i = thread; i < bytes / 8; i += kBlockThreads)
        reinterpret_cast<uint64_t*>(memory + to)[i] = static_cast<const uint64_t*>(from)[i];
    };
    static_assert(sizeof(StepLayer) % 8 == 0 && sizeof(StepCopies) % 8 == 0);
    bring(s.cut.layers, s.layers, (s.layer_count + 1) * static_cast<int>(sizeof(StepLayer)));
    bring(s.cut.copies, s.copies + block, static_cast<int>(sizeof(StepCopies)));
#pragma unroll 1
    for (int i = s.cut.zeros / 16 + thread; i < s.cut.bytes / 16; i += kBlockThreads)
      reinterpret_cast<uint4*>(memory)[i] = {};
    __syncthreads();
    if (thread == 0)
#pragma unroll 1
      for (int i = kMixThere; i <= kOutUsed; ++i)
        signal_init(signal(i), i < kMixUsed ? kFetchThreads : kStepWarps);
    const int width = s.cut.tiles * kSlice, d = s.shape.d;
#pragma unroll 1
    for (int i = thread; i < rows * width; i += kBlockThreads) {
      const int row = s.cut.by_out(i), c = i - row * width;
      if (c >= columns) continue;
      float x = __uint_as_float(0x7fffffff);
      if (s.x) {
        x = s.x[static_cast<int64_t>(first_row + row) * d + column + c];
      } else {
        const int64_t id = s.ids_there ? s.ids_there[first_row + row] : s.ids[first_row + row];
        if (id >= 0 && id < s.table_rows) x = to_float(s.table[id * d + column + c]);
      }
      float_at(s.cut.residual)[i] = x;
      send(handed<float>(generation(-1), s.cut.x, row, d) + column + c, x);
    }
    __syncthreads();
  }

  // What the copying threads do all along. Of what a block hands on in layer l + 1, the place is
  // cleared before it hands anything on in layer l, and after its out(l - 1): words that it has
  // received by then depend on all that was handed on in layer l - 2 and on its having been read.
  // A block that reads words of layer l + 1 has read some of layer l, or of the same layer, that
  // depend on those of all blocks: so it never finds old ones.
  __device__ void copy_all() const {
    const auto& all = *reinterpret_cast<const StepCopies*>(memory + s.cut.copies);
    const int16_t* const begin = all.begin[threadIdx.x / 32 - kStepWarps];
#pragma unroll 1
    for (int l = 0; l <= s.layer_count; ++l)
#pragma unroll 1
      for (int stage = kMixThere; stage <= kOutThere; ++stage) {
        if (l > 0 && stage != kOutThere) signal_wait(signal(kMixUsed + stage), l - 1);
#pragma unroll 1
        for (int k = begin[stage]; k < begin[stage + 1]; ++k) copy(all.copies[k], l);
        if (stage == kCleared) {
          __threadfence();
          signal_arrive(signal(kCleared));
        } else {
          signal_arrive_copied(signal(stage));
        }
      }
  }
  // One warp. A state's words go back, of the layer before, as those of this one come.
  __device__ void copy(const StepCopy c, int l) const {  // by value: once from shared memory
    if (static_cast<unsigned>(l - c.from_layer) >= static_cast<unsigned>(c.layers)) return;
    const auto* const layers = reinterpret_cast<const StepLayer*>(memory + s.cut.layers) + l;
    const auto at = [&](const void* operand) {
      return static_cast<char*>(const_cast<void*>(operand)) + c.offset + group * c.group_stride;
    };
    const void* const operand = layers->operand[c.operand];
    char* const base = at(c.kind == kClear ? generation(l + 1) : operand);
    char* const back = at(l > 0 ? (layers - 1)->operand[c.operand] : nullptr);
    const bool state = c.kind == kState, given = operand != nullptr;
    const int slots = first_row + c.first, all = c.rows * c.words;
#pragma unroll 2
    for (int i = threadIdx.x % 32; i < all; i += 32) {
      const int below = Divider{c.words, c.by_words}(i), word = i - below * c.words;
      const int row = c.row + below, outer = Divider{c.inner, c.by_inner}(row);
      const int64_t offset = (row - outer * c.inner) * c.inner_stride + word * 16;
      unsigned char* const here = memory + c.to + row * c.to_stride + word * 16;
      int64_t place = outer;
      if (state) {
        const int64_t to = s.to[slots + outer];
        if (l > 0 && to >= 0)
          *reinterpret_cast<uint4*>(back + to * c.outer_stride + offset) =
              *reinterpret_cast<const uint4*>(here);
        place = s.from[slots + outer];
      }
      char* const there = base + place * c.outer_stride + offset;
      const bool used = given && place >= 0;
      if (c.kind == kClear)
        clear_word(there);
      else if (!state || l < s.layer_count)
        copy_ahead(here, used ? there : reinterpret_cast<const char*>(s.layers), used ? 16 : 0);
    }
  }

  // The end of a phase: what was copied for it and what it made is no longer needed. Each warp says
  // it, so none still waits for what the copying threads then go past.
  __device__ void used(StepSignal which) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) signal_arrive(signal(which));
  }

  // Partial sums of a product into shared memory, (splits, 16, columns and kSlice more, so that
  // rows meet in no bank), and their sum.
  __device__ void keep(int split, int row, int at, int width, const float (&sum)[4]) const {
    const int pitch = width + kSlice;
    float* const to = float_at(s.cut.sums) + (split * kGroupRows + row) * pitch + at;
    if (row < rows) *reinterpret_cast<float2*>(to) = {sum[0], sum[1]};
    if (row + 8 < rows) *reinterpret_cast<float2*>(to + 8 * pitch) = {sum[2], sum[3]};
  }
  template <int kAhead>  // loads at once
  __device__ float kept(int splits, int row, int at, int width) const {
    const int pitch = width + kSlice, step = kGroupRows * pitch;
    const float* from = float_at(s.cut.sums) + row * pitch + at;
    float sum = 0;
#pragma unroll 1
    for (int left = splits; left > 0; left -= kAhead, from += kAhead * step) {
      float part[kAhead], four[4] = {};
#pragma unroll
      for (int k = 0; k < kAhead; ++k) part[k] = k < left ? from[k * step] : 0;
#pragma unroll
      for (int k = 0; k < kAhead; ++k) four[k % 4] += part[k];
      sum += (four[0] + four[1]) + (four[2] + four[3]);
    }
    return sum;
  }

  // One warp: act = x weight, a row of the residual stream as layer l - 1 hands it on, and what the
  // product with it is to be scaled by, which is known when all of x is.
  __device__ void norm(char* before, int row, T* act) const {
    const int lane = threadIdx.x % 32, d = s.shape.d;
    const float* const weight = float_at(s.cut.norm);
    const float* const from = handed<float>(before, s.cut.x, row, d);
    constexpr int kAhead = 4, kHop = 128;
    float sum = 0;
#pragma unroll 1
    for (int at = lane * 4; at < d; at += kAhead * kHop) {
      uint4 word[kAhead];
      unsigned asked = 0;
#pragma unroll
      for (int k = 0; k < kAhead; ++k) asked |= at + k * kHop < d ? 1u << k : 0;
      receive<float>(
          asked, [&](int k) { return from + at + k * kHop; }, word);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (at + k * kHop >= d) break;
        const float4 x = as_floats(word[k]), w = load4(weight + at + k * kHop);
        store4(act + at + k * kHop, make_float4(x.x * w.x, x.y * w.y, x.z * w.z, x.w * w.w));
        sum += (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
      }
    }
#pragma unroll
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    if (lane == 0) float_at(s.cut.rstd)[row] = rsqrtf(fmaf(sum, s.per_d, s.eps));
  }

  // Layer layer_count is the head.
  __device__ void mix(int l) const {
    const bool head = l == s.layer_count;
    const int count = head ? words : mix_channels;
    const int tiles = head ? s.cut.head_tiles : 2 * s.cut.slices, width = tiles * kSlice;
    const int splits = head ? s.cut.head_splits : s.cut.in_splits;
    signal_wait(signal(kMixThere), l);
    if (count > 0) {
      T* const act = act_at(s.cut.act);
      if (const int row = threadIdx.x / 32; row < rows)
        norm(generation(l - 1), row, act + row * s.cut.d_stride);
      sync_step();
      products<2>(act, s.cut.d_stride, rows, act_at(s.cut.in_proj), s.cut.d_stride, tiles,
                  s.shape.d, splits,
                  [&](int tile, int split, int row, int at, const float(&sum)[4]) {
                    keep(split, row, tile * kSlice + at, width, sum);
                  });
      sync_step();
    }
    if (head) return logits(splits, width);
    signal_wait(signal(kCleared), l);
    if (count > 0) convolve(l, splits, width);
    used(kMixUsed);
  }
  __device__ void logits(int splits, int width) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * width; i += kStepThreads) {
      const int row = s.cut.by_head(i), c = i - row * width;
      if (c < words)
        s.logits[static_cast<int64_t>(first_row + row) * s.shape.v + word + c] =
            kept<8>(splits, row, c, width) * float_at(s.cut.rstd)[row];
    }
  }
  // Conv1d, SiLU and x_proj of this block's channels.
  __device__ void convolve(int l, int splits, int width) const {
    const int e = s.shape.e, w = s.shape.w, taps = w - 1, channels = width / 2;
    char* const now = generation(l);
    T* const mixed = act_at(s.cut.mixed);
    const float *const weight = float_at(s.cut.conv_weight), *const bias = float_at(s.cut.in_bias);
    float* const state = float_at(s.cut.conv_state);
    // x, then z, by warps of their own.
    const int each = rows * channels, all = (each + 31) / 32 * 32;
#pragma unroll 1
    for (int at_all = threadIdx.x; at_all < 2 * all; at_all += kStepThreads) {
      const bool is_z = at_all >= all;
      const int i = at_all - (is_z ? all : 0), row = s.cut.by_mix(i), c = i - row * channels;
      if (i >= each || c >= mix_channels) continue;
      const int at = c + (is_z ? channels : 0);
      const T made =
          from_float<T>(fmaf(kept<8>(splits, row, at, width), float_at(s.cut.rstd)[row], bias[at]));
      if (is_z) {
        send(handed<T>(now, s.cut.z_rows, row, e) + mix_channel + c, made);
      } else {
        float x = to_float(made), sum = fmaf(weight[c * w + taps], x, float_at(s.cut.conv_bias)[c]);
        constexpr int kAhead = 3;
#pragma unroll 1
        for (int end = taps; end > 0; end -= kAhead) {  // from the last step back
          float* const past = state + (row * taps + end) * channels + c;
          float before[kAhead];
#pragma unroll
          for (int k = 0; k < kAhead; ++k) before[k] = k < end ? past[-(k + 1) * channels] : 0;
#pragma unroll
          for (int k = 0; k < kAhead; ++k)
            if (k < end) {  // each to its next place
              past[-(k + 1) * channels] = x;
              sum = fmaf(weight[c * w + end - 1 - k], before[k], sum);
              x = before[k];
            }
        }
        const T result = from_float<T>(sum * sigmoid_of(sum));
        mixed[row * s.cut.mix_stride + c] = result;
        send(handed<T>(now, s.cut.mixed_rows, row, e) + mix_channel + c, result);
      }
    }
    sync_step();
    const int blocks = s.cut.mix_blocks, row_stride = outputs() * blocks;
    float* const to_block = partial(now, 0) + block * kSlice;
    products<1>(mixed, s.cut.mix_stride, rows, act_at(s.cut.x_proj), s.cut.mix_stride,
                outputs() / kSlice, (channels + kChunk - 1) / kChunk * kChunk, 1,
                [&](int tile, int, int row, int at, const float(&sum)[4]) {
                  float* const to = to_block + row * row_stride + tile * blocks * kSlice + at;
                  if (row < rows) send_pair(to, sum[0], sum[1]);
                  if (row + 8 < rows) send_pair(to + 8 * row_stride, sum[2], sum[3]);
                });
  }

  // Where word i of (2, part_rows, scanned channels) of x and z comes from; null: nowhere.
  __device__ const T* xz_from(char* now, int i) const {
    const int per_row = s.cut.by_scan_words.by;
    if (i >= 2 * s.cut.part_rows * per_row) return nullptr;
    const int both = s.cut.by_scan_words(i), at = (i - both * per_row) * kVector<T>;
    const bool is_z = both >= s.cut.part_rows;
    const int row = both - (is_z ? s.cut.part_rows : 0);
    if (row >= scan_rows || at >= scan_channels) return nullptr;
    return handed<T>(now, is_z ? s.cut.z_rows : s.cut.mixed_rows, scan_row + row, s.shape.e) +
           scan_channel + at;
  }

  __device__ void scan(int l) const {
    signal_wait(signal(kScanThere), l);
    if (scan_channels > 0) {
      char* const now = generation(l);
      receive_scan(now);
      sync_step();
      scan_step(now);
    }
    used(kScanUsed);
  }
  // dt|B|C (part_rows, r + 2n), x and z. A lane asks for a word of each 32nd block, and the lanes'
  // sums are added; x and z are asked for before.
  __device__ void receive_scan(char* now) const {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const T* const xz_first = xz_from(now, thread);
    uint4 xz_word = xz_first ? load_word(xz_first) : uint4{};
    const int count = s.cut.scan_slices * kSlice, blocks = s.cut.mix_blocks;
    float* const rates = float_at(s.cut.A_log);
#pragma unroll 4
    for (int i = thread; i < count * s.shape.n; i += kStepThreads)
      rates[i] = ScanOperands<T>::rate(rates[i]);

    const int all = scan_rows * s.cut.by_row_tiles.by;  // tiles of all rows
    const float* const first = partial(now, scan_row) + lane * 4;
    constexpr int kAhead = 4, kHop = 16;
    float4 sum{};
    int tile = thread / 32, from = 0;  // of blocks from + lane / 2, a half of the tile
#pragma unroll 1
    while (tile < all) {
      uint4 part[kAhead];
      int tiles[kAhead], places[kAhead];
      unsigned asked = 0, ends = 0;
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        tiles[k] = tile, places[k] = (tile * blocks + from) * kSlice;
        if (tile < all && from + lane / 2 < blocks) asked |= 1u << k;
        from += kHop;
        if (from >= blocks) from = 0, tile += kStepWarps, ends |= 1u << k;
      }
      receive<float>(
          asked, [&](int k) { return first + places[k]; }, part);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const float4 x = as_floats(part[k]);
        sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
        if (ends >> k & 1) {
          if (tiles[k] < all) add_lanes(tiles[k], sum);
          sum = {};
        }
      }
    }
    const int xz_words = 2 * s.cut.part_rows * count / kVector<T>;
    auto* const xz_to = reinterpret_cast<uint4*>(memory + s.cut.xz);  // (2, part_rows, count)
    const T* xz = xz_first;
#pragma unroll 1
    for (int i = thread; i < xz_words; i += kStepThreads) {
      if (i != thread) {
        xz = xz_from(now, i);
        xz_word = xz ? load_word(xz) : uint4{};
      }
      while (missing<T>(xz_word)) xz_word = load_word(xz);
      xz_to[i] = xz_word;
    }
  }
  // Eight columns of dt|B|C, four in each other lane: the sums of all lanes. Each half of the lanes
  // goes on with half of the columns.
  __device__ void add_lanes(int tile, float4 sum) const {
    const int lane = threadIdx.x % 32, n = s.shape.n, r = s.shape.r;
    const bool upper = lane & 16, odd = lane & 8;
    float a = upper ? sum.z : sum.x, b = upper ? sum.w : sum.y;
    a += __shfl_xor_sync(~0u, upper ? sum.x : sum.z, 16);
    b += __shfl_xor_sync(~0u, upper ? sum.y : sum.w, 16);
    float x = odd ? b : a;
    x += __shfl_xor_sync(~0u, odd ? a : b, 8);
    x += __shfl_xor_sync(~0u, x, 4);
    x += __shfl_xor_sync(~0u, x, 2);
    if ((lane & 6) != 0) return;
    const int row = s.cut.by_row_tiles(tile);
    const int column_of = tile * kSlice + lane % 2 * 4 + lane / 8 - row * outputs();
    const T value = from_float<T>(x);
    if (column_of < r)
      act_at(s.cut.dt_low)[row * s.cut.r_stride + column_of] = value;  // (16, r)
    else
      float_at(s.cut.BC)[row * 2 * n + column_of - r] = to_float(value);  // (part_rows, 2n)
  }
  // dt_proj, and by the same warp the step of the same channels: n / 4 lanes a channel, four states
  // each; what is one of a channel, by a lane a channel before and after.
  __device__ void scan_step(char* now) const {
    const int n = s.shape.n, count = s.cut.scan_slices * kSlice, lane = threadIdx.x % 32;
    const int quarters = n / 4, by_quarters = __ffs(quarters) - 1;
    float *const dt = float_at(s.cut.dt), *const input =
                                              float_at(s.cut.input);  // (part_rows, count)
    const T *const xs = act_at(s.cut.xz), *const zs = xs + s.cut.part_rows * count;
    products<1>(
        act_at(s.cut.dt_low), s.cut.r_stride, scan_rows, act_at(s.cut.dt_proj), s.cut.r_stride,
        count / kSlice, (s.shape.r + kChunk - 1) / kChunk * kChunk, 1,
        [&](int tile, int, int low, int at, const float(&sum)[4]) {
          float* const to = dt + low * count + tile * kSlice + at;
          if (low < scan_rows) *reinterpret_cast<float2*>(to) = {sum[0], sum[1]};
          if (low + 8 < scan_rows) *reinterpret_cast<float2*>(to + 8 * count) = {sum[2], sum[3]};
          __syncwarp();
          const int places = scan_rows * kSlice;
#pragma unroll 1
          for (int i = lane; i < places; i += 32) {
            const int c = tile * kSlice + i % kSlice, place = i / kSlice * count + c;
            const float delta = softplus_of(dt[place] + float_at(s.cut.dt_bias)[c]);
            dt[place] = delta;
            input[place] = delta * to_float(xs[place]);
          }
          __syncwarp();
          const int items = places << by_quarters;
#pragma unroll 2
          for (int begin = 0; begin < items; begin += 32) {
            const int i = begin + lane, quarter = i & (quarters - 1);
            const int row = min(i >> (by_quarters + 3), scan_rows - 1);
            const int c = tile * kSlice + (i >> by_quarters) % kSlice, place = row * count + c;
            const float delta = dt[place], x = input[place];
            const auto four = [&](int offset, int from) {
              return load4(float_at(offset) + from + quarter * 4);
            };
            const float4 rate = four(s.cut.A_log, c * n), B = four(s.cut.BC, row * 2 * n);
            const float4 C = four(s.cut.BC, row * 2 * n + n);
            const float4 before = four(s.cut.ssm_state, place * n);
            const auto step = [&](float h, float a, float b) {
              return fmaf(fast_exp2(a * delta), h, x * b);
            };
            const float4 h{step(before.x, rate.x, B.x), step(before.y, rate.y, B.y),
                           step(before.z, rate.z, B.z), step(before.w, rate.w, B.w)};
            float y = fmaf(C.x, h.x, C.y * h.y) + fmaf(C.z, h.z, C.w * h.w);
#pragma unroll
            for (int by = 1; by < 32; by *= 2)
              if (by < quarters) y += __shfl_xor_sync(~0u, y, by);
            if (i >= items) continue;
            store4(float_at(s.cut.ssm_state) + place * n + quarter * 4, h);
            if (quarter == 0) input[place] = y;  // all have read it: they met above
          }
          __syncwarp();
#pragma unroll 1
          for (int i = lane; i < places; i += 32) {
            const int row = i / kSlice, c = tile * kSlice + i % kSlice, place = row * count + c;
            if (c >= scan_channels) continue;
            const float x = to_float(xs[place]), z = to_float(zs[place]);
            send(handed<T>(now, s.cut.gated, scan_row + row, s.shape.e) + scan_channel + c,
                 from_float<T>(fmaf(float_at(s.cut.D)[c], x, input[place]) * z * sigmoid_of(z)));
          }
        });
  }

  // out_proj: every warp receives the chunks of gated rows that it multiplies, and no others.
  __device__ void out_products(char* now) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, q = lane % 4;
    const int e = s.shape.e, width = s.cut.tiles * kSlice;
    if (warp >= s.cut.out_splits) return;
    const T* const low = handed<T>(now, s.cut.gated, row, e);
    const T* const high = low + 8 * static_cast<int64_t>(e);
    constexpr int kTiles = 2, kHop = kStepWarps * kChunk;
#pragma unroll 1
    for (int tile = 0; tile < s.cut.tiles; tile += kTiles) {
      float sum[kTiles][4] = {};
      const T* const w = act_at(s.cut.out_proj) + tile * kSlice * s.cut.e_stride;
      if constexpr (std::is_same_v<T, bf16>) {
        constexpr int kAhead = 2;
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
    signal_wait(signal(kOutThere), l);
    if (columns > 0) {
      char* const now = generation(l);
      const int d = s.shape.d, width = s.cut.by_out.by;
      out_products(now);
      sync_step();
      float* const residual = float_at(s.cut.residual);
#pragma unroll 1
      for (int i = threadIdx.x; i < rows * width; i += kStepThreads) {
        const int row = s.cut.by_out(i), c = i - row * width;
        if (c >= columns) continue;
        const float sum = kept<16>(s.cut.out_splits, row, c, width) + float_at(s.cut.out_bias)[c];
        const float x = residual[i] + sum;
        send(handed<float>(now, s.cut.x, row, d) + column + c, x);
        residual[i] = x;
      }
    }
    used(kOutUsed);
  }

  // Without a head: y is the last norm, a warp of a block of mix a row.
  __device__ void end() const {
    const int row = block + static_cast<int>(threadIdx.x / 32) * s.cut.mix_blocks, d = s.shape.d;
    if (block >= s.cut.mix_blocks || row >= rows) return;
    char* const before = generation(s.layer_count - 1);
    const float* const weight = static_cast<const float*>(s.layers[s.layer_count].operand[kNorm]);
    const float* const from = handed<float>(before, s.cut.x, row, d);
    T* const to = s.y + static_cast<int64_t>(first_row + row) * d;
    float sum = 0;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      const bool last = pass == 1;
      const float rstd = rsqrtf(fmaf(sum, s.per_d, s.eps));
#pragma unroll 1
      for (int at = threadIdx.x % 32 * 4; at < d; at += 128) {
        uint4 word[1];
        receive<float>(
            1, [&](int) { return from + at; }, word);
        const float4 x = as_floats(word[0]);
        if (last) {
          const float4 w = load4(weight + at);
          store4(to + at, make_float4(x.x * rstd * w.x, x.y * rstd * w.y, x.z * rstd * w.z,
                                      x.w * rstd * w.w));
        } else {
          sum += (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
        }
      }
#pragma unroll 1
      for (int by = 16; by > 0 && !last; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    }
  }
};

}  // namespace coil::cuda
