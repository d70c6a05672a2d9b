// Running out of memory, by a limit on the backend and, on a GPU, by filling the card: what the
// error says, that batches are made to fit, and that answers stay what they were.
#include <gtest/gtest.h>

#include <unistd.h>

#include <bit>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "kernels/error.h"
#include "model/checkpoint.h"
#include "model/loss.h"
#include "model/memory_plan.h"
#include "model/optimizer.h"
#include "pipelines/classify.h"
#include "pipelines/evaluate.h"
#include "pipelines/fit.h"
#include "pipelines/score.h"
#include "pipelines/train.h"
#include "tests/model_testing.h"
#include "tests/records.h"

namespace coil {
namespace {

class MemoryFit : public testing::Test {
 protected:
  void SetUp() override { COIL_NEEDS_TEST_DEVICE(); }
};

bool small_shapes() { return std::getenv("COIL_SMALL_SHAPES") != nullptr; }  // compute-sanitizer

// One worker: others on a CPU would have backends of their own, without the limit.
std::unique_ptr<Backend> make_limited(int64_t limit) {
#ifdef COIL_TEST_CUDA
  return make_cuda_backend(0, limit);
#else
  return make_cpu_backend(1, limit);
#endif
}

TEST_F(MemoryFit, TheErrorSaysWhatWasAskedWhatIsFreeAndWhatIsHeld) {
  const auto backend = make_limited(100 << 20);
  const int64_t before = backend->memory().in_use;
  const Tensor held(*backend, DType::u8, {32 << 20});
  EXPECT_EQ(backend->memory().in_use, before + (32 << 20));
  try {
    const Tensor more(*backend, DType::u8, {200'000'000});
    FAIL() << "200 MB were allocated where 100 MiB are the limit";
  } catch (const OutOfMemory& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find(": out of memory: 191 MiB (200000000 bytes) asked for, "), message.npos)
        << message;
    EXPECT_NE(message.find(" MiB free of 100 MiB, "), message.npos) << message;
    EXPECT_TRUE(message.ends_with(" MiB held by coil")) << message;
    EXPECT_FALSE(error.hint().empty());
  }
  const Tensor fits(*backend, DType::u8, {16 << 20});
  EXPECT_EQ(backend->memory().in_use, before + (48 << 20));
}

TEST_F(MemoryFit, KeptBlocksGoBackBeforeAnAllocationFails) {
  const auto backend = make_limited(140 << 20);
  for (const int64_t size : {40, 60, 90, 100}) {
    const Tensor x(*backend, DType::u8, {size << 20});
    backend->fill(x, 1);
  }
  const Memory after = backend->memory();
  EXPECT_LE(after.in_use + after.kept, 140 << 20);
  EXPECT_GE(after.peak, 100 << 20);
  backend->release_kept();
  EXPECT_EQ(backend->memory().kept, 0);
  backend->restart_peak();
  EXPECT_EQ(backend->memory().peak, backend->memory().in_use);
}

// The plan beside what the backend counts; both are printed.
void expect_as_planned(Backend& backend, const Config& config, const MemoryRequest& request) {
  const int64_t rows = request.sequences * request.length;
  const int64_t planned = plan_memory(config, request).total();
  std::vector<int32_t> ids = random_ids(rows, config.vocab, 1);
  backend.release_kept();
  int64_t peak = 0;
  if (request.train) {
    const Model model = make_model(backend, config, 1);
    Model grad = zeros_like(backend, model);
    const Optimizer optimizer(backend, model, {});
    std::optional<Model> rounded;
    if (backend.activations(request.matrices) != DType::f32)
      rounded = converted(backend, model, request.matrices);
    std::vector<int32_t> targets = ids;
    targets.resize(config.objective == Objective::lm ? rows : request.sequences, 0);
    for (int32_t& target : targets) target %= 2;
    const Rows pieces = Rows::equal(backend, request.sequences, request.length);
    backend.restart_peak();
    batch_loss(backend, rounded ? *rounded : model, ids_view(ids), pieces, ids_view(targets), {},
               &grad, nullptr, 1, {.chunk = request.chunk});
    peak = backend.memory().peak;
  } else {
    const Model model = converted(backend, make_model(backend, config, 1), request.matrices);
    State state(backend, config, static_cast<int32_t>(request.sequences));
    std::vector<Piece> pieces;
    for (int32_t i = 0; i < request.sequences; ++i)
      pieces.push_back({.begin = i * request.length, .length = request.length, .from = i, .to = i});
    const Rows batch(backend, std::move(pieces));
    backend.restart_peak();
    const Tensor h = hidden(backend, model, ids_view(ids), batch, &state);
    const Tensor logits = config.objective == Objective::lm
                              ? lm_logits(backend, model, h)
                              : class_logits(backend, model, h, batch, &state);
    peak = backend.memory().peak;
  }
  const double ratio = static_cast<double>(planned) / static_cast<double>(peak);
  fmt::print(
      "[ memory   ] {} d {} x {} vocabulary {}, {} x {} {}, chunk {}: planned {}, peak {}, "
      "{:.3f}\n",
      request.train ? "training" : "inference", config.d, config.layers.size(), config.vocab,
      request.sequences, request.length, name_of(request.matrices), request.chunk,
      binary_size(planned), binary_size(peak), ratio);
  EXPECT_GT(ratio, 0.87);
  EXPECT_LT(ratio, 1.15);
}

Config network(int64_t d, int64_t layers, int64_t vocab) {
  Config config;
  config.d = d;
  config.e = 2 * d;
  config.dt_rank = (d + 15) / 16;
  config.vocab = vocab;
  config.layers.resize(layers);
  return config;
}

TEST_F(MemoryFit, ThePlanIsWhatIsAllocated) {
  const auto backend = make_test_backend();
  const bool gpu = backend->device().kind != Device::Kind::cpu && !small_shapes();
  const int64_t scale = gpu ? 16 : 1;
  Config classifier = network(gpu ? 256 : 64, gpu ? 8 : 2, 16);
  classifier.objective = Objective::classify;
  classifier.labels = {"a", "b", "c"};
  const Config small = network(gpu ? 256 : 64, gpu ? 8 : 2, 16);
  const Config wide = network(gpu ? 768 : 96, 2, gpu ? 50'280 : 3000);
  Config unet = network(gpu ? 128 : 32, 2, 272);
  unet.model_type = "coil";
  unet.tie = false;
  unet.mlp = 2;
  add_stages(unet, "4,4", "", "s4d/mamba1/s4d");
  for (const DType matrices : {DType::f32, DType::bf16}) {
    for (const Config* config :
         std::initializer_list<const Config*>{&classifier, &small, &wide, &unet}) {
      const int64_t rows = (config == &wide ? 1024 : 8192) * scale;
      for (const int64_t sequences : {1, 8}) {
        MemoryRequest request{.length = rows / sequences,
                              .sequences = sequences,
                              .matrices = matrices,
                              .device = backend->device()};
        expect_as_planned(*backend, *config, request);
        request.train = true;
        request.length /= 2;
        if (backend->activations(matrices) != matrices) continue;
        expect_as_planned(*backend, *config, request);
        request.chunk = 300 * scale;
        if (sequences == 1) expect_as_planned(*backend, *config, request);
      }
    }
  }
}

// A backend with a model on it and room for batches of about `share` of what auto would take.
struct Tight {
  std::unique_ptr<Backend> backend;
  Model model;
  Tight(const Config& config, double share) {
    const auto probe = make_limited(kNoLimit);
    const Model there = random_model(*probe, config, 5);
    const int64_t rows = auto_batch(config, probe->device());
    const MemoryPlan plan =
        plan_memory(config, {.length = static_cast<int64_t>(static_cast<double>(rows) * share),
                             .device = probe->device()});
    const int64_t wanted = 8 * plan.state + plan.activations;
    const int64_t least = wanted - plannable(wanted, probe->device());
    const int64_t room = wanted + std::max(least, wanted / 14) + (1 << 20);
    backend = make_limited(probe->memory().in_use + room);
    model = random_model(*backend, config, 5);
    backend->release_kept();
  }
};

std::vector<Codes> records_of(const Config& config, Device device) {
  const int64_t rows = auto_batch(config, device);
  std::vector<Codes> records{random_codes(5 * rows / 2, 1)};
  for (int i = 0; i < 40; ++i) records.push_back(random_codes(1 + i * rows / 90, 2 + i));
  records.push_back(random_codes(3 * rows / 2 + 7, 50));
  return records;
}

std::vector<double> classified(Backend& backend, const Model& model,
                               const std::vector<Codes>& records, const StreamOptions& options,
                               const std::function<void(const Stream&)>& progress = {}) {
  Records source(records, 20'000);
  std::vector<double> all;
  std::vector<std::string> names;
  classify(
      backend, model, source, {.stream = options},
      [&](const Answer& answer) {
        names.push_back(answer.name);
        all.insert(all.end(), answer.probabilities.begin(), answer.probabilities.end());
      },
      progress);
  EXPECT_EQ(names.size(), records.size());
  for (size_t i = 0; i < names.size(); ++i) EXPECT_EQ(names[i], fmt::format("r{}", i));
  return all;
}

// N of "OPTION N would fit".
int64_t hinted(const std::string& hint, const std::string& option) {
  const size_t end = hint.find(" would fit");
  if (!hint.starts_with(option + " ") || end == hint.npos || end + 10 != hint.size()) {
    ADD_FAILURE() << hint;
    return 1;
  }
  return std::stoll(hint.substr(option.size() + 1, end - option.size() - 1));
}

void expect_same(const std::vector<double>& found, const std::vector<double>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  for (size_t i = 0; i < found.size(); ++i)
    ASSERT_NEAR(found[i], expected[i], kSameAnswer * std::max(1.0, std::fabs(expected[i]))) << i;
}

// All that is free but what a batch of `share` of auto's rows needs: as another program would.
std::vector<Tensor> steal(Backend& owner, Backend& from, const Config& config, double share) {
  const int64_t rows = auto_batch(config, from.device());
  const MemoryPlan plan = plan_memory(
      config,
      {.length = static_cast<int64_t>(static_cast<double>(rows) * share), .device = from.device()});
  from.release_kept();
  const int64_t slack = from.device().kind == Device::Kind::cpu ? 256 << 10 : 4 << 20;
  std::vector<Tensor> taken;
  for (int i = 0; i < 6; ++i) {  // each a size class, at least half of what is left
    const int64_t most = from.memory().free - plan.activations - slack;
    if (most < 1 << 16) break;
    const auto step = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(most))) / 8;
    taken.emplace_back(owner, DType::u8, std::initializer_list<int64_t>{most / step * step});
  }
  return taken;
}

class MemoryFitOf : public MemoryFit, public testing::WithParamInterface<Pooling> {};
INSTANTIATE_TEST_SUITE_P(Poolings, MemoryFitOf, testing::Values(Pooling::mean, Pooling::last),
                         [](const auto& info) {
                           return info.param == Pooling::mean ? "mean" : "last";
                         });

TEST_P(MemoryFitOf, ABatchOfAutoFitsIntoWhatIsFree) {
  const Config config = classifier_config(GetParam());
  const auto free = make_limited(kNoLimit);
  const std::vector<Codes> records = records_of(config, free->device());
  const std::vector<double> expected =
      classified(*free, random_model(*free, config, 5), records, {});
  for (const double share : {0.5, 0.1}) {
    Tight tight(config, share);
    std::vector<std::string> notes;
    const Note note = [&](const std::string& text) { notes.push_back(text); };
    const StreamOptions options{.note = &note};
    expect_same(classified(*tight.backend, tight.model, records, options), expected);
    ASSERT_GE(notes.size(), 1u);
    EXPECT_NE(notes[0].find("rows at a time instead of"), notes[0].npos) << notes[0];
  }
}

TEST_P(MemoryFitOf, MemoryThatIsTakenHalfWayChangesNoAnswer) {
  const Config config = classifier_config(GetParam());
  const auto free = make_limited(kNoLimit);
  const std::vector<Codes> records = records_of(config, free->device());
  const std::vector<double> expected =
      classified(*free, random_model(*free, config, 5), records, {});
  Tight tight(config, 1.2);
  std::vector<std::string> notes;
  std::vector<Tensor> taken;
  int turns = 0;
  const auto progress = [&](const Stream&) {
    if (++turns == 2) taken = steal(*tight.backend, *tight.backend, config, 0.2);
  };
  const Note note = [&](const std::string& text) { notes.push_back(text); };
  const StreamOptions options{.note = &note};
  expect_same(classified(*tight.backend, tight.model, records, options, progress), expected);
  ASSERT_GE(notes.size(), 1u);
  EXPECT_NE(notes[0].find("out of device memory: "), notes[0].npos) << notes[0];
}

TEST_F(MemoryFit, ScoresAreTheSameToo) {
  const Config config = small_config(false);
  const auto free = make_limited(kNoLimit);
  const std::vector<Codes> records = records_of(config, free->device());
  const auto scored = [&](Backend& backend, const Model& model, const ScoreOptions& options,
                          const std::function<void(const Stream&)>& progress) {
    Records source(records, 20'000);
    std::vector<double> all;
    score(
        backend, model, source, options,
        [&](const Score& score) {
          all.push_back(score.counted);
          all.push_back(score.bits_per_base());
          if (score.counted == 0) all.back() = 0;
        },
        [&](const std::string& text) { all.push_back(static_cast<double>(text.size()) * 0); },
        progress);
    return all;
  };
  const std::vector<double> expected = scored(*free, random_model(*free, config, 5), {}, {});
  Tight tight(config, 1.2);
  int notes = 0, turns = 0;
  std::vector<Tensor> taken;
  const Note note = [&](const std::string&) { ++notes; };
  const StreamOptions stream{.strands = Strands::forward, .note = &note};
  expect_same(scored(*tight.backend, tight.model, {.stream = stream},
                     [&](const Stream&) {
                       if (++turns == 1) taken = steal(*tight.backend, *tight.backend, config, 0.2);
                     }),
              expected);
  EXPECT_GE(notes, 1);
}

// The same of recordings: 16 bits, a token before the first code, two softmaxes.
TEST_F(MemoryFit, RecordingsAreScoredAndEvaluatedTheSame) {
  Config config = small_config(false);
  config.audio = {.rate = 100, .codes = SampleCodes::pcm16};
  config.vocab = audio_vocabulary(config);
  const auto free = make_limited(kNoLimit);
  Examples all;
  all.codes = records_of(config, free->device());
  for (size_t i = 0; i < all.codes.size(); ++i) {
    all.codes[i].resize((all.codes[i].size() + 1) / 2 * 2);
    for (size_t j = 0; j < all.codes[i].size(); ++j)
      all.codes[i][j] = static_cast<uint8_t>(all.codes[i][j] * 50 + j % 7);
    all.items.push_back(
        {.record = static_cast<int64_t>(i), .length = static_cast<int64_t>(all.codes[i].size())});
  }
  const auto scored = [&](Backend& backend, const Model& model, const ScoreOptions& options,
                          const std::function<void(const Stream&)>& progress) {
    Records source(all.codes, 20'000);
    std::vector<double> found;
    score(
        backend, model, source, options,
        [&](const Score& score) {
          found.push_back(score.counted);
          found.push_back(score.bits_per_base());
        },
        {}, progress);
    return found;
  };
  const ScoreOptions plain{.stream = {.strands = Strands::forward}};
  const Model there = random_model(*free, config, 5);
  const std::vector<double> expected = scored(*free, there, plain, {});
  ASSERT_EQ(expected.size(), 2 * all.codes.size());
  const Evaluation evaluated = evaluate(*free, there, all, all.items, {});
  {
    Tight tight(config, 1.2);
    int notes = 0, turns = 0;
    std::vector<Tensor> taken;
    const Note note = [&](const std::string&) { ++notes; };
    expect_same(scored(*tight.backend, tight.model,
                       {.stream = {.strands = Strands::forward, .note = &note}},
                       [&](const Stream&) {
                         if (++turns == 1)
                           taken = steal(*tight.backend, *tight.backend, config, 0.2);
                       }),
                expected);
    EXPECT_GE(notes, 1);
  }
  Tight tight(config, 0.5);
  int notes = 0;
  std::vector<Tensor> taken;
  const Note note = [&](const std::string&) {
    if (++notes == 1) taken = steal(*tight.backend, *tight.backend, config, 0.2);
  };
  const Evaluation found = evaluate(*tight.backend, tight.model, all, all.items, {.note = &note});
  EXPECT_GE(notes, 2);
  EXPECT_EQ(found.metrics.count, evaluated.metrics.count);
  expect_same({found.metrics.loss}, {evaluated.metrics.loss});
}

TEST_F(MemoryFit, AnEvaluationGoesOnInSmallerBatches) {
  const Config config = classifier_config(Pooling::mean);
  const auto free = make_limited(kNoLimit);
  Examples all;
  all.codes = records_of(config, free->device());
  all.labels = config.labels;
  for (size_t i = 0; i < all.codes.size(); ++i)
    all.items.push_back({.record = static_cast<int64_t>(i),
                         .length = static_cast<int64_t>(all.codes[i].size()),
                         .label = static_cast<int32_t>(i % 3)});
  const Evaluation expected = evaluate(*free, random_model(*free, config, 5), all, all.items, {});
  Tight tight(config, 0.5);
  int notes = 0;
  std::vector<Tensor> taken;  // when the first size of batches has been settled
  const Note note = [&](const std::string&) {
    if (++notes == 1) taken = steal(*tight.backend, *tight.backend, config, 0.2);
  };
  const Evaluation found = evaluate(*tight.backend, tight.model, all, all.items, {.note = &note});
  EXPECT_GE(notes, 2);
  expect_same(found.probabilities, expected.probabilities);
}

TEST_F(MemoryFit, ASizeThatWasAskedForIsAnErrorAndTheHintFits) {
  const Config config = classifier_config(Pooling::mean);
  Tight tight(config, 0.3);
  const std::vector<Codes> records = records_of(config, tight.backend->device());
  const int64_t asked = 8 * auto_batch(config, tight.backend->device());
  EXPECT_THROW(classified(*tight.backend, tight.model, records, {.batch = asked}), OutOfMemory);
  const std::string hint = fitting_hint(*tight.backend, config, DType::f32, "--batch", asked);
  classified(*tight.backend, tight.model, records, {.batch = hinted(hint, "--batch")});
}

TEST_F(MemoryFit, TrainingThatDoesNotFitSaysWhichBatchWould) {
  const int64_t tokens = training_rows(make_limited(kNoLimit)->device());
  const std::string folder = testing::TempDir() + "memory_fit_" + std::to_string(getpid());
  std::filesystem::create_directories(folder);
  std::string text = ">r\n";
  for (const uint8_t code : random_codes(2 * tokens, 3, 0)) text += "-ACGT"[code];
  std::ofstream(folder + "/x.fa") << text << '\n';
  TrainOptions options{.data = {folder + "/x.fa"}, .out = folder + "/m"};
  options.objective = Objective::lm;
  options.max_length = 512;
  options.d = 32;
  options.layers = 2;
  options.steps = 2;
  options.batch_tokens = tokens;
  Config config = network(options.d, options.layers, 16);
  const Device device = make_limited(kNoLimit)->device();
  const int64_t third =
      plan_memory(config, {.length = tokens / 3, .train = true, .device = device}).total();
  const int64_t limit = third + std::max(third - plannable(third, device), third / 14);
  std::string hint;
  try {
    train(*make_limited(limit), options);
    FAIL() << "fits into " << binary_size(limit);
  } catch (const OutOfMemory& error) {
    hint = error.hint();
  }
  options.batch_tokens = hinted(hint, "--batch-tokens");
  EXPECT_EQ(options.batch_tokens, tokens / 4);
  std::filesystem::remove_all(options.out);
  EXPECT_EQ(train(*make_limited(limit), options), 0);
  std::filesystem::remove_all(folder);
}

// What does not fit whole is trained on in chunks that do; the run keeps them when it is resumed.
TEST_F(MemoryFit, TrainingInChunksOfAutoFits) {
  const int64_t tokens = training_rows(make_limited(kNoLimit)->device()) * 2;
  const std::string folder = testing::TempDir() + "memory_auto_" + std::to_string(getpid());
  std::filesystem::create_directories(folder);
  std::string text = ">r\n";
  for (const uint8_t code : random_codes(2 * tokens, 3, 0)) text += "-ACGT"[code];
  std::ofstream(folder + "/x.fa") << text << '\n';
  TrainOptions options{.data = {folder + "/x.fa"}, .validation_fraction = 0, .out = folder + "/m"};
  options.objective = Objective::lm;
  options.max_length = options.batch_tokens = tokens;
  options.d = 32;
  options.layers = 2;
  options.steps = 2;
  options.chunk = TrainOptions::kAutoChunk;
  const Config config = network(options.d, options.layers, 16);
  const Device device = make_limited(kNoLimit)->device();
  const int64_t part =
      plan_memory(config, {.length = tokens, .chunk = tokens / 8, .train = true, .device = device})
          .total();
  const int64_t limit = part + std::max(part - plannable(part, device), part / 14) + (1 << 20);
  std::string lines;
  const TrainHooks hooks{.line = [&](const std::string& line) { lines += line + "\n"; }};
  EXPECT_EQ(train(*make_limited(limit), options, hooks), 0);
  EXPECT_NE(lines.find("does not fit whole: chunks of "), lines.npos) << lines;
  const auto recorded = [&] {
    return parse_train_options(peek_checkpoint(options.out).options).chunk;
  };
  const int64_t chunk = recorded();
  EXPECT_LE(chunk, tokens / 4);
  EXPECT_GE(chunk, tokens / 16);
  options.resume = true;  // with all memory there is: nothing is chosen anew
  EXPECT_EQ(train(*make_limited(kNoLimit), options), 0);
  EXPECT_EQ(recorded(), chunk);

  options.resume = false;
  options.out = folder + "/whole";
  EXPECT_EQ(train(*make_limited(kNoLimit), options), 0);
  EXPECT_EQ(recorded(), 0);

  options.chunk = 0;  // what is asked for is an error, and the hint fits
  options.out = folder + "/hint";
  std::string hint;
  try {
    train(*make_limited(limit), options);
    FAIL() << "fits into " << binary_size(limit);
  } catch (const OutOfMemory& error) {
    hint = error.hint();
  }
  options.chunk = hinted(hint, "--chunk");
  std::filesystem::remove_all(options.out);
  EXPECT_EQ(train(*make_limited(limit), options), 0);
  std::filesystem::remove_all(folder);
}

#ifdef COIL_TEST_CUDA
// Nothing but the card itself sets a limit here; `other` stands for another program.
TEST_F(MemoryFit, AFullCardIsClassifiedOn) {
  if (small_shapes()) GTEST_SKIP() << "small shapes are asked for";
  Config config = network(256, 8, 16);
  config.objective = Objective::classify;
  config.labels = {"a", "b", "c"};
  const auto gpu = make_cuda_backend(), other = make_cuda_backend();
  const Model model = make_model(*gpu, config, 5);
  const int64_t rows = auto_batch(config, gpu->device());
  const std::vector<Codes> records{random_codes(5 * rows / 2, 1), random_codes(1000, 2)};
  const std::vector<double> expected = classified(*gpu, model, records, {});
  gpu->release_kept();

  std::vector<Tensor> fill;
  const auto fill_up_to = [&](int64_t left) {
    for (int64_t size = int64_t{4} << 30; size >= 1 << 20; size /= 2)
      while (other->memory().free - size >= left)
        fill.emplace_back(*other, DType::u8, std::initializer_list<int64_t>{size});
  };
  const auto need = [&](int64_t of) {
    return plan_memory(config, {.length = of, .device = gpu->device()}).activations;
  };
  std::vector<std::string> notes;
  const Note note = [&](const std::string& text) {
    notes.push_back(text);
    fmt::print("[ memory   ] {}\n", text);
  };
  const StreamOptions options{.note = &note};
  fill_up_to(need(rows / 4) + (int64_t{300} << 20));
  expect_same(classified(*gpu, model, records, options), expected);
  EXPECT_EQ(notes.size(), 1u);  // as planned, nothing ran out
  gpu->release_kept();

  // And where the rest is taken meanwhile.
  int turns = 0;
  const auto progress = [&](const Stream&) {
    if (++turns != 1) return;
    gpu->release_kept();
    fill_up_to(need(rows / 16));
  };
  expect_same(classified(*gpu, model, records, options, progress), expected);
  EXPECT_GE(notes.size(), 3u);

  try {
    const Tensor more(*gpu, DType::u8, {int64_t{8} << 30});
    FAIL() << "8 GiB were allocated on a full card";
  } catch (const OutOfMemory& error) {
    fmt::print("[ memory   ] {}\n", error.what());
    EXPECT_NE(std::string(error.what()).find("8.00 GiB (8589934592 bytes) asked for"),
              std::string::npos)
        << error.what();
  }
}
#endif

}  // namespace
}  // namespace coil
