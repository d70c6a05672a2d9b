#include "pipelines/score.h"

#include <cmath>
#include <iterator>
#include <limits>
#include <numbers>

#include "genomics/alphabet.h"
#include "kernels/error.h"
#include "pipelines/fit.h"
#include "pipelines/workers.h"

namespace coil {

double Score::bits_per_base() const {
  if (counted == 0) return std::numeric_limits<double>::quiet_NaN();
  return -log_likelihood / counted / std::numbers::ln2;
}

void check_language_model(const Config& config, const std::string& where) {
  if (config.objective != Objective::lm) {
    throw Error(
        fmt::format("{}: is a classifier, expected a language model", where),
        "coil classify reads a classifier; coil train --objective lm makes a language model");
  }
  check(config.alphabet == "dna", "{}: reads alphabet '{}', expected 'dna'", where,
        config.alphabet);
  check(config.vocab > dna::kN, "{}: vocab_size is {}, expected at least {} for DNA", where,
        config.vocab, dna::kN + 1);
}

namespace {

// 0 … 3, or -1 where it is not counted.
int32_t target_of(int32_t code) { return code >= dna::kA && code <= dna::kT ? code - dna::kA : -1; }

// -log p of the base after each row, 0 where it is not counted. batch.next holds targets.
std::vector<float> losses_of(Backend& backend, const Model& model, Stream::Batch& batch,
                             State& state) {
  const Rows rows(backend, batch.pieces);
  const int64_t t = rows.total();
  const View ids = host_view(batch.ids.data(), DType::i32, {t});
  const Tensor h = hidden(backend, model, ids, rows, &state);  // (t, d)
  const Tensor logits = lm_logits(backend, model, h);          // (t, v)
  Tensor loss(backend, DType::f32, {t}), kept_targets;
  backend.run(CrossEntropy{
      .logits = logits.view().columns(dna::kA, 4),
      .targets = brought(backend, host_view(batch.next.data(), DType::i32, {t}), kept_targets),
      .loss = loss});
  std::vector<std::byte> kept;
  const View host = on_host(backend, loss, kept);
  return {host.as<float>(), host.as<float>() + host.count()};
}

// Adds piece i of a batch to its unit: nats and bases counted, and its lines of bedGraph.
void add(const Stream::Batch& batch, size_t i, const std::vector<float>& nats, bool per_base) {
  const Piece& piece = batch.pieces[i];
  Stream::Unit& unit = *batch.units[i];
  unit.values.resize(2);
  for (int64_t row = piece.begin; row < piece.begin + piece.length; row++) {
    if (batch.next[row] < 0) continue;
    unit.values[0] += nats[row];
    unit.values[1] += 1;
    if (!per_base) continue;
    const int64_t start = unit.begin + piece.position + (row - piece.begin) + 1;
    fmt::format_to(std::back_inserter(unit.text), "{}\t{}\t{}\t{:.6g}\n", unit.name, start,
                   start + 1, nats[row] / std::numbers::ln2);
  }
}

}  // namespace

void score(Backend& backend, const Model& model, Source& source, const ScoreOptions& options,
           const std::function<void(const Score&)>& emit,
           const std::function<void(const std::string&)>& per_base,
           const std::function<void(const Stream&)>& progress) {
  COIL_ASSERT(!options.per_base || options.stream.strands == Strands::forward);
  StreamOptions stream_options = options.stream;
  const bool chosen_here = stream_options.batch <= 0;
  if (chosen_here)
    stream_options.batch =
        fitting_batch(backend, model.config, model.embedding.view().dtype, stream_options.note);
  Workers workers(backend);
  Stream stream(source, stream_options, workers.count());
  State state(backend, model.config, stream.slots() + Parts::kSpare * workers.count());
  Parts parts(stream, chosen_here, stream_options.note);
  std::vector<Stream::Batch> batches(workers.count());
  std::vector<std::vector<float>> nats(batches.size());  // each (t)
  Stream::Unit unit;
  while (const int filled = stream.next(batches)) {
    workers.run(filled, [&](int i, Backend& own) {
      for (int32_t& code : batches[i].next) code = target_of(code);
      nats[i] = parts.run(own, batches[i], i,
                          [&](Stream::Batch& part) { return losses_of(own, model, part, state); });
    });
    for (int b = 0; b < filled; b++) {
      for (size_t i = 0; i < batches[b].pieces.size(); i++) {
        add(batches[b], i, nats[b], options.per_base);
      }
    }
    // Text of records after the first unfinished one waits, so that the order is that of the input.
    while (Stream::Unit* front = stream.front()) {
      if (options.per_base && !front->text.empty()) {
        per_base(front->text);
        front->text.clear();
      }
      if (!stream.pop(unit)) break;
      emit({.name = unit.name,
            .begin = unit.begin,
            .end = unit.end,
            .counted = unit.values[1] / unit.strands,
            .log_likelihood = 0 - unit.values[0] / unit.strands});
    }
    if (progress) progress(stream);
  }
}

}  // namespace coil
