#include "audio/resample.h"

#include <samplerate.h>

#include <algorithm>
#include <cmath>

#include "kernels/error.h"

namespace coil::audio {

struct Resampler::Handle {
  SRC_STATE* state = nullptr;
  ~Handle() { src_delete(state); }
};

Resampler::Resampler(int64_t from, int64_t to, const std::string& where) : where_(where) {
  COIL_ASSERT(from > 0 && to > 0);
  if (from == to) return;
  ratio_ = static_cast<double>(to) / static_cast<double>(from);
  check(src_is_valid_ratio(ratio_) != 0,
        "{}: {} Hz cannot be resampled to {} Hz: at most 256 times more or less", where, from, to);
  handle_ = std::make_unique<Handle>();
  int error = 0;
  handle_->state = src_new(SRC_SINC_MEDIUM_QUALITY, 1, &error);
  check(handle_->state != nullptr, "{}: cannot resample: {}", where, src_strerror(error));
}

Resampler::~Resampler() = default;

void Resampler::run(std::span<const float> in, bool last, std::vector<float>& out) {
  if (!handle_) {
    out.insert(out.end(), in.begin(), in.end());
    return;
  }
  const auto before = static_cast<int64_t>(out.size());
  taken_ += static_cast<int64_t>(in.size());
  process(in, false, out);
  if (last) {  // the library alone would end up to a sample early
    process(std::vector<float>(static_cast<size_t>(2 + 2 / ratio_)), true, out);
    const int64_t wanted = std::llround(static_cast<double>(taken_) * ratio_) - given_ + before;
    out.resize(static_cast<size_t>(std::max(wanted, before)));
  }
  given_ += static_cast<int64_t>(out.size()) - before;
}

void Resampler::process(std::span<const float> in, bool last, std::vector<float>& out) {
  constexpr long kRoom = 16 << 10;
  std::vector<float> room(kRoom);
  size_t used = 0;
  while (true) {
    SRC_DATA data{};
    data.data_in = in.data() + used;
    data.input_frames = static_cast<long>(in.size() - used);
    data.data_out = room.data();
    data.output_frames = kRoom;
    data.end_of_input = last ? 1 : 0;
    data.src_ratio = ratio_;
    const int error = src_process(handle_->state, &data);
    check(error == 0, "{}: cannot resample: {}", where_, src_strerror(error));
    used += static_cast<size_t>(data.input_frames_used);
    out.insert(out.end(), room.begin(), room.begin() + data.output_frames_gen);
    if (data.output_frames_gen == 0 && (used == in.size() || data.input_frames_used == 0)) return;
  }
}

}  // namespace coil::audio
