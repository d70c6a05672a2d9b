// The safetensors reader on good, lying and truncated files; the writer read back, alone and in
// shards.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>

#include "kernels/error.h"
#include "model/atomic_file.h"
#include "model/safetensors.h"

namespace coil {
namespace {

namespace fs = std::filesystem;

class SafetensorsTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "coil-safetensors-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }

  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream(path(name), std::ios::binary) << bytes;
    return path(name);
  }
  // A file of this header and so many data bytes 0, 1, 2, …
  std::string write_tensors(const std::string& header, size_t data_bytes) const {
    std::string data(data_bytes, '\0');
    for (size_t i = 0; i < data_bytes; ++i) data[i] = static_cast<char>(i);
    return write("x.safetensors", with_length(header) + data);
  }
  static std::string with_length(const std::string& header) {
    const uint64_t length = header.size();
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    return bytes + header;
  }

  fs::path folder_;
};

template <class Action>
std::string message_of(Action action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    return error.what();
  }
  return "no error";
}

std::string parse_error(const std::string& header, int64_t data_bytes) {
  return message_of([&] { parse_safetensors_header(header, data_bytes, "file"); });
}

template <class T>
View view_of(std::vector<T>& values, DType dtype, std::initializer_list<int64_t> shape) {
  return host_view(values.data(), dtype, shape);
}

TEST_F(SafetensorsTest, HeaderIsParsed) {
  const auto tensors = parse_safetensors_header(
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F16","shape":[2,3],"data_offsets":[4,16]},)"
      R"("a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"none":{"dtype":"U8","shape":[0,7],"data_offsets":[4,4]}}  )",
      16, "file");
  ASSERT_EQ(tensors.size(), 3u);
  EXPECT_EQ(tensors.at("b").type, FileType::F16);
  EXPECT_EQ(tensors.at("b").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(tensors.at("b").begin, 4);
  EXPECT_EQ(tensors.at("b").end, 16);
  EXPECT_TRUE(tensors.at("a").shape.empty());
  EXPECT_EQ(tensors.at("none").end, 4);
}

struct BadHeader {
  const char* header;
  int64_t data_bytes;
  const char* expected;  // part of the message
};

TEST_F(SafetensorsTest, LyingHeadersAreRefusedByName) {
  const BadHeader cases[] = {
      {"", 0, "not valid JSON"},
      {"[1,2]", 0, "must be a JSON object"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)", 4, "not valid JSON"},
      {R"({"a":3})", 0, "expected an object with dtype, shape and data_offsets"},
      {R"({"a":{"dtype":"F32","shape":[1]}})", 4, "expected an object"},
      {R"({"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}})", 1,
       R"(tensor "a": unknown dtype "F8_E4M3")"},
      {R"({"a":{"dtype":7,"shape":[1],"data_offsets":[0,1]}})", 1, "unknown dtype 7"},
      {R"({"a":{"dtype":"F32","shape":3,"data_offsets":[0,4]}})", 4, "shape must be a list"},
      {R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, "whole numbers"},
      {R"({"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}})", 4, "whole numbers"},
      {R"({"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}})", 4,
       "whole numbers"},
      {R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}})", 4,
       "past 2^63 bytes"},
      {R"({"a":{"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,4]}})", 4,
       "past 2^63 bytes"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}})", 4, "[begin, end]"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4, "end before they begin"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}})", 4, "whole numbers"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 4,
       "the file has only 4: truncated?"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[9223372036854775803,9223372036854775807]}})",
       4, "truncated?"},
      {R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}})", 8,
       "needs 12 bytes, data_offsets span 8"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})",
       6, R"(tensors "a" and "b" overlap)"},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2],"data_offsets":[6,8]}})",
       8, "2 bytes before tensor \"b\""},
      {R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", 9,
       "5 bytes after the last tensor"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})",
       1, R"("a" is there twice)"},
      {R"({"__metadata__":{"x":1}})", 0, "must be a string"},
      {R"({"__metadata__":3})", 0, "__metadata__ must be an object"},
      {R"({"a\nb":{"dtype":"X","shape":[],"data_offsets":[0,0]}})", 0, R"(tensor "a\nb")"},
      {"{\"\xff\":{}}", 0, "not valid JSON"},
  };
  for (const BadHeader& bad : cases) {
    const std::string message = parse_error(bad.header, bad.data_bytes);
    EXPECT_NE(message.find(bad.expected), std::string::npos)
        << bad.header << "\n gave: " << message;
    EXPECT_EQ(message.find("file"), 0u) << message;
  }
}

TEST_F(SafetensorsTest, DeepNestingIsRefused) {
  const std::string deep = std::string(1'000'000, '[') + std::string(1'000'000, ']');
  EXPECT_NE(parse_error("{\"a\":" + deep + "}", 0).find("nested deeper"), std::string::npos);
}

TEST_F(SafetensorsTest, NotEvenAHeader) {
  EXPECT_NE(message_of([&] { SafetensorsReader reader(path("absent")); }).find("No such file"),
            std::string::npos);
  EXPECT_NE(
      message_of([&] { SafetensorsReader reader(write("short", "1234567")); }).find("7 bytes"),
      std::string::npos);
  EXPECT_NE(message_of([&] {
              SafetensorsReader reader(write("text", "this is some text\n"));
            }).find("header length"),
            std::string::npos);
  EXPECT_NE(message_of([&] {
              SafetensorsReader reader(write("cut", with_length("{}").substr(0, 9)));
            }).find("truncated"),
            std::string::npos);
  EXPECT_NE(
      message_of([&] { SafetensorsReader reader(folder_.string()); }).find("no model.safetensors"),
      std::string::npos);
}

TEST_F(SafetensorsTest, EveryTruncationOfAFileIsRefused) {
  std::vector<float> values = {1, 2, 3, 4, 5, 6};
  const NamedView tensor{"a", view_of(values, DType::f32, {2, 3})};
  write_safetensors(path("whole"), {&tensor, 1});
  std::ifstream in(path("whole"), std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(in), {}};
  for (size_t length = 0; length < bytes.size(); ++length) {
    const std::string cut = write("cut", bytes.substr(0, length));
    EXPECT_NE(message_of([&] { SafetensorsReader reader(cut); }), "no error") << "at " << length;
  }
}

TEST_F(SafetensorsTest, HalfFloatsOfEveryBitPatternAreExact) {
  std::string data(1 << 17, '\0');
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    data[2 * bits] = static_cast<char>(bits & 255);
    data[2 * bits + 1] = static_cast<char>(bits >> 8);
  }
  const auto read = [&](const std::string& type) {
    const std::string header =
        R"({"a":{"dtype":")" + type + R"(","shape":[65536],"data_offsets":[0,131072]}})";
    return SafetensorsReader(write("h.safetensors", with_length(header) + data)).read_f32("a");
  };
  const std::vector<float> half = read("F16"), brain = read("BF16");
  ASSERT_EQ(half.size(), 65536u);
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    // The definition: (-1)^s 2^(e-15) (1 + f/1024), subnormal for e = 0, infinite or NaN for e
    // = 31.
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    double expected = exponent == 0 ? std::ldexp(fraction, -24)
                      : exponent == 31
                          ? (fraction ? std::nan("") : std::numeric_limits<double>::infinity())
                          : std::ldexp(1024 + fraction, exponent - 25);
    if (bits >> 15) expected = -expected;
    if (std::isnan(expected))
      EXPECT_TRUE(std::isnan(half[bits])) << bits;
    else
      EXPECT_EQ(half[bits], static_cast<float>(expected)) << bits;
    EXPECT_EQ(std::signbit(half[bits]), bits >> 15 == 1) << bits;
    EXPECT_EQ(std::bit_cast<uint32_t>(brain[bits]), bits << 16) << bits;
  }
}

TEST_F(SafetensorsTest, IntegersAreReadAndRangeIsChecked) {
  const std::string file = write_tensors(
      R"({"u":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"s":{"dtype":"I16","shape":[1],"data_offsets":[3,5]},)"
      R"("l":{"dtype":"I64","shape":[1],"data_offsets":[5,13]},"f":{"dtype":"F32","shape":[1],"data_offsets":[13,17]}})",
      17);
  const SafetensorsReader reader(file);
  EXPECT_EQ(reader.read_i32("u"), (std::vector<int32_t>{0, 1, 2}));
  EXPECT_EQ(reader.read_i32("s"), (std::vector<int32_t>{3 + 256 * 4}));
  EXPECT_NE(message_of([&] { reader.read_i32("l"); }).find("32 bits"), std::string::npos);
  EXPECT_NE(message_of([&] { reader.read_i32("f"); }).find("integer tensor was expected"),
            std::string::npos);
  EXPECT_NE(message_of([&] { reader.read_f32("u"); }).find("floating-point tensor was expected"),
            std::string::npos);
  EXPECT_NE(message_of([&] { reader.read_f32("absent"); }).find("no tensor \"absent\""),
            std::string::npos);
  EXPECT_FALSE(reader.has("absent"));
}

TEST_F(SafetensorsTest, WritesWhatItReads) {
  std::vector<float> floats = {1.5f, -0.0f, std::numeric_limits<float>::infinity(), 1e-40f, 5, 6};
  std::vector<double> doubles = {0.1, -3};
  std::vector<uint16_t> brains = {0x3f80, 0xc000, 0x0001};
  std::vector<int32_t> ints = {-2147483647 - 1, 2147483647};
  std::vector<uint8_t> bytes = {1, 255, 7};
  const std::vector<NamedView> tensors = {{"bytes", view_of(bytes, DType::u8, {3})},
                                          {"brains", view_of(brains, DType::bf16, {3, 1})},
                                          {"floats", view_of(floats, DType::f32, {2, 3})},
                                          {"doubles", view_of(doubles, DType::f64, {2})},
                                          {"ints", view_of(ints, DType::i32, {2})}};
  write_safetensors(path("a"), tensors, {{"made by", "test"}});
  const SafetensorsReader reader(path("a"));
  EXPECT_EQ(reader.names().size(), 5u);
  const std::vector<float> back = reader.read_f32("floats");
  EXPECT_EQ(std::memcmp(back.data(), floats.data(), 24), 0);
  EXPECT_EQ(reader.read_f32("doubles"), (std::vector<float>{0.1f, -3.0f}));
  EXPECT_EQ(reader.read_f32("brains"), (std::vector<float>{1, -2, std::bit_cast<float>(0x10000u)}));
  EXPECT_EQ(reader.read_i32("ints"), ints);
  EXPECT_EQ(reader.read_i32("bytes"), (std::vector<int32_t>{1, 255, 7}));
  EXPECT_EQ(reader.info("floats").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(reader.metadata("format"), "pt");
  EXPECT_EQ(reader.metadata("made by"), "test");
  EXPECT_EQ(reader.metadata("other"), "");
  EXPECT_FALSE(fs::exists(path("a.tmp")));
  for (const NamedView& tensor : tensors)  // aligned to its element
    EXPECT_EQ(reader.info(tensor.name).begin % size_of(tensor.view.dtype), 0) << tensor.name;
  std::ifstream in(path("a"), std::ios::binary);
  uint64_t length = 0;
  in.read(reinterpret_cast<char*>(&length), 8);
  EXPECT_EQ(length % 8, 0u);
}

TEST_F(SafetensorsTest, EmptySetOfTensors) {
  write_safetensors(path("none"), {});
  EXPECT_TRUE(SafetensorsReader(path("none")).names().empty());
}

TEST_F(SafetensorsTest, ShardsStayUnderTheirLimitAndReadAsOne) {
  std::vector<float> values(1000);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  std::vector<NamedView> tensors;
  for (int i = 0; i < 10; ++i)
    tensors.push_back(
        {"layer." + std::to_string(i), host_view(values.data() + i * 100, DType::f32, {100})});
  write_sharded(folder_.string(), tensors, 1500);
  EXPECT_TRUE(fs::exists(path("model.safetensors.index.json")));
  EXPECT_TRUE(fs::exists(path("model-00001-of-00005.safetensors")));
  for (const auto& entry : fs::directory_iterator(folder_)) {
    if (entry.path().extension() == ".safetensors") {
      EXPECT_LE(entry.file_size(), 1500u) << entry.path();
    }
  }
  {
    const SafetensorsReader reader(folder_.string());
    EXPECT_EQ(reader.files().size(), 5u);
    EXPECT_EQ(reader.names().size(), 10u);
    EXPECT_EQ(reader.read_f32("layer.7")[3], 703);
    EXPECT_EQ(reader.metadata("format"), "pt");
  }
  // A later save of another kind leaves nothing of this one, and the other way round.
  write_sharded(folder_.string(), tensors, 0);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 1);
  EXPECT_EQ(SafetensorsReader(folder_.string()).read_f32("layer.9")[99], 999);
  write_sharded(folder_.string(), tensors, 100);  // less than a tensor: each alone
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 11);
  EXPECT_EQ(SafetensorsReader(folder_.string()).names().size(), 10u);
}

// A save that is cut short at any of its files leaves the one before, all of it; the next one is
// whole again.
TEST_F(SafetensorsTest, ShardsOfTwoSavesDoNotMix) {
  std::vector<float> values(300, 0);
  std::vector<NamedView> tensors;
  for (int i = 0; i < 3; ++i)
    tensors.push_back({std::to_string(i), host_view(values.data() + i * 100, DType::f32, {100})});
  const auto read = [&] {
    const SafetensorsReader reader(folder_.string());
    std::vector<float> found;
    for (const NamedView& tensor : tensors) found.push_back(reader.read_f32(tensor.name)[99]);
    return found;
  };
  write_sharded(folder_.string(), tensors, 100);
  for (float save = 1; save <= 4; ++save) {
    const float before = save - 1;
    std::fill(values.begin(), values.end(), save);
    for (const char* file : {"-00001-of-00003.safetensors", "-00002-of-00003.safetensors",
                             "-00003-of-00003.safetensors", ".safetensors.index.json"}) {
      for (const std::string stem : {"model", "model.1"})  // folders in their places
        fs::create_directory(path(stem + file + ".tmp"));
      EXPECT_THROW(write_sharded(folder_.string(), tensors, 100), Error);
      EXPECT_EQ(read(), std::vector<float>(3, before)) << file;
      for (const std::string stem : {"model", "model.1"}) fs::remove(path(stem + file + ".tmp"));
    }
    write_sharded(folder_.string(), tensors, 100);
    EXPECT_EQ(read(), std::vector<float>(3, save));
    EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 4);
  }
}

TEST_F(SafetensorsTest, AnIndexCannotLeadOutOfItsFolder) {
  for (const char* name :
       {"../secret", "/etc/passwd", "..", ".", "", "sub/x.safetensors", "x\\u0000y"}) {
    write("model.safetensors.index.json", std::string(R"({"weight_map":{"a":")") + name + R"("}})");
    EXPECT_NE(message_of([&] {
                SafetensorsReader reader(folder_.string());
              }).find("a name in the same folder"),
              std::string::npos)
        << name;
  }
  write("model.safetensors.index.json", R"({"weight_map":{"a":3}})");
  EXPECT_NE(
      message_of([&] { SafetensorsReader reader(folder_.string()); }).find("must be a string"),
      std::string::npos);
  write("model.safetensors.index.json", R"({})");
  EXPECT_NE(message_of([&] { SafetensorsReader reader(folder_.string()); }).find("weight_map"),
            std::string::npos);
  write_safetensors(path("s.safetensors"), {});
  write("model.safetensors.index.json", R"({"weight_map":{"a":"s.safetensors"}})");
  EXPECT_NE(message_of([&] { SafetensorsReader reader(folder_.string()); }).find("no tensor \"a\""),
            std::string::npos);
}

TEST_F(SafetensorsTest, AFileThatShrinksWhileOpenIsAnError) {
  std::vector<float> values(1000, 1);
  const NamedView tensor{"a", view_of(values, DType::f32, {1000})};
  write_safetensors(path("a"), {&tensor, 1});
  const SafetensorsReader reader(path("a"));
  fs::resize_file(path("a"), 2000);
  EXPECT_NE(message_of([&] { reader.read_f32("a"); }).find("it ends at byte 2000"),
            std::string::npos);
}

TEST_F(SafetensorsTest, AFailedWriteLeavesTheOldFile) {
  write("a", "old");
  {
    AtomicFile file(path("a"));
    file.write("new", 3);
  }  // not committed
  std::ifstream in(path("a"));
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(in), {}), "old");
  EXPECT_FALSE(fs::exists(path("a.tmp")));
  EXPECT_NE(message_of([&] { AtomicFile file(path("no/such/folder")); }).find("cannot write"),
            std::string::npos);
}

TEST_F(SafetensorsTest, AFullDiskIsAnError) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  fs::create_symlink("/dev/full", path("a.tmp"));
  EXPECT_NE(message_of([&] { write_file_atomically(path("a"), "text"); }).find("No space left"),
            std::string::npos);
  EXPECT_FALSE(fs::exists(path("a")));
}

}  // namespace
}  // namespace coil
