// One channel at another rate, streamed (libsamplerate, SRC_SINC_MEDIUM_QUALITY). The only home of
// libsamplerate.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace coil::audio {

class Resampler {
 public:
  // Equal rates: samples pass unchanged, bit for bit. Throws where one rate is more than 256 times
  // the other; `where` names the file.
  Resampler(int64_t from, int64_t to, const std::string& where);
  ~Resampler();
  // Appends to `out` what `in` gives; `last`: nothing comes after it, the rest follows too. Of n
  // samples in all, n * to / from come out, rounded.
  void run(std::span<const float> in, bool last, std::vector<float>& out);

 private:
  void process(std::span<const float> in, bool last, std::vector<float>& out);
  struct Handle;
  std::unique_ptr<Handle> handle_;  // null: equal rates
  double ratio_ = 1;
  int64_t taken_ = 0, given_ = 0;
  std::string where_;
};

}  // namespace coil::audio
