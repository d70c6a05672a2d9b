// Sample against the oracle's distribution: each draw, their frequencies, what temperature, top_k
// and top_p leave, ties, rows ruled out; the same ids on every device.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/error.h"
#include "kernels/philox.h"
#include "tests/field.h"
#include "tests/reference_dense.h"
#include "tests/test_device.h"

namespace coil {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Options {
  float temperature = 1;
  int64_t top_k = 0;
  float top_p = 1;
};

struct Drawn {
  std::vector<int32_t> ids;
  std::vector<float> log_probs;
};

class SampleTest : public testing::Test {
 protected:
  void SetUp() override {
    COIL_NEEDS_TEST_DEVICE();
    backend = make_test_backend();
  }
  // All operands are views inside larger memory; streams empty: left out.
  Drawn draw(Backend& on, const Field& logits, const Options& options, uint64_t seed = 3,
             uint64_t step = 7, std::vector<int32_t> streams = {}) {
    const int64_t m = logits.view().rows(), v = logits.view().cols();
    const Tensor wide(on, DType::f32, {m, v + 3}), ids(on, DType::i32, {m + 2});
    const Tensor log_probs(on, DType::f32, {m}), of_rows(on, DType::i32, {m});
    const View here = wide.view().columns(3, v);
    on.fill(wide, kNan);
    on.fill(ids, -7);
    on.copy(logits, here);
    if (!streams.empty()) on.copy(host_view(streams.data(), DType::i32, {m}), of_rows);
    on.run(Sample{.logits = here,
                  .ids = ids.view().slice(1, m),
                  .streams = streams.empty() ? View{} : of_rows.view(),
                  .log_probs = log_probs,
                  .temperature = options.temperature,
                  .top_k = options.top_k,
                  .top_p = options.top_p,
                  .seed = seed,
                  .step = step});
    std::vector<int32_t> all(m + 2);
    on.copy(ids, host_view(all.data(), DType::i32, {m + 2}));
    on.sync();
    EXPECT_EQ(all.front(), -7);
    EXPECT_EQ(all.back(), -7);
    return {{all.begin() + 1, all.end() - 1}, values_of(on, log_probs)};
  }
  Drawn draw(const Field& logits, const Options& options) {
    return draw(*backend, logits, options);
  }
  Field normal(int64_t rows, int64_t cols, float scale = 3) {
    Field logits(rows, cols, random, false);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) logits.at(i, j) *= scale;
    return logits;
  }
  std::unique_ptr<Backend> backend, cpu = make_cpu_backend(2);
  std::mt19937 random{5};
};

const Options kOptions[] = {{},
                            {.temperature = 0},
                            {.temperature = 0.7f},
                            {.temperature = 3, .top_k = 5},
                            {.top_p = 0.9f},
                            {.temperature = 1.3f, .top_k = 9, .top_p = 0.6f},
                            {.top_k = 1},
                            {.top_p = 1e-6f},
                            {.temperature = 1e-38f},
                            {.temperature = 1e30f, .top_p = 0.513f}};

// Where the draw lies among the probabilities in order, to the rounding of either.
TEST_F(SampleTest, EveryDrawIsWhereTheOracleHasIt) {
  constexpr double kNear = 1e-5;
  for (const auto& [m, v] : {std::pair{1, 1},
                             {300, 4},
                             {700, 16},
                             {33, 31},
                             {500, 256},
                             {40, 257},
                             {9, 5003},
                             {2, 8192},
                             {3, 8200},
                             {2, 50'280},
                             {1, 65'536}}) {
    const Field logits = normal(m, v);
    for (const Options& o : kOptions) {
      SCOPED_TRACE(fmt::format("{} of {}: {} {} {}", m, v, o.temperature, o.top_k, o.top_p));
      const Drawn drawn = draw(logits, o);
      int near = 0;
      for (int i = 0; i < m; ++i) {
        const int32_t id = drawn.ids[i];
        ASSERT_TRUE(id >= 0 && id < v) << id;
        double margin;
        const auto values = logits.values(i);
        ASSERT_NEAR(drawn.log_probs[i], -reference::cross_entropy(values, id, 1), 2e-5);
        const auto p = reference::sample(values, o.temperature, o.top_k, o.top_p, &margin);
        if (margin < kNear && ++near) continue;
        ASSERT_GT(p[id], 0) << id;
        const uint32_t counter[] = {0, static_cast<uint32_t>(i), 7, 0}, key[] = {3, 0};
        uint32_t words[4];
        philox4x32(counter, key, words);
        const double place = words[0] * 0x1p-32 + words[1] * 0x1p-64;
        double before = 0;
        for (int j = 0; j < id; ++j) before += p[j];
        ASSERT_GE(place, before - kNear) << id;
        ASSERT_LE(place, before + p[id] + kNear) << id;
      }
      EXPECT_LE(near, 2 + m / 50);
    }
  }
}

TEST_F(SampleTest, EveryDeviceHasTheSameIds) {
  for (const auto& [m, v] : {std::pair{2000, 16}, {1000, 256}, {100, 1000}, {3, 60'001}}) {
    Field logits = normal(m, v);
    for (int i = 0; i < m; i += 3)  // ties
      for (int j = 0; j < v; ++j) logits.at(i, j) = std::round(logits.at(i, j));
    for (const Options& o : kOptions) {
      const Drawn found = draw(logits, o), expected = draw(*cpu, logits, o);
      ASSERT_EQ(found.ids, expected.ids) << v << ' ' << o.temperature << ' ' << o.top_k;
      for (int i = 0; i < m; ++i)
        ASSERT_NEAR(found.log_probs[i], expected.log_probs[i],
                    1e-6 * std::abs(expected.log_probs[i]));
    }
  }
}

// Pearson's sum has a mean of the cells less one; six deviations above it are past chance.
TEST_F(SampleTest, FrequenciesAreTheDistribution) {
  const int64_t m = 50'000;
  for (const Options& o : {Options{}, {.temperature = 0.5f}, {.top_k = 7}, {.top_p = 0.8f}})
    for (const bool steps : {false, true}) {
      const int64_t v = 23, rows = steps ? m / 100 : m;
      const Field one = normal(1, v, 1);
      Field logits(rows, v, false);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < v; ++j) logits.at(i, j) = one.at(0, j);
      std::vector<double> counts(v);
      for (uint64_t step = 0; step < (steps ? 100 : 1); ++step)
        for (const int32_t id : draw(*backend, logits, o, 9, step).ids) counts.at(id) += 1;
      double margin, sum = 0;
      int cells = 0;
      const auto p = reference::sample(one.values(0), o.temperature, o.top_k, o.top_p, &margin);
      for (int64_t j = 0; j < v; ++j) {
        const double expected = p[j] * static_cast<double>(m);
        EXPECT_TRUE(expected > 0 || counts[j] == 0);
        if (expected == 0) continue;
        sum += (counts[j] - expected) * (counts[j] - expected) / expected;
        ++cells;
      }
      EXPECT_LT(sum, cells - 1 + 6 * std::sqrt(2. * (cells - 1)))
          << o.temperature << ' ' << o.top_k;
    }
}

// By its stream, wherever the row stands; another step, seed or stream is another draw.
TEST_F(SampleTest, ASequenceDoesNotDependOnItsBatch) {
  const int64_t m = 50, v = 256;
  const Field logits = normal(m, v, 1);
  std::vector<int32_t> streams(m);
  for (int64_t i = 0; i < m; ++i) streams[i] = static_cast<int32_t>(1000 - 3 * i);
  streams[7] = -1;
  const Drawn all = draw(*backend, logits, {}, 3, 7, streams);
  for (int64_t i = 0; i < m; i += 7) {
    Field alone(1, v, false);
    for (int64_t j = 0; j < v; ++j) alone.at(0, j) = logits.at(i, j);
    const Drawn one = draw(*backend, alone, {}, 3, 7, {streams[i]});
    EXPECT_EQ(one.ids[0], all.ids[i]) << i;
    EXPECT_EQ(one.log_probs[0], all.log_probs[i]) << i;
  }
  EXPECT_EQ(draw(*backend, logits, {}, 3, 7, streams).ids, all.ids);
  EXPECT_NE(draw(*backend, logits, {}, 3, 7).ids, all.ids);
  EXPECT_NE(draw(*backend, logits, {}, 4, 7, streams).ids, all.ids);
  EXPECT_NE(draw(*backend, logits, {}, 3, 8, streams).ids, all.ids);
  EXPECT_NE(draw(*backend, logits, {}, 3, 7 + (uint64_t{1} << 40), streams).ids, all.ids);
  EXPECT_NE(draw(*backend, logits, {}, 3 + (uint64_t{1} << 40), 7, streams).ids, all.ids);
}

TEST_F(SampleTest, TiesGoToTheLowerIds) {
  for (const int v : {20, 300, 9000}) {
    Field logits(400, v, false);
    for (int i = 0; i < 400; ++i)
      for (int j = 0; j < v; ++j)
        logits.at(i, j) = j % 5 == 3 ? (j % 2 ? 0.f : -0.f) : -1 - static_cast<float>(j % 5);
    const auto largest = [&](const Options& options) {  // of the ids drawn
      int32_t most = 0;
      for (const int32_t id : draw(logits, options).ids) {
        EXPECT_EQ(id % 5, 3);
        most = std::max(most, id);
      }
      return most;
    };
    for (const int32_t id : draw(logits, {.temperature = 0}).ids) ASSERT_EQ(id, 3);
    EXPECT_EQ(largest({.top_k = 1}), 3);
    EXPECT_EQ(largest({.top_k = 3}), 13);
    EXPECT_EQ(largest({.top_k = 3, .top_p = 0.1f}), 13);  // all three or none
    EXPECT_GT(largest({.top_p = 1e-6f}), v - v / 8 - 3);
  }
}

TEST_F(SampleTest, RowsRuledOutAndNan) {
  for (const int v : {7, 64, 300, 9000}) {
    Field logits = normal(7, v);
    for (int j = 0; j < v; ++j) {
      logits.at(0, j) = -kInfinity;
      logits.at(1, j) = j == 5 ? -1e30f : -kInfinity;  // one id left
      if (j % 2) logits.at(5, j) = -kInfinity;
      logits.at(6, j) = j == 2 ? 3e38f : -3e38f;
    }
    logits.at(2, v - 1) = kNan;
    logits.at(3, 0) = -kNan;
    logits.at(4, v / 2) = kInfinity;
    for (const Options& options : kOptions) {
      const Drawn drawn = draw(logits, options);
      for (const int row : {0, 2, 3, 4}) {
        EXPECT_EQ(drawn.ids[row], -1) << row << " of " << v;
        EXPECT_TRUE(std::isnan(drawn.log_probs[row])) << row << " of " << v;
      }
      EXPECT_EQ(drawn.ids[1], 5) << v;
      EXPECT_EQ(drawn.log_probs[1], 0) << v;
      EXPECT_EQ(drawn.ids[5] % 2, 0) << v;
      EXPECT_TRUE(drawn.ids[6] == 2 || options.temperature == 1e30f) << v;
    }
  }
}

// One step of generation: the ids go where embed reads them; a row of NaN stays one.
TEST_F(SampleTest, IdsFeedTheNextStep) {
  const int64_t m = 3, v = 40, d = 8;
  const Field logits = normal(m, v), table = normal(v, d);
  const Tensor here(*backend, DType::f32, {m, v}), rows(*backend, DType::f32, {v, d});
  const Tensor ids(*backend, DType::i32, {m}), x(*backend, DType::f32, {m, d});
  backend->copy(logits, here);
  backend->copy(table, rows);
  backend->run(Sample{.logits = here, .ids = ids});
  backend->run(Embed{.ids = ids, .table = rows, .y = x});
  const std::vector<float> found = values_of(*backend, x);
  const std::vector<int32_t> expected = draw(*cpu, logits, {}, 0, 0).ids;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < d; ++j) EXPECT_EQ(found[i * d + j], table.at(expected[i], j));
}

// Guided, an id is drawn as from the logits that guidance makes, its likelihood as it is without;
// it is written twice.
TEST_F(SampleTest, GuidanceIsADistributionBetweenTwo) {
  for (const auto& [m, v] : {std::pair{60, 16}, {200, 256}, {5, 3000}, {2, 9000}}) {
    Field with = normal(m, v), without = normal(m, v), guided(m, v, false);
    for (int i = 0; i < m; ++i) with.at(i, i % v) = -kInfinity;  // stays ruled out
    with.at(m - 1, v / 2) = kNan;
    for (const float g : {0.f, 1.5f, -1.f}) {
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < v; ++j) {
          const float from = without.at(i, j);
          guided.at(i, j) = from + g * (with.at(i, j) - from);
          if (j == i % v && i < m - 1) guided.at(i, j) = -kInfinity;
        }
      for (const Options& o : kOptions) {
        const Tensor wide(*backend, DType::f32, {m, v + 3}),
            other(*backend, DType::f32, {m, v + 1});
        const Tensor ids(*backend, DType::i32, {2 * m}), log_probs(*backend, DType::f32, {m});
        const View here = wide.view().columns(3, v), there = other.view().columns(0, v);
        backend->copy(with, here);
        backend->copy(without, there);
        backend->run(Sample{.logits = here,
                            .unguided = there,
                            .ids = ids,
                            .log_probs = log_probs,
                            .guidance = g,
                            .temperature = o.temperature,
                            .top_k = o.top_k,
                            .top_p = o.top_p,
                            .seed = 3,
                            .step = 7});
        std::vector<int32_t> found(2 * m);
        backend->copy(ids, host_view(found.data(), DType::i32, {2 * m}));
        backend->sync();
        const std::vector<float> log_p = values_of(*backend, log_probs);
        const Drawn expected = draw(*cpu, guided, o);
        for (int i = 0; i < m; ++i) {
          ASSERT_EQ(found[i], expected.ids[i]) << i << " of " << v << ' ' << g;
          ASSERT_EQ(found[m + i], i == m - 1 ? -1 : found[i] + v);
          if (i < m - 1)
            ASSERT_NEAR(log_p[i], -reference::cross_entropy(with.values(i), found[i], 1), 2e-5);
          else
            ASSERT_TRUE(std::isnan(log_p[i]));
        }
      }
    }
  }
}

TEST_F(SampleTest, RefusesWhatIsOutOfRange) {
  const Tensor logits(*backend, DType::f32, {2, 9}), ids(*backend, DType::i32, {2});
  const auto message = [&](const Options& o, const View& to) {
    return message_of([&] {
      backend->run(Sample{.logits = logits,
                          .ids = to,
                          .temperature = o.temperature,
                          .top_k = o.top_k,
                          .top_p = o.top_p});
    });
  };
  EXPECT_EQ(message({.temperature = -1}, ids), "sample: temperature -1, expected 0 or more");
  EXPECT_EQ(message({.temperature = kNan}, ids), "sample: temperature nan, expected 0 or more");
  EXPECT_EQ(message({.top_k = -1}, ids), "sample: top_k -1, expected 0 or more");
  EXPECT_EQ(message({.top_p = 0}, ids), "sample: top_p 0, expected more than 0, at most 1");
  EXPECT_EQ(message({}, {}), "sample: ids is missing, expected (2) i32");
  const Tensor many(*backend, DType::f32, {2, 65'537});
  EXPECT_EQ(message_of([&] { backend->run(Sample{.logits = many, .ids = ids}); }),
            "sample: 65537 logits a row, expected 1 to 65536");
}

}  // namespace
}  // namespace coil
