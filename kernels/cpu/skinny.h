// Products of a few rows with a bf16 weight matrix that lies (n, k): decoding. See skinny.cc.
#pragma once

#include <cstdint>

namespace coil {

// c[i,j] = alpha * sum_k a[i,k] b[j,k] + beta * c[i,j] + bias[j]
struct SkinnyProduct {
  const float* a;     // (m, k) contiguous, as split_pairs() leaves it
  const uint16_t* b;  // (n, k) bf16
  const float* bias;  // (n) or null
  float* c;           // (m, n)
  int64_t m, k, b_stride, c_stride;
  float alpha, beta;
};

// Columns begin … end of c.
void skinny_product(const SkinnyProduct& op, int64_t begin, int64_t end);

// (m, k) a → split: each run of two vectors becomes its even elements, then its odd ones, since
// that is how pairs of bf16 unpack. The rest of a row, shorter than that, is left as it is.
void split_pairs(const float* a, int64_t m, int64_t k, int64_t a_stride, float* split);

// f32 from bf16.
void widen(const uint16_t* x, int64_t count, float* y);

}  // namespace coil
