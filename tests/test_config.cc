// config.json and labels.txt: names, defaults, refusals. Philox against its published vectors;
// initial values.
#include "model/config.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "kernels/error.h"
#include "kernels/philox.h"
#include "model/head.h"

namespace coil {
namespace {

const char* const kSmall =
    R"({"model_type": "mamba", "vocab_size": 16, "hidden_size": 40, "num_hidden_layers": 3)";

Config small_with(const std::string& more) {
  return parse_config(kSmall + more + "}", "config.json");
}

std::string refusal(const std::string& text) {
  try {
    parse_config(text, "m/config.json");
  } catch (const Error& error) {
    return error.what();
  }
  return "accepted";
}

TEST(Config, DefaultsAreThoseOfHuggingFace) {
  const Config config = small_with("");
  EXPECT_EQ(config.vocab, 16);
  EXPECT_EQ(config.d, 40);
  EXPECT_EQ(config.e, 80);  // expand 2
  EXPECT_EQ(config.n, 16);
  EXPECT_EQ(config.w, 4);
  EXPECT_EQ(config.dt_rank, 3);  // ceil(40 / 16)
  EXPECT_EQ(config.layers.size(), 3u);
  EXPECT_FLOAT_EQ(config.eps, 1e-5f);
  EXPECT_FALSE(config.bias);
  EXPECT_TRUE(config.conv_bias);
  EXPECT_TRUE(config.tie);
  EXPECT_FALSE(config.mixer_norms);
  EXPECT_EQ(config.objective, Objective::lm);
}

TEST(Config, WrittenValuesWin) {
  const Config config = small_with(
      R"(, "intermediate_size": 70, "expand": 16, "state_size": 11, "conv_kernel": 3, "time_step_rank": 5,
         "use_bias": true, "use_conv_bias": false, "tie_word_embeddings": false, "layer_norm_epsilon": 1e-6,
         "residual_in_fp32": false, "transformers_version": "5.23.0", "dtype": "float32")");
  EXPECT_EQ(config.e, 70);
  EXPECT_EQ(config.n, 11);
  EXPECT_EQ(config.w, 3);
  EXPECT_EQ(config.dt_rank, 5);
  EXPECT_TRUE(config.bias);
  EXPECT_FALSE(config.conv_bias);
  EXPECT_FALSE(config.tie);
  EXPECT_FLOAT_EQ(config.eps, 1e-6f);
  EXPECT_EQ(small_with(R"(, "expand": 1.5)").e, 60);
  EXPECT_EQ(small_with(R"(, "time_step_rank": "auto")").dt_rank, 3);
  const Config falcon = parse_config(
      R"({"model_type": "falcon_mamba", "vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1,
          "mixer_rms_eps": 1e-3})",
      "x");
  EXPECT_TRUE(falcon.mixer_norms);
  EXPECT_FLOAT_EQ(falcon.mixer_eps, 1e-3f);
}

TEST(Config, RefusalsNameFileKeyExpectedAndFound) {
  auto with = [](const std::string& more) { return refusal(kSmall + more + "}"); };
  EXPECT_EQ(with(R"(, "hidden_act": "gelu")"),
            "m/config.json: hidden_act: expected \"silu\" or \"swish\", found \"gelu\"");
  EXPECT_EQ(refusal(R"({"model_type": "mamba2"})"),
            "m/config.json: model_type: expected \"mamba\" or \"falcon_mamba\" or \"coil\", found "
            "\"mamba2\"");
  EXPECT_EQ(refusal("{}"), "m/config.json: model_type is missing");
  EXPECT_EQ(refusal(R"({"model_type": "mamba", "hidden_size": 8, "num_hidden_layers": 1})"),
            "m/config.json: vocab_size is missing");
  EXPECT_EQ(
      with(R"(, "state_size": "16")"),
      "m/config.json: state_size: expected a whole number from 1 to 2147483647, found \"16\"");
  EXPECT_EQ(refusal("[1]"), "m/config.json: expected a JSON object, found an array");
  EXPECT_EQ(refusal("{\"a\": }"), "m/config.json: expected JSON, found something else at byte 7");
  EXPECT_EQ(
      with(R"(, "coil": {"objective": "classify", "heads": 2})"),
      "m/config.json: coil.\"heads\": expected one of objective, pooling, alphabet, audio, "
      "condition, condition_dropout, unknown, mixers, s4d, topology, unet, mlp, mask_share, "
      "target_column, kmer, bidirectional, strands, unknown_excerpt; the model needs a newer Coil");
  EXPECT_EQ(with(R"(, "coil": {"alphabet": "ABCA"})"),
            "m/config.json: coil.alphabet: letter 'A' stands twice");
  EXPECT_EQ(with(R"(, "coil": {"alphabet": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrs"})"),
            "m/config.json: vocab_size: expected at least 45 for its letters, found 16");
  EXPECT_EQ(with(R"(, "coil": {"alphabet": 4})"),
            "m/config.json: coil.alphabet: expected \"dna\" or letters, found 4");
  EXPECT_EQ(with(R"(, "coil": {"objective": "mlm", "mask_share": 2})"),
            "m/config.json: coil.mask_share: expected a number from 0 to 1, found 2");
  EXPECT_EQ(with(R"(, "coil": {"unknown": [{"length": 100, "probability": 1.5}]})"),
            "m/config.json: coil.unknown[0].probability: expected a number from 0 to 1, found 1.5");
}

TEST(Config, Audio) {
  const std::string audio = std::string(kSmall) + R"(, "vocab_size": 272, "coil": {"audio": )";
  const Config config = parse_config(audio + R"({"rate": 8000, "codes": "mulaw"}}})", "x");
  EXPECT_EQ(config.audio.rate, 8000);
  EXPECT_EQ(config.predicted(), 256);
  const Config again = parse_config(to_json(config), "x");
  EXPECT_EQ(again.audio.rate, 8000);
  EXPECT_EQ(again.audio.codes, SampleCodes::mulaw);
  EXPECT_EQ(refusal(audio + R"({"rate": 8000, "codes": "pcm16"}}})"),
            "m/config.json: vocab_size: expected at least 513 for its codes, found 272");
  EXPECT_EQ(refusal(audio + R"({"rate": 8000, "codes": "alaw"}}})"),
            "m/config.json: coil.audio.codes: expected \"mulaw\" or \"pcm16\", found \"alaw\"");
  EXPECT_EQ(refusal(audio + R"({"rate": 0, "codes": "mulaw"}}})"),
            "m/config.json: coil.audio.rate: expected a whole number from 1 to 16777216, found 0");
  EXPECT_EQ(refusal(audio + R"({"rate": 8000, "codes": "mulaw"}, "alphabet": "dna"}})"),
            "m/config.json: coil: alphabet and audio: expected one of them");
  EXPECT_EQ(refusal(std::string(kSmall) + R"(, "coil": {"condition": true}})"),
            "m/config.json: coil.condition: expected false: only a language model of audio is "
            "given labels, found true");
}

TEST(Config, StagesOfAUNet) {
  const std::string own =
      R"({"model_type": "coil", "vocab_size": 16, "hidden_size": 40, "num_hidden_layers": 5, "coil": {)";
  const std::string mixers = R"("mixers": ["s4d", "mamba1", "s4d", "s4d", "mamba1"], )";
  const std::string unet = R"("topology": "unet", "unet": )";
  const std::string sizes = R"("pool": [4, 2], "widths": [40, 80, 60], "layers": [2, 2, 1])";
  const Config config = parse_config(own + mixers + unet + "{" + sizes + R"(}, "mlp": 3}})", "x");
  EXPECT_EQ(mixer_names(config), "s4d,mamba1/s4d,s4d/mamba1");
  EXPECT_EQ(all_layers(config), 5);
  EXPECT_EQ(config.mlp, 3);
  ASSERT_EQ(config.inner.size(), 2u);
  EXPECT_EQ(config.inner[0].pool, 4);
  EXPECT_EQ(config.inner[1].d, 60);
  const Config inside = inner_config(config), innermost = inner_config(inside);
  EXPECT_EQ(inside.e, 160);
  EXPECT_EQ(inside.dt_rank, 6);  // 3 of 40
  EXPECT_EQ(innermost.d, 60);
  EXPECT_EQ(innermost.e, 120);
  EXPECT_TRUE(innermost.inner.empty());
  EXPECT_EQ(to_json(parse_config(to_json(config), "x")), to_json(config));

  const auto with = [&](const std::string& more) { return refusal(own + mixers + more + "}}"); };
  EXPECT_EQ(with(R"("topology": "tree")"),
            "m/config.json: coil.topology: expected \"stack\" or \"unet\", found \"tree\"");
  EXPECT_EQ(with(R"("topology": "unet")"), "m/config.json: coil.unet is missing");
  EXPECT_EQ(with(R"("unet": {})"),
            "m/config.json: coil.unet: expected none with topology \"stack\", found an object");
  EXPECT_EQ(with(unet + "[4]"), "m/config.json: coil.unet: expected an object, found an array");
  EXPECT_EQ(with(unet + R"({"pools": 4})"),
            "m/config.json: coil.unet.\"pools\": expected pool, widths or layers; the model needs "
            "a newer Coil");
  EXPECT_EQ(with(unet + "{}"), "m/config.json: coil.unet.pool is missing");
  EXPECT_EQ(
      with(unet + R"({"pool": [4, 1]})"),
      "m/config.json: coil.unet.pool: expected a list of 1 to 8 whole numbers from 2 to 65536, "
      "found 1");
  EXPECT_EQ(with(unet + R"({"pool": [4, 2], "widths": [40, 80]})"),
            "m/config.json: coil.unet.widths: expected a list of 3 whole numbers from 1 to 32768, "
            "found an array");
  EXPECT_EQ(with(unet + R"({"pool": [4], "widths": [32, 80], "layers": [2, 3]})"),
            "m/config.json: coil.unet.widths: expected hidden_size, 40, as the first, found 32");
  EXPECT_EQ(with(unet + R"({"pool": [4], "widths": [40, 80], "layers": [2, 2]})"),
            "m/config.json: coil.unet.layers: expected num_hidden_layers, 5, in all, found 4");
  EXPECT_EQ(with(R"("mlp": -1)"),
            "m/config.json: coil.mlp: expected a whole number from 0 to 64, found -1");
  EXPECT_EQ(refusal(kSmall + std::string(R"(, "coil": {"topology": "unet"}})")),
            "m/config.json: coil.topology: expected none with model_type mamba, found \"unet\"");
}

TEST(Config, StagesByTheirPool) {
  Config config;
  config.d = 64;
  config.layers.resize(3);
  add_stages(config, "4,16", "", "s4d/s4d/mamba1");
  EXPECT_EQ(mixer_names(config), "s4d,s4d,s4d/s4d,s4d,s4d/mamba1,mamba1,mamba1");
  EXPECT_EQ(config.inner[1].pool, 16);
  EXPECT_EQ(config.inner[1].d, 256);
  add_stages(config, "4", "96", "s4d");
  EXPECT_EQ(mixer_names(config), "s4d,s4d,s4d/s4d,s4d,s4d");
  EXPECT_EQ(config.inner[0].d, 96);
  const auto refused = [&](const char* pool, const char* widths, const char* mixers) {
    try {
      add_stages(config, pool, widths, mixers);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refused("4,x", "", "s4d"),
            "pool '4,x': expected whole numbers from 2 to 65536, found 'x'");
  EXPECT_EQ(refused("1", "", "s4d"), "pool '1': expected whole numbers from 2 to 65536, found '1'");
  EXPECT_EQ(refused("", "", "s4d"),
            "pool '': expected 1 to 8 whole numbers from 2 to 65536, found 0");
  EXPECT_EQ(refused("4,4", "128", "s4d"),
            "widths '128': expected 2, one for each number of pool, found 1");
  EXPECT_EQ(refused("4", "", "s4d/s4d/s4d"),
            "mixers 's4d/s4d/s4d': expected names for up to 2 stages, found 3");
}

TEST(Config, MixersOfLayers) {
  const std::string own =
      R"({"model_type": "coil", "vocab_size": 16, "hidden_size": 40, "num_hidden_layers": 3)";
  const Config config = parse_config(
      own +
          R"(, "coil": {"mixers": ["s4d", "mamba1", "s4d"], "s4d": {"states": 5, "init": "legs"}}})",
      "x");
  EXPECT_EQ(mixer_names(config.layers), "s4d,mamba1,s4d");
  EXPECT_EQ(config.s4d_states, 5);
  EXPECT_EQ(config.s4d_init, S4dInit::legs);
  const Config back = parse_config(to_json(config), "x");
  EXPECT_EQ(to_json(back), to_json(config));
  EXPECT_EQ(mixer_names(parse_mixers("s4d,mamba1", 5)), "s4d,mamba1,s4d,mamba1,s4d");

  EXPECT_EQ(refusal(own + "}"), "m/config.json: coil is missing");
  EXPECT_EQ(refusal(own + R"(, "coil": {}})"), "m/config.json: coil.mixers is missing");
  EXPECT_EQ(refusal(own + R"(, "coil": {"mixers": ["s4d"]}})"),
            "m/config.json: coil.mixers: expected a list of 3 names, found an array");
  EXPECT_EQ(refusal(own + R"(, "coil": {"mixers": ["s4d", "s5", 3]}})"),
            "m/config.json: coil.mixers: expected \"mamba1\" or \"s4d\", found \"s5\"");
  EXPECT_EQ(refusal(kSmall + std::string(R"(, "coil": {"mixers": ["s4d", "s4d", "s4d"]}})")),
            "m/config.json: coil.mixers: expected none with model_type mamba, found an array");
  EXPECT_EQ(refusal(kSmall + std::string(R"(, "coil": {"s4d": {"state": 3}}})")),
            "m/config.json: coil.s4d.\"state\": expected states or init; the model needs a newer "
            "Coil");
  EXPECT_THROW(parse_mixers("s4d,,mamba1", 2), Error);
  EXPECT_THROW(parse_mixers("", 2), Error);
  EXPECT_THROW(parse_s4d_init("random"), Error);
}

// HiPPO-LegS's normal matrix: its skew part has these eigenvalues, so the sums of their squares and
// fourth powers are those of its trace.
TEST(Config, FrequenciesOfS4d) {
  constexpr int64_t kPairs = 6, kBoth = 2 * kPairs;
  const auto frequencies = [&](S4dInit init) {
    Config config;
    config.s4d_init = init;
    const std::vector<float> all =
        initial_values({.name = "a", .shape = {3, kPairs}, .init = Init::s4d_A_imag}, config, 1);
    EXPECT_EQ(all[1], all[kPairs + 1]);
    return std::vector<double>(all.begin(), all.begin() + kPairs);
  };
  EXPECT_NEAR(frequencies(S4dInit::lin)[5], 5 * M_PI, 1e-5);
  EXPECT_NEAR(frequencies(S4dInit::inv)[0], 12 / M_PI * 11, 1e-5);
  EXPECT_NEAR(frequencies(S4dInit::inv)[5], 12 / M_PI * (12. / 11 - 1), 1e-5);
  double square[kBoth][kBoth] = {}, skew[kBoth][kBoth], squares = 0, fourths = 0;
  for (int64_t j = 0; j < kBoth; ++j)
    for (int64_t k = 0; k < kBoth; ++k)
      skew[j][k] = std::sqrt((2. * j + 1) * (2. * k + 1)) / 2 * (j < k ? 1 : j > k ? -1 : 0);
  for (int64_t j = 0; j < kBoth; ++j)
    for (int64_t k = 0; k < kBoth; ++k)
      for (int64_t l = 0; l < kBoth; ++l) square[j][k] += skew[j][l] * skew[l][k];
  for (int64_t j = 0; j < kBoth; ++j) {
    squares -= square[j][j];
    for (int64_t k = 0; k < kBoth; ++k) fourths += square[j][k] * square[k][j];
  }
  for (const double w : frequencies(S4dInit::legs))
    squares -= 2 * w * w, fourths -= 2 * w * w * w * w;
  EXPECT_NEAR(squares, 0, 1e-3);
  EXPECT_NEAR(fourths, 0, 2);
}

TEST(Config, ValuesThatCannotBeAreRefused) {
  const char* const wrong[] = {
      R"("state_size": 0)", R"("state_size": -3)", R"("state_size": 2147483648)",
      R"("state_size": 18446744073709551615)", R"("state_size": 16.5)", R"("state_size": true)",
      R"("state_size": 1e999)", R"("conv_kernel": 1)", R"("num_hidden_layers": 70000)",
      R"("expand": 0)", R"("expand": -1)", R"("expand": 1e-9)", R"("expand": [2])",
      R"("intermediate_size": {})", R"("time_step_rank": "many")", R"("time_step_rank": 0)",
      R"("use_bias": 1)", R"("use_conv_bias": "yes")", R"("layer_norm_epsilon": 0)",
      R"("layer_norm_epsilon": "x")", R"("time_step_min": 0.5)", R"("hidden_act": ["silu"])",
      R"("quantization_config": {"bits": 4})", R"("coil": 3)",
      R"("coil": {"objective": "generate"})", R"("coil": {"pooling": 7})",
      R"("coil": {"unknown": {}})", R"("coil": {"unknown": [3]})",
      R"("coil": {"unknown": [{"length": 5}]})",
      R"("coil": {"unknown": [{"length": 5, "probability": 0.1, "by_class": 0.1}]})",
      R"("coil": {"unknown": [{"length": 5, "probability": 0.1, "by_class": [0.1, 2]}]})",
      R"("coil": {"unknown": [{"length": 5, "probability": 0, "centres": [[1]]}]})",
      R"("coil": {"unknown_excerpt": -1})", R"("coil": {"unknown_excerpt": 65537})",
      R"("coil": {"unknown_excerpt": "1k"})",
      R"("coil": {"unknown_excerpt": 1000, "alphabet": "xy"})",
      R"("coil": {"unknown": [{"length": 5, "probability": 0.1}, {"length": 5, "probability": 0.1}]})",
      // Fine one by one, but the product passes 2^63 and would wrap.
      R"("hidden_size": 2147483647, "intermediate_size": 2147483647, "state_size": 2147483647, "vocab_size": 2147483647,
         "num_hidden_layers": 65536)"};
  EXPECT_NE(refusal(kSmall + std::string("}")).find("accepted"), std::string::npos);
  for (const char* text : wrong) {
    const std::string message = refusal(std::string(kSmall) + ", " + text + "}");
    EXPECT_EQ(message.rfind("m/config.json: ", 0), 0u) << text << " gave: " << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  }
  // Nesting that would overflow a recursive reader or printer.
  EXPECT_EQ(refusal(std::string(100000, '[') + std::string(100000, ']')),
            "m/config.json: expected a JSON object, found an array");
}

class ModelFolder : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = (std::filesystem::temp_directory_path() / fmt::format("coil_config_{}", ::getpid()))
                  .string();
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  void write(const std::string& name, const std::string& text) {
    std::ofstream(folder_ + "/" + name, std::ios::binary) << text;
  }
  std::string folder_;
};

TEST_F(ModelFolder, RoundTrip) {
  Config config = small_with(R"(, "time_step_rank": 7, "use_bias": true, "time_step_floor": 3e-4)");
  config.model_type = "falcon_mamba";
  config.mixer_norms = true;
  config.mixer_eps = 2e-6f;
  config.objective = Objective::classify;
  config.pooling = Pooling::last;
  config.labels = {"E. coli", "S. aureus", "other"};
  config.alphabet = "dna";
  config.unknown = {{0, 0.9}, {1000, 0.75, {0.25, 0.5, 0.75}}};
  config.unknown_excerpt = 500;
  write_config(config, folder_);
  const Config back = read_config(folder_);
  EXPECT_EQ(to_json(back), to_json(config));
  EXPECT_EQ(back.labels, config.labels);
  EXPECT_EQ(back.pooling, Pooling::last);
  EXPECT_EQ(back.dt_rank, 7);
  EXPECT_EQ(back.eps, config.eps);
  EXPECT_EQ(back.dt_floor, config.dt_floor);
  ASSERT_EQ(back.unknown.size(), 2u);
  EXPECT_EQ(back.unknown_excerpt, 500);
  EXPECT_EQ(back.unknown[1].length, 1000);
  EXPECT_EQ(back.unknown[1].probability, 0.75);
  EXPECT_TRUE(back.unknown[0].by_class.empty());
  EXPECT_EQ(back.unknown[1].by_class, (std::vector<double>{0.25, 0.5, 0.75}));
  EXPECT_NE(to_json(config).find("\"layer_norm_epsilon\": 1e-05"), std::string::npos)
      << to_json(config);
  config.unknown[1].by_class.pop_back();  // a number for each label, or none
  write_config(config, folder_);
  EXPECT_THROW(read_config(folder_), Error);
}

TEST_F(ModelFolder, MaskedLanguageModelRoundTrip) {
  Config config = small_with("");
  config.objective = Objective::mlm;
  config.alphabet = "XYZ+";
  config.mask_share = 0.3;
  write_config(config, folder_);
  Config back = read_config(folder_);
  EXPECT_EQ(to_json(back), to_json(config));
  EXPECT_EQ(back.objective, Objective::mlm);
  EXPECT_EQ(back.alphabet, "XYZ+");
  EXPECT_TRUE(back.letters());
  EXPECT_EQ(back.mask_share, 0.3);
  config.alphabet = "dna";
  config.target_column = "answer";
  write_config(config, folder_);
  back = read_config(folder_);
  EXPECT_EQ(to_json(back), to_json(config));
  EXPECT_EQ(back.target_column, "answer");
  EXPECT_FALSE(back.letters());
}

TEST_F(ModelFolder, BothEndsStrandsAndKmersRoundTrip) {
  Config config = small_with("");
  config.model_type = "coil";
  config.bidirectional = config.equivariant = true;
  config.objective = Objective::classify;
  config.labels = {"a", "b"};
  config.alphabet = "dna";
  config.kmer = 3;
  config.vocab = 16 + 64;
  config.tie = false;
  write_config(config, folder_);
  const Config back = read_config(folder_);
  EXPECT_EQ(to_json(back), to_json(config));
  EXPECT_TRUE(back.bidirectional && back.equivariant);
  EXPECT_EQ(back.kmer, 3);
  EXPECT_EQ(back.predicted(), 16);

  const auto refused = [&](auto change) {
    Config other = config;
    change(other);
    write_config(other, folder_);
    try {
      read_config(folder_);
    } catch (const Error& error) {
      const std::string text = error.what();
      return text.substr(text.find(": ") + 2);
    }
    return std::string("nothing");
  };
  EXPECT_EQ(refused([](Config& c) { c.objective = Objective::lm; }),
            "bidirectional: a causal language model would see what it predicts; expected objective "
            "mlm or classify");
  EXPECT_EQ(refused([](Config& c) { c.objective = Objective::mlm; }),
            "strands equivariant: expected objective classify, found mlm");
  EXPECT_EQ(refused([](Config& c) { c.layers[0].mixer = MixerKind::s4d; }).substr(0, 47),
            "bidirectional: expected a stack of mamba1, foun");
  EXPECT_EQ(refused([](Config& c) { c.vocab = 16; }),
            "kmer 3: expected alphabet dna and vocab_size 80, found 'dna' and 16");
  EXPECT_EQ(refused([](Config& c) { c.tie = true; }),
            "kmer: expected tie_word_embeddings false: k-mers are read, not put out");
}

TEST(Alphabet, Faults) {
  EXPECT_EQ(alphabet_fault("ABab01+-"), "");
  EXPECT_EQ(alphabet_fault("A"), "expected two letters or more, found 'A'");
  EXPECT_EQ(alphabet_fault("ABB"), "letter 'B' stands twice");
  EXPECT_EQ(alphabet_fault("A.B"), "'.' is no letter that a table can hold");
  EXPECT_EQ(alphabet_fault("A,B"), "',' is no letter that a table can hold");
  EXPECT_EQ(alphabet_fault("AB\t"), "letter 3 is the byte 0x09, expected a printable ASCII letter");
}

TEST_F(ModelFolder, LabelsAreCheckedByLine) {
  Config config = small_with("");
  config.objective = Objective::classify;
  config.labels = {"a"};
  write_config(config, folder_);
  const std::map<std::string, std::string> wrong = {
      {"", "expected a class name per line, found none"},
      {"a\n\nb\n", "line 2: expected a class name, found an empty line"},
      {"a\nb\na\n", "line 3: the class a stands twice"},
      {"a\tb\n", "line 1: expected a class name, found the control character 9"}};
  for (const auto& [text, message] : wrong) {
    write("labels.txt", text);
    try {
      read_config(folder_);
      ADD_FAILURE() << "accepted: " << text;
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()), folder_ + "/labels.txt: " + message);
    }
  }
  write("labels.txt", "a\r\nb\r\n");
  EXPECT_EQ(read_config(folder_).labels, (std::vector<std::string>{"a", "b"}));
  std::filesystem::remove(folder_ + "/labels.txt");
  EXPECT_THROW(read_config(folder_), Error);
}

// Known answers of the Random123 distribution (kat_vectors: philox4x32 10).
TEST(Philox, PublishedVectors) {
  struct Vector {
    uint32_t counter[4], key[2], expected[4];
  };
  const Vector vectors[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};
  for (const Vector& vector : vectors) {
    uint32_t out[4];
    philox4x32(vector.counter, vector.key, out);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(out[i], vector.expected[i]);
  }
  Philox random(0, 0, 0);
  for (uint32_t expected : vectors[0].expected) EXPECT_EQ(random.next(), expected);
}

TEST(Philox, StreamsDifferAndDistributionsHold) {
  std::set<uint32_t> first;
  for (uint64_t step : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32})
    for (uint32_t stream : {0u, 1u})
      for (uint64_t seed : {uint64_t{5}, uint64_t{5} << 32})
        first.insert(Philox(seed, stream, step).next());
  EXPECT_EQ(first.size(), 12u);

  Philox random(7, 0, 0);
  constexpr int kCount = 100000;
  double sum = 0, squares = 0, uniform = 0;
  std::vector<int> counts(6);
  for (int i = 0; i < kCount; ++i) {
    const double x = random.normal(), u = random.uniform();
    EXPECT_TRUE(u >= 0 && u < 1);
    sum += x;
    squares += x * x;
    uniform += u;
    ++counts[random.below(6)];
  }
  EXPECT_NEAR(sum / kCount, 0, 0.02);
  EXPECT_NEAR(squares / kCount, 1, 0.03);
  EXPECT_NEAR(uniform / kCount, 0.5, 0.005);
  for (int count : counts) EXPECT_NEAR(count, kCount / 6.0, 600);
  EXPECT_EQ(random.below(1), 0u);
}

TEST(Params, InitialValues) {
  Config config = small_with("");
  auto values = [&](Init init, std::vector<int64_t> shape) {
    return initial_values({.name = "t", .shape = std::move(shape), .init = init}, config, 3);
  };
  auto largest = [](const std::vector<float>& x) {
    float most = 0;
    for (float value : x) most = std::max(most, std::fabs(value));
    return most;
  };
  const std::vector<float> A_log = values(Init::A_log, {80, 16});
  for (size_t i = 0; i < A_log.size(); ++i)
    EXPECT_FLOAT_EQ(A_log[i], std::log(static_cast<float>(i % 16 + 1)));
  for (float value : values(Init::ones, {80})) EXPECT_EQ(value, 1.0f);
  for (float value : values(Init::zeros, {80})) EXPECT_EQ(value, 0.0f);
  for (float value : values(Init::dt_bias, {4000})) {
    const double dt = std::log1p(std::exp(static_cast<double>(value)));
    EXPECT_TRUE(dt > 0.99e-3 && dt < 0.101) << dt;
  }
  // Near the bound, never past it.
  EXPECT_NEAR(largest(values(Init::linear, {500, 40})), 1 / std::sqrt(40.0), 1e-3);
  EXPECT_LE(largest(values(Init::linear, {500, 40})), 1 / std::sqrt(40.0f));
  EXPECT_NEAR(largest(values(Init::linear, {2000, 1, 4})), 0.5, 1e-2);
  EXPECT_NEAR(largest(values(Init::residual_out, {500, 40})), 1 / std::sqrt(3 * 40.0), 1e-3);
  EXPECT_NEAR(largest(values(Init::dt_weight, {800, 3})), 1 / std::sqrt(3.0), 1e-2);
  double squares = 0;
  for (float value : values(Init::embedding, {500, 40}))
    squares += static_cast<double>(value) * value;
  EXPECT_NEAR(std::sqrt(squares / 20000), 0.02, 5e-4);
}

TEST(Params, NamesShapesAndDecay) {
  Config config = small_with(R"(, "use_bias": true, "tie_word_embeddings": false)");
  Model model;
  model.config = config;
  std::map<std::string, ParamInfo> rows;
  for (const Param& param : declare(model)) rows[param.info.name] = param.info;
  EXPECT_EQ(rows.size(), 1u + 3 * 12 + 1 + 1);
  const std::string mixer = "backbone.layers.2.mixer.";
  EXPECT_EQ(rows.at(mixer + "conv1d.weight").shape, (std::vector<int64_t>{80, 1, 4}));
  EXPECT_EQ(rows.at(mixer + "x_proj.weight").shape, (std::vector<int64_t>{35, 80}));
  EXPECT_EQ(rows.at(mixer + "dt_proj.weight").shape, (std::vector<int64_t>{80, 3}));
  EXPECT_EQ(rows.at("lm_head.weight").shape, (std::vector<int64_t>{16, 40}));
  std::set<std::string> decays, matrices;
  for (const auto& [name, info] : rows) {
    if (info.decay) decays.insert(name);
    if (info.matrix) matrices.insert(name);
  }
  EXPECT_EQ(decays.size(), 3u * 4 + 2);
  EXPECT_EQ(matrices, decays);
  for (const char* name : {"A_log", "conv1d.weight", "dt_proj.bias", "D"})
    EXPECT_FALSE(decays.contains(mixer + name));

  // The species model: d 128 x 4. Per layer d + 3*d*e + e*(w + 1) + (r + 2n)*e + e*(r + 1) + e*n +
  // e.
  config = parse_config(
      R"({"model_type": "mamba", "vocab_size": 16, "hidden_size": 128, "num_hidden_layers": 4})",
      "x");
  const int64_t layer = 128 + 3 * 128 * 256 + 256 * 5 + 40 * 256 + 256 * 9 + 256 * 16 + 256;
  EXPECT_EQ(parameters(config), 16 * 128 + 4 * layer + 128);
  config.objective = Objective::classify;
  config.labels = {"a", "b", "c"};
  EXPECT_EQ(parameters(config), 16 * 128 + 4 * layer + 128 + 3 * 129);
}

TEST(Config, LanguageIsWhatTellsTokens) {
  EXPECT_TRUE((Config{.objective = Objective::lm}).language());
  EXPECT_TRUE((Config{.objective = Objective::mlm}).language());
  EXPECT_FALSE((Config{.objective = Objective::classify}).language());
}

}  // namespace
}  // namespace coil
