// Sources made of others: windows, a choice of records.
// Windows are records of their own: they begin at multiples of the stride, as in
// pipelines/stream.h: the last, shorter one is kept if it is at least half a window or the only one
// of its record. Segment::offset says where a window begins.
#pragma once

#include <functional>
#include <memory>

#include "model/batch.h"

namespace coil {

// In codes. Memory: a window and a segment.
std::unique_ptr<Source> cut_source(std::unique_ptr<Source> source, int64_t window, int64_t stride);

// The records for whose first segment `keep` is true.
std::unique_ptr<Source> keep_records(std::unique_ptr<Source> source,
                                     std::function<bool(const Segment&)> keep);

}  // namespace coil
