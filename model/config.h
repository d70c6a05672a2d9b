// config.json: what the network is. The names and defaults are Hugging Face's for model_type
// "mamba" and "falcon_mamba"; what Coil adds stands under the key "coil", which transformers
// ignores. A network that transformers does not have is of model_type "coil": the same keys, and a
// mixer for each layer in coil.mixers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/ops.h"  // Pooling
#include "model/batch.h"  // SampleCodes

namespace coil {

enum class MixerKind : uint8_t { mamba1, s4d };
const char* name_of(MixerKind kind);  // "mamba1", …, as in config.json
std::optional<MixerKind> mixer_named(const std::string& name);
struct LayerConfig {
  MixerKind mixer = MixerKind::mamba1;
};
// "s4d,mamba1" repeated over `layers` layers, every name checked; and the names of each layer.
std::vector<LayerConfig> parse_mixers(const std::string& names, int64_t layers);
std::string mixer_names(const std::vector<LayerConfig>& layers);

// Where the imaginary parts of S4D's A begin (Gu et al. 2022, section 4): pi i; like 1 / i; those
// of HiPPO-LegS.
enum class S4dInit : uint8_t { lin, inv, legs };
const char* name_of(S4dInit init);
S4dInit parse_s4d_init(const std::string& name);

// Of a U-Net: steps of a coarse one, the width of a stage, stages inside the outermost.
constexpr int64_t kMaxPool = 1 << 16, kMaxStageWidth = 1 << 15;
constexpr size_t kMaxInner = 8;

// lm: the logits of a step are of the token after it; mlm: of the token in its place, which was
// masked, or which a table's column of targets names.
enum class Objective : uint8_t { lm, classify, mlm };
const char* name_of(Objective objective);
// Tokens are told, not classes.
constexpr bool is_language(Objective objective) { return objective != Objective::classify; }

struct Config {
  std::string model_type = "mamba";
  int64_t vocab = 16;        // vocab_size
  int64_t d = 128;           // hidden_size
  int64_t e = 256;           // intermediate_size
  int64_t n = 16;            // state_size
  int64_t w = 4;             // conv_kernel
  int64_t dt_rank = 8;       // time_step_rank
  float eps = 1e-5f;         // layer_norm_epsilon
  bool bias = false;         // use_bias: of in_proj and out_proj
  bool conv_bias = true;     // use_conv_bias
  bool tie = true;           // tie_word_embeddings
  bool mixer_norms = false;  // falcon_mamba: weightless RMS norms on dt, B and C
  float mixer_eps = 1e-6f;   // mixer_rms_eps
  float dt_min = 1e-3f, dt_max = 0.1f, dt_floor = 1e-4f;  // time_step_*: initialisation only
  std::vector<LayerConfig> layers = std::vector<LayerConfig>(4);

  // Under "coil".
  // bidirectional: every layer reads its sequences from both ends (model/mamba1.h); a stack of
  // mamba1 alone. There is then no state to carry: a sequence is one piece.
  bool bidirectional = false;
  // strands: "equivariant". Of DNA: a sequence and its reverse complement are read side by side,
  // and the classes' logits are the mean of both, in training too: swapping the strands swaps
  // nothing.
  bool equivariant = false;
  // Training then reads sequences whole, and long ones layer by layer (Cut in model/loss.h).
  bool trains_whole() const { return bidirectional || equivariant; }
  // topology and unet: the stages inside the one that the keys above describe, from the outside in,
  // each at one step for `pool` of the stage around it. A stack has none. num_hidden_layers and
  // coil.mixers count the layers of all stages, the outermost's first; expand and the ratio of
  // time_step_rank to hidden_size hold for all.
  struct Stage {
    int64_t pool = 4, d = 256;
    std::vector<LayerConfig> layers;
  };
  std::vector<Stage> inner;
  // Steps of the outermost stage in one of the innermost.
  int64_t coarsest_step() const {
    int64_t steps = 1;
    for (const Stage& stage : inner) steps = std::min(steps * stage.pool, int64_t{1} << 40);
    return steps;
  }
  int64_t mlp =
      0;  // mlp: inner width of the MLP behind each mixer, in widths of its layer; 0: none
  Objective objective = Objective::lm;
  bool language() const { return is_language(objective); }  // lm or mlm
  int64_t s4d_states = 32;          // s4d.states: complex, each of a conjugate pair, a channel
  S4dInit s4d_init = S4dInit::lin;  // s4d.init: initialisation only, as time_step_min and _max
  Pooling pooling = Pooling::mean;  // classify
  std::vector<std::string> labels;  // classify, condition; kept in labels.txt, a line per class
  // "dna", or "" (audio; a model from elsewhere), or letters: the i-th is token i. Of DNA: see
  // genomics/alphabet.h.
  std::string alphabet;
  bool letters() const { return !alphabet.empty() && alphabet != "dna"; }
  // mlm: share of tokens masked, or the column of a table that says what is to be put out.
  double mask_share = 0.15;
  std::string target_column;
  // kmer: of DNA, how many bases, the last of them the place's own, the embedding of a place is of:
  // overlapping k-mers (DNABERT: Ji et al. 2021). Rows of the embedding: the 16 of the alphabet,
  // for places that fewer bases or an N come before, then the k-mers, A C G T as digits. What is
  // predicted is a base all the same; the head is not tied.
  int64_t kmer = 1;
  static constexpr int64_t kLetters = 16, kMaxKmer = 10, kMaxExcerpt = Source::kRun;
  static constexpr int64_t dna_vocabulary(int64_t kmer) {
    return kLetters + (kmer > 1 ? int64_t{1} << 2 * kmer : 0);
  }
  // Instead of an alphabet: recordings at a rate. Tokens: the codes of a sample (mulaw 0 … 255;
  // pcm16 0 … 255 coarse, 256 … 511 fine) and the begin token. Rows of logits are over the codes
  // alone. With `condition` an embedding of the recording's label is added to each step's.
  struct Audio {
    int64_t rate = 0;  // Hz; 0: no audio
    SampleCodes codes = SampleCodes::mulaw;
    double trim = 0;  // dB, as recordings were read in training; 0: whole
  };
  Audio audio;
  bool condition = false;        // lm of audio
  double condition_dropout = 0;  // likewise: share of its training that was without label
  // Of a language model, masked or not, how many of the vocabulary, from 0 on, its logits are over.
  int64_t predicted() const {
    return kmer > 1                            ? kLetters
           : audio.rate == 0                   ? vocab
           : audio.codes == SampleCodes::pcm16 ? 512
                                               : 256;
  }
  // Thresholds of "unknown" by record length, ascending: below `probability` the answer is
  // "unknown"; of DNA, that of the record or, with unknown_excerpt, the mean over its excerpts of
  // so many bases (pipelines/classify.h).
  struct Threshold {
    int64_t length;
    double probability;
    std::vector<double>
        by_class{};  // of the class called, in the order of labels; empty: one for all
  };
  std::vector<Threshold> unknown;
  int64_t unknown_excerpt = 0;  // at most kMaxExcerpt; 0: no excerpts
};

// What stands inside the outermost stage of a U-Net, as a network of its own.
Config inner_config(const Config& config);
// Layers of all stages, and their mixers: "s4d,s4d", of a U-Net "s4d,s4d/mamba1".
int64_t all_layers(const Config& config);
std::string mixer_names(const Config& config);
// The stages of a U-Net by `pool` "4,4": the config's layers and width are those of the outermost;
// inside each stage is as deep and twice as wide, or as wide as `widths` "128,256" says. mixers
// "s4d/mamba1": of the stages, the last for all that follow, each as in parse_mixers.
void add_stages(Config& config, const std::string& pool, const std::string& widths,
                const std::string& mixers);

// Of a network made here: a sixteenth of the width, up to whole words of memory. (Hugging Face's
// "auto" is the sixteenth itself.)
inline int64_t dt_rank_of(int64_t d) { return (d + 127) / 128 * 8; }

// Rows of an embedding for so many tokens: aligned.
inline int64_t vocabulary_of(int64_t tokens) { return (tokens + 15) / 16 * 16; }

// What is wrong with letters as an alphabet: "letter 'A' twice"; empty: nothing.
std::string alphabet_fault(const std::string& letters);

// Throws where bidirectional or equivariant does not go with the rest of a network.
void check_directions(const Config& config, const std::string& where);

// Throws coil::Error naming the file, the key, what was expected and what was found. `text` is
// config.json.
Config parse_config(const std::string& text, const std::string& where);
std::string to_json(const Config& config);      // what parse_config and transformers read
Config read_config(const std::string& folder);  // config.json and labels.txt of a model folder
void write_config(const Config& config, const std::string& folder);

}  // namespace coil
