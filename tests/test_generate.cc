// Drawing audio: by the model's probabilities, the same again, on from a prompt and from a state.
// Runs on any device (tests/test_device.h); on a CPU in one thread: steps so small, thousands of
// them, would only wait for a second one where other tests run beside these.
#include "pipelines/generate.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <numbers>

#include "audio/codes.h"
#include "kernels/error.h"
#include "model/safetensors.h"
#include "tests/test_device.h"

namespace coil {
namespace {

std::unique_ptr<Backend> make_own_backend() {
#ifdef COIL_TEST_CUDA
  return make_test_backend();
#else
  return make_cpu_backend(1);
#endif
}

Config audio_config(SampleCodes codes, const char* mixers = "mamba1", int64_t rate = 800) {
  Config config;
  config.audio = {.rate = rate, .codes = codes};
  config.model_type = std::string(mixers) == "mamba1" ? "mamba" : "coil";
  config.d = 64;  // what a GPU's MambaStep takes
  config.e = 128;
  config.dt_rank = 8;
  const bool unet = std::string(mixers).find('/') != std::string::npos;
  config.layers = parse_mixers(unet ? "s4d" : mixers, 2);
  if (unet) add_stages(config, "4,2", "", mixers);
  config.s4d_states = 4;
  config.vocab = audio_vocabulary(config);
  return config;
}

// Embeddings and head far from zero, so that each code has a say in what comes next.
Model lively_model(Backend& backend, Config config, uint64_t seed = 3) {
  config.tie = false;
  Model model = make_model(backend, config, seed);
  for (const auto& [tensor, scale] :
       {std::pair(&model.embedding, 30.f), {&model.lm_head, 4.f}, {&model.labels, 30.f}}) {
    if (!*tensor) continue;
    std::vector<float> values = values_of(backend, *tensor);
    for (float& value : values) value *= scale;
    backend.copy(host_view(values.data(), DType::f32, {tensor->view().rows(), config.d}), *tensor);
    backend.sync();
  }
  return model;
}

// Whatever came before, a code's logit is logits[code].
Model unigram_model(Backend& backend, Config config, const std::vector<float>& logits) {
  config.tie = false;
  Model model = make_model(backend, config, 1);
  for (Layer& layer : model.backbone.layers)
    backend.fill(std::get<Mamba1Weights>(layer.mixer).out_proj, 0);
  backend.fill(model.embedding, 1);  // so hidden is 1 throughout
  std::vector<float> head(config.vocab * config.d);
  for (size_t i = 0; i < logits.size(); ++i) head[i * config.d] = logits[i];
  backend.copy(host_view(head.data(), DType::f32, {config.vocab, config.d}), model.lm_head);
  backend.sync();
  return model;
}

struct Drawn {
  std::vector<std::vector<float>> streams;
  Generated made;
};
Drawn draw(Generator& generator, int64_t count) {
  Drawn drawn{.streams = std::vector<std::vector<float>>(count), .made = {}};
  drawn.made = generator.run({.emit = [&](int64_t stream, std::span<const float> samples) {
    drawn.streams[stream].insert(drawn.streams[stream].end(), samples.begin(), samples.end());
    return true;
  }});
  return drawn;
}
Drawn draw(Backend& backend, const Model& model, const GenerateOptions& options) {
  Generator generator(backend, model, options);
  return draw(generator, options.count);
}

// Codes of one recording, in segments of `run`.
class Codes final : public Source {
 public:
  Codes(std::span<const float> samples, SampleCodes how, int64_t run) : run_(run) {
    audio::encode(samples, how, codes_);
  }
  bool next(Segment& segment) override {
    if (at_ == static_cast<int64_t>(codes_.size())) return false;
    const int64_t end = std::min(at_ + run_, static_cast<int64_t>(codes_.size()));
    segment = {.position = at_, .codes = {codes_.begin() + at_, codes_.begin() + end}};
    at_ = end;
    return true;
  }

 private:
  std::vector<uint8_t> codes_;
  int64_t run_, at_ = 0;
};

class GenerateTest : public ::testing::TestWithParam<std::tuple<SampleCodes, const char*>> {
 protected:
  void SetUp() override {
    COIL_NEEDS_TEST_DEVICE();
    const auto [codes, mixers] = GetParam();
    backend_ = make_own_backend();
    config_ = audio_config(codes, mixers, 8000);
    model_ = lively_model(*backend_, config_);
  }
  std::unique_ptr<Backend> backend_;
  Config config_;
  Model model_;
};

// The likelihood on the way is that of reading the samples again.
TEST_P(GenerateTest, LikelihoodIsThatOfTheSamples) {
  const Drawn drawn = draw(*backend_, model_, {.count = 2, .samples = 700});
  EXPECT_EQ(drawn.made.samples, 1400);
  const FrontEnd front_end(config_);
  double nats = 0;
  for (const std::vector<float>& samples : drawn.streams) {
    ASSERT_EQ(samples.size(), 700u);
    std::vector<uint8_t> codes;
    audio::encode(samples, config_.audio.codes, codes);
    std::vector<int32_t> tokens, targets;
    front_end.append(codes, 0, -1, tokens, targets);
    const auto t = static_cast<int64_t>(tokens.size());
    const Rows rows = Rows::equal(*backend_, 1, t);
    const Tensor h =
        hidden(*backend_, model_, host_view(tokens.data(), DType::i32, {t}), rows, nullptr);
    for (const float loss : front_end.losses(*backend_, model_, h, targets)) nats += loss;
  }
  EXPECT_NEAR(drawn.made.nats / nats, 1, 1e-5);
}

TEST_P(GenerateTest, SameSeedSameSamples) {
  const GenerateOptions options{.count = 3, .samples = 900, .seed = 7};
  const Drawn drawn = draw(*backend_, model_, options);
  EXPECT_EQ(draw(*backend_, model_, options).streams, drawn.streams);
  EXPECT_NE(drawn.streams[0], drawn.streams[1]);
  GenerateOptions other = options;
  other.seed = 8;
  EXPECT_NE(draw(*backend_, model_, other).streams, drawn.streams);
  // Blocks of `resample` are half seconds, which these samples do not fill: no difference.
  other = options;
  other.guard = Guard::resample;
  const Drawn blocks = draw(*backend_, model_, other);
  ASSERT_EQ(blocks.made.runaways, 0);
  EXPECT_EQ(blocks.streams, drawn.streams);
  // Where a network's step is one op, on a CPU, rows have the same bits in any batch.
  const std::string mixers = std::get<1>(GetParam());
  if (backend_->device().kind != Device::Kind::cpu || (mixers != "mamba1" && mixers != "s4d/s4d"))
    return;
  other = options;
  other.count = 1;
  EXPECT_EQ(draw(*backend_, model_, other).streams[0], drawn.streams[0]);
}

// A place in the stream has its random number: reading the first samples as a prompt and drawing
// the rest gives what drawing all gave.
TEST_P(GenerateTest, GoesOnFromAPrompt) {
  const std::vector<float> all =
      draw(*backend_, model_, {.samples = 600, .temperature = 0.8f, .seed = 5}).streams[0];
  for (const int64_t chunk : {1, 7, 4096}) {
    Generator generator(*backend_, model_,
                        {.count = 2, .samples = 350, .temperature = 0.8f, .seed = 5});
    Codes prompt({all.data(), 250}, config_.audio.codes, 98);
    generator.read_prompt(prompt, chunk);
    const Drawn drawn = draw(generator, 2);
    EXPECT_TRUE(std::equal(all.begin() + 250, all.end(), drawn.streams[0].begin())) << chunk;
    EXPECT_NE(drawn.streams[0], drawn.streams[1]);
  }
}

TEST_P(GenerateTest, GoesOnFromAState) {
  std::string pattern = (std::filesystem::temp_directory_path() / "coil-test-XXXXXX").string();
  const std::string folder = ::mkdtemp(pattern.data()), path = folder + "/state";
  GenerateOptions options{.count = 2, .samples = 1100, .temperature = 0.9f, .top_k = 50};
  const Drawn whole = draw(*backend_, model_, options);
  for (const Guard guard : {Guard::warn, Guard::resample}) {
    options.guard = guard;
    options.samples = 450;
    Generator first(*backend_, model_, options);
    Drawn parts = draw(first, 2);
    first.save_state(path);
    options = Generator::saved_options(path);
    EXPECT_EQ(options.count, 2);
    EXPECT_EQ(options.temperature, 0.9f);
    EXPECT_EQ(options.top_k, 50);
    options.samples = 650;
    options.guard = guard;
    Generator second(*backend_, model_, options);
    second.load_state(path);
    const Drawn rest = draw(second, 2);
    for (int i = 0; i < 2; ++i)
      parts.streams[i].insert(parts.streams[i].end(), rest.streams[i].begin(),
                              rest.streams[i].end());
    ASSERT_EQ(parts.made.runaways + rest.made.runaways, 0);
    EXPECT_EQ(parts.streams, whole.streams);
  }

  const auto refusal = [&](const Model& model, int64_t count) -> std::string {
    try {
      Generator(*backend_, model, {.count = count}).load_state(path);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(refusal(model_, 2), "");
  EXPECT_EQ(refusal(model_, 3), "'" + path + "' holds 2 streams, expected 3");
  const Model other = lively_model(*backend_, config_, 4);
  EXPECT_EQ(refusal(other, 2),
            "'" + path + "' is the state of another model: config and weights differ");
  write_safetensors(path, {});
  EXPECT_EQ(refusal(model_, 2), "'" + path + "' is no state of coil generate (of this version)");
  std::filesystem::remove_all(folder);
}

INSTANTIATE_TEST_SUITE_P(
    CodesAndMixers, GenerateTest,
    ::testing::Combine(::testing::Values(SampleCodes::mulaw, SampleCodes::pcm16),
                       ::testing::Values("mamba1", "s4d,mamba1", "s4d/mamba1", "s4d/s4d")));

TEST(Generate, DrawsByTheProbabilities) {
  COIL_NEEDS_TEST_DEVICE();
  const auto backend = make_own_backend();
  std::vector<float> logits(256, -1000);
  logits[100] = std::log(0.6f);
  logits[128] = std::log(0.3f);
  logits[140] = std::log(0.1f);
  const Model model = unigram_model(*backend, audio_config(SampleCodes::mulaw), logits);
  const auto share = [&](const GenerateOptions& options, int code) {
    const Drawn drawn = draw(*backend, model, options);
    const std::vector<float>& samples = drawn.streams[0];
    return static_cast<double>(std::ranges::count(samples, audio::from_mulaw(code))) /
           static_cast<double>(samples.size());
  };
  EXPECT_NEAR(share({.samples = 4000}, 128), 0.3, 0.03);
  EXPECT_NEAR(share({.samples = 4000, .temperature = 0.5f}, 128), 0.09 / 0.46, 0.03);
  EXPECT_NEAR(share({.samples = 4000, .top_k = 2}, 128), 1 / 3., 0.03);
  EXPECT_NEAR(share({.samples = 4000, .top_p = 0.7f}, 128), 1 / 3., 0.03);
  EXPECT_EQ(share({.samples = 500, .temperature = 0}, 100), 1);
  const Drawn drawn = draw(*backend, model, {.samples = 20'000});
  const double entropy = -(0.6 * std::log(0.6) + 0.3 * std::log(0.3) + 0.1 * std::log(0.1));
  EXPECT_NEAR(drawn.made.nats / 20'000, entropy, 0.02);
}

TEST(Generate, LabelsAreHeardAtEveryStep) {
  COIL_NEEDS_TEST_DEVICE();
  const auto backend = make_own_backend();
  Config config = audio_config(SampleCodes::mulaw);
  config.condition = true;
  config.labels = {"a", "b"};
  const Model model = lively_model(*backend, config);
  const Drawn a = draw(*backend, model, {.samples = 50, .label = 0}),
              b = draw(*backend, model, {.samples = 50, .label = 1});
  EXPECT_NE(a.streams, b.streams);
  EXPECT_THROW(draw(*backend, model, {.samples = 50}), Error);
}

// Logits of every code of a recording, read at once with a label or without (front_end.no_label()).
std::vector<float> logits_along(Backend& backend, const Model& model,
                                std::span<const float> samples, int32_t label) {
  std::vector<uint8_t> codes;
  audio::encode(samples, model.config.audio.codes, codes);
  std::vector<int32_t> ids, targets;
  FrontEnd(model.config).append(codes, 0, label, ids, targets);
  const auto t = static_cast<int64_t>(ids.size());
  const Rows rows = Rows::equal(backend, 1, t);
  const Tensor h = hidden(backend, model, host_view(ids.data(), DType::i32, {t}), rows, nullptr);
  return values_of(backend, lm_logits(backend, model, h));
}

// The likeliest by unguided + g (guided - unguided), of both as they are read in one piece.
TEST(Generate, GuidanceWeighsWhatTheLabelAdds) {
  COIL_NEEDS_TEST_DEVICE();
  const auto backend = make_own_backend();
  for (const SampleCodes codes : {SampleCodes::mulaw, SampleCodes::pcm16})
    for (const char* mixers : {"mamba1", "s4d/s4d"}) {
      Config config = audio_config(codes, mixers);
      config.condition = true;
      config.labels = {"a", "b"};
      const Model model = lively_model(*backend, config);
      const float g = 2.5f;
      const GenerateOptions options{
          .count = 2, .samples = 120, .label = 1, .temperature = 0, .guidance = g};
      const Drawn drawn = draw(*backend, model, options);
      const std::vector<float>& samples = drawn.streams[1];
      EXPECT_EQ(drawn.streams[0], samples);
      const std::vector<float> with = logits_along(*backend, model, samples, 1),
                               without = logits_along(*backend, model, samples, 2);
      std::vector<uint8_t> drawn_codes;
      audio::encode(samples, codes, drawn_codes);
      const std::vector<Softmax> parts = softmaxes(config);
      int told_apart = 0;  // steps at which guidance changes what is likeliest
      for (size_t i = 0; i < drawn_codes.size(); ++i) {
        const Softmax& part = parts[i % parts.size()];
        const auto likeliest = [&](float guidance, float* margin) {
          std::vector<std::pair<float, int64_t>> order;
          for (int64_t c = 0; c < part.count; ++c) {
            const size_t at = i * config.predicted() + part.begin + c;
            order.emplace_back(without[at] + guidance * (with[at] - without[at]), c);
          }
          std::ranges::sort(order, std::greater());
          *margin = order[0].first - order[1].first;
          return order[0].second;
        };
        float margin = 0, plain = 0;
        const int64_t code = likeliest(g, &margin);
        if (margin < 1e-3) continue;
        ASSERT_EQ(drawn_codes[i], code) << i << ' ' << mixers;
        told_apart += likeliest(1, &plain) != code;
      }
      EXPECT_GT(told_apart, 5) << mixers;
      // The likelihood is of the model as it is.
      double nats = 0;
      FrontEnd front_end(config);
      std::vector<int32_t> ids, targets;
      front_end.append(drawn_codes, 0, 1, ids, targets);
      const auto t = static_cast<int64_t>(ids.size());
      const Rows rows = Rows::equal(*backend, 1, t);
      const Tensor h =
          hidden(*backend, model, host_view(ids.data(), DType::i32, {t}), rows, nullptr);
      for (const float loss : front_end.losses(*backend, model, h, targets)) nats += 2 * loss;
      EXPECT_NEAR(drawn.made.nats / nats, 1, 1e-5);
      // On from a prompt.
      GenerateOptions rest = options;
      rest.samples = 70;
      Generator generator(*backend, model, rest);
      Codes prompt({samples.data(), 50}, codes, 33);
      generator.read_prompt(prompt, 20);
      const Drawn gone_on = draw(generator, 2);
      for (const std::vector<float>& stream : gone_on.streams)
        EXPECT_TRUE(std::equal(samples.begin() + 50, samples.end(), stream.begin())) << mixers;
    }
}

// At 0 it is the model without a label.
TEST(Generate, GuidanceGoesOnFromAState) {
  COIL_NEEDS_TEST_DEVICE();
  const auto backend = make_own_backend();
  Config config = audio_config(SampleCodes::mulaw, "mamba1", 8000);
  config.condition = true;
  config.labels = {"a", "b"};
  const Model model = lively_model(*backend, config);
  const int32_t none = FrontEnd(config).no_label();
  const Drawn without = draw(*backend, model, {.samples = 60, .label = none}),
              zero = draw(*backend, model, {.samples = 60, .label = 0, .guidance = 0});
  EXPECT_EQ(without.streams, zero.streams);
  const GenerateOptions options{.count = 2, .samples = 500, .label = 0, .guidance = 1.7f};
  const Drawn whole = draw(*backend, model, options);
  std::string pattern = (std::filesystem::temp_directory_path() / "coil-test-XXXXXX").string();
  const std::string folder = ::mkdtemp(pattern.data()), path = folder + "/state";
  GenerateOptions part = options;
  part.samples = 230;
  part.guard = Guard::resample;
  Generator first(*backend, model, part);
  Drawn parts = draw(first, 2);
  first.save_state(path);
  part = Generator::saved_options(path);
  EXPECT_EQ(part.guidance, 1.7f);
  part.samples = 270;
  Generator second(*backend, model, part);
  second.load_state(path);
  const Drawn rest = draw(second, 2);
  for (int i = 0; i < 2; ++i)
    parts.streams[i].insert(parts.streams[i].end(), rest.streams[i].begin(), rest.streams[i].end());
  EXPECT_EQ(parts.streams, whole.streams);
  std::filesystem::remove_all(folder);
}

TEST(Generate, EndsWhenNobodyWantsMore) {
  COIL_NEEDS_TEST_DEVICE();
  const auto backend = make_own_backend();
  const Model model = lively_model(*backend, audio_config(SampleCodes::mulaw));
  int64_t taken = 0;
  const auto count = [&](int64_t, std::span<const float> samples) {
    taken += static_cast<int64_t>(samples.size());
    return taken < 5000;
  };
  Generator endless(*backend, model, {.guard = Guard::off});
  const Generated made = endless.run({.emit = count});
  EXPECT_TRUE(made.unwanted);
  EXPECT_EQ(made.samples, taken);
  EXPECT_LT(taken, 6000);
  Generator interrupted(*backend, model, {.guard = Guard::off});
  int asked = 0;
  interrupted.run(
      {.emit = [](auto...) { return true; }, .interrupted = [&] { return ++asked > 3; }});
  EXPECT_GE(asked, 4);
  EXPECT_LE(asked, 5);  // a GPU has drawn a block ahead
}

TEST(Guard, WhatIsARunaway) {
  const auto square = [](double decibels) { return std::pow(10, decibels / 10); };
  EXPECT_FALSE(is_runaway(0, 8));
  EXPECT_FALSE(is_runaway(square(-10.7), 5));  // the loudest half second of LJSpeech
  EXPECT_TRUE(is_runaway(square(-8.9), 1));
  EXPECT_TRUE(is_runaway(square(-19), 7));
  EXPECT_FALSE(is_runaway(square(-21), 7));
  EXPECT_FALSE(is_runaway(square(-19), 6.7));
}

// Codes that are all as likely: noise of -10.5 dB, of 8 bits.
TEST(Guard, NoiseIsToldOfEndedOrDrawnAnew) {
  COIL_NEEDS_TEST_DEVICE();
  const auto backend = make_own_backend();
  const Model model = unigram_model(*backend, audio_config(SampleCodes::mulaw), {});
  EXPECT_EQ(draw(*backend, model, {.samples = 2000, .guard = Guard::off}).made.runaways, 0);
  const Drawn warned = draw(*backend, model, {.count = 2, .samples = 2000});
  EXPECT_EQ(warned.made.runaways, 10);  // 5 half seconds
  EXPECT_EQ(warned.made.samples, 4000);
  // A part of 100 samples is passed over, one of 300 is not.
  EXPECT_EQ(draw(*backend, model, {.samples = 500}).made.runaways, 1);
  EXPECT_EQ(draw(*backend, model, {.samples = 700}).made.runaways, 2);
  const Drawn ended = draw(*backend, model, {.samples = 2000, .guard = Guard::stop});
  EXPECT_EQ(ended.made.runaways, 1);
  EXPECT_LT(ended.made.samples, 400 + 1);
  const Drawn anew = draw(*backend, model, {.samples = 2000, .guard = Guard::resample});
  EXPECT_EQ(anew.made.runaways, 5 * (1 + kGuardTries));
  EXPECT_EQ(anew.made.kept, 5);
  EXPECT_EQ(anew.made.samples, 2000);
  EXPECT_NE(anew.streams, draw(*backend, model, {.samples = 2000}).streams);
}

// Half seconds of 8 samples, each loud or quiet: some are a runaway, and drawn anew they are not;
// the others stay as they were.
TEST(Guard, OnlyWhatIsARunawayIsDrawnAnew) {
  COIL_NEEDS_TEST_DEVICE();
  const auto backend = make_own_backend();
  std::vector<float> logits(256, -1000);
  logits[200] = std::log(0.8f);  // 0.1
  logits[255] = std::log(0.2f);  // 0.98
  const Model model =
      unigram_model(*backend, audio_config(SampleCodes::mulaw, "mamba1", 16), logits);
  GenerateOptions options{.count = 3, .samples = 800};
  const Drawn raw = draw(*backend, model, options);
  options.guard = Guard::resample;
  const Drawn anew = draw(*backend, model, options);
  EXPECT_GT(anew.made.runaways, 20);
  int64_t kept = 0;
  for (size_t s = 0; s < 3; ++s)
    for (size_t i = 0; i < 800; i += 8) {
      const auto power = [&](const std::vector<float>& x) {
        double sum = 0;
        for (size_t k = i; k < i + 8; ++k) sum += x[k] * x[k];
        return sum / 8;
      };
      kept += is_runaway(power(anew.streams[s]), 1);
      if (is_runaway(power(raw.streams[s]), 1)) continue;
      EXPECT_TRUE(std::equal(raw.streams[s].begin() + i, raw.streams[s].begin() + i + 8,
                             anew.streams[s].begin() + i));
    }
  EXPECT_EQ(kept, anew.made.kept);
}

}  // namespace
}  // namespace coil
