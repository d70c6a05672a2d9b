#include "pipelines/front_end.h"

#include <algorithm>
#include <limits>

#include "genomics/alphabet.h"
#include "kernels/error.h"

namespace coil {

FrontEnd::FrontEnd() : counted_from_(dna::kA), counted_to_(dna::kT + 1), softmaxes_{{dna::kA, 4}} {}

int32_t Kmers::next(int32_t token) {
  if (k_ == 1) return token;
  if (token < dna::kA || token > dna::kT) {
    run_ = 0;
    return token;
  }
  value_ = (value_ << 2 | (token - dna::kA)) & mask_;
  if (++run_ < k_) return token;
  return static_cast<int32_t>(Config::kLetters + value_);
}

FrontEnd::FrontEnd(const Config& config) : FrontEnd() {
  lm_ = config.objective == Objective::lm;
  kmer_ = config.kmer;
  if (config.letters()) {
    letters_ = true;
    counted_from_ = 0;
    counted_to_ = static_cast<int32_t>(config.alphabet.size());
    softmaxes_ = {{0, counted_to_}};
  }
  if (config.audio.rate == 0) return;
  step_ = config.audio.codes == SampleCodes::pcm16 ? 2 : 1;
  prefix_ = 1;
  begin_ = static_cast<int32_t>(config.predicted());
  if (config.condition) labels_ = static_cast<int32_t>(config.labels.size());
  vocab_ = static_cast<int32_t>(config.vocab);
  check(config.vocab * (int64_t{1} + labels_) <= std::numeric_limits<int32_t>::max(),
        "{} labels with a vocabulary of {}: expected a product below 2^31", labels_, config.vocab);
  counted_from_ = 0;
  counted_to_ = begin_;
  softmaxes_ = coil::softmaxes(config);
}

void FrontEnd::check_label(int32_t label) const {
  if (labels_ > 0 && (label < 0 || label > labels_))
    throw Error("the model is conditional: every recording needs one of its labels",
                "--label NAME for all of them, --labels TABLE or --label-pattern REGEX");
}

void FrontEnd::append(std::span<const uint8_t> codes, int64_t context, int32_t label,
                      std::vector<int32_t>& ids, std::vector<int32_t>& targets) const {
  for (int64_t i = 0; i < prefix_; ++i) ids.push_back(id(begin_, label));
  const int64_t uncounted = std::max<int64_t>(context, prefix_ > 0 ? 0 : 1);
  Kmers kmers = this->kmers();
  for (int64_t i = 0; i < static_cast<int64_t>(codes.size()); ++i) {
    const int32_t next = token(codes[i], i);
    ids.push_back(id(kmers.next(next), label));
    if (i + prefix_ > 0) targets.push_back(i >= uncounted && counted(next) ? next : -1);
  }
  targets.push_back(-1);  // nothing comes after the last code
}

void FrontEnd::append(std::span<const uint8_t> codes, std::span<const uint8_t> places,
                      std::vector<int32_t>& ids, std::vector<int32_t>& targets) const {
  COIL_ASSERT(!audio() && codes.size() == places.size());
  Kmers kmers = this->kmers();
  for (size_t i = 0; i < codes.size(); ++i) {
    ids.push_back(kmers.next(codes[i]));
    targets.push_back(places[i] != kUncounted && counted(places[i]) ? places[i] : -1);
  }
}

namespace {

int64_t count_right(View logits, const std::vector<int32_t>& inside) {
  int64_t right = 0;
  for (size_t i = 0; i < inside.size(); ++i) {
    if (inside[i] < 0) continue;
    const float* row = logits.row<float>(static_cast<int64_t>(i));
    right += std::max_element(row, row + logits.cols()) - row == inside[i];
  }
  return right;
}

}  // namespace

std::vector<float> FrontEnd::losses(Backend& backend, const Model& model, View hidden,
                                    const std::vector<int32_t>& targets, int64_t* right) const {
  const auto t = static_cast<int64_t>(targets.size());
  const Tensor logits = lm_logits(backend, model, hidden);  // (t, v)
  std::vector<float> all(targets.size());
  for (const Softmax& part : softmaxes_) {
    const std::vector<int32_t> inside =
        targets_in(part, host_view(const_cast<int32_t*>(targets.data()), DType::i32, {t}));
    Tensor loss(backend, DType::f32, {t}), kept_targets;
    backend.run(CrossEntropy{
        .logits = logits.view().columns(part.begin, part.count),
        .targets = brought(backend, host_view(const_cast<int32_t*>(inside.data()), DType::i32, {t}),
                           kept_targets),
        .loss = loss});
    std::vector<std::byte> kept;
    const View host = on_host(backend, loss, kept);
    for (int64_t i = 0; i < t; ++i) all[i] += host.as<float>()[i];
    if (!right) continue;
    const View own =
        on_host(backend, logits.view().columns(part.begin, part.count), kept);  // (t, count)
    *right += count_right(own, inside);
  }
  return all;
}

int64_t audio_vocabulary(const Config& config) {
  return vocabulary_of(config.predicted() + 1);  // and the begin token
}

void check_front_end(const Config& config, const std::string& where) {
  if (config.audio.rate > 0) return;
  if (config.letters())
    throw Error(
        fmt::format("{}: reads the letters '{}', expected a model of DNA", where, config.alphabet),
        "coil eval reads their tables");
  check(config.alphabet == "dna", "{}: reads alphabet '{}', expected 'dna'", where,
        config.alphabet);
  check(config.vocab > dna::kN, "{}: vocab_size is {}, expected at least {} for DNA", where,
        config.vocab, dna::kN + 1);
}

}  // namespace coil
