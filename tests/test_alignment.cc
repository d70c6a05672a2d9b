// SAM, BAM and CRAM as records in sequencing orientation; tags written and read back by samtools;
// every error by its message.
#include "genomics/alignment.h"

#include <htslib/sam.h>
#include <sys/resource.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <tuple>

#include "genomics/fasta.h"
#include "tests/genomics_files.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/lsan_interface.h>
#endif

namespace coil {
namespace {

std::vector<Record> read_alignments(const std::string& path, const AlignmentOptions& options = {}) {
  return read_all(*open_alignments(path, options));
}
std::string alignment_error(const std::string& path, const AlignmentOptions& options = {}) {
  return error_of([&] { read_alignments(path, options); });
}

std::string output_of(const std::string& command) {
  std::FILE* pipe = ::popen(command.c_str(), "r");
  std::string text;
  char buffer[65536];
  for (size_t n; (n = std::fread(buffer, 1, sizeof buffer, pipe)) > 0;) text.append(buffer, n);
  EXPECT_EQ(::pclose(pipe), 0) << command;
  return text;
}
#define COIL_NEEDS_SAMTOOLS                                    \
  if (std::system("samtools --version > /dev/null 2>&1") != 0) \
  GTEST_SKIP() << "samtools is not installed"

// Two reference sequences, and reads of every kind.
class Alignment : public GenomicsTest {
 protected:
  Alignment() {
    std::mt19937 random(1);
    one_ = random_letters(random, 5000);
    two_ = random_letters(random, 3000);
    write("ref.fa", ">one\n" + one_ + "\n>two\n" + two_ + "\n");
    const auto read = [&](const std::string& name, int flag, int64_t at, const std::string& letters,
                          const std::string& tags) {
      const std::string quality = letters == "*" ? "*" : std::string(letters.size(), 'I');
      const std::string cigar =
          letters == "*" || flag & 4 ? "*" : fmt::format("{}M", letters.size());
      sam_ +=
          fmt::format("{}\t{}\t{}\t{}\t60\t{}\t*\t0\t0\t{}\t{}{}\n", name, flag,
                      flag & 4 ? "*" : "one", flag & 4 ? 0 : at + 1, cigar, letters, quality, tags);
    };
    sam_ =
        "@HD\tVN:1.6\tSO:unsorted\n@SQ\tSN:one\tLN:5000\n@SQ\tSN:two\tLN:3000\n@PG\tID:x\tPN:x\n@"
        "CO\ta remark\n";
    read("forward", 0, 100, one_.substr(100, 80), "\tXA:i:5\tYC:Z:old\tXB:Z:after");
    read("reverse", 16, 300, one_.substr(300, 70), "\tYP:f:0.5\tXA:i:6");
    read("second", 256, 400, one_.substr(400, 50), "");
    read("supplementary", 2048 + 16, 500, one_.substr(500, 60), "\tYC:i:7\tYP:i:1");
    read("empty", 4, 0, "*", "");
    read("iupac", 4, 0, "ACGTNRYM", "");
    read("pair", 77, 0, "ACG", "");
    read("pair", 141, 0, "TTG", "");
    write("x.sam", sam_);
    options_.reference = path("ref.fa");
  }

  // The same records in another format, by ending.
  std::string convert(const std::string& from, const std::string& name) const {
    const std::vector<Record> records = read_alignments(from, all_kinds());
    TagWriter writer(from, path(name), all_kinds(), "0", "");
    for (size_t i = 0; i < records.size(); ++i) writer.answer("none", 0);
    writer.close();
    return path(name);
  }
  AlignmentOptions all_kinds() const {
    return {.reference = options_.reference, .secondary = true, .supplementary = true};
  }

  std::string one_, two_, sam_;
  AlignmentOptions options_;
};

std::string reverse_complement_of(std::string letters) {
  std::reverse(letters.begin(), letters.end());
  for (char& c : letters) c = dna::letter_of(dna::complement(dna::code_of(c)));
  return letters;
}

TEST_F(Alignment, OrientationAndKinds) {
  const std::vector<Record> primary = {{"forward", one_.substr(100, 80)},
                                       {"reverse", reverse_complement_of(one_.substr(300, 70))},
                                       {"iupac", "ACGTNNNN"},
                                       {"pair", "ACG"},
                                       {"pair", "TTG"}};
  std::vector<Record> all = primary;
  all.insert(all.begin() + 2, {{"second", one_.substr(400, 50)},
                               {"supplementary", reverse_complement_of(one_.substr(500, 60))}});
  std::vector<std::string> files = {path("x.sam"), compress("z.sam.gz", sam_, "w"),
                                    compress("g.sam.gz", sam_, "wg")};
  for (const char* name : {"x.bam", "x.cram", "x.sam.gz"})
    files.push_back(convert(path("x.sam"), name));
  for (const std::string& file : files) {
    SCOPED_TRACE(file);
    EXPECT_EQ(read_alignments(file, options_), primary);
    EXPECT_EQ(read_alignments(file, all_kinds()), all);
    AlignmentOptions threads = options_;
    threads.threads = 3;
    EXPECT_EQ(read_alignments(file, threads), primary);
  }
  EXPECT_TRUE(read_alignments(write("none.sam", "@SQ\tSN:one\tLN:5000\n")).empty());
}

TEST_F(Alignment, LongReadsComeInSegments) {
  std::mt19937 random(2);
  std::string sam;
  std::vector<Record> expected;
  for (int64_t length : {Source::kRun - 1, Source::kRun, Source::kRun + 1, int64_t{300'001}})
    for (int flag : {4, 4 + 16}) {
      const std::string letters = random_letters(random, length);
      sam += fmt::format("r\t{}\t*\t0\t0\t*\t*\t0\t0\t{}\t*\n", flag, letters);
      expected.push_back({"r", flag & 16 ? reverse_complement_of(letters) : letters});
    }
  EXPECT_EQ(read_alignments(write("long.sam", sam)), expected);
  EXPECT_EQ(read_alignments(convert(path("long.sam"), "long.bam")), expected);
}

TEST_F(Alignment, BadFiles) {
  EXPECT_CONTAINS(alignment_error(path("none.bam")), "none.bam: cannot open: No such file");
  EXPECT_CONTAINS(alignment_error(path("ref.fa")), "ref.fa: SAM, BAM or CRAM was expected");
  EXPECT_CONTAINS(alignment_error(write("bad.sam", sam_ + "r\t0\tone\tx\n")),
                  "bad.sam: truncated or damaged at record 9");
  EXPECT_CONTAINS(alignment_error(write("same.sam", "r\t4\t*\t0\t0\t*\t*\t0\t0\tAC=\t*\n")),
                  "record 'r' has '=' at base 3");
}

TEST_F(Alignment, TruncatedFiles) {
  for (const char* name : {"x.bam", "x.cram", "z.sam.gz", "g.sam.gz"}) {
    if (name[0] == 'x') {
      convert(path("x.sam"), name);
    } else {
      compress(name, sam_, name[0] == 'z' ? "w" : "wg");
    }
    const std::string whole = read_file(path(name));
    for (size_t cut = 1; cut < whole.size(); cut += 1 + cut / 10) {
      const std::string message =
          alignment_error(write(std::string("cut.") + name, whole.substr(0, cut)), options_);
      EXPECT_NE(message, "") << name << " cut at " << cut << " of " << whole.size();
    }
    for (size_t back = 1; back <= 40; ++back) {
      const std::string cut =
          write(std::string("cut.") + name, whole.substr(0, whole.size() - back));
      EXPECT_CONTAINS(alignment_error(cut, options_), "truncated") << name << " less " << back;
    }
  }
}

TEST_F(Alignment, TruncatedPipes) {
  convert(path("x.sam"), "x.bam");
  const std::string whole = read_file(path("x.bam"));
#ifdef __SANITIZE_ADDRESS__
  const int most_threads =
      1;  // htslib's pool now and then loses 32 bytes when it stops at an error
#else
  const int most_threads = 2;
#endif
  for (size_t back : {0, 1, 28, 200})
    for (int threads = 1; threads <= most_threads; ++threads) {
      int ends[2];
      ASSERT_EQ(::pipe(ends), 0);
      const int kept = ::dup(STDIN_FILENO);
      ::dup2(ends[0], STDIN_FILENO);
      ::close(ends[0]);
      const ssize_t sent = ::write(ends[1], whole.data(), whole.size() - back);  // fits the pipe
      ::close(ends[1]);
      EXPECT_EQ(sent, static_cast<ssize_t>(whole.size() - back));
      const std::string message = alignment_error("-", {.threads = threads});
      ::dup2(kept, STDIN_FILENO);
      ::close(kept);
      if (back == 0) {
        EXPECT_EQ(message, "");
      } else {
        EXPECT_CONTAINS(message, "truncated") << back << " " << threads;
      }
    }
}

TEST_F(Alignment, CramReferences) {
  const std::string cram = convert(path("x.sam"), "x.cram");
  const std::vector<Record> expected = read_alignments(path("x.sam"));
  EXPECT_EQ(read_alignments(cram, options_), expected);
  // Its header names the file that it was written with; when that is gone nothing else may be
  // asked.
  std::filesystem::rename(path("ref.fa"), path("moved.fa"));
  const std::string message = alignment_error(cram);
  EXPECT_CONTAINS(message, "x.cram: record 1 cannot be decoded: its reference is not at hand");
  EXPECT_EQ(read_alignments(cram, {.reference = path("moved.fa")}), expected);
  std::mt19937 random(3);
  write("other.fa",
        ">one\n" + random_letters(random, 5000) + "\n>two\n" + random_letters(random, 3000) + "\n");
  EXPECT_CONTAINS(alignment_error(cram, {.reference = path("other.fa")}),
                  "other.fa is not its reference");
  EXPECT_CONTAINS(alignment_error(cram, {.reference = path("none.fa")}),
                  "none.fa: the reference cannot be read");
  const std::string ref_path = std::getenv("REF_PATH") ? std::getenv("REF_PATH") : "";
  EXPECT_NE(ref_path, "");  // empty, it would stand for a server
  EXPECT_EQ(ref_path.find("://"), std::string::npos);
}

TEST_F(Alignment, CramWithItsReferenceInside) {
  COIL_NEEDS_SAMTOOLS;
  output_of(fmt::format("samtools view -T {0} -C --output-fmt-option embed_ref=1 -o {1} {2}",
                        path("ref.fa"), path("in.cram"), path("x.sam")));
  std::filesystem::remove(path("ref.fa"));
  EXPECT_EQ(read_alignments(path("in.cram")), read_alignments(path("x.sam")));
}

TEST_F(Alignment, RealFiles) {
  const std::string folder = data_folder() + "/dna/alignments/";
  COIL_NEEDS_DATA(folder);
  const std::vector<Record> bam = read_alignments(folder + "ga4gh_brca1/HG00096.bam");
  EXPECT_EQ(bam.size(), 4068u);
  EXPECT_EQ(read_alignments(folder + "ga4gh_brca1/HG00096.cram",
                            {.reference = folder + "ga4gh_brca1/ref_brca1.fa"}),
            bam);
  COIL_NEEDS_SAMTOOLS;
  const std::string fasta =
      output_of("samtools fasta -n " + folder + "ga4gh_brca1/HG00096.bam 2> /dev/null");
  const auto sorted = [](std::vector<Record> records) {  // samtools puts mates in order
    std::sort(records.begin(), records.end(), [](const Record& a, const Record& b) {
      return std::tie(a.name, a.letters) < std::tie(b.name, b.letters);
    });
    return records;
  };
  EXPECT_EQ(sorted(read_all(*open_fasta({write("samtools.fa", fasta)}, false))), sorted(bam));
}

// Tags as `samtools view` shows them, and the lines without them.
struct Tagged {
  std::string tags, rest;
};
Tagged take_tags(const std::string& view) {
  Tagged parts;
  for (size_t begin = 0; begin < view.size();) {  // a field with the byte that closes it
    const size_t end = std::min(view.find_first_of("\t\n", begin), view.size() - 1);
    const std::string field = view.substr(begin, end - begin);
    if (field.starts_with("YC:") || field.starts_with("YP:")) {
      parts.tags += "\t" + field;
      parts.rest.back() = view[end];  // in the place of the tab before it
    } else {
      parts.rest += field + view[end];
    }
    begin = end + 1;
  }
  return parts;
}

// What CRAM does not keep (the quality of unmapped reads' mapping) or adds on reading (MD, NM) is
// samtools' choice.
std::string view_of(const std::string& in, const std::string& out, const std::string& reference) {
  const std::string view = "samtools view -T " + reference + " ";
  return output_of(view + (out.ends_with(".cram") ? "-u -C " + in + " | " + view + "-" : in));
}

TEST_F(Alignment, TagsAreReadBackBySamtools) {
  COIL_NEEDS_SAMTOOLS;
  convert(path("x.sam"), "in.bam");
  convert(path("x.sam"), "in.cram");
  const std::string reference = " -T " + path("ref.fa") + " ";
  for (const std::string& in : {path("x.sam"), path("in.bam"), path("in.cram")})
    for (const char* ending : {".bam", ".cram", ".sam", ".sam.gz"}) {
      SCOPED_TRACE(in + " to " + ending);
      const std::string out = path("out") + ending;
      TagWriter writer(in, out, options_, "1.2.3", "coil classify\tmodel");
      for (int i = 0; i < 5; ++i)
        writer.answer(i == 3 ? "two words\t\xc3" : fmt::format("c{}", i), i / 8.0);
      EXPECT_FALSE(std::filesystem::exists(out));
      writer.close();
      const std::string before = view_of(in, out, path("ref.fa"));
      const std::string after = output_of("samtools view" + reference + out);
      EXPECT_EQ(take_tags(after).rest, take_tags(before).rest);
      std::string lines = "\n" + after;
      EXPECT_CONTAINS(lines, "\tYC:Z:c0");
      EXPECT_CONTAINS(lines, "\tYC:Z:two words__\tYP:f:0.375");
      if (in.ends_with("x.sam")) {
        EXPECT_EQ(take_tags(after).tags,
                  "\tYC:Z:c0\tYP:f:0\tYP:f:0.125\tYC:Z:c1\tYC:i:7\tYP:i:1\tYC:Z:c2\tYP:f:0.25\tYC:"
                  "Z:two words__\tYP:f:0.375"
                  "\tYC:Z:c4\tYP:f:0.5");
        EXPECT_CONTAINS(after,
                        "\tXA:i:5\tYC:Z:c0\tXB:Z:after\tYP:f:0");  // an old tag keeps its place
      }
      const std::string header = output_of("samtools view -H --no-PG" + reference + out);
      EXPECT_CONTAINS(header, "\tPN:coil\tPP:");
      EXPECT_CONTAINS(header, "\tVN:1.2.3\tCL:coil classify model\n");
      std::filesystem::remove(out);
    }
}

TEST_F(Alignment, TagsOfAnotherType) {
  TagWriter writer(path("x.sam"), path("out.sam"), all_kinds(), "0", "");
  for (int i = 0; i < 7; ++i) writer.answer("k", 1);
  writer.close();
  EXPECT_CONTAINS(read_file(path("out.sam")),
                  "IIII\tYC:Z:k\tYP:f:1\nempty\t4");  // after YC:i:7 YP:i:1
}

TEST_F(Alignment, RealFilesTagged) {
  COIL_NEEDS_SAMTOOLS;
  const std::string folder = data_folder() + "/dna/alignments/";
  COIL_NEEDS_DATA(folder);
  const auto check_one = [&](const std::string& in, const std::string& reference,
                             const std::string& name) {
    SCOPED_TRACE(in + " to " + name);
    const AlignmentOptions options{.reference = reference};
    const size_t records = read_alignments(in, options).size();
    TagWriter writer(in, path(name), options, "0", "coil");
    for (size_t i = 0; i < records; ++i) writer.answer("x", 0.75);
    writer.close();
    const std::string view = "samtools view -T " + reference + " ";
    const Tagged tagged = take_tags(output_of(view + path(name)));
    EXPECT_TRUE(tagged.rest == view_of(in, name, reference));
    EXPECT_EQ(tagged.tags.size(), records * (std::string("\tYC:Z:x\tYP:f:0.75").size()));
  };
  for (const char* name : {"o.bam", "o.cram"}) {
    for (const char* in : {"HG00096.bam", "HG00096.cram"})
      check_one(folder + "ga4gh_brca1/" + in, folder + "ga4gh_brca1/ref_brca1.fa", name);
    for (const char* in : {"mpileup.1.bam", "mpileup.2.cram"})
      check_one(folder + "bcftools_mpileup/" + in, folder + "bcftools_mpileup/mpileup.ref.fa",
                name);
  }
}

TEST_F(Alignment, TagWriterErrors) {
  const auto error = [&](const std::string& in, const std::string& out, int answers) {
    return error_of([&] {
      TagWriter writer(in, out, {}, "0", "");
      for (int i = 0; i < answers; ++i) writer.answer("x", 0);
      writer.close();
    });
  };
  const std::string in = path("x.sam");
  EXPECT_CONTAINS(error("-", path("o.bam"), 5), "standard input cannot be read twice");
  EXPECT_CONTAINS(error(in, path("o.txt"), 5),
                  "o.txt: a name ending in .bam, .cram, .sam or .sam.gz was expected");
  EXPECT_CONTAINS(error(in, path("o.cram"), 5), "o.cram: writing CRAM needs the reference");
  EXPECT_CONTAINS(error(in, path("no/o.bam"), 5), "no/o.bam: cannot write: No such file");
  EXPECT_CONTAINS(error(in, path("o.bam"), 4),
                  "x.sam: has more records than when it was first read");
  EXPECT_CONTAINS(error(in, path("o.bam"), 6),
                  "x.sam: has fewer records than when it was first read");
  EXPECT_FALSE(std::filesystem::exists(path("o.bam")));
  EXPECT_FALSE(std::filesystem::exists(path("o.bam.tmp")));
  EXPECT_EQ(error(in, path("o.bam"), 5), "");
  EXPECT_TRUE(std::filesystem::exists(path("o.bam")));
}

// A limit on file sizes stands for a full disk.
TEST_F(Alignment, FullDisk) {
#ifdef __SANITIZE_ADDRESS__
  const __lsan::ScopedDisabler htslib_loses_its_buffer_when_the_last_flush_fails;
#endif
  std::mt19937 random(4);
  std::string sam;
  for (int i = 0; i < 2000; ++i) {
    const std::string letters = random_letters(random, 200);
    sam += fmt::format("r{}\t4\t*\t0\t0\t*\t*\t0\t0\t{}\t{}\n", i, letters,
                       random_letters(random, 200, "ABCDEFGHIJ"));
  }
  const std::string in = write("many.sam", sam);
  for (const char* name : {"o.bam", "o.sam"}) {
    rlimit old;
    getrlimit(RLIMIT_FSIZE, &old);
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);
    const rlimit low{.rlim_cur = 100'000, .rlim_max = old.rlim_max};
    setrlimit(RLIMIT_FSIZE, &low);
    const std::string message = error_of([&] {
      TagWriter writer(in, path(name), {}, "0", "");
      for (int i = 0; i < 2000; ++i) writer.answer("x", 0);
      writer.close();
    });
    setrlimit(RLIMIT_FSIZE, &old);
    std::signal(SIGXFSZ, handler);
    EXPECT_CONTAINS(message, fmt::format("{}: cannot write: File too large", name));
    EXPECT_FALSE(std::filesystem::exists(path(name)));
    EXPECT_FALSE(std::filesystem::exists(path(name) + ".tmp"));
  }
}

}  // namespace
}  // namespace coil
