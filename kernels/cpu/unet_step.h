// What a step of a U-Net is made of (unet_step.cc), and the cells of it that are vectors' work
// (unet_cells.cc).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/step_team.h"
#include "kernels/ops.h"

namespace coil {

// A sequence whose step this is for a stage.
struct UnetMember {
  int32_t slot = -1;
  bool begins = false;  // its first step: whatever the states hold counts as zero
  // Where a stage is inside this one:
  int64_t part = 0;     // which of the p steps of a coarse step this is
  int64_t coarse = -1;  // its row in the stage inside, if it ends a coarse step
  bool heard = false;   // the stage inside has put something out before
};

// A stage in this step, of m sequences; arrays are shared by the team.
struct UnetWalk {
  const UnetStep::Stage* op = nullptr;
  const UnetStep::Stage* inner = nullptr;  // the stage inside; or null
  int64_t d = 0, f = 0;                    // f: the most of any block
  std::vector<UnetMember> members;         // of each row
  View x;                                  // (m, d), the residual stream
  View y;                                  // (m, max(d, f)), what a scan or a gate puts out
  View ab;                                 // (m, 2 max(d, f)), what a gate reads
  View steps, lifted;  // (m, p d') of a stage inside another: what down reads, what up puts out
  int64_t rows() const { return static_cast<int64_t>(members.size()); }
};

// y = gelu(scan(u)) for channels of a range; the states go on by a step.
void unet_scan(const UnetStep::Block& op, const UnetWalk& stage, const View& u, Range channels);
// to = a sigmoid(b) of rows a|b, or added to it, for columns of a range.
void unet_gate(const View& ab, const View& to, bool add, Range columns);

}  // namespace coil
