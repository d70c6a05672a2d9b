// What was appended, read back from its end as the other strand, in memory and from the temporary
// file.
#include "genomics/spill.h"

#include "tests/genomics_files.h"

namespace coil {
namespace {

using SpillTest = GenomicsTest;

std::vector<uint8_t> random_codes(std::mt19937& random, int64_t count, int n_per_mille) {
  std::vector<uint8_t> codes(count);
  for (uint8_t& code : codes)
    code = static_cast<int>(random() % 1000) < n_per_mille ? dna::kN : dna::kA + random() % 4;
  return codes;
}

// Appended in pieces of any length; read in pieces of any length, in order and anywhere.
void round_trip(int64_t length, int n_per_mille, uint32_t seed) {
  SCOPED_TRACE(length);
  std::mt19937 random(seed);
  const std::vector<uint8_t> codes = random_codes(random, length, n_per_mille);
  std::vector<uint8_t> reverse = codes;
  dna::reverse_complement(reverse);
  Spill spill;
  for (int64_t at = 0; at < length;) {
    const int64_t n = std::min<int64_t>(length - at, random() % 200'000);
    spill.append(std::span(codes).subspan(at, n));
    at += n;
  }
  ASSERT_EQ(spill.length(), length);
  std::vector<uint8_t> read, all;
  for (int64_t at = 0; at < length; at += static_cast<int64_t>(read.size())) {
    spill.read_reverse(at, std::min<int64_t>(length - at, 1 + random() % 150'000), read);
    all.insert(all.end(), read.begin(), read.end());
  }
  EXPECT_TRUE(all == reverse);
  for (int i = 0; i < 30; ++i) {
    const int64_t begin = random() % (length + 1);
    const int64_t count = std::min<int64_t>(length - begin, random() % 100'000);
    spill.read_reverse(begin, count, read);
    ASSERT_TRUE(std::equal(read.begin(), read.end(), reverse.begin() + begin,
                           reverse.begin() + begin + count));
  }
}

TEST_F(SpillTest, InMemory) {
  for (int64_t length : {0, 1, 3, 65535, 65536, 65537, 200'001}) round_trip(length, 10, 1);
}

TEST_F(SpillTest, InAFile) {
  round_trip(6'000'001, 0, 2);
  round_trip(6'000'001, 500, 3);
}

TEST_F(SpillTest, ReadWhileItGrows) {
  Spill spill;
  std::vector<uint8_t> read;
  for (int i = 0; i < 100; ++i) {
    spill.append(std::vector<uint8_t>(1000, i % 2 ? dna::kA : dna::kC));
    spill.read_reverse(0, 1000, read);
    EXPECT_EQ(letters_of(read), std::string(1000, i % 2 ? 'T' : 'G'));
  }
}

TEST_F(SpillTest, LeavesNoFileAndSaysWhereItCannotWrite) {
  const char* before = std::getenv("TMPDIR");
  const std::string kept = before ? before : "";
  const auto fill = [] {
    Spill spill;
    spill.append(std::vector<uint8_t>(5'000'000, dna::kG));
  };
  ::setenv("TMPDIR", path("").c_str(), 1);
  fill();
  EXPECT_TRUE(std::filesystem::is_empty(path("")));
  ::setenv("TMPDIR", path("none").c_str(), 1);
  EXPECT_CONTAINS(error_of(fill), "none: cannot make a temporary file: No such file");
  before ? ::setenv("TMPDIR", kept.c_str(), 1) : ::unsetenv("TMPDIR");
}

}  // namespace
}  // namespace coil
