// Sample: an id for each row of logits, drawn by temperature, top_k and top_p; see ops.h for the
// rules and sample.h for the numbers.
//
// Outside Highway's targets, whose compilers may join a product and a sum: a weight must have the
// same bits on every machine.
#include <omp.h>

#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/sample.h"

namespace coil {
namespace {

constexpr int64_t kParallel = 4 << 10;  // elements from which threads pay

struct Row {
  std::vector<uint32_t> keys;     // 0: ruled out
  std::vector<uint64_t> weights;  // 0 there
};

// The largest key such that the mass of all keys from it on is `least`; they have that together.
template <class Mass>
uint32_t threshold(const Row& row, const Mass& mass, uint64_t least) {
  uint32_t low = 0;
  uint64_t above = 0;  // of the keys beyond those in doubt
  for (int bit = 31; bit >= 0; --bit) {
    const uint32_t middle = low | uint32_t{1} << bit;
    uint64_t sum = 0;
    for (size_t i = 0; i < row.keys.size(); ++i)
      sum += row.keys[i] - middle < uint32_t{1} << bit ? mass(i) : 0;
    if (above + sum >= least)
      low = middle;
    else
      above += sum;
  }
  return low;
}

void keep_largest(Row& row, int64_t count) {
  const auto one = [](size_t) { return uint64_t{1}; };
  const uint32_t cut = threshold(row, one, static_cast<uint64_t>(count));
  int64_t equals = count;  // of those at the cut, the lower ids
  for (const uint32_t key : row.keys) equals -= key > cut;
  for (size_t i = 0; i < row.keys.size(); ++i)
    if (row.keys[i] < cut || (row.keys[i] == cut && equals-- <= 0))
      row.keys[i] = 0, row.weights[i] = 0;
}

uint64_t sum_of(const std::vector<uint64_t>& weights) {
  uint64_t sum = 0;
  for (const uint64_t weight : weights) sum += weight;
  return sum;
}

void keep_part(Row& row, float top_p) {
  const auto weight = [&](size_t i) { return row.weights[i]; };
  const uint32_t cut = threshold(row, weight, sample_part(top_p, sum_of(row.weights)));
  for (size_t i = 0; i < row.keys.size(); ++i)
    if (row.keys[i] < cut) row.weights[i] = 0;
}

void sample_row(const Sample& op, int64_t index, Row& row) {
  const int64_t v = op.logits.cols();
  const float* const logits = op.logits.row<float>(index);
  const float* const unguided = op.unguided ? op.unguided.row<float>(index) : nullptr;
  const auto drawn_from = [&](int64_t i) {
    return unguided ? sample_guided(logits[i], unguided[i], op.guidance) : logits[i];
  };
  int32_t& id = op.ids.as<int32_t>()[index];
  int32_t& again = op.ids.as<int32_t>()[unguided ? op.logits.rows() + index : index];
  float* const log_prob = op.log_probs ? op.log_probs.as<float>() + index : nullptr;
  row.keys.resize(v);
  row.weights.resize(v);
  uint32_t largest = 0;
  for (int64_t i = 0; i < v; ++i) {
    row.keys[i] = sample_key(drawn_from(i));
    largest = std::max(largest, row.keys[i]);
  }
  if (!sample_finite(largest)) {
    id = again = -1;
    if (log_prob) *log_prob = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  float most = sample_logit(largest);
  if (op.temperature == 0) {
    id = 0;
    while (row.keys[id] != largest) ++id;
  } else {
    const float scale = sample_scale(op.temperature);
    for (int64_t i = 0; i < v; ++i) row.weights[i] = sample_weight(drawn_from(i), most, scale);
    if (op.top_k > 0 && op.top_k < v) keep_largest(row, op.top_k);
    if (op.top_p < 1) keep_part(row, op.top_p);
    const uint32_t stream = static_cast<uint32_t>(op.streams ? op.streams.as<int32_t>()[index]
                                                             : static_cast<int32_t>(index));
    uint64_t place = sample_place(op.seed, stream, op.step, sum_of(row.weights));
    id = 0;
    while (place >= row.weights[id]) place -= row.weights[id++];
  }
  if (unguided) again = id + static_cast<int32_t>(v);
  if (!log_prob) return;
  if (unguided) most = *std::max_element(logits, logits + v);
  uint64_t total = 0;
  for (int64_t i = 0; i < v; ++i) total += sample_weight(logits[i], most, kSampleLog2OfE);
  *log_prob = sample_log_prob(logits[id], most, total);
}

}  // namespace

void CpuBackend::run(const Sample& op) {
  check_operands(op, DType::f32);
  const int64_t m = op.logits.rows();
#pragma omp parallel num_threads(threads_) if (m > 1 && m * op.logits.cols() >= kParallel)
  {
    Row row;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m; ++i) sample_row(op, i, row);
  }
}

}  // namespace coil
