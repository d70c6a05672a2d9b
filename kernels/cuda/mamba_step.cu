// Decoding in one launch: embedding, all layers of a stack of Mamba blocks and the head, for
// sequences of one step each.
//
// A persistent grid, a block on each multiprocessor. Sequences form up to four groups of at most 16
// (the height of a tensor core's tile), each with its share of the blocks; groups never meet. Per
// layer three phases, each of which needs all of the one before:
//   mix   norm of the residual rows (every block for itself, d is small); x and z of this block's
//         channels; conv1d and SiLU; this block's part of the sum over channels that x_proj is
//   scan  the parts of x_proj added in a fixed order; dt_proj, softplus, the step of the scan, gate
//   out   this block's columns of out_proj, added to the residual stream
// What a phase hands on goes through L2 and says itself that it is there (mamba_step.cuh); there is
// no barrier. Weights and states lie in shared memory before they are needed: threads of their own
// copy the next layer's as soon as a phase has used what lies there.
//
// d 512, e 1024, n 16, r 32, 12 layers, bf16, 132 multiprocessors. A layer has 3.3 MB of weights
// and for each sequence 66 KB of states, in and out. At B1 latency is all there is: three ways
// through L2 a layer, some 4000 cycles, and chains of instructions between them. On an H200 a layer
// takes 12900 cycles, 97 us a step with what comes before and after. At B64 a layer moves 8.4 MB of
// states and 3.3 MB of weights, 4 us of 3 TB/s, a block receives some 32 KB a phase; 23700 cycles,
// 172 us a step. docs/performance.md has what was tried.
#include <cstring>

#include "kernels/cuda/mamba_block.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int64_t kMostSequences = 256;  // four launches; beyond, products are large
constexpr int kFewRows = 4;              // of a group; with fewer, more groups read all weights

bool same(const std::vector<char>& kept, const void* data, size_t bytes) {
  return kept.size() == bytes && std::memcmp(kept.data(), data, bytes) == 0;
}
void keep(std::vector<char>& kept, const void* data, size_t bytes) {
  const auto* const from = static_cast<const char*>(data);
  kept.assign(from, from + bytes);
}

// What blocks copy, and where what they hand on stands, is the same for the same of these.
struct StepKey {
  StepCut cut;
  StepShape shape;
  int layers, element;
};

template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1)
    mamba_step_kernel(const __grid_constant__ Step<T> step) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint4 shared_memory[];
  let_next_begin();
  const StepBlock<T> block(step, reinterpret_cast<unsigned char*>(shared_memory));
  block.begin();
  if (threadIdx.x >= kStepThreads) return block.copy_all();
#pragma unroll 1
  for (int l = 0;; ++l) {
    block.mix(l);
    if (l == step.layer_count) break;
    block.scan(l);
    block.out(l);
  }
  if (step.y) block.end();
#endif
}

void check_operands(const MambaStep& op, const StepShape& shape, Device device) {
  const char* const name = "mamba_step";
  const int64_t t = op.rows->total(), slots = op.rows->slots();
  const auto [d, e, n, w, r, v] = shape;
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
  check(!op.x == !!op.table, "{}: expected either x or a table", name);
  check(!op.y == !!op.head, "{}: expected either y or a head", name);
  if (op.x) here("x", op.x, DType::f32, {t, d});
  if (op.table) {
    here("table", op.table, act, {op.table.rows(), d});
    expect(name, "ids", op.ids, DType::i32, {t});
    if (op.ids.device.kind != Device::Kind::cpu) expect_here(name, "ids", op.ids, device);
  }
  if (op.y) here("y", op.y, act, {t, d});
  if (op.head) {
    here("head", op.head, act, {v, d});
    here("logits", op.logits, DType::f32, {t, v});
  }
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

bool in_words(const MambaStep& op) {
  bool all = (!op.ids || op.ids.contiguous()) && (!op.logits || op.logits.contiguous());
  for (const View& view : {op.x, op.table, op.norm_f, op.y, op.head})
    all = all && whole_words(view);
  for (const MambaStep::Layer& layer : op.layers)
    for (const View& view :
         {layer.norm, layer.in_proj, layer.in_proj_bias, layer.conv_weight, layer.conv_bias,
          layer.x_proj, layer.dt_proj, layer.dt_bias, layer.A_log, layer.D, layer.out_proj,
          layer.out_proj_bias, layer.conv_state, layer.ssm_state})
      all = all && whole_words(view);
  return all;
}

bool offered(const StepShape& shape) {
  const auto [d, e, n, w, r, v] = shape;
  return d % kChunk == 0 && e % kChunk == 0 && n >= 4 && n <= 128 && (n & (n - 1)) == 0 &&
         r % kSlice == 0 && r + 2 * n <= kStepThreads / 4 && w >= 1 && w <= 16;
}

}  // namespace

bool CudaBackend::try_run(const MambaStep& op) {
  const char* const name = "mamba_step";
  check(op.rows != nullptr, "{}: rows are missing", name);
  if (op.layers.empty()) return false;
  const MambaStep::Layer& model = op.layers[0];
  expect_rank(name, "norm_f", op.norm_f, 1);
  expect_rank(name, "conv_weight", model.conv_weight, 2);
  expect_rank(name, "dt_proj", model.dt_proj, 2);
  expect_rank(name, "A_log", model.A_log, 2);
  if (op.table) expect_rank(name, "table", op.table, 2);
  if (op.head) expect_rank(name, "head", op.head, 2);
  const int64_t t = op.rows->total(),
                sizes[] = {op.norm_f.size[0],    model.A_log.rows(),
                           model.A_log.cols(),   model.conv_weight.cols(),
                           model.dt_proj.cols(), op.head ? op.head.rows() : 0};
  for (const int64_t size : sizes)
    if (size > 1 << 20) return false;
  const StepShape shape{static_cast<int>(sizes[0]), static_cast<int>(sizes[1]),
                        static_cast<int>(sizes[2]), static_cast<int>(sizes[3]),
                        static_cast<int>(sizes[4]), static_cast<int>(sizes[5])};
  check_operands(op, shape, device());
  const std::span<const Piece> pieces = op.rows->pieces();
  check(t == static_cast<int64_t>(pieces.size()), "{}: {} rows in {} pieces, expected one each",
        name, t, pieces.size());
  if (t == 0 || t > kMostSequences || !offered(shape) || !in_words(op)) return false;

  bool done = false;
  const int layer_count = static_cast<int>(op.layers.size());
  const auto keep_there = [&](StepBytes& bytes, const void* data, size_t count) {
    if (bytes.there && same(bytes.here, data, count)) return;
    free(bytes.there);
    bytes.there = nullptr;
    bytes.there = alloc(static_cast<int64_t>(count));
    upload(data, bytes.there, static_cast<int64_t>(count));
    keep(bytes.here, data, count);
  };
  with_type(name, model.in_proj, [&](auto type) {
    using T = decltype(type);
    // As few launches as can be; groups of four and more, fewer groups where so many do not fit.
    StepCut cut{};
    int64_t per_launch = 0;
    for (int groups = kMostGroups; groups > 0; --groups) {
      per_launch = div_up(t, div_up(t, groups * kGroupRows));
      if (groups > div_up(per_launch, kFewRows)) continue;
      cut = cut_step<T>(shape, static_cast<int>(per_launch), groups, layer_count, processors_);
      if (cut.bytes <= most_shared()) break;
    }
    if (cut.bytes > most_shared()) return;
    if (bool& ready = step_.ready[sizeof(T) == 2]; !ready) {
      allow_shared(mamba_step_kernel<T>, most_shared());
      ready = true;
    }

    std::vector<StepLayer> layers;
    layers.reserve(op.layers.size() + 1);
    for (const MambaStep::Layer& from : op.layers) {
      StepLayer& to = layers.emplace_back();
      to.operand[kNorm] = from.norm.data;
      to.operand[kInProj] = from.in_proj.data;
      to.operand[kInBias] = from.in_proj_bias.data;
      to.operand[kConvWeight] = from.conv_weight.data;
      to.operand[kConvBias] = from.conv_bias.data;
      to.operand[kConvState] = from.conv_state.data;
      to.operand[kXProj] = from.x_proj.data;
      to.operand[kDtProj] = from.dt_proj.data;
      to.operand[kDtBias] = from.dt_bias.data;
      to.operand[kALog] = from.A_log.data;
      to.operand[kD] = from.D.data;
      to.operand[kSsmState] = from.ssm_state.data;
      to.operand[kOutProj] = from.out_proj.data;
      to.operand[kOutBias] = from.out_proj_bias.data;
    }
    StepLayer& end = layers.emplace_back();
    end.operand[kNorm] = op.norm_f.data;
    end.operand[kInProj] = op.head.data;
    keep_there(step_.layers, layers.data(), layers.size() * sizeof(StepLayer));
    StepKey key{.cut = cut, .shape = shape, .layers = layer_count, .element = sizeof(T)};
    key.cut.rows = key.cut.groups = 0;  // copies are those of whole groups, whatever the rows
    if (!same(step_.copied_for, &key, sizeof key)) {
      const std::vector<StepCopies> copies = all_copies<T>(cut, shape, layer_count);
      keep_there(step_.copies, copies.data(), copies.size() * sizeof(StepCopies));
      keep(step_.copied_for, &key, sizeof key);
    }

    Step<T> step;
    step.shape = shape;
    step.layer_count = layer_count;
    step.eps = op.eps;
    step.per_d = 1.f / static_cast<float>(shape.d);
    step.layers = static_cast<const StepLayer*>(step_.layers.there);
    step.copies = static_cast<const StepCopies*>(step_.copies.there);
    step.table = op.table.as<T>();
    step.table_rows = op.table ? op.table.rows() : 0;
    const bool ids_here = op.ids && op.ids.device.kind == Device::Kind::cpu;
    for (int64_t begin = 0; begin < t; begin += per_launch) {
      // The last launch may have fewer rows; they are cut for the same blocks and memory.
      cut.rows = static_cast<int>(std::min(per_launch, t - begin));
      cut.groups = static_cast<int>(div_up(cut.rows, cut.group_rows));
      // With the same key as before, the last launch left the coming generation clear.
      const int64_t bytes = kGenerations * cut.generation;
      if (bytes > step_.handed_bytes) {
        step_.handed_for.clear();
        free(step_.handed);
        step_.handed = nullptr;
        step_.handed_bytes = 0;
        step_.handed = static_cast<char*>(alloc(bytes));
        step_.handed_bytes = bytes;
      }
      key.cut = cut;
      if (!same(step_.handed_for, &key, sizeof key)) {
        check_call(cudaMemsetAsync(step_.handed, 0xff, bytes, stream_), name);
        keep(step_.handed_for, &key, sizeof key);
      }
      step.cut = cut;
      step.handed = step_.handed;
      step.generation = step_.generation;
      step.x = op.x ? op.x.row<float>(begin) : nullptr;
      step.y = op.y ? op.y.row<T>(begin) : nullptr;
      step.logits = op.logits ? op.logits.row<float>(begin) : nullptr;
      step.ids_there = op.ids && !ids_here ? op.ids.as<int32_t>() + begin : nullptr;
      std::fill_n(step.from, kMostRows, -1);
      std::fill_n(step.to, kMostRows, -1);
      for (int i = 0; i < cut.rows; ++i) {
        step.from[i] = pieces[begin + i].from;
        step.to[i] = pieces[begin + i].to;
        if (ids_here) step.ids[i] = op.ids.as<int32_t>()[begin + i];
      }
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(static_cast<unsigned>(cut.groups * cut.blocks));
      config.blockDim = dim3(kBlockThreads);
      config.dynamicSmemBytes = static_cast<size_t>(cut.bytes);
      config.stream = stream_;
      cudaLaunchAttribute together{};  // blocks wait for each other: all must run at once
      together.id = cudaLaunchAttributeCooperative;
      together.val.cooperative = 1;
      config.attrs = &together;
      config.numAttrs = 1;
      check_call(cudaLaunchKernelEx(&config, mamba_step_kernel<T>, step), name);
      step_.generation = (step_.generation + layer_count + 1) % kGenerations;
    }
    done = true;
  });
  return done;
}

}  // namespace coil
