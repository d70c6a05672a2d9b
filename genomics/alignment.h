// SAM, BAM and CRAM records as DNA: reverse-strand alignments are turned back to sequencing
// orientation; secondary and supplementary records are left out unless asked, and so are records
// without a sequence ('*'). Letters other than A C G T read as N. A long read comes in several
// segments; a file without records is no error. CRAM takes its reference from `reference`, from
// where its header's UR names a local file, or from a local cache (REF_PATH without its URLs,
// REF_CACHE, ~/.cache/hts-ref); the network is never asked. The first opening sets REF_PATH in this
// process to say so. Errors: truncated or damaged file, CRAM without reference, '=' in a sequence.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model/batch.h"

namespace coil {

struct AlignmentOptions {
  std::string reference = {};  // FASTA with .fai (made if missing and possible), for CRAM
  bool secondary = false, supplementary = false;
  int threads = 1;
};
std::unique_ptr<Source> open_alignments(const std::string& path, const AlignmentOptions& options);

// Reads `in` again record by record and writes each to `out` (.bam, .cram, .sam or .sam.gz by
// ending) with the tags of its answer added (in the place of older ones of that name), a @PG line
// added to the header, all else untouched.
//   YC:Z label (bytes that SAM does not allow in a tag become '_')   YP:f probability
// Records that were left out (secondary, no sequence) are written as they are. Give answers in the
// order of the source's records. Until close() the file is `out`.tmp; if close() is never reached
// it is removed.
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
