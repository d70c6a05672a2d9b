// What kernels/op_cases.h leaves at its usual setting, as more cases of the same kind: sequences
// read from their end, a scan with its sum of delta, without gate, convolution without SiLU, S4D
// without GELU, the last row of a sequence, classes of unequal weight, products with a bias, labels
// beside ids.
#pragma once

#include <random>

#include "kernels/op_cases.h"

namespace coil {

class OpVariants {
 public:
  OpVariants(Backend& backend, const OpShape& shape)
      : backend_(backend),
        shape_(shape),
        act_(backend.activations(shape.matrices)),
        rows_(backend, shape.pieces),
        whole_(backend, whole(shape.pieces)),
        t_(rows_.total()),
        one_(Rows::equal(backend, 1, t_)) {
    add_products();
    add_embeddings();
    add_loss();
    add_pools();
    for (const bool reverse : {false, true}) {
      add_conv1d(reverse);
      add_scan(reverse);
      add_s4d(reverse);
    }
  }
  std::vector<OpCase> cases;

 private:
  using Shape = std::initializer_list<int64_t>;

  // The same lengths as sequences of their own: the only ones that can be read from their end.
  static std::vector<Piece> whole(std::vector<Piece> pieces) {
    for (Piece& piece : pieces) piece = {.begin = piece.begin, .length = piece.length};
    return pieces;
  }
  View filled(DType dtype, Shape shape, float scale, float offset, bool rounded) {
    tensors_.emplace_back(backend_, dtype, shape);
    const View view = tensors_.back();
    std::vector<float> host(view.count());
    std::uniform_real_distribution<float> draw(offset - 1.7f * scale, offset + 1.7f * scale);
    for (float& value : host) {
      value = draw(random_);
      // To bf16, on a CPU too; which of two equally near matters to nobody.
      if (rounded)
        value = std::bit_cast<float>((std::bit_cast<uint32_t>(value) + 0x8000) & 0xffff0000u);
    }
    backend_.copy(host_view(host.data(), DType::f32, shape), view);
    backend_.sync();
    return view;
  }
  View values(Shape shape, float scale = 1, float offset = 0) {
    return filled(DType::f32, shape, scale, offset, false);
  }
  View activations(Shape shape, float scale = 1) {
    return filled(act_, shape, scale, 0, shape_.matrices == DType::bf16);
  }
  View zeros(DType dtype, Shape shape) {
    tensors_.emplace_back(backend_, dtype, shape);
    backend_.fill(tensors_.back(), 0);
    return tensors_.back();
  }
  template <class Op>
  void add(const std::string& name, std::vector<View> inputs, std::vector<View> outputs, Op op) {
    // An output that is left out in this case.
    std::erase_if(outputs, [](const View& view) { return !view; });
    cases.push_back(OpCase{.name = name,
                           .inputs = std::move(inputs),
                           .outputs = std::move(outputs),
                           .run = [op](Backend& on) { on.run(op); }});
  }

  // Into activations, which a bf16 c rounds once for the bias and once for the product.
  void add_products() {
    const int64_t d = shape_.d, out = 2 * shape_.e;
    const View a = activations({t_, d}), bias = values({out}), c = activations({t_, out});
    const View b = activations({out, d}, 1 / std::sqrt(static_cast<float>(d)));
    const Gemm gemm{.a = a, .b = b, .c = c, .bias = bias, .tb = true};
    add("gemm bias", {a, b, bias}, {c}, gemm);
    Gemm upon = gemm;  // and c one of the column ranges of a row
    upon.c = activations({t_, out + 3}).columns(2, out);
    upon.alpha = 0.5f;
    upon.beta = -0.75f;
    add("gemm bias upon c", {a, b, bias, upon.c}, {upon.c}, upon);
    upon.bias = {};
    upon.c = activations({t_, out});
    add("gemm upon c", {a, b, upon.c}, {upon.c}, upon);
    const View weight = values({out, d});
    const View dy = activations({t_, out}, 1 / std::sqrt(static_cast<float>(t_)));
    add("gemm bias f32", {dy, a}, {weight},
        Gemm{.a = dy, .b = a, .c = weight, .bias = values({d}), .ta = true, .beta = 1});
  }

  void add_embeddings() {
    const int64_t d = shape_.d, v = shape_.v, l = 3;
    const View ids = zeros(DType::i32, {t_});
    std::vector<int32_t> host(t_);
    for (int64_t i = 0; i < t_; ++i) host[i] = static_cast<int32_t>(i * 7 % ((l + 1) * v));
    backend_.copy(host_view(host.data(), DType::i32, {t_}), ids);
    backend_.sync();
    const View table = activations({v, d}), labels = activations({l, d});
    const Embed op{.ids = ids, .table = table, .y = values({t_, d}), .labels = labels};
    add("embed with labels", {table, labels}, {op.y}, op);
    const EmbedBackward back{
        .ids = ids, .dy = values({t_, d}), .dtable = values({v, d}), .dlabels = values({l, d})};
    add("embed backward with labels", {back.dy, back.dtable, back.dlabels},
        {back.dtable, back.dlabels}, back);
  }

  // Some rows are not counted.
  void add_loss() {
    const int64_t v = shape_.v;
    const View logits = values({t_, v}, 3), weights = values({v}, 0.5f, 1);
    const View targets = zeros(DType::i32, {t_});
    std::vector<int32_t> host(t_);
    for (int64_t i = 0; i < t_; ++i) host[i] = i % 5 == 3 ? -1 : static_cast<int32_t>(i * 7 % v);
    backend_.copy(host_view(host.data(), DType::i32, {t_}), targets);
    backend_.sync();
    const CrossEntropy op{.logits = logits,
                          .targets = targets,
                          .loss = values({t_}),
                          .dlogits = activations({t_, v}),
                          .class_weights = weights,
                          .total = zeros(DType::f64, {1}),
                          .scale = 0.25f};
    add("cross_entropy of weighted classes", {logits, weights.slice(0, 1)},
        {op.loss, op.dlogits, op.total}, op);
  }

  void add_pools() {
    const int64_t d = shape_.d, m = whole_.finished();
    const View x = activations({t_, d}), y = values({m, d}), dy = values({m, d});
    const Piece& last = whole_.pieces().back();
    add("pool last", {x.slice(last.begin + last.length - 1, 1)}, {y},
        Pool{.x = x, .y = y, .rows = &whole_, .pooling = Pooling::last});
    for (const Pooling pooling : {Pooling::last, Pooling::mean}) {
      const View dx = activations({t_, d});
      add(pooling == Pooling::last ? "pool backward last" : "pool backward mean", {dy}, {dx},
          PoolBackward{.dy = dy, .dx = dx, .rows = &whole_, .pooling = pooling});
    }
  }

  // Forward in time without SiLU, from the end with it.
  void add_conv1d(bool reverse) {
    const int64_t e = shape_.e, w = shape_.w, slots = reverse ? 0 : rows_.slots();
    const View xz = activations({t_, 2 * e}), dxz = activations({t_, 2 * e});
    Conv1d op{.x = xz.columns(0, e),
              .weight = values({e, w}, 0.5f),
              .y = activations({t_, e}),
              .bias = values({e}),
              .rows = reverse ? &whole_ : &rows_,
              .silu = reverse,
              .reverse = reverse};
    Conv1dBackward back{.x = op.x,
                        .weight = op.weight,
                        .dy = activations({t_, e}),
                        .bias = op.bias,
                        .dx = dxz.columns(0, e),
                        .dweight = values({e, w}),
                        .dbias = values({e}),
                        .rows = op.rows,
                        .silu = op.silu,
                        .reverse = reverse};
    if (slots > 0) {
      op.state = values({slots, w - 1, e});
      back.state = values({slots, w - 1, e});
      back.dstate = values({slots, w - 1, e});
    }
    const std::string how = reverse ? "from the end" : "without SiLU";
    add("conv1d " + how, {op.x, op.weight, op.bias}, {op.y, op.state}, op);
    std::vector<View> inputs = {op.x, op.weight, back.dy};
    if (op.silu) inputs.push_back(op.bias);  // whose value a linear one's gradients do not need
    add("conv1d backward " + how, inputs, {back.dx, back.dweight, back.dbias, back.dstate}, back);
  }

  // Both ways with gate and with sum of delta; forward in time without the gate.
  void add_scan(bool reverse) {
    const auto [d, e, n, r, w, v, pieces, matrices] = shape_;
    const auto count = static_cast<int64_t>(pieces.size());
    const int64_t slots = reverse ? 0 : rows_.slots();
    const Rows& rows = reverse ? whole_ : rows_;
    const View dbc = activations({t_, r + 2 * n}), ddbc = activations({t_, r + 2 * n});
    const View z = activations({t_, e}), dz = activations({t_, e});
    SelectiveScan op{.x = activations({t_, e}),
                     .dt = activations({t_, e}),
                     .A_log = values({e, n}, 0.6f, 1.5f),
                     .B = dbc.columns(r, n),
                     .C = dbc.columns(r + n, n),
                     .D = values({e}),
                     .dt_bias = values({e}, 0.5f, -4),
                     .y = activations({t_, e}),
                     .z = z,
                     .rows = &rows,
                     .reverse = reverse};
    SelectiveScanBackward back{
        .x = op.x,
        .dt = op.dt,
        .A_log = op.A_log,
        .B = op.B,
        .C = op.C,
        .D = op.D,
        .dt_bias = op.dt_bias,
        .dy = activations({t_, e}),
        .z = z,
        .checkpoints = zeros(op.x.dtype, {scan_checkpoints(backend_, rows), e, n}),
        .dx = activations({t_, e}),
        .ddt = activations({t_, e}),
        .dB = ddbc.columns(r, n),
        .dC = ddbc.columns(r + n, n),
        .dz = dz,
        .dA_log = values({e, n}),
        .dD = values({e}),
        .ddt_bias = values({e}),
        .rows = &rows,
        .reverse = reverse};
    if (slots > 0) op.state = values({slots, e, n}), back.dstate = values({slots, e, n});
    const std::vector<View> inputs = {op.x, op.dt, op.A_log, op.B, op.C, op.D, op.dt_bias};
    const std::string end = reverse ? " from the end" : "";
    const auto with = [](std::vector<View> views, std::initializer_list<View> more) {
      views.insert(views.end(), more);
      return views;
    };
    if (reverse) add("selective_scan" + end, with(inputs, {z}), {op.y}, op);
    SelectiveScan summing = op;
    summing.sum_dt = values({count, e});
    add("selective_scan with sum_dt" + end, with(inputs, {z}), {op.y, summing.sum_dt, op.state},
        summing);
    if (!reverse) {
      SelectiveScan state_only = summing;
      state_only.y = {};
      if (slots > 0)
        add("selective_scan of the state alone", {op.x, op.dt, op.A_log, op.B, op.dt_bias},
            {summing.sum_dt, op.state}, state_only);
      SelectiveScan marking = op;
      marking.rows = &one_;
      marking.state = {};
      marking.every = t_ > 3000 ? 1440 : 32;
      marking.marks = values({(t_ - 1) / marking.every, e, n});
      add("selective_scan with marks", with(inputs, {z}), {op.y, marking.marks}, marking);
      SelectiveScan starting = marking;
      starting.marks = {};
      starting.starts = zeros(DType::f32, {1 + marking.marks.rows(), e, n});
      starting.y = activations({t_, e});
      if (marking.marks.rows() > 0) {
        backend_.run(marking);
        backend_.copy(marking.marks, starting.starts.slice(1, marking.marks.rows()));
      }
      add("selective_scan from starts", with(inputs, {z}), {starting.y}, starting);
      op.z = back.z = back.dz = {};
      add("selective_scan without gate", inputs, {op.y, op.state}, op);
    }
    SelectiveScan keeping = op;
    keeping.checkpoints = back.checkpoints;
    keeping.y = activations({t_, e});  // what y is to become shall not be there already
    // Backward reads its checkpoints; the state that they begin from stays what it was.
    Tensor state;
    if (op.state) {
      state = Tensor(backend_, DType::f32, {slots, e, n});
      backend_.copy(op.state, state);
    }
    backend_.run(keeping);
    if (op.state) backend_.copy(state, op.state);
    add("selective_scan backward" + (reverse ? end : " without gate"),
        reverse ? with(inputs, {z, back.dy}) : with(inputs, {back.dy}),
        {back.dx, back.ddt, back.dB, back.dC, back.dz, back.dA_log, back.dD, back.ddt_bias,
         back.dstate},
        back);
  }

  // Forward in time without GELU, from the end with it.
  void add_s4d(bool reverse) {
    const int64_t d = shape_.d, n = shape_.n, slots = reverse ? 0 : rows_.slots();
    const Rows& rows = reverse ? whole_ : rows_;
    S4dScan op{.x = activations({t_, d}),
               .log_A_real = values({d, n}, 0.2f, -0.7f),
               .A_imag = values({d, n}, 20),
               .C = values({d, n, 2}),
               .log_dt = values({d}, 0.8f, -4.6f),
               .D = values({d}),
               .y = activations({t_, d}),
               .rows = &rows,
               .gelu = reverse,
               .reverse = reverse};
    S4dScanBackward back{.x = op.x,
                         .log_A_real = op.log_A_real,
                         .A_imag = op.A_imag,
                         .C = op.C,
                         .log_dt = op.log_dt,
                         .D = op.D,
                         .dy = activations({t_, d}),
                         .checkpoints = zeros(DType::f32, {s4d_checkpoints(rows), d, n, 2}),
                         .dx = activations({t_, d}),
                         .dlog_A_real = values({d, n}),
                         .dA_imag = values({d, n}),
                         .dC = values({d, n, 2}),
                         .dlog_dt = values({d}),
                         .dD = values({d}),
                         .rows = &rows,
                         .gelu = op.gelu,
                         .reverse = reverse};
    if (slots > 0) op.state = values({slots, d, n, 2}), back.dstate = values({slots, d, n, 2});
    std::vector<View> inputs = {op.x, op.log_A_real, op.A_imag, op.C, op.log_dt, op.D};
    const std::string how = reverse ? "from the end" : "without GELU";
    add("s4d_scan " + how, inputs, {op.y, op.state}, op);
    S4dScan keeping = op;
    keeping.checkpoints = back.checkpoints;
    keeping.y = activations({t_, d});
    if (op.gelu) keeping.before_gelu = back.before_gelu = activations({t_, d});
    Tensor state;
    if (op.state) {
      state = Tensor(backend_, DType::f32, {slots, d, n, 2});
      backend_.copy(op.state, state);
    }
    backend_.run(keeping);
    if (op.state) backend_.copy(state, op.state);
    inputs.push_back(back.dy);
    add("s4d_scan backward " + how, inputs,
        {back.dx, back.dlog_A_real, back.dA_imag, back.dC, back.dlog_dt, back.dD, back.dstate},
        back);
  }

  Backend& backend_;
  OpShape shape_;
  DType act_;
  Rows rows_, whole_;
  int64_t t_;
  Rows one_;  // all as one sequence
  std::mt19937 random_{9};
  std::vector<Tensor> tensors_;
};

// The cases of kernels/op_cases.h and these.
struct EveryOpCase {
  EveryOpCase(Backend& backend, const OpShape& shape)
      : usual(backend, shape), variants(backend, shape), cases(usual.cases) {
    cases.insert(cases.end(), variants.cases.begin(), variants.cases.end());
  }
  OpCases usual;
  OpVariants variants;
  std::vector<OpCase> cases;
};

}  // namespace coil
