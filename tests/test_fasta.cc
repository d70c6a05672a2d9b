// FASTA and FASTQ: what is read, from every compression, against htslib's kseq; every error by its
// message.
#include "genomics/fasta.h"

#include <htslib/kseq.h>
#include <sys/resource.h>

#include <algorithm>
#include <thread>

#include "tests/genomics_files.h"

KSEQ_INIT(BGZF*, bgzf_read)

namespace coil {
namespace {

using Fasta = GenomicsTest;

std::vector<Record> read_fasta(const std::vector<std::string>& paths) {
  return read_all(*open_fasta(paths));
}
std::string fasta_error(const std::string& path) {
  return error_of([&] { read_fasta({path}); });
}

TEST_F(Fasta, LettersLineEndsAndNames) {
  const std::string text =
      "\n>one  first record\r\nACGT\r\nacgtu\r\n\r\n> two\nRYSWKMBDHVNX\n\n\n>three\tx\n-A.C-\n "
      "\n>four\nGATTACA";
  const std::vector<Record> expected = {
      {"one", "ACGTACGTT"}, {"two", "NNNNNNNNNNNN"}, {"three", "AC"}, {"four", "GATTACA"}};
  EXPECT_EQ(read_fasta({write("x.fa", text)}), expected);
  EXPECT_EQ(read_fasta({compress("x.gz", text, "wg")}), expected);
  EXPECT_EQ(read_fasta({compress("x.bgz", text, "w")}), expected);
  EXPECT_EQ(read_fasta({write("bom.fa", "\xef\xbb\xbf>a\nA\n")}),
            (std::vector<Record>{{"a", "A"}}));
}

TEST_F(Fasta, Fastq) {
  const std::string text =
      "@r1 x\nACGT\n+r1 x\n@>+I\n@r2\nAC\nGN.\n+\nII\nI@I\n\n@r3\r\nA\r\n+\r\n@\r\n@r1\nT\n+\nI";
  const std::vector<Record> expected = {{"r1", "ACGT"}, {"r2", "ACGNN"}, {"r3", "A"}, {"r1", "T"}};
  EXPECT_EQ(read_fasta({write("x.fq", text)}), expected);
}

TEST_F(Fasta, SeveralFilesAreOneStream) {
  const std::string a = write("a.fa", ">x\nA\n>y\nC\n"), b = write("b.fq", "@x\nG\n+\nI\n");
  EXPECT_EQ(read_fasta({a, b, a}),
            (std::vector<Record>{
                {"x", "A", 0}, {"y", "C", 0}, {"x", "G", 1}, {"x", "A", 2}, {"y", "C", 2}}));
}

TEST_F(Fasta, RecordsOfEveryLengthAroundTheRunAndTheBlock) {
  std::mt19937 random(1);
  std::vector<Record> expected;
  std::string fasta, fastq;
  for (int64_t base : {int64_t{1}, Source::kRun, 2 * Source::kRun, int64_t{1} << 18})
    for (int64_t more : {0, 1, 2, 59}) {
      const std::string letters = random_letters(random, base + more, "ACGTN");
      const std::string name =
          fmt::format("r{}_{}_{}", base, more, std::string(random() % 300, 'n'));
      const size_t width = 1 + random() % 200;
      fasta += fmt::format(">{} {}\n", name, std::string(random() % 1000, 'd'));
      for (size_t i = 0; i < letters.size(); i += width)
        fasta += letters.substr(i, width) + (more == 59 ? "\r\n" : "\n");
      if (more == 2) fasta += " \n\n";
      fastq += fmt::format("@{}\n{}\n+\n{}\n", name, letters, std::string(letters.size(), '@'));
      expected.push_back({name, letters});
    }
  EXPECT_EQ(read_fasta({write("x.fa", fasta)}), expected);
  EXPECT_EQ(read_fasta({compress("x.fa.gz", fasta, "wg")}), expected);
  EXPECT_EQ(read_fasta({write("x.fq", fastq)}), expected);
}

// A header, a line, a run of qualities cut by the end of the 256 KiB block at every place.
TEST_F(Fasta, BlocksEndAnywhere) {
  for (size_t shift = 0; shift < 40; ++shift) {
    const std::string head(262144 - 30 + shift - 8, 'A');
    EXPECT_EQ(read_fasta({write("x.fa", ">h\n" + head + "\r\n>name more\r\nACGT\r\n>z\r\nC")}),
              (std::vector<Record>{{"h", head}, {"name", "ACGT"}, {"z", "C"}}));
    const std::string half(131072 - 30 + shift / 2, 'A');
    const std::string quality(half.size() - shift % 2, '+');
    EXPECT_EQ(
        read_fasta({write("x.fq", "@h\n" + half + "\n+\n" + quality + std::string(shift % 2, '@') +
                                      "\n@name more\nACGT\n+\n@@@@\n")}),
        (std::vector<Record>{{"h", half}, {"name", "ACGT"}}));
  }
}

void compare_with_kseq(const std::string& file) {
  SCOPED_TRACE(file);
  BGZF* stream = bgzf_open(file.c_str(), "r");
  ASSERT_NE(stream, nullptr);
  kseq_t* sequence = kseq_init(stream);
  const std::vector<Record> records = read_all(*open_fasta({file}, false));
  size_t i = 0;
  for (; kseq_read(sequence) >= 0; ++i) {
    ASSERT_LT(i, records.size());
    std::string letters(sequence->seq.s, sequence->seq.l);
    for (char& c : letters) c = dna::letter_of(dna::code_of(c));
    if (sequence->name.l > 0) {  // kseq has none for "> name"
      EXPECT_EQ(records[i].name, sequence->name.s);
    }
    EXPECT_TRUE(records[i].letters == letters) << sequence->name.s;
  }
  EXPECT_EQ(i, records.size());
  kseq_destroy(sequence);
  bgzf_close(stream);
}

TEST_F(Fasta, RealFilesReadAsKseqReadsThem) {
  const std::string folder = data_folder() + "/dna";
  COIL_NEEDS_DATA(folder);
  int64_t files = 0;
  for (const char* inner : {"/yeast", "/fastq/hutspot_chrM", "/cnn_promoters", "/eukaryotes"})
    for (const auto& entry : std::filesystem::directory_iterator(folder + inner)) {
      const std::string name = entry.path().string();
      if (entry.is_directory() || name.ends_with(".fai") || name.ends_with(".gzi")) continue;
      const FileKind kind = sniff(name);
      if (kind != FileKind::fasta && kind != FileKind::fastq) continue;
      compare_with_kseq(name);
      ++files;
    }
  EXPECT_GE(files, 8);
}

TEST_F(Fasta, BadInputNamesFileAndPlace) {
  const auto says = [&](const std::string& text, const std::string& part) {
    const std::string message = fasta_error(write("bad.fa", text));
    EXPECT_CONTAINS(message, path("bad.fa") + ": ");
    EXPECT_CONTAINS(message, part);
    EXPECT_EQ(message.find('\n'), std::string::npos);
  };
  says("", "no records");
  says("\n\n", "no records");
  says("ACGT\n", "line 1 begins with 'A'; a FASTA ('>') or FASTQ ('@') header was expected");
  says(">x\nACGTACGTACGTL\n",
       "record 'x' has 'L' at base 13 (line 2), which is no DNA letter (protein given as DNA?)");
  says(">x\nAC-GT\nAC*\n", "record 'x' has '*' at base 7 (line 3)");
  says(">x\nAC5\n", "record 'x' has '5' at base 3 (line 2), which is no DNA letter");
  says(">x\nAC\xc3\xa9\n", "byte 0xc3");
  says(std::string(">x\nAC\0G\n", 8), "NUL byte in line 2");
  says(std::string(">x\n>\0y\nA\n", 9).replace(3, 0, "A\n"), "NUL byte in line 3");
  says(std::string(">x d\0\nA\n", 8), "NUL byte in line 1");
  says(">x\n>y\nA\n", "record 'x' (before line 2) is empty");
  says(">x\nA\n>y\n\n", "record 'y' (before line 5) is empty");
  says(">x\nA\n>y", "record 'y' (before line 3) is empty");
  says(">\nA\n", "the record in line 1 has no name");
  says(">x\nA\n>", "the record in line 3 has no name");
  says(">x\nA\n>y\nA\n>x a\nA\n", "line 5: a second record is named 'x'");
  says(">x\nA\n@y\n", "'@' at base 2");
  says("@x\nACGT\n+\nIII", "record 'x', which has 4 bases and 3 qualities");
  says("@x\nACGT\n+\nIIIII\n", "line 4: record 'x' has 4 bases and another number of qualities");
  says("@x\nACGT\n+\nIII\n@y\nA\n+\nI\n", "record 'x' has 4 bases and another number of qualities");
  says("@x\nACGT\n", "truncated: it ends inside record 'x'");
  says("@x\nACGT\n+x", "truncated: it ends inside record 'x'");
  says("@x\n\n+\n\n", "record 'x' (before line 3) is empty");
  says("@x\nA\n+\nI\nA\n", "line 5 begins with 'A'; the next header ('@') was expected");
  says(">" + std::string(70000, 'n') + "\nA\n", "the name in line 1 is longer than");
  EXPECT_CONTAINS(fasta_error(path("none.fa")), "none.fa: cannot open: No such file");
  EXPECT_CONTAINS(fasta_error(path(".")), "Is a directory");
}

TEST_F(Fasta, RecordsBeforeAnErrorArrive) {
  const std::unique_ptr<Source> source = open_fasta({write("x.fa", ">a\nA\n>b\nC\n>c\nL\n")});
  Segment segment;
  EXPECT_TRUE(source->next(segment));
  EXPECT_TRUE(source->next(segment));
  EXPECT_EQ(segment.name, "b");
  EXPECT_THROW(source->next(segment), Error);
  EXPECT_THROW(source->next(segment), Error);
}

TEST_F(Fasta, TruncatedCompressedFilesAreErrors) {
  std::mt19937 random(2);
  std::string text;
  for (int i = 0; i < 40; ++i) text += fmt::format(">r{}\n{}\n", i, random_letters(random, 5000));
  for (const char* mode : {"wg", "w"}) {
    const std::string whole = read_file(compress("whole", text, mode));
    ASSERT_EQ(fasta_error(path("whole")), "");
    std::vector<size_t> cuts;
    for (size_t cut = 20; cut < whole.size(); cut += whole.size() / 60) cuts.push_back(cut);
    for (size_t back = 1; back <= 28; ++back)
      cuts.push_back(whole.size() - back);  // 28: bgzip's last block
    for (size_t cut : cuts) {
      const std::string message = fasta_error(write("cut.fa.gz", whole.substr(0, cut)));
      EXPECT_CONTAINS(message, "truncated") << mode << " cut at " << cut << " of " << whole.size();
    }
  }
}

TEST_F(Fasta, LongRecordsNeedNoMemory) {
  constexpr int64_t kMegabases = 30;
  std::mt19937 random(3);
  const std::string piece = random_letters(random, 1'000'000);
  BGZF* file = bgzf_open(path("long.fa.gz").c_str(), "wg1");
  ASSERT_EQ(bgzf_write(file, ">long\n", 6), 6);
  for (int64_t i = 0; i < kMegabases; ++i)
    ASSERT_EQ(bgzf_write(file, piece.data(), piece.size()), 1'000'000);
  ASSERT_EQ(bgzf_close(file), 0);
  const auto peak = [] {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_maxrss;  // KiB
  };
  const int64_t before = peak();
  const std::unique_ptr<Source> source = open_fasta({path("long.fa.gz")});
  Segment segment;
  int64_t length = 0, wrong = 0;
  while (source->next(segment))
    for (uint8_t code : segment.codes) wrong += dna::letter_of(code) != piece[length++ % 1'000'000];
  EXPECT_EQ(length, kMegabases * 1'000'000);
  EXPECT_EQ(wrong, 0);
  EXPECT_LT(peak() - before, 12 * 1024);
}

TEST_F(Fasta, ConsumerMayStopEarly) {
  std::mt19937 random(4);
  std::string text;
  for (int i = 0; i < 3000; ++i) text += fmt::format(">r{}\n{}\n", i, random_letters(random, 500));
  const std::string file = write("x.fa", text);
  for (int i = 0; i < 50; ++i) {
    const std::unique_ptr<Source> source = open_fasta({file});
    Segment segment;
    for (int k = 0; k < i; ++k) ASSERT_TRUE(source->next(segment));
  }
}

TEST_F(Fasta, StandardInput) {
  std::mt19937 random(5);
  const std::string letters = random_letters(random, 300'000);
  compress("x.gz", ">piped\n" + letters + "\n", "w");
  for (const std::string& sent : {">piped\n" + letters + "\n", read_file(path("x.gz"))}) {
    int ends[2];
    ASSERT_EQ(::pipe(ends), 0);
    const int kept = ::dup(STDIN_FILENO);
    ::dup2(ends[0], STDIN_FILENO);
    ::close(ends[0]);
    std::thread writer([&] {
      EXPECT_EQ(::write(ends[1], sent.data(), sent.size()), static_cast<ssize_t>(sent.size()));
      ::close(ends[1]);
    });
    EXPECT_EQ(read_fasta({"-"}), (std::vector<Record>{{"piped", letters}}));
    writer.join();
    ::dup2(kept, STDIN_FILENO);
    ::close(kept);
  }
}

TEST_F(Fasta, Pairs) {
  const std::string first = write("1.fq", "@a/1\nAC\n+\nII\n@b x\nG\n+\nI\n");
  const std::string second = write("2.fq", "@a/2\nTT\n+\nII\n@b y\nC\n+\nI\n");
  const std::vector<Record> expected = {
      {"a", "AC", 0}, {"a", "TT", 1}, {"b", "G", 0}, {"b", "C", 1}};
  EXPECT_EQ(read_all(*open_pairs(first, second)), expected);
  std::vector<Record> together = expected;
  for (Record& record : together) record.file = 0;
  const std::string mixed = write("m.fa", ">a/1\nAC\n>a/2\nTT\n>b\nG\n>b\nC\n");
  EXPECT_EQ(read_all(*open_pairs(mixed, "")), together);

  const auto error = [](const std::string& a, const std::string& b) {
    return error_of([&] { read_all(*open_pairs(a, b)); });
  };
  EXPECT_CONTAINS(error(first, write("o.fq", "@a\nT\n+\nI\n@c\nT\n+\nI\n")),
                  "'c' stands where the mate of 'b' was expected");
  EXPECT_CONTAINS(error(first, write("s.fq", "@a\nT\n+\nI\n")), "s.fq: 'b' has no mate");
  EXPECT_CONTAINS(error(path("s.fq"), first), "1.fq: 'b' has no mate in");
  EXPECT_CONTAINS(error(write("odd.fq", "@a\nT\n+\nI\n@a\nT\n+\nI\n@b\nT\n+\nI\n"), ""),
                  "odd.fq: 'b' has no mate");
}

TEST_F(Fasta, RealPairs) {
  const std::string folder = data_folder() + "/dna/fastq/hutspot_chrM";
  COIL_NEEDS_DATA(folder);
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(folder))
    if (entry.path().string().ends_with("fastq.gz") || entry.path().string().ends_with("fq.gz"))
      files.push_back(entry.path().string());
  std::sort(files.begin(), files.end());
  ASSERT_GE(files.size(), 2u);
  const std::vector<Record> first = read_fasta({files[0]}), second = read_fasta({files[1]});
  const std::vector<Record> pairs = read_all(*open_pairs(files[0], files[1]));
  ASSERT_EQ(pairs.size(), first.size() + second.size());
  for (size_t i = 0; i < pairs.size(); ++i)
    EXPECT_EQ(pairs[i].letters, (i % 2 ? second : first)[i / 2].letters);
}

TEST_F(Fasta, KindByContent) {
  EXPECT_EQ(sniff(compress("a", "\n>x\nA\n", "wg")), FileKind::fasta);
  EXPECT_EQ(sniff(write("b", "@r\nA\n+\nI\n")), FileKind::fastq);
  EXPECT_EQ(sniff(write("c", "@SQ\tSN:x\tLN:5\n")), FileKind::sam);
  EXPECT_EQ(sniff(write("d", "r\t0\tx\t1\t60\t1M\t*\t0\t0\tA\tI\n")), FileKind::sam);
  EXPECT_EQ(sniff(write("e", "sequence,label\nACGT,0\n")), FileKind::unknown);
  EXPECT_EQ(sniff(write("f", "")), FileKind::unknown);
  const std::string folder = data_folder() + "/dna/alignments/ga4gh_brca1/";
  COIL_NEEDS_DATA(folder);
  EXPECT_EQ(sniff(folder + "HG00096.bam"), FileKind::bam);
  EXPECT_EQ(sniff(folder + "HG00096.cram"), FileKind::cram);
  EXPECT_EQ(sniff(folder + "ref_brca1.fa"), FileKind::fasta);
}

}  // namespace
}  // namespace coil
