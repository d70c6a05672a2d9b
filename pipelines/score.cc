#include "pipelines/score.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <numbers>

#include "kernels/error.h"
#include "pipelines/engine.h"

namespace coil {

double Score::bits_per_base() const {
  if (counted == 0) return std::numeric_limits<double>::quiet_NaN();
  return -log_likelihood / counted / std::numbers::ln2;
}

void check_language_model(const Config& config, const std::string& where) {
  if (config.objective == Objective::mlm)
    throw Error(
        fmt::format("{}: is a masked language model, which gives a record no likelihood", where),
        "coil eval measures it; coil train --objective lm makes a language model");
  if (config.objective != Objective::lm) {
    throw Error(
        fmt::format("{}: is a classifier, expected a language model", where),
        "coil classify reads a classifier; coil train --objective lm makes a language model");
  }
  check_front_end(config, where);
}

namespace {

// -log p of the token after each row, 0 where it is not counted.
std::vector<float> losses_of(Backend& backend, const Model& model, const FrontEnd& front,
                             Stream::Batch& batch, State& state) {
  const Rows rows(backend, batch.pieces);
  const View ids = host_view(batch.ids.data(), DType::i32, {rows.total()});
  const Tensor h = hidden(backend, model, ids, rows, &state);  // (t, d)
  return front.losses(backend, model, h, batch.next);
}

// What a unit's values are.
enum Values : size_t {
  kNats,
  kCounted,
  kSecondNats,  // since its last line
  kSecondCounted,
  kPositions,  // from here on log p of each position that is not handed on yet
};

// The lines of a unit as its codes come by.
class Track {
 public:
  Track(const FrontEnd& front, int64_t rate) : front_(front), rate_(rate) {}

  // A counted code, by its place in its unit.
  void add(Stream::Unit& unit, int64_t place, float nats) const {
    if (!front_.audio()) {
      const int64_t start = unit.begin + place;
      fmt::format_to(std::back_inserter(unit.text), "{}\t{}\t{}\t{:.6g}\n", unit.name, start,
                     start + 1, nats / std::numbers::ln2);
      return;
    }
    unit.values[kSecondNats] += nats;
    unit.values[kSecondCounted] += 1;
    if ((unit.begin + place + 1) % (rate_ * front_.step()) == 0) second(unit, place + 1);
  }

  // Of audio: the second that ends before `place`, or the rest of one.
  void second(Stream::Unit& unit, int64_t place) const {
    const double codes = unit.values[kSecondCounted], rate = static_cast<double>(rate_);
    if (codes == 0) return;
    const double samples = codes / static_cast<double>(front_.step());
    const double end = static_cast<double>((unit.begin + place) / front_.step());
    fmt::format_to(std::back_inserter(unit.text), "{}\t{:.10g}\t{:.10g}\t{}\t{:.6f}\n", unit.name,
                   (end - samples) / rate, end / rate, samples,
                   unit.values[kSecondNats] / samples / std::numbers::ln2);
    unit.values[kSecondNats] = unit.values[kSecondCounted] = 0;
  }

 private:
  const FrontEnd& front_;
  int64_t rate_;
};

// Adds piece i of a batch to its unit: log p of its bases or samples, one after another.
void add_positions(const Stream::Batch& batch, size_t i, const std::vector<float>& nats,
                   const FrontEnd& front) {
  constexpr double kNot = std::numeric_limits<double>::quiet_NaN();
  const Piece& piece = batch.pieces[i];
  std::vector<double>& values = batch.units[i]->values;
  if (piece.position == 0 && front.prefix() == 0) values.push_back(kNot);  // nothing precedes it
  for (int64_t row = 0; row < piece.length; row++) {
    const int32_t next = batch.next[piece.begin + row];
    if (next < 0) continue;
    const double value = front.counted(next) ? -nats[piece.begin + row] : kNot;
    const int64_t code = piece.position + row + 1 - front.prefix();
    if (code % front.step() == 0)
      values.push_back(value);
    else
      values.back() += value;  // the fine code of a sample
  }
}

// Adds piece i of a batch to its unit: nats and codes counted, and its lines where there is a
// track.
void add(const Stream::Batch& batch, size_t i, const std::vector<float>& nats,
         const FrontEnd& front, const Track* track) {
  const Piece& piece = batch.pieces[i];
  Stream::Unit& unit = *batch.units[i];
  unit.values.resize(std::max<size_t>(unit.values.size(), kPositions));
  const int64_t next = piece.position + 1 - front.prefix() - piece.begin;  // code after row 0
  for (int64_t row = piece.begin; row < piece.begin + piece.length; row++) {
    if (!front.counted(batch.next[row])) continue;
    unit.values[kNats] += nats[row];
    unit.values[kCounted] += 1;
    if (track) track->add(unit, next + row, nats[row]);
  }
  if (track && front.audio() && piece.last)
    track->second(unit, next + piece.begin + piece.length - 1);
}

}  // namespace

void score(Backend& backend, const Model& model, Source& source, const ScoreOptions& options,
           const std::function<void(const Score&)>& emit,
           const std::function<void(const std::string&)>& per_base,
           const std::function<void(const Stream&)>& progress,
           const std::function<void(std::span<const float>)>& per_position) {
  COIL_ASSERT(!(options.per_base || options.per_position) ||
              options.stream.strands == Strands::forward);
  const FrontEnd front_end(model.config);
  const Track lines(front_end, model.config.audio.rate);
  const Track* const track = options.per_base ? &lines : nullptr;
  const auto compute = [&](Backend& own, Stream::Batch& batch, State& state) {
    return losses_of(own, model, front_end, batch, state);  // (t)
  };
  const auto add_all = [&](const Stream::Batch& batch, const std::vector<float>& nats) {
    for (size_t i = 0; i < batch.pieces.size(); i++) {
      add(batch, i, nats, front_end, track);
      if (options.per_position) add_positions(batch, i, nats, front_end);
    }
  };
  std::vector<float> positions;
  // But for the last one of a unit that goes on: its fine code may come yet.
  const auto hand_on = [&](std::vector<double>& values, bool whole) {
    const auto begin = values.begin() + kPositions, end = values.end() - (whole ? 0 : 1);
    if (begin >= end) return;
    positions.assign(begin, end);
    per_position(positions);
    values.erase(begin, end);
  };
  Stream::Unit unit;
  const auto turn = [&](Stream& stream) {
    // Text of records after the first unfinished one waits, so that the order is that of the input.
    while (Stream::Unit* front = stream.front()) {
      if (options.per_base && !front->text.empty()) {
        per_base(front->text);
        front->text.clear();
      }
      const bool done = stream.pop(unit);
      std::vector<double>& values = done ? unit.values : front->values;
      if (options.per_position && values.size() > kPositions) hand_on(values, done);
      if (!done) break;
      emit({.name = unit.name,
            .begin = unit.begin,
            .end = unit.end,
            .counted = unit.values[kCounted] / static_cast<double>(front_end.step() * unit.strands),
            .log_likelihood = 0 - unit.values[kNats] / unit.strands});
    }
    if (progress) progress(stream);
  };
  run_stream(backend, model, source, options.stream, {compute, add_all, turn});
}

}  // namespace coil
