// The walk along a piece: a view's rows in the order in which they are read, and rows asked for
// ahead.
#pragma once

#include <hwy/cache_control.h>

#include <cstdint>

#include "kernels/tensor.h"

namespace coil {

// From a piece's first row on or, with `reverse`, from its last.
struct Track {
  float* first = nullptr;
  int64_t stride = 0;
  Track(const View& view, const Piece& piece, bool reverse) {
    if (!view) return;
    first = view.row<float>(reverse ? piece.begin + piece.length - 1 : piece.begin);
    stride = reverse ? -view.stride[0] : view.stride[0];
  }
  Track(float* first, int64_t stride) : first(first), stride(stride) {}
  float* at(int64_t step) const { return first + step * stride; }
  Track from(int64_t step, int64_t column) const { return {at(step) + column, stride}; }
};

// Rows that are needed soon, asked for while a block is computed, since rows lie further apart than
// the hardware looks ahead: 14 % of the time of a scan whose operands lie in L3.
template <int kTracks>
struct Ahead {
  const float* first[kTracks] = {};
  int64_t stride[kTracks] = {};
  int64_t steps = 0;
  Ahead() = default;
  Ahead(int64_t step, int64_t steps, int64_t column, const Track (&tracks)[kTracks])
      : steps(steps) {
    if (steps <= 0) return;
    for (int k = 0; k < kTracks; ++k) {
      first[k] = tracks[k].at(step) + column;
      stride[k] = tracks[k].stride;
    }
  }
  HWY_INLINE void fetch(int64_t step) const {
    if (step >= steps) return;
    for (int k = 0; k < kTracks; ++k) hwy::Prefetch(first[k] + step * stride[k]);
  }
};

}  // namespace coil
