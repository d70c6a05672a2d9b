// The ops of a Mamba at given shapes, with values: what tests/test_op_cases.cc checks (same bits
// twice, any number of threads, NaN passes through) and `coil bench ops` times. A second backend is
// tested against the first with it (tests/test_cuda.cc): both get the same values.
#pragma once

#include <bit>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cost.h"
#include "kernels/error.h"
#include "kernels/ops.h"

namespace coil {

struct OpShape {
  int64_t d = 256, e = 512, n = 16, r = 16, w = 4, v = 16;
  std::vector<Piece> pieces = {{.length = 2048}};
  // bf16: activations and matrices are numbers of bf16, kept so where the device computes in it.
  DType matrices = DType::f32;
};

struct OpCase {
  std::string name;
  double flops = 0, bytes = 0;  // of arithmetic; read and written, each operand once
  double powers = 0;            // of two
  std::vector<View> inputs;     // on a CPU f32
  std::vector<View> outputs;    // written, or added to
  std::function<void(Backend&)> run;
};

class OpCases {
 public:
  // only: a part of the names of the operations that are wanted; others may be there, too.
  OpCases(Backend& backend, const OpShape& shape, const std::string& only = "");
  std::vector<OpCase> cases;

 private:
  using Shape = std::initializer_list<int64_t>;
  // Values from a fixed sequence, uniform within ±sqrt(3) * scale + offset, repeated after kRandom.
  static constexpr int64_t kRandom = 1'000'003;
  View values(Shape shape, float scale = 1, float offset = 0) {
    return filled(DType::f32, shape, scale, offset, false);
  }
  // The same as activations or matrices.
  View activations(Shape shape, float scale = 1, float offset = 0) {
    return filled(act_, shape, scale, offset, shape_.matrices == DType::bf16);
  }
  View filled(DType dtype, Shape shape, float scale, float offset, bool rounded) {
    const View view = add(dtype, shape);
    std::vector<float> host(view.count());
    for (int64_t i = 0; i < view.count(); ++i) {
      float& value = host[i];
      if (i >= kRandom) {
        value = host[i - kRandom];
        continue;
      }
      random_ = random_ * 6364136223846793005ULL + 1442695040888963407ULL;
      const double uniform = static_cast<double>(random_ >> 11) / (uint64_t{1} << 53);
      value = static_cast<float>((uniform - 0.5) * std::sqrt(12.)) * scale + offset;
      if (rounded) {  // to bf16; which of two equally near matters to nobody
        const uint32_t bits = std::bit_cast<uint32_t>(value) + 0x8000;
        value = std::bit_cast<float>(bits & 0xffff0000u);
      }
    }
    backend_.copy(host_view(host.data(), DType::f32, shape), view);
    backend_.sync();
    return view;
  }
  View ids(int64_t count, int64_t below) {
    const View view = add(DType::i32, {count});
    std::vector<int32_t> host(count);
    for (int64_t i = 0; i < count; ++i) host[i] = static_cast<int32_t>(i * 7 % 13 % below);
    backend_.copy(host_view(host.data(), DType::i32, {count}), view);
    backend_.sync();
    return view;
  }
  View add(DType dtype, Shape shape) {
    tensors_.emplace_back(backend_, dtype, shape);
    backend_.fill(tensors_.back(), 0);
    return tensors_.back();
  }
  // Bytes are those of inputs and outputs, and of `more`.
  void add(const std::string& name, double flops, std::vector<View> inputs,
           std::vector<View> outputs, std::function<void(Backend&)> run, double more = 0) {
    OpCase result{name, flops, more, 0, std::move(inputs), std::move(outputs), std::move(run)};
    for (const auto* views : {&result.inputs, &result.outputs})
      for (const View& view : *views)
        result.bytes += static_cast<double>(view.count() * size_of(view.dtype));
    cases.push_back(std::move(result));
  }
  void add_gemm(const std::string& name, int64_t m, int64_t n, int64_t k, bool ta, bool tb,
                float beta);
  bool on_cpu() const { return backend_.device().kind == Device::Kind::cpu; }
  void add_dense();
  void add_optimizer();
  void add_products();
  void add_decode();
  void add_sequence();
  void add_s4d();
  void add_coarse();

  Backend& backend_;
  OpShape shape_;
  DType act_;  // of activations
  Rows rows_;
  int64_t t_;
  uint64_t random_ = 1;
  std::vector<Tensor> tensors_;
};

inline OpCases::OpCases(Backend& backend, const OpShape& shape, const std::string& only)
    : backend_(backend),
      shape_(shape),
      act_(backend.activations(shape.matrices)),
      rows_(backend, shape.pieces),
      t_(rows_.total()) {
  const auto wanted = [&](std::initializer_list<std::string> families) {
    for (const std::string& family : families)
      if (family.find(only) != family.npos || only.find(family) != only.npos) return true;
    return false;
  };
  const bool products = wanted({"gemm"}),
             sequence = wanted({"conv1d", "selective_scan", "s4d_scan"});
  if (products) {
    add_products();
    add_decode();
  }
  if (only.empty() || (!products && !sequence)) add_dense();
  if (sequence) add_sequence();
}

inline void OpCases::add_gemm(const std::string& name, int64_t m, int64_t n, int64_t k, bool ta,
                              bool tb, float beta) {
  const float scale = 1 / std::sqrt(static_cast<float>(k));
  const View a = ta ? activations({k, m}) : activations({m, k});
  const View c = ta ? values({m, n}) : activations({m, n});  // gradients of weights are f32
  const View b = tb ? activations({n, k}, scale) : activations({k, n}, scale);
  add("gemm " + name, 2. * m * n * k, {a, b}, {c},
      [=](Backend& on) { on.run(Gemm{.a = a, .b = b, .c = c, .ta = ta, .tb = tb, .beta = beta}); });
}

inline void OpCases::add_products() {
  const auto [d, e, n, r, w, v, pieces, matrices] = shape_;
  const int64_t x = r + 2 * n;
  struct Layer {
    const char* name;
    int64_t out, in;
  };
  for (const auto& [name, out, in] :
       {Layer{"in_proj", 2 * e, d}, Layer{"x_proj", x, e}, Layer{"dt_proj", e, r},
        Layer{"out_proj", d, e}, Layer{"head", v, d}}) {
    add_gemm(name, t_, out, in, false, true, 0);
    add_gemm(std::string(name) + " dx", t_, in, out, false, false, 0);
    add_gemm(std::string(name) + " dweight", out, in, t_, true, false, 1);
  }
  const View a = values({t_, d}), b = values({2 * e, d}, 1 / std::sqrt(static_cast<float>(d)));
  const View c = values({t_, 2 * e}), half = add(DType::bf16, {2 * e, d});
  backend_.copy(b, half);
  if (!on_cpu()) return;  // f32 activations beside bf16 matrices are a CPU's
  add(
      "gemm in_proj bf16", 4. * t_ * e * d, {a}, {c},
      [=](Backend& on) { on.run(Gemm{.a = a, .b = half, .c = c, .tb = true}); }, 4. * e * d);
}

// One row: several copies of the weights in turn, since a model's layers do not stay in the nearest
// cache either.
inline void OpCases::add_decode() {
  constexpr int64_t kCopies = 12;
  const int64_t out = 2 * shape_.e, in = shape_.d;
  const View a = activations({1, in}), c = activations({1, out});
  const View weights = values({kCopies, out, in}, 1 / std::sqrt(static_cast<float>(in)));
  const View half = add(DType::bf16, {kCopies, out, in});
  backend_.copy(weights, half);
  for (const View& all : {weights, half}) {
    if (!on_cpu() && all.dtype != act_) continue;
    const auto next = std::make_shared<int64_t>(0);
    add(
        all.dtype == DType::f32 ? "gemm in_proj one row" : "gemm in_proj one row bf16",
        2. * out * in, {a}, {c},
        [=](Backend& on) {
          const View b = all.slice((*next)++ % kCopies, 1).reshape({out, in});
          on.run(Gemm{.a = a, .b = b, .c = c, .tb = true});
        },
        static_cast<double>(out * in * size_of(all.dtype)));
  }
}

inline void OpCases::add_dense() {
  const auto [d, e, n, r, w, v, pieces, matrices] = shape_;
  const int64_t t = t_, m = rows_.finished();
  const View x = activations({t, d}), residual = values({t, d}), y = activations({t, d}),
             sum = values({t, d});
  const View weight = values({d}, 0.1f, 1), rstd = values({t}, 0.1f, 1), dweight = values({d});
  add("copy", 0, {residual}, {sum}, [=](Backend& on) { on.copy(residual, sum); });
  add("norm", 4. * t * d, {x, residual, weight}, {y, sum}, [=](Backend& on) {
    on.run(Norm{.x = x, .residual = residual, .weight = weight, .y = y, .residual_out = sum});
  });
  const View total_in = values({t, d}), dresidual = values({t, d}), dx = values({t, d});
  View rounded;
  std::vector<View> outputs = {dx, dweight};
  if (act_ != DType::f32) outputs.push_back(rounded = add(act_, {t, d}));
  add("norm backward", 9. * t * d, {total_in, weight, rstd, x, dresidual}, outputs,
      [=](Backend& on) {
        on.run(NormBackward{.x = total_in,
                            .weight = weight,
                            .rstd = rstd,
                            .dy = x,
                            .dresidual = dresidual,
                            .dx = dx,
                            .dweight = dweight,
                            .dx_act = rounded});
      });
  add("sum_rows", t * d, {x}, {dweight},
      [=](Backend& on) { on.run(SumRows{.x = x, .out = dweight}); });
  const View codes = ids(t, v), table = activations({v, d}), dtable = values({v, d});
  add("embed", 0, {table}, {sum},
      [=](Backend& on) { on.run(Embed{.ids = codes, .table = table, .y = sum}); });
  add("embed backward", t * d, {residual}, {dtable},
      [=](Backend& on) { on.run(EmbedBackward{.ids = codes, .dy = residual, .dtable = dtable}); });
  const View pooled = values({m, d});
  const Rows* rows = &rows_;
  View sums;
  if (rows->slots() > 0) {
    sums = add(DType::f64, {rows->slots(), d + 1});
    backend_.fill(sums, 1);
  }
  std::vector<View> pool_out = {pooled};
  if (sums) pool_out.push_back(sums);
  add("pool mean", t * d, {x}, pool_out, [=](Backend& on) {
    on.run(Pool{.x = x, .y = pooled, .state = sums, .rows = rows, .pooling = Pooling::mean});
  });
  const View logits = values({t, v}, 3), dlogits = activations({t, v}), loss = values({t});
  const View targets = ids(t, v), total = add(DType::f64, {1});
  backend_.fill(total, 0);
  add("cross_entropy", 5. * t * v, {logits}, {loss, dlogits, total}, [=](Backend& on) {
    on.run(CrossEntropy{
        .logits = logits, .targets = targets, .loss = loss, .dlogits = dlogits, .total = total});
  });
  const View drawn = add(DType::i32, {t}), log_probs = values({t});
  for (const float top_p : {1.f, 0.9f})
    add(top_p < 1 ? "sample top_k top_p" : "sample", 0, {logits}, {drawn, log_probs},
        [=, top_k = top_p < 1 ? v / 2 : 0](Backend& on) {
          on.run(Sample{.logits = logits,
                        .ids = drawn,
                        .log_probs = log_probs,
                        .temperature = 0.9f,
                        .top_k = top_k,
                        .top_p = top_p,
                        .seed = 5});
        });
  const View ab = activations({t, 2 * d}), gated = activations({t, d}),
             dab = activations({t, 2 * d});
  add("glu", 2. * t * d, {ab}, {gated}, [=](Backend& on) { on.run(Glu{.x = ab, .y = gated}); });
  add("glu backward", 5. * t * d, {ab, x}, {dab},
      [=](Backend& on) { on.run(GluBackward{.x = ab, .dy = x, .dx = dab}); });
  add_coarse();
  add_optimizer();
}

// The meeting of two stages, 4 steps at a time. Sequences that go on are at different phases.
inline void OpCases::add_coarse() {
  const int64_t d = shape_.d, t = t_, slots = rows_.slots(), p = 4;
  std::vector<Piece> pieces = shape_.pieces;
  for (size_t i = 0; i < pieces.size(); ++i)
    if (pieces[i].from >= 0) pieces[i].position = static_cast<int64_t>(5 * i + 6);
  const auto rows = std::make_shared<const Rows>(backend_, std::move(pieces));
  const int64_t m = rows->pooled(p).rows.total();
  const View x = values({t, d}), y = activations({m, p * d}), sum = values({t, d});
  const View lifted = activations({m, p * d}), dx = values({t, d});
  View rest, next, drest, dnext;
  std::vector<View> down = {y}, up = {sum}, down_back = {dx}, up_back = {y};
  if (slots > 0) {
    down.push_back(rest = values({slots, p - 1, d}));
    up.push_back(next = values({slots, p * d}));
    down_back.push_back(drest = values({slots, p - 1, d}));
    up_back.push_back(dnext = values({slots, p * d}));
  }
  add("downsample", 0, {x}, down, [=](Backend& on) {
    on.run(Downsample{.x = x, .y = y, .state = rest, .rows = rows.get(), .p = p});
  });
  add("upsample", t * d, {lifted, x}, up, [=](Backend& on) {
    on.run(
        Upsample{.x = lifted, .residual = x, .y = sum, .state = next, .rows = rows.get(), .p = p});
  });
  add("downsample backward", t * d, {lifted, x}, down_back, [=](Backend& on) {
    on.run(DownsampleBackward{
        .dy = lifted, .dresidual = x, .dx = dx, .dstate = drest, .rows = rows.get(), .p = p});
  });
  add("upsample backward", 0, {x}, up_back, [=](Backend& on) {
    on.run(UpsampleBackward{.dy = x, .dx = y, .dstate = dnext, .rows = rows.get(), .p = p});
  });
}

// All tensors of a layer at once. The odd size comes after the others.
inline void OpCases::add_optimizer() {
  const auto [d, e, n, r, w, v, pieces, matrices] = shape_;
  std::vector<View> gradients, outputs;
  std::vector<AdamW::Item> items;
  double count = 0;
  for (const auto& [rows, cols] :
       {std::pair{2 * e, d}, {d, e}, {e, n}, {e, w}, {int64_t{1}, e}, {int64_t{1}, d + 1}}) {
    const AdamW::Item item{.w = values({rows, cols}),
                           .g = values({rows, cols}),
                           .m = values({rows, cols}, 0.1f),
                           .v = values({rows, cols}, 0.1f, 1),
                           .copy = add(rows == e ? DType::f32 : DType::bf16, {rows, cols}),
                           .decay = rows == e ? 0 : 0.1f};
    count += static_cast<double>(rows * cols);
    gradients.push_back(item.g);
    items.push_back(item);
    outputs.insert(outputs.end(), {item.w, item.g, item.m, item.v, item.copy});
    backend_.fill(item.copy, 0);
  }
  const View squares = add(DType::f64, {1});
  backend_.fill(squares, count);
  add("sum_squares", 2. * count, gradients, {squares},
      [=](Backend& on) { on.run(SumSquares{.x = gradients, .out = squares}); });
  // What is read once more than the lists say: w, m and v.
  add(
      "adamw", 15. * count, gradients, outputs,
      [=](Backend& on) {
        on.run(AdamW{.items = items, .squares = squares, .clip = 1, .lr = 1e-3f, .step = 3});
      },
      12. * count);
}

inline void OpCases::add_sequence() {
  const auto [d, e, n, r, w, v, pieces, matrices] = shape_;
  const int64_t t = t_, slots = rows_.slots();
  const Rows* rows = &rows_;
  const View xz = activations({t, 2 * e}), x = xz.columns(0, e), z = xz.columns(e, e);
  const View taps = values({e, w}, 0.5f), bias = values({e}), conv = activations({t, e});
  View tail, dtail;
  if (slots > 0) tail = values({slots, w - 1, e}), dtail = values({slots, w - 1, e});
  const auto with = [](std::vector<View> views, const View& optional) {
    if (optional) views.push_back(optional);
    return views;
  };
  add("conv1d", 2. * t * e * w, {taps, bias, x}, with({conv}, tail), [=](Backend& on) {
    on.run(Conv1d{.x = x, .weight = taps, .y = conv, .bias = bias, .state = tail, .rows = rows});
  });
  const View dconv = activations({t, e}), dxz = activations({t, 2 * e});
  const View dtaps = values({e, w}), dbias = values({e});
  add("conv1d backward", 6. * t * e * w, {taps, bias, x, dconv},
      with({dxz.columns(0, e), dtaps, dbias}, dtail), [=](Backend& on) {
        on.run(Conv1dBackward{.x = x,
                              .weight = taps,
                              .dy = dconv,
                              .bias = bias,
                              .state = tail,
                              .dx = dxz.columns(0, e),
                              .dweight = dtaps,
                              .dbias = dbias,
                              .dstate = dtail,
                              .rows = rows});
      });

  const View dbc = activations({t, r + 2 * n}), B = dbc.columns(r, n), C = dbc.columns(r + n, n);
  const View ddbc = activations({t, r + 2 * n}), dB = ddbc.columns(r, n),
             dC = ddbc.columns(r + n, n);
  const View u = activations({t, e}), dt = activations({t, e}), y = activations({t, e}),
             dy = activations({t, e});
  const View A_log = add(DType::f32, {e, n}), D = values({e}), dt_bias = values({e}, 0.5f, -4);
  std::vector<float> log_rates(e * n);
  for (int64_t i = 0; i < e * n; ++i)
    log_rates[i] = static_cast<float>(std::log(1. + static_cast<double>(i % n)));
  backend_.copy(host_view(log_rates.data(), DType::f32, {e, n}), A_log);
  backend_.sync();
  View h, dh;
  if (slots > 0) h = values({slots, e, n}), dh = values({slots, e, n});
  // How many there are is the backend's affair: no numbers are drawn for them.
  const View checkpoints = add(act_, {scan_checkpoints(backend_, rows_), e, n});
  backend_.fill(checkpoints, 0);
  const SelectiveScan scan{.x = u,
                           .dt = dt,
                           .A_log = A_log,
                           .B = B,
                           .C = C,
                           .D = D,
                           .dt_bias = dt_bias,
                           .y = y,
                           .z = z,
                           .state = h,
                           .rows = rows};
  SelectiveScan keeping = scan;
  keeping.checkpoints = checkpoints;
  // Of each channel, step and state: dt A, its power, (dt x) B, two for h, two for y.
  const double steps = static_cast<double>(t) * static_cast<double>(e * n);
  // A decay for each of them; softplus and two of the gate for each channel's step.
  const double powers = steps + 3. * static_cast<double>(t) * static_cast<double>(e);
  add("selective_scan", 7 * steps, {u, dt, A_log, B, C, D, dt_bias, z}, with({y}, h),
      [=](Backend& on) { on.run(scan); });
  add("selective_scan for training", 7 * steps, {u, dt, A_log, B, C, D, dt_bias, z},
      with({y, checkpoints}, h), [=](Backend& on) { on.run(keeping); });
  for (size_t i = cases.size() - 2; i < cases.size(); ++i) cases[i].powers = powers;
  backend_.run(keeping);  // backward reads its checkpoints
  const View du = activations({t, e}), ddt = activations({t, e});
  const View dA_log = values({e, n}), dD = values({e}), ddt_bias = values({e});
  const SelectiveScanBackward backward{.x = u,
                                       .dt = dt,
                                       .A_log = A_log,
                                       .B = B,
                                       .C = C,
                                       .D = D,
                                       .dt_bias = dt_bias,
                                       .dy = dy,
                                       .z = z,
                                       .checkpoints = checkpoints,
                                       .dx = du,
                                       .ddt = ddt,
                                       .dB = dB,
                                       .dC = dC,
                                       .dz = dxz.columns(e, e),
                                       .y = dxz.columns(0, e),
                                       .dA_log = dA_log,
                                       .dD = dD,
                                       .ddt_bias = ddt_bias,
                                       .dstate = dh,
                                       .rows = rows};
  add("selective_scan backward", 20 * steps, {u, dt, A_log, B, C, D, dt_bias, dy, z, checkpoints},
      with({du, ddt, dB, dC, backward.dz, backward.y, dA_log, dD, ddt_bias}, dh),
      [=](Backend& on) { on.run(backward); });
  cases.back().powers = powers;
  add_s4d();
}

inline void OpCases::add_s4d() {
  const int64_t d = shape_.d, n = shape_.n, t = t_, slots = rows_.slots();
  const Rows* rows = &rows_;
  const View x = activations({t, d}), y = activations({t, d}), before = activations({t, d});
  const View dy = activations({t, d}), dx = activations({t, d});
  const View log_A_real = values({d, n}, 0.2f, -0.7f), C = values({d, n, 2}), D = values({d});
  const View log_dt = values({d}, 0.8f, -4.6f), A_imag = add(DType::f32, {d, n});
  std::vector<float> turns(d * n);  // S4D-Lin
  for (int64_t i = 0; i < d * n; ++i) turns[i] = 3.14159265f * static_cast<float>(i % n);
  backend_.copy(host_view(turns.data(), DType::f32, {d, n}), A_imag);
  backend_.sync();
  View h, dh;
  if (slots > 0) h = values({slots, d, n, 2}), dh = values({slots, d, n, 2});
  const View checkpoints = add(DType::f32, {s4d_checkpoints(rows_), d, n, 2});
  const S4dScan scan{.x = x,
                     .log_A_real = log_A_real,
                     .A_imag = A_imag,
                     .C = C,
                     .log_dt = log_dt,
                     .D = D,
                     .y = y,
                     .state = h,
                     .rows = rows,
                     .gelu = true};
  S4dScan keeping = scan;
  keeping.checkpoints = checkpoints;
  keeping.before_gelu = before;
  std::vector<View> inputs = {x, log_A_real, A_imag, C, log_dt, D};
  std::vector<View> outputs = {y}, kept = {y, checkpoints, before};
  if (slots > 0) outputs.push_back(h), kept.push_back(h);
  add("s4d_scan", cost_of(scan).flops, inputs, outputs, [=](Backend& on) { on.run(scan); });
  add("s4d_scan for training", cost_of(keeping).flops, inputs, kept,
      [=](Backend& on) { on.run(keeping); });
  const S4dTable table{.log_A_real = log_A_real,
                       .A_imag = A_imag,
                       .C = C,
                       .log_dt = log_dt,
                       .table = add(DType::f32, {d, 4, n})};
  add("s4d_table", cost_of(table).flops, {log_A_real, A_imag, C, log_dt}, {table.table},
      [=](Backend& on) { on.run(table); });
  backend_.run(keeping);  // backward reads what it kept
  const S4dScanBackward backward{.x = x,
                                 .log_A_real = log_A_real,
                                 .A_imag = A_imag,
                                 .C = C,
                                 .log_dt = log_dt,
                                 .D = D,
                                 .dy = dy,
                                 .checkpoints = checkpoints,
                                 .before_gelu = before,
                                 .dx = dx,
                                 .dlog_A_real = values({d, n}),
                                 .dA_imag = values({d, n}),
                                 .dC = values({d, n, 2}),
                                 .dlog_dt = values({d}),
                                 .dD = values({d}),
                                 .dstate = dh,
                                 .rows = rows,
                                 .gelu = true};
  for (const View& view : {dy, checkpoints, before}) inputs.push_back(view);
  outputs = {dx,          backward.dlog_A_real, backward.dA_imag,
             backward.dC, backward.dlog_dt,     backward.dD};
  if (slots > 0) outputs.push_back(dh);
  add("s4d_scan backward", cost_of(backward).flops, inputs, outputs,
      [=](Backend& on) { on.run(backward); });
}

}  // namespace coil
