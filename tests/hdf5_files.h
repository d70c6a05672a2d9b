// Datasets for tests, in a folder that goes with them.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "pipelines/hdf5_build.h"
#include "pipelines/hdf5_writer.h"
#include "tests/records.h"

namespace coil {

class Folder {
 public:
  Folder() {
    char path[] = "/tmp/coil-hdf5-XXXXXX";
    path_ = mkdtemp(path);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

inline std::string bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

// What f throws, as text; "" where nothing.
template <class F>
std::string error_of(F f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// Lengths around the borders of chunks and segments.
inline std::vector<Codes> some_records() {
  std::vector<Codes> records;
  uint64_t seed = 1;
  for (const int64_t length : {1, 2, 65'533, 65'536, 1, 65'535, 200'000, 7, 131'073, 64})
    records.push_back(random_codes(length, seed++));
  return records;
}

// Labels go round the three; splits round two of three.
inline BuildInput input_of(const std::vector<Codes>& records, const CodesOf& what = {}) {
  BuildInput input{.what = what, .splits = {"train", "validation", "test"}};
  input.open = [records](int64_t) { return std::make_unique<Records>(records); };
  input.facts = [](const Segment& segment) {
    constexpr const char* kLabels[] = {"plum", "apple", "", "fig"};
    return Facts{kLabels[segment.record % 4], static_cast<int8_t>(segment.record % 2)};
  };
  return input;
}

}  // namespace coil
