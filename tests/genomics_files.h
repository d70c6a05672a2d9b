// Small files for the tests of genomics/, and what they read from a source.
#pragma once

#include <gtest/gtest.h>
#include <htslib/bgzf.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "genomics/alphabet.h"
#include "kernels/error.h"
#include "model/batch.h"

namespace coil {

// A folder of its own for each test, removed at the end.
class GenomicsTest : public ::testing::Test {
 protected:
  GenomicsTest() {
    std::string pattern = (std::filesystem::temp_directory_path() / "coil-test-XXXXXX").string();
    folder_ = ::mkdtemp(pattern.data());
  }
  ~GenomicsTest() override { std::filesystem::remove_all(folder_); }

  std::string path(const std::string& name) const { return folder_ + "/" + name; }

  std::string write(const std::string& name, const std::string& text) const {
    std::filesystem::create_directories(std::filesystem::path(path(name)).parent_path());
    std::ofstream(path(name), std::ios::binary) << text;
    return path(name);
  }

  // mode: "wg" for gzip, "w" for bgzip.
  std::string compress(const std::string& name, const std::string& text, const char* mode) const {
    BGZF* file = bgzf_open(path(name).c_str(), mode);
    EXPECT_EQ(bgzf_write(file, text.data(), text.size()), static_cast<ssize_t>(text.size()));
    EXPECT_EQ(bgzf_close(file), 0);
    return path(name);
  }

 private:
  std::string folder_;
};

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline std::string data_folder() {
  const char* set = std::getenv("COIL_DATA");
  return set ? set : COIL_SOURCE_DIR "/../shared/data";
}
#define COIL_NEEDS_DATA(folder) \
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << folder << " is not there (COIL_DATA)"

struct Record {
  std::string name, letters;
  int64_t file = 0, offset = 0;
  bool operator==(const Record&) const = default;
};
inline void PrintTo(const Record& record, std::ostream* out) {
  *out << record.name << " (" << record.letters.size() << " bases) "
       << record.letters.substr(0, 60);
}

inline std::string letters_of(const std::vector<uint8_t>& codes) {
  std::string letters;
  for (uint8_t code : codes) letters += dna::letter_of(code);
  return letters;
}

// Every record of a source, joined; checks what model/batch.h promises of segments.
inline std::vector<Record> read_all(Source& source) {
  std::vector<Record> records;
  Segment segment;
  bool open = false;
  while (source.next(segment)) {
    EXPECT_EQ(segment.first, !open);
    if (segment.first) records.push_back({segment.name, "", segment.file, segment.offset});
    EXPECT_EQ(segment.record, static_cast<int64_t>(records.size()) - 1);
    EXPECT_EQ(segment.position, static_cast<int64_t>(records.back().letters.size()));
    EXPECT_GE(segment.codes.size(), 1u);
    EXPECT_LE(static_cast<int64_t>(segment.codes.size()), Source::kRun);
    EXPECT_TRUE(segment.last || static_cast<int64_t>(segment.codes.size()) == Source::kRun);
    records.back().letters += letters_of(segment.codes);
    open = !segment.last;
  }
  EXPECT_FALSE(open);
  return records;
}

// The message of the coil::Error that `call` throws; "" where it throws none.
template <class Call>
std::string error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

inline std::string random_letters(std::mt19937& random, size_t count,
                                  const char* letters = "ACGT") {
  const size_t kinds = std::char_traits<char>::length(letters);
  std::string text(count, '\0');
  for (char& c : text) c = letters[random() % kinds];
  return text;
}

#define EXPECT_CONTAINS(text, part) EXPECT_PRED_FORMAT2(::coil::contains, text, part)
inline ::testing::AssertionResult contains(const char*, const char*, const std::string& text,
                                           const std::string& part) {
  if (text.find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "\"" << text << "\" does not say \"" << part << "\"";
}

}  // namespace coil
