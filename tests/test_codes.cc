// Mu-law and 16-bit codes: the published formulas, all codes, all 16-bit values.
#include "audio/codes.h"

#include <gtest/gtest.h>

#include <cmath>

namespace coil::audio {
namespace {

TEST(Codes, MulawIsTheFormula) {
  for (int i = -32768; i < 32768; i += 7) {
    const double x = i / 32768.0, sign = x < 0 ? -1 : 1;
    const double y = (sign * std::log(1 + 255 * std::fabs(x)) / std::log(256.0) + 1) / 2 * 256;
    EXPECT_EQ(mulaw(static_cast<float>(x)), std::clamp(std::floor(y), 0.0, 255.0)) << x;
  }
  EXPECT_EQ(mulaw(0), 128);
  EXPECT_EQ(mulaw(1), 255);
  EXPECT_EQ(mulaw(-1), 0);
  EXPECT_EQ(mulaw(3), 255);
  EXPECT_EQ(mulaw(-3), 0);
}

TEST(Codes, MulawDecodesToTheCentreOfItsCell) {
  for (int q = 0; q < 256; ++q) {
    EXPECT_EQ(mulaw(from_mulaw(static_cast<uint8_t>(q))), q);
    EXPECT_FLOAT_EQ(from_mulaw(static_cast<uint8_t>(q)),
                    -from_mulaw(static_cast<uint8_t>(255 - q)));
  }
  EXPECT_NEAR(from_mulaw(255), (std::pow(256.0, 255.0 / 256) - 1) / 255, 1e-7);
}

TEST(Codes, SixteenBitsAreExact) {
  std::vector<float> samples, back;
  for (int i = -32768; i < 32768; ++i) samples.push_back(static_cast<float>(i) / 32768.0f);
  std::vector<uint8_t> codes;
  encode(samples, SampleCodes::pcm16, codes);
  ASSERT_EQ(codes.size(), 2 * samples.size());
  EXPECT_EQ(codes[0], 0);
  EXPECT_EQ(codes[1], 0);
  EXPECT_EQ(codes[2 * 32768], 128);  // silence
  EXPECT_EQ(codes[2 * 32768 + 1], 0);
  decode(codes, SampleCodes::pcm16, back);
  EXPECT_EQ(back, samples);
  codes.clear();
  encode(std::vector<float>{2, -2, 0.4f / 32768, 0.6f / 32768}, SampleCodes::pcm16, codes);
  EXPECT_EQ(codes, (std::vector<uint8_t>{255, 255, 0, 0, 128, 0, 128, 1}));
}

}  // namespace
}  // namespace coil::audio
