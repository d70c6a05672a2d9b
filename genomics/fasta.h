// FASTA and FASTQ, plain, gzip or bgzip, "-" for stdin, streamed: blocks go through one state machine that hands
// over segments of at most Source::kRun codes; a 250 Mb record on one line is never held. A worker thread reads
// ahead. Several files are one stream.
// Errors (coil::Error, naming file and record or line): cannot open, truncated gzip/bgzip, no header, NUL byte,
// empty record, protein given as DNA, duplicate name within a file, FASTQ qualities of another length.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model/batch.h"

namespace coil {

enum class FileKind : uint8_t { fasta, fastq, sam, bam, cram, unknown };
FileKind sniff(const std::string& path);  // by content, through compression; not for "-"

std::unique_ptr<Source> open_fasta(std::vector<std::string> paths);

// What --paired needs: two files (or one interleaved) of equal names; record 2i and 2i+1 are mates. Throws where
// names do not match.
std::unique_ptr<Source> open_pairs(const std::string& first, const std::string& second /* "": interleaved */);

}  // namespace coil
