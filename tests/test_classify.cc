// Answers depend neither on chunk, batch or order of strands nor on what else is read.
#include "pipelines/classify.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>

#include "genomics/fasta.h"
#include "pipelines/score.h"
#include "tests/records.h"

namespace coil {
namespace {

std::vector<Answer> classify_all(Backend& backend, const Model& model, Source& source,
                                 const ClassifyOptions& options) {
  std::vector<Answer> answers;
  classify(backend, model, source, options, [&](const Answer& a) { answers.push_back(a); });
  return answers;
}

std::vector<double> classify_one(Backend& backend, const Model& model, const Codes& codes,
                                 StreamOptions stream) {
  Records source({codes});
  return classify_all(backend, model, source, {.stream = stream}).at(0).probabilities;
}

void expect_near(const std::vector<double>& a, const std::vector<double>& b, double tolerance,
                 const std::string& what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  for (size_t i = 0; i < a.size(); i++)
    EXPECT_NEAR(a[i], b[i], tolerance) << what << ", class " << i;
}

// The first `length` codes of a real genome; empty where the data is absent.
Codes genome_piece(int64_t length) {
  const char* given = std::getenv("COIL_DATA");
  const std::string data = given ? given : COIL_SOURCE_DIR "/../shared/data";
  const std::string path =
      data + "/dna/entero6/test/Escherichia_coli/GCF_000008865.2_O157H7_Sakai.fna.gz";
  Codes codes;
  if (!std::filesystem::exists(path)) return codes;
  const auto source = open_fasta({path});
  Segment segment;
  while (static_cast<int64_t>(codes.size()) < length && source->next(segment)) {
    codes.insert(codes.end(), segment.codes.begin(), segment.codes.end());
  }
  codes.resize(length);
  return codes;
}

TEST(Classify, ChunkedIsOneShotOnAGenome) {
  const Codes genome = genome_piece(200'000);
  if (genome.empty()) GTEST_SKIP() << "no dna/entero6 in COIL_DATA";
  const auto backend = make_cpu_backend(1);
  for (const Pooling pooling : {Pooling::mean, Pooling::last}) {
    Config config = small_config(Objective::classify);
    config.pooling = pooling;
    const Model model = small_model(*backend, config);
    const std::vector<double> whole = classify_one(*backend, model, genome, {.batch = 200'000});
    const int64_t smallest = pooling == Pooling::mean ? 7 : 64;
    for (const int64_t chunk : {smallest, int64_t{64}, int64_t{1000}, int64_t{65536}}) {
      expect_near(classify_one(*backend, model, genome, {.batch = chunk}), whole, 1e-5,
                  fmt::format("chunk {}", chunk));
    }
    const Codes piece(genome.begin(), genome.begin() + 5'000);
    expect_near(classify_one(*backend, model, piece, {.batch = 1}),
                classify_one(*backend, model, piece, {.batch = 5'000}), 1e-5, "step by step");
  }
}

TEST(Classify, StepByStepIsOneShotOnAGenome) {
  const Codes genome = genome_piece(200'000);
  if (genome.empty()) GTEST_SKIP() << "no dna/entero6 in COIL_DATA";
  const auto backend = make_cpu_backend(1);
  const Model model = small_model(*backend, small_config(Objective::classify));
  const StreamOptions forward{.strands = Strands::forward, .batch = 1};
  expect_near(
      classify_one(*backend, model, genome, forward),
      classify_one(*backend, model, genome, {.strands = Strands::forward, .batch = 200'000}), 1e-5,
      "chunk 1");
}

TEST(Classify, AloneIsAmongFiveHundredOthers) {
  const auto backend = make_cpu_backend(1);
  const Model model = small_model(*backend, small_config(Objective::classify));
  std::vector<Codes> records;
  for (int i = 0; i < 501; i++) {
    records.push_back(random_codes(i == 250 ? 50'000 : 20 + (i * 97) % 300, i));
  }
  for (const int64_t chunk : {0, 100}) {
    Records source(records, 20'000);
    const auto among =
        classify_all(*backend, model, source, {.stream = {.batch = 1024, .chunk = chunk}});
    ASSERT_EQ(among.size(), records.size());
    for (const int i : {0, 1, 249, 250, 251, 499, 500}) {
      EXPECT_EQ(among[i].name, fmt::format("r{}", i));
      expect_near(among[i].probabilities,
                  classify_one(*backend, model, records[i], {.batch = 4096}), 1e-5,
                  fmt::format("record {}", i));
    }
  }
}

TEST(Classify, AnyNumberOfThreadsAgrees) {
  std::vector<Codes> records;
  for (int i = 0; i < 60; i++) records.push_back(random_codes(i % 20 == 7 ? 9'000 : 10 + 7 * i, i));
  std::vector<Answer> expected;
  for (const int threads : {1, 2, 5}) {
    const auto backend = make_cpu_backend(threads);
    const Model model = small_model(*backend, small_config(Objective::classify));
    Records source(records, 2000);
    const auto answers = classify_all(*backend, model, source, {.stream = {.batch = 512}});
    if (expected.empty()) expected = answers;
    ASSERT_EQ(answers.size(), records.size());
    for (size_t i = 0; i < answers.size(); i++) {
      EXPECT_EQ(answers[i].name, expected[i].name);
      expect_near(answers[i].probabilities, expected[i].probabilities, 1e-5, answers[i].name);
    }
  }
}

TEST(Classify, SameInputSameBits) {
  const auto backend = make_cpu_backend(2);
  const Model model = small_model(*backend, small_config(Objective::classify));
  const Codes codes = random_codes(5'000, 11);
  EXPECT_EQ(classify_one(*backend, model, codes, {.batch = 512}),
            classify_one(*backend, model, codes, {.batch = 512}));
}

TEST(Classify, BothStrandsAreSymmetricAndTheMeanOfEach) {
  const auto backend = make_cpu_backend(1);
  const Model model = small_model(*backend, small_config(Objective::classify));
  for (const int64_t length : {1, 50, 70'000}) {
    Codes codes = random_codes(length, 21);
    std::replace(codes.begin(), codes.end(), dna::kT, dna::kA);  // the strands differ
    const Codes other = reverse_complemented(codes);
    const StreamOptions both{.batch = 512};
    const std::vector<double> p = classify_one(*backend, model, codes, both);
    expect_near(p, classify_one(*backend, model, other, both), 1e-6, "reverse complement");
    const auto forward =
        classify_one(*backend, model, codes, {.strands = Strands::forward, .batch = 512});
    const auto reverse =
        classify_one(*backend, model, codes, {.strands = Strands::reverse, .batch = 512});
    expect_near(reverse,
                classify_one(*backend, model, other, {.strands = Strands::forward, .batch = 512}),
                1e-6, "reverse strand");
    for (size_t i = 0; i < p.size(); i++) EXPECT_NEAR(p[i], (forward[i] + reverse[i]) / 2, 1e-6);
    if (length > 1) {
      EXPECT_GT(std::abs(forward[0] - reverse[0]), 1e-4);  // a real average
    }
  }
}

TEST(Classify, WindowsPairsAndFiles) {
  const auto backend = make_cpu_backend(1);
  const Model model = small_model(*backend, small_config(Objective::classify));
  const StreamOptions stream{.batch = 256};
  const std::vector<Codes> records{random_codes(300, 1), random_codes(100, 2), random_codes(90, 3),
                                   random_codes(400, 4)};
  std::vector<std::vector<double>> alone;
  for (const Codes& record : records)
    alone.push_back(classify_one(*backend, model, record, stream));

  {
    Records source({records[0]}, 77);
    const auto answers = classify_all(*backend, model, source,
                                      {.stream = {.window = 120, .stride = 60, .batch = 256}});
    ASSERT_EQ(answers.size(), 5u);
    for (size_t i = 0; i < answers.size(); i++) {
      EXPECT_EQ(answers[i].begin, static_cast<int64_t>(60 * i));
      EXPECT_EQ(answers[i].end, std::min<int64_t>(60 * i + 120, 300));
      const Codes part(records[0].begin() + answers[i].begin, records[0].begin() + answers[i].end);
      expect_near(answers[i].probabilities, classify_one(*backend, model, part, stream), 1e-5,
                  "window");
    }
  }
  const auto mean = [&](size_t a, size_t b) {
    const double wa = records[a].size(), wb = records[b].size();
    std::vector<double> p;
    for (size_t i = 0; i < 3; i++) p.push_back((wa * alone[a][i] + wb * alone[b][i]) / (wa + wb));
    return p;
  };
  {
    Records source(records);
    const auto answers =
        classify_all(*backend, model, source, {.stream = stream, .per = AnswerPer::pair});
    ASSERT_EQ(answers.size(), 2u);
    EXPECT_EQ(answers[0].name, "r0");
    EXPECT_EQ(answers[1].name, "r2");
    EXPECT_EQ(answers[1].end, 490);
    expect_near(answers[0].probabilities, mean(0, 1), 1e-5, "pair 0");
    expect_near(answers[1].probabilities, mean(2, 3), 1e-5, "pair 1");
  }
  {
    Records source(records, Source::kRun, {0, 1, 1, 2});
    const auto answers =
        classify_all(*backend, model, source,
                     {.stream = stream, .per = AnswerPer::file, .files = {"x.fa", "y.fa", "z.fa"}});
    ASSERT_EQ(answers.size(), 3u);
    EXPECT_EQ(answers[1].name, "y.fa");
    EXPECT_EQ(answers[1].end, 190);
    expect_near(answers[0].probabilities, alone[0], 1e-5, "file 0");
    expect_near(answers[1].probabilities, mean(1, 2), 1e-5, "file 1");
    expect_near(answers[2].probabilities, alone[3], 1e-5, "file 2");
  }
}

TEST(Classify, UnknownBelowTheThreshold) {
  Config config = small_config(Objective::classify);
  EXPECT_EQ(unknown_threshold(config, 100, 0), 0);
  config.unknown = {{100, 0.4}, {10'000, 0.8}};
  EXPECT_DOUBLE_EQ(unknown_threshold(config, 1, 0), 0.4);
  EXPECT_DOUBLE_EQ(unknown_threshold(config, 100, 0), 0.4);
  EXPECT_NEAR(unknown_threshold(config, 1000, 0), 0.6, 1e-12);
  EXPECT_DOUBLE_EQ(unknown_threshold(config, 10'000, 0), 0.8);
  EXPECT_DOUBLE_EQ(unknown_threshold(config, 1'000'000, 0), 0.8);
  config.unknown[1].by_class = {0.2, 1.0};  // of the class that is called
  EXPECT_NEAR(unknown_threshold(config, 1000, 0), 0.3, 1e-12);
  EXPECT_NEAR(unknown_threshold(config, 1000, 1), 0.7, 1e-12);
  EXPECT_DOUBLE_EQ(unknown_threshold(config, 100, 1), 0.4);
  EXPECT_DOUBLE_EQ(unknown_threshold(config, 20'000, 1), 1.0);

  const auto backend = make_cpu_backend(1);
  config.unknown = {{50, 0.0}, {51, 1.0}};
  const Model model = small_model(*backend, config);
  const std::vector<Codes> records{random_codes(40, 1), random_codes(400, 2)};
  for (const double given : {-1.0, 0.0, 1.0}) {
    Records source(records);
    const auto answers =
        classify_all(*backend, model, source, {.stream = {.batch = 64}, .min_probability = given});
    EXPECT_EQ(answers[0].label < 0, given == 1.0);
    EXPECT_EQ(answers[1].label < 0, given != 0.0);
    EXPECT_GT(answers[1].probability, 1.0 / 3);  // of the likeliest class all the same
  }
}

// Agreement: of excerpts, both strands of each, with the class of the whole; those of a record that
// comes in segments too, every second one where there are more than kExcerpts, none that is a gap.
TEST(Classify, AgreementIsThatOfExcerpts) {
  Config config = small_config(Objective::classify);
  const auto backend = make_cpu_backend(2);
  const Model plain = small_model(*backend, config);
  config.unknown_excerpt = 30;
  config.unknown = {{1, 0.0}};
  const Model model = small_model(*backend, config);
  const int64_t many = 30 * Stream::kExcerpts + 29;
  std::vector<Codes> records{random_codes(30, 1),       random_codes(75, 2),
                             random_codes(31, 3),       random_codes(many, 4),
                             random_codes(many + 1, 5), random_codes(150, 6)};
  std::fill_n(records[5].begin() + 20, 50, dna::kN);  // 10, 30 and 10 of 30
  std::fill_n(records[5].begin() + 90, 16, dna::kN);
  for (const Strands strands : {Strands::both, Strands::forward, Strands::reverse}) {
    Records alone(records);
    const auto excerpts = classify_all(
        *backend, plain, alone,
        {.stream = {.strands = strands, .window = 30, .batch = 4096}, .min_probability = 0});
    Records again(records);
    const auto expected =
        classify_all(*backend, plain, again, {.stream = {.strands = strands, .batch = 4096}});
    for (const Answer& answer : expected) EXPECT_EQ(answer.agreement, answer.probability);
    for (const int64_t run : {int64_t{40}, Source::kRun})
      for (const int64_t batch : {64, 4096}) {
        Records source(records, run);
        const StreamOptions stream{.strands = strands, .batch = batch, .chunk = batch / 8};
        const auto answers = classify_all(*backend, model, source, {.stream = stream});
        ASSERT_EQ(answers.size(), records.size());
        for (size_t i = 0; i < records.size(); i++) {
          expect_near(answers[i].probabilities, expected[i].probabilities, 1e-5, "the whole");
          double sum = 0;
          int64_t count = 0;
          const int64_t stride = i == 4 ? 60 : 30;  // 257 excerpts are too many
          for (const Answer& excerpt : excerpts) {
            if (excerpt.name != answers[i].name || excerpt.end - excerpt.begin != 30) continue;
            if (excerpt.begin % stride != 0) continue;
            if (i == 5 && (excerpt.begin == 30 || excerpt.begin == 90)) continue;
            sum += excerpt.probabilities[expected[i].label];
            count += 1;
          }
          EXPECT_NEAR(answers[i].agreement, sum / count, 1e-5) << i << " of " << count;
        }
      }
  }
}

TEST(Classify, RefusesOtherModels) {
  Config config = small_config(Objective::lm);
  EXPECT_THROW(check_classifier(config, "m"), Error);
  EXPECT_NO_THROW(check_language_model(config, "m"));
  config.alphabet = "";
  EXPECT_THROW(check_language_model(config, "m"), Error);
  config = small_config(Objective::classify);
  EXPECT_NO_THROW(check_classifier(config, "m"));
  EXPECT_THROW(check_language_model(config, "m"), Error);
  config.vocab = 4;
  EXPECT_THROW(check_classifier(config, "m"), Error);
}

}  // namespace
}  // namespace coil
