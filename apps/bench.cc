// coil bench ops | model: how fast the operations, or a whole model of random weights, run on this
// machine. Each is repeated for a while; the best and the median are printed. An op's limit is the
// longest of the times that its bytes take at the speed of a copy, its arithmetic at that of a
// square product, and on a GPU its powers of two at that of the special function units, all
// measured in the same run. That of a model is the sum over its operations: what it would take if
// each ran at its limit and nothing came between.
#include <algorithm>
#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>

#include "apps/command.h"
#include "kernels/cost.h"
#include "kernels/error.h"
#include "kernels/op_cases.h"
#include "model/counting_backend.h"
#include "model/loss.h"
#include "model/memory_plan.h"
#include "model/optimizer.h"
#include "model/step_tables.h"
#include "pipelines/fit.h"
#include "pipelines/run_log.h"
#include "pipelines/train.h"

namespace coil {
namespace {

namespace po = boost::program_options;
using Json = nlohmann::ordered_json;

struct BenchOptions {
  std::string what = "model", only, preset;
  Size d{256}, layers{8}, vocab{16}, length{2048}, batch{1}, chunk{0}, train_chunk{0};
  double seconds = 2;
  bool json = false, train = true;
  CommonOptions common;
};

po::options_description describe(BenchOptions& options) {
  po::options_description text("Options");
  text.add_options()  //
      ("what", po::value(&options.what)->value_name("WHAT"),
       "ops: each operation; model, the default: prefill, decoding and training")  //
      ("preset", po::value(&options.preset)->value_name("NAME"),
       "network and vocabulary of a preset of coil train")  //
      ("d", option(options.d, "SIZE"),
       "width; inner width twice that, 16 states, dt rank a sixteenth in eights")  //
      ("layers", option(options.layers, "COUNT"), "layers of the model")           //
      ("vocab", option(options.vocab, "SIZE"), "size of the vocabulary")           //
      ("length", option(options.length, "SIZE"), "steps of a sequence")            //
      ("batch", option(options.batch, "COUNT"), "sequences at once")               //
      ("chunk", option(options.chunk, "SIZE"),
       "steps of all sequences in one pass of prefill; 0: as classify does")  //
      ("train-chunk", option(options.train_chunk, "SIZE"),
       "training: steps of a sequence at once; 0: whole")  //
      ("seconds", option(options.seconds, "NUMBER"),
       "time for each figure of a model; an op takes a tenth")  //
      ("only", po::value(&options.only)->value_name("NAME"),
       "operations whose name contains this")                                                //
      ("no-training", po::bool_switch(), "leave training out, which needs the most memory")  //
      ("json", po::bool_switch(&options.json), "JSON instead of text");
  text.add(describe(options.common));
  return text;
}

struct Timing {
  double best = 0, median = 0;  // seconds
};

// Runs f once unmeasured, then for `seconds` and at least five times. A device is waited for.
Timing measure(Backend& backend, double seconds, const std::function<void()>& f) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  f();
  backend.sync();
  double total = 0;
  while (times.size() < 5 || total < seconds) {
    const auto start = Clock::now();
    f();
    backend.sync();
    times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    total += times.back();
  }
  std::sort(times.begin(), times.end());
  return {times.front(), times[times.size() / 2]};
}

std::string device_text(const Backend& backend) {
  return backend.device().kind == Device::Kind::cpu
             ? counted(backend.threads(), "thread")
             : fmt::format("cuda:{}", backend.device().index);
}

// `bytes`: of the copy, like those of the operations, so that both lie in the same cache or in
// none.
Speed measure_limits(Backend& backend, int64_t bytes, DType matrices, double seconds) {
  const bool cpu = backend.device().kind == Device::Kind::cpu;
  const int64_t side = cpu ? 768 : 8192;
  const DType type = backend.activations(matrices);
  Speed limits;
  Tensor from(backend, DType::u8, {bytes}), to(backend, DType::u8, {bytes});
  backend.fill(from, 1);
  limits.bytes = 2. * static_cast<double>(bytes) /
                 measure(backend, seconds, [&] { backend.copy(from, to); }).best;
  Tensor a(backend, type, {side, side}), b(backend, type, {side, side});
  Tensor c(backend, type, {side, side});
  backend.fill(a, 1);
  backend.fill(b, 1);
  limits.flops = 2. * side * side * side /
                 measure(backend, seconds, [&] { backend.run(Gemm{.a = a, .b = b, .c = c}); }).best;
  limits.powers = backend.powers_per_second();
  return limits;
}

std::vector<Piece> sequences(int64_t count, int64_t length) {
  std::vector<Piece> pieces(count);
  for (int64_t i = 0; i < count; ++i) pieces[i] = {.begin = i * length, .length = length};
  return pieces;
}

void bench_ops(Backend& backend, const BenchOptions& options, Output& out) {
  const double seconds = options.seconds / 10;
  const int64_t bytes = options.batch * options.length * 2 * options.d * 4;  // of x, (t, e)
  const DType matrices = matrix_dtype(options.common);
  const Speed limits = measure_limits(backend, bytes, matrices, seconds);
  const OpShape shape{.d = options.d,
                      .e = 2 * options.d,
                      .r = dt_rank_of(options.d),
                      .v = options.vocab,
                      .pieces = sequences(options.batch, options.length),
                      .matrices = matrices};
  const OpCases all(backend, shape, options.only);
  Json list = Json::array();
  if (!options.json)
    out.write(fmt::format(
        "{} · copy {:.1f} GB/s · {} product {:.0f} GFLOP/s{} · {} x {} steps, d {}\n\n"
        "{:<28}{:>10}{:>11}{:>8}{:>10}{:>9}{:>10}\n",
        device_text(backend), limits.bytes / 1e9, name_of(backend.activations(matrices)),
        limits.flops / 1e9,
        limits.powers > 0 ? fmt::format(" · {:.0f} G powers/s", limits.powers / 1e9) : "",
        options.batch.value, options.length.value, options.d.value, "operation", "best ms",
        "median ms", "GB/s", "GFLOP/s", "Gpow/s", "of limit"));
  for (const OpCase& op : all.cases) {
    if (op.name.find(options.only) == op.name.npos) continue;
    const Timing time = measure(backend, seconds, [&] { op.run(backend); });
    const Cost cost{.flops = op.flops, .bytes = op.bytes, .powers = op.powers};
    const double limit = shortest_time(cost, limits) / time.best;
    if (options.json)
      list.push_back({{"operation", op.name},
                      {"best_ms", time.best * 1e3},
                      {"median_ms", time.median * 1e3},
                      {"gb_per_s", op.bytes / time.best / 1e9},
                      {"gflop_per_s", op.flops / time.best / 1e9},
                      {"powers_per_s", op.powers / time.best},
                      {"of_limit", limit}});
    else
      out.write(fmt::format("{:<28}{:>10.4f}{:>11.4f}{:>8.1f}{:>10.1f}{:>9.1f}{:>9.0f}%\n", op.name,
                            time.best * 1e3, time.median * 1e3, op.bytes / time.best / 1e9,
                            op.flops / time.best / 1e9, op.powers / time.best / 1e9, limit * 100));
  }
  if (options.json)
    out.write(Json({{"threads", backend.threads()},
                    {"copy_gb_per_s", limits.bytes / 1e9},
                    {"product_gflop_per_s", limits.flops / 1e9},
                    {"powers_per_s", limits.powers},
                    {"operations", list}})
                  .dump(2) +
              "\n");
}

// One piece of each of `count` sequences, from their slots to their slots.
Rows next_pieces(Backend& backend, int64_t count, int64_t length, int64_t position, bool last) {
  std::vector<Piece> pieces = sequences(count, length);
  for (int64_t i = 0; i < count; ++i) {
    pieces[i].position = position;
    pieces[i].from = position == 0 ? -1 : static_cast<int32_t>(i);
    pieces[i].to = static_cast<int32_t>(i);
    pieces[i].last = last;
  }
  return Rows(backend, std::move(pieces));
}

// A model of random weights and what is done with it, on the backend that is measured or on one
// that counts what there is to do.
class Workload {
 public:
  Workload(Backend& backend, const Config& config, const BenchOptions& options)
      : backend_(backend), config_(config), options_(options), length_(options.length) {
    Philox random(options.common.seed, 0, 0);
    const auto draw = [&](std::vector<int32_t>& list, int64_t below) {
      list.resize(options.batch * length_);
      for (int32_t& id : list) id = static_cast<int32_t>(random.below(below));
    };
    draw(ids_, config.vocab);
    draw(targets_, config.predicted());
  }

  void begin_training(DType computed) {
    trained_ = weights(DType::f32);
    grad_ = zeros_like(backend_, trained_);
    if (computed != DType::f32) rounded_ = converted(backend_, trained_, computed);
    optimizer_.emplace(backend_, trained_, OptimizerOptions{});
    rows_.emplace(Rows::equal(backend_, options_.batch, length_));
    numbers_ = Tensor(backend_, DType::f64, {2});  // loss, sum of squares of the gradient
  }
  void train() {
    backend_.fill(numbers_, 0);
    const int64_t count = rows_->total();
    add_loss(backend_, rounded_ ? *rounded_ : trained_, view(ids_, count), *rows_,
             view(targets_, count), {}, numbers_.view().slice(0, 1), &grad_, nullptr, 1,
             {.chunk = options_.train_chunk});
    optimizer_->step(backend_, trained_, grad_, 1e-3, numbers_.view().slice(1, 1),
                     rounded_ ? &*rounded_ : nullptr);
  }
  void end_training() {
    trained_ = Model();
    grad_ = Model();
    rounded_.reset();
    optimizer_.reset();
    rows_.reset();
    numbers_ = Tensor();
  }

  void begin_inference(DType matrices) {
    model_ = weights(matrices);
    tables_ = step_tables(backend_, model_);
    state_.emplace(backend_, config_, static_cast<int32_t>(options_.batch));
  }
  void prefill(int64_t chunk) {
    for (int64_t begin = 0; begin < length_; begin += chunk) {
      const int64_t steps = std::min(chunk, length_ - begin);
      step(steps, begin, begin + steps == length_);
    }
    position_ = length_;
  }
  void decode() { step(1, position_++, false); }

 private:
  static View view(std::vector<int32_t>& from, int64_t count) {
    return host_view(from.data(), DType::i32, {count});
  }
  // Drawing values takes the host a while, and whoever counts needs none.
  Model weights(DType matrices) {
    if (!dynamic_cast<CountingBackend*>(&backend_))
      return converted(backend_, make_model(backend_, config_, options_.common.seed), matrices);
    Model model;
    model.config = config_;
    for (const Param& param : declare(model))
      allocate(backend_, param, param.info.matrix ? matrices : DType::f32);
    return model;
  }
  // Ids from the host to logits on the device.
  void step(int64_t steps, int64_t position, bool last) {
    const Rows rows = next_pieces(backend_, options_.batch, steps, position, last);
    step_logits(backend_, model_, tables_, view(ids_, rows.total()), rows, &*state_);
  }

  Backend& backend_;
  const Config& config_;
  const BenchOptions& options_;
  int64_t length_, position_ = 0;
  std::vector<int32_t> ids_, targets_;
  Model trained_, grad_, model_;
  StepTables tables_;
  std::optional<Model> rounded_;
  std::optional<Optimizer> optimizer_;
  std::optional<Rows> rows_;
  Tensor numbers_;
  std::optional<State> state_;
};

struct Figure {
  const char* name;
  int64_t passes;       // of one repetition
  double tokens;        // of one pass, as the two below
  double flops, limit;  // seconds
  Timing time;          // of a repetition
  int64_t peak;         // bytes

  double best_ms() const { return time.best / static_cast<double>(passes) * 1e3; }
  double median_ms() const { return time.median / static_cast<double>(passes) * 1e3; }
  double flops_per_second() const { return flops / best_ms() * 1e3; }
  double of_limit() const { return limit / best_ms() * 1e3; }
};

std::string table_of(const std::vector<Figure>& figures) {
  std::string text = fmt::format("{:<16}{:>10}{:>12}{:>9}{:>9}{:>10}\n", "", "ms a pass",
                                 "tokens/s", "TFLOP/s", "of limit", "peak GiB");
  for (const Figure& figure : figures)
    text += fmt::format("{:<16}{:>10.4g}{:>12.0f}{:>9.3g}{:>8.0f}%{:>10.3f}\n", figure.name,
                        figure.best_ms(), figure.tokens / figure.best_ms() * 1e3,
                        figure.flops_per_second() / 1e12, 100 * figure.of_limit(),
                        static_cast<double>(figure.peak) * 0x1p-30);
  return text;
}

void bench_model(Backend& backend, const BenchOptions& options, Output& out) {
  const int64_t batch = options.batch, length = options.length;
  TrainOptions network;
  if (!options.preset.empty()) apply_preset(options.preset, network);
  network.d = options.d;
  network.layers = options.layers;
  Config config = network_of(network);
  config.vocab = options.vocab;
  if (network.audio) {
    config.audio.rate = 16'000;
    config.vocab = audio_vocabulary(config);
  }
  const DType matrices = matrix_dtype(options.common);
  const DType computed = backend.activations(matrices);  // on a CPU training is in f32
  const int64_t rows_at_once =
      options.chunk > 0 ? options.chunk.value : fitting_batch(backend, config, matrices);
  const int64_t chunk = std::clamp<int64_t>(rows_at_once / batch, 1, length);
  const int64_t bytes = std::min<int64_t>(batch * chunk * config.e * size_of(computed), 1 << 30);
  const Speed limits = measure_limits(backend, bytes, matrices, options.seconds / 10);
  backend.release_kept();

  CountingBackend counting(backend.device());
  Workload work(backend, config, options), counted_work(counting, config, options);
  std::vector<Figure> figures;
  // Runs f(workload) as often as hides that the last pass is waited for.
  const auto add = [&](const char* name, int64_t passes, int64_t tokens, const auto& f) {
    counting.costs.clear();
    f(counted_work);
    Figure figure{.name = name, .passes = passes, .tokens = static_cast<double>(tokens)};
    for (const Cost& cost : counting.costs) {
      figure.flops += cost.flops;
      figure.limit += shortest_time(cost, limits);
    }
    backend.restart_peak();
    figure.time = measure(backend, options.seconds, [&] {
      for (int64_t i = 0; i < passes; ++i) f(work);
    });
    figure.peak = backend.memory().peak;
    figures.push_back(figure);
  };
  try {
    if (options.train) {
      for (Workload* each : {&work, &counted_work}) each->begin_training(computed);
      add(computed == DType::f32 ? "training, f32" : "training, bf16", 1, batch * length,
          [](Workload& each) { each.train(); });
      for (Workload* each : {&work, &counted_work}) each->end_training();
    }
  } catch (const OutOfMemory& error) {
    throw OutOfMemory(error.what(), "--no-training, or a smaller --length or --batch");
  }
  try {
    for (Workload* each : {&work, &counted_work}) each->begin_inference(matrices);
    add("prefill", 1, batch * length, [&](Workload& each) { each.prefill(chunk); });
    add("decoding", 64, batch, [](Workload& each) { each.decode(); });
  } catch (const OutOfMemory& error) {
    throw OutOfMemory(error.what(),
                      fitting_hint(backend, config, matrices, "--chunk", rows_at_once));
  }

  const auto request = [&](bool train) {
    return plan_memory(config, {.length = train ? length : chunk,
                                .sequences = batch,
                                .chunk = train ? options.train_chunk.value : 0,
                                .matrices = matrices,
                                .train = train,
                                .device = backend.device()})
        .total();
  };
  if (options.json) {
    Json result = {{"threads", backend.threads()},
                   {"device", device_text(backend)},
                   {"precision", options.common.precision},
                   {"parameters", parameters(config)},
                   {"d", config.d},
                   {"layers", all_layers(config)},
                   {"vocab", config.vocab},
                   {"length", length},
                   {"batch", batch},
                   {"chunk", chunk},
                   {"train_chunk", options.train_chunk.value},
                   {"copy_gb_per_s", limits.bytes / 1e9},
                   {"product_gflop_per_s", limits.flops / 1e9},
                   {"powers_per_s", limits.powers}};
    for (const Figure& figure : figures) {
      result[figure.name] = {{"best_ms", figure.best_ms()},
                             {"median_ms", figure.median_ms()},
                             {"best_tokens_per_s", figure.tokens / figure.best_ms() * 1e3},
                             {"median_tokens_per_s", figure.tokens / figure.median_ms() * 1e3},
                             {"gflop_per_s", figure.flops_per_second() / 1e9},
                             {"of_limit", figure.of_limit()},
                             {"peak_bytes", figure.peak}};
      if (figure.name != std::string("decoding"))
        result[figure.name]["planned_bytes"] = request(figure.name != std::string("prefill"));
    }
    out.write(result.dump(2) + "\n");
    return;
  }
  out.write(fmt::format(
      "{} parameters · {} · vocabulary {} · {} x {} steps · {} matrices · {}\n"
      "limit: every operation at the speed of a copy ({:.4g} GB/s), of a product ({:.4g} "
      "TFLOP/s in {}){}\n\n{}",
      parameters(config), network_text(config), config.vocab, batch, length,
      options.common.precision, device_text(backend), limits.bytes / 1e9, limits.flops / 1e12,
      name_of(computed),
      limits.powers > 0 ? fmt::format(" or of powers of two ({:.3g} T/s)", limits.powers / 1e12)
                        : "",
      table_of(figures)));
}

}  // namespace

int run_bench(int argc, char** argv) {
  BenchOptions options;
  po::variables_map values;
  if (!parse(
          argc, argv, "bench ops|model [options]",
          "Times the operations, or prefill, decoding and training of a model of random weights.",
          describe(options), {"what"}, false, values))
    return 0;
  if (!options.preset.empty()) {
    TrainOptions preset;
    apply_preset(options.preset, preset);
    if (values["d"].defaulted()) options.d.value = preset.d;
    if (values["layers"].defaulted()) options.layers.value = preset.layers;
  }
  for (const auto& [name, value] : {std::pair{"--d", options.d},
                                    {"--layers", options.layers},
                                    {"--vocab", options.vocab},
                                    {"--length", options.length},
                                    {"--batch", options.batch}})
    if (value < 1) throw UsageError(fmt::format("{} is {}, expected 1 or more", name, value.value));
  if (options.what != "ops" && options.what != "model")
    throw UsageError(fmt::format("unknown benchmark '{}', expected ops or model", options.what));
  options.train = !values["no-training"].as<bool>();
  const auto backend = make_backend(options.common);
  Output out("");
  (options.what == "ops" ? bench_ops : bench_model)(*backend, options, out);
  out.close();
  return 0;
}

}  // namespace coil
