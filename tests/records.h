// Records in memory as a Source, and small random models: for the tests of streaming pipelines.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "genomics/alphabet.h"
#include "kernels/error.h"
#include "model/head.h"
#include "model/params.h"

namespace coil {

using Codes = std::vector<uint8_t>;

inline Codes random_codes(int64_t length, uint64_t seed, double n_rate = 0.01) {
  Philox random(seed, 7, 0);
  Codes codes(length);
  for (uint8_t& code : codes) {
    const uint64_t letter = random.below(4);
    code = random.uniform() < n_rate ? dna::kN : static_cast<uint8_t>(dna::kA + letter);
  }
  return codes;
}

inline Codes reverse_complemented(Codes codes) {
  dna::reverse_complement(codes);
  return codes;
}

inline Codes parse(const std::string& letters) {
  Codes codes;
  for (const char letter : letters) codes.push_back(dna::code_of(letter));
  return codes;
}

// Records in memory, handed over in segments of `run`.
class Records final : public Source {
 public:
  explicit Records(std::vector<Codes> records, int64_t run = kRun, std::vector<int64_t> files = {})
      : records_(std::move(records)), files_(std::move(files)), run_(run) {}

  bool next(Segment& segment) override {
    if (record_ == static_cast<int64_t>(records_.size())) return false;
    const Codes& codes = records_[record_];
    const int64_t length = std::min<int64_t>(run_, codes.size() - position_);
    segment = Segment{.record = record_,
                      .file = files_.empty() ? 0 : files_[record_],
                      .position = position_,
                      .first = position_ == 0,
                      .name = position_ == 0 ? fmt::format("r{}", record_) : "",
                      .codes = {codes.begin() + position_, codes.begin() + position_ + length}};
    position_ += length;
    segment.last = position_ == static_cast<int64_t>(codes.size());
    if (segment.last) {
      position_ = 0;
      record_ += 1;
    }
    return true;
  }

 private:
  std::vector<Codes> records_;
  std::vector<int64_t> files_;
  int64_t run_, record_ = 0, position_ = 0;
};

inline Config small_config(Objective objective) {
  Config config;
  config.vocab = 16;
  config.d = 16;
  config.e = 32;
  config.n = 8;
  config.dt_rank = 2;
  config.layers.resize(2);
  config.objective = objective;
  config.alphabet = "dna";
  if (objective == Objective::classify) config.labels = {"a", "b", "c"};
  return config;
}

// A random model whose answers differ clearly between inputs.
inline Model small_model(Backend& backend, Config config) {
  Model model = make_model(backend, config, 3);
  uint64_t seed = 100;
  for (const Param& param : declare(model)) {
    if (!param.info.decay && param.info.name != "backbone.norm_f.weight") continue;
    if (param.info.name.find("A_log") != std::string::npos) continue;
    Philox random(seed++, 8, 0);
    for (float& value : param.tensor->span<float>()) value += 0.2 * random.normal();
  }
  return model;
}

}  // namespace coil
