#include "model/memory_plan.h"

#include <algorithm>
#include <unordered_map>

#include "kernels/error.h"

namespace coil {
namespace {

// Allocates addresses that are never read or written, and computes nothing.
class CountingBackend final : public Backend {
 public:
  explicit CountingBackend(Device device) : device_(device) {}
  Device device() const override { return device_; }
  int threads() const override { return 1; }
  DType activations(DType matrices) const override {
    return device_.kind == Device::Kind::cpu ? DType::f32 : matrices;
  }
  void* alloc(int64_t bytes) override {
    void* address = reinterpret_cast<void*>(next_);
    next_ += static_cast<uintptr_t>(bytes) + kAlignment;
    blocks_[address] = bytes;
    in_use_ += bytes;
    peak_ = std::max(peak_, in_use_);
    return address;
  }
  void free(void* data) override {
    const auto block = blocks_.find(data);
    COIL_ASSERT(block != blocks_.end());
    in_use_ -= block->second;
    blocks_.erase(block);
  }
  void copy(View, View) override {}
  void fill(View, double) override {}
  void sync() override {}
  void run(const Gemm&) override {}
  void run(const SumRows&) override {}
  void run(const Embed&) override {}
  void run(const EmbedBackward&) override {}
  void run(const Norm&) override {}
  void run(const NormBackward&) override {}
  void run(const Conv1d&) override {}
  void run(const Conv1dBackward&) override {}
  void run(const SelectiveScan&) override {}
  void run(const SelectiveScanBackward&) override {}
  void run(const S4dScan&) override {}
  void run(const S4dScanBackward&) override {}
  void run(const Glu&) override {}
  void run(const GluBackward&) override {}
  void run(const Pool&) override {}
  void run(const PoolBackward&) override {}
  void run(const CrossEntropy&) override {}
  void run(const SumSquares&) override {}
  void run(const AdamW&) override {}

  int64_t in_use() const { return in_use_; }
  int64_t peak() const { return peak_; }

 private:
  static constexpr uintptr_t kAlignment = 64;
  Device device_;
  uintptr_t next_ = 1 << 20;
  int64_t in_use_ = 0, peak_ = 0;
  std::unordered_map<void*, int64_t> blocks_;
};

// Forward of one batch, keeping the logits; as classify and score run it.
void infer(Backend& backend, const Model& model, const Rows& rows, State& state) {
  const Tensor ids(backend, DType::i32, {rows.total()});
  const Tensor h = hidden(backend, model, ids, rows, &state);
  if (model.config.objective == Objective::lm)
    lm_logits(backend, model, h);
  else
    class_logits(backend, model, h, rows, &state);
}

// The allocations of batch_loss with a gradient.
void train(Backend& backend, const Model& model, const Rows& rows, Model& grad) {
  const Tensor ids(backend, DType::i32, {rows.total()});
  Saved saved;
  Tensor h = hidden(backend, model, ids, rows, nullptr, &saved);
  const bool lm = model.config.objective == Objective::lm;
  Tensor logits =
      lm ? lm_logits(backend, model, h) : class_logits(backend, model, h, rows, nullptr);
  if (!lm) h = Tensor();
  const Tensor loss(backend, DType::f32, {logits.view().rows()});
  const Tensor dh(backend, activations(backend, model.backbone), {rows.total(), model.config.d});
  h = Tensor();
  logits = Tensor();
  model.backbone.backward(backend, model.config, saved, rows, dh, nullptr, grad.backbone);
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
  Model model;
  model.config = config;
  for (const Param& param : declare(model))
    allocate(backend, param, param.info.matrix ? request.matrices : DType::f32);
  plan.weights = backend.in_use();

  int64_t before = 0;
  if (request.train) {
    Model grad = zeros_like(backend, model);
    plan.gradients = backend.in_use() - plan.weights;
    plan.moments = 2 * plan.gradients;
    before = backend.in_use();
    train(backend, model, Rows::equal(backend, request.sequences, request.length), grad);
  } else {
    const int64_t steps =
        request.chunk > 0 ? std::min(request.chunk, request.length) : request.length;
    std::vector<Piece> pieces;
    for (int32_t i = 0; i < request.sequences; ++i)
      pieces.push_back({.begin = i * steps, .length = steps, .from = i, .to = i});
    const Rows rows(backend, std::move(pieces));
    State state(backend, config, static_cast<int32_t>(request.sequences));
    plan.state = backend.in_use() - plan.weights;
    before = backend.in_use();
    infer(backend, model, rows, state);
  }
  plan.activations = backend.peak() - before;
  return plan;
}

}  // namespace coil
