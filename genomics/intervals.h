// Regions: chr1:1,000-2,000 (1-based, both ends in, as samtools) and BED files (0-based, half
// open).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "model/batch.h"

namespace coil {

struct Interval {
  std::string name = {};               // sequence
  int64_t begin = 0, end = INT64_MAX;  // 0-based, half open
  std::string text =
      {};  // the region as given: where a sequence has all of it as its name, that one
};
// name, name:from, name:from-to, name:-to, {na:me}:from-to. Throws where numbers make no region.
Interval parse_region(const std::string& text);
// The first three columns; comments, track and browser lines are passed over. Throws naming the
// line.
std::vector<Interval> read_bed(const std::string& path);

// Regions of one FASTA, plain or bgzip, through its .fai (made beside the file if missing and
// possible; else a coil::Error with the hint `samtools faidx FILE`). Record names are
// name:begin+1-end; Segment::offset is begin. A region that ends past its sequence is clipped; one
// that begins there, or of an unknown sequence, is an error here.
std::unique_ptr<Source> open_regions(const std::string& fasta, std::vector<Interval> intervals);

}  // namespace coil
