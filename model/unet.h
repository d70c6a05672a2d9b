// What stands inside a stage of a U-Net, the SaShiMi shape (Goel, Gu, Donahue and Ré 2022): a
// coarser stage, which sees p steps as one.
//   x' = x + up(stage(down(x)))
// down and up are linear; up's output is for the p steps after a coarse one, so the sum at a step
// depends on no later one (kernels/ops.h: Downsample, Upsample). The stage is a Backbone, which may
// have another one inside. The skip connection is x itself, in the residual stream.
#pragma once

#include "model/backbone.h"

namespace coil {

std::vector<Param> declare(InnerStage& inner, int64_t outer_d, const std::string& base,
                           int64_t depth);

// x (t,d) f32 → x' (t,d) f32, in place of it. act: the type of activations.
Tensor forward(Backend& backend, const InnerStage& inner, DType act, Tensor x, const Rows& rows,
               InnerState* state, InnerSaved* saved);
// dx (t,d) f32: in, the gradient of x', out, that of x; adds to grad. dstate as in Backbone.
void backward(Backend& backend, const InnerStage& inner, DType act, InnerSaved& saved,
              const Rows& rows, const Tensor& dx, InnerState* dstate, InnerStage& grad);

}  // namespace coil
