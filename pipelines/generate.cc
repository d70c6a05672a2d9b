#include "pipelines/generate.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numbers>

#include "audio/codes.h"
#include "kernels/error.h"

namespace coil {
namespace {

constexpr int64_t kBlock = 512;  // samples that are asked for, and written, at once
// The place of a try in the number of a stream: each has random numbers of its own.
constexpr int kTryBits = 24;

Softmax whole_vocabulary(const Model& model) { return {0, model.config.vocab}; }

}  // namespace

bool is_runaway(double mean_square, double bits_of_code) {
  const double level = 10 * std::log10(mean_square);  // -inf of silence
  return level > -9 || (level > -20 && bits_of_code > 0.85 * 8);
}

Generator::Generator(Backend& backend, const Model& model, const GenerateOptions& options)
    : backend_(backend),
      model_(model),
      options_(options),
      front_end_(model.config),
      softmaxes_(softmaxes(model.config)),
      window_(front_end_.step() * std::max<int64_t>(1, model.config.audio.rate / 2)),
      rows_(options.count * (options.guidance == 1 ? 1 : 2)),
      state_(backend, model.config,
             static_cast<int32_t>(rows_ * (options.guard == Guard::resample ? 2 : 1))),
      pending_(backend, DType::i32, {rows_}),
      heard_(options.count),
      tries_(options.count),
      stopped_(options.count),
      samples_(options.count),
      nats_(options.count) {
  COIL_ASSERT(front_end_.audio() && model.config.objective == Objective::lm);
  COIL_ASSERT(options.count >= 1 && options.count < 1 << kTryBits);
  COIL_ASSERT(!guided() || model.config.condition);
}

void Generator::set_pending(std::vector<int32_t> tokens) {
  pending_in_ = whole_vocabulary(model_);
  for (int64_t i = options_.count; i < rows_; ++i)
    tokens.push_back(tokens[i - options_.count] + static_cast<int32_t>(pending_in_.count));
  backend_.copy(host_view(tokens.data(), DType::i32, {rows_}), pending_);
}

void Generator::read_prompt(Source& prompt, int64_t chunk) {
  COIL_ASSERT(position_ == 0 && chunk >= 1);
  std::vector<int32_t> tokens{front_end_.begin()}, ids;
  int64_t read = 0;
  if (guided()) chunk = (chunk + 1) / 2;
  const auto advance = [&](int64_t count) {
    std::vector<Piece> pieces;
    ids.clear();
    for (int64_t first = 0; first < rows_; first += options_.count) {  // slots of a label
      const auto slot = static_cast<int32_t>(first);
      pieces.push_back({.begin = static_cast<int64_t>(ids.size()),
                        .length = count,
                        .position = read,
                        .from = read > 0 ? slot : -1,
                        .to = slot,
                        .last = false});
      for (int64_t i = 0; i < count; ++i)
        ids.push_back(
            front_end_.id(tokens[i], first == 0 ? options_.label : front_end_.no_label()));
    }
    const Rows rows(backend_, std::move(pieces));
    hidden(backend_, model_, host_view(ids.data(), DType::i32, {static_cast<int64_t>(ids.size())}),
           rows, &state_);
    tokens.erase(tokens.begin(), tokens.begin() + count);
    read += count;
  };
  for (Segment segment; prompt.next(segment);) {
    for (const uint8_t code : segment.codes) tokens.push_back(front_end_.token(code, position_++));
    while (static_cast<int64_t>(tokens.size()) > chunk) advance(chunk);
  }
  if (tokens.size() > 1) advance(static_cast<int64_t>(tokens.size()) - 1);
  for (const auto& [name, tensor] : state_.tensors())
    for (int64_t i = 0; i < rows_; ++i)
      if (i % options_.count > 0)
        backend_.copy(tensor.slice(i - i % options_.count, 1), tensor.slice(i, 1));
  set_pending(std::vector<int32_t>(options_.count, tokens[0]));
}

Rows Generator::rows_of_step(int32_t from, int32_t to, int64_t position) const {
  std::vector<Piece> pieces(rows_);
  for (int32_t i = 0; i < static_cast<int32_t>(rows_); ++i)
    pieces[i] = {.begin = i,
                 .length = 1,
                 .position = position,
                 .from = from + i,
                 .to = to + i,
                 .last = false};
  return Rows(backend_, std::move(pieces));
}

std::unique_ptr<Generator::Block> Generator::start() {
  auto block = std::make_unique<Block>();
  block->begin = position_;
  block->steps = window_ - position_ % window_;
  const bool whole = options_.guard == Guard::resample;  // may have to be drawn anew
  if (!whole) block->steps = std::min(block->steps, kBlock * front_end_.step());
  if (end_ >= 0) block->steps = std::min(block->steps, end_ - position_);
  block->ids = Tensor(backend_, DType::i32, {block->steps + 1, rows_});
  block->log_probs = Tensor(backend_, DType::f32, {block->steps, options_.count});
  block->read = pending_in_;
  backend_.copy(pending_, block->ids.view().slice(0, 1).reshape({rows_}));
  if (whole) to_ = from_ == 0 ? static_cast<int32_t>(rows_) : 0;
  draw(*block);
  position_ += block->steps;
  return block;
}

// Every step of the block and, behind it, the copies to the host: asked for, not waited for.
void Generator::draw(Block& block) {
  std::vector<int32_t> numbers(options_.count);
  for (size_t i = 0; i < numbers.size(); ++i)
    numbers[i] = static_cast<int32_t>(i) | tries_[i] << kTryBits;
  Tensor kept;
  const View streams =
      brought(backend_, host_view(numbers.data(), DType::i32, {options_.count}), kept);
  const auto row = [&](const Tensor& tensor, int64_t i) {
    return tensor.view().slice(i, 1).reshape({tensor.view().cols()});
  };
  const Rows first = rows_of_step(from_, to_, block.begin);
  // Of a position only its place in the coarsest step matters, and whether that is the first.
  const int64_t period = model_.config.coarsest_step();
  std::map<int64_t, Rows> others;
  const auto rows_at = [&](int64_t position) -> const Rows& {
    if (position == block.begin) return first;
    const int64_t alike = position < period ? position : period + position % period;
    const auto kept = others.find(alike);
    if (kept != others.end()) return kept->second;
    return others.emplace(alike, rows_of_step(to_, to_, alike)).first->second;
  };
  const auto place = [&](int64_t code) { return softmaxes_[code % front_end_.step()]; };
  for (int64_t i = 0; i < block.steps; ++i) {
    const int64_t code = block.begin + i;
    const Tensor logits = step_logits(backend_, model_, tables_, row(block.ids, i), rows_at(code),
                                      &state_, i == 0 ? block.read : place(code - 1), place(code));
    const auto half = [&](int64_t which) {
      return logits.view().slice(which * options_.count, options_.count);
    };
    backend_.run(Sample{.logits = half(0),
                        .unguided = guided() ? half(1) : View{},
                        .ids = row(block.ids, i + 1),
                        .streams = streams,
                        .log_probs = row(block.log_probs, i),
                        .guidance = options_.guidance,
                        .temperature = options_.temperature,
                        .top_k = options_.top_k,
                        .top_p = options_.top_p,
                        .seed = options_.seed,
                        .step = static_cast<uint64_t>(code)});
  }
  backend_.copy(row(block.ids, block.steps), pending_);
  pending_in_ = place(block.begin + block.steps - 1);
  block.ids_there = std::make_unique<Fetch>(backend_, block.ids);
  block.log_probs_there = std::make_unique<Fetch>(backend_, block.log_probs);
}

// Samples of each stream, and what the guard needs to know of them.
void Generator::listen(Block& block) {
  const auto* const ids = block.ids_there->wait().as<int32_t>() + rows_;
  const auto* const log_probs = block.log_probs_there->wait().as<float>();
  std::vector<uint8_t> codes(block.steps);
  for (int64_t stream = 0; stream < options_.count; ++stream) {
    nats_[stream] = 0;
    for (int64_t i = 0; i < block.steps; ++i) {
      const int32_t id = ids[i * rows_ + stream];
      check(id >= 0, "the model's logits are not finite at sample {}",
            (block.begin + i) / front_end_.step());
      codes[i] = static_cast<uint8_t>(id);
      nats_[stream] -= log_probs[i * options_.count + stream];
    }
    samples_[stream].clear();
    audio::decode(codes, model_.config.audio.codes, samples_[stream]);
    Heard& heard = heard_[stream];
    for (const float x : samples_[stream]) heard.squares += static_cast<double>(x) * x;
    heard.nats += nats_[stream];
    heard.samples += static_cast<int64_t>(samples_[stream].size());
  }
}

// Streams in which the half second that ends with the block is one.
std::vector<int64_t> Generator::runaways(const Block& block) const {
  const int64_t end = block.begin + block.steps;
  std::vector<int64_t> found;
  if (options_.guard == Guard::off || (end % window_ != 0 && end != end_)) return found;
  for (int64_t i = 0; i < options_.count; ++i) {
    const Heard& heard = heard_[i];
    const auto samples = static_cast<double>(heard.samples);
    const auto codes = samples * static_cast<double>(front_end_.step());
    if (!stopped_[i] && codes >= static_cast<double>(window_) / 2 &&
        is_runaway(heard.squares / samples, heard.nats / codes / std::numbers::ln2))
      found.push_back(i);
  }
  return found;
}

void Generator::finish(Block& block, const GenerateHooks& hooks) {
  const std::vector<Heard> before = heard_;
  const int64_t end = block.begin + block.steps;
  for (int tried = 0;; ++tried) {
    listen(block);
    const std::vector<int64_t> found = runaways(block);
    made_.runaways += static_cast<int64_t>(found.size());
    for (const int64_t stream : found) {
      if (hooks.runaway) hooks.runaway(stream, end / front_end_.step());
      stopped_[stream] = options_.guard == Guard::stop;
    }
    if (options_.guard != Guard::resample || found.empty()) break;
    if (tried == kGuardTries) {
      made_.kept += static_cast<int64_t>(found.size());
      break;
    }
    // All are drawn again: beside the same streams the others come out the same.
    for (const int64_t stream : found) ++tries_[stream];
    heard_ = before;
    draw(block);
  }
  std::fill(tries_.begin(), tries_.end(), 0);
  if (end % window_ == 0) std::fill(heard_.begin(), heard_.end(), Heard{});
  from_ = to_;
  for (int64_t i = 0; i < options_.count; ++i) {
    if (stopped_[i] || made_.unwanted) continue;
    made_.unwanted = !hooks.emit(i, samples_[i]);
    made_.samples += static_cast<int64_t>(samples_[i].size());
    made_.nats += nats_[i];
  }
}

Generated Generator::run(const GenerateHooks& hooks) {
  front_end_.check_label(options_.label);
  tables_ = step_tables(backend_, model_, options_.label, guided());
  if (!pending_in_.count) set_pending(std::vector<int32_t>(options_.count, front_end_.begin()));
  end_ = options_.samples > 0 ? position_ + options_.samples * front_end_.step() : -1;
  const auto ended = [&] {
    return made_.unwanted || position_ == end_ || std::ranges::all_of(stopped_, std::identity()) ||
           (hooks.interrupted && hooks.interrupted());
  };
  // On a CPU a block is done when start() returns: one ahead would only be late.
  const bool overlap =
      backend_.device().kind != Device::Kind::cpu && options_.guard != Guard::resample;
  std::unique_ptr<Block> ahead;
  while (true) {
    std::unique_ptr<Block> block = ended() ? nullptr : start();
    if (!block && !ahead) return made_;
    if (overlap) std::swap(block, ahead);
    if (block) finish(*block, hooks);
  }
}

}  // namespace coil
