// S4D's scan, forward and backward (ops.h has the equation). With K = 2 C (a - 1) / A and the
// system the same at every step, four steps go at once, from h before them:
//   y_j = Re(K a^{j+1} h) + sum_{l<=j} r_l x_{j-l},   r_l = sum_i Re(K a^l), and D in r_0,
//   h'  = h + (a^4 - 1) h + a^3 x_0 + a^2 x_1 + a x_2 + x_3,
// 20 operations a state, where one step after another takes 24. Backward is the same system
// transposed, with m the gradient of h, the loss growing by Re(m dh):
//   dx_k = Re(a^{3-k} m) + sum_{k+l<4} r_l g_{k+l},   m' = m + (a^4 - 1) m + sum_j K a^{j+1} g_j,
// and what a and K get comes from sums over steps of products with each table entry:
//   of K a^{j+1}: g_j h;  of a^{3-k}: m x_k;  of a^4: m h;  of r_l: g_j x_{j-l}, once for all
//   states.
//
// A vector holds neighbouring channels; time is walked kS4dBlock steps at a time so that the tables
// (s4d_tables-inl.h), 80 n bytes a channel, are read seldom. Backward runs each block forward again
// from its checkpoint, keeping h before every four steps. Cells of channels and pieces go to
// threads (grid.h). Pieces of a few steps (decoding) take a path with states as lanes, without
// tables.
//
// Limit: 20 vector operations for four steps of a state forward, 49 backward. Best of some hundred
// calls, d 256, n 16, t 2048, one thread: 1.02 ms (2.0 M steps/s) and 2.6 ms, 6.8 and 17 cycles for
// a vector's state and step, of which the operations, one a cycle, are 5 and 12. Two threads: 0.54
// and 1.2 ms. One step: 0.025 ms, nearly all of it powers. (2 cores of an AMD EPYC, Zen 4,
// 2026-11-26)
#include <omp.h>

#include <algorithm>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/grid.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/s4d_scan.cc"
#include <hwy/foreach_target.h>
// after foreach_target.h
#include "kernels/cpu/s4d_tables-inl.h"
#include "kernels/cpu/vectors-inl.h"

#ifndef COIL_S4D_SCAN_ONCE
#define COIL_S4D_SCAN_ONCE
namespace coil {
namespace {

// What a cell needs beside the operands.
struct CellMemory {
  const int64_t* first_checkpoint;  // of each piece
  const uint8_t* first_reader;      // backward, of each piece: the first that reads its slot `from`
  float* scratch;
  float* sums;  // backward: (d, 4 n + 1), this piece group's share: add_parameter_gradients
};

constexpr int64_t kTogether = 4;    // steps that go at once
constexpr int64_t kShortPiece = 3;  // steps up to which states are lanes
// h before every four steps of a block, and before each of those left over.
constexpr int64_t kKept = kS4dBlock / kTogether + kTogether - 1;
constexpr int64_t kSums = 16;  // vectors of sums of a state: of K a^1…4, of a^1…4

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Floats of scratch per cell of `blocks` blocks of channels.
int64_t scratch_floats(int64_t blocks, int64_t n, int64_t lanes, int64_t entries) {
  const int64_t of_block = n * (entries + 2 + kSums) + 8;
  return lanes * (blocks * of_block + 3 * kS4dBlock + 2 * kKept) + 6 * padded(n);
}

std::vector<int64_t> first_s4d_checkpoints(const Rows& rows) {
  std::vector<int64_t> first;
  int64_t count = 0;
  for (const Piece& piece : rows.pieces()) {
    first.push_back(count);
    count += (piece.length + kS4dBlock - 1) / kS4dBlock;
  }
  return first;
}

}  // namespace
}  // namespace coil
#endif  // COIL_S4D_SCAN_ONCE

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace {

using C = Complex<V>;

int64_t lanes() { return kLanes; }

// h + z h + more, such that few operations wait for h.
HWY_INLINE C advanced(C h, C z, C more) {
  return {hn::Add(hn::MulAdd(z.re, h.re, h.re), hn::NegMulAdd(z.im, h.im, more.re)),
          hn::Add(hn::MulAdd(z.re, h.im, h.im), hn::MulAdd(z.im, h.re, more.im))};
}
HWY_INLINE V add_real(C a, C b, V sum) {  // sum + Re(a b)
  return hn::NegMulAdd(a.im, b.im, hn::MulAdd(a.re, b.re, sum));
}
HWY_INLINE C add_scaled(C a, V by, C sum) {
  return {hn::MulAdd(a.re, by, sum.re), hn::MulAdd(a.im, by, sum.im)};
}
HWY_INLINE V at(const float* steps, int64_t s) { return hn::Load(d, steps + s * kLanes); }
HWY_INLINE void add_at(float* steps, int64_t s, V v) {
  hn::Store(hn::Add(at(steps, s), v), d, steps + s * kLanes);
}
// a^3 x_0 + a^2 x_1 + a x_2 + x_3.
HWY_INLINE C driven(C p1, C p2, C p3, V x0, V x1, V x2, V x3) {
  const C two = {hn::MulAdd(p1.re, x2, x3), hn::Mul(p1.im, x2)};
  return add_scaled(p3, x0, add_scaled(p2, x1, two));
}

// The part of y that comes from inputs among the same four steps. Arrays of steps are (steps,
// lanes).
HWY_INLINE void respond(const float* impulse, const float* x, float* y, int64_t steps) {
  const V r0 = at(impulse, 0), r1 = at(impulse, 1), r2 = at(impulse, 2), r3 = at(impulse, 3);
  int64_t s = 0;
  for (; s + kTogether <= steps; s += kTogether) {
    const V x0 = at(x, s), x1 = at(x, s + 1), x2 = at(x, s + 2), x3 = at(x, s + 3);
    hn::Store(hn::Mul(r0, x0), d, y + s * kLanes);
    hn::Store(hn::MulAdd(r0, x1, hn::Mul(r1, x0)), d, y + (s + 1) * kLanes);
    hn::Store(hn::MulAdd(r0, x2, hn::MulAdd(r1, x1, hn::Mul(r2, x0))), d, y + (s + 2) * kLanes);
    hn::Store(hn::MulAdd(r0, x3, hn::MulAdd(r1, x2, hn::MulAdd(r2, x1, hn::Mul(r3, x0)))), d,
              y + (s + 3) * kLanes);
  }
  for (; s < steps; ++s) hn::Store(hn::Mul(r0, at(x, s)), d, y + s * kLanes);
}

// One state of a block of channels over up to kS4dBlock steps; y is added to.
HWY_INLINE void scan_state(const float* table, float* state, const float* HWY_RESTRICT x,
                           float* HWY_RESTRICT y, int64_t steps) {
  const C z4 = entry(table, kZ4), p1 = entry(table, kP1), p2 = entry(table, kP2),
          p3 = entry(table, kP3);
  const C k1 = entry(table, kK + 2), k2 = entry(table, kK + 4), k3 = entry(table, kK + 6),
          k4 = entry(table, kK + 8);
  C h = entry(state, 0);
  int64_t s = 0;
  for (; s + kTogether <= steps; s += kTogether) {
    const C more = driven(p1, p2, p3, at(x, s), at(x, s + 1), at(x, s + 2), at(x, s + 3));
    hn::Store(add_real(k1, h, at(y, s)), d, y + s * kLanes);
    hn::Store(add_real(k2, h, at(y, s + 1)), d, y + (s + 1) * kLanes);
    hn::Store(add_real(k3, h, at(y, s + 2)), d, y + (s + 2) * kLanes);
    hn::Store(add_real(k4, h, at(y, s + 3)), d, y + (s + 3) * kLanes);
    h = advanced(h, z4, more);
  }
  for (; s < steps; ++s) {
    hn::Store(add_real(k1, h, at(y, s)), d, y + s * kLanes);
    h = advanced(h, entry(table, kZ1), {at(x, s), hn::Zero(d)});
  }
  set_entry(h, state, 0);
}

// (n, real | imaginary, lanes) from and to a slot's rows (d, n, 2). sign: -1 for gradients, which
// are here those by which the loss grows by Re(m dh).
HWY_INLINE void load_states(const View& state, int32_t slot, int64_t channel, int64_t valid,
                            int64_t n, float sign, float* h) {
  std::fill_n(h, 2 * n * kLanes, 0.f);
  if (slot < 0) return;
  for (int64_t lane = 0; lane < valid; ++lane) {
    const float* from = state.row<float>(slot) + (channel + lane) * state.stride[1];
    for (int64_t i = 0; i < 2 * n; ++i) h[i * kLanes + lane] = i % 2 ? sign * from[i] : from[i];
  }
}
HWY_INLINE void store_states(const View& state, int32_t slot, int64_t channel, int64_t valid,
                             int64_t n, float sign, const float* h, bool add = false) {
  for (int64_t lane = 0; lane < valid; ++lane) {
    float* to = state.row<float>(slot) + (channel + lane) * state.stride[1];
    for (int64_t i = 0; i < 2 * n; ++i) {
      const float value = i % 2 ? sign * h[i * kLanes + lane] : h[i * kLanes + lane];
      to[i] = add ? to[i] + value : value;
    }
  }
}

HWY_INLINE void load_steps(Track from, int64_t valid, int64_t steps, float* to) {
  for (int64_t s = 0; s < steps; ++s)
    hn::Store(load_part(d, from.at(s), valid), d, to + s * kLanes);
}

// A checkpoint of a block of channels: (n, real | imaginary, valid) from [k, channel] on.
template <class Op>
HWY_INLINE float* checkpoint_at(const Op& op, int64_t k, int64_t channel) {
  return op.checkpoints.template as<float>() + (k * op.x.cols() + channel) * 2 * op.A_imag.cols();
}

void scan_cell(const S4dScan& op, const Cell& cell, const CellMemory& memory) {
  const FlushDenormals flush;
  const int64_t n = op.A_imag.cols();
  const int64_t blocks = (cell.end_channel - cell.first_channel + kLanes - 1) / kLanes;
  float* const tables = memory.scratch;                           // (blocks, n, kEntries, lanes)
  float* const states = tables + blocks * n * kEntries * kLanes;  // (blocks, n, 2, lanes)
  float* const impulses = states + blocks * n * 2 * kLanes;       // (blocks, 4, lanes)
  float* const x = impulses + blocks * 4 * kLanes;                // (steps, lanes), as y
  float* const y = x + kS4dBlock * kLanes;
  const auto each_block = [&](const auto& body) HWY_ATTR {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t channel = cell.first_channel + b * kLanes;
      body(b, channel, std::min(kLanes, cell.end_channel - channel));
    }
  };
  each_block([&](int64_t b, int64_t channel, int64_t valid) HWY_ATTR {
    load_tables(op, channel, valid, tables + b * n * kEntries * kLanes, impulses + b * 4 * kLanes,
                y + kS4dBlock * kLanes, padded(n));
  });

  for (int64_t p = cell.first_piece; p < cell.end_piece; ++p) {
    const Piece& piece = op.rows->pieces()[p];
    const Track in(op.x, piece, op.reverse), out(op.y, piece, op.reverse),
        before(op.before_gelu, piece, op.reverse);
    each_block([&](int64_t b, int64_t channel, int64_t valid) HWY_ATTR {
      load_states(op.state, piece.from, channel, valid, n, 1, states + b * n * 2 * kLanes);
    });
    for (int64_t first = 0; first < piece.length; first += kS4dBlock) {
      const int64_t steps = std::min(kS4dBlock, piece.length - first);
      each_block([&](int64_t b, int64_t channel, int64_t valid) HWY_ATTR {
        float* const h = states + b * n * 2 * kLanes;
        if (op.checkpoints) {
          float* to = checkpoint_at(op, memory.first_checkpoint[p] + first / kS4dBlock, channel);
          for (int64_t i = 0; i < 2 * n; ++i) store_part(d, at(h, i), to + i * valid, valid);
        }
        load_steps(in.from(first, channel), valid, steps, x);
        respond(impulses + b * 4 * kLanes, x, y, steps);
        for (int64_t i = 0; i < n; ++i)
          scan_state(tables + (b * n + i) * kEntries * kLanes, h + i * 2 * kLanes, x, y, steps);
        for (int64_t s = 0; s < steps; ++s) {
          V value = at(y, s);
          if (before.first) store_part(d, value, before.at(first + s) + channel, valid);
          if (op.gelu) value = gelu(d, value);
          store_part(d, value, out.at(first + s) + channel, valid);
        }
      });
    }
    if (piece.to >= 0)
      each_block([&](int64_t b, int64_t channel, int64_t valid) HWY_ATTR {
        store_states(op.state, piece.to, channel, valid, n, 1, states + b * n * 2 * kLanes);
      });
  }
}

// Pieces of at most kShortPiece steps, one step after another: per channel, states are the lanes.
void step_cell(const S4dScan& op, const Cell& cell, const CellMemory& memory) {
  const FlushDenormals flush;
  const int64_t n = op.A_imag.cols(), stride = padded(n);
  float *const z_re = memory.scratch, *const z_im = z_re + stride;
  float *const h_re = z_im + stride, *const h_im = h_re + stride;  // z of four steps, not needed
  float *const K_re = h_im + stride, *const K_im = K_re + stride;
  for (int64_t channel = cell.first_channel; channel < cell.end_channel; ++channel) {
    discretise_channel(op, channel, memory.scratch, stride);
    for (int64_t p = cell.first_piece; p < cell.end_piece; ++p) {
      const Piece& piece = op.rows->pieces()[p];
      const int64_t place = channel * (op.state ? op.state.stride[1] : 0);
      const float* from = piece.from < 0 ? nullptr : op.state.row<float>(piece.from) + place;
      for (int64_t i = 0; i < n; ++i) {
        h_re[i] = from ? from[2 * i] : 0;
        h_im[i] = from ? from[2 * i + 1] : 0;
      }
      for (int64_t s = 0; s < piece.length; ++s) {
        const int64_t row = op.reverse ? piece.begin + piece.length - 1 - s : piece.begin + s;
        const float x = op.x.row<float>(row)[channel];
        const float sum = sum_over(n, [=](auto tag, int64_t i) HWY_ATTR {
          const auto re = hn::LoadU(tag, h_re + i), im = hn::LoadU(tag, h_im + i);
          const auto zr = hn::LoadU(tag, z_re + i), zi = hn::LoadU(tag, z_im + i);
          auto next_re = hn::Add(hn::MulAdd(zr, re, re), hn::Set(tag, x));
          next_re = hn::NegMulAdd(zi, im, next_re);
          const auto next_im = hn::MulAdd(zi, re, hn::MulAdd(zr, im, im));
          hn::StoreU(next_re, tag, h_re + i);
          hn::StoreU(next_im, tag, h_im + i);
          return hn::NegMulAdd(hn::LoadU(tag, K_im + i), next_im,
                               hn::Mul(hn::LoadU(tag, K_re + i), next_re));
        });
        op.y.row<float>(row)[channel] = sum + op.D.as<float>()[channel] * x;
      }
      if (piece.to < 0) continue;
      float* const to = op.state.row<float>(piece.to) + place;
      for (int64_t i = 0; i < n; ++i) to[2 * i] = h_re[i], to[2 * i + 1] = h_im[i];
    }
  }
  if (!op.gelu) return;
  for (int64_t p = cell.first_piece; p < cell.end_piece; ++p) {
    const Piece& piece = op.rows->pieces()[p];
    for (int64_t row = piece.begin; row < piece.begin + piece.length; ++row) {
      float* const y = op.y.row<float>(row) + cell.first_channel;
      float* const before =
          op.before_gelu ? op.before_gelu.row<float>(row) + cell.first_channel : nullptr;
      for (int64_t c = 0; c < cell.end_channel - cell.first_channel; c += kLanes) {
        const int64_t valid = std::min(kLanes, cell.end_channel - cell.first_channel - c);
        const V value = load_part(d, y + c, valid);
        if (before) store_part(d, value, before + c, valid);
        store_part(d, gelu(d, value), y + c, valid);
      }
    }
  }
}

// Backward of one state: forward again, then in reverse. m, sums: of this state. dx is added to.
HWY_INLINE void scan_state_backward(const float* table, C h, float* m_at, float* sums,
                                    const float* HWY_RESTRICT x, const float* HWY_RESTRICT g,
                                    float* HWY_RESTRICT dx, float* HWY_RESTRICT kept,
                                    int64_t steps) {
  const int64_t whole = steps / kTogether * kTogether;
  const C z1 = entry(table, kZ1), z4 = entry(table, kZ4);
  const C p1 = entry(table, kP1), p2 = entry(table, kP2), p3 = entry(table, kP3);
  const C zero = {hn::Zero(d), hn::Zero(d)};
  C of_k1 = zero, of_k2 = zero, of_k3 = zero, of_k4 = zero;
  int64_t k = 0;
  for (int64_t s = 0; s < whole; s += kTogether, ++k) {
    set_entry(h, kept + k * 2 * kLanes, 0);
    of_k1 = add_scaled(h, at(g, s), of_k1);
    of_k2 = add_scaled(h, at(g, s + 1), of_k2);
    of_k3 = add_scaled(h, at(g, s + 2), of_k3);
    of_k4 = add_scaled(h, at(g, s + 3), of_k4);
    h = advanced(h, z4, driven(p1, p2, p3, at(x, s), at(x, s + 1), at(x, s + 2), at(x, s + 3)));
  }
  for (int64_t s = whole; s < steps; ++s, ++k) {
    set_entry(h, kept + k * 2 * kLanes, 0);
    of_k1 = add_scaled(h, at(g, s), of_k1);
    h = advanced(h, z1, {at(x, s), hn::Zero(d)});
  }
  const C k1 = entry(table, kK + 2), k2 = entry(table, kK + 4), k3 = entry(table, kK + 6),
          k4 = entry(table, kK + 8);
  C m = entry(m_at, 0), of_p1 = zero, of_p2 = zero, of_p3 = zero, of_p4 = zero;
  for (int64_t s = steps - 1; s >= whole; --s) {
    of_p1 = of_p1 + m * entry(kept + --k * 2 * kLanes, 0);
    add_at(dx, s, m.re);
    m = advanced(m, z1, scaled(k1, at(g, s)));
  }
  for (int64_t s = whole - kTogether; s >= 0; s -= kTogether) {
    of_p4 = of_p4 + m * entry(kept + --k * 2 * kLanes, 0);
    of_p3 = add_scaled(m, at(x, s), of_p3);
    of_p2 = add_scaled(m, at(x, s + 1), of_p2);
    of_p1 = add_scaled(m, at(x, s + 2), of_p1);
    add_at(dx, s + 3, m.re);
    hn::Store(add_real(p1, m, at(dx, s + 2)), d, dx + (s + 2) * kLanes);
    hn::Store(add_real(p2, m, at(dx, s + 1)), d, dx + (s + 1) * kLanes);
    hn::Store(add_real(p3, m, at(dx, s)), d, dx + s * kLanes);
    const C low = add_scaled(k2, at(g, s + 1), scaled(k1, at(g, s)));
    m = advanced(m, z4, add_scaled(k4, at(g, s + 3), add_scaled(k3, at(g, s + 2), low)));
  }
  set_entry(m, m_at, 0);
  int place = 0;
  for (const C& sum : {of_k1, of_k2, of_k3, of_k4, of_p1, of_p2, of_p3, of_p4}) {
    set_entry(entry(sums, place) + sum, sums, place);
    place += 2;
  }
}

// dx from gradients among the same four steps; and what r_l get, added to `taps` (4, lanes).
HWY_INLINE void respond_backward(const float* impulse, const float* x, const float* g, float* dx,
                                 float* taps, int64_t steps) {
  V r[4], sum[4];
  for (int l = 0; l < 4; ++l) r[l] = at(impulse, l), sum[l] = hn::Zero(d);
  const int64_t whole = steps / kTogether * kTogether;
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t more = s < whole ? kTogether - 1 - s % kTogether : 0;  // steps after it
    V dvalue = hn::Zero(d);
    for (int64_t l = 0; l <= more; ++l) {
      dvalue = hn::MulAdd(r[l], at(g, s + l), dvalue);
      sum[l] = hn::MulAdd(at(g, s + l), at(x, s), sum[l]);
    }
    hn::Store(dvalue, d, dx + s * kLanes);
  }
  for (int l = 0; l < 4; ++l) add_at(taps, l, sum[l]);
}

// From the sums of table entries to those of a and K, for a block of channels: `to` is that of its
// first.
void store_sums(const float* tables, const float* sums, const float* taps, int64_t valid, int64_t n,
                float* to) {
  const int64_t size = 4 * n + 1;
  HWY_ALIGN float out[4][kLanes];
  for (int64_t i = 0; i < n; ++i) {
    const float *const table = tables + i * kEntries * kLanes, *const sum =
                                                                   sums + i * kSums * kLanes;
    C da = entry(sum, 8), dK = {at(taps, 0), hn::Zero(d)};  // those of a and of r_0
    C power = {hn::Set(d, 1.0f), hn::Zero(d)};              // a^j
    for (int j = 0; j < 4; ++j) {  // K a^{j+1} = K power a, a^{j+1}, r_j = Re(K power)
      const V factor = hn::Set(d, static_cast<float>(j + 1));
      const C K = entry(table, kK + 2 * j);  // K power
      C of_power = K * entry(sum, 2 * j);
      if (j > 0) of_power = of_power + power * entry(sum, 8 + 2 * j);
      if (j < 3) of_power = add_scaled(K, at(taps, j + 1), of_power);
      da = da + scaled(of_power, factor);
      power = power * entry(table, kP1);
      dK = dK + power * entry(sum, 2 * j);
      if (j < 3) dK = add_scaled(power, at(taps, j + 1), dK);
    }
    hn::Store(da.re, d, out[0]);
    hn::Store(da.im, d, out[1]);
    hn::Store(dK.re, d, out[2]);
    hn::Store(dK.im, d, out[3]);
    for (int64_t lane = 0; lane < valid; ++lane)
      for (int k = 0; k < 4; ++k) to[lane * size + i * 4 + k] = out[k][lane];
  }
  for (int64_t lane = 0; lane < valid; ++lane) to[lane * size + 4 * n] = taps[lane];
}

void scan_backward_cell(const S4dScanBackward& op, const Cell& cell, const CellMemory& memory) {
  const FlushDenormals flush;
  const int64_t n = op.A_imag.cols();
  const int64_t blocks = (cell.end_channel - cell.first_channel + kLanes - 1) / kLanes;
  float* const tables = memory.scratch;                          // (blocks, n, kEntries, lanes)
  float* const carry = tables + blocks * n * kEntries * kLanes;  // (blocks, n, 2, lanes)
  float* const sums = carry + blocks * n * 2 * kLanes;           // (blocks, n, kSums, lanes)
  float* const taps = sums + blocks * n * kSums * kLanes;        // (blocks, 4, lanes)
  float* const impulses = taps + blocks * 4 * kLanes;            // (blocks, 4, lanes)
  float* const x = impulses + blocks * 4 * kLanes;               // (steps, lanes), as the next two
  float *const g = x + kS4dBlock * kLanes, *const dx = g + kS4dBlock * kLanes;
  float* const kept = dx + kS4dBlock * kLanes;  // (kKept, 2, lanes)
  const auto each_block = [&](const auto& body) HWY_ATTR {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t channel = cell.first_channel + b * kLanes;
      body(b, channel, std::min(kLanes, cell.end_channel - channel));
    }
  };
  std::fill_n(sums, blocks * (n * kSums + 4) * kLanes, 0.f);
  each_block([&](int64_t b, int64_t channel, int64_t valid) HWY_ATTR {
    load_tables(op, channel, valid, tables + b * n * kEntries * kLanes, impulses + b * 4 * kLanes,
                kept + 2 * kKept * kLanes, padded(n));
  });

  for (int64_t p = cell.first_piece; p < cell.end_piece; ++p) {
    const Piece& piece = op.rows->pieces()[p];
    const Track in(op.x, piece, op.reverse), dy(op.dy, piece, op.reverse),
        out(op.dx, piece, op.reverse), before(op.before_gelu, piece, op.reverse);
    each_block([&](int64_t b, int64_t channel, int64_t valid) HWY_ATTR {
      load_states(op.dstate, op.dstate ? piece.to : -1, channel, valid, n, -1,
                  carry + b * n * 2 * kLanes);
    });
    for (int64_t k = (piece.length - 1) / kS4dBlock; k >= 0; --k) {
      const int64_t first = k * kS4dBlock, steps = std::min(kS4dBlock, piece.length - first);
      each_block([&](int64_t b, int64_t channel, int64_t valid) HWY_ATTR {
        load_steps(in.from(first, channel), valid, steps, x);
        for (int64_t s = 0; s < steps; ++s) {
          V value = load_part(d, dy.at(first + s) + channel, valid);
          if (op.gelu) {
            V slope;
            gelu(d, load_part(d, before.at(first + s) + channel, valid), &slope);
            value = hn::Mul(value, slope);
          }
          hn::Store(value, d, g + s * kLanes);
        }
        respond_backward(impulses + b * 4 * kLanes, x, g, dx, taps + b * 4 * kLanes, steps);
        const float* from = checkpoint_at(op, memory.first_checkpoint[p] + k, channel);
        for (int64_t i = 0; i < n; ++i, from += 2 * valid) {
          const C h = {load_part(d, from, valid), load_part(d, from + valid, valid)};
          const int64_t place = (b * n + i) * kLanes;
          scan_state_backward(tables + place * kEntries, h, carry + place * 2, sums + place * kSums,
                              x, g, dx, kept, steps);
        }
        for (int64_t s = 0; s < steps; ++s)
          store_part(d, at(dx, s), out.at(first + s) + channel, valid);
      });
    }
    if (op.dstate && piece.from >= 0)
      each_block([&](int64_t b, int64_t channel, int64_t valid) HWY_ATTR {
        store_states(op.dstate, piece.from, channel, valid, n, -1, carry + b * n * 2 * kLanes,
                     !memory.first_reader[p]);
      });
  }
  each_block([&](int64_t b, int64_t channel, int64_t valid) HWY_ATTR {
    const int64_t place = b * n * kLanes;
    store_sums(tables + place * kEntries, sums + place * kSums, taps + b * 4 * kLanes, valid, n,
               memory.sums + channel * (4 * n + 1));
  });
}

void add_gradients(const S4dScanBackward& op, const float* sums, int64_t groups, int64_t channel) {
  add_parameter_gradients(op, sums, groups, channel);
}

int64_t table_entries() { return kEntries; }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace coil {

HWY_EXPORT(lanes);
HWY_EXPORT(table_entries);
HWY_EXPORT(scan_cell);
HWY_EXPORT(step_cell);
HWY_EXPORT(scan_backward_cell);
HWY_EXPORT(add_gradients);

namespace {

template <class Op>
void check_s4d(const char* name, const Op& op) {
  check(op.rows != nullptr, "{}: rows are missing", name);
  expect_rank(name, "x", op.x, 2);
  expect_rank(name, "A_imag", op.A_imag, 2);
  const int64_t t = op.rows->total(), channels = op.x.cols(), n = op.A_imag.cols();
  expect(name, "x", op.x, DType::f32, {t, channels});
  expect(name, "log_A_real", op.log_A_real, DType::f32, {channels, n});
  expect(name, "A_imag", op.A_imag, DType::f32, {channels, n});
  expect_pairs(name, "C", op.C, {channels, n, 2});
  expect(name, "log_dt", op.log_dt, DType::f32, {channels});
  expect(name, "D", op.D, DType::f32, {channels});
  expect_if(name, "checkpoints", op.checkpoints, DType::f32,
            {s4d_checkpoints(*op.rows), channels, n, 2});
  check(!op.checkpoints || op.checkpoints.contiguous(), "{}: checkpoints are not contiguous", name);
  check(!op.reverse || op.rows->slots() == 0,
        "{}: a piece carries state, expected whole sequences with reverse", name);
  check(op.gelu || !op.before_gelu, "{}: before_gelu is given without gelu", name);
  expect_if(name, "before_gelu", op.before_gelu, DType::f32, {t, channels});
}

void check_s4d_state(const char* name, const char* operand, const View& state, const Rows& rows,
                     int64_t channels, int64_t n) {
  expect_rank(name, operand, state, 4);
  expect_pairs(name, operand, state, {state.rows(), channels, n, 2});
  check(state.rows() >= rows.slots(), "{}: {} is {}, expected {} slots or more", name, operand,
        state.shape(), rows.slots());
}

}  // namespace

void CpuBackend::run(const S4dScan& op) {
  const char* const name = "s4d_scan";
  check_s4d(name, op);
  const int64_t t = op.rows->total(), channels = op.x.cols(), n = op.A_imag.cols();
  expect(name, "y", op.y, DType::f32, {t, channels});
  if (op.state || op.rows->slots() > 0)
    check_s4d_state(name, "state", op.state, *op.rows, channels, n);
  if (t == 0 || channels == 0) return;

  int64_t longest = 0;
  for (const Piece& piece : op.rows->pieces()) longest = std::max(longest, piece.length);
  const bool is_short = longest <= kShortPiece && !op.checkpoints;
  // The powers that every channel needs take as long as several steps.
  const bool parallel = threads_ > 1 && (t + 8) * channels * n >= kParallelWork;
  const int64_t width = HWY_DYNAMIC_DISPATCH(lanes)();
  const Grid grid = make_grid(*op.rows, channels, width, parallel ? threads_ : 1);
  const auto checkpoints = first_s4d_checkpoints(*op.rows);
  const int64_t size = scratch_floats((grid.most_channels + width - 1) / width, n, width,
                                      HWY_DYNAMIC_DISPATCH(table_entries)());
  const int64_t cells = grid.cells.size();
  const Tensor scratch(*this, DType::f32, {cells, size});
  const auto scan = is_short ? HWY_DYNAMIC_DISPATCH(step_cell) : HWY_DYNAMIC_DISPATCH(scan_cell);
#pragma omp parallel for schedule(static, 1) num_threads(threads_) if (parallel)
  for (int64_t i = 0; i < cells; ++i)
    scan(op, grid.cells[i],
         {.first_checkpoint = checkpoints.data(), .scratch = scratch.as<float>() + i * size});
}

void CpuBackend::run(const S4dScanBackward& op) {
  const char* const name = "s4d_scan backward";
  check_s4d(name, op);
  const int64_t t = op.rows->total(), channels = op.x.cols(), n = op.A_imag.cols();
  check(op.checkpoints || t == 0, "{}: checkpoints are missing", name);
  check(op.before_gelu || !op.gelu || t == 0, "{}: before_gelu is missing", name);
  expect(name, "dy", op.dy, DType::f32, {t, channels});
  expect(name, "dx", op.dx, DType::f32, {t, channels});
  expect(name, "dlog_A_real", op.dlog_A_real, DType::f32, {channels, n});
  expect(name, "dA_imag", op.dA_imag, DType::f32, {channels, n});
  expect_pairs(name, "dC", op.dC, {channels, n, 2});
  expect(name, "dlog_dt", op.dlog_dt, DType::f32, {channels});
  expect(name, "dD", op.dD, DType::f32, {channels});
  if (op.dstate) check_s4d_state(name, "dstate", op.dstate, *op.rows, channels, n);
  if (t == 0 || channels == 0) return;

  const std::vector<uint8_t> first_reader = first_readers(*op.rows);
  const bool shared = std::count(first_reader.begin(), first_reader.end(), 0) > 0;
  const bool parallel = threads_ > 1 && (t + 8) * channels * n >= kParallelWork;
  const int64_t width = HWY_DYNAMIC_DISPATCH(lanes)();
  const Grid grid =
      make_grid(*op.rows, channels, width, parallel ? threads_ : 1, !(shared && op.dstate));
  const auto checkpoints = first_s4d_checkpoints(*op.rows);
  const int64_t size = scratch_floats((grid.most_channels + width - 1) / width, n, width,
                                      HWY_DYNAMIC_DISPATCH(table_entries)());
  const int64_t cells = grid.cells.size();
  const Tensor scratch(*this, DType::f32, {cells, size});
  const Tensor sums(*this, DType::f32, {grid.piece_groups, channels, 4 * n + 1});
  const auto scan = HWY_DYNAMIC_DISPATCH(scan_backward_cell);
  const auto add = HWY_DYNAMIC_DISPATCH(add_gradients);
#pragma omp parallel num_threads(threads_) if (parallel)
  {
#pragma omp for schedule(static, 1)
    for (int64_t i = 0; i < cells; ++i)
      scan(op, grid.cells[i],
           {.first_checkpoint = checkpoints.data(),
            .first_reader = first_reader.data(),
            .scratch = scratch.as<float>() + i * size,
            .sums = sums.as<float>() + grid.cells[i].piece_group * channels * (4 * n + 1)});
#pragma omp for schedule(static)
    for (int64_t channel = 0; channel < channels; ++channel)
      add(op, sums.as<float>(), grid.piece_groups, channel);
  }
}

}  // namespace coil
#endif  // HWY_ONCE
