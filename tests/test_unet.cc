// U-Nets against a scalar oracle, put together from those of the ops: output and every gradient.
// Then what is theirs alone: pooling at any phase, coarse stages that run when their turn comes,
// states of sequences that finish no coarse step. (test_backbone.cc has what holds of any model.)
#include "model/unet.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "kernels/error.h"
#include "model/counting_backend.h"
#include "tests/gradcheck.h"
#include "tests/model_testing.h"
#include "tests/reference_dense.h"

namespace coil {
namespace {

using reference::Arrays;

// x (t, in) → (t, out) by weight (out, in).
template <class T>
std::vector<T> linear(const std::vector<T>& x, const std::vector<T>& weight, int64_t in,
                      const std::vector<T>* bias = nullptr) {
  const auto t = static_cast<int64_t>(x.size()) / in;
  const auto out = static_cast<int64_t>(weight.size()) / in;
  std::vector<T> y(t * out);
  for (int64_t i = 0; i < t; ++i)
    for (int64_t j = 0; j < out; ++j) {
      T sum = bias ? (*bias)[j] : T(0);
      for (int64_t k = 0; k < in; ++k) sum += x[i * in + k] * weight[j * in + k];
      y[i * out + j] = sum;
    }
  return y;
}

template <class T>
std::vector<T> columns(const std::vector<T>& x, int64_t width, int64_t begin, int64_t count) {
  std::vector<T> part;
  for (size_t row = 0; row < x.size(); row += width)
    part.insert(part.end(), x.begin() + row + begin, x.begin() + row + begin + count);
  return part;
}

template <class T>
std::vector<T> gated(const std::vector<T>& ab, int64_t width) {
  std::vector<T> y = columns(ab, 2 * width, 0, width);
  const std::vector<T> b = columns(ab, 2 * width, width, width);
  for (size_t i = 0; i < y.size(); ++i) y[i] = reference::glu(y[i], b[i]);
  return y;
}

template <class T>
struct Oracle {
  const Arrays<T>& w;
  std::string prefix;
  const std::vector<T>& at(const std::string& name) const { return w.at(prefix + name); }

  std::vector<T> norm(const std::vector<T>& x, const std::string& name, double eps) const {
    const std::vector<T>& weight = at(name);
    std::vector<T> y;
    for (size_t row = 0; row < x.size(); row += weight.size()) {
      const std::vector<T> one = reference::norm(
          std::vector<T>(x.begin() + row, x.begin() + row + weight.size()), weight, eps);
      y.insert(y.end(), one.begin(), one.end());
    }
    return y;
  }
  std::vector<T> s4d(const Config& c, const std::vector<Piece>& pieces, const std::vector<T>& u,
                     const std::string& m) const {
    const auto scan = reference::s4d_scan<T>({.d = c.d, .n = c.s4d_states, .gelu = true}, pieces,
                                             {{"x", u},
                                              {"log_A_real", at(m + "kernel.log_A_real")},
                                              {"A_imag", at(m + "kernel.A_imag")},
                                              {"C", at(m + "kernel.C")},
                                              {"log_dt", at(m + "kernel.log_dt")},
                                              {"D", at(m + "D")}});
    const auto ab = linear(scan.at("y"), at(m + "output_linear.0.weight"), c.d,
                           &at(m + "output_linear.0.bias"));
    return gated(ab, c.d);
  }
  std::vector<T> mamba1(const Config& c, const std::vector<Piece>& pieces, const std::vector<T>& u,
                        const std::string& m) const {
    const int64_t e = c.e, n = c.n, r = c.dt_rank;
    const auto xz = linear(u, at(m + "in_proj.weight"), c.d, &at(m + "in_proj.bias"));
    const auto x = reference::conv1d<T>({.c = e, .w = c.w}, pieces,
                                        {{"x", columns(xz, 2 * e, 0, e)},
                                         {"weight", at(m + "conv1d.weight")},
                                         {"bias", at(m + "conv1d.bias")}})
                       .at("y");
    const auto dbc = linear(x, at(m + "x_proj.weight"), e);
    const auto dt = linear(columns(dbc, r + 2 * n, 0, r), at(m + "dt_proj.weight"), r);
    const auto scan = reference::selective_scan<T>({.e = e, .n = n}, pieces,
                                                   {{"x", x},
                                                    {"dt", dt},
                                                    {"A_log", at(m + "A_log")},
                                                    {"B", columns(dbc, r + 2 * n, r, n)},
                                                    {"C", columns(dbc, r + 2 * n, r + n, n)},
                                                    {"D", at(m + "D")},
                                                    {"dt_bias", at(m + "dt_proj.bias")},
                                                    {"z", columns(xz, 2 * e, e, e)}});
    return linear(scan.at("y"), at(m + "out_proj.weight"), e, &at(m + "out_proj.bias"));
  }
};

// Whole sequences of the network at `depth`; x is (t, d).
template <class T>
std::vector<T> network(const Config& c, int64_t depth, const std::vector<Piece>& pieces,
                       const Arrays<T>& w, std::vector<T> x) {
  const auto prefix = [](int64_t of) {
    return of == 0 ? std::string("backbone.") : fmt::format("backbone.stages.{}.", of);
  };
  const auto add = [&](const std::vector<T>& more) {
    for (size_t i = 0; i < x.size(); ++i) x[i] += more[i];
  };
  if (!c.inner.empty()) {
    const int64_t p = c.inner[0].pool;
    const Oracle<T> inner{w, prefix(depth + 1)};
    std::vector<Piece> coarse;
    int64_t m = 0;
    for (const Piece& piece : pieces) {
      coarse.push_back({.begin = m, .length = piece.length / p});
      m += piece.length / p;
    }
    const auto steps = reference::downsample<T>({.d = c.d, .p = p}, pieces, {{"x", x}}).at("y");
    const auto u = linear(steps, inner.at("down.weight"), p * c.d, &inner.at("down.bias"));
    const auto y = network(inner_config(c), depth + 1, coarse, w, u);
    const auto lifted = linear(y, inner.at("up.weight"), c.inner[0].d, &inner.at("up.bias"));
    x = reference::upsample<T>({.d = c.d, .p = p}, pieces, {{"x", lifted}, {"residual", x}})
            .at("y");
  }
  const Oracle<T> own{w, prefix(depth)};
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const std::string layer = fmt::format("layers.{}.", i), mixer = layer + "mixer.";
    const auto u = own.norm(x, layer + "norm.weight", c.eps);
    add(c.layers[i].mixer == MixerKind::s4d ? own.s4d(c, pieces, u, mixer)
                                            : own.mamba1(c, pieces, u, mixer));
    if (c.mlp == 0) continue;
    const auto ab = linear(own.norm(x, layer + "mlp_norm.weight", c.eps),
                           own.at(layer + "mlp.in_proj.weight"), c.d);
    add(linear(gated(ab, c.mlp * c.d), own.at(layer + "mlp.out_proj.weight"), c.mlp * c.d));
  }
  return own.norm(x, "norm_f.weight", c.eps);
}

std::vector<double> doubles(Backend& backend, const View& view) {
  const std::vector<float> values = values_of(backend, view);
  return {values.begin(), values.end()};
}

bool in_backbone(const Param& param) {
  return param.info.name.starts_with("backbone.") &&
         !param.info.name.starts_with("backbone.embeddings.");
}

class UNet : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    COIL_NEEDS_TEST_DEVICE();
    backend_ = make_test_backend();
    const std::string pool = GetParam();
    const bool three = pool.find(',') != pool.npos;
    const char* const mixers = three ? "s4d/s4d,mamba1/mamba1" : "mamba1/s4d,mamba1";
    model_ = random_model(*backend_, unet_config(mixers, pool), 23);
  }
  std::unique_ptr<Backend> backend_;
  Model model_;
};
INSTANTIATE_TEST_SUITE_P(Pools, UNet, testing::Values("4,2", "2,3", "4,4", "3", "16"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), ',', '_');
                           return "of_" + name;
                         });

TEST_P(UNet, OutputAndEveryGradientAreTheOracles) {
  Backend& backend = *backend_;
  const Config& config = model_.config;
  const std::vector<Piece> pieces = whole_pieces({37, 1, 3, 8, 16, 5});
  const Rows rows(backend, pieces);
  const int64_t t = rows.total(), d = config.d;
  const Tensor x = random_tensor(backend, {t, d}, 7), dy = random_tensor(backend, {t, d}, 8);
  Tensor consumed = random_tensor(backend, {t, d}, 7);
  Model grad = zeros_like(backend, model_);
  Saved saved;
  const Tensor y =
      model_.backbone.forward(backend, config, std::move(consumed), rows, nullptr, &saved);
  const Tensor dx =
      model_.backbone.backward(backend, config, saved, rows, dy, nullptr, grad.backbone);

  Arrays<double> weights{{"x", doubles(backend, x)}};
  for (const Param& param : declare(model_))
    weights[param.info.name] = doubles(backend, *param.tensor);
  const auto expected = network<double>(config, 0, pieces, weights, weights.at("x"));
  expect_close("y", doubles(backend, y), expected, 2e-5);

  const std::vector<double> dout = doubles(backend, dy);
  const auto functional = [&](const Arrays<Complex>& in) {
    const auto out = network<Complex>(config, 0, pieces, in, in.at("x"));
    Complex sum = 0;
    for (size_t i = 0; i < dout.size(); ++i) sum += dout[i] * out[i];
    return sum;
  };
  const auto in = to_complex(weights);
  expect_gradient(functional, in, "x", doubles(backend, dx), probes(t * d, 30), 1e-4);
  int tensors = 0;
  for (const Param& param : declare(grad)) {
    if (!in_backbone(param)) continue;
    const auto got = doubles(backend, *param.tensor);
    expect_gradient(functional, in, param.info.name, got,
                    probes(static_cast<int64_t>(got.size()), 6), 2e-4);
    ++tensors;
  }
  EXPECT_GT(tensors, 30);
}

// A step changes nothing before it, bit for bit, at every phase; and itself at once.
TEST_P(UNet, NoStepSeesALaterOne) {
  const int64_t total = 60;
  const Rows rows = Rows::equal(*backend_, 1, total);
  const auto run = [&](std::vector<int32_t> ids) {
    const Tensor h = hidden(*backend_, model_, ids_view(ids), rows, nullptr);
    return values_of(*backend_, lm_logits(*backend_, model_, h));
  };
  std::vector<int32_t> ids = random_ids(total, model_.config.vocab, 2);
  const std::vector<float> before = run(ids);
  const auto v = static_cast<int64_t>(before.size()) / total;
  for (int64_t at = 0; at < 40; ++at) {
    std::vector<int32_t> other = ids;
    other[at] = (other[at] + 1) % static_cast<int32_t>(model_.config.vocab);
    const std::vector<float> after = run(other);
    EXPECT_TRUE(same_bits(std::span(before).first(at * v), std::span(after).first(at * v))) << at;
    EXPECT_FALSE(
        same_bits(std::span(before).subspan(at * v, v), std::span(after).subspan(at * v, v)))
        << at;
  }
}

// Sequences that began at different times, one step of each at once, in place: coarse stages run
// for those that are due. Then pieces of all lengths, forking.
TEST_P(UNet, RowsAtDifferentPhases) {
  const int64_t d = model_.config.d, total = 70, count = 7;
  std::vector<std::vector<int32_t>> sequences;
  std::vector<std::vector<float>> expected, found(count);
  for (int64_t i = 0; i < count; ++i) {
    sequences.push_back(random_ids(total, model_.config.vocab, 40 + i));
    const Rows rows = Rows::equal(*backend_, 1, total);
    expected.push_back(
        values_of(*backend_, hidden(*backend_, model_, ids_view(sequences[i]), rows, nullptr)));
  }
  for (const bool forks : {false, true}) {
    State state(*backend_, model_.config, 2 * count);
    for (const auto& [name, view] : state.tensors())  // what a slot held before does not matter
      if (view.dtype == DType::f32) backend_->fill(view, 1e3);
    std::vector<int64_t> at(count, 0);
    Philox random(9, 9, forks);
    for (auto& values : found) values.clear();
    for (int64_t turn = 0; *std::min_element(at.begin(), at.end()) < total; ++turn) {
      std::vector<Piece> pieces;
      std::vector<int32_t> ids;
      std::vector<int64_t> who;
      for (int64_t i = 0; i < count; ++i) {
        if (turn < 2 * i || at[i] == total) continue;  // each begins two turns after the one before
        const int64_t length = forks ? std::min<int64_t>(total - at[i], 1 + random.below(9)) : 1;
        const auto even = static_cast<int32_t>(2 * i), odd = even + 1;
        const int32_t from = forks && (turn - 2 * i) % 2 ? odd : even;
        pieces.push_back({.begin = static_cast<int64_t>(ids.size()),
                          .length = length,
                          .position = at[i],
                          .from = at[i] == 0 ? -1 : from,
                          .to = forks && from == even ? odd : even,
                          .last = at[i] + length == total});
        ids.insert(ids.end(), sequences[i].begin() + at[i], sequences[i].begin() + at[i] + length);
        who.push_back(i);
        at[i] += length;
      }
      const Rows rows(*backend_, pieces);
      const std::vector<float> h =
          values_of(*backend_, hidden(*backend_, model_, ids_view(ids), rows, &state));
      for (size_t k = 0; k < who.size(); ++k) {
        const float* begin = h.data() + pieces[k].begin * d;
        found[who[k]].insert(found[who[k]].end(), begin, begin + pieces[k].length * d);
      }
    }
    for (int64_t i = 0; i < count; ++i)
      EXPECT_LE(largest_difference(found[i], expected[i]), kSameAnswer) << i << " " << forks;
  }
}

// Backward over many short chunks, some of which finish no coarse step: the gradient of the state
// is handed back through them. Two continuations of one beginning add theirs up.
TEST_P(UNet, GradientThroughShortChunksAndForks) {
  Backend& backend = *backend_;
  const Config& config = model_.config;
  const int64_t total = 41, d = config.d, fork = 27;
  std::vector<int32_t> ids = random_ids(total, config.vocab, 3);
  std::vector<int32_t> other = random_ids(total - fork, config.vocab, 4);
  const Tensor dy = random_tensor(backend, {2 * total - fork, d}, 5);  // of ids, then of `other`
  const View dy_ids = dy.view().slice(0, total), dy_other = dy.view().slice(total, total - fork);

  // Whole: the beginning twice, in two sequences; the second time its output counts for nothing.
  std::vector<int32_t> both = ids;
  both.insert(both.end(), ids.begin(), ids.begin() + fork);
  both.insert(both.end(), other.begin(), other.end());
  const Tensor dboth(backend, DType::f32, {2 * total, d});
  backend.fill(dboth, 0);
  backend.copy(dy_ids, dboth.view().slice(0, total));
  backend.copy(dy_other, dboth.view().slice(total + fork, total - fork));
  Model whole = zeros_like(backend, model_), parts = zeros_like(backend, model_);
  const Rows all = Rows::equal(backend, 2, total);
  Saved saved;
  hidden(backend, model_, ids_view(both), all, nullptr, &saved);
  const Tensor dx =
      model_.backbone.backward(backend, config, saved, all, dboth, nullptr, whole.backbone);

  // Each chunk writes a slot of its own; both ends begin in the one before the fork.
  State state(backend, config, 40), dstate(backend, config, 40);
  std::vector<std::vector<Piece>> batches;
  int32_t slot = -1, slots = 0;
  int64_t at = 0;
  for (const int64_t length : {1, 2, 1, 7, 3, 1, 1, 9, 2}) {
    batches.push_back(
        {{.length = length, .position = at, .from = slot, .to = slots, .last = false}});
    slot = slots++;
    at += length;
  }
  ASSERT_EQ(at, fork);
  int64_t other_at = fork;
  int32_t other_slot = slot;
  for (const auto& [mine, others] : {std::pair<int64_t, int64_t>{1, 5}, {6, 1}, {7, 8}}) {
    batches.push_back({{.length = mine, .position = at, .from = slot, .to = slots},
                       {.begin = mine,
                        .length = others,
                        .position = other_at,
                        .from = other_slot,
                        .to = slots + 1}});
    slot = slots++;
    other_slot = slots++;
    at += mine;
    other_at += others;
  }
  ASSERT_EQ(at, total);
  ASSERT_EQ(other_at, total);

  std::vector<std::unique_ptr<Rows>> rows;
  std::vector<std::unique_ptr<Saved>> kept;
  for (const std::vector<Piece>& batch : batches) {
    std::vector<int32_t> tokens;
    for (size_t i = 0; i < batch.size(); ++i) {
      const auto from =
          i == 0 ? ids.begin() + batch[i].position : other.begin() + (batch[i].position - fork);
      tokens.insert(tokens.end(), from, from + batch[i].length);
    }
    rows.push_back(std::make_unique<Rows>(backend, batch));
    kept.push_back(std::make_unique<Saved>());
    hidden(backend, model_, ids_view(tokens), *rows.back(), &state, kept.back().get());
  }
  std::vector<float> dbegin, dwhole = values_of(backend, dx);
  for (size_t k = batches.size(); k-- > 0;) {
    const Tensor dchunk(backend, DType::f32, {rows[k]->total(), d});
    for (size_t i = 0; i < batches[k].size(); ++i) {
      const Piece& piece = batches[k][i];
      backend.copy(i == 0 ? dy_ids.slice(piece.position, piece.length)
                          : dy_other.slice(piece.position - fork, piece.length),
                   dchunk.view().slice(piece.begin, piece.length));
    }
    const std::vector<float> found =
        values_of(backend, model_.backbone.backward(backend, config, *kept[k], *rows[k], dchunk,
                                                    &dstate, parts.backbone));
    if (batches[k].size() == 1) dbegin.insert(dbegin.begin(), found.begin(), found.end());
  }
  for (int64_t i = 0; i < fork * d; ++i) dwhole[i] += dwhole[total * d + i];  // both continuations
  EXPECT_LE(relative_difference(dbegin, std::span(dwhole).first(fork * d)), 2e-5);
  const std::vector<Param> expected = declare(whole), got = declare(parts);
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!in_backbone(expected[i])) continue;
    EXPECT_LE(relative_difference(values_of(backend, *got[i].tensor),
                                  values_of(backend, *expected[i].tensor)),
              5e-5)
        << expected[i].info.name;
  }
}

// What a slot holds is all there is: copied to another state, the sequence goes on the same.
TEST_P(UNet, AStateIsItsTensors) {
  std::vector<int32_t> ids = random_ids(50, model_.config.vocab, 6);
  const View all = ids_view(ids);
  State state(*backend_, model_.config, 1), copied(*backend_, model_.config, 2);
  const Rows begin(*backend_, {{.length = 29, .from = -1, .to = 0, .last = false}});
  hidden(*backend_, model_, all.slice(0, 29), begin, &state);
  const auto from = state.tensors(), to = copied.tensors();
  for (size_t i = 0; i < from.size(); ++i)
    backend_->copy(from[i].second.slice(0, 1), to[i].second.slice(1, 1));
  const auto rest = [&](int32_t slot, State& of) {
    const Rows rows(*backend_, {{.length = 21, .position = 29, .from = slot, .to = slot}});
    return values_of(*backend_, hidden(*backend_, model_, all.slice(29, 21), rows, &of));
  };
  EXPECT_TRUE(same_bits(rest(0, state), rest(1, copied)));
}

TEST(UNetOf, CoarseStagesRunWhenTheirTurnComes) {
  CountingBackend backend(Device{});
  Model model;
  model.config = unet_config("s4d", "4,2");
  for (const Param& param : declare(model)) allocate(backend, param);
  State state(backend, model.config, 2);
  const Tensor ids(backend, DType::i32, {1});
  std::vector<size_t> operations;
  for (int64_t position = 0; position < 8; ++position) {
    backend.costs.clear();
    const Rows rows(backend, {{.length = 1, .position = position, .from = 0, .to = 0}});
    hidden(backend, model, ids, rows, &state);
    operations.push_back(backend.costs.size());
  }
  EXPECT_EQ(operations[1], operations[0]);
  EXPECT_EQ(operations[2], operations[0]);
  EXPECT_EQ(operations[6], operations[0]);
  EXPECT_GT(operations[3], operations[0]);  // one step in four
  EXPECT_GT(operations[7], operations[3]);  // one in eight
}

TEST(UNetOf, ClassifiersReadInChunks) {
  COIL_NEEDS_TEST_DEVICE();
  const auto backend = make_test_backend();
  for (const Pooling pooling : {Pooling::last, Pooling::mean}) {
    Config config = unet_config("s4d,mamba1", "4,2");
    config.objective = Objective::classify;
    config.pooling = pooling;
    config.labels = {"a", "b", "c"};
    const Model model = random_model(*backend, config, 11);
    std::vector<int32_t> ids = random_ids(101, config.vocab, 12);
    const Rows whole = Rows::equal(*backend, 1, 101);
    const auto expected =
        values_of(*backend, class_logits(*backend, model,
                                         hidden(*backend, model, ids_view(ids), whole, nullptr),
                                         whole, nullptr));
    for (const int64_t chunk : {1, 3, 10}) {
      State state(*backend, config, 1);
      std::vector<float> found;
      for (int64_t at = 0; at < 101; at += chunk) {
        const int64_t length = std::min(chunk, 101 - at);
        const Rows rows(*backend, {{.length = length,
                                    .position = at,
                                    .from = at == 0 ? -1 : 0,
                                    .to = 0,
                                    .last = at + length == 101}});
        const Tensor h = hidden(*backend, model, ids_view(ids).slice(at, length), rows, &state);
        found = values_of(*backend, class_logits(*backend, model, h, rows, &state));
      }
      EXPECT_LE(largest_difference(found, expected), kSameAnswer) << chunk;
    }
  }
}

}  // namespace
}  // namespace coil
