// Samples (floats, -1 … 1) as codes of one byte, and back.
//   mulaw  q = floor((sign(x) ln(1 + 255|x|) / ln 256 + 1) / 2 * 256), clipped to 0 … 255
//          back, at the centre of the cell: y = 2 (q + 1/2) / 256 - 1, x = sign(y) (256^|y| -
//          1)/255
//   pcm16  s = floor(32768 x + 1/2), clipped to -32768 … 32767; s + 32768 as two codes, the high
//          byte (coarse) before the low one (fine); back: s / 32768. Exact for 16-bit files.
// Beyond -1 … 1 a sample is clipped.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "model/batch.h"

namespace coil::audio {

constexpr int codes_of_a_sample(SampleCodes codes) { return codes == SampleCodes::pcm16 ? 2 : 1; }

uint8_t mulaw(float x);
float from_mulaw(uint8_t q);

void encode(std::span<const float> samples, SampleCodes how,
            std::vector<uint8_t>& codes);  // appends
// codes: whole samples.
void decode(std::span<const uint8_t> codes, SampleCodes how,
            std::vector<float>& samples);  // appends

}  // namespace coil::audio
