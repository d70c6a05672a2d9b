// SAM, BAM and CRAM records as DNA: reverse-strand alignments are turned back to sequencing orientation;
// secondary and supplementary records are left out unless asked. CRAM needs `reference`; the network is never
// asked. Errors: truncated file, CRAM without reference.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model/batch.h"

namespace coil {

struct AlignmentOptions {
  std::string reference;                        // FASTA with .fai, for CRAM
  bool secondary = false, supplementary = false;
  int threads = 1;
};
std::unique_ptr<Source> open_alignments(const std::string& path, const AlignmentOptions& options);

// Reads `in` again record by record and writes each to `out` (.bam, .cram or .sam by ending) with the tags of its
// answer added, a @PG line added to the header, all else untouched.
//   YC:Z label   YP:f probability
// Records that were left out (secondary, no sequence) are written as they are. Give answers in the order of
// the source's records.
class TagWriter {
 public:
  TagWriter(const std::string& in, const std::string& out, const AlignmentOptions& options,
            const std::string& version, const std::string& command_line);
  ~TagWriter();
  void answer(const std::string& label, double probability);  // of the next record of the source
  void close();  // writes the rest, checks every write and the EOF; throws on a full disk

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace coil
