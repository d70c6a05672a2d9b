// Log-likelihoods of DNA: by hand, in chunks, base by base.
#include "pipelines/score.h"

#include <gtest/gtest.h>

#include <charconv>
#include <cmath>
#include <numbers>
#include <sstream>
#include <tuple>

#include "tests/records.h"

namespace coil {
namespace {

struct Scored {
  std::vector<Score> scores;
  std::string text;
};

Scored score_all(Backend& backend, const Model& model, Source& source,
                 const ScoreOptions& options) {
  Scored scored;
  score(
      backend, model, source, options, [&](const Score& s) { scored.scores.push_back(s); },
      [&](const std::string& text) { scored.text += text; });
  return scored;
}

// A Mamba whose mixers give zero is a bigram model: hidden = sqrt(d) e_x for one-hot embeddings, so
// that logits[y | x] = sqrt(d) W[y, x].
TEST(Score, BigramByHand) {
  const auto backend = make_cpu_backend(1);
  Config config = small_config(Objective::lm);
  config.tie = false;
  Model model = make_model(*backend, config, 1);
  for (Layer& layer : model.backbone.layers) {
    backend->fill(std::get<Mamba1Weights>(layer.mixer).out_proj, 0);
  }
  backend->fill(model.backbone.norm_f, 1);
  const auto weight = [&](int y, int x) { return 0.1 * (3 * y + x * x % 5) * (y % 2 ? 1 : -1); };
  auto embedding = model.embedding.span<float>(), head = model.lm_head.span<float>();
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < 16; j++) {
      embedding[i * 16 + j] = i == j;
      head[i * 16 + j] = static_cast<float>(weight(i, j));
    }
  }
  const double s = 1 / std::sqrt(1.0 / 16 + config.eps);
  const auto log_p = [&](int y, int x) {
    double sum = 0;
    for (int other = dna::kA; other <= dna::kT; other++) sum += std::exp(s * weight(other, x));
    return s * weight(y, x) - std::log(sum);
  };
  // A is not counted, N is not counted but stays context of the A after it.
  Records source({parse("ACNAGT"), parse("G"), parse("NNC")});
  const Scored scored =
      score_all(*backend, model, source,
                {.stream = {.strands = Strands::forward, .batch = 4}, .per_base = true});
  using namespace dna;
  const std::vector<double> terms{log_p(kC, kA), log_p(kA, kN), log_p(kG, kA), log_p(kT, kG)};
  ASSERT_EQ(scored.scores.size(), 3u);
  const Score& first = scored.scores[0];
  EXPECT_EQ(first.counted, 4);
  EXPECT_EQ(first.end, 6);
  const double total = terms[0] + terms[1] + terms[2] + terms[3];
  EXPECT_NEAR(first.log_likelihood, total, 1e-4);
  EXPECT_NEAR(first.bits_per_base(), -total / 4 / std::numbers::ln2, 1e-4);
  EXPECT_EQ(scored.scores[1].counted, 0);
  EXPECT_TRUE(std::isnan(scored.scores[1].bits_per_base()));
  EXPECT_EQ(scored.scores[2].counted, 1);
  EXPECT_NEAR(scored.scores[2].log_likelihood, log_p(kC, kN), 1e-4);
  const std::vector<std::tuple<std::string, int64_t, double>> lines{{"r0", 1, terms[0]},
                                                                    {"r0", 3, terms[1]},
                                                                    {"r0", 4, terms[2]},
                                                                    {"r0", 5, terms[3]},
                                                                    {"r2", 2, log_p(kC, kN)}};
  std::istringstream text(scored.text);
  for (const auto& [name, start, log_likelihood] : lines) {
    std::string got;
    int64_t begin = -1, end = -1;
    double bits = 0;
    text >> got >> begin >> end >> bits;
    EXPECT_EQ(got, name);
    EXPECT_EQ(begin, start);
    EXPECT_EQ(end, start + 1);
    EXPECT_NEAR(bits, -log_likelihood / std::numbers::ln2, 1e-4);
  }
  EXPECT_EQ(std::count(scored.text.begin(), scored.text.end(), '\n'), 5);
}

TEST(Score, ChunkedIsOneShotAndTheSumOfItsBases) {
  const auto backend = make_cpu_backend(1);
  const Model model = small_model(*backend, small_config(Objective::lm));
  const std::vector<Codes> records{random_codes(70'000, 1, 0.1), random_codes(1, 2),
                                   random_codes(500, 3)};
  Records whole_source(records);
  const auto whole = score_all(*backend, model, whole_source,
                               {.stream = {.strands = Strands::forward, .batch = 80'000}})
                         .scores;
  for (const int64_t chunk : {7, 100, 4096}) {
    Records source(records, 5000);
    const Scored scored = score_all(*backend, model, source,
                                    {.stream = {.strands = Strands::forward,
                                                .batch = std::max<int64_t>(chunk, 300),
                                                .chunk = chunk},
                                     .per_base = true});
    ASSERT_EQ(scored.scores.size(), records.size());
    std::vector<double> bits(records.size());
    int64_t record = 0, last = -1;
    size_t lines = 0;
    const char* at = scored.text.data();
    const char* const text_end = at + scored.text.size();
    const auto read = [&](auto& value) {  // from the letter or tab before it on
      const auto [end, error] = std::from_chars(at + 1, text_end, value);
      ASSERT_EQ(error, std::errc());
      at = end;
    };
    for (; at < text_end; lines++, at++) {
      int64_t number = 0, position = 0, next = 0;
      double value = 0;
      read(number);
      read(position);
      read(next);
      read(value);
      EXPECT_TRUE(number > record || (number == record && position > last));  // in input order
      record = number, last = position;
      EXPECT_EQ(next, position + 1);
      EXPECT_NE(records[number][position], dna::kN);
      bits[number] += value;
    }
    double counted = 0;
    for (size_t i = 0; i < records.size(); i++) {
      counted += scored.scores[i].counted;
      EXPECT_EQ(scored.scores[i].counted, whole[i].counted);
      EXPECT_NEAR(scored.scores[i].log_likelihood, whole[i].log_likelihood,
                  1e-5 * std::abs(whole[i].log_likelihood) + 1e-9);
      EXPECT_NEAR(bits[i] * std::numbers::ln2, -scored.scores[i].log_likelihood,
                  1e-5 * std::abs(whole[i].log_likelihood) + 1e-9);
    }
    EXPECT_EQ(static_cast<double>(lines), counted);
  }
}

TEST(Score, BothStrandsAreTheMean) {
  const auto backend = make_cpu_backend(1);
  const Model model = small_model(*backend, small_config(Objective::lm));
  const Codes codes = random_codes(3000, 9);
  const auto one = [&](const Codes& record, Strands strands) {
    Records source({record}, 700);
    return score_all(*backend, model, source, {.stream = {.strands = strands, .batch = 256}})
        .scores.at(0);
  };
  const Score forward = one(codes, Strands::forward), reverse = one(codes, Strands::reverse);
  EXPECT_NEAR(one(codes, Strands::both).log_likelihood,
              (forward.log_likelihood + reverse.log_likelihood) / 2, 1e-3);
  EXPECT_NEAR(one(reverse_complemented(codes), Strands::forward).log_likelihood,
              reverse.log_likelihood, 1e-2);
  EXPECT_GT(std::abs(forward.log_likelihood - reverse.log_likelihood), 0.1);
}

}  // namespace
}  // namespace coil
