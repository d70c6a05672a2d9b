// Mu-law and 16-bit codes: the formulas are in codes.h.
#include "audio/codes.h"

#include <algorithm>
#include <cmath>

#include "kernels/error.h"

namespace coil::audio {

uint8_t mulaw(float x) {
  const double value = std::clamp(static_cast<double>(x), -1.0, 1.0);
  const double y = std::copysign(std::log(1 + 255 * std::fabs(value)) / std::log(256.0), value);
  return static_cast<uint8_t>(std::clamp(std::floor((y + 1) / 2 * 256), 0.0, 255.0));
}

float from_mulaw(uint8_t q) {
  const double y = 2 * (q + 0.5) / 256 - 1;
  return static_cast<float>(std::copysign((std::pow(256.0, std::fabs(y)) - 1) / 255, y));
}

void encode(std::span<const float> samples, SampleCodes how, std::vector<uint8_t>& codes) {
  for (const float x : samples) {
    if (how == SampleCodes::mulaw) {
      codes.push_back(mulaw(x));
      continue;
    }
    const double rounded = std::floor(32768 * static_cast<double>(x) + 0.5);
    const auto word = static_cast<int32_t>(std::clamp(rounded, -32768.0, 32767.0)) + 32768;
    codes.push_back(static_cast<uint8_t>(word >> 8));
    codes.push_back(static_cast<uint8_t>(word & 255));
  }
}

void decode(std::span<const uint8_t> codes, SampleCodes how, std::vector<float>& samples) {
  if (how == SampleCodes::mulaw) {
    for (const uint8_t code : codes) samples.push_back(from_mulaw(code));
    return;
  }
  COIL_ASSERT(codes.size() % 2 == 0);
  for (size_t i = 0; i < codes.size(); i += 2)
    samples.push_back(static_cast<float>((codes[i] << 8 | codes[i + 1]) - 32768) / 32768.0f);
}

}  // namespace coil::audio
