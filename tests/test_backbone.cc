// What must hold of the backbone whatever the numbers are: chunked = one-shot = step by step, alone
// = among others, causality, gradients through a carried state, the same bits twice. falcon_mamba's
// norms, networks of several mixers, MLPs and U-Nets included.
#include "model/backbone.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/error.h"
#include "model/loss.h"
#include "tests/model_testing.h"

namespace coil {
namespace {

std::vector<float> hidden_of(Backend& backend, const Model& model, std::vector<int32_t> ids) {
  const Rows rows = Rows::equal(backend, 1, static_cast<int64_t>(ids.size()));
  return values_of(backend, hidden(backend, model, ids_view(ids), rows, nullptr));
}

std::vector<float> hidden_in_chunks(Backend& backend, const Model& model,
                                    const std::vector<int32_t>& ids, int64_t chunk) {
  const int64_t total = static_cast<int64_t>(ids.size());
  State state(backend, model.config, 2);  // slots 0 and 1 in turn: read one, write the other
  std::vector<float> all;
  int32_t slot = 0;
  for (int64_t begin = 0; begin < total; begin += chunk, slot ^= 1) {
    const int64_t length = std::min(chunk, total - begin);
    std::vector<int32_t> part(ids.begin() + begin, ids.begin() + begin + length);
    const Rows rows(backend, {{.length = length,
                               .position = begin,
                               .from = begin == 0 ? -1 : slot ^ 1,
                               .to = slot,
                               .last = begin + length == total}});
    const std::vector<float> h =
        values_of(backend, hidden(backend, model, ids_view(part), rows, &state));
    all.insert(all.end(), h.begin(), h.end());
  }
  return all;
}

Config config_of(const std::string& name) {
  if (name == "s4d") return mixed_config("s4d", 2);
  if (name == "mixed") return mixed_config("s4d,mamba1", 3);
  if (name == "mlp") {
    Config config = mixed_config("mamba1", 2);
    config.mlp = 2;
    return config;
  }
  if (name == "unet") return unet_config("s4d/s4d,mamba1/mamba1");
  if (name == "unet16") return unet_config("s4d,mamba1", "16");
  return small_config(name == "falcon_mamba");
}

class AnyModel : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    COIL_NEEDS_TEST_DEVICE();
    backend_ = make_test_backend();
    model_ = random_model(*backend_, config_of(GetParam()), 17);
  }
  std::unique_ptr<Backend> backend_;
  Model model_;
};
INSTANTIATE_TEST_SUITE_P(Backbone, AnyModel,
                         ::testing::Values("mamba", "falcon_mamba", "s4d", "mixed", "mlp", "unet",
                                           "unet16"),
                         [](const auto& info) { return std::string(info.param); });

TEST_P(AnyModel, ChunkedIsOneShotIsStepByStep) {
  const std::vector<int32_t> ids = random_ids(1503, model_.config.vocab, 1);
  const std::vector<float> whole = hidden_of(*backend_, model_, ids);
  for (int64_t chunk : {1, 3, 7, 16, 64, 1000})
    EXPECT_LE(largest_difference(hidden_in_chunks(*backend_, model_, ids, chunk), whole),
              kSameAnswer)
        << "chunks of " << chunk;
}

// Sequences of many lengths in one batch, each in a slot of its own and in two pieces.
TEST_P(AnyModel, AloneIsAmongOthers) {
  const int64_t d = model_.config.d;
  const std::vector<int64_t> lengths = {1, 2, 3, 63, 64, 65, 300, 5, 17, 128};
  std::vector<std::vector<int32_t>> sequences;
  for (size_t i = 0; i < lengths.size(); ++i)
    sequences.push_back(random_ids(lengths[i] + 40, model_.config.vocab, 100 + i));
  State state(*backend_, model_.config, static_cast<int32_t>(lengths.size()));
  std::vector<std::vector<float>> together(lengths.size());
  for (int round = 0; round < 2; ++round) {  // first lengths[i] steps, then the last 40
    std::vector<Piece> pieces;
    std::vector<int32_t> ids;
    for (size_t i = 0; i < lengths.size(); ++i) {
      const int64_t from = round ? lengths[i] : 0, length = round ? 40 : lengths[i];
      pieces.push_back({.begin = static_cast<int64_t>(ids.size()),
                        .length = length,
                        .position = from,
                        .from = round ? static_cast<int32_t>(i) : -1,
                        .to = static_cast<int32_t>(i),
                        .last = round == 1});
      ids.insert(ids.end(), sequences[i].begin() + from, sequences[i].begin() + from + length);
    }
    const Rows rows(*backend_, pieces);
    const std::vector<float> h =
        values_of(*backend_, hidden(*backend_, model_, ids_view(ids), rows, &state));
    for (size_t i = 0; i < lengths.size(); ++i) {
      const float* begin = h.data() + pieces[i].begin * d;
      together[i].insert(together[i].end(), begin, begin + pieces[i].length * d);
    }
  }
  for (size_t i = 0; i < lengths.size(); ++i)
    EXPECT_LE(largest_difference(together[i], hidden_of(*backend_, model_, sequences[i])), 1e-5)
        << "sequence of " << sequences[i].size();
}

TEST_P(AnyModel, EarlierStepsDoNotSeeLaterOnes) {
  std::vector<int32_t> ids = random_ids(700, model_.config.vocab, 2);
  const std::vector<float> before = hidden_of(*backend_, model_, ids);
  ids[500] = (ids[500] + 1) % static_cast<int32_t>(model_.config.vocab);
  const std::vector<float> after = hidden_of(*backend_, model_, ids);
  const size_t split = static_cast<size_t>(500 * model_.config.d);
  EXPECT_LE(largest_difference(std::span(before).first(split), std::span(after).first(split)),
            1e-6);
  EXPECT_GT(largest_difference(std::span(before).subspan(split), std::span(after).subspan(split)),
            1e-2);
}

// Backward over two chunks, in reverse, the gradient of the state carried between them, is backward
// of the whole.
TEST_P(AnyModel, GradientThroughACarriedState) {
  Backend& backend = *backend_;
  const Config& config = model_.config;
  const int64_t total = 150, cut = 67, d = config.d;
  std::vector<int32_t> ids = random_ids(total, config.vocab, 3);
  const Tensor dy = random_tensor(backend, {total, d}, 4);

  Model whole = zeros_like(backend, model_);
  Saved saved;
  const Rows all = Rows::equal(backend, 1, total);
  hidden(backend, model_, ids_view(ids), all, nullptr, &saved);
  const Tensor dx =
      model_.backbone.backward(backend, config, saved, all, dy, nullptr, whole.backbone);

  Model parts = zeros_like(backend, model_);
  State state(backend, config, 2);
  Saved first, second;
  const Rows rows_first(backend, {{.length = cut, .from = -1, .to = 1, .last = false}});
  const Rows rows_second(backend, {{.length = total - cut, .position = cut, .from = 1, .to = 0}});
  const View ids_all = ids_view(ids);
  hidden(backend, model_, ids_all.slice(0, cut), rows_first, &state, &first);
  hidden(backend, model_, ids_all.slice(cut, total - cut), rows_second, &state, &second);
  State dstate(backend, config, 2);  // zero: nothing depends on the final state
  const Tensor dx_second =
      model_.backbone.backward(backend, config, second, rows_second,
                               dy.view().slice(cut, total - cut), &dstate, parts.backbone);
  const Tensor dx_first = model_.backbone.backward(
      backend, config, first, rows_first, dy.view().slice(0, cut), &dstate, parts.backbone);

  EXPECT_LE(relative_difference(values_of(backend, dx_first),
                                values_of(backend, dx.view().slice(0, cut))),
            1e-5);
  EXPECT_LE(relative_difference(values_of(backend, dx_second),
                                values_of(backend, dx.view().slice(cut, total - cut))),
            1e-5);
  const std::vector<Param> expected = declare(whole), found = declare(parts);
  for (size_t i = 0; i < expected.size(); ++i) {
    if (expected[i].info.name.find(".layers.") == std::string::npos &&
        expected[i].info.name.find(".stages.") == std::string::npos)
      continue;
    EXPECT_LE(relative_difference(values_of(backend, *found[i].tensor),
                                  values_of(backend, *expected[i].tensor)),
              2e-5)
        << expected[i].info.name;
  }
}

TEST_P(AnyModel, BackwardNeedsTheStateThatForwardRead) {
  State state(*backend_, model_.config, 1);
  Saved saved;
  std::vector<int32_t> ids = {1, 2, 3};
  const Rows rows(*backend_, {{.length = 3, .position = 5, .from = 0, .to = 0}});
  EXPECT_THROW(hidden(*backend_, model_, ids_view(ids), rows, &state, &saved), Error);
}

TEST_P(AnyModel, SameBitsTwice) {
  std::vector<int32_t> ids = random_ids(400, model_.config.vocab, 5);
  std::vector<int32_t> targets(ids.begin() + 1, ids.end());
  targets.push_back(-1);
  Model first = zeros_like(*backend_, model_), second = zeros_like(*backend_, model_);
  const Rows rows = Rows::equal(*backend_, 4, 100);
  for (Model* grad : {&first, &second})
    batch_loss(*backend_, model_, ids_view(ids), rows, ids_view(targets), View{}, grad);
  const std::vector<Param> a = declare(first), b = declare(second);
  for (size_t i = 0; i < a.size(); ++i)
    EXPECT_TRUE(same_bits(values_of(*backend_, *a[i].tensor), values_of(*backend_, *b[i].tensor)))
        << a[i].info.name;
  EXPECT_TRUE(same_bits(hidden_of(*backend_, model_, ids), hidden_of(*backend_, model_, ids)));
}

}  // namespace
}  // namespace coil
