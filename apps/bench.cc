// coil bench ops | model: how fast the operations, or a whole model of random weights, run on this
// machine. Each is repeated for a while; the best and the median are printed. An op's limit is the
// longest of the times that its bytes take at the speed of a copy, its arithmetic at that of a
// square product, and on a GPU its powers of two at that of the special function units, all
// measured in the same run.
#include <algorithm>
#include <chrono>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>

#include "apps/command.h"
#include "kernels/error.h"
#include "kernels/op_cases.h"
#include "model/head.h"
#include "model/optimizer.h"
#include "pipelines/run_log.h"
#include "pipelines/stream.h"
#include "pipelines/train.h"

namespace coil {
namespace {

namespace po = boost::program_options;
using Json = nlohmann::ordered_json;

struct BenchOptions {
  std::string what = "model", only, preset;
  Size d{256}, layers{8}, vocab{16}, length{2048}, batch{1}, chunk{0};
  double seconds = 2;
  bool json = false, train = true, audio = false;
  CommonOptions common;
};

po::options_description describe(BenchOptions& options) {
  po::options_description text("Options");
  text.add_options()  //
      ("what", po::value(&options.what)->value_name("WHAT"),
       "ops: each operation; model, the default: prefill, decoding and training")  //
      ("preset", po::value(&options.preset)->value_name("NAME"),
       "d, layers and vocabulary of a preset of coil train")  //
      ("d", option(options.d, "SIZE"),
       "width; inner width twice that, 16 states, dt rank a sixteenth")   //
      ("layers", option(options.layers, "COUNT"), "layers of the model")  //
      ("vocab", option(options.vocab, "SIZE"), "size of the vocabulary")  //
      ("length", option(options.length, "SIZE"), "steps of a sequence")   //
      ("batch", option(options.batch, "COUNT"), "sequences at once")      //
      ("chunk", option(options.chunk, "SIZE"),
       "steps of all sequences in one pass of prefill; 0: as classify does")  //
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

struct Limits {
  double bytes, flops;  // per second
  double powers;        // of two, per second; 0: limits nothing
};

// `bytes`: of the copy, like those of the operations, so that both lie in the same cache or in
// none.
Limits measure_limits(Backend& backend, int64_t bytes, DType matrices, double seconds) {
  const bool cpu = backend.device().kind == Device::Kind::cpu;
  const int64_t side = cpu ? 768 : 8192;
  const DType type = backend.activations(matrices);
  Limits limits{};
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
  const Limits limits = measure_limits(backend, bytes, matrices, seconds);
  const OpShape shape{.d = options.d,
                      .e = 2 * options.d,
                      .r = std::max<int64_t>(1, options.d / 16),
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
    const double powers = limits.powers > 0 ? op.powers / limits.powers : 0;
    const double limit =
        std::max({op.bytes / limits.bytes, op.flops / limits.flops, powers}) / time.best;
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

void bench_model(Backend& backend, const BenchOptions& options, Output& out) {
  const int64_t batch = options.batch, length = options.length;
  Config config;
  config.vocab = options.vocab;
  config.d = options.d;
  config.e = 2 * options.d;
  config.dt_rank = std::max<int64_t>(1, options.d / 16);
  config.layers = std::vector<LayerConfig>(options.layers);
  if (options.audio) {
    config.audio.rate = 16'000;
    config.vocab = audio_vocabulary(config);
  }
  Model model = make_model(backend, config, options.common.seed);
  std::vector<int32_t> ids(batch * length), targets(batch * length);
  Philox random(options.common.seed, 0, 0);
  for (int32_t& id : ids) id = static_cast<int32_t>(random.below(config.vocab));
  for (int32_t& id : targets) id = static_cast<int32_t>(random.below(config.predicted()));
  const auto ids_view = [&](std::vector<int32_t>& from, int64_t count) {
    return host_view(from.data(), DType::i32, {count});
  };

  struct Figure {
    const char* name;
    double tokens;  // of one repetition
    Timing time;
    int64_t steps = 0;  // of one repetition, where each is a pass over all sequences
  };
  std::vector<Figure> figures;
  const DType matrices = matrix_dtype(options.common);
  if (options.train) {
    const DType computed = backend.activations(matrices);  // on a CPU training is in f32
    Model grad = zeros_like(backend, model),
          trained = make_model(backend, config, options.common.seed);
    std::optional<Model> rounded;
    if (computed != DType::f32) rounded = converted(backend, trained, computed);
    Optimizer optimizer(backend, trained, {});
    const Rows rows = Rows::equal(backend, batch, length);
    const Tensor numbers(backend, DType::f64, {2});  // loss, sum of squares of the gradient
    figures.push_back(
        {computed == DType::f32 ? "training, f32" : "training, bf16",
         static_cast<double>(batch * length), measure(backend, options.seconds, [&] {
           backend.fill(numbers, 0);
           add_loss(backend, rounded ? *rounded : trained, ids_view(ids, batch * length), rows,
                    ids_view(targets, batch * length), {}, numbers.view().slice(0, 1), &grad);
           optimizer.step(backend, trained, grad, 1e-3, numbers.view().slice(1, 1),
                          rounded ? &*rounded : nullptr);
         })});
  }
  model = converted(backend, model, matrices);
  State state(backend, config, static_cast<int32_t>(batch));
  const int64_t rows_at_once =
      options.chunk > 0 ? options.chunk.value : auto_batch(config, backend.device());
  const int64_t chunk = std::clamp<int64_t>(rows_at_once / batch, 1, length);
  figures.push_back(
      {"prefill", static_cast<double>(batch * length), measure(backend, options.seconds, [&] {
         for (int64_t begin = 0; begin < length; begin += chunk) {
           const int64_t steps = std::min(chunk, length - begin);
           const Rows rows = next_pieces(backend, batch, steps, begin, begin + steps == length);
           const Tensor h = hidden(backend, model, ids_view(ids, batch * steps), rows, &state);
           lm_logits(backend, model, h);
         }
       })});
  // Ids from the host to logits on the device, as many times as hide that the last is waited for.
  constexpr int64_t kSteps = 64;
  int64_t position = length;
  figures.push_back({"decoding", static_cast<double>(batch * kSteps),
                     measure(backend, options.seconds,
                             [&] {
                               for (int64_t i = 0; i < kSteps; ++i) {
                                 const Rows rows =
                                     next_pieces(backend, batch, 1, position++, false);
                                 const Tensor h =
                                     hidden(backend, model, ids_view(ids, batch), rows, &state);
                                 lm_logits(backend, model, h);
                               }
                             }),
                     kSteps});

  if (options.json) {
    Json result = {{"threads", backend.threads()},
                   {"precision", options.common.precision},
                   {"parameters", parameters(config)},
                   {"d", config.d},
                   {"layers", config.layers.size()},
                   {"vocab", config.vocab},
                   {"length", length},
                   {"batch", batch}};
    for (const Figure& figure : figures) {
      result[figure.name] = {{"best_tokens_per_s", figure.tokens / figure.time.best},
                             {"median_tokens_per_s", figure.tokens / figure.time.median}};
      if (figure.steps > 0)
        result[figure.name]["median_us_per_step"] =
            figure.time.median * 1e6 / static_cast<double>(figure.steps);
    }
    out.write(result.dump(2) + "\n");
    return;
  }
  out.write(fmt::format(
      "{} parameters · d {} x {} layers · vocabulary {} · {} x {} steps · {} matrices · {}\n\n"
      "{:<16}{:>14}{:>16}\n",
      parameters(config), config.d, config.layers.size(), config.vocab, batch, length,
      options.common.precision, device_text(backend), "", "best tokens/s", "median tokens/s"));
  for (const Figure& figure : figures) {
    out.write(fmt::format("{:<16}{:>14.0f}{:>16.0f}", figure.name, figure.tokens / figure.time.best,
                          figure.tokens / figure.time.median));
    if (figure.steps > 0)
      out.write(fmt::format("   {:.1f} us a step",
                            figure.time.median * 1e6 / static_cast<double>(figure.steps)));
    out.write("\n");
  }
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
    options.audio = preset.audio;
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
