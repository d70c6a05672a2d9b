// What the selective scan's forward and backward share on a GPU: how a batch is cut for threads,
// the arithmetic of one step, the checks of operands.
//
// Threads hold 16 states of a channel in registers; networks of more states go 16 at a time
// (`group`), fewer are filled up with states that stay 0. A block of threads takes some channels
// over one tile of time: a whole piece, or a chunk of one, kScanSteps steps after another. What the
// steps read comes through shared memory, where it arrives while earlier steps are computed:
// activations by asynchronous copies (Ring), B and C by way of registers, as f32 (Matrices); all
// lanes read the same word of B and C at once.
#pragma once

#include "kernels/cuda/fast_math.cuh"

namespace coil::cuda {

constexpr int kStates = 16;  // in a thread's registers
constexpr int kThreads = 128;
constexpr int kScanSteps = 8;  // loaded and computed at once; also the steps between checkpoints
constexpr int kUnrolled = 4;   // steps; eight are no faster, and more instructions to fetch
static_assert(kScanSteps == scan_block({Device::Kind::cuda, 0}));

// 1 / (1 + e^-x); NaN stays.
__device__ inline float sigmoid_of(float x) {
  return fast_reciprocal(1.f + fast_exp2(-kLog2OfE * x));
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|), the logarithm as u times a minimax polynomial of
// relative error 2e-7, accurate also where the result is small: a delta of 1e-4 is ordinary. One
// power of two where a logarithm would be a second one.
__device__ inline float softplus_of(float x, float* slope = nullptr) {
  const float u = fast_exp2(-kLog2OfE * fabsf(x));
  if (slope) *slope = fast_reciprocal(1.f + u) * (x < 0 ? u : 1.f);
  float p = fmaf(-0.008539198897778988f, u, 0.04408959671854973f);
  p = fmaf(p, u, -0.10768166184425354f);
  p = fmaf(p, u, 0.17745238542556763f);
  p = fmaf(p, u, -0.24495461583137512f);
  p = fmaf(p, u, 0.33275479078292847f);
  p = fmaf(p, u, -0.4999740421772003f);
  p = fmaf(p, u, 0.9999998211860657f);
  return fmaf(p, u, fmaxf(x, 0.f));  // NaN: u is NaN
}

// Operands of both directions. Arrays of tiles are (tiles, kStates, e), of one group of states.
template <class T>
struct ScanOperands {
  const T *x, *dt, *z, *B, *C;  // (t,e) (t,e) (t,e) or null (t,n) (t,n)
  int64_t x_stride, dt_stride, z_stride, B_stride, C_stride;
  const float *A_log, *D, *dt_bias;  // (e,n) (e) (e)
  int64_t A_stride;
  bool A_words;  // rows of A_log are whole 16 bytes
  const Piece* pieces;
  const int32_t* first;  // first tile of each piece
  int pieces_count, n, group;
  int64_t tile_length, e;
  bool reverse;
  T* checkpoints;                   // (checkpoints, n, e) or null
  const int32_t* first_checkpoint;  // of each piece

  __device__ int64_t row(const Piece& piece, int64_t step) const {
    return piece.begin + (reverse ? piece.length - 1 - step : step);
  }
  __device__ int states() const { return min(kStates, n - group * kStates); }
  __device__ int64_t in_tile(int64_t tile, int i, int64_t channel) const {
    return (tile * kStates + i) * e + channel;
  }
  // rate = A log2(e), so that a decay is one power of two; 0 for states past n, which then stay 0.
  __device__ static float rate(float A_log) { return fast_exp2(kLog2OfE * A_log) * -kLog2OfE; }
  __device__ float rate(int64_t channel, int i) const {
    if (i >= states()) return 0;
    return rate(A_log[channel * A_stride + group * kStates + i]);
  }
  __device__ void rates(int64_t channel, float (&to)[kStates]) const {
    const float* const from = A_log + channel * A_stride + group * kStates;
    if (A_words && states() == kStates) {  // a channel's 64 bytes in four loads instead of 16
#pragma unroll
      for (int i = 0; i < kStates; i += 4) {
        const auto four = *reinterpret_cast<const float4*>(from + i);
        to[i] = rate(four.x), to[i + 1] = rate(four.y);
        to[i + 2] = rate(four.z), to[i + 3] = rate(four.w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kStates; ++i) to[i] = rate(channel, i);
    }
  }
};

// Of forward.
template <class T>
struct Scan : ScanOperands<T> {
  T* y;
  int64_t y_stride;
  float* state;  // (s,e,n) or null
  int64_t slot_stride, state_stride;
  float* carry;   // (tiles, kStates, e): local end states, then states carried in; or null
  float* sums;    // (tiles, e): of delta; with carry
  float* sum_dt;  // (pieces, e) or null
  int64_t sum_dt_stride;
  float* marks;         // (m, e, n) or null: states carried into every so many tiles
  const float* starts;  // (tiles, e, n) or null: states before each tile, instead of carry
  int64_t mark_tiles;
  float* partial_y;  // (t, e): y of the groups of states so far; null with one group

  __device__ bool is_last_group() const { return (this->group + 1) * kStates >= this->n; }
  __device__ float* state_at(int32_t slot, int64_t channel) const {
    return state + slot * slot_stride + channel * state_stride + this->group * kStates;
  }
};

struct ScanSpan {
  Piece piece;
  int p;
  int64_t begin, end;  // steps of the piece
};
template <class T>
__device__ ScanSpan span_of(const ScanOperands<T>& op, const int32_t* first, int64_t length,
                            int64_t tile) {
  const int p = piece_of(first, op.pieces_count, static_cast<int32_t>(tile));
  const Piece piece = op.pieces[p];
  const int64_t begin = (tile - first[p]) * length;
  return {piece, p, begin, min(begin + length, piece.length)};
}
template <class T>
__device__ ScanSpan span_of(const ScanOperands<T>& op, int64_t tile) {
  return span_of(op, op.first, op.tile_length, tile);
}

// Tiles of a piece that a thread of the carry takes in a row, slices of them in a block.
constexpr int kCarryTiles = 16, kCarrySlices = 16;

// The carry over the tiles of piece p, `length` steps, from the first or (kBack) from the last, in
// op.carry: what a tile hands on if nothing comes in becomes what comes in,
//   in(k+1) = exp(A sum delta(k)) in(k) + local(k).
// A block of 32 channels of state i; its slices take kCarryTiles tiles each, side by side, join
// what they hand on and go over theirs once more: two ways to memory for all of 256 tiles. see(k,
// what comes into the k-th tile). Returns what the last tile hands on; total: the sum of delta.
template <bool kBack, class Op, class See>
__device__ float carry_over(const Op& op, int64_t p, int64_t length, int i, int64_t channel,
                            float in, float& total, const See& see) {
  __shared__ float decays[kCarrySlices][32], ends[kCarrySlices][32], deltas[kCarrySlices][32];
  const int lane = threadIdx.x, slice = threadIdx.y, slices = blockDim.y;
  const int64_t first = op.first[p], count = (length + op.tile_length - 1) / op.tile_length;
  const bool here = channel < op.e;
  const float rate = here ? op.rate(channel, i) : 0;
  total = 0;
  for (int64_t begin = 0; begin < count; begin += slices * kCarryTiles) {
    const int64_t own = begin + slice * kCarryTiles;
    const int64_t there = here ? min(count - own, int64_t{kCarryTiles}) : 0;
    const auto tile = [&](int k) { return first + (kBack ? count - 1 - own - k : own + k); };
    float local[kCarryTiles], sum[kCarryTiles];
#pragma unroll
    for (int k = 0; k < kCarryTiles; ++k) {
      local[k] = k < there ? op.carry[op.in_tile(tile(k), i, channel)] : 0;
      sum[k] = k < there ? op.sums[tile(k) * op.e + channel] : 0;
    }
    float end = 0, delta = 0;
#pragma unroll
    for (int k = 0; k < kCarryTiles; ++k) {
      end = fmaf(fast_exp2(rate * sum[k]), end, local[k]);
      delta += sum[k];
    }
    __syncthreads();  // what the slices before these handed on has been read
    decays[slice][lane] = fast_exp2(rate * delta);
    ends[slice][lane] = end;
    deltas[slice][lane] = delta;
    __syncthreads();
    float at = in;
    for (int s = 0; s < slices; ++s) {
      if (s == slice) at = in;
      in = fmaf(decays[s][lane], in, ends[s][lane]);
      total += deltas[s][lane];
    }
#pragma unroll
    for (int k = 0; k < kCarryTiles; ++k) {
      if (k < there) {
        op.carry[op.in_tile(tile(k), i, channel)] = at;
        see(own + k, at);
      }
      at = fmaf(fast_exp2(rate * sum[k]), at, local[k]);
    }
  }
  return in;
}
// Blocks and threads of a kernel that carries over pieces: piece, 32 channels, state.
struct CarryGrid {
  dim3 blocks, threads;
  CarryGrid(const Rows& rows, int64_t tile_length, int64_t e, int states) {
    int64_t longest = 1;
    for (const Piece& piece : rows.pieces()) longest = std::max(longest, piece.length);
    const int64_t slices = div_up(div_up(longest, tile_length), kCarryTiles);
    blocks = {static_cast<unsigned>(rows.pieces().size()), static_cast<unsigned>(div_up(e, 32)),
              static_cast<unsigned>(states)};
    threads = {32, static_cast<unsigned>(std::min<int64_t>(slices, kCarrySlices))};
  }
};

// Two neighbouring channels of an activation.
__device__ inline float2 pair(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ inline float2 pair(const bf16* from) {
  // A bf16 is the upper half of its f32.
  const uint32_t both = *reinterpret_cast<const uint32_t*>(from);
  return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
}
__device__ inline void store_pair(float2 from, float* to) { *reinterpret_cast<float2*>(to) = from; }
__device__ inline void store_pair(float2 from, bf16* to) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(from.x, from.y);
}

// 16 bytes from global to shared memory in the background; zeros where `there` is false.
__device__ inline void copy_later(void* to, const void* from, bool there) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "r"(there ? 16 : 0));
#else
  there ? memcpy(to, from, 16) : memset(to, 0, 16);
#endif
}
__device__ inline void end_of_slot() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;");
#endif
}
template <int kSlots>
__device__ void wait_for_slot() {  // for all but those of the slots begun after the next one
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(kSlots - 2));
#endif
}
__device__ inline void wait_for_all() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;");
#endif
}

// kArrays activations (x, dt, …) of a tile, kScanSteps steps of kAcross channels at a time, in
// kSlots slots of shared memory, all but one of them on their way; from the tile's first step to
// its last, or (kBack) from the last to the first. kWords: rows can be read 16 bytes at a time.
// Threads lie along a row, then along rows, and their addresses are only ever added to.
template <class T, int kArrays, int kAcross, int kSlots, bool kWords, bool kBack>
struct Ring {
  using Slot = T[kArrays][kScanSteps][kAcross];
  static constexpr int kBytes = kSlots * sizeof(Slot);
  static constexpr int kWord = kWords ? 16 / sizeof(T) : 1;
  static constexpr int kRows = kWords ? kThreads * kWord / kAcross : 1;  // read at once
  static constexpr int kColumns = kWords ? 1 : kAcross / kThreads;       // of a thread in each
  static_assert(kScanSteps % kRows == 0);
  Slot* slots;
  int steps, across;              // of the tile; channels of this block that are there
  int own_row, own_column, step;  // of this thread: in a slot; step that it reads next
  const T* from[kArrays];         // where from; null: no such array
  int hop[kArrays];               // to the step after that

  __device__ Ring(void* memory, int steps, int64_t across)
      : slots(static_cast<Slot*>(memory)),
        steps(steps),
        across(static_cast<int>(min(across, static_cast<int64_t>(kAcross)))) {
    own_row = kWords ? threadIdx.x / (kAcross / kWord) : 0;
    own_column = kWords ? threadIdx.x % (kAcross / kWord) * kWord : threadIdx.x;
    const int last = (steps - 1) / kScanSteps * kScanSteps;  // slot that is read first
    if (kBack) own_row += kScanSteps - kRows;
    step = kBack ? last + own_row : own_row;
  }
  // data: the block's first channel of the tile's first step.
  __device__ void set(int array, const T* data, int64_t stride) {
    from[array] = data ? data + step * stride + own_column : nullptr;
    hop[array] = static_cast<int>(stride) * (kBack ? -kRows : kRows);
  }
  // Begins to fetch the next kScanSteps steps, zeros where there are none.
  __device__ void fetch(int slot) {
#pragma unroll
    for (int pass = 0; pass < kScanSteps; pass += kRows) {
      const bool row_there = step >= 0 && step < steps;
#pragma unroll
      for (int a = 0; a < kArrays; ++a) {
        if (!from[a]) continue;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const bool there = row_there && own_column + c * kThreads < across;
          T* const to =
              &slots[slot][a][own_row + (kBack ? -pass : pass)][own_column + c * kThreads];
          if constexpr (kWords)
            copy_later(to, from[a], there);
          else
            *to = there ? from[a][c * kThreads] : from_float<T>(0);
        }
        from[a] += hop[a];
      }
      step += kBack ? -kRows : kRows;
    }
    end_of_slot();
  }
};

// B and C of kScanSteps steps in shared memory, 0 past the tile's end and past n, so that what is
// not there adds nothing. A thread takes two neighbouring states of one of them: load() on their
// way, keep() to their place.
struct Matrices {
  float B[kScanSteps][kStates], C[kScanSteps][kStates];
};
template <class T, bool kBack>
struct MatricesOnTheWay {
  static constexpr int kAcross = kStates / 2;  // threads
  static_assert(kThreads == 2 * kScanSteps * kAcross);
  T two[2];
  const T* from;
  int64_t hop;
  int steps, step, states;  // states that are there, of the two

  __device__ MatricesOnTheWay(const ScanOperands<T>& op, int64_t row, int steps) : steps(steps) {
    const int i = threadIdx.x % kAcross * 2;
    const int last = (steps - 1) / kScanSteps * kScanSteps;
    step = threadIdx.x / kAcross % kScanSteps + (kBack ? last : 0);
    states = op.states() - i;
    const bool of_B = threadIdx.x < kThreads / 2;
    const int64_t stride = (op.reverse ? -1 : 1) * (of_B ? op.B_stride : op.C_stride);
    from = (of_B ? op.B + row * op.B_stride : op.C + row * op.C_stride) + step * stride +
           op.group * kStates + i;
    hop = stride * (kBack ? -kScanSteps : kScanSteps);
  }
  __device__ void load() {
    const bool there = step >= 0 && step < steps;
    two[0] = there && states > 0 ? from[0] : from_float<T>(0);
    two[1] = there && states > 1 ? from[1] : from_float<T>(0);
    from += hop;
    step += kBack ? -kScanSteps : kScanSteps;
  }
  __device__ void keep(Matrices& to) const {
    reinterpret_cast<float2*>(&to)[threadIdx.x] = {to_float(two[0]), to_float(two[1])};
  }
};

// Whether rows of an activation can be copied 16 bytes at a time.
inline bool in_words(const View& view) {
  if (!view) return true;
  const int64_t word = 16 / size_of(view.dtype);
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride[0] % word == 0 &&
         view.cols() % word == 0;
}

// Whether rows of B or C can be read four states at a time.
inline bool in_fours(const View& view) {
  return reinterpret_cast<uintptr_t>(view.data) % (4 * size_of(view.dtype)) == 0 &&
         view.stride[0] % 4 == 0;
}

template <class Op>
void check_scan(const char* name, const CudaBackend& backend, const Op& op) {
  coil::check(op.rows != nullptr, "{}: rows are missing", name);
  coil::check(op.rows->device_pieces() != nullptr, "{}: rows are of the host", name);
  expect_rank(name, "x", op.x, 2);
  expect_rank(name, "A_log", op.A_log, 2);
  const int64_t t = op.rows->total(), e = op.x.cols(), n = op.A_log.cols();
  const DType act = activation(op.x);
  const auto here = [&](const char* operand, const View& view, DType dtype,
                        std::initializer_list<int64_t> shape) {
    expect(name, operand, view, dtype, shape);
    expect_here(name, operand, view, backend.device());
  };
  here("x", op.x, act, {t, e});
  here("dt", op.dt, act, {t, e});
  here("A_log", op.A_log, DType::f32, {e, n});
  here("B", op.B, act, {t, n});
  here("C", op.C, act, {t, n});
  here("D", op.D, DType::f32, {e});
  here("dt_bias", op.dt_bias, DType::f32, {e});
  if (op.z) here("z", op.z, act, {t, e});
  if (op.checkpoints) {
    here("checkpoints", op.checkpoints, act, {scan_checkpoints(backend, *op.rows), e, n});
    coil::check(op.checkpoints.contiguous(), "{}: checkpoints are not contiguous", name);
  }
  coil::check(!op.reverse || op.rows->slots() == 0,
              "{}: a piece carries state, expected whole sequences with reverse", name);
}

inline void check_scan_state(const char* name, const char* operand, const CudaBackend& backend,
                             const View& state, const Rows& rows, int64_t e, int64_t n) {
  expect_rank(name, operand, state, 3);
  expect(name, operand, state, DType::f32, {state.rows(), e, n});
  expect_here(name, operand, state, backend.device());
  coil::check(state.rows() >= rows.slots(), "{}: {} is {}, expected {} slots or more", name,
              operand, state.shape(), rows.slots());
}

template <class T, class Op>
void fill_operands(const Op& op, ScanOperands<T>& to) {
  to.x = op.x.template as<T>();
  to.dt = op.dt.template as<T>();
  to.z = op.z.template as<T>();
  to.B = op.B.template as<T>();
  to.C = op.C.template as<T>();
  to.x_stride = op.x.stride[0];
  to.dt_stride = op.dt.stride[0];
  to.z_stride = op.z.stride[0];
  to.B_stride = op.B.stride[0];
  to.C_stride = op.C.stride[0];
  to.A_log = op.A_log.template as<float>();
  to.A_stride = op.A_log.stride[0];
  to.A_words = reinterpret_cast<uintptr_t>(to.A_log) % 16 == 0 && to.A_stride % 4 == 0;
  to.D = op.D.template as<float>();
  to.dt_bias = op.dt_bias.template as<float>();
  to.pieces = op.rows->device_pieces();
  to.pieces_count = static_cast<int>(op.rows->pieces().size());
  to.n = static_cast<int>(op.A_log.cols());
  to.group = 0;
  to.e = op.x.cols();
  to.reverse = op.reverse;
  to.checkpoints = op.checkpoints.template as<T>();
  to.first_checkpoint =
      op.checkpoints ? op.rows->tiles(kScanSteps).first.template as<int32_t>() : nullptr;
}

// What it costs, in half steps of a block on a multiprocessor, if pieces go through in tiles of so
// many steps, `at_once` blocks on each of `processors` together. A last wave that does not fill
// them takes between its share of the work and as long as a whole one.
inline int64_t cost_of_tiles(const Rows& rows, int64_t length, int64_t channel_blocks,
                             int64_t at_once, int64_t processors) {
  constexpr int64_t kBegin = 32;  // a block's beginning takes as long as about so many steps
  const auto pieces = static_cast<int64_t>(rows.pieces().size());
  int64_t tiles = rows.total() / length + (pieces + 1) / 2;  // of many pieces about so many
  if (pieces <= 64) {
    tiles = 0;
    for (const Piece& piece : rows.pieces()) tiles += div_up(piece.length, length);
  }
  const int64_t blocks = tiles * channel_blocks, wave = at_once * processors;
  const int64_t rest = div_up(blocks % wave, processors);
  const int64_t halves = 2 * at_once * (blocks / wave) + (rest > 0 ? rest + at_once : 0);
  return halves * (length + kBegin);
}

// Steps of a tile: whole pieces where they fill the card or are short; else so long that blocks
// come in whole waves of what runs at once and a wave's end wastes little. Returns a multiple of
// kScanSteps, at least the longest piece where pieces stay whole; where `every` is given, a divisor
// of it.
inline int64_t tile_length(const Rows& rows, int64_t channel_blocks, int64_t at_once,
                           int64_t processors, int64_t every = 0) {
  int64_t longest = 1;
  for (const Piece& piece : rows.pieces()) longest = std::max(longest, piece.length);
  const int64_t whole = div_up(longest, kScanSteps) * kScanSteps;
  const auto pieces = static_cast<int64_t>(rows.pieces().size());
  if (every == 0 && (whole <= 64 || pieces * channel_blocks >= at_once * processors)) return whole;
  int64_t best = 0, best_cost = 0;
  for (int64_t length = 128; length <= 1024; length += kScanSteps) {
    if (every % length != 0) continue;
    const int64_t cost = cost_of_tiles(rows, length, channel_blocks, at_once, processors);
    if (best == 0 || cost < best_cost) best = length, best_cost = cost;
  }
  if (best > 0) return std::min(best, whole);
  for (best = std::min<int64_t>(every, 128); every % best != 0;) best += kScanSteps;
  return best;
}

// The multiple of `length` that is cheapest for blocks of which fewer run at once.
inline int64_t longer_tiles(const Rows& rows, int64_t length, int64_t channel_blocks,
                            int64_t at_once, int64_t processors) {
  constexpr int64_t kMost = 8;
  int64_t best = 0, best_cost = 0;
  for (int64_t k = 1; k <= kMost; ++k) {
    const int64_t cost = cost_of_tiles(rows, k * length, channel_blocks, at_once, processors);
    if (best == 0 || cost < best_cost) best = k * length, best_cost = cost;
  }
  return best;
}

}  // namespace coil::cuda
