// Datasets are read as they were written, by everything that reads them; others are refused.
#include "pipelines/hdf5_read.h"

#include <numeric>
#include <set>

#include "tests/hdf5_files.h"

namespace coil {
namespace {

std::shared_ptr<const Dataset> built(const std::string& path, const std::vector<Codes>& records,
                                     const CodesOf& what = {}) {
  build_dataset(input_of(records, what), {.out = path, .part = 256 << 10, .threads = 2});
  return std::make_shared<const Dataset>(path);
}

TEST(Hdf5Read, TheStreamIsTheRecords) {
  const Folder folder;
  const std::vector<Codes> records = some_records();
  const auto dataset = built(folder / "d.h5", records);
  for (const int64_t memory : {int64_t{1}, int64_t{16} << 20}) {
    const auto source = open_dataset(dataset, {.threads = 2, .memory = memory});
    Codes codes;
    int64_t record = 0;
    for (Segment segment; source->next(segment);) {
      EXPECT_EQ(segment.record, record);
      EXPECT_EQ(segment.position, std::ssize(codes));
      EXPECT_LE(std::ssize(segment.codes), Source::kRun);
      EXPECT_FALSE(segment.codes.empty());
      EXPECT_EQ(segment.name, segment.first ? fmt::format("r{}", record) : "");
      codes.insert(codes.end(), segment.codes.begin(), segment.codes.end());
      if (!segment.last) continue;
      EXPECT_EQ(codes, records[static_cast<size_t>(record)]);
      codes.clear();
      ++record;
    }
    EXPECT_EQ(record, std::ssize(records));
    EXPECT_DOUBLE_EQ(source->fraction(), 1);
  }
}

TEST(Hdf5Read, SixteenBitsComeBack) {
  const Folder folder;
  std::vector<Codes> records;
  for (const int64_t length : {2, 4, 65'536, 65'538, 300'000}) {  // codes, two of a sample
    Codes codes(static_cast<size_t>(length));
    Philox random(3, 4, static_cast<uint64_t>(length));
    for (uint8_t& code : codes) code = static_cast<uint8_t>(random.next());
    records.push_back(codes);
  }
  const auto dataset =
      built(folder / "d.h5", records, {.rate = 8000, .encoding = SampleCodes::pcm16});
  EXPECT_EQ(dataset->size(), (2 + 4 + 65'536 + 65'538 + 300'000) / 2);
  EXPECT_EQ(read_datasets({dataset}, {}).codes, records);
  // As samples: s = 256 high + low - 32768.
  const auto column = dataset->reader().column("codes", hdf5::Type::i16);
  int16_t sample = 0;
  column->read(0, 1, &sample);
  EXPECT_EQ(sample, records[0][0] * 256 + records[0][1] - 32768);
}

TEST(Hdf5Read, SplitsLabelsAndTheFirst) {
  const Folder folder;
  const std::vector<Codes> records = some_records();
  const auto dataset = built(folder / "d.h5", records);
  const Examples odd = read_datasets({dataset}, {.split = "validation"});
  ASSERT_EQ(odd.codes.size(), 5u);
  for (size_t i = 0; i < 5; ++i) EXPECT_EQ(odd.codes[i], records[2 * i + 1]);
  EXPECT_EQ(read_datasets({dataset}, {.most = 3}).codes.size(), 3u);
  // The model's order of labels, which is another one.
  const Examples known = read_datasets(
      {dataset}, {.split = "validation", .labelled = true, .labels = {"fig", "plum", "apple"}});
  EXPECT_EQ(known.items[0].label, 2);
  EXPECT_EQ(known.items[1].label, 0);
  EXPECT_NE(error_of([&] {
              read_datasets({dataset},
                            {.split = "validation", .labelled = true, .labels = {"fig"}});
            }).find("record 'r1' has label 'apple', which is not one of the model's"),
            std::string::npos);
  EXPECT_NE(error_of([&] {
              read_datasets({dataset}, {.labelled = true});
            }).find("record 'r2' has no label"),
            std::string::npos);
  EXPECT_NE(error_of([&] {
              read_datasets({dataset}, {.split = "test"});
            }).find("no records in split test"),
            std::string::npos);
  EXPECT_NE(error_of([&] {
              read_datasets({dataset}, {.split = "dev"});
            }).find("has no split 'dev'; it has train, validation, test"),
            std::string::npos);
}

TEST(Hdf5Read, ADamagedChunkIsAnError) {
  const Folder folder;
  const std::string path = folder / "d.h5";
  built(path, some_records());
  std::string bytes = bytes_of(path);
  // In the middle of the file, where codes are.
  bytes[bytes.size() / 3] ^= 0x20;
  write_bytes(path, bytes);
  const auto dataset = std::make_shared<const Dataset>(path);
  EXPECT_NE(error_of([&] { read_datasets({dataset}, {}); }).find("damaged: chunk"),
            std::string::npos);
}

TEST(Hdf5Read, ShuffledWindowsAreOfTheRecordsEachPlaceOnce) {
  const Folder folder;
  std::vector<Codes> records;
  for (int64_t i = 0; i < 40; ++i) records.push_back(random_codes(1 + i * i * 2'500, 9 + i));
  const auto dataset = built(folder / "d.h5", records);
  std::vector<std::vector<int64_t>> orders;
  for (const int64_t pass : {0, 0, 1}) {
    ShuffledWindows windows(*dataset, 4096, 7, pass, {.threads = 2, .memory = 4 << 20});
    std::set<std::pair<int64_t, int64_t>> seen;
    std::vector<int64_t> order;
    int64_t codes = 0;
    for (ShuffledWindows::Window window; windows.next(window);) {
      const Codes& record = records[static_cast<size_t>(window.record)];
      ASSERT_LE(window.begin + window.length, std::ssize(record));
      ASSERT_TRUE(
          std::equal(window.bytes.begin(), window.bytes.end(), record.begin() + window.begin));
      EXPECT_EQ(std::ssize(window.bytes), window.length);
      EXPECT_TRUE(window.length == 4096 || window.length == std::ssize(record));
      EXPECT_TRUE(seen.insert({window.record, window.begin}).second);
      order.push_back(window.record * 10'000'000 + window.begin);
      codes += window.length;
    }
    // All but what the borders of records and blocks cut off.
    EXPECT_GT(static_cast<double>(codes), 0.97 * static_cast<double>(dataset->size()));
    EXPECT_FALSE(std::is_sorted(order.begin(), order.end()));
    orders.push_back(order);
  }
  EXPECT_EQ(orders[0], orders[1]);
  EXPECT_NE(orders[0], orders[2]);
}

// A dataset with one thing wrong.
struct Wrong {
  std::string schema = kDatasetSchema;
  int64_t version = kDatasetVersion;
  std::vector<int64_t> offsets{0, 3, 5};
  hdf5::Type labels = hdf5::Type::i32;
  bool checksums = true;
  std::string alphabet = "dna";
};

void write(const std::string& path, const Wrong& wrong) {
  using hdf5::Type;
  hdf5::Writer file(path);
  if (!wrong.schema.empty()) file.attribute("schema", wrong.schema);
  file.attribute("version", wrong.version);
  file.attribute("alphabet", wrong.alphabet);
  const auto put = [&](const char* name, Type type, int64_t rows, const void* from) {
    const auto column = file.column(name, {.type = type, .rows = rows});
    column->append(from, rows);
    column->close();
  };
  Codes codes{1, 2, 3, 4, 1};
  put("codes", Type::u8, 5, codes.data());
  put("offsets", Type::i64, std::ssize(wrong.offsets), wrong.offsets.data());
  const std::vector<int64_t> none(4, 0);
  put("starts", Type::i64, 2, none.data());
  put("labels", wrong.labels, 2, none.data());
  put("split", Type::i8, 2, none.data());
  codes.resize(hdf5::kChunkBytes);
  const uint32_t crc = hdf5::crc32(codes);
  if (wrong.checksums) put("checksums", Type::u32, 1, &crc);
  file.texts("names", {"a", "b"});
  file.texts("classes", {"x"});
  file.texts("splits", {"train"});
  file.seal();
}

TEST(Hdf5Read, WhatIsNoDatasetOfThisVersionIsRefused) {
  const Folder folder;
  const std::string path = folder / "d.h5";
  const auto error = [&](const Wrong& wrong) {
    write(path, wrong);
    return error_of([&] { Dataset dataset(path); });
  };
  EXPECT_EQ(error({}), "");
  EXPECT_EQ(error({.schema = ""}),
            path + ": is HDF5, but no dataset of coil's: it has no attribute 'schema'");
  EXPECT_EQ(error({.schema = "loom"}), path + ": its schema is 'loom', expected 'coil dataset'");
  EXPECT_EQ(error({.version = 2}), path + ": version 2 of the schema, expected at most 1");
  EXPECT_EQ(error({.offsets = {0, 3, 2}}),
            path + ": offsets go backwards: record 1 ends at 2, before 3");
  EXPECT_EQ(error({.offsets = {0, 3, 9}}),
            path + ": offsets go past the end: record 1 ends at 9 of 5");
  EXPECT_EQ(error({.offsets = {0, 3, 4}}), path + ": offsets end at 4, codes at 5");
  EXPECT_EQ(error({.offsets = {1, 3, 5}}), path + ": offsets begin at 1, expected 0");
  EXPECT_EQ(error({.offsets = {0, 0, 5}}), path + ": offsets: record 0 is empty");
  EXPECT_EQ(error({.offsets = {0, 5}}), path + ": 'offsets' has 2 rows, expected 3");
  EXPECT_EQ(error({.labels = hdf5::Type::f64}), path + ": 'labels' is float64, expected int32");
  EXPECT_EQ(error({.checksums = false}), path + ": has no dataset 'checksums'");
  EXPECT_EQ(error({.alphabet = "protein"}), path + ": alphabet 'protein', expected dna or audio");
}

}  // namespace
}  // namespace coil
