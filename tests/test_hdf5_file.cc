// Columns of HDF5 files: written, read, checked.
#include <numeric>

#include "pipelines/hdf5_reader.h"
#include "tests/hdf5_files.h"

namespace coil {
namespace {

using hdf5::Layout;
using hdf5::Type;

TEST(Hdf5File, ColumnsComeBackAsTheyWere) {
  const Folder folder;
  const std::string path = folder / "a.h5";
  std::vector<int64_t> numbers(20'001);
  std::iota(numbers.begin(), numbers.end(), -5);
  std::vector<float> matrix(1'001 * 33);
  for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = 0.25f * static_cast<float>(i);
  std::vector<float> wide(3 * 20'000, 1.5f);  // a row longer than a chunk
  for (const bool deflate : {true, false}) {
    hdf5::Writer file(path);
    file.attribute("schema", std::string("test"));
    file.attribute("version", 7);
    file.group("g");
    const auto write = [&](const char* name, Layout layout, const auto& values) {
      layout.deflate = deflate;
      const auto column = file.column(name, layout);
      const auto* at = reinterpret_cast<const uint8_t*>(values.data());
      for (int64_t row = 0; row < layout.rows;) {  // in pieces
        const int64_t count = std::min<int64_t>(layout.rows - row, 1 + row / 2);
        column->append(at + row * layout.row_bytes(), count);
        row += count;
      }
      column->close();
    };
    write("numbers", {.type = Type::i64, .rows = 20'001}, numbers);
    write("g/matrix", {.type = Type::f32, .rows = 1'001, .columns = 33}, matrix);
    write("wide", {.type = Type::f32, .rows = 3, .columns = 20'000}, wide);
    write("none", {.type = Type::i32, .rows = 0}, std::vector<int32_t>());
    file.texts("texts", {"a", "", "Größe"});
    file.seal();
    EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));

    const hdf5::Reader reader(path);
    EXPECT_EQ(reader.text_attribute("schema"), "test");
    EXPECT_EQ(reader.number_attribute("version"), 7);
    EXPECT_EQ(reader.texts("texts"), (std::vector<std::string>{"a", "", "Größe"}));
    std::vector<int64_t> some(100);
    const auto column = reader.column("numbers", Type::i64);
    column->read(10'000, 100, some.data());
    EXPECT_TRUE(std::equal(some.begin(), some.end(), numbers.begin() + 10'000));
    EXPECT_EQ(column->crc(), column->crc_of_rows());
    std::vector<float> back(matrix.size());
    reader.column("g/matrix", Type::f32, true)->read(0, 1'001, back.data());
    EXPECT_EQ(back, matrix);
    back.resize(wide.size());
    reader.column("wide", Type::f32, true)->read(0, 3, back.data());
    EXPECT_EQ(back, wide);
    EXPECT_EQ(reader.column("none", Type::i32)->rows(), 0);
    EXPECT_EQ(reader.columns().size(), 5u);
  }
}

TEST(Hdf5File, MadeAgainItIsTheSame) {
  const Folder folder;
  for (const char* name : {"a.h5", "b.h5"}) {
    hdf5::Writer file(folder / name);
    file.texts("texts", {"one", "two"});
    file.attribute("schema", std::string("test"));
    file.seal();
  }
  EXPECT_EQ(bytes_of(folder / "a.h5"), bytes_of(folder / "b.h5"));
}

TEST(Hdf5File, ErrorsNameTheFileAndWhatWasFound) {
  const Folder folder;
  const std::string path = folder / "a.h5";
  const auto open = [&](const std::string& file) {
    return error_of([&] { hdf5::Reader reader(file); });
  };
  write_bytes(path, "no HDF5");
  EXPECT_EQ(open(path), path + ": is not HDF5");
  write_bytes(path, "");
  EXPECT_EQ(open(path), path + ": is not HDF5");
  EXPECT_EQ(open(folder / "none"), (folder / "none") + ": cannot open: No such file or directory");
  EXPECT_NE(open("/tmp").find("is a folder"), std::string::npos);
  {
    hdf5::Writer file(path);
    file.texts("texts", {"one"});
    const auto column = file.column("x", {.type = Type::f64, .rows = 1});
    const double one = 1;
    column->append(&one, 1);
    column->close();
    file.seal();
  }
  const std::string whole = bytes_of(path);
  write_bytes(path, whole.substr(0, 1000));
  EXPECT_NE(open(path).find(path + ": truncated: it has 1000 bytes"), std::string::npos);
  write_bytes(path, whole.substr(512, 1500));  // without the first block: HDF5's own check
  EXPECT_NE(open(path).find("truncated"), std::string::npos) << open(path);
  write_bytes(path, whole);
  const hdf5::Reader reader(path);
  const auto column = [&](const char* name, Type type, bool matrix = false) {
    return error_of([&] { reader.column(name, type, matrix); });
  };
  EXPECT_EQ(column("x", Type::i32), path + ": 'x' is float64, expected int32");
  EXPECT_EQ(column("x", Type::text), path + ": 'x' is float64, expected text");
  EXPECT_EQ(column("x", Type::f64, true), path + ": 'x' has 1 dimensions, expected 2");
  EXPECT_EQ(column("y", Type::i32), path + ": has no dataset 'y'");
  EXPECT_EQ(error_of([&] { reader.text_attribute("schema"); }),
            path + ": has no attribute 'schema'");
}

TEST(Hdf5File, AFileThatWasNotFinishedLeavesNothing) {
  const Folder folder;
  const std::string path = folder / "a.h5";
  write_bytes(path, "old");
  { hdf5::Writer file(path); }
  EXPECT_EQ(bytes_of(path), "old");
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
  EXPECT_NE(error_of([] { hdf5::Writer file("/proc/a.h5"); }).find("cannot write '/proc/a.h5.tmp'"),
            std::string::npos);
}

}  // namespace
}  // namespace coil
