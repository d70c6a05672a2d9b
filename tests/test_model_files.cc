// Model folders: what is saved is loaded bit by bit, names of other writers are read, wrong tensors
// refused by name.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <limits>

#include "kernels/error.h"
#include "model/safetensors.h"
#include "tests/model_testing.h"

namespace coil {
namespace {

class Files : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::temp_directory_path() /
              fmt::format("coil_{}_{}", test->name(), ::getpid());
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  // Writes the model's tensors after `change` had its way with them.
  template <class Change>
  void write_changed(Model& model, const std::string& name, Change change) {
    save_model(*backend_, model, path(name));
    std::vector<NamedView> tensors;
    for (const Param& param : declare(model))
      tensors.push_back({param.info.name, param.tensor->view()});
    change(tensors);
    write_safetensors(path(name) + "/model.safetensors", tensors);
  }
  std::string refusal(const std::string& name) {
    try {
      load_model(*backend_, path(name));
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  }

  std::unique_ptr<Backend> backend_ = make_cpu_backend();
  std::filesystem::path folder_;
};

NamedView& find(std::vector<NamedView>& tensors, const std::string& name) {
  return *std::find_if(tensors.begin(), tensors.end(),
                       [&](const NamedView& tensor) { return tensor.name == name; });
}

TEST_F(Files, SaveAndLoadKeepEveryBit) {
  Model lm = random_model(*backend_, small_config(true), 31);
  Model classifier = random_model(*backend_, classifier_config(Pooling::last), 32);
  Model unet = random_model(*backend_, unet_config("s4d/mamba1,s4d/mamba1"), 36);
  save_model(*backend_, unet, path("unet"));
  save_model(*backend_, lm, path("lm"));
  save_model(*backend_, lm, path("sharded"), 8000);
  save_model(*backend_, classifier, path("classifier"));
  EXPECT_FALSE(std::filesystem::exists(path("sharded") + "/model.safetensors"));
  auto expect_same = [&](Model& model, Model loaded) {
    EXPECT_EQ(to_json(model.config), to_json(loaded.config));
    EXPECT_EQ(model.config.labels, loaded.config.labels);
    const std::vector<Param> a = declare(model), b = declare(loaded);
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i)
      EXPECT_TRUE(same_bits(a[i].tensor->span<float>(), b[i].tensor->span<float>()))
          << a[i].info.name;
  };
  expect_same(lm, load_model(*backend_, path("lm")));
  expect_same(lm, load_model(*backend_, path("sharded")));
  expect_same(classifier, load_model(*backend_, path("classifier")));
  expect_same(unet, load_model(*backend_, path("unet")));
}

TEST_F(Files, NamesOfOtherWritersAreRead) {
  Model model = random_model(*backend_, small_config(false), 33);
  write_changed(model, "old", [](std::vector<NamedView>& tensors) {
    const View embedding = find(tensors, "backbone.embeddings.weight").view;
    find(tensors, "backbone.embeddings.weight").name = "backbone.embedding.weight";
    tensors.push_back({"lm_head.weight", embedding});  // tied, written all the same
  });
  const Model loaded = load_model(*backend_, path("old"));
  EXPECT_TRUE(same_bits(loaded.embedding.span<float>(), model.embedding.span<float>()));
}

TEST_F(Files, WrongTensorsAreRefusedByName) {
  Model model = random_model(*backend_, small_config(false), 34);
  std::vector<float> other = values_of(*backend_, model.embedding);
  other[5] += 1;
  write_changed(model, "tied", [&](std::vector<NamedView>& tensors) {
    tensors.push_back({"lm_head.weight", host_view(other.data(), DType::f32, {11, 24})});
  });
  EXPECT_NE(refusal("tied").find("lm_head.weight"), std::string::npos) << refusal("tied");
  write_changed(model, "missing",
                [](std::vector<NamedView>& tensors) { tensors.erase(tensors.begin() + 3); });
  EXPECT_NE(refusal("missing").find("backbone.layers.0.mixer.D is missing"), std::string::npos)
      << refusal("missing");
  write_changed(model, "extra", [&](std::vector<NamedView>& tensors) {
    tensors.push_back({"backbone.layers.2.norm.weight", model.backbone.norm_f.view()});
  });
  EXPECT_NE(refusal("extra").find("backbone.layers.2.norm.weight"), std::string::npos)
      << refusal("extra");
  write_changed(model, "shape", [&](std::vector<NamedView>& tensors) {
    find(tensors, "backbone.norm_f.weight").view = host_view(other.data(), DType::f32, {23});
  });
  EXPECT_NE(refusal("shape").find("backbone.norm_f.weight: expected shape (24), found (23)"),
            std::string::npos)
      << refusal("shape");
  model.backbone.norm_f.as<float>()[7] = std::numeric_limits<float>::quiet_NaN();
  write_changed(model, "nan", [](std::vector<NamedView>&) {});
  EXPECT_NE(
      refusal("nan").find("backbone.norm_f.weight: element 7: expected a finite number, found nan"),
      std::string::npos)
      << refusal("nan");
}

TEST_F(Files, Bf16MatricesAreNearF32) {
  for (bool falcon : {false, true}) {
    const Model model = random_model(*backend_, small_config(falcon), 35);
    save_model(*backend_, model, path("model"));
    Model half = load_model(*backend_, path("model"), DType::bf16);
    for (const Param& param : declare(half))
      EXPECT_EQ(param.tensor->view().dtype, param.info.matrix ? DType::bf16 : DType::f32)
          << param.info.name;
    std::vector<int32_t> ids = random_ids(300, model.config.vocab, 6);
    const Rows rows = Rows::equal(*backend_, 1, 300);
    auto logits = [&](const Model& m) {
      return values_of(*backend_,
                       lm_logits(*backend_, m, hidden(*backend_, m, ids_view(ids), rows, nullptr)));
    };
    const double error = relative_difference(logits(half), logits(model));
    EXPECT_LE(error, 0.02);
    EXPECT_GT(error, 1e-5);  // it is bf16
    // What was kept in bf16 is saved and loaded as it is.
    save_model(*backend_, half, path("half"));
    const Model again = load_model(*backend_, path("half"), DType::bf16);
    EXPECT_TRUE(same_bits(logits(half), logits(again)));
  }
}

TEST_F(Files, LoadMatchingTakesTheBackboneAndStartsTheHeadAnew) {
  Model lm = random_model(*backend_, small_config(false), 36);
  save_model(*backend_, lm, path("lm"));
  Model classifier = make_model(*backend_, classifier_config(Pooling::mean), 37);
  const std::vector<float> score = values_of(*backend_, classifier.score);
  const std::vector<std::string> taken = load_matching(*backend_, classifier, path("lm"));
  EXPECT_EQ(taken.size(), declare(lm).size());
  EXPECT_TRUE(same_bits(classifier.embedding.span<float>(), lm.embedding.span<float>()));
  EXPECT_TRUE(
      same_bits(std::get<Mamba1Weights>(classifier.backbone.layers[1].mixer).out_proj.span<float>(),
                std::get<Mamba1Weights>(lm.backbone.layers[1].mixer).out_proj.span<float>()));
  EXPECT_TRUE(same_bits(classifier.score.span<float>(), score));

  // The same classes: the head comes along. Others of the same number: it does not.
  save_model(*backend_, classifier, path("classifier"));
  Model same = make_model(*backend_, classifier.config, 38);
  EXPECT_EQ(load_matching(*backend_, same, path("classifier")).size(), taken.size() + 2);
  Config config = classifier.config;
  config.labels = {"x", "y", "z"};
  Model others = make_model(*backend_, config, 39);
  EXPECT_EQ(load_matching(*backend_, others, path("classifier")).size(), taken.size());

  Model falcon = make_model(*backend_, small_config(true), 40);
  EXPECT_THROW(load_matching(*backend_, falcon, path("lm")), Error);
}

}  // namespace
}  // namespace coil
