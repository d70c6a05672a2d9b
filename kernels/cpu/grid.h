// How an op along time is shared out: cells of (consecutive pieces) x (consecutive channels), so
// that one long sequence keeps every thread busy by channels and many short ones by pieces. A
// function of shapes and of the number of cells asked for only: what is summed over cells has a
// fixed order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/tensor.h"

namespace coil {

struct Cell {
  int64_t first_piece, end_piece;
  int64_t first_channel, end_channel;
  int64_t piece_group, channel_group;
};

struct Grid {
  int64_t piece_groups = 0, channel_groups = 0;
  int64_t most_channels = 0;  // of one cell
  std::vector<Cell> cells;
};

// Channels are split at multiples of `lanes`; `most_cells` at least 1. The split whose largest cell
// is smallest.
inline Grid make_grid(const Rows& rows, int64_t channels, int64_t lanes, int64_t most_cells,
                      bool split_pieces = true) {
  const auto pieces = rows.pieces();
  const int64_t count = pieces.size(), blocks = (channels + lanes - 1) / lanes;
  // Piece i belongs to the group in which its first row lies.
  const auto bounds = [&](int64_t groups) {
    std::vector<int64_t> bound(groups + 1, count);
    int64_t group = 0;
    for (int64_t i = 0; i < count; ++i)
      while (group < groups && pieces[i].begin * groups >= group * rows.total()) bound[group++] = i;
    return bound;
  };
  Grid grid;
  std::vector<int64_t> bound;
  int64_t least = INT64_MAX;
  for (int64_t by_channel = std::min(most_cells, blocks); by_channel >= 1; --by_channel) {
    const int64_t by_piece = split_pieces ? std::min(most_cells / by_channel, count) : 1;
    auto candidate = bounds(by_piece);
    int64_t most_rows = 0;
    for (int64_t i = 0; i < by_piece; ++i) {
      if (candidate[i] == candidate[i + 1]) continue;
      const Piece& last = pieces[candidate[i + 1] - 1];
      most_rows = std::max(most_rows, last.begin + last.length - pieces[candidate[i]].begin);
    }
    const int64_t load = most_rows * ((blocks + by_channel - 1) / by_channel);
    if (load >= least) continue;
    least = load;
    grid.channel_groups = by_channel;
    grid.piece_groups = by_piece;
    bound = std::move(candidate);
  }
  for (int64_t p = 0; p < grid.piece_groups; ++p)
    for (int64_t c = 0; c < grid.channel_groups; ++c) {
      const Cell cell{
          .first_piece = bound[p],
          .end_piece = bound[p + 1],
          .first_channel = blocks * c / grid.channel_groups * lanes,
          .end_channel = std::min(channels, blocks * (c + 1) / grid.channel_groups * lanes),
          .piece_group = p,
          .channel_group = c};
      grid.most_channels = std::max(grid.most_channels, cell.end_channel - cell.first_channel);
      grid.cells.push_back(cell);
    }
  return grid;
}

// For each piece whether it is the first to read its slot `from`: gradients of a state that several
// pieces start from add up, and the first one writes. Where there are others, one thread must take
// the pieces of a channel in order.
inline std::vector<uint8_t> first_readers(const Rows& rows) {
  std::vector<uint8_t> first, read(rows.slots(), 0);
  for (const Piece& piece : rows.pieces()) {
    first.push_back(piece.from < 0 || !read[piece.from]);
    if (piece.from >= 0) read[piece.from] = 1;
  }
  return first;
}

}  // namespace coil
