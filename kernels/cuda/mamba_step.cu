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
#include "kernels/cuda/mamba_block.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int64_t kMostSequences = 256;  // four launches; beyond, products are large

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
