// The scheduler of classify and score: what it hands out, in which batches, and in which order
// answers come back.
#include "pipelines/stream.h"

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "pipelines/workers.h"
#include "tests/records.h"

namespace coil {
namespace {

// What a stream hands out, put together again and checked against the rules of a batch.
struct Read {
  std::vector<Stream::Unit> units;
  std::map<std::pair<std::string, int64_t>, std::vector<Codes>> strands;  // by name and begin
};

Read read_all(Source& source, const StreamOptions& options, int parallel = 1) {
  Read read;
  Stream stream(source, options, parallel);
  std::vector<Stream::Batch> batches(parallel);
  Stream::Unit unit;
  const auto backend = make_cpu_backend(1);
  std::map<int32_t, int64_t> in_slot;  // steps that the state in a slot has seen
  std::map<int32_t, Codes> carried;
  std::map<int32_t, int32_t> follower;  // the code promised to come next
  while (const int filled = stream.next(batches)) {
    std::set<int32_t> slots;  // that batches of this turn touch
    for (int b = 0; b < filled; b++) {
      const Stream::Batch& batch = batches[b];
      const Rows rows(*backend, batch.pieces);  // throws where the pieces break a rule
      EXPECT_LE(rows.total(), options.batch);
      EXPECT_LE(rows.slots(), stream.slots());
      EXPECT_EQ(rows.total(), static_cast<int64_t>(batch.ids.size()));
      EXPECT_EQ(rows.total(), static_cast<int64_t>(batch.next.size()));
      for (size_t i = 0; i < batch.pieces.size(); i++) {
        const Piece& piece = batch.pieces[i];
        if (piece.from >= 0) {
          EXPECT_TRUE(slots.insert(piece.from).second);
        }
        if (piece.to >= 0 && piece.to != piece.from) {
          EXPECT_TRUE(slots.insert(piece.to).second);
        }
        if (options.chunk > 0) {
          EXPECT_LE(piece.length, options.chunk);
        }
        Codes codes;
        if (piece.from >= 0) {
          codes = carried.at(piece.from);
          EXPECT_EQ(follower.at(piece.from), batch.ids[piece.begin]);
        }
        EXPECT_EQ(static_cast<int64_t>(codes.size()), piece.position);
        for (int64_t row = piece.begin; row < piece.begin + piece.length; row++) {
          codes.push_back(static_cast<uint8_t>(batch.ids[row]));
          if (row + 1 < piece.begin + piece.length) {
            EXPECT_EQ(batch.next[row], batch.ids[row + 1]);
          }
        }
        const int32_t next = batch.next[piece.begin + piece.length - 1];
        if (piece.last) {
          EXPECT_EQ(next, -1);
          EXPECT_EQ(piece.to, -1);
          const Stream::Unit& owner = *batch.units[i];
          read.strands[{owner.name, owner.begin}].push_back(std::move(codes));
        } else {
          EXPECT_GE(piece.to, 0);
          follower[piece.to] = next;
          carried[piece.to] = std::move(codes);
        }
      }
    }
    while (stream.pop(unit)) read.units.push_back(std::move(unit));
  }
  return read;
}

TEST(Stream, HandsOutEveryCodeOfBothStrandsInOrder) {
  std::vector<Codes> records;
  for (int i = 0; i < 120; i++) {
    records.push_back(random_codes(i % 17 == 5 ? 3000 + 37 * i : 1 + (i * i * 7) % 180, i));
  }
  for (const Strands strands : {Strands::both, Strands::forward, Strands::reverse}) {
    for (const int64_t run : {1, 50, 1000, 65536}) {
      for (const auto& [batch, chunk] :
           {std::pair{1, 1}, {7, 7}, {64, 5}, {512, 512}, {512, 1}, {100'000, 100'000}}) {
        Records source(records, run);
        const int parallel = 1 + static_cast<int>(batch) % 3;
        const Read read =
            read_all(source, {.strands = strands, .batch = batch, .chunk = chunk}, parallel);
        ASSERT_EQ(read.units.size(), records.size());
        for (size_t i = 0; i < records.size(); i++) {
          const Stream::Unit& unit = read.units[i];
          ASSERT_EQ(unit.name, fmt::format("r{}", i));
          ASSERT_EQ(unit.begin, 0);
          ASSERT_EQ(unit.end, static_cast<int64_t>(records[i].size()));
          std::vector<Codes> expected;
          if (strands != Strands::reverse) expected.push_back(records[i]);
          if (strands != Strands::forward) expected.push_back(reverse_complemented(records[i]));
          std::vector<Codes> got = read.strands.at({unit.name, 0});
          std::sort(got.begin(), got.end());
          std::sort(expected.begin(), expected.end());
          ASSERT_EQ(got, expected) << "run " << run << " batch " << batch << " chunk " << chunk;
        }
      }
    }
  }
}

TEST(Stream, BatchIsFilledWhileThereIsInput) {
  std::vector<Codes> records;
  for (int i = 0; i < 1000; i++) records.push_back(random_codes(1 + i % 150, i));
  Records source(records);
  Stream stream(source, {.batch = 1024});
  std::vector<Stream::Batch> batches(1);
  Stream::Unit unit;
  int64_t rows = 0, short_batches = 0;
  while (stream.next(batches)) {
    const Stream::Batch& batch = batches[0];
    rows += static_cast<int64_t>(batch.ids.size());
    short_batches += batch.ids.size() < 1024;
    while (stream.pop(unit)) {
    }
  }
  EXPECT_EQ(short_batches, rows % 1024 != 0);
  EXPECT_EQ(stream.steps(), rows);
  EXPECT_LT(stream.fraction(), 0);  // the source cannot tell
}

TEST(Stream, AnswersWaitForThoseBeforeThemInABoundedWindow) {
  // The first record moves on three steps at a time while thousands of short ones pass it.
  std::vector<Codes> records{random_codes(30'000, 1)};
  for (int i = 0; i < 9000; i++) records.push_back(random_codes(2, i));
  Records source(records);
  Stream stream(source, {.strands = Strands::forward, .batch = 64, .chunk = 3});
  std::vector<Stream::Batch> batches(1);
  Stream::Unit unit;
  int64_t expected = 0, begun = 0;
  while (stream.next(batches)) {
    const Stream::Batch& batch = batches[0];
    for (const Piece& piece : batch.pieces) begun += piece.position == 0;
    EXPECT_LE(begun - expected, Stream::kWindow);
    while (stream.pop(unit)) EXPECT_EQ(unit.record, expected++);
  }
  EXPECT_EQ(expected, 9001);
}

// A long record of which every code taken is counted.
class Endless final : public Source {
 public:
  bool next(Segment& segment) override {
    segment =
        Segment{.position = taken, .first = taken == 0, .name = "long", .codes = Codes(1000, 1)};
    taken += 1000;
    return true;
  }
  int64_t taken = 0;
};

TEST(Stream, AForwardStrandIsReadNoFasterThanItIsComputed) {
  for (const int64_t chunk : {1, 100, 1000}) {
    Endless source;
    Stream stream(source, {.strands = Strands::forward, .batch = 1000, .chunk = chunk}, 2);
    std::vector<Stream::Batch> batches(2);
    for (int turn = 0; turn < 50; turn++) {
      ASSERT_EQ(stream.next(batches), 1);
      EXPECT_EQ(static_cast<int64_t>(batches[0].ids.size()), chunk);
      EXPECT_LE(source.taken - stream.steps(), 2000);
    }
  }
}

TEST(Stream, TheStrandsOfALongRecordAreSideBySide) {
  Records source({random_codes(10'000, 1), random_codes(10'000, 2)}, 999);
  Stream stream(source, {.batch = 500}, 2);
  std::vector<Stream::Batch> batches(2);
  for (int turn = 0; turn < 40; turn++) {
    ASSERT_EQ(stream.next(batches), 2);
    for (const Stream::Batch& batch : batches) {
      ASSERT_EQ(batch.pieces.size(), 1u);
      EXPECT_EQ(batch.units[0]->record, turn / 20);
      EXPECT_EQ(batch.pieces[0].position, turn % 20 * 500);
    }
    EXPECT_EQ(batches[0].units[0], batches[1].units[0]);
    Stream::Unit unit;
    while (stream.pop(unit)) {
    }
  }
  EXPECT_EQ(stream.next(batches), 0);
}

TEST(Workers, EachIsCalledOnceWithItsShareOfTheThreads) {
  const auto backend = make_cpu_backend(5);
  Workers workers(*backend);
  ASSERT_EQ(workers.count(), 5);
  for (int round = 0; round < 200; round++) {
    const int n = 1 + round % 5;
    std::vector<int> calls(5), threads(5);
    workers.run(n, [&](int i, Backend& own) {
      calls[i] += 1;
      threads[i] = own.threads();
    });
    for (int i = 0; i < 5; i++) {
      EXPECT_EQ(calls[i], i < n);
      EXPECT_EQ(threads[i], i < n ? 5 / n : 0);
    }
  }
}

TEST(Workers, ErrorsOfAnyOfThemAreThrownAfterAllAreDone) {
  const auto backend = make_cpu_backend(3);
  Workers workers(*backend);
  for (const int bad : {0, 1, 2}) {
    std::vector<int> calls(3);
    const auto work = [&](int i, Backend&) {
      calls[i] += 1;
      check(i != bad, "worker {}", i);
    };
    EXPECT_THROW(workers.run(3, work), Error);
    EXPECT_EQ(calls, std::vector<int>(3, 1));
  }
  EXPECT_NO_THROW(workers.run(3, [](int, Backend&) {}));
}

TEST(Stream, WindowsOfARecord) {
  const Codes codes = random_codes(1049, 5);
  struct Case {
    int64_t window, stride, length;
    std::vector<std::pair<int64_t, int64_t>> expected;  // begin, end
  };
  const std::vector<Case> cases = {
      {100, 0, 250, {{0, 100}, {100, 200}, {200, 250}}},  // exactly half a window is kept
      {100, 0, 249, {{0, 100}, {100, 200}}},              // less is not
      {100, 50, 260, {{0, 100}, {50, 150}, {100, 200}, {150, 250}, {200, 260}}},
      {100, 200, 450, {{0, 100}, {200, 300}, {400, 450}}},
      {100, 0, 30, {{0, 30}}},  // the only one of its record
      {1000, 0, 1049, {{0, 1000}}},
      {5000, 10, 1049, {{0, 1049}}},
  };
  for (const Case& c : cases) {
    for (const int64_t run : {1, 33, 65536}) {
      const Codes record(codes.begin(), codes.begin() + c.length);
      Records source({record, record}, run);
      const Read read = read_all(source, {.window = c.window, .stride = c.stride, .batch = 64});
      ASSERT_EQ(read.units.size(), 2 * c.expected.size());
      int64_t fresh = 0;
      for (size_t i = 0; i < read.units.size(); i++) {
        const auto& [begin, end] = c.expected[i % c.expected.size()];
        const Stream::Unit& unit = read.units[i];
        EXPECT_EQ(unit.record, static_cast<int64_t>(i / c.expected.size()));
        EXPECT_EQ(unit.begin, begin);
        EXPECT_EQ(unit.end, end);
        fresh += unit.fresh;
        const Codes part(record.begin() + begin, record.begin() + end);
        std::vector<Codes> expected{part, reverse_complemented(part)};
        std::vector<Codes> got = read.strands.at({unit.name, begin});
        std::sort(got.begin(), got.end());
        std::sort(expected.begin(), expected.end());
        EXPECT_EQ(got, expected);
      }
      if (c.stride <= c.window) {
        EXPECT_EQ(fresh, 2 * c.expected.back().second);
      }
    }
  }
}

TEST(Stream, ChainCountsRecordsAndFilesThrough) {
  const auto source = chain(3, [](size_t i) -> std::unique_ptr<Source> {
    return std::make_unique<Records>(std::vector<Codes>(i + 1, random_codes(10, i)), 4);
  });
  std::vector<std::pair<int64_t, int64_t>> seen;
  Segment segment;
  while (source->next(segment)) {
    if (segment.first) seen.emplace_back(segment.file, segment.record);
  }
  const std::vector<std::pair<int64_t, int64_t>> expected{{0, 0}, {1, 1}, {1, 2},
                                                          {2, 3}, {2, 4}, {2, 5}};
  EXPECT_EQ(seen, expected);
}

TEST(Stream, AutoBatchShrinksWithTheNetwork) {
  Config small, large;
  small.d = 64, small.e = 128;
  large.d = 1024, large.e = 2048;
  EXPECT_GT(auto_batch(small, Device{}), auto_batch(large, Device{}));
  EXPECT_GE(auto_batch(large, Device{}), 64);
}

}  // namespace
}  // namespace coil
