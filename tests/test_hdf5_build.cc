// Datasets are built, go on after a failure, and are found damaged where they are.
#include "pipelines/hdf5_build.h"

#include <cmath>
#include <numeric>

#include "pipelines/hdf5_verify.h"
#include "tests/hdf5_files.h"

namespace coil {
namespace {

BuildOptions options_for(const std::string& path) {
  return {.out = path, .part = 128 << 10, .threads = 2};
}

// A source that ends in an error after so many segments: a kill between two of them.
std::unique_ptr<Source> broken(std::unique_ptr<Source> source, int segments) {
  class Broken final : public Source {
   public:
    Broken(std::unique_ptr<Source> source, int left) : source_(std::move(source)), left_(left) {}
    bool next(Segment& segment) override {
      check(left_-- > 0, "broken off");
      return source_->next(segment);
    }

   private:
    std::unique_ptr<Source> source_;
    int left_;
  };
  return std::make_unique<Broken>(std::move(source), segments);
}

TEST(Hdf5Build, HoldsWhatWentIn) {
  const Folder folder;
  const std::string path = folder / "d.h5";
  const std::vector<Codes> records = some_records();
  EXPECT_FALSE(build_dataset(input_of(records), options_for(path)).stood);
  const Dataset dataset(path);
  EXPECT_EQ(dataset.records(), std::ssize(records));
  EXPECT_EQ(dataset.classes(), (std::vector<std::string>{"apple", "fig", "plum"}));
  const Dataset::Records all = dataset.read(0, dataset.records());
  EXPECT_EQ(all.labels, (std::vector<int32_t>{2, 0, -1, 1, 2, 0, -1, 1, 2, 0}));
  EXPECT_EQ(all.split, (std::vector<int8_t>{0, 1, 0, 1, 0, 1, 0, 1, 0, 1}));
  EXPECT_EQ(all.names[9], "r9");
  int64_t at = 0;
  for (size_t i = 0; i < records.size(); ++i) {
    EXPECT_EQ(all.offsets[i], at);
    at += std::ssize(records[i]);
  }
  EXPECT_EQ(dataset.size(), at);
  for (const char* left : {".parts", ".lock", ".tmp"})
    EXPECT_FALSE(std::filesystem::exists(path + left));
  EXPECT_TRUE(verify_dataset(path, 2).damages.empty());
  EXPECT_TRUE(build_dataset(input_of(records), options_for(path)).stood);
}

TEST(Hdf5Build, BrokenOffAnywhereItGoesOnToTheSameFile) {
  const Folder folder;
  const std::vector<Codes> records = some_records();
  for (const bool deflate : {true, false}) {
    const std::string whole = folder / (deflate ? "a.h5" : "b.h5"), path = folder / "d.h5";
    BuildOptions options = options_for(whole);
    options.deflate = deflate;
    build_dataset(input_of(records), options);
    options.out = path;
    int64_t continued = 0;
    for (int segments = 1; segments < 20; segments += 3) {
      BuildInput input = input_of(records);
      input.open = [open = input.open, segments](int64_t first) {
        return broken(open(first), segments);
      };
      const std::string error =
          error_of([&] { continued = build_dataset(input, options).continued; });
      if (error.empty()) break;
      EXPECT_EQ(error, "broken off");
      EXPECT_FALSE(std::filesystem::exists(path));
    }
    if (!std::filesystem::exists(path))
      continued = build_dataset(input_of(records), options).continued;
    EXPECT_GT(continued, 1);
    EXPECT_EQ(bytes_of(path), bytes_of(whole));
    std::filesystem::remove(path);
  }
}

TEST(Hdf5Build, DamagedAndMissingPartsAreFoundAndMadeAgain) {
  const Folder folder;
  const std::vector<Codes> records = some_records();
  const std::string whole = folder / "a.h5", path = folder / "d.h5";
  build_dataset(input_of(records), options_for(whole));
  BuildInput input = input_of(records);
  input.open = [open = input.open](int64_t first) { return broken(open(first), 14); };
  EXPECT_EQ(error_of([&] { build_dataset(input, options_for(path)); }), "broken off");
  EXPECT_TRUE(verify_dataset(path, 1).damages.empty());
  const std::string first = path + ".parts/00000000.part", second = path + ".parts/00000001.part";
  std::string bytes = bytes_of(second);
  bytes[bytes.size() / 2] ^= 1;
  write_bytes(second, bytes);
  EXPECT_EQ(verify_dataset(path, 1).damages,
            std::vector<std::string>{second + ": damaged or cut: its checksum is wrong"});
  std::filesystem::remove(first);
  EXPECT_EQ(verify_dataset(path, 1).damages.at(0), path + ".parts: part 0 is missing");
  build_dataset(input_of(records), options_for(path));
  EXPECT_EQ(bytes_of(path), bytes_of(whole));
}

TEST(Hdf5Build, OtherInputIsRefused) {
  const Folder folder;
  const std::string path = folder / "d.h5";
  std::vector<Codes> records = some_records();
  BuildInput input = input_of(records);
  input.open = [open = input.open](int64_t first) { return broken(open(first), 12); };
  EXPECT_EQ(error_of([&] { build_dataset(input, options_for(path)); }), "broken off");
  BuildOptions others = options_for(path);
  others.how = R"({"window":7})";
  EXPECT_NE(error_of([&] {
              build_dataset(input_of(records), others);
            }).find("options/window (none then, 7 now)"),
            std::string::npos);
  records[2][5] = static_cast<uint8_t>(records[2][5] % 4 + 1);  // what only a checksum tells
  EXPECT_NE(error_of([&] {
              build_dataset(input_of(records), options_for(path));
            }).find("was begun with other input: what is read now differs from part 0"),
            std::string::npos);
  build_dataset(input_of(some_records()), options_for(path));
  EXPECT_NE(error_of([&] {
              build_dataset(input_of(records), others);
            }).find("exists and was made from other input or options"),
            std::string::npos);
}

TEST(Hdf5Build, VerifyFindsFlippedBytesAndCuts) {
  const Folder folder;
  const std::string path = folder / "d.h5";
  build_dataset(input_of({random_codes(300, 1), random_codes(20, 2)}), options_for(path));
  const std::string whole = bytes_of(path);
  // COIL_EVERY_BYTE: all of them, which takes minutes.
  const size_t step = std::getenv("COIL_EVERY_BYTE") ? 1 : 97;
  for (size_t i = 0; i < whole.size(); i += i < 512 ? 1 : step) {
    std::string changed = whole;
    changed[i] = static_cast<char>(changed[i] ^ (1 << i % 8));
    write_bytes(path, changed);
    EXPECT_FALSE(verify_dataset(path, 1).damages.empty()) << "byte " << i;
  }
  for (size_t i = 0; i < whole.size(); i += 997) {
    write_bytes(path, whole.substr(0, i));
    EXPECT_FALSE(verify_dataset(path, 1).damages.empty()) << "cut to " << i;
  }
  write_bytes(path, whole + "x");
  EXPECT_FALSE(verify_dataset(path, 1).damages.empty());
  write_bytes(path, whole);
  EXPECT_TRUE(verify_dataset(path, 1).damages.empty());
}

TEST(Hdf5Build, SplitsKeepGroupsAndShares) {
  const std::vector<double> shares{8, 1, 1};
  std::vector<int> counts(3);
  for (int i = 0; i < 10'000; ++i) {
    const std::string group = fmt::format("genome{}", i);
    const int8_t split = draw_split(group, shares, 5);
    EXPECT_EQ(split, draw_split(group, shares, 5));
    ++counts[static_cast<size_t>(split)];
  }
  EXPECT_NEAR(counts[0], 8000, 200);
  EXPECT_NEAR(counts[1], 1000, 150);
  EXPECT_EQ(draw_split("x", {}, 1), -1);
}

}  // namespace
}  // namespace coil
