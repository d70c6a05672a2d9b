// FASTA and FASTQ, plain, gzip or bgzip, "-" for stdin, streamed: blocks go through one state
// machine that hands over segments of at most Source::kRun codes; a 250 Mb record on one line is
// never held. A worker thread reads ahead. Several files are one stream. A name is the header's
// first word. FASTQ may wrap its lines. Errors (coil::Error, naming file and record or line):
// cannot open, truncated gzip/bgzip, no header, no records, NUL byte, record without a name, empty
// record, protein given as DNA, FASTQ qualities of another length, and in FASTA a duplicate name
// within a file (as 64-bit hashes of its first four million names; not in FASTQ, where interleaved
// mates share names).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model/batch.h"

namespace coil {

enum class FileKind : uint8_t { fasta, fastq, sam, bam, cram, unknown };
FileKind sniff(const std::string& path);  // by content, through compression; not for "-"

// unique_names: whether a duplicate name is an error; false where nothing refers to records by
// name.
std::unique_ptr<Source> open_fasta(std::vector<std::string> paths, bool unique_names = true);

// What --paired needs: two files (or one interleaved) of equal names; records 2i and 2i+1 are mates
// and both carry the first's name without a closing /1 or /2. Names match if equal, or if they
// differ in a closing 1 and 2 after
// '/', '.' or '_' only. Throws where names do not match or a mate is missing.
std::unique_ptr<Source> open_pairs(const std::string& first,
                                   const std::string& second /* "": interleaved */);

}  // namespace coil
