// A view's rows in the order in which a piece is read: from its first or, with `reverse`, from its
// last.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace coil {

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

}  // namespace coil
