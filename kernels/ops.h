// THE CONTRACT between models and devices: one plain struct per operation, one abstract Backend.
//
//   t rows of the ragged batch   s state slots   d model   e inner   n state   w taps   v
//   vocabulary   m outputs
//
// Rules
//   * State in, state out, in the same op. A piece reads slot `from` and writes slot `to` of
//   `state`; -1 is zero
//     in and discard out. State is f32. Decoding is pieces of one step: there is no second entry.
//   * One stream, no synchronisation inside an op. The op picks its algorithm; the caller never
//   knows.
//   * Parameter gradients are added to (+=); activation gradients are written (=).
//   * Every entry checks shapes and dtypes and names op and operand (coil::Error). 64-bit indexing.
//   * NaN in gives NaN out and never hangs. Same input, device and thread count: same bits. No
//   float atomics.
//   * A View that may be left out is marked optional; all others are required.
//   * Types. CPU: activations, gradients and state are f32; matrices (`gemm` b, `embed` table) are
//   f32 or bf16. CUDA: matrices and activations alike are f32 or bf16, one type throughout an op;
//   where a comment says f32 for such an operand, read activation type. Always f32: the residual
//   stream (embed y, norm residual and residual_out and its gradients), state, checkpoints, A_log,
//   D, dt_bias, S4D's parameters, conv weights, norm weights, biases, rstd, loss, pooled rows and
//   parameter gradients. Backend::activations says which type activations have.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>

#include "kernels/blocks.h"
#include "kernels/tensor.h"

namespace coil {

// c(m,n) = alpha * op(a) * op(b) + beta * c + bias(n). op is the transpose where ta / tb.
// a (m,k) or (k,m) f32; b (k,n) or (n,k) f32 or bf16; c f32. Any of them may be a column view.
// CUDA: a and b both f32 or both bf16; c f32, or bf16 where they are.
struct Gemm {
  View a, b, c;
  View bias;  // optional (n) f32
  bool ta = false, tb = false;
  float alpha = 1, beta = 0;
};

// out(c) += sum over rows of x(t,c).
struct SumRows {
  View x, out;
};

// y[i] = table[ids[i]]. ids (t) i32 within 0 … v-1; table (v,d) f32 or bf16; y (t,d) f32.
// Another id is refused on a CPU. On CUDA, where to refuse it would mean to wait for the card, its
// row is NaN, and backward leaves its gradient out.
// With labels, y[i] = table[ids[i] mod v] + labels[ids[i] / v], for ids of 0 … l v - 1: every step
// of a sequence knows what it is labelled. Ids of l v … (l+1) v - 1 have no label: table[ids[i] mod
// v] alone.
struct Embed {
  View ids, table, y;
  View labels;  // optional (l,d), of table's type
};
struct EmbedBackward {  // dtable(v,d) f32 += scatter of dy(t,d)
  View ids, dy, dtable;
  View dlabels;  // with labels: (l,d) f32 +=
};

// residual_out = x + residual;  y = residual_out * rstd * weight,  rstd = 1 /
// sqrt(mean(residual_out^2) + eps). RMS norm over each row (Zhang and Sennrich 2019).
struct Norm {
  View x;             // (t,d) f32
  View residual;      // optional (t,d) f32
  View weight;        // optional (d) f32
  View y;             // (t,d) f32; may be x
  View residual_out;  // optional (t,d) f32; may be x or residual; required if residual is given
  View rstd;          // optional (t) f32: kept for backward
  float eps = 1e-5f;
};
struct NormBackward {
  View x;       // (t,d): the normalised sum, i.e. residual_out (or x where there was no residual)
  View weight;  // optional (d)
  View rstd;    // (t)
  View dy;      // (t,d)
  View dresidual;  // optional (t,d): gradient arriving at residual_out from further up, added to dx
  View dx;         // (t,d): gradient of x and of residual alike; may be dy or dresidual
  View dweight;    // optional (d) +=
  View dx_act;     // optional (t,d), activation type: dx once more, for the products that read it
  float eps = 1e-5f;
};

// Causal depthwise convolution along each piece, then SiLU if asked:
//   y[t,c] = act(bias[c] + sum_k weight[c,k] x[t-w+1+k, c]).  With `reverse` each piece is read
//   from its end: y[t,c] = act(bias[c] + sum_k weight[c,k] x[t+w-1-k, c]); then pieces are whole
//   sequences (from = to = -1).
// state (s,w-1,c) f32 holds the last w-1 inputs of the sequence, oldest first.
struct Conv1d {
  View x, weight, y;  // (t,c) (c,w) (t,c); y must not be x
  View bias;          // optional (c)
  View state;         // (s,w-1,c); optional where every piece has from = to = -1
  const Rows* rows = nullptr;
  bool silu = true, reverse = false;
};
struct Conv1dBackward {
  View x, weight, dy;  // as in forward; dy (t,c)
  View bias;           // optional
  View state;          // the state that forward read (slots `from` unchanged since)
  View dx;             // (t,c); must not be dy
  View dweight;        // (c,w) +=
  View dbias;          // optional (c) +=
  View dstate;  // optional (s,w-1,c): in, slot `to`: gradient of the final state; out, slot `from`:
                // of the initial one (from = to is fine: read before written)
  const Rows* rows = nullptr;
  bool silu = true, reverse = false;
};

// Mamba's selective scan (Gu and Dao 2023, section 3). Per channel c of e, with delta = softplus(dt
// + dt_bias):
//   h[i] = exp(delta * A[c,i]) * h[i] + delta * x * B[i],   A = -exp(A_log)
//   y    = sum_i C[i] * h[i] + D[c] * x,    then y *= silu(z) where z is given
// checkpoints, for backward: h before steps 0, k, 2k, … of each piece, k = scan_block(device), in
// order of pieces; (scan_checkpoints(backend, rows), e, n) in x's type, layout private to the
// backend.
constexpr int64_t scan_block(Device device) { return device.kind == Device::Kind::cpu ? 32 : 8; }
int64_t scan_checkpoints(const Backend& backend, const Rows& rows);  // sum of ceil(length / k)
// In how many tiles, whose states before them are known, a scan of e channels over one sequence
// goes fastest: as many as fill an H100 or H200, three blocks of 256 channels on each of 132
// multiprocessors. 0: known states save nothing.
constexpr int64_t scan_tiles(Device device, int64_t e) {
  return device.kind == Device::Kind::cpu ? 0 : 3 * 132 / std::max<int64_t>(1, (e + 255) / 256);
}

struct SelectiveScan {
  View x, dt;        // (t,e)
  View A_log;        // (e,n)
  View B, C;         // (t,n)
  View D, dt_bias;   // (e)
  View y;            // (t,e); may be dt or z, not x; not given: only state and sum_dt come out
  View z;            // optional (t,e)
  View state;        // (s,e,n); optional where every piece has from = to = -1
  View checkpoints;  // optional
  View sum_dt;  // optional (pieces, e): sum of delta over the piece, so that pieces computed apart
                // join
  View marks;   // optional (m,e,n), of a batch of one piece: the states before its steps every,
                // 2 every, …
  View starts;  // optional (1+m,e,n), in, of such a batch: the states before its steps 0, every, …;
                // `state` is then neither read nor written, nor is there sum_dt
  int64_t every = 0;  // of marks or starts: a multiple of scan_block(device)
  const Rows* rows = nullptr;
  bool reverse = false;  // each piece is read from its end; then pieces are whole sequences
};
struct SelectiveScanBackward {
  View x, dt, A_log, B, C, D, dt_bias, dy;  // dy (t,e)
  View z;                                   // optional
  View checkpoints;                         // required: from forward
  View dx, ddt;  // (t,e), dx may be dy, ddt dt; ddt is the gradient of dt before bias and softplus
  View dB, dC;   // (t,n)
  View dz;       // (t,e); required with z
  View y;        // optional (t,e), with z: what forward put out, once more
  View dA_log;   // (e,n) +=
  View dD, ddt_bias;  // (e) +=
  View dstate;        // optional (s,e,n): as in Conv1dBackward
  const Rows* rows = nullptr;
  bool reverse = false;
};

// S4D (Gu, Gupta, Goel and Ré 2022): n complex states a channel, each one of a conjugate pair, in a
// system that is the same at every step. Per channel c of d, with delta = exp(log_dt),
//   A = -exp(log_A_real) + i A_imag,   a = exp(delta A),   h[i] = a[i] h[i] + x,
//   y = sum_i Re(2 C[i] B'[i] h[i]) + D x,  B' = (a - 1) / A,   then GELU (of erf) if asked.
// Zero-order hold; B is taken into C, and B' to the side of the output, as in S4's own code.
// checkpoints, for backward: h before steps 0, k, 2k, … of each piece, k = kS4dBlock, in order of
// pieces; (s4d_checkpoints(rows), d, n, 2) f32, layout private to the backend.
constexpr int64_t kS4dBlock = 64;
int64_t s4d_checkpoints(const Rows& rows);  // sum of ceil(length / k)

struct S4dScan {
  View x;                   // (t,d)
  View log_A_real, A_imag;  // (d,n)
  View C;                   // (d,n,2): real and imaginary part, as the state
  View log_dt, D;           // (d)
  View y;                   // (t,d); may be x
  View state;               // (s,d,n,2); optional where every piece has from = to = -1
  View checkpoints;         // optional
  View before_gelu;         // optional (t,d), for backward: y before GELU; only with gelu
  const Rows* rows = nullptr;
  bool gelu = false;
  bool reverse = false;  // each piece is read from its end; then pieces are whole sequences
};
// What one step of the scan needs of the parameters, for those that keep it from step to step:
//   h += z h + x,  y = sum_i Re(K[i] h[i]) + D x,   z = a - 1,  K = 2 C B'.
struct S4dTable {
  View log_A_real, A_imag, C, log_dt;
  View table;  // (d,4,n) f32: real and imaginary part of z, then of K
};
struct S4dScanBackward {
  View x, log_A_real, A_imag, C, log_dt, D, dy;  // dy (t,d)
  View checkpoints;                              // required: from forward
  View before_gelu;                              // from forward; required with gelu
  View dx;                                       // (t,d); may be dy
  View dlog_A_real, dA_imag;                     // (d,n) +=
  View dC;                                       // (d,n,2) +=
  View dlog_dt, dD;                              // (d) +=
  View dstate;                                   // optional (s,d,n,2): as in Conv1dBackward
  const Rows* rows = nullptr;
  bool gelu = false, reverse = false;
};

// Gated linear unit (Dauphin et al. 2017): y = a * sigmoid(b) of a row a|b.
struct Glu {
  View x, y;  // (t,2d) (t,d)
};
struct GluBackward {
  View x, dy, dx;  // (t,2d) (t,d) (t,2d); dx may be x
};

// Where the stages of a U-Net meet (SaShiMi: Goel, Gu, Donahue and Ré 2022). A coarse step is p
// steps of a sequence, from a multiple of p on; m = rows->pooled(p).rows.total() of them end in the
// batch.
//   down  y[j] = x[jp] | x[jp+1] | … | x[jp+p-1]: a row of p d columns. state (s,p-1,d): the steps
//         of the coarse step that has not ended, then zeros.
//   up    y[t] = residual[t] + part t mod p, of d columns, of x[t/p - 1]: what a coarse step puts
//         out is for the p steps after it, so that nothing is seen before its time. state (s,p d):
//         the last coarse row, of which a part or more is still to come.
struct Downsample {
  View x;      // (t,d) f32, the residual stream
  View y;      // (m,pd), activation type
  View state;  // (s,p-1,d) f32; optional where every piece has from = to = -1
  const Rows* rows = nullptr;
  int64_t p = 2;
};
struct DownsampleBackward {
  View dy;         // (m,pd)
  View dresidual;  // optional (t,d) f32: gradient of x by other ways, added to dx
  View dx;         // (t,d) f32; may be dresidual
  View dstate;     // optional (s,p-1,d): as in Conv1dBackward
  const Rows* rows = nullptr;
  int64_t p = 2;
};
struct Upsample {
  View x;         // (m,pd), activation type
  View residual;  // (t,d) f32
  View y;         // (t,d) f32; may be residual
  View state;     // (s,pd) f32; optional where every piece has from = to = -1
  const Rows* rows = nullptr;
  int64_t p = 2;
};
struct UpsampleBackward {
  View dy;      // (t,d) f32, of y as of residual
  View dx;      // (m,pd)
  View dstate;  // optional (s,pd): as in Conv1dBackward
  const Rows* rows = nullptr;
  int64_t p = 2;
};

// A whole stack of Mamba blocks over a batch in which every piece is one step long: what
// model/backbone.cc and model/mamba1.cc do with the ops above, in one op, for decoding. Per layer
//   u = norm(x);  x|z = in_proj(u);  x = silu(conv1d(x));  dt|B|C = x_proj(x);
//   x += out_proj(scan(x, dt_proj(dt), A, B, C, D, z)),   and y = norm(x) after the last.
// What the ops hand over in activation type is rounded to it here too, but for dt and the products
// of out_proj, which stay f32. A backend may decline it: Backend::try_run.
struct MambaStep {
  struct Layer {
    View norm;                     // (d)
    View in_proj, in_proj_bias;    // (2e,d), optional (2e)
    View conv_weight, conv_bias;   // (e,w), optional (e)
    View x_proj;                   // (r+2n,e)
    View dt_proj, dt_bias;         // (e,r) (e)
    View A_log, D;                 // (e,n) (e)
    View out_proj, out_proj_bias;  // (d,e), optional (d)
    View conv_state, ssm_state;  // (s,w-1,e) (s,e,n); optional where every piece has from = to = -1
  };
  std::span<const Layer> layers;
  View x;           // (t,d) f32, the residual stream; or none:
  View ids, table;  // (t) i32, in host or device memory, and (v,d): x[i] = table[ids[i]], see Embed
  View norm_f;      // (d)
  View y;           // (t,d); or none:
  View head, logits;  // (v,d) and (t,v) f32: logits = y head^T
  const Rows* rows = nullptr;
  float eps = 1e-5f;
};

// A whole U-Net of S4D blocks, or a stack of them, over a batch in which every piece is one step
// long, from ids to logits: what model/backbone.cc, unet.cc, s4d.cc and mlp.cc do with the ops
// above, in one op, for decoding. Of each stage, from x(d), the residual stream,
//   x += up(x')[part of this step], x' what the stage inside put out for its last step;
//   per block  x += glu(output_linear(gelu(scan(norm(x)))));  x +=
//   mlp_out(glu(mlp_in(mlp_norm(x))));
// and norm_f after the last. A stage inside runs when a coarse step ends, on down(its p steps). A
// backend may decline it: Backend::try_run; every piece goes on in its own slot (from = to) or
// begins (from -1, position 0).
struct UnetStep {
  struct Block {
    View norm, table, D;              // (d), (d,4,n) of S4dTable, (d)
    View state;                       // (s,d,n,2)
    View output_linear, output_bias;  // (2d,d) (2d)
    View mlp_norm, mlp_in, mlp_out;   // optional, all or none: (d) (2f,d) (d,f)
  };
  struct Stage {
    std::span<const Block> blocks;
    View norm_f;  // (d)
    // Of one inside a stage of d' columns, whose steps are p times as many; else none.
    int64_t p = 1;
    View down, down_bias;  // (d,p d') (d)
    View up, up_bias;      // (p d',d) (p d')
    View rest, next;       // (s,p-1,d') (s,p d'): states of Downsample and Upsample
  };
  std::span<const Stage> stages;  // the outermost first
  View ids, table;                // (t) i32, in host or device memory, and (v',d): see Embed
  View head, logits;              // (v,d) and (t,v) f32
  const Rows* rows = nullptr;
  float eps = 1e-5f;
};

// One output row for each piece with `last`, in order of pieces. `last`: the sequence's last row;
// `mean`: the mean over all its rows. state (s,d+1) f64 carries the running sum and the count of a
// sequence in pieces.
enum class Pooling : uint8_t { last, mean };
struct Pool {
  View x, y;   // (t,d) (m,d), m = rows->finished()
  View state;  // optional where every piece has from = to = -1; unused by `last`
  const Rows* rows = nullptr;
  Pooling pooling = Pooling::mean;
};
struct PoolBackward {  // of whole sequences (position 0, last): dx (t,d) from dy (m,d)
  View dy, dx;
  const Rows* rows = nullptr;
  Pooling pooling = Pooling::mean;
};

// loss[i] = -weight * log softmax(logits[i])[targets[i]] in nats. targets (m) i32; -1: not counted,
// loss 0; any other outside 0 … v-1 is refused on a CPU, and on CUDA gives a loss and a gradient
// of NaN. With `dlogits`, also dlogits = scale * weight * (softmax - onehot), 0 for rows not
// counted; may be logits. With `total`, also total(1) f64 += sum of loss, in f64 and a fixed order.
struct CrossEntropy {
  View logits;         // (m,v) f32
  View targets;        // (m) i32
  View loss;           // (m) f32
  View dlogits;        // optional (m,v)
  View class_weights;  // optional (v)
  View total;          // optional (1) f64
  float scale = 1;
};

// ids[i] = an id drawn from softmax(logits[i] / temperature) over the ids that top_k and top_p
// leave.
//   temperature  0: the largest logit, the lowest of equals; nothing is drawn.
//   top_k        the k largest logits remain, of equal ones the lower ids. 0 or from v on: all.
//   top_p        of those, by their probabilities at this temperature: all whose logit is not below
//                the largest threshold at which they sum to top_p; equal logits go or stay
//                together. 1: all.
// The draw is the first 64 bits of Philox keyed by (seed, streams[i], step): what a sequence gets
// does not depend on what shares its batch. Probabilities are multiples of 2^-46 of the largest,
// the same on every device (kernels/sample.h): the same logits give the same ids everywhere. -inf
// rules an id out. A row with NaN, or without a finite largest logit, gives id -1 and log_prob NaN.
// log_probs[i] = log softmax(logits[i])[ids[i]] in nats, of the logits as they came: temperature 1,
// nothing left out, no guidance.
// With `unguided`, logits of the same sequences without their label, finite, what is drawn from is
//   unguided + guidance (logits - unguided)
// (classifier-free guidance, Ho and Salimans 2022; of a language model Sanchez et al. 2023), and an
// id is written twice: ids[m + i] = ids[i] + v, for a table that has its v rows with the label and
// then without.
struct Sample {
  View logits;     // (m,v) f32, v up to 65,536
  View unguided;   // optional (m,v)
  View ids;        // (m) i32, or (2m): may be the ids that the next embed reads
  View streams;    // optional (m) i32: of each row's sequence; left out: row i has stream i
  View log_probs;  // optional (m) f32
  float guidance = 1;
  float temperature = 1;
  int64_t top_k = 0;
  float top_p = 1;
  uint64_t seed = 0, step = 0;
};

// out(1) f64 += sum of x^2 over all x; each f32, any contiguous shape. Summed in f64 in a fixed
// order.
struct SumSquares {
  std::span<const View> x;
  View out;
};

// AdamW (Loshchilov and Hutter 2019) over all tensors of a model, torch's arithmetic, step counted
// from 1.
//   g *= scale; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2; w -= lr*(decay*w + m^ / (sqrt(v^) +
//   eps)); copy = w; g = 0
// scale, of all gradients by their norm, as torch's clip_grad_norm_: min(1, clip / (sqrt(squares) +
// 1e-6)), 1 where clip is 0. Where squares is not finite nothing is written: it is looked at where
// it lies, so that a host need not wait for it.
struct AdamW {
  struct Item {
    View w, g, m, v;  // f32, contiguous, one shape
    View copy;        // optional, f32 or bf16: w once more, for forward and backward
    float decay = 0;
  };
  std::span<const Item> items;
  View squares;  // optional (1) f64, from SumSquares over all g; required with clip
  double clip = 0;
  float lr, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f;
  int64_t step = 1;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual Device device() const = 0;
  virtual int threads() const = 0;  // host threads an op uses
  // The type of activations beside matrices of this type.
  virtual DType activations(DType /* matrices */) const { return DType::f32; }

  // Memory. free() of a block keeps it for the next alloc of its size class; alloc throws
  // OutOfMemory.
  virtual void* alloc(int64_t bytes) = 0;
  virtual void free(void* data) = 0;
  virtual Memory memory() const { return {}; }
  virtual void restart_peak() {}
  virtual void release_kept() {}              // freed blocks go back to the device
  virtual void copy(View from, View to) = 0;  // same shape; casts, strides, and crosses devices
  virtual void fill(View x, double value) = 0;
  virtual void sync() = 0;
  // Powers of two a second that the device makes, measured; 0 where they limit nothing.
  virtual double powers_per_second() { return 0; }
  // copy() takes the bytes of host memory before it returns, and waits for the device only where it
  // fills host memory that did not come from here.
  virtual void* alloc_host(int64_t bytes);
  virtual void free_host(void* data);  // once no copy to it is under way
  // A moment behind all that was asked for so far, and waiting until it has come.
  virtual int64_t mark() { return 0; }
  virtual void wait(int64_t /* mark */) { sync(); }

  virtual void run(const Gemm&) = 0;
  virtual void run(const SumRows&) = 0;
  virtual void run(const Embed&) = 0;
  virtual void run(const EmbedBackward&) = 0;
  virtual void run(const Norm&) = 0;
  virtual void run(const NormBackward&) = 0;
  virtual void run(const Conv1d&) = 0;
  virtual void run(const Conv1dBackward&) = 0;
  virtual void run(const SelectiveScan&) = 0;
  virtual void run(const SelectiveScanBackward&) = 0;
  virtual void run(const S4dScan&) = 0;
  virtual void run(const S4dScanBackward&) = 0;
  virtual void run(const S4dTable&) = 0;
  virtual void run(const Glu&) = 0;
  virtual void run(const GluBackward&) = 0;
  virtual void run(const Downsample&) = 0;
  virtual void run(const DownsampleBackward&) = 0;
  virtual void run(const Upsample&) = 0;
  virtual void run(const UpsampleBackward&) = 0;
  // False, and nothing done, where the backend has no such op or not for these shapes: the caller
  // then takes the ops it stands for.
  virtual bool try_run(const MambaStep&) { return false; }
  virtual bool try_run(const UnetStep&) { return false; }
  virtual void run(const Pool&) = 0;
  virtual void run(const PoolBackward&) = 0;
  virtual void run(const CrossEntropy&) = 0;
  virtual void run(const Sample&) = 0;
  virtual void run(const SumSquares&) = 0;
  virtual void run(const AdamW&) = 0;
};

// threads 0: as many as the machine has. limit: of the memory that is allocated, in bytes.
std::unique_ptr<Backend> make_cpu_backend(int threads = 0, int64_t limit = kNoLimit);
// Throws where the program was built without CUDA, or the machine has no such GPU or no driver.
std::unique_ptr<Backend> make_cuda_backend(int index = 0, int64_t limit = kNoLimit);
int cuda_devices();  // 0 without GPU, driver or CUDA in the build; never throws

}  // namespace coil
