// Which tokens a masked language model is to tell, and what it reads in their place (Devlin et al.
// 2019, section 3.1: of those chosen 80 % become the mask token, 10 % a random token, 10 % stay).
// Only what has an answer is chosen: of DNA A, C, G and T, of letters all.
#pragma once

#include <cstdint>
#include <vector>

#include "model/config.h"
#include "model/params.h"

namespace coil {

struct Masking {
  double share = 0;  // of the tokens; 0: nothing is masked
  uint8_t token = 0;
  uint8_t first = 0;    // of the tokens that are masked, and of the random ones
  int64_t choices = 0;  // so many from it on
  bool chosen_from(uint8_t code) const { return code >= first && code - first < choices; }
};
Masking masking_of(const Config& config);  // of another objective: share 0

// Of training: replaces codes; returns the targets, kUncounted where nothing was chosen.
std::vector<uint8_t> mask(const Masking& masking, std::vector<uint8_t>& codes, Philox& random);
// Of evaluation: what is chosen is a function of the seed, the record and the place in it alone,
// and becomes the mask token. `begin`: of codes[0] in the record.
std::vector<uint8_t> mask_evenly(const Masking& masking, std::vector<uint8_t>& codes, uint64_t seed,
                                 int64_t record, int64_t begin);

// The vocabulary of letters: rounded up so that rows are aligned, with room for a mask token where
// one is needed.
int64_t letters_vocabulary(const Config& config);

}  // namespace coil
