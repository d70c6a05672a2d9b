// What a network reads of a record's codes, and what its likelihood counts: the one place where the
// pipelines know DNA from audio.
//   DNA    a token is a code. The first base is not counted, nor what is not A, C, G or T; p is a
//          softmax over these four.
//   audio  the begin token stands before the first code, and every code counts. 16 bits: coarse and
//          fine codes take turns; each has a softmax of its own, fine given coarse. With
//          config.condition every step also has the recording's label.
//   letters (config.alphabet) as DNA, over all of them.
// Of a masked language model or a task of tokens, what counts is given place by place.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "model/head.h"

namespace coil {

// The rows of the embedding that the tokens of a sequence read, one token after another:
// themselves, or where a network reads k-mers, that of the k bases that end there.
class Kmers {
 public:
  explicit Kmers(int64_t k = 1) : k_(k), mask_((int64_t{1} << 2 * k) - 1) {}
  int32_t next(int32_t token);

 private:
  int64_t k_, mask_, value_ = 0, run_ = 0;  // run_: bases since the begin or an N
};

class FrontEnd {
 public:
  FrontEnd();  // DNA
  explicit FrontEnd(const Config& config);

  bool audio() const { return prefix_ > 0; }
  bool dna() const { return !audio() && !letters_; }  // there is another strand, and N
  const char* unit() const { return audio() ? "sample" : letters_ ? "letter" : "base"; }
  int64_t step() const { return step_; }      // codes of a base or a sample
  int64_t prefix() const { return prefix_; }  // tokens before the first code
  int32_t begin() const { return begin_; }
  int32_t token(uint8_t code, int64_t position) const {
    return code + static_cast<int32_t>(position % step_) * 256;
  }
  // What the network reads for a token (Embed); throws where a label is needed and missing.
  // no_label(): to a conditional model, that it is to do without.
  int32_t id(int32_t token, int32_t label) const {
    if (labels_ == 0) return token;
    check_label(label);
    return token + vocab_ * label;
  }
  int32_t no_label() const { return labels_; }
  Kmers kmers() const { return Kmers(kmer_); }  // at the begin of a sequence
  void check_label(int32_t label) const;
  bool counted(int32_t token) const { return token >= counted_from_ && token < counted_to_; }

  // Appends the ids of a sequence and what each of them predicts, -1: not counted. The first
  // `context` codes are known beforehand and not counted: the sample before a window that does not
  // begin where its recording does.
  void append(std::span<const uint8_t> codes, int64_t context, int32_t label,
              std::vector<int32_t>& ids, std::vector<int32_t>& targets) const;
  // The same where targets are given, kUncounted or a code, of the places themselves.
  void append(std::span<const uint8_t> codes, std::span<const uint8_t> places,
              std::vector<int32_t>& ids, std::vector<int32_t>& targets) const;
  // Codes before an item that a language model reads with it.
  int64_t context(const Example& item) const {
    return audio() && lm_ && item.begin > 0 ? step_ : 0;
  }

  // -log p of the target of each row, in nats; 0 where it is not counted. `right`, if given, is
  // raised by the targets that are the likeliest of their row.
  std::vector<float> losses(Backend& backend, const Model& model, View hidden,
                            const std::vector<int32_t>& targets, int64_t* right = nullptr) const;

 private:
  int64_t step_ = 1, prefix_ = 0, kmer_ = 1;
  int32_t begin_ = 0, labels_ = 0, vocab_ = 0;  // the begin token; labels of a conditional model
  int32_t counted_from_, counted_to_;
  bool lm_ = true, letters_ = false;
  std::vector<Softmax> softmaxes_;
};

// The vocabulary that audio needs, rounded up so that rows are aligned.
int64_t audio_vocabulary(const Config& config);

// Throws where a model reads neither DNA nor audio; `where` names it.
void check_front_end(const Config& config, const std::string& where);

}  // namespace coil
