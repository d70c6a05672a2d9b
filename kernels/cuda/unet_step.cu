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
// Between launches (device.cuh): a step begins while the draw before it runs, asks for its weights
// and goes once through a layer of no consequence, which brings the instructions; the draw does
// likewise while the step runs. x goes to the next block as stores that count themselves in there.
//
// Limit: latency and issue slots: sixteen warps go through four chains of dependent instructions a
// layer, at about ten cycles an instruction. audio-base (d 64, 128, 256; n 32, mlp 2; 8 layers a
// stage), bf16, reads 0.9 MB of weights, tables and states of the outermost stage a step, 2.9 and
// 10.3 MB of the others every 4 and 16. One sequence on an H200, 2026-11-26: 55 us a step with its
// draw, by the ops one by one 570; 64 sequences, clusters of 2: 67 us. Of a layer of the outermost
// stage (6,400 cycles with its mail) scan takes 2,600, linear 970, in 1,250, out 780, mail 600.
#include <algorithm>
#include <bit>

#include "kernels/cuda/unet_team.cuh"

namespace coil {
namespace {

using namespace cuda;  // of this file only

constexpr int64_t kMostSequences = 1024;  // beyond, products are large

template <class T>
__global__ void __launch_bounds__(kTeamThreads, 1)
    unet_step_kernel(const __grid_constant__ Unet<T> unet) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint4 shared_memory[];
  Team<T>(unet, reinterpret_cast<unsigned char*>(shared_memory)).run();
#endif
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
  bool fits = op.head.rows() % 8 == 0 && whole_words(op.table) && whole_words(op.head) &&
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
      fits = fits && whole_words(view);
    for (const UnetStep::Block& block : stage.blocks) {
      const UnetStep::Block& first = stage.blocks[0];
      const int64_t n = block.table.size[2], f = block.mlp_out ? block.mlp_out.cols() : 0;
      fits = fits && n == first.table.size[2] && n >= kStatesOf && n <= 32 * kStatesOf &&
             (n & (n - 1)) == 0 && f == (first.mlp_out ? first.mlp_out.cols() : 0) && f % 64 == 0 &&
             f <= 8 * kMostWidth;
      for (const View& view : {block.norm, block.table, block.D, block.state, block.output_linear,
                               block.output_bias, block.mlp_norm, block.mlp_in, block.mlp_out})
        fits = fits && whole_words(view);
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
    cudaLaunchAttribute attributes[] = {early_launch(), {}};
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(team), 1, 1};
    config.attrs = attributes;
    config.numAttrs = 2;
    check_call(cudaLaunchKernelEx(&config, unet_step_kernel<T>, unet), name);
    done = true;
  });
  return done;
}

}  // namespace coil
