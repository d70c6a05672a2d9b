// How a decoding step is cut for the blocks of a grid (mamba_step.cu): what each computes, where
// that lies, and what it copies.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/cuda/scan.cuh"

namespace coil::cuda {

constexpr int kStepThreads = 512, kStepWarps = kStepThreads / 32;     // that compute
constexpr int kFetchThreads = 256, kFetchWarps = kFetchThreads / 32;  // that copy
constexpr int kBlockThreads = kStepThreads + kFetchThreads;
constexpr int kSlice = 8;       // channels, or columns of d, that are cut together: a tile's width
constexpr int kGroupRows = 16;  // sequences of a group at most: a tile's height
constexpr int kMostGroups = 4;  // of one launch
constexpr int kMostRows = kMostGroups * kGroupRows;  // sequences of one launch
constexpr int kChunk = 32;       // of the inner dimension of a product, between two loads
constexpr int kGenerations = 3;  // of the words that are handed on

// Elements from row to row of a matrix in shared memory: 64 bytes more than a multiple of 128, so
// that the eight lanes of a 16-byte access, two rows of four, meet no bank twice.
template <class T>
constexpr int padded(int columns) {
  return columns * sizeof(T) % 128 == 0 ? columns + 64 / static_cast<int>(sizeof(T)) : columns;
}

// i / by for i * by < 2^31, without a division.
struct Divider {
  int by;
  unsigned reciprocal;
  __device__ int operator()(int i) const {
    return static_cast<int>(__umulhi(2 * static_cast<unsigned>(i), reciprocal));
  }
};
inline Divider divider(int by) { return {by, 0x7fffffffu / static_cast<unsigned>(by) + 1}; }

// The sequences form groups that never meet, each on blocks of its own. Within a group every phase
// has its own cut:
//   mix   all sequences, `slices` slices of channels a block
//   scan  `part_rows` sequences, `scan_slices` slices of channels a block
//   out   all sequences, `tiles` slices of d a block, from block out_first on
//   head  all sequences, `head_tiles` slices of the vocabulary a block of mix: who reads what the
//         last layer hands on must have read what layers hand on (StepBlock::copy_all)
// Other blocks have nothing to do in the phase. Offsets are bytes of shared memory; strides,
// elements.
struct StepCut {
  int rows, groups, group_rows, blocks;
  int slices, mix_blocks;
  int parts, part_rows, scan_slices, scan_blocks;
  int tiles, out_blocks, out_first;
  int head_tiles;
  int in_splits, out_splits, head_splits;        // of the inner dimension, over the warps
  int d_stride, mix_stride, r_stride, e_stride;  // of (…,d), (…,channels), (…,r), (…,e)
  Divider by_mix, by_out, by_head, by_scan_words, by_row_tiles;
  int layers, copies;  // StepLayer and StepCopies, read at the start
  // Copied for mix and the head, for scan, for out:
  int in_proj, conv_weight, conv_bias, in_bias, conv_state, norm;
  int A_log, dt_bias, D, ssm_state;
  int out_proj, out_bias;
  int zeros;  // from here on memory starts as zeros, which fill rows and columns up
  int x_proj, dt_proj;
  // Made here: rows that a product reads, and what scales them; of the scan; partial sums of
  // products; this block's columns of the residual stream; signals.
  int act, rstd, mixed, dt_low, BC, dt, input, xz, sums, residual, signals;
  int bytes;
  // What is handed on: offsets in a generation, in bytes of global memory.
  int64_t x, partial, mixed_rows, z_rows, gated, generation;
};

struct StepShape {
  int d, e, n, w, r, v;  // v 0: no head
};

// Operands of a layer in global memory. After the last layer's comes one with norm_f and the head.
enum StepOperand {
  kNorm,
  kInProj,  // or the head
  kInBias,
  kConvWeight,
  kConvBias,
  kConvState,
  kXProj,
  kDtProj,
  kDtBias,
  kALog,
  kD,
  kSsmState,
  kOutProj,
  kOutBias,
  kOperands
};
struct StepLayer {
  const void* operand[kOperands];  // null: zeros
};

// A copy that a warp makes in every layer: `rows` of the (outer, inner) rows of an operand, of
// whole words of 16 bytes.
enum StepCopyKind : int8_t { kFetch, kState /* back and forth, outer is the slot */, kClear };
struct StepCopy {
  // Bytes of global memory: of the operand, or, to be cleared, of a generation.
  int64_t offset, outer_stride, inner_stride, group_stride;
  int to, to_stride;  // bytes of shared memory
  int row, rows, inner, words;
  unsigned by_inner, by_words;  // of a Divider
  StepCopyKind kind;
  int8_t operand;              // StepOperand
  int16_t first;               // sequence of the group, of a state
  int16_t from_layer, layers;  // made in these
};
constexpr int kMostCopies = 96, kStages = 4;  // stages: mix, scan, clear, out
struct StepCopies {
  StepCopy copies[kMostCopies];
  int16_t begin[kFetchWarps][kStages + 1];  // of each warp's of a stage
};

template <class T>
StepCut cut_step(const StepShape& shape, int rows, int groups, int layers, int processors) {
  const auto up = [](int a, int b) { return static_cast<int>(div_up(a, b)); };
  const int channel_slices = shape.e / kSlice, column_slices = shape.d / kSlice;
  const int outputs = shape.r + 2 * shape.n;
  StepCut cut{};
  cut.rows = rows;
  cut.group_rows = up(rows, groups);
  cut.groups = up(rows, cut.group_rows);
  const int blocks = std::max(1, processors / cut.groups);
  // Two slices at least: a block's partial sums are as many whatever its channels, and each block
  // of the scan reads those of all.
  cut.slices = std::max(up(channel_slices, blocks), 2);
  cut.mix_blocks = up(channel_slices, cut.slices);
  cut.parts = 1;
  while (2 * cut.parts <= std::min({kMostGroups, cut.group_rows, blocks})) cut.parts *= 2;
  cut.part_rows = up(cut.group_rows, cut.parts);
  cut.scan_slices = std::max(up(channel_slices, blocks / cut.parts), 2);
  cut.scan_blocks = up(channel_slices, cut.scan_slices);
  cut.tiles = up(column_slices, blocks);
  cut.out_blocks = up(column_slices, cut.tiles);
  const int busy = std::max(cut.mix_blocks, cut.parts * cut.scan_blocks);
  cut.out_first = busy + cut.out_blocks <= blocks ? busy : 0;
  cut.blocks = std::max(busy, cut.out_first + cut.out_blocks);
  cut.head_tiles = shape.v > 0 ? up(up(shape.v, kSlice), cut.mix_blocks) : 0;
  const auto splits = [&](int pairs) {  // of tiles; a power of two, so that all warps have work
    int count = 1;
    while (2 * count * std::max(1, pairs) <= kStepWarps && 2 * count <= shape.d / kChunk)
      count *= 2;
    return count;
  };
  cut.in_splits = splits(cut.slices);
  cut.out_splits = std::min(kStepWarps, shape.e / kChunk);
  cut.head_splits = splits(up(cut.head_tiles, 2));

  const int mixed = up(cut.slices * kSlice, kChunk) * kChunk, channels = cut.slices * kSlice;
  const int scanned = cut.scan_slices * kSlice, low = up(shape.r, kChunk) * kChunk;
  const int columns = cut.tiles * kSlice, head = cut.head_tiles * kSlice;
  cut.by_mix = divider(channels);
  cut.by_out = divider(columns);
  cut.by_head = divider(std::max(1, head));
  cut.by_scan_words = divider(scanned * static_cast<int>(sizeof(T)) / 16);
  cut.by_row_tiles = divider(outputs / kSlice);
  cut.d_stride = padded<T>(shape.d);
  cut.e_stride = padded<T>(shape.e);
  cut.mix_stride = padded<T>(mixed);
  cut.r_stride = padded<T>(low);
  const auto take = [&](int count, int size) {
    const int offset = cut.bytes;
    cut.bytes += up(count * size, 128) * 128;
    return offset;
  };
  cut.layers = take(layers + 1, sizeof(StepLayer));
  cut.copies = take(1, sizeof(StepCopies));
  cut.in_proj = take(std::max(2 * channels, head) * cut.d_stride, sizeof(T));
  cut.conv_weight = take(channels * shape.w, 4);
  cut.conv_bias = take(channels, 4);
  cut.in_bias = take(2 * channels, 4);
  cut.conv_state = take(cut.group_rows * (shape.w - 1) * channels, 4);
  cut.norm = take(shape.d, 4);
  cut.A_log = take(scanned * shape.n, 4);
  cut.dt_bias = take(scanned, 4);
  cut.D = take(scanned, 4);
  cut.ssm_state = take(cut.part_rows * scanned * shape.n, 4);
  cut.out_proj = take(columns * cut.e_stride, sizeof(T));
  cut.out_bias = take(columns, 4);
  cut.zeros = cut.bytes;
  cut.x_proj = take(outputs * cut.mix_stride, sizeof(T));
  cut.dt_proj = take(scanned * cut.r_stride, sizeof(T));
  cut.act = take(kGroupRows * cut.d_stride, sizeof(T));
  cut.rstd = take(kGroupRows, 4);
  cut.mixed = take(kGroupRows * cut.mix_stride, sizeof(T));
  cut.dt_low = take(kGroupRows * cut.r_stride, sizeof(T));
  cut.BC = take(cut.part_rows * 2 * shape.n, 4);
  cut.dt = take(cut.part_rows * scanned, 4);
  cut.input = take(cut.part_rows * scanned, 4);
  cut.xz = take(2 * cut.part_rows * scanned, sizeof(T));
  cut.sums = take(std::max({cut.in_splits * kGroupRows * (2 * channels + kSlice),
                            cut.out_splits * kGroupRows * (columns + kSlice),
                            cut.head_splits * kGroupRows * (head + kSlice)}),
                  4);
  cut.residual = take(kGroupRows * columns, 4);
  cut.signals = take(8, sizeof(uint64_t));

  const auto hand_on = [&](int64_t bytes) {
    const int64_t offset = cut.generation;
    cut.generation += div_up(bytes, 128) * 128;
    return offset;
  };
  const int64_t all_rows = int64_t{cut.groups} * cut.group_rows;
  const int64_t row_bytes = static_cast<int64_t>(sizeof(T)) * all_rows * shape.e;
  cut.x = hand_on(4 * all_rows * shape.d);
  cut.partial = hand_on(4 * all_rows * outputs * cut.mix_blocks);
  cut.mixed_rows = hand_on(row_bytes);
  cut.z_rows = hand_on(row_bytes);
  cut.gated = hand_on(row_bytes);
  return cut;
}

// What a block does. Rows count within the group.
struct StepPart {
  int mix_channel, mix_channels;                         // of mix
  int scan_row, scan_rows, scan_channel, scan_channels;  // of scan
  int column, columns;                                   // of out
  int word, words;                                       // of head
};
__host__ __device__ inline StepPart part_of(const StepCut& cut, const StepShape& shape, int block) {
  const auto clipped = [](int first, int count, int end) {
    count = end - first < count ? end - first : count;
    return count < 0 ? 0 : count;
  };
  StepPart part;
  part.mix_channel = block * cut.slices * kSlice;
  part.mix_channels = clipped(part.mix_channel, cut.slices * kSlice, shape.e);
  part.scan_row = block / cut.scan_blocks * cut.part_rows;
  part.scan_rows = clipped(part.scan_row, cut.part_rows, cut.group_rows);
  part.scan_channel = block % cut.scan_blocks * cut.scan_slices * kSlice;
  part.scan_channels = part.scan_rows > 0 && block < cut.parts * cut.scan_blocks
                           ? clipped(part.scan_channel, cut.scan_slices * kSlice, shape.e)
                           : 0;
  part.column = (block - cut.out_first) * cut.tiles * kSlice;
  part.columns = part.column < 0 ? 0 : clipped(part.column, cut.tiles * kSlice, shape.d);
  part.word = block * cut.head_tiles * kSlice;
  part.words = clipped(part.word, cut.head_tiles * kSlice, shape.v);
  return part;
}

// Copies of a block are shared out among its warps: large ones by rows, each to who has least.
class StepSharer {
 public:
  explicit StepSharer(int piece) : piece_(piece) {}
  void add(int stage, StepCopy copy) {
    if (copy.rows <= 0 || copy.inner <= 0 || copy.words <= 0) return;
    copy.by_inner = divider(copy.inner).reciprocal;
    copy.by_words = divider(copy.words).reciprocal;
    const int pieces = std::clamp(copy.rows * copy.words / piece_, 1, kFetchWarps);
    for (int i = 0; i < pieces; ++i) {
      StepCopy piece = copy;
      piece.row = copy.rows * i / pieces;
      piece.rows = copy.rows * (i + 1) / pieces - piece.row;
      if (piece.rows == 0) continue;
      int* const least = std::min_element(work_[stage], work_[stage] + kFetchWarps);
      *least += piece.rows * piece.words + 128;  // a copy costs as much as so many words
      shares_[least - work_[stage]][stage].push_back(piece);
      ++count_;
    }
  }
  bool fits() const { return count_ <= kMostCopies; }
  StepCopies done() const {
    StepCopies all{};
    int16_t count = 0;
    for (int warp = 0; warp < kFetchWarps; ++warp)
      for (int stage = 0; stage <= kStages; ++stage) {
        all.begin[warp][stage] = count;
        if (stage == kStages) break;
        for (const StepCopy& copy : shares_[warp][stage]) all.copies[count++] = copy;
      }
    return all;
  }

 private:
  int piece_, count_ = 0;
  int work_[kStages][kFetchWarps] = {};
  std::vector<StepCopy> shares_[kFetchWarps][kStages];
};

// Of one block of a group. Large copies are shared out in pieces of `piece` words.
template <class T>
StepSharer copies_of(const StepCut& cut, const StepShape& shape, int layers, int block, int piece) {
  constexpr int64_t kSize = sizeof(T);
  const int64_t d = shape.d, e = shape.e, n = shape.n, r = shape.r, w = shape.w;
  const int taps = shape.w - 1, outputs = shape.r + 2 * shape.n, channels = cut.slices * kSlice;
  const StepPart part = part_of(cut, shape, block);
  enum { kMix, kScan, kClearing, kOut };
  StepSharer all(piece);
  // A matrix of rows of `bytes`, `stride` bytes apart.
  const auto matrix = [&](int stage, StepOperand operand, int64_t offset, int rows, int64_t stride,
                          int64_t bytes, int to, int64_t to_stride, int from = 0, int count = -1) {
    all.add(stage, {.offset = offset,
                    .inner_stride = stride,
                    .to = to,
                    .to_stride = static_cast<int>(to_stride),
                    .rows = rows,
                    .inner = rows,
                    .words = static_cast<int>(bytes / 16),
                    .kind = kFetch,
                    .operand = static_cast<int8_t>(operand),
                    .from_layer = static_cast<int16_t>(from),
                    .layers = static_cast<int16_t>(count < 0 ? layers : count)});
  };
  // Floats, a row a word.
  const auto vector = [&](int stage, StepOperand operand, int64_t first, int64_t count, int to,
                          int more_layers = 0) {
    matrix(stage, operand, 4 * first, static_cast<int>(count / 4), 16, 16, to, 16, 0,
           layers + more_layers);
  };
  const auto state = [&](int stage, StepOperand operand, int64_t offset, int first, int slots,
                         int64_t slot_stride, int rows, int64_t stride, int64_t bytes, int to,
                         int64_t to_stride) {
    all.add(stage, {.offset = offset,
                    .outer_stride = slot_stride,
                    .inner_stride = stride,
                    .to = to,
                    .to_stride = static_cast<int>(to_stride),
                    .rows = slots * rows,
                    .inner = rows,
                    .words = static_cast<int>(bytes / 16),
                    .kind = kState,
                    .operand = static_cast<int8_t>(operand),
                    .first = static_cast<int16_t>(first),
                    .layers = static_cast<int16_t>(layers + 1)});
  };
  // What this block hands on, of rows of the group from `first` on.
  const auto clear = [&](int64_t offset, int first, int rows, int64_t row_stride, int inner,
                         int64_t stride, int64_t bytes) {
    all.add(kClearing, {.offset = offset + first * row_stride,
                        .outer_stride = row_stride,
                        .inner_stride = stride,
                        .group_stride = row_stride * cut.group_rows,
                        .rows = rows * inner,
                        .inner = inner,
                        .words = static_cast<int>(bytes / 16),
                        .kind = kClear,
                        .layers = static_cast<int16_t>(layers + 1)});
  };

  int64_t c = part.mix_channel, count = part.mix_channels;
  for (int i = 0; i < 2; ++i)  // x, z
    matrix(kMix, kInProj, kSize * (i * e + c) * d, part.mix_channels, kSize * d, kSize * d,
           cut.in_proj + i * channels * static_cast<int>(kSize) * cut.d_stride,
           kSize * cut.d_stride);
  matrix(kMix, kInProj, kSize * d * part.word, part.words, kSize * d, kSize * d, cut.in_proj,
         kSize * cut.d_stride, layers, 1);
  if (count > 0) {
    vector(kMix, kNorm, 0, d, cut.norm, 1);
    state(kMix, kConvState, 4 * c, 0, cut.group_rows, 4 * taps * e, taps, 4 * e, 4 * count,
          cut.conv_state, 4 * channels);
    matrix(kMix, kXProj, kSize * c, outputs, kSize * e, kSize * count, cut.x_proj,
           kSize * cut.mix_stride);
    vector(kMix, kConvWeight, c * w, count * w, cut.conv_weight);
    vector(kMix, kConvBias, c, count, cut.conv_bias);
    matrix(kMix, kInBias, 4 * c, 2, 4 * e, 4 * count, cut.in_bias, 4 * channels);
    for (const int64_t rows : {cut.mixed_rows, cut.z_rows})
      clear(rows + kSize * c, 0, cut.group_rows, kSize * e, 1, 0, kSize * count);
    clear(cut.partial + 32 * block, 0, cut.group_rows, int64_t{4} * outputs * cut.mix_blocks,
          outputs / kSlice, 32 * cut.mix_blocks, 32);
  }
  c = part.scan_channel, count = part.scan_channels;
  if (count > 0) {
    state(kScan, kSsmState, 4 * c * n, part.scan_row, part.scan_rows, 4 * e * n, 1, 0,
          4 * count * n, cut.ssm_state, 4 * cut.scan_slices * kSlice * n);
    matrix(kScan, kDtProj, kSize * c * r, part.scan_channels, kSize * r, kSize * r, cut.dt_proj,
           kSize * cut.r_stride);
    vector(kScan, kALog, c * n, count * n, cut.A_log);
    vector(kScan, kDtBias, c, count, cut.dt_bias);
    vector(kScan, kD, c, count, cut.D);
    clear(cut.gated + kSize * c, part.scan_row, part.scan_rows, kSize * e, 1, 0, kSize * count);
  }
  if (part.columns > 0) {
    matrix(kOut, kOutProj, kSize * e * part.column, part.columns, kSize * e, kSize * e,
           cut.out_proj, kSize * cut.e_stride);
    vector(kOut, kOutBias, part.column, part.columns, cut.out_bias);
    clear(cut.x + 4 * part.column, 0, cut.group_rows, 4 * d, 1, 0, int64_t{4} * part.columns);
  }
  return all;
}

// Of every block of a group.
template <class T>
std::vector<StepCopies> all_copies(const StepCut& cut, const StepShape& shape, int layers) {
  std::vector<StepCopies> all;
  for (int block = 0; block < cut.blocks; ++block) {
    int piece = 64;
    StepSharer shares = copies_of<T>(cut, shape, layers, block, piece);
    while (!shares.fits()) shares = copies_of<T>(cut, shape, layers, block, piece *= 2);
    all.push_back(shares.done());
  }
  return all;
}

}  // namespace coil::cuda
