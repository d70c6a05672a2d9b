#include "model/memory_plan.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "kernels/error.h"
#include "model/counting_backend.h"
#include "model/loss.h"
#include "model/optimizer.h"

namespace coil {
namespace {

// Forward of one batch, keeping the logits; as classify and score run it.
void infer(Backend& backend, const Model& model, const Rows& rows, State& state) {
  const Tensor ids(backend, DType::i32, {rows.total()});
  const Tensor h = hidden(backend, model, ids, rows, &state);
  if (model.config.language())
    lm_logits(backend, model, h);
  else
    class_logits(backend, model, h, rows, &state);
}

// A step of training. Ids and targets are one number in host memory, repeated.
void train(Backend& backend, const Model& model, const Rows& rows, Model& grad, int64_t chunk) {
  int32_t zero = 0;
  const auto repeated = [&](int64_t count) {
    View view = host_view(&zero, DType::i32, {count});
    view.stride[0] = 0;
    return view;
  };
  const bool language = model.config.language();
  const Tensor total(backend, DType::f64, {1});
  const int64_t answers = model.config.equivariant ? rows.finished() / 2 : rows.finished();
  add_loss(backend, model, repeated(rows.total()), rows,
           repeated(language ? rows.total() : answers), {}, total, &grad, nullptr, 1,
           {.chunk = chunk});
}

// What is kept behind so many chunks of a sequence.
State kept_states(Backend& backend, const Config& config, int64_t count) {
  State kept(backend, config, static_cast<int32_t>(count));
  kept.pool = Tensor();
  return kept;
}

}  // namespace

MemoryPlan plan_memory(const Config& config, const MemoryRequest& request) {
  constexpr int64_t kMost = int64_t{1} << 36;  // steps; keeps every product within 64 bits
  check(request.length >= 1 && request.sequences >= 1 && request.chunk >= 0 &&
            request.sequences <= 1'000'000 && request.length <= kMost / request.sequences,
        "memory plan: expected 1 to 1,000,000 sequences and 1 to 2^36 steps in all, found {} of {} "
        "steps",
        request.sequences, request.length);
  CountingBackend backend(request.device);
  MemoryPlan plan;
  if (request.device.kind != Device::Kind::cpu) plan.workspace = kDeviceWorkspace;
  const auto held = [&] { return backend.memory().in_use; };
  Model model;
  model.config = config;
  const DType matrices = request.train ? DType::f32 : request.matrices;
  for (const Param& param : declare(model))
    allocate(backend, param, param.info.matrix ? matrices : DType::f32);
  plan.weights = held();

  int64_t before = 0;
  if (request.train) {
    Model grad = zeros_like(backend, model);
    plan.gradients = held() - plan.weights;
    const Optimizer optimizer(backend, model, {});
    plan.moments = held() - plan.weights - plan.gradients;
    before = held();
    std::optional<Model> rounded;
    if (const DType computed = backend.activations(request.matrices); computed != DType::f32)
      rounded = converted(backend, model, computed);
    plan.copy = held() - before;
    before = held();
    int64_t length = request.length, sequences = request.sequences, chunk = request.chunk;
    std::optional<State> kept;
    Tensor kept_starts;
    const bool cut = chunk > 0 && length > chunk && !config.trains_whole();
    if (cut) {  // then each sequence is on its own
      // Chunks in the middle are alike: a few are run, among them as many as go through together
      // at most; for the others their states are held.
      const Chunks cuts = chunks_of(backend, model, length, chunk);
      const int64_t run = std::max<int64_t>(4, cuts.together + 1);
      plan.chunk = chunk = cuts.length;
      plan.tile = cuts.tile;
      const int64_t chunks = (length + chunk - 1) / chunk;
      check(chunks <= std::numeric_limits<int32_t>::max(),
            "memory plan: {} chunks of a sequence, expected fewer than 2^31", chunks);
      const auto starts = [&](int64_t count) {  // before the tiles of so many chunks
        return Tensor(backend, DType::f32,
                      {cuts.tile > 0 ? count * (chunk / cuts.tile) : 0, std::ssize(config.layers),
                       config.e, config.n});
      };
      const auto kept_chunks = [](int64_t count) { return std::min(count - 1, Chunks::kKept); };
      {
        const State states = kept_states(backend, config, chunks - 1);
        const Tensor all = starts(kept_chunks(chunks));
        plan.state = held() - before;
      }
      sequences = 1;
      if (chunks > run) {
        kept = kept_states(backend, config, chunks - run);
        kept_starts = starts(kept_chunks(chunks) - kept_chunks(run));
      }
      length = std::min(chunks, run) * chunk;  // which is cut into these again
    }
    if (config.equivariant) sequences *= 2;  // each with its reverse complement
    backend.restart_peak();
    train(backend, rounded ? *rounded : model, Rows::equal(backend, sequences, length), grad,
          chunk);
  } else {
    const bool whole = config.bidirectional;  // no state is carried
    const int64_t steps =
        request.chunk > 0 && !whole ? std::min(request.chunk, request.length) : request.length;
    std::vector<Piece> pieces;
    for (int32_t i = 0; i < request.sequences; ++i)
      pieces.push_back(
          {.begin = i * steps, .length = steps, .from = whole ? -1 : i, .to = whole ? -1 : i});
    const Rows rows(backend, std::move(pieces));
    State state(backend, config, static_cast<int32_t>(request.sequences));
    plan.state = whole ? 0 : held() - plan.weights;
    before = held();
    infer(backend, model, rows, state);
  }
  plan.activations = backend.memory().peak - before - (request.train ? plan.state : 0);
  return plan;
}

}  // namespace coil
