// Draws of masks: see masks.h.
#include "pipelines/masks.h"

#include "genomics/alphabet.h"
#include "pipelines/hash.h"

namespace coil {
namespace {

constexpr uint32_t kEvenStream = 111;  // others: batches.cc, hdf5_shuffle.cc
constexpr double kMasked = 0.8, kRandom = 0.1;

}  // namespace

Masking masking_of(const Config& config) {
  if (config.objective != Objective::mlm) return {};
  Masking masking{.share = config.target_column.empty() ? config.mask_share : 0};
  const auto letters = static_cast<uint8_t>(config.alphabet.size());
  if (config.letters()) {
    masking.token = letters;
    masking.choices = letters;
  } else {
    masking.token = dna::kMask;
    masking.first = dna::kA;
    masking.choices = 4;
  }
  return masking;
}

std::vector<uint8_t> mask(const Masking& masking, std::vector<uint8_t>& codes, Philox& random) {
  std::vector<uint8_t> targets(codes.size(), kUncounted);
  for (size_t i = 0; i < codes.size(); ++i) {
    if (!masking.chosen_from(codes[i]) || random.uniform() >= masking.share) continue;
    targets[i] = codes[i];
    const double what = random.uniform();
    if (what < kMasked)
      codes[i] = masking.token;
    else if (what < kMasked + kRandom)
      codes[i] = static_cast<uint8_t>(masking.first + random.below(masking.choices));
  }
  return targets;
}

std::vector<uint8_t> mask_evenly(const Masking& masking, std::vector<uint8_t>& codes, uint64_t seed,
                                 int64_t record, int64_t begin) {
  std::vector<uint8_t> targets(codes.size(), kUncounted);
  for (size_t i = 0; i < codes.size(); ++i) {
    if (!masking.chosen_from(codes[i])) continue;
    const int64_t place[] = {record, begin + static_cast<int64_t>(i)};
    Philox random(seed, kEvenStream, hash_bytes(place, sizeof place));
    if (random.uniform() >= masking.share) continue;
    targets[i] = codes[i];
    codes[i] = masking.token;
  }
  return targets;
}

int64_t letters_vocabulary(const Config& config) {
  const auto letters = static_cast<int64_t>(config.alphabet.size());
  return vocabulary_of(letters + (masking_of(config).share > 0 ? 1 : 0));
}

}  // namespace coil
