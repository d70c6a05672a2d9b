#include "pipelines/stream.h"

#include <algorithm>
#include <utility>

#include "genomics/alphabet.h"
#include "kernels/error.h"

namespace coil {

constexpr int64_t kCache =
    6 << 20;  // bytes; measured: 1,024 rows at d 128, two cores of 2 MiB L2 each

constexpr int64_t kDeviceMemory = 2LL << 30;        // bytes
constexpr int64_t kWholeRecord = int64_t{1} << 60;  // a window that no record fills

Strands parse_strands(const std::string& text) {
  if (text == "both") return Strands::both;
  if (text == "forward") return Strands::forward;
  if (text == "reverse") return Strands::reverse;
  throw UsageError(fmt::format("--strands: '{}' is none of both, forward, reverse", text));
}

void check_whole(int64_t length, int64_t limit, const std::string& name) {
  if (length > limit)
    throw Error(fmt::format("record '{}' has {} bases; the model reads records whole, from both "
                            "ends, and {} fit into memory",
                            name, length, limit),
                "cut it with --window; or a model that is not bidirectional");
}

int64_t auto_batch(const Config& config, Device device) {
  if (device.kind != Device::Kind::cpu) {
    const int64_t row = 2 * (3 * config.d + 5 * config.e + 3 * (config.dt_rank + 2 * config.n));
    int64_t rows = 4096;
    while (rows < 131'072 && 4 * rows * row <= kDeviceMemory) rows *= 2;
    return rows;
  }
  // Of one layer, in f32: x, residual, out_proj's output; x|z; conv; dt|B|C; dt.
  const int64_t row = 4 * (3 * config.d + 4 * config.e + config.dt_rank + 2 * config.n);
  int64_t rows = 256;
  while (rows < 4096 && 2 * rows * row <= kCache) rows *= 2;
  return rows;
}

// One strand of a unit. `codes` are those readable now, in the sequence's own direction.
struct Stream::Sequence {
  Unit* unit = nullptr;
  bool reverse = false;
  bool excerpt = false;  // of the unit, held whole
  int64_t length = -1;   // in tokens; -1: the record has not ended yet
  int64_t position = 0;  // next step
  int64_t base = 0;      // of codes[0]
  int32_t slot = -1;     // where its state stands; -1: it has none yet
  Kmers kmers;
  std::vector<uint8_t> codes;

  int64_t readable() const { return base + static_cast<int64_t>(codes.size()); }
};

Stream::Stream(Source& source, const StreamOptions& options, int parallel, const FrontEnd& front)
    : source_(source), options_(options), front_(front) {
  COIL_ASSERT(options_.batch > 0);
  COIL_ASSERT(!front.audio() || (options_.strands == Strands::forward && options_.excerpt == 0));
  if (options_.whole && options_.window == 0) options_.window = kWholeRecord;
  options_.window *= front.step();
  options_.stride *= front.step();
  if (options_.chunk <= 0 || options_.chunk > options_.batch) options_.chunk = options_.batch;
  if (options_.stride <= 0) options_.stride = options_.window;
  // A turn leaves at most so many sequences unfinished, each in another slot than before; what it
  // releases is free after it.
  const int64_t most = parallel * ((options_.batch + options_.chunk - 1) / options_.chunk + 1);
  slots_ = static_cast<int32_t>(std::min(kSlots, 2 * most));
  for (int32_t slot = slots_; slot-- > 0;) free_.push_back(slot);
}

Stream::~Stream() = default;

Stream::Unit& Stream::begin_unit(const Segment& segment) {
  Unit& unit = units_.emplace_back();
  unit.record = segment.record;
  unit.file = segment.file;
  unit.name = segment.name;
  unit.label = segment.label;
  unit.begin = segment.offset + segment.position;
  unit.strands = unit.pending = options_.strands == Strands::both ? 2 : 1;
  return unit;
}

Stream::Sequence& Stream::begin_sequence(Unit& unit, bool reverse) {
  Sequence& sequence = *active_.emplace_back(std::make_unique<Sequence>());
  sequence.unit = &unit;
  sequence.reverse = reverse;
  sequence.kmers = front_.kmers();
  return sequence;
}

// The strands that are read, of codes in memory: all of the unit's, or an excerpt of it.
void Stream::begin_strands(Unit& unit, std::vector<uint8_t> codes, bool excerpt) {
  const int64_t length = front_.prefix() + std::ssize(codes);
  promised_ += length * unit.strands;
  for (const bool reverse : {false, true}) {
    if (!reads(reverse)) continue;
    Sequence& sequence = begin_sequence(unit, reverse);
    sequence.excerpt = excerpt;
    sequence.length = length;
    sequence.base = front_.prefix();
    if (reverse || options_.strands == Strands::forward) {
      sequence.codes = std::move(codes);
    } else {
      sequence.codes = codes;
    }
    if (reverse) dna::reverse_complement(sequence.codes);
  }
}

// Of a unit whose end is known. codes_from: the codes of the excerpt that begins there.
void Stream::begin_excerpts(Unit& unit,
                            const std::function<std::vector<uint8_t>(int64_t)>& codes_from) {
  const int64_t each = options_.excerpt;
  if (each == 0 || unit.length() <= each) return;
  const int64_t count = unit.length() / each, stride = (count + kExcerpts - 1) / kExcerpts;
  for (int64_t i = 0; i < count; i += stride) {
    std::vector<uint8_t> codes = codes_from(i * each);
    if (2 * std::ranges::count(codes, dna::kN) > each) continue;  // a gap says nothing
    unit.pending += unit.strands;
    begin_strands(unit, std::move(codes), true);
  }
}

// A unit that is complete in memory.
void Stream::hold(Unit& unit, std::vector<uint8_t> codes) {
  unit.end = unit.begin + std::ssize(codes);
  begin_excerpts(unit, [&](int64_t begin) {
    return std::vector<uint8_t>(codes.begin() + begin, codes.begin() + begin + options_.excerpt);
  });
  begin_strands(unit, std::move(codes), false);
}

// The record that was being read has ended: what was spilled can be computed.
void Stream::end_open() {
  open_->end = open_->begin + open_length_;
  open_->fresh = open_length_;
  if (open_forward_) open_forward_->length = front_.prefix() + open_length_;
  for (const bool reverse : {false, true}) {
    if (!open_->spill || !reads(reverse)) continue;
    begin_sequence(*open_, reverse).length = open_length_;
  }
  if (open_->spill)
    begin_excerpts(*open_, [&](int64_t begin) {
      std::vector<uint8_t> codes;
      open_->spill->read(begin, options_.excerpt, codes);
      return codes;
    });
  open_ = nullptr;
  open_forward_ = nullptr;
}

// Windows begin at multiples of the stride. The last, shorter one is kept if it is at least half a
// window, or the only one of its record.
bool Stream::cut_window() {
  const int64_t readable = rolling_begin_ + static_cast<int64_t>(rolling_.size());
  int64_t length = options_.window;
  if (next_window_ + length > readable) {
    if (!rolling_ended_) return false;
    length = readable - next_window_;
    if (length <= 0 || (2 * length < options_.window && next_window_ > 0)) return false;
  }
  Segment segment = head_;
  segment.position = next_window_;
  Unit& unit = begin_unit(segment);
  const auto begin = rolling_.begin() + (next_window_ - rolling_begin_);
  hold(unit, {begin, begin + length});
  unit.fresh = next_window_ + length - std::max(answered_, next_window_);
  answered_ = next_window_ + length;
  next_window_ += options_.stride;
  return true;
}

// Takes one window or one segment; false at the end of the input.
bool Stream::read() {
  if (options_.window > 0 && cut_window()) return true;
  Segment segment;
  if (!source_.next(segment)) return false;
  COIL_ASSERT(!segment.codes.empty());
  if (options_.window > 0) {
    if (segment.first) {
      rolling_.clear();
      rolling_begin_ = next_window_ = answered_ = 0;
      head_ = Segment{.record = segment.record,
                      .file = segment.file,
                      .offset = segment.offset,
                      .name = segment.name,
                      .label = segment.label,
                      .codes = {}};
    }
    const int64_t readable = rolling_begin_ + static_cast<int64_t>(rolling_.size());
    const int64_t passed = std::min(next_window_, readable) - rolling_begin_;
    rolling_.erase(rolling_.begin(), rolling_.begin() + passed);
    rolling_begin_ += passed;
    rolling_.insert(rolling_.end(), segment.codes.begin(), segment.codes.end());
    rolling_ended_ = segment.last;
    return true;
  }
  if (segment.first && segment.last) {
    Unit& unit = begin_unit(segment);
    unit.fresh = static_cast<int64_t>(segment.codes.size());
    hold(unit, std::move(segment.codes));
    return true;
  }
  if (segment.first) {
    open_ = &begin_unit(segment);
    open_length_ = 0;
    if (options_.strands != Strands::forward || options_.excerpt > 0) {
      open_->spill = std::make_unique<Spill>();
    } else {
      open_forward_ = &begin_sequence(*open_, false);
      open_forward_->base = front_.prefix();
      promised_ += front_.prefix();
    }
  }
  COIL_ASSERT(open_);
  open_length_ += static_cast<int64_t>(segment.codes.size());
  promised_ += static_cast<int64_t>(segment.codes.size()) * open_->strands;
  if (open_->spill) open_->spill->append(segment.codes);
  if (open_forward_) {
    std::vector<uint8_t>& codes = open_forward_->codes;
    codes.insert(codes.end(), segment.codes.begin(), segment.codes.end());
  }
  if (segment.last) end_open();
  return true;
}

// Makes the next `want` steps of a sequence readable, and the code after them; returns how many
// there are.
int64_t Stream::prepare(Sequence& sequence, int64_t want) {
  if (sequence.position - sequence.base >= Source::kRun) {
    sequence.codes.erase(sequence.codes.begin(),
                         sequence.codes.begin() + (sequence.position - sequence.base));
    sequence.base = sequence.position;
  }
  if (sequence.unit->spill && !sequence.excerpt) {
    const int64_t rest = sequence.length - sequence.position;
    if (sequence.readable() < sequence.position + std::min(rest, want + 1)) {
      const int64_t count = std::min(rest, std::max(Source::kRun, want + 1));
      if (sequence.reverse)
        sequence.unit->spill->read_reverse(sequence.position, count, sequence.codes);
      else
        sequence.unit->spill->read(sequence.position, count, sequence.codes);
      sequence.base = sequence.position;
    }
  }
  while (sequence.length < 0 && sequence.readable() <= sequence.position + want) {
    check(read(), "record '{}' has no end", sequence.unit->name);
  }
  return std::min(
      want, (sequence.length < 0 ? sequence.readable() - 1 : sequence.length) - sequence.position);
}

int32_t Stream::token(const Sequence& sequence, int64_t position) const {
  const int64_t prefix = front_.prefix();
  if (position < prefix) return front_.begin();
  return front_.token(sequence.codes[position - sequence.base], position - prefix);
}

// Fills a batch from active sequence i on; false where no further batch can be begun in this turn.
bool Stream::fill(Batch& batch, size_t& i) {
  int64_t budget = options_.batch;
  while (budget > 0) {
    if (i == active_.size()) {
      // While a record is read as it arrives, what comes after it must wait: its bases would pile
      // up.
      if (exhausted_ || open_forward_ || static_cast<int64_t>(units_.size()) >= kWindow)
        return false;
      exhausted_ = !read();
      continue;
    }
    Sequence& sequence = *active_[i];
    int64_t most = std::min(budget, options_.chunk);
    if (options_.whole) {
      check_whole(sequence.length, options_.whole, sequence.unit->name);
      if (sequence.length > budget && budget < options_.batch) return true;
      most = sequence.length;
    }
    const int64_t count = prepare(sequence, most);
    const bool last = sequence.position + count == sequence.length;
    Piece piece{.begin = options_.batch - budget,
                .length = count,
                .position = sequence.position,
                .from = sequence.slot,
                .to = -1,
                .last = last};
    const bool first = sequence.slot < 0;
    if (first && !last && carried_ == slots_ / 2) return false;
    if (!first) released_.push_back(sequence.slot);
    if (!last) {  // those carried need at most the other half of the slots
      COIL_ASSERT(!free_.empty());
      piece.to = sequence.slot = free_.back();
      free_.pop_back();
    }
    carried_ += first && !last;
    carried_ -= !first && last;
    const int64_t end = sequence.position + count;
    for (int64_t at = sequence.position; at < end; ++at) {
      const int32_t now = token(sequence, at);
      batch.ids.push_back(front_.id(sequence.kmers.next(now), sequence.unit->label));
      if (at > sequence.position) batch.next.push_back(now);
    }
    batch.next.push_back(last ? -1 : token(sequence, end));
    batch.pieces.push_back(piece);
    batch.units.push_back(sequence.unit);
    batch.excerpt.push_back(sequence.excerpt);
    sequence.position += count;
    if (last) sequence.unit->pending -= 1;
    budget -= count;
    steps_ += count;
    i += 1;
  }
  return true;
}

int Stream::next(std::vector<Batch>& batches) {
  free_.insert(free_.end(), released_.begin(), released_.end());
  released_.clear();
  int filled = 0;
  size_t i = 0;
  bool more = true;
  for (Batch& batch : batches) {
    batch.pieces.clear();
    batch.units.clear();
    batch.excerpt.clear();
    batch.ids.clear();
    batch.next.clear();
    more = more && fill(batch, i);
    filled += !batch.pieces.empty();
  }
  std::erase_if(active_,
                [](const auto& sequence) { return sequence->position == sequence->length; });
  COIL_ASSERT(filled > 0 || exhausted_);
  return filled;
}

double Stream::fraction() const {
  const double read = source_.fraction();
  return read < 0 || promised_ == 0 ? -1 : read * static_cast<double>(steps_) / promised_;
}

bool Stream::pop(Unit& unit) {
  if (units_.empty() || units_.front().pending > 0) return false;
  unit = std::move(units_.front());
  units_.pop_front();
  for (int64_t* count : {&unit.begin, &unit.end, &unit.fresh}) *count /= front_.step();
  return true;
}

namespace {

class Chain final : public Source {
 public:
  Chain(size_t count, std::function<std::unique_ptr<Source>(size_t)> open)
      : count_(count), open_(std::move(open)) {}

  bool next(Segment& segment) override {
    for (; input_ < count_; input_ += 1, source_.reset(), records_ = seen_) {
      if (!source_) source_ = open_(input_);
      if (!source_->next(segment)) continue;
      segment.record += records_;
      segment.file = static_cast<int64_t>(input_);
      seen_ = segment.record + 1;
      return true;
    }
    return false;
  }

  // Files count alike.
  double fraction() const override {
    const double inside = source_ ? source_->fraction() : 0;
    return inside < 0 ? inside
                      : (static_cast<double>(input_) + inside) / static_cast<double>(count_);
  }

 private:
  size_t count_, input_ = 0;
  std::function<std::unique_ptr<Source>(size_t)> open_;
  std::unique_ptr<Source> source_;
  int64_t records_ = 0, seen_ = 0;  // of the inputs before this one; of all so far
};

}  // namespace

std::unique_ptr<Source> chain(size_t count, std::function<std::unique_ptr<Source>(size_t)> open) {
  return std::make_unique<Chain>(count, std::move(open));
}

}  // namespace coil
