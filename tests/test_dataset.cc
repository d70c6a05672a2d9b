// Labelled and plain sets from each kind of input; splits and windows; every error by its message.
#include "genomics/dataset.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "tests/genomics_files.h"

namespace coil {
namespace {

using Dataset = GenomicsTest;

std::string item_letters(const Examples& all, const Example& item) {
  const auto begin = all.codes[item.record].begin() + item.begin;
  return letters_of(std::vector<uint8_t>(begin, begin + item.length));
}

// "letters label" of each item.
std::vector<std::string> items_of(const Examples& all) {
  std::vector<std::string> items;
  for (const Example& item : all.items)
    items.push_back(item_letters(all, item) + (item.label < 0 ? "" : " " + all.labels[item.label]));
  return items;
}

std::string dataset_error(const std::string& path, const DatasetOptions& options = {}) {
  return error_of([&] { read_examples({path}, options); });
}

using Strings = std::vector<std::string>;

TEST_F(Dataset, CsvAndTsv) {
  const std::string csv =
      "id,sequence,\"the label\"\r\nx,ACGT,b\r\n\r\ny,\"ac\ngtn\",\"a, "
      "\"\"b\"\"\"\nz,TT,b\nw,G,\"a, \"\"b\"\"\"";
  DatasetOptions options{.label_column = "the label"};
  for (const std::string& file :
       {write("x.csv", csv), compress("x.csv.gz", csv, "wg"), compress("y.csv.gz", csv, "w")}) {
    const Examples all = read_examples({file}, options);
    EXPECT_EQ(all.labels, (Strings{"a, \"b\"", "b"}));
    EXPECT_EQ(all.names, (Strings{"x", "y", "z", "w"}));
    EXPECT_EQ(items_of(all), (Strings{"ACGT b", "ACGTN a, \"b\"", "TT b", "G a, \"b\""}));
  }
  const Examples tsv =
      read_examples({write("x.tsv", "label\tsequence\n10\tA\n9\tC\n10\tG\n9\tT\n")}, {});
  EXPECT_EQ(tsv.labels, (Strings{"9", "10"}));
  EXPECT_EQ(items_of(tsv), (Strings{"A 10", "C 9", "G 10", "T 9"}));
  EXPECT_EQ(tsv.names[1], "2");
}

TEST_F(Dataset, FolderPerClass) {
  write("set/b/1.fa", ">x\nACGT\n>y\nAC\n");
  write("set/a/2.fq", "@x\nTT\n+\nII\n");
  write("set/a/1.fa", ">x\nG\n");
  write("set/a/1.fa.fai", "x\t1\t3\t1\t2\n");
  write("set/b/README.md", "text");
  write("set/.hidden/x", "");
  const Examples all = read_examples({path("set")}, {});
  EXPECT_EQ(all.labels, (Strings{"a", "b"}));
  EXPECT_EQ(items_of(all), (Strings{"G a", "TT a", "ACGT b", "AC b"}));
  const Examples plain = read_examples({path("set")}, {.labelled = false});
  EXPECT_TRUE(plain.labels.empty());
  EXPECT_EQ(items_of(plain), (Strings{"G", "TT", "ACGT", "AC"}));
}

TEST_F(Dataset, FastaWithATable) {
  const std::string fasta = write("x.fa", ">x\nA\n>y\nC\n>z\nG\n>w\nT\n");
  for (const char* table :
       {"name\tlabel\nx\t1\ny\t0\nz\t1\nw\t0\nelsewhere\t7\n", "x,1\ny,0\nz,1\nw,0"}) {
    const Examples all = read_examples({fasta}, {.table = write("t", table)});
    EXPECT_EQ(all.labels, (Strings{"0", "1"}));
    EXPECT_EQ(items_of(all), (Strings{"A 1", "C 0", "G 1", "T 0"}));
  }
  EXPECT_CONTAINS(dataset_error(fasta, {.table = write("t", "x\t1\ny\t0\n")}),
                  "x.fa: record 'z' has no label in");
  EXPECT_CONTAINS(dataset_error(fasta, {.table = write("t", "x\t1\nx\t0\n")}),
                  "line 2 labels 'x' as '0', line 1 as '1'");
  EXPECT_CONTAINS(dataset_error(fasta, {.table = write("t", "x\n")}), "t: line 1 has one column");
  EXPECT_CONTAINS(dataset_error(fasta), "x.fa: a FASTA or FASTQ file alone has no labels");
}

TEST_F(Dataset, WindowsTileRecords) {
  std::mt19937 random(1);
  const std::string letters = random_letters(random, 1000);
  const std::string fasta = write("x.fa", ">long\n" + letters + "\n>short\nACG\n");
  const auto lengths = [&](int64_t shortest, int64_t longest) {
    const Examples all =
        read_examples({fasta}, {.min_length = shortest, .max_length = longest, .labelled = false});
    std::vector<int64_t> found;
    int64_t end = 0;
    for (const Example& item : all.items) {
      if (item.record == 0) {
        EXPECT_EQ(item.begin, end);
        end += item.length;
      }
      found.push_back(item.length);
    }
    return found;
  };
  EXPECT_EQ(lengths(100, 300), (std::vector<int64_t>{300, 300, 300, 100, 3}));
  EXPECT_EQ(lengths(101, 300), (std::vector<int64_t>{300, 300, 300, 3}));
  EXPECT_EQ(lengths(0, 300), (std::vector<int64_t>{300, 300, 300, 3}));
  EXPECT_EQ(lengths(0, 0), (std::vector<int64_t>{1000, 3}));
  EXPECT_CONTAINS(error_of([&] { lengths(400, 300); }),
                  "the shortest window (400) is longer than the longest (300)");
}

TEST_F(Dataset, LabelsOfAModel) {
  const std::string file = write("x.csv", "sequence,label\nA,dog\nC,cat\n");
  const Examples all = read_examples({file}, {.labels = {"dog", "emu", "cat"}});
  EXPECT_EQ(all.labels, (Strings{"dog", "emu", "cat"}));
  EXPECT_EQ(all.items[1].label, 2);
  EXPECT_CONTAINS(dataset_error(file, {.labels = {"dog", "emu"}}),
                  "x.csv: line 3 has label 'cat', which is not one of the model's: dog, emu");
}

using Bytes = std::vector<uint8_t>;

TEST_F(Dataset, LettersAndTargets) {
  const std::string csv = "sequence,label,answer\nABCA,x,..BC\nCC,y,A.\nB,x,.\nA,y,C\n";
  DatasetOptions options{.alphabet = "ABC"};
  for (const std::string& file : {write("x.csv", csv), compress("x.csv.gz", csv, "w")}) {
    const Examples all = read_examples({file}, options);
    EXPECT_EQ(all.codes, (std::vector<Bytes>{{0, 1, 2, 0}, {2, 2}, {1}, {0}}));
    EXPECT_EQ(all.labels, (Strings{"x", "y"}));
    EXPECT_TRUE(all.targets.empty());
  }
  options.target_column = "answer";
  options.labelled = false;
  const Examples all = read_examples({path("x.csv")}, options);
  EXPECT_EQ(all.targets, (std::vector<Bytes>{
                             {kUncounted, kUncounted, 1, 2}, {0, kUncounted}, {kUncounted}, {2}}));
  // Of DNA: a gap is a place of its own, N is nothing to be told.
  options.alphabet = "";
  const Examples dna = read_examples({write("dna.csv", "sequence,answer\nA-cT,.gNT\n")}, options);
  EXPECT_EQ(dna.codes[0], (Bytes{1, 5, 2, 4}));
  EXPECT_EQ(dna.targets[0], (Bytes{kUncounted, 3, kUncounted, 4}));
}

// A row longer than a segment, and one that is cut at a held-out place.
TEST_F(Dataset, TargetsGoWithTheirRows) {
  std::string sequence, answer;
  for (int i = 0; i < 150'000; ++i) {
    sequence += "AB"[i % 3 == 0];
    answer += "AB."[i % 3];
  }
  const std::string table = "sequence,t\n" + sequence + "," + answer + "\nAB,BA\nAA,..\n";
  Examples all = read_examples(
      {write("long.csv", table)},
      {.max_length = 1000, .labelled = false, .target_column = "t", .alphabet = "AB"});
  std::vector<Example> train, held_out;
  split(all, 0.3, 1, train, held_out);
  ASSERT_EQ(all.targets.size(), all.codes.size());
  int64_t seen = 0;
  for (size_t record = 0; record < all.codes.size(); ++record) {
    const Bytes& codes = all.codes[record];
    const Bytes& targets = all.targets[record];
    ASSERT_EQ(codes.size(), targets.size());
    if (codes.size() < 1000) continue;
    for (size_t i = 0; i < codes.size(); ++i)  // B at every third place, where the target is A
      EXPECT_EQ(codes[i] == 1, targets[i] == 0) << record << " " << i;
    seen += std::ssize(codes);
  }
  EXPECT_EQ(seen, 150'000);
}

TEST_F(Dataset, BadLettersAndTargets) {
  const auto csv = [&](const std::string& text) {
    return dataset_error(write("bad.csv", "sequence,label,t\n" + text),
                         {.labelled = false, .target_column = "t", .alphabet = "ABC"});
  };
  EXPECT_CONTAINS(csv("ABC,x,...\nABQ,x,...\n"),
                  "bad.csv: line 3 has 'Q' at place 3, which is no letter of the alphabet 'ABC'");
  EXPECT_CONTAINS(csv("AaC,x,...\n"), "has 'a' at place 2");
  EXPECT_CONTAINS(csv("ABC,x,..\n"), "bad.csv: line 2: column 't' has 2 letters, the sequence 3");
  EXPECT_CONTAINS(
      csv("ABC,x,..Q\n"),
      "bad.csv: line 2: column 't' has 'Q' at place 3, which is neither '.' nor a letter "
      "of the alphabet 'ABC'");
  EXPECT_CONTAINS(dataset_error(path("bad.csv"), {.target_column = "u", .alphabet = "ABC"}),
                  "no column 'u'");
  const std::string fasta = write("x.fa", ">a\nACGT\n");
  EXPECT_CONTAINS(dataset_error(fasta, {.labelled = false, .alphabet = "ACGT"}),
                  "x.fa: is no table, and an alphabet of letters is of CSV or TSV");
  EXPECT_CONTAINS(dataset_error(fasta, {.labelled = false, .target_column = "t"}),
                  "x.fa: is no table, and targets stand in a column of one");
}

TEST_F(Dataset, BadInput) {
  const auto csv = [&](const std::string& text) { return dataset_error(write("bad.csv", text)); };
  EXPECT_CONTAINS(csv("seq,label\nA,0\n"),
                  "bad.csv: no column 'sequence'; its columns are 'seq', 'label'");
  EXPECT_CONTAINS(csv("sequence,class\nA,0\n"),
                  "bad.csv: no column 'label'; its columns are 'sequence', 'class'");
  EXPECT_CONTAINS(csv("sequence,label\nA,0\nMKL,1\n"),
                  "bad.csv: line 3 has 'L' at base 3, which is no DNA letter (protein");
  EXPECT_CONTAINS(csv("sequence,label\nA,0\n,1\n"), "bad.csv: line 3: the sequence is empty");
  EXPECT_CONTAINS(csv("sequence,label\nA,\n"), "bad.csv: line 2: the label is empty");
  EXPECT_CONTAINS(csv("sequence,label\nA,0\nC\n"),
                  "bad.csv: line 3 has 1 columns where the header has 2");
  EXPECT_CONTAINS(csv("sequence,label\n\"A,0\n"),
                  "bad.csv: the quote opened in line 2 is not closed");
  EXPECT_CONTAINS(csv("sequence,label\n"), "bad.csv: no records");
  EXPECT_CONTAINS(csv(""), "bad.csv: empty; a header line");
  EXPECT_CONTAINS(csv(std::string("sequence,label\nA\0,0\n", 20)), "bad.csv: NUL byte in line 2");
  EXPECT_CONTAINS(csv("sequence,label\nA,0\nC,0\nG,1\n"), "class '1' is seen once");
  EXPECT_CONTAINS(csv("sequence,label\nA,0\nC,0\n"), "only one class, '0'");
  EXPECT_CONTAINS(dataset_error(path("none.csv")), "none.csv: cannot open");
  EXPECT_CONTAINS(dataset_error(write("x.sam", "@SQ\tSN:a\tLN:9\n")), "alignments have no labels");
  std::filesystem::create_directories(path("flat"));
  EXPECT_CONTAINS(dataset_error(path("flat")), "one folder per class was expected");
  std::filesystem::create_directories(path("flat/a"));
  EXPECT_CONTAINS(dataset_error(path("flat")), "flat/a: no files in this folder");
  write("flat/a/x.csv", "sequence,label\nA,0\n");
  EXPECT_CONTAINS(dataset_error(path("flat")), "x.csv: neither FASTA nor FASTQ");
  const std::string gz = read_file(compress("x.gz", "sequence,label\nA,0\nC,0\nG,1\nG,1\n", "wg"));
  EXPECT_CONTAINS(dataset_error(write("cut.gz", gz.substr(0, gz.size() - 9))), "truncated");
}

TEST_F(Dataset, SplitByClass) {
  std::string text = "sequence,label\n";
  std::mt19937 random(2);
  for (int i = 0; i < 230; ++i)
    text += random_letters(random, 20) + (i < 200 ? ",big\n" : i < 228 ? ",small\n" : ",two\n");
  const std::string file = write("x.csv", text);
  const auto run = [&](double fraction, uint64_t seed) {
    Examples all = read_examples({file}, {});
    std::vector<Example> train, held_out;
    split(all, fraction, seed, train, held_out);
    std::map<int32_t, int> counts;
    std::set<std::string> seen;
    for (const Example& item : held_out) {
      ++counts[item.label];
      seen.insert(item_letters(all, item));
    }
    EXPECT_EQ(train.size() + held_out.size(), 230u);
    for (const Example& item : train) EXPECT_FALSE(seen.contains(item_letters(all, item)));
    return std::pair(counts, seen);
  };
  const auto [counts, seen] = run(0.1, 1);
  EXPECT_EQ(counts, (std::map<int32_t, int>{{0, 20}, {1, 3}, {2, 1}}));
  EXPECT_EQ(run(0.1, 1).second, seen);
  EXPECT_NE(run(0.1, 2).second, seen);
  EXPECT_EQ(run(0.9, 1).first, (std::map<int32_t, int>{{0, 180}, {1, 25}, {2, 1}}));
  EXPECT_TRUE(run(0, 1).first.empty());
}

// No window drawn for training holds a base of a held-out one: bases are told apart by their
// 16-mers.
TEST_F(Dataset, SplitOfWindowsLeaksNothing) {
  std::mt19937 random(3);
  std::string text;
  for (int i = 0; i < 3; ++i) text += fmt::format(">r{}\n{}\n", i, random_letters(random, 10'050));
  Examples all = read_examples({write("x.fa", text)},
                               {.min_length = 50, .max_length = 500, .labelled = false});
  const std::vector<std::string> before = items_of(all);
  std::vector<Example> train, held_out;
  split(all, 0.2, 7, train, held_out);
  EXPECT_EQ(items_of(all), before);
  ASSERT_EQ(held_out.size(), 13u);
  ASSERT_EQ(train.size(), 50u);
  std::set<std::string> words;
  for (const Example& item : held_out) {
    const std::string letters = item_letters(all, item);
    for (size_t i = 0; i + 16 <= letters.size(); ++i) words.insert(letters.substr(i, 16));
  }
  size_t longest = 0;
  for (int i = 0; i < 3000; ++i) {
    const uint64_t a = uint64_t{random()} << 32 | random(), b = uint64_t{random()} << 32 | random();
    const std::string letters =
        item_letters(all, draw_window(all, train[i % train.size()], 400, 2000, a, b));
    longest = std::max(longest, letters.size());
    for (size_t k = 0; k + 16 <= letters.size(); ++k)
      ASSERT_FALSE(words.contains(letters.substr(k, 16)));
  }
  EXPECT_GT(longest, 1000u);
}

TEST_F(Dataset, DrawnWindows) {
  Examples all;
  all.codes = {std::vector<uint8_t>(10'000, dna::kA), std::vector<uint8_t>(50, dna::kC)};
  const Example item{.record = 0, .begin = 100, .length = 200, .label = 3},
      small{.record = 1, .begin = 0, .length = 50};
  constexpr uint64_t kMost = ~uint64_t{0};
  EXPECT_EQ(draw_window(all, item, 0, 0, kMost, kMost).length, 200);
  EXPECT_EQ(draw_window(all, item, 0, 0, kMost, kMost).begin, 100);
  EXPECT_EQ(draw_window(all, item, 100, 1000, 0, 0).length, 100);
  EXPECT_EQ(draw_window(all, item, 100, 1000, 0, 0).begin, 0);
  EXPECT_EQ(draw_window(all, item, 100, 1000, kMost, kMost).length, 1000);
  EXPECT_EQ(draw_window(all, item, 100, 1000, kMost, kMost).begin, 9000);
  EXPECT_EQ(draw_window(all, item, 100, 1000, kMost, kMost).label, 3);
  EXPECT_EQ(draw_window(all, item, 0, 700, 0, 0).length, 700);
  EXPECT_EQ(draw_window(all, small, 100, 1000, kMost, kMost).length, 50);
  EXPECT_EQ(draw_window(all, small, 100, 1000, kMost, kMost).begin, 0);
  // Log-uniform: as many below the geometric mean as above.
  std::mt19937_64 random(4);
  int below = 0;
  for (int i = 0; i < 10'000; ++i)
    below += draw_window(all, item, 100, 1000, random(), random()).length < 316;
  EXPECT_NEAR(below, 5000, 200);
}

TEST_F(Dataset, RealSets) {
  const std::string folder = data_folder() + "/dna/";
  COIL_NEEDS_DATA(folder);
  const Examples gue = read_examples({folder + "gue/tf/0/test.csv.gz"}, {});
  EXPECT_EQ(gue.labels, (Strings{"0", "1"}));
  EXPECT_EQ(gue.items.size(), 1000u);
  for (const Example& item : gue.items) EXPECT_EQ(item.length, 101);
  const Examples species =
      read_examples({folder + "entero6/test"}, {.min_length = 500, .max_length = 10'000});
  EXPECT_EQ(species.labels.size(), 6u);
  EXPECT_EQ(species.labels[0], "Escherichia_coli");
  EXPECT_GT(species.items.size(), 3000u);
}

}  // namespace
}  // namespace coil
