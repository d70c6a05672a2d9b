// Accuracy, recall, F1, MCC, AUROC and the confusion matrix; a model run over labelled examples.
//   MCC (Gorodkin 2004, equation 8): (c s - sum_k p_k t_k) / sqrt((s^2 - sum p_k^2)(s^2 - sum
//   t_k^2)), with s examples, c of them right, t_k truly and p_k predicted of class k. AUROC: (sum
//   of the positives' ranks - P(P+1)/2) / (P N), ties sharing their mean rank.

#include "pipelines/evaluate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>

#include "genomics/alphabet.h"
#include "kernels/error.h"
#include "pipelines/fit.h"
#include "pipelines/front_end.h"
#include "pipelines/masks.h"

namespace coil {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

double auroc(std::span<const int32_t> truth, std::span<const double> probabilities, int64_t classes,
             int32_t positive) {
  std::vector<int64_t> order(truth.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  const auto value = [&](int64_t i) { return probabilities[i * classes + positive]; };
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return value(a) < value(b); });
  double ranks = 0, positives = 0;
  for (size_t begin = 0; begin < order.size();) {
    size_t end = begin + 1;
    while (end < order.size() && value(order[end]) == value(order[begin])) ++end;
    const double rank = (static_cast<double>(begin + 1) + static_cast<double>(end)) / 2;
    for (; begin < end; ++begin) {
      if (truth[order[begin]] != positive) continue;
      ranks += rank;
      ++positives;
    }
  }
  const double negatives = static_cast<double>(truth.size()) - positives;
  if (positives == 0 || negatives == 0) return kNan;
  return (ranks - positives * (positives + 1) / 2) / (positives * negatives);
}

struct Strand {
  int64_t item;
  bool reverse;
};

class Evaluator {
 public:
  Evaluator(Backend& backend, const Model& model, const Examples& all,
            std::span<const Example> items, const EvaluateOptions& options)
      : backend_(backend),
        model_(model),
        all_(all),
        items_(items),
        options_(options),
        front_(model.config),
        language_(model.config.language()),
        mlm_(model.config.objective == Objective::mlm),
        masking_(masking_of(model.config)),
        classes_(static_cast<int64_t>(model.config.labels.size())) {
    if (options_.batch_tokens == 0) {
      may_halve_ = true;
      options_.batch_tokens =
          fitting_batch(backend, model.config, model.embedding.view().dtype, options_.note);
    }
    if (!front_.dna() || !all.targets.empty()) options_.both_strands = false;
    if (model.config.equivariant && !model.config.language()) options_.both_strands = true;
    if (model.config.bidirectional)
      whole_ = longest_whole(backend, model.config, model.embedding.view().dtype);
  }

  Evaluation run() {
    if (!language_) result_.probabilities.assign(items_.size() * classes_, 0.0);
    for (size_t i = 0; i < items_.size(); ++i) {
      for (int strand = 0; strand < (options_.both_strands ? 2 : 1); ++strand)
        add({static_cast<int64_t>(i), strand == 1});
    }
    flush();
    if (language_) {
      result_.metrics.count = counted_ / (front_.step() * (options_.both_strands ? 2 : 1));
      result_.metrics.loss =
          counted_ ? nats_ / (static_cast<double>(counted_) / static_cast<double>(front_.step()))
                   : kNan;
      result_.bits_per_base = result_.metrics.loss / std::numbers::ln2;
      if (mlm_)
        result_.metrics.accuracy =
            counted_ ? static_cast<double>(right_) / static_cast<double>(counted_) : kNan;
      return std::move(result_);
    }
    if (model_.config.equivariant)
      for (size_t i = 0; i < items_.size(); ++i)
        softmax(std::span(result_.probabilities).subspan(i * classes_, classes_));
    std::vector<int32_t> truth;
    for (const Example& item : items_) truth.push_back(item.label);
    result_.metrics = measure(truth, result_.probabilities, classes_);
    return std::move(result_);
  }

 private:
  void read(Strand strand, std::vector<int32_t>& ids, std::vector<int32_t>& targets) const {
    const Example& item = items_[strand.item];
    const int64_t context = front_.context(item);
    const auto from = all_.codes[item.record].begin() + item.begin;
    std::vector<uint8_t> codes(from - context, from + item.length);
    if (mlm_) return read_places(strand, codes, ids, targets);
    if (strand.reverse) dna::reverse_complement(codes);
    front_.append(codes, context, item.label, ids, targets);
  }

  // Both strands are asked for the same places.
  void read_places(Strand strand, std::vector<uint8_t>& codes, std::vector<int32_t>& ids,
                   std::vector<int32_t>& targets) const {
    const Example& item = items_[strand.item];
    std::vector<uint8_t> places;
    if (masking_.share > 0) {
      places = mask_evenly(masking_, codes, options_.seed, item.record, item.begin);
    } else {
      const auto from = all_.targets[item.record].begin() + item.begin;
      places.assign(from, from + item.length);
    }
    if (strand.reverse) {
      dna::reverse_complement(codes);
      dna::reverse_complement(places);
    }
    front_.append(codes, places, ids, targets);
  }

  void add(Strand strand) {
    std::vector<int32_t> ids, targets;
    read(strand, ids, targets);
    const auto length = static_cast<int64_t>(ids.size());
    if (static_cast<int64_t>(ids_.size()) + length > options_.batch_tokens) flush();
    if (whole_ > 0)
      check_whole(length, whole_, all_.names[items_[strand.item].record]);
    else if (length > options_.batch_tokens)
      return long_item(strand.item, ids, targets);
    pieces_.push_back({.begin = static_cast<int64_t>(ids_.size()), .length = length});
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    targets_.insert(targets_.end(), targets.begin(), targets.end());
    batch_.push_back(strand);
  }

  // The batch, or the same items in smaller ones where memory runs out: nothing is counted before
  // all of a batch is on the host.
  void flush() {
    if (ids_.empty()) return;
    std::vector<Strand> again;
    try {
      compute();
    } catch (const OutOfMemory&) {
      if (!halve(static_cast<int64_t>(ids_.size()))) throw;
      again = batch_;
    }
    pieces_ = {};
    ids_.clear();
    targets_.clear();
    batch_.clear();
    for (const Strand& strand : again) add(strand);
    if (!again.empty()) flush();
  }

  bool halve(int64_t rows) {
    if (!may_halve_ || rows / 2 < kFewestRows || (whole_ > 0 && batch_.size() == 1)) return false;
    backend_.release_kept();
    options_.batch_tokens = rows / 2;
    if (options_.note)
      (*options_.note)(fmt::format("out of device memory: {} rows at a time", rows / 2));
    return true;
  }

  void compute() {
    const Rows rows(backend_, std::move(pieces_));
    const Tensor h =  // (t, d)
        hidden(backend_, model_, host_view(ids_.data(), DType::i32, {rows.total()}), rows, nullptr);
    if (language_) {
      add_likelihood(h, targets_);
    } else {
      std::vector<std::byte> kept;
      const Tensor logits = class_logits(backend_, model_, h, rows, nullptr);  // (m, classes)
      const View host = on_host(backend_, logits, kept);
      for (size_t i = 0; i < batch_.size(); ++i) add_probabilities(host, i, batch_[i].item);
    }
  }

  // An item longer than a batch, which is empty: pieces of a batch's length. Each reads the state
  // that the one before it wrote and writes another, so that it can be computed again where memory
  // ran out.
  void long_item(int64_t item, std::vector<int32_t>& ids, const std::vector<int32_t>& targets) {
    const auto length = static_cast<int64_t>(ids.size());
    State state(backend_, model_.config, 2);
    int32_t slot = 0;
    for (int64_t at = 0; at < length;) {
      const int64_t t = std::min(options_.batch_tokens, length - at);
      const Piece piece{.begin = 0,
                        .length = t,
                        .position = at,
                        .from = at == 0 ? -1 : 1 - slot,
                        .to = slot,
                        .last = at + t == length};
      try {
        long_piece(host_view(ids.data() + at, DType::i32, {t}),
                   {targets.begin() + at, targets.begin() + at + t}, piece, state, item);
      } catch (const OutOfMemory&) {
        if (!halve(t)) throw;
        continue;
      }
      at += t;
      slot = 1 - slot;
    }
  }

  void long_piece(View ids, const std::vector<int32_t>& targets, const Piece& piece, State& state,
                  int64_t item) {
    const Rows rows(backend_, {piece});
    const Tensor h = hidden(backend_, model_, ids, rows, &state);  // (t, d)
    if (language_) {
      add_likelihood(h, targets);
    } else {
      const Tensor logits = class_logits(backend_, model_, h, rows, &state);  // (m, classes)
      std::vector<std::byte> kept;
      if (piece.last) add_probabilities(on_host(backend_, logits, kept), 0, item);
    }
  }

  void add_likelihood(View h, const std::vector<int32_t>& targets) {
    const int64_t counted =
        std::count_if(targets.begin(), targets.end(), [](int32_t t) { return t >= 0; });
    if (counted == 0) return;  // as of most pieces of a long item with a few targets
    for (const float nats : front_.losses(backend_, model_, h, targets, mlm_ ? &right_ : nullptr))
      nats_ += nats;
    counted_ += counted;
  }

  void add_probabilities(View logits, int64_t row_index, int64_t item) {
    const float* row = logits.row<float>(row_index);
    std::vector<double> values(row, row + classes_);
    if (!model_.config.equivariant) softmax(values);  // else of the mean of the logits
    const double share = options_.both_strands ? 0.5 : 1.0;
    for (int64_t k = 0; k < classes_; ++k)
      result_.probabilities[item * classes_ + k] += share * values[k];
  }

  Backend& backend_;
  const Model& model_;
  const Examples& all_;
  std::span<const Example> items_;
  EvaluateOptions options_;
  FrontEnd front_;
  bool language_, mlm_;  // mlm_: masked
  Masking masking_;
  bool may_halve_ = false;
  int64_t classes_;
  int64_t whole_ = 0;  // longest item of a bidirectional model
  Evaluation result_;
  double nats_ = 0;
  int64_t counted_ = 0, right_ = 0;
  std::vector<int32_t> ids_, targets_;  // (t)
  std::vector<Piece> pieces_;
  std::vector<Strand> batch_;
};

}  // namespace

void softmax(std::span<double> values) {
  const double top = *std::max_element(values.begin(), values.end());
  double sum = 0;
  for (double& value : values) sum += value = std::exp(value - top);
  for (double& value : values) value /= sum;
}

Metrics measure(std::span<const int32_t> truth, std::span<const double> probabilities,
                int64_t classes) {
  COIL_ASSERT(probabilities.size() == truth.size() * static_cast<size_t>(classes));
  Metrics m;
  m.count = static_cast<int64_t>(truth.size());
  m.confusion.assign(classes, std::vector<int64_t>(classes, 0));
  m.recall.assign(classes, kNan);
  m.precision.assign(classes, kNan);
  m.auroc = kNan;
  if (truth.empty()) return m;
  for (size_t i = 0; i < truth.size(); ++i) {
    COIL_ASSERT(truth[i] >= 0 && truth[i] < classes);
    const auto row = probabilities.subspan(i * classes, classes);
    ++m.confusion[truth[i]][std::max_element(row.begin(), row.end()) - row.begin()];
    // Smallest normal double: a probability that underflowed is a large loss, not an infinite one.
    m.loss -= std::log(std::max(row[truth[i]], std::numeric_limits<double>::min()));
    if (std::isnan(row[truth[i]])) m.loss = kNan;  // max() would hide it
  }
  const auto s = static_cast<double>(truth.size());
  m.loss /= s;
  double right = 0, sum_pt = 0, sum_pp = 0, sum_tt = 0, f1 = 0, area = 0;
  int64_t present = 0, areas = 0;
  for (int64_t k = 0; k < classes; ++k) {
    double t = 0, p = 0;
    for (int64_t j = 0; j < classes; ++j) {
      t += static_cast<double>(m.confusion[k][j]);
      p += static_cast<double>(m.confusion[j][k]);
    }
    const auto hit = static_cast<double>(m.confusion[k][k]);
    right += hit;
    sum_pt += p * t;
    sum_pp += p * p;
    sum_tt += t * t;
    if (t > 0) m.recall[k] = hit / t;
    if (p > 0) m.precision[k] = hit / p;
    if (t + p > 0) {
      f1 += 2 * hit / (t + p);
      ++present;
    }
    if (classes == 2 && k == 0) continue;  // the area of class 1 alone
    const double one = auroc(truth, probabilities, classes, static_cast<int32_t>(k));
    if (std::isnan(one)) continue;
    area += one;
    ++areas;
  }
  m.accuracy = right / s;
  m.macro_f1 = f1 / static_cast<double>(present);
  const double spread = (s * s - sum_pp) * (s * s - sum_tt);
  m.mcc = spread > 0 ? (right * s - sum_pt) / std::sqrt(spread) : 0;
  if (areas > 0) m.auroc = area / static_cast<double>(areas);
  return m;
}

Evaluation evaluate(Backend& backend, const Model& model, const Examples& all,
                    std::span<const Example> items, const EvaluateOptions& options) {
  return Evaluator(backend, model, all, items, options).run();
}

}  // namespace coil
