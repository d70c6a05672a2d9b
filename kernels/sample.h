// What both backends' Sample share: the checks at its entry, and the numbers that must be the same
// to the bit wherever they are computed, so that the same logits give the same ids.
//
// An id's weight is 2^46 exp((logit - largest) / temperature) as a whole number: sums of up to
// 65,536 of them fit 64 bits and do not depend on their order. Powers are made of single products
// and sums that round alike everywhere. The error of a weight is 2^-22 of it where the logit lies
// within a few temperatures of the largest (the rounding of the f32 product before the power), and
// never below 2^-46 of the largest.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "kernels/expect.h"
#include "kernels/ops.h"
#include "kernels/philox.h"

namespace coil {

constexpr int64_t kSampleMost = 65'536;  // logits in a row

// Floats as unsigned numbers in the same order; -0 is 0, NaN is above all. No logit has key 0.
COIL_HOST_DEVICE inline uint32_t sample_key(float x) {
  if (x != x) return ~0u;
  const uint32_t bits = __builtin_bit_cast(uint32_t, x + 0.f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
COIL_HOST_DEVICE inline float sample_logit(uint32_t key) {
  return __builtin_bit_cast(float, key >> 31 ? key & 0x7fffffffu : ~key);
}
// Of the largest logit's key: whether it is a number, neither NaN nor infinite.
COIL_HOST_DEVICE inline bool sample_finite(uint32_t most) {
  return most > 0x007fffffu && most < 0xff800000u;
}

// Never one instruction: what the compiler joins is rounded once instead of twice.
COIL_HOST_DEVICE inline float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
COIL_HOST_DEVICE inline float rounded_sum(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

constexpr float kSampleLog2OfE = 1.44269504088896341f;

// log2(e) / temperature. Of a temperature so low that it overflows, still a number: 0 times it is
// 0.
inline float sample_scale(float temperature) {
  return std::min(kSampleLog2OfE / temperature, std::numeric_limits<float>::max());
}

// 2^46 * 2^((x - most) * scale), rounded down; x <= most.
COIL_HOST_DEVICE inline uint64_t sample_weight(float x, float most, float scale) {
  const float y = rounded_product(rounded_sum(x, -most), scale);
  if (!(y >= -47)) return 0;
  const int whole = static_cast<int>(rounded_sum(y, -0.5f));  // towards 0: the nearest
  const float z = rounded_sum(y, static_cast<float>(-whole));
  // ln(2)^k / k!, k = 7 to 0; |z| <= 1/2, so that what follows is below 2^-27.
  const float series[] = {1.52527338e-5f, 1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f,
                          5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.f};
  float power = 0;
  for (const float next : series) power = rounded_sum(rounded_product(power, z), next);
  const uint32_t bits = __builtin_bit_cast(uint32_t, power);
  power = __builtin_bit_cast(float, bits + (static_cast<uint32_t>(whole + 46) << 23));
  return static_cast<uint64_t>(power);
}

// The weight that the ids left by top_p reach together.
COIL_HOST_DEVICE inline uint64_t sample_part(float top_p, uint64_t total) {
  const uint64_t part =
      static_cast<uint64_t>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
  return part < 1 ? 1 : part > total ? total : part;
}

// A place within 0 … total-1, each as likely as the others to 2^-64: of the ids in order, each as
// long as its weight, the one that lies there is drawn.
COIL_HOST_DEVICE inline uint64_t sample_place(uint64_t seed, uint32_t stream, uint64_t step,
                                              uint64_t total) {
  const uint32_t counter[] = {0, stream, static_cast<uint32_t>(step),
                              static_cast<uint32_t>(step >> 32)};
  const uint32_t key[] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  uint32_t words[4];
  philox4x32(counter, key, words);
  const uint64_t draw = uint64_t{words[0]} << 32 | words[1];
  return static_cast<uint64_t>(static_cast<unsigned __int128>(draw) * total >> 64);
}

// From the sum of weights at temperature 1.
COIL_HOST_DEVICE inline float sample_log_prob(float x, float most, uint64_t total) {
  return static_cast<float>(static_cast<double>(x) - most -
                            log(static_cast<double>(total) * 0x1p-46));
}

// The logit that is drawn from; -inf stays what rules an id out.
COIL_HOST_DEVICE inline float sample_guided(float logit, float unguided, float guidance) {
  if (sample_key(logit) == 0x007fffffu) return logit;
  return rounded_sum(unguided, rounded_product(guidance, rounded_sum(logit, -unguided)));
}

inline void check_operands(const Sample& op, DType logits) {
  const char* const name = "sample";
  expect_rank(name, "logits", op.logits, 2);
  const int64_t m = op.logits.rows(), v = op.logits.cols();
  expect(name, "logits", op.logits, logits, {m, v});
  expect_if(name, "unguided", op.unguided, logits, {m, v});
  expect(name, "ids", op.ids, DType::i32, {op.unguided ? 2 * m : m});
  expect_if(name, "streams", op.streams, DType::i32, {m});
  expect_if(name, "log_probs", op.log_probs, DType::f32, {m});
  check(v >= 1 && v <= kSampleMost, "{}: {} logits a row, expected 1 to {}", name, v, kSampleMost);
  check(std::isfinite(op.guidance), "{}: guidance {}, expected a number", name, op.guidance);
  check(op.temperature >= 0 && std::isfinite(op.temperature),
        "{}: temperature {}, expected 0 or more", name, op.temperature);
  check(op.top_k >= 0, "{}: top_k {}, expected 0 or more", name, op.top_k);
  check(op.top_p > 0 && op.top_p <= 1, "{}: top_p {}, expected more than 0, at most 1", name,
        op.top_p);
}

}  // namespace coil
