// What training draws: nothing of the validation set, every record once an epoch, every class
// equally often, the same again from the same cursor.

#include "pipelines/batches.h"

#include <gtest/gtest.h>

#include <algorithm>

#include <map>
#include <set>

#include "genomics/alphabet.h"
#include "tests/records.h"

namespace coil {
namespace {

Examples records(std::initializer_list<std::pair<int64_t, int32_t>> shapes) {
  Examples all;
  all.labels = {"a", "b"};
  for (const auto& [length, label] : shapes) {
    const auto record = static_cast<int64_t>(all.codes.size());
    all.codes.push_back(random_codes(length, 50 + record, 0));
    all.names.push_back(std::to_string(record));
    all.items.push_back({record, 0, length, label});
  }
  return all;
}

Examples many(int count, int64_t length) {
  Examples all;
  all.labels = {"a", "b"};
  for (int i = 0; i < count; ++i) {
    all.codes.push_back(random_codes(length, i, 0));
    all.names.push_back(std::to_string(i));
    all.items.push_back({i, 0, length, i % 2});
  }
  return all;
}

TEST(Batches, WindowsHeldOutAreNeverTrainedOn) {
  Examples all = records({{50'000, 0}, {30'000, 1}, {300, 1}});
  const Partition parts = partition(all, 0.1, 50, 200, 1);
  int64_t held_out = 0;
  for (const Example& window : parts.held_out) {
    held_out += window.length;
    EXPECT_LE(window.length, 200);
    for (const Example& stretch : parts.train)
      EXPECT_TRUE(stretch.record != window.record ||
                  window.begin + window.length <= stretch.begin ||
                  window.begin >= stretch.begin + stretch.length);
  }
  EXPECT_NEAR(static_cast<double>(held_out), 8000, 100);
  Batches batches(all, parts.train, {.batch_tokens = 5000, .min_length = 50, .max_length = 200});
  for (int step = 1; step <= 20; ++step) {
    const Batch batch = batches.draw(step);
    EXPECT_LE(batch.ids.size(), 5000u);
    EXPECT_GT(batch.ids.size(), 4900u);
    for (const Piece& piece : batch.pieces) {
      EXPECT_LE(piece.length, 200);
      EXPECT_GE(piece.length, 50);
    }
  }
}

TEST(Batches, ShortRecordsAreSplitByRecord) {
  Examples all = many(100, 300);
  const Partition parts = partition(all, 0.1, 50, 200, 1);
  std::set<int64_t> trained, held;
  for (const Example& e : parts.train) trained.insert(e.record);
  for (const Example& e : parts.held_out) held.insert(e.record);
  EXPECT_EQ(held.size(), 10u);
  EXPECT_EQ(trained.size(), 90u);
  for (const int64_t record : held) EXPECT_EQ(trained.count(record), 0u);
}

TEST(Batches, AnEpochSeesEveryRecordOnceAndPacksThem) {
  const Examples all = many(97, 10);
  Batches batches(all, all.items, {.batch_tokens = 105, .reverse_complement = false});
  std::map<std::vector<int32_t>, int> seen;
  int drawn = 0;
  for (int step = 1; drawn < 2 * 97; ++step) {
    const Batch batch = batches.draw(step);
    EXPECT_EQ(batch.pieces.size(), 10u);  // ten records of 10 fit in 105
    for (size_t i = 0; i < batch.pieces.size() && drawn < 2 * 97; ++i, ++drawn) {
      const auto begin = batch.ids.begin() + batch.pieces[i].begin;
      const std::vector<int32_t> ids(begin, begin + batch.pieces[i].length);
      ++seen[ids];
    }
  }
  EXPECT_EQ(seen.size(), 97u);
  for (const auto& [ids, count] : seen) EXPECT_EQ(count, 2);
}

// A share of examples goes without its label; what is drawn of them is the same.
TEST(Batches, LabelsAreDropped) {
  Examples all = many(400, 30);
  Config config;
  config.audio.rate = 8000;
  config.condition = true;
  config.labels = {"a", "b", "c"};
  config.vocab = audio_vocabulary(config);
  for (Example& item : all.items) item.label = static_cast<int32_t>(item.record % 3);
  BatchOptions options{.objective = Objective::lm,
                       .batch_tokens = 12'000,
                       .reverse_complement = false,
                       .front = FrontEnd(config)};
  const auto labels_of = [&](double dropout, std::vector<int32_t>& tokens) {
    options.condition_dropout = dropout;
    const Batch batch = Batches(all, all.items, options).draw(1);
    std::vector<int64_t> counts(4);
    for (const Piece& piece : batch.pieces) {
      const auto label = batch.ids[piece.begin] / config.vocab;
      ++counts.at(label);
      for (int64_t i = 0; i < piece.length; ++i) {
        EXPECT_EQ(batch.ids[piece.begin + i] / config.vocab, label);
        tokens.push_back(static_cast<int32_t>(batch.ids[piece.begin + i] % config.vocab));
      }
    }
    return counts;
  };
  std::vector<int32_t> all_there, some, none;
  EXPECT_EQ(labels_of(0, all_there)[3], 0);
  EXPECT_NEAR(static_cast<double>(labels_of(0.25, some)[3]), 100, 30);
  EXPECT_EQ(labels_of(1, none)[3], 400);
  EXPECT_EQ(some, all_there);
  EXPECT_EQ(none, all_there);
}

TEST(Batches, TheSameFromTheSameCursor) {
  const Examples all = many(50, 30);
  for (const int64_t window : {0, 20}) {
    const BatchOptions options{
        .batch_tokens = 400, .min_length = window / 2, .max_length = window, .mutate = 0.1};
    Batches one(all, all.items, options), two(all, all.items, options);
    for (int step = 1; step <= 7; ++step) one.draw(step);
    two.epoch = one.epoch;
    two.next = one.next;
    for (int step = 8; step <= 12; ++step) EXPECT_EQ(one.draw(step).ids, two.draw(step).ids);
    EXPECT_NE(one.draw(13).ids, two.draw(14).ids);
  }
}

TEST(Batches, ClassesOfWindowsAreDrawnEvenly) {
  const Examples all = records({{100'000, 0}, {1'000, 1}});
  Batches batches(all, whole_records(all),
                  {.batch_tokens = 10'000, .min_length = 10, .max_length = 10});
  double ones = 0, count = 0;
  for (int step = 1; step <= 10; ++step)
    for (const int32_t target : batches.draw(step).targets) {
      ones += target;
      ++count;
    }
  EXPECT_NEAR(ones / count, 0.5, 0.03);
}

TEST(Batches, Augmentation) {
  Examples all = many(1, 20'000);
  const Codes forward = all.codes[0], reverse = reverse_complemented(forward);
  const auto equal = [](const std::vector<int32_t>& ids, const Codes& codes) {
    return std::equal(ids.begin(), ids.end(), codes.begin(), codes.end());
  };
  int forwards = 0, reverses = 0;
  Batches strands(all, all.items, {.batch_tokens = 20'000});
  for (int step = 1; step <= 40; ++step) {
    const Batch batch = strands.draw(step);
    forwards += equal(batch.ids, forward);
    reverses += equal(batch.ids, reverse);
  }
  EXPECT_EQ(forwards + reverses, 40);
  EXPECT_GT(forwards, 8);
  EXPECT_GT(reverses, 8);

  Batches mutated(all, all.items,
                  {.batch_tokens = 20'000, .reverse_complement = false, .mutate = 0.1});
  const Batch batch = mutated.draw(1);
  int changed = 0;
  for (size_t i = 0; i < forward.size(); ++i) {
    changed += batch.ids[i] != forward[i];
    EXPECT_TRUE(batch.ids[i] >= dna::kA && batch.ids[i] <= dna::kT);
  }
  EXPECT_NEAR(changed / 20'000.0, 0.1, 0.01);

  // Between two shares: another one for each sequence.
  Batches between(all, all.items,
                  {.batch_tokens = 20'000, .reverse_complement = false, .mutate_to = 0.2});
  std::vector<double> shares;
  for (int step = 1; step <= 40; ++step) {
    const Batch drawn = between.draw(step);
    int others = 0;
    for (size_t i = 0; i < forward.size(); ++i) others += drawn.ids[i] != forward[i];
    shares.push_back(others / 20'000.0);
  }
  const auto [least, most] = std::ranges::minmax(shares);
  EXPECT_LT(least, 0.03);
  EXPECT_GT(most, 0.17);
  EXPECT_LT(most, 0.21);
}

TEST(Batches, TargetsOfALanguageModel) {
  Batch batch;
  batch.add(parse("ACNGT"), -1, Objective::lm);
  EXPECT_EQ(batch.targets, (std::vector<int32_t>{dna::kC, -1, dna::kG, dna::kT, -1}));
}

TEST(Batches, ThinningIsEven) {
  const Examples all = many(1000, 10);
  const std::vector<Example> kept = thin(all.items, 2000);
  EXPECT_NEAR(static_cast<double>(kept.size()), 200, 1);
  for (size_t i = 1; i < kept.size(); ++i) EXPECT_LE(kept[i].record - kept[i - 1].record, 6);
  EXPECT_EQ(thin(all.items, 0).size(), 1000u);
  EXPECT_EQ(thin(all.items, 10'000).size(), 1000u);
}

}  // namespace
}  // namespace coil
