#include "pipelines/score.h"

#include <cmath>
#include <iterator>
#include <limits>
#include <numbers>

#include "genomics/alphabet.h"
#include "kernels/error.h"

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

void score(Backend& backend, const Model& model, Source& source, const ScoreOptions& options,
           const std::function<void(const Score&)>& emit,
           const std::function<void(const std::string&)>& per_base,
           const std::function<void(const Stream&)>& progress) {
  COIL_ASSERT(!options.per_base || options.stream.strands == Strands::forward);
  StreamOptions stream_options = options.stream;
  if (stream_options.batch <= 0) stream_options.batch = auto_batch(model.config);
  Stream stream(source, stream_options);
  State state(backend, model.config, stream.slots());
  Stream::Batch batch;
  Stream::Unit unit;
  std::vector<float> nats;
  while (stream.next(batch)) {
    const Rows rows(backend, batch.pieces);
    const int64_t t = rows.total();
    Tensor ids(backend, DType::i32, {t}), targets(backend, DType::i32, {t});
    backend.copy(host_view(batch.ids.data(), DType::i32, {t}), ids);
    for (int32_t& code : batch.next)
      code = code >= dna::kA && code <= dna::kT ? code - dna::kA : -1;
    backend.copy(host_view(batch.next.data(), DType::i32, {t}), targets);
    const Tensor h = hidden(backend, model, ids, rows, &state);  // (t, d)
    const Tensor logits = lm_logits(backend, model, h);          // (t, v)
    Tensor loss(backend, DType::f32, {t});
    backend.run(CrossEntropy{
        .logits = logits.view().columns(dna::kA, 4), .targets = targets, .loss = loss});
    nats.resize(t);
    backend.copy(loss, host_view(nats.data(), DType::f32, {t}));
    backend.sync();
    for (size_t i = 0; i < batch.pieces.size(); i++) {
      const Piece& piece = batch.pieces[i];
      Stream::Unit& owner = *batch.units[i];
      owner.values.resize(2);  // nats, counted
      for (int64_t row = piece.begin; row < piece.begin + piece.length; row++) {
        if (batch.next[row] < 0) continue;
        owner.values[0] += nats[row];
        owner.values[1] += 1;
        if (!options.per_base) continue;
        const int64_t start = owner.begin + piece.position + (row - piece.begin) + 1;
        fmt::format_to(std::back_inserter(owner.text), "{}\t{}\t{}\t{:.6g}\n", owner.name, start,
                       start + 1, nats[row] / std::numbers::ln2);
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
