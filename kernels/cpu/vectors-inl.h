// Loops over a row of floats for the CPU kernels; included once per Highway target, after
// hwy/foreach_target.h. The body is called with a tag and an index: a full vector at a time, then
// one element at a time for the rest, so that nothing past the end of a row is touched on any
// target.
#if defined(COIL_VECTORS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef COIL_VECTORS_INL_H_
#undef COIL_VECTORS_INL_H_
#else
#define COIL_VECTORS_INL_H_
#endif

#include <hwy/highway.h>

#include <cstdint>

HWY_BEFORE_NAMESPACE();
namespace coil {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using FloatTag = hn::ScalableTag<float>;
using OneFloat = hn::CappedTag<float, 1>;

template <class Body>
HWY_INLINE void for_each(int64_t count, const Body& body) {
  const FloatTag tag;
  const int64_t lanes = hn::Lanes(tag);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) body(tag, i);
  for (const OneFloat one; i < count; ++i) body(one, i);
}

// The sum of body(tag, i), a vector each: two chains of additions in a fixed order.
template <class Body>
HWY_INLINE float sum_over(int64_t count, const Body& body) {
  const FloatTag tag;
  const int64_t lanes = hn::Lanes(tag);
  auto even = hn::Zero(tag), odd = hn::Zero(tag);
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    even = hn::Add(even, body(tag, i));
    odd = hn::Add(odd, body(tag, i + lanes));
  }
  for (; i + lanes <= count; i += lanes) even = hn::Add(even, body(tag, i));
  float sum = hn::GetLane(hn::SumOfLanes(tag, hn::Add(even, odd)));
  for (const OneFloat one; i < count; ++i) sum += hn::GetLane(body(one, i));
  return sum;
}

// y += x, then x = 0: how blocks of partial sums join.
HWY_INLINE void add_and_clear(float* y, float* x, int64_t count) {
  for_each(count, [&](auto tag, int64_t i) {
    hn::StoreU(hn::Add(hn::LoadU(tag, y + i), hn::LoadU(tag, x + i)), tag, y + i);
    hn::StoreU(hn::Zero(tag), tag, x + i);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace coil
HWY_AFTER_NAMESPACE();

#endif  // per-target include guard
