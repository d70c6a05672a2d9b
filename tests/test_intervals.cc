// Regions and BED files against the whole sequences; every error by its message.
#include "genomics/intervals.h"

#include "genomics/fasta.h"
#include "tests/genomics_files.h"

namespace coil {
namespace {

using Intervals = GenomicsTest;

void expect_region(const std::string& text, const std::string& name, int64_t begin, int64_t end) {
  const Interval region = parse_region(text);
  EXPECT_EQ(region.name, name) << text;
  EXPECT_EQ(region.begin, begin) << text;
  EXPECT_EQ(region.end, end) << text;
}

TEST_F(Intervals, RegionsAsSamtoolsWritesThem) {
  expect_region("chr1", "chr1", 0, INT64_MAX);
  expect_region("chr1:1,000-2,000", "chr1", 999, 2000);
  expect_region("chr1:5", "chr1", 4, INT64_MAX);
  expect_region("chr1:5-", "chr1", 4, INT64_MAX);
  expect_region("chr1:-5", "chr1", 0, 5);
  expect_region("chr1:7-7", "chr1", 6, 7);
  expect_region("HLA-A*01:01:5-9", "HLA-A*01:01", 4, 9);
  expect_region("chr1:abc", "chr1:abc", 0, INT64_MAX);
  expect_region("{a:1-2}", "a:1-2", 0, INT64_MAX);
  expect_region("{a:1-2}:3-4", "a:1-2", 2, 4);
  const auto error = [](const std::string& text) { return error_of([&] { parse_region(text); }); };
  EXPECT_CONTAINS(error("chr1:9-5"), "region 'chr1:9-5' ends before it begins");
  EXPECT_CONTAINS(error("chr1:0-5"), "region 'chr1:0-5': positions count from 1");
  EXPECT_CONTAINS(error(""), "a sequence's name was expected");
  EXPECT_CONTAINS(error(":1-5"), "a sequence's name was expected");
  EXPECT_CONTAINS(error("{a}x"), "a range like :1,000-2,000 was expected after '}'");
}

TEST_F(Intervals, Bed) {
  const std::string text =
      "#comment\nbrowser position chr1\ntrack name=x\nchr1\t0\t10\r\n\nchr "
      "2\t5\t6\tname\t0\t-\nchr3 7 9\n";
  for (const std::string& file : {write("x.bed", text), compress("x.bed.gz", text, "wg")}) {
    const std::vector<Interval> read = read_bed(file);
    ASSERT_EQ(read.size(), 3u);
    EXPECT_EQ(read[0].name, "chr1");
    EXPECT_EQ(read[0].begin, 0);
    EXPECT_EQ(read[0].end, 10);
    EXPECT_EQ(read[1].name, "chr 2");
    EXPECT_EQ(read[2].end, 9);
  }
  const auto error = [&](const std::string& lines) {
    return error_of([&] { read_bed(write("bad.bed", lines)); });
  };
  EXPECT_CONTAINS(error("chr1\t0\t5\nchr1\t5\n"), "bad.bed: line 2 has 2 columns");
  EXPECT_CONTAINS(error("#\nchr1\t-1\t5\n"), "bad.bed: line 2: '-1' and '5' are no positions");
  EXPECT_CONTAINS(error("chr1\t1\t1e3\n"), "line 1: '1' and '1e3' are no positions");
  EXPECT_CONTAINS(error("chr1\t5\t5\n"), "line 1: the interval 5-5 is empty");
  EXPECT_CONTAINS(error("#\n"), "bad.bed: no intervals");
}

class Regions : public Intervals {
 protected:
  Regions() {
    std::mt19937 random(1);
    one_ = random_letters(random, 200'003, "ACGTN");
    for (size_t i = 0; i < one_.size(); i += 70) text_ += one_.substr(i, 70) + "\n";
    text_ = ">one\n" + text_ + ">a:2-3 x\nACGTACGT\n>a\nTTTT\n>gap\nA-C.G\n>bad\nACGLT\n";
  }
  static std::vector<Record> read(const std::string& file,
                                  const std::vector<std::string>& regions) {
    std::vector<Interval> intervals;
    for (const std::string& region : regions) intervals.push_back(parse_region(region));
    return read_all(*open_regions(file, intervals));
  }
  std::string one_, text_;
};

TEST_F(Regions, AreTheLettersThatTheyName) {
  for (const std::string& file : {write("x.fa", text_), compress("x.fa.gz", text_, "w")}) {
    EXPECT_EQ(read(file, {"one:1,001-1,010", "one", "one:100000-190000", "one:200000-999999",
                          "one:131073"}),
              (std::vector<Record>{{"one:1001-1010", one_.substr(1000, 10), 0, 1000},
                                   {"one:1-200003", one_, 0, 0},
                                   {"one:100000-190000", one_.substr(99999, 90001), 0, 99999},
                                   {"one:200000-200003", one_.substr(199999), 0, 199999},
                                   {"one:131073-200003", one_.substr(131072), 0, 131072}}));
    EXPECT_TRUE(std::filesystem::exists(file + ".fai"));
    // A name that holds a colon: the whole text is tried first, braces end the name.
    EXPECT_EQ(read(file, {"a:2-3", "{a}:2-3", "{a:2-3}:3-4", "a:2"}),
              (std::vector<Record>{{"a:2-3:1-8", "ACGTACGT"},
                                   {"a:2-3", "TT", 0, 1},
                                   {"a:2-3:3-4", "GT", 0, 2},
                                   {"a:2-4", "TTT", 0, 1}}));
    // A gap has a place in its sequence.
    EXPECT_EQ(read(file, {"gap:2-5"}), (std::vector<Record>{{"gap:2-5", "NCNG", 0, 1}}));
  }
}

TEST_F(Regions, BadOnes) {
  const std::string file = write("x.fa", text_);
  const auto error = [](const std::string& fasta, const std::string& region) {
    return error_of([&] { read(fasta, {region}); });
  };
  EXPECT_CONTAINS(error(file, "two:1-5"), "x.fa: no sequence 'two' in it");
  EXPECT_CONTAINS(error(file, "a:5-9"),
                  "x.fa: the region begins at 5, past the end of 'a' (4 bases)");
  EXPECT_CONTAINS(error(file, "bad"),
                  "x.fa: sequence 'bad' has 'L' at base 4, which is no DNA letter");
  EXPECT_CONTAINS(error("-", "a"), "standard input has no index");
  EXPECT_CONTAINS(error(path("none.fa"), "a"), "none.fa: cannot open");
  EXPECT_CONTAINS(error(compress("g.fa.gz", text_, "wg"), "a"),
                  "compressed by gzip, which cannot be indexed");
  EXPECT_CONTAINS(error(write("x.fq", "@a\nA\n+\nI\n"), "a"), "x.fq: not FASTA");
  EXPECT_CONTAINS(error(write("ragged.fa", ">a\nACGT\nAC\nACGT\n"), "a"), "its index");
  read(file, {"a"});
  write("x.fa", text_.substr(0, 100'000));  // the index is of the whole file
  EXPECT_CONTAINS(error(file, "one:150000-150010"), "cannot be read at base 150000");
}

TEST_F(Regions, OfARealGenome) {
  const std::string folder = data_folder() + "/dna/alignments/ga4gh_brca1/";
  COIL_NEEDS_DATA(folder);
  const std::string fasta = folder + "ref_brca1.fa";
  const std::vector<Record> whole = read_all(*open_fasta({fasta}));
  ASSERT_EQ(whole.size(), 1u);
  const std::string& name = whole[0].name;
  EXPECT_EQ(read(fasta, {name + ":10,001-80,000"}),
            (std::vector<Record>{
                {name + ":10001-80000", whole[0].letters.substr(10'000, 70'000), 0, 10'000}}));
}

}  // namespace
}  // namespace coil
