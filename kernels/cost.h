// What an operation has to do at least: arithmetic, powers of two, and bytes read and written, each
// operand once. Forward and products as in kernels/op_cases.h, from the operation itself.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "kernels/ops.h"

namespace coil {

struct Cost {
  double flops = 0, bytes = 0, powers = 0;
};

struct Speed {  // of a machine, per second; powers 0: limits nothing
  double flops = 0, bytes = 0, powers = 0;
};
// The longest of the times that its parts take.
inline double shortest_time(const Cost& cost, const Speed& speed) {
  const double powers = speed.powers > 0 ? cost.powers / speed.powers : 0;
  return std::max({cost.flops / speed.flops, cost.bytes / speed.bytes, powers});
}

inline double bytes_of(std::initializer_list<View> views) {
  double bytes = 0;
  for (const View& view : views) bytes += static_cast<double>(view.count() * size_of(view.dtype));
  return bytes;
}

// States that the pieces of a batch read and write, at so many bytes a slot.
inline double state_bytes(const View& state, const Rows& rows) {
  if (!state) return 0;
  double moved = 0;
  for (const Piece& piece : rows.pieces()) moved += (piece.from >= 0) + (piece.to >= 0);
  return moved * static_cast<double>(state.stride[0] * size_of(state.dtype));
}

inline Cost cost_of(const Gemm& op) {
  const auto m = static_cast<double>(op.c.rows()), n = static_cast<double>(op.c.cols());
  const auto k = static_cast<double>(op.a.size[op.ta ? 0 : 1]);
  return {.flops = 2 * m * n * k,
          .bytes = bytes_of({op.a, op.b, op.c, op.bias}) + (op.beta != 0 ? bytes_of({op.c}) : 0)};
}
inline Cost cost_of(const SumRows& op) {
  return {.flops = static_cast<double>(op.x.count()), .bytes = bytes_of({op.x, op.out})};
}
inline Cost cost_of(const Embed& op) {  // rows of the table come from a cache where they repeat
  return {.bytes = bytes_of({op.ids, op.y, op.labels}) +
                   std::min(bytes_of({op.table}), bytes_of({op.y}))};
}
inline Cost cost_of(const EmbedBackward& op) {
  return {.flops = static_cast<double>(op.dy.count()) * (op.dlabels ? 2 : 1),
          .bytes = bytes_of({op.ids, op.dy, op.dlabels}) +
                   2 * std::min(bytes_of({op.dtable}), bytes_of({op.dy}))};
}
inline Cost cost_of(const Norm& op) {
  return {.flops = 4. * static_cast<double>(op.x.count()),
          .bytes = bytes_of({op.x, op.residual, op.weight, op.y, op.residual_out, op.rstd})};
}
inline Cost cost_of(const NormBackward& op) {
  return {.flops = 9. * static_cast<double>(op.x.count()),
          .bytes = bytes_of(
              {op.x, op.weight, op.rstd, op.dy, op.dresidual, op.dx, op.dweight, op.dx_act})};
}
inline Cost cost_of(const Conv1d& op) {
  return {.flops = 2. * static_cast<double>(op.x.count() * op.weight.cols()),
          .bytes = bytes_of({op.x, op.weight, op.bias, op.y}) + state_bytes(op.state, *op.rows)};
}
inline Cost cost_of(const Conv1dBackward& op) {
  return {.flops = 6. * static_cast<double>(op.x.count() * op.weight.cols()),
          .bytes = bytes_of({op.x, op.weight, op.bias, op.dy, op.dx, op.dweight, op.dbias}) +
                   state_bytes(op.dstate, *op.rows)};
}
// Of each channel, step and state: dt A, its power, (dt x) B, two for h, two for y; softplus and
// two powers of the gate for each channel's step.
inline double scan_powers(const View& x, const View& A_log) {
  return static_cast<double>(x.count()) * static_cast<double>(A_log.cols() + 3);
}
inline Cost cost_of(const SelectiveScan& op) {
  return {.flops = 7. * static_cast<double>(op.x.count() * op.A_log.cols()),
          .bytes = bytes_of({op.x, op.dt, op.A_log, op.B, op.C, op.D, op.dt_bias, op.z, op.y,
                             op.checkpoints, op.marks, op.starts}) +
                   state_bytes(op.state, *op.rows),
          .powers = scan_powers(op.x, op.A_log)};
}
inline Cost cost_of(const SelectiveScanBackward& op) {
  return {.flops = 20. * static_cast<double>(op.x.count() * op.A_log.cols()),
          .bytes = bytes_of({op.x, op.dt, op.A_log, op.B, op.C, op.D, op.dt_bias, op.dy, op.z,
                             op.checkpoints, op.dx, op.ddt, op.dB, op.dC, op.dz, op.y, op.dA_log,
                             op.dD, op.ddt_bias}) +
                   state_bytes(op.dstate, *op.rows),
          .powers = scan_powers(op.x, op.A_log)};
}
// Of each channel, step and complex state: h = dA h + dB x and Re(C h), and in backward that of h
// and of dh and the parameters' sums; four steps go at once. dA's powers are made once a channel.
inline Cost cost_of(const S4dScan& op) {
  return {.flops = 9. * static_cast<double>(op.x.count() * op.A_imag.cols()),
          .bytes = bytes_of({op.x, op.log_A_real, op.A_imag, op.C, op.log_dt, op.D, op.y,
                             op.checkpoints, op.before_gelu}) +
                   state_bytes(op.state, *op.rows)};
}
inline Cost cost_of(const S4dScanBackward& op) {
  return {.flops = 23. * static_cast<double>(op.x.count() * op.A_imag.cols()),
          .bytes = bytes_of({op.x, op.log_A_real, op.A_imag, op.C, op.log_dt, op.D, op.dy,
                             op.checkpoints, op.before_gelu, op.dx, op.dlog_A_real, op.dA_imag,
                             op.dC, op.dlog_dt, op.dD}) +
                   state_bytes(op.dstate, *op.rows)};
}
inline Cost cost_of(const S4dTable& op) {
  return {.flops = 40. * static_cast<double>(op.A_imag.count()),
          .bytes = bytes_of({op.log_A_real, op.A_imag, op.C, op.log_dt, op.table})};
}
inline Cost cost_of(const Glu& op) {
  return {.flops = 2. * static_cast<double>(op.y.count()), .bytes = bytes_of({op.x, op.y})};
}
inline Cost cost_of(const GluBackward& op) {
  return {.flops = 5. * static_cast<double>(op.dy.count()),
          .bytes = bytes_of({op.x, op.dy, op.dx})};
}
inline Cost cost_of(const Downsample& op) {
  return {.bytes = bytes_of({op.x, op.y}) + state_bytes(op.state, *op.rows)};
}
inline Cost cost_of(const DownsampleBackward& op) {
  return {.flops = static_cast<double>(op.dx.count()),
          .bytes = bytes_of({op.dy, op.dresidual, op.dx}) + state_bytes(op.dstate, *op.rows)};
}
inline Cost cost_of(const Upsample& op) {
  return {.flops = static_cast<double>(op.y.count()),
          .bytes = bytes_of({op.x, op.residual, op.y}) + state_bytes(op.state, *op.rows)};
}
inline Cost cost_of(const UpsampleBackward& op) {
  return {.bytes = bytes_of({op.dy, op.dx}) + state_bytes(op.dstate, *op.rows)};
}
inline Cost cost_of(const Pool& op) {
  return {.flops = static_cast<double>(op.x.count()), .bytes = bytes_of({op.x, op.y})};
}
inline Cost cost_of(const PoolBackward& op) { return {.bytes = bytes_of({op.dy, op.dx})}; }
inline Cost cost_of(const CrossEntropy& op) {
  return {.flops = 5. * static_cast<double>(op.logits.count()),
          .bytes = bytes_of({op.logits, op.targets, op.loss, op.dlogits})};
}
inline Cost cost_of(const Sample& op) {
  return {.flops = 5. * static_cast<double>(op.logits.count()),
          .bytes = bytes_of({op.logits, op.ids, op.streams, op.log_probs})};
}
inline Cost cost_of(const SumSquares& op) {
  double count = 0;
  for (const View& x : op.x) count += static_cast<double>(x.count());
  return {.flops = 2 * count, .bytes = 4 * count};
}
inline Cost cost_of(const AdamW& op) {  // w, m, v and g are read and written
  Cost cost;
  for (const AdamW::Item& item : op.items) {
    cost.flops += 15. * static_cast<double>(item.w.count());
    cost.bytes += 2 * bytes_of({item.w, item.g, item.m, item.v}) + bytes_of({item.copy});
  }
  return cost;
}

}  // namespace coil
