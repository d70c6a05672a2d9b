// Thresholds of "unknown": quantiles of what classify itself answers.
#include "pipelines/calibrate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "pipelines/classify.h"
#include "tests/records.h"

namespace coil {
namespace {

OpenSource records(std::vector<Codes> codes) {
  return [codes] { return std::make_unique<Records>(codes); };
}

TEST(Calibrate, KeepsItsShareOfTheKnown) {
  const auto backend = make_cpu_backend(1);
  Model model = small_model(*backend, small_config(Objective::classify));
  const OpenSource known = records({random_codes(30'000, 1), random_codes(150, 2)});
  const OpenSource unknown = records({random_codes(20'000, 3)});
  const CalibrateOptions options{
      .stream = {.batch = 512}, .lengths = {200, 50, 5000}, .keep = 0.9, .pieces = 140};
  const std::vector<Calibration> rows = calibrate(*backend, model, known, unknown, options);
  ASSERT_EQ(rows.size(), 2u);  // of 5,000 bases there are too few
  EXPECT_EQ(rows[0].length, 50);
  EXPECT_EQ(rows[1].length, 200);
  model.config.unknown.clear();
  for (const Calibration& row : rows) {
    EXPECT_GE(row.known, 100);
    EXPECT_LE(row.known, 160);
    EXPECT_GE(row.kept, 0.9);
    EXPECT_LE(row.kept, 0.9 + 1.0 / row.known);  // the largest threshold that does
    EXPECT_GT(row.unknown, 90);
    model.config.unknown.push_back({.length = row.length, .probability = row.threshold});
  }
  // What classify then does with the same pieces.
  for (const Calibration& row : rows) {
    const auto count = [&](const OpenSource& open, int64_t bases) {
      int64_t all = 0, labelled = 0;
      const StreamOptions stream{
          .window = row.length, .stride = std::max(row.length, bases / 140), .batch = 512};
      classify(*backend, model, *open(), {.stream = stream, .files = {}},
               [&](const Answer& answer) {
                 if (answer.end - answer.begin != row.length) return;
                 all += 1;
                 labelled += answer.label >= 0;
               });
      return std::pair(all, labelled);
    };
    const auto [all, labelled] = count(known, 30'150);
    EXPECT_EQ(all, row.known);
    EXPECT_NEAR(static_cast<double>(labelled) / all, row.kept, 1e-12);
    const auto [others, passed] = count(unknown, 20'000);
    EXPECT_EQ(others, row.unknown);
    EXPECT_NEAR(1 - static_cast<double>(passed) / others, row.caught, 1e-12);
  }
}

// By class: of the pieces that go by a class's name its own share is kept. Pieces may overlap.
TEST(Calibrate, ByClass) {
  const auto backend = make_cpu_backend(1);
  Model model = small_model(*backend, small_config(Objective::classify));
  // Of two letters each, so that they are called different classes.
  std::vector<Codes> pairs;
  for (uint8_t first = 1; first <= 4; ++first)
    for (uint8_t second = first + 1; second <= 4; ++second) {
      pairs.push_back(random_codes(1'500, first * 5 + second));
      for (auto& code : pairs.back()) code = code % 2 ? first : second;
    }
  const OpenSource known = records(pairs);
  const CalibrateOptions options{.stream = {.batch = 512},
                                 .lengths = {100},
                                 .keep = 0.9,
                                 .pieces = 300,
                                 .overlap = 0.75,
                                 .by_class = true};
  const std::vector<Calibration> rows = calibrate(*backend, model, known, {}, options);
  ASSERT_EQ(rows.size(), 1u);
  EXPECT_GT(rows[0].known, 250);
  ASSERT_EQ(rows[0].by_class.size(), model.config.labels.size());
  const auto count = [&](double least) {
    std::vector<int64_t> called(model.config.labels.size() + 1);  // the last: unknown
    const StreamOptions stream{.window = 100, .stride = 30, .batch = 512};
    const auto source = known();
    classify(*backend, model, *source, {.stream = stream, .files = {}, .min_probability = least},
             [&](const Answer& answer) {
               if (answer.end - answer.begin != 100) return;
               ++(answer.label < 0 ? called.back() : called[answer.label]);
             });
    return called;
  };
  const std::vector<int64_t> before = count(0);
  model.config.unknown = {{100, rows[0].threshold, rows[0].by_class}};
  const std::vector<int64_t> after = count(-1);
  int different = 0;
  for (size_t c = 0; c + 1 < before.size(); ++c) {
    if (before[c] < 20) {
      EXPECT_EQ(rows[0].by_class[c], rows[0].threshold);
      continue;
    }
    different += rows[0].by_class[c] != rows[0].threshold;
    EXPECT_EQ(before[c] - after[c], static_cast<int64_t>(std::floor(0.1 * before[c] + 1e-9)));
  }
  EXPECT_GE(different, 1);
  EXPECT_NEAR(1 - static_cast<double>(after.back()) / rows[0].known, rows[0].kept, 1e-12);
}

// By excerpts; classify, which reads them since the model says so, calls the same pieces unknown.
TEST(Calibrate, ByExcerpts) {
  const auto backend = make_cpu_backend(1);
  Model model = small_model(*backend, small_config(Objective::classify));
  const OpenSource known = records({random_codes(30'000, 1)});
  const CalibrateOptions options{
      .stream = {.batch = 512}, .lengths = {50, 100}, .keep = 0.9, .pieces = 200, .excerpt = 50};
  const auto rows = calibrate(*backend, model, known, {}, options);
  ASSERT_EQ(rows.size(), 2u);
  CalibrateOptions whole = options;
  whole.excerpt = 0;
  const auto without = calibrate(*backend, model, known, {}, whole);
  EXPECT_EQ(rows[0].threshold, without[0].threshold);  // a piece no longer than an excerpt is one
  EXPECT_NE(rows[1].threshold, without[1].threshold);
  model.config.unknown = {{100, rows[1].threshold, {}}};
  model.config.unknown_excerpt = 50;
  int64_t all = 0, labelled = 0;
  const StreamOptions stream{.window = 100, .stride = 150, .batch = 512};
  const auto source = known();
  classify(*backend, model, *source, {.stream = stream, .files = {}}, [&](const Answer& answer) {
    if (answer.end - answer.begin != 100) return;
    all++;
    labelled += answer.label >= 0;
    EXPECT_EQ(answer.label >= 0, answer.agreement >= rows[1].threshold);
  });
  EXPECT_EQ(all, rows[1].known);
  EXPECT_LT(labelled, all);
  EXPECT_NEAR(static_cast<double>(labelled) / all, rows[1].kept, 1e-12);
}

TEST(Calibrate, WithoutUnknownAndWithoutEnough) {
  const auto backend = make_cpu_backend(1);
  const Model model = small_model(*backend, small_config(Objective::classify));
  const auto rows = calibrate(*backend, model, records({random_codes(10'000, 1)}), {},
                              {.stream = {.batch = 512}, .lengths = {50}, .keep = 1});
  ASSERT_EQ(rows.size(), 1u);
  EXPECT_EQ(rows[0].kept, 1);
  EXPECT_TRUE(std::isnan(rows[0].caught));
  EXPECT_THROW(calibrate(*backend, model, records({random_codes(99 * 50, 1)}), {},
                         {.stream = {.batch = 512}, .lengths = {50}}),
               Error);
}

}  // namespace
}  // namespace coil
