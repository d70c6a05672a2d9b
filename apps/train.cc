// coil train: a classifier or a language model, of DNA from labelled or plain sequences or of audio
// from a folder of recordings.

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <optional>
#include <sstream>

#include "apps/command.h"
#include "apps/inputs.h"
#include "apps/models.h"
#include "apps/signals.h"
#include "kernels/error.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "pipelines/run_log.h"
#include "pipelines/train.h"

namespace coil {
namespace {

namespace po = boost::program_options;

constexpr const char* kText =
    "Trains a classifier (or, with --objective lm or mlm, a language model) and writes a model "
    "folder.\n"
    "DATA is a CSV or TSV file with a sequence and a label column; or a folder with one folder of\n"
    "FASTA/FASTQ files per class; or FASTA files with --table; for lm any of these, or FASTA,\n"
    "FASTQ, SAM or BAM alone. Tables may have an --alphabet of their own.\n"
    "With --preset audio-… it is a folder of recordings (WAV, FLAC, OGG, MP3, AIFF, …) or such "
    "files:\n"
    "a language model unless --task classify says otherwise.\n"
    "Or datasets of coil dataset: their splits train and validation, where they have any.\n"
    "The preset is applied first, every other option after. --resume goes on from the last "
    "checkpoint.";

po::typed_value<Size>* size(int64_t& member, const char* name = "SIZE") {
  return po::value<Size>()
      ->default_value(Size{member})
      ->notifier([&member](const Size& given) { member = given; })
      ->value_name(name);
}
po::typed_value<bool>* flag(bool& member) {
  return po::value<bool>(&member)
      ->default_value(member, member ? "yes" : "no")
      ->implicit_value(true)
      ->zero_tokens();
}

int64_t size_from(const std::string& text, const char* option) {
  std::istringstream in(text);
  Size size;
  if (!(in >> size) || in.peek() != std::istringstream::traits_type::eof())
    throw UsageError(fmt::format("--{} '{}': expected a size such as 4k", option, text));
  return size;
}

std::string chunk_text(int64_t chunk) {
  return chunk == TrainOptions::kAutoChunk ? "auto" : fmt::format("{}", fmt::streamed(Size{chunk}));
}

// A whole text that is a number.
std::optional<double> number_in(const std::string& text) {
  size_t end = 0;
  double value = 0;
  try {
    value = std::stod(text, &end);
  } catch (const std::logic_error&) {
  }
  if (end == 0 || end != text.size()) return {};
  return value;
}

// 1k:2,4k:2,16k: lengths and epochs; the last epochs may be left out.
std::vector<std::pair<int64_t, double>> parse_lengths(const std::string& text) {
  std::vector<std::pair<int64_t, double>> stages;
  std::istringstream list(text);
  for (std::string stage; std::getline(list, stage, ',');) {
    const size_t colon = std::min(stage.find(':'), stage.size());
    double epochs = 0;
    if (colon < stage.size()) {
      epochs = number_in(stage.substr(colon + 1)).value_or(0);
      if (!(epochs > 0))
        throw UsageError(fmt::format(
            "--lengths '{}': expected epochs of more than 0 behind the colon, found '{}'", text,
            stage.substr(colon + 1)));
    }
    stages.emplace_back(size_from(stage.substr(0, colon), "lengths"), epochs);
  }
  return stages;
}
std::string lengths_text(const std::vector<std::pair<int64_t, double>>& stages) {
  std::string text;
  for (const auto& [length, epochs] : stages)
    text += fmt::format("{}{}{}", text.empty() ? "" : ",", fmt::streamed(Size{length}),
                        epochs > 0 ? fmt::format(":{}", epochs) : "");
  return text;
}

// 0.01, or 0:0.1: from, to.
void parse_mutate(const std::string& text, TrainOptions& o) {
  const auto number = [&](const std::string& part) {
    const std::optional<double> value = number_in(part);
    if (!value)
      throw UsageError(
          fmt::format("--mutate '{}': expected a share such as 0.01, or two: 0:0.1", text));
    return *value;
  };
  const size_t colon = std::min(text.find(':'), text.size());
  o.mutate = number(text.substr(0, colon));
  o.mutate_to = colon < text.size() ? number(text.substr(colon + 1)) : 0;
  if (colon < text.size() && o.mutate_to <= o.mutate)
    throw UsageError(
        fmt::format("--mutate '{}': expected the lower share first, as in 0:0.1", text));
}

template <class E>
using Names = std::vector<std::pair<std::string, E>>;

template <class E>
po::typed_value<std::string>* one_of(E& member, const Names<E>& names, const std::string& option) {
  const auto set = [=, &member](const std::string& given) {
    std::vector<std::string> known;
    for (const auto& [name, value] : names) {
      known.push_back(name);
      if (name != given) continue;
      member = value;
      return;
    }
    throw UsageError(
        fmt::format("--{} '{}': expected {}", option, given, fmt::join(known, " or ")));
  };
  return po::value<std::string>()->notifier(set)->value_name("WHICH");
}

template <class E>
po::typed_value<std::string>* choice(E& member, const Names<E>& names, const std::string& option) {
  std::string now;
  for (const auto& [name, value] : names)
    if (value == member) now = name;
  return one_of(member, names, option)->default_value(now);
}

po::options_description describe(TrainOptions& o, bool& no_reverse_complement) {
  no_reverse_complement = !o.reverse_complement;
  po::options_description all("Options", 100);
  po::options_description network("Network", 100), data("Data", 100), steps("Steps", 100),
      run("Run", 100);
  const Names<Objective> objectives = {
      {"classify", Objective::classify}, {"lm", Objective::lm}, {"mlm", Objective::mlm}};
  network.add_options()  //
      ("preset", option(o.preset, "NAME"),
       fmt::format("{}: applied before all other options", fmt::join(preset_names(), " | "))
           .c_str())  //
      ("objective", choice(o.objective, objectives, "objective"),
       "classify | lm: tell the next base | mlm: tell masked ones, or a --target-column")  //
      ("task", one_of(o.objective, objectives, "task"),
       "another name of --objective")  //
      ("from", option(o.from, "MODEL"),
       "start from the weights of this model, a folder or a shipped one")                       //
      ("d-model", size(o.d), "width")                                                           //
      ("layers", size(o.layers, "COUNT"), "layers")                                             //
      ("state", size(o.n), "SSM state per channel")                                             //
      ("dt-rank", size(o.dt_rank), "Mamba: rank of the step size; 0: d-model / 16, in eights")  //
      ("mixers", option(o.mixers, "LIST"),
       "mamba1 | s4d, or a list such as s4d,mamba1: of the layers, repeated; of a U-Net's stages\n"
       "s4d/mamba1, the last for all that follow")                                            //
      ("topology", option(o.topology, "NAME"), "stack | unet: of a U-Net, --layers a stage")  //
      ("pool", option(o.pool, "LIST"),
       "U-Net: steps that are one in the next stage inside; 4,4 where left out")  //
      ("widths", option(o.widths, "LIST"),
       "U-Net: of the stages inside; each twice as wide where left out")  //
      ("mlp",
       po::value<int64_t>(&o.mlp)
           ->default_value(o.mlp, o.mlp < 0 ? "auto" : std::to_string(o.mlp))
           ->value_name("COUNT"),
       "inner width of a gated MLP behind each mixer, in widths; 0: none; auto: 2 in a U-Net")  //
      ("bidirectional", flag(o.bidirectional),
       "every layer reads from both ends: one in_proj and out_proj, two sets of the rest")  //
      ("strands", option(o.strands, "WHICH"),
       "average | equivariant: a sequence and its reverse complement are one, in training too")  //
      ("kmer", size(o.kmer, "COUNT"),
       "an embedding is of so many bases, the last of them the place's own")                    //
      ("s4d-states", size(o.s4d_states, "COUNT"), "complex states per channel")                 //
      ("s4d-init", option(o.s4d_init, "NAME"), "lin | inv | legs: S4D-Lin, S4D-Inv, S4D-LegS")  //
      ("pooling", choice(o.pooling, {{"mean", Pooling::mean}, {"last", Pooling::last}}, "pooling"),
       "mean | last: what the classifier sees of a sequence");
  data.add_options()  //
      ("data", po::value(&o.data)->value_name("DATA"),
       "files or folders; also as plain arguments")                         //
      ("sequence-column", option(o.sequence_column, "NAME"), "of CSV/TSV")  //
      ("label-column", option(o.label_column, "NAME"), "of CSV/TSV")        //
      ("target-column", option(o.target_column, "NAME"),
       "of CSV/TSV, with --objective mlm: as long as the sequence, what each place is to put out, "
       "'.' nothing")  //
      ("alphabet",
       po::value<std::string>()
           ->default_value(o.alphabet.empty() ? "dna" : o.alphabet)
           ->notifier([&o](const std::string& given) { o.alphabet = given == "dna" ? "" : given; })
           ->value_name("LETTERS"),
       "of CSV/TSV: dna, or letters such as ABCDEFGH, the first is token 0")              //
      ("mask-share", option(o.mask_share, "SHARE"), "mlm: of the bases or letters")       //
      ("table", option(o.table, "FILE"), "name<TAB>label of the records of FASTA files")  //
      ("labels", option(o.labels, "FILE"), "audio: file<TAB>label of the recordings")     //
      ("label-pattern", option(o.label_pattern, "REGEX"),
       "audio: the label is what its first group matches in a file's name")  //
      ("condition", flag(o.condition),
       "audio: a language model of recordings given their label")  //
      ("condition-dropout", option(o.condition_dropout, "SHARE"),
       "examples trained without their label: what generate --guidance needs")                //
      ("rate", size(o.rate, "HZ"), "audio: recordings are resampled to it; 0: that of most")  //
      ("codes", option(o.codes, "NAME"),
       "audio: mulaw (8 bits) | pcm16 (16 bits, two codes a sample)")  //
      ("trim",
       po::value<double>(&o.trim)
           ->default_value(o.trim, fmt::format("{:g}", o.trim))
           ->implicit_value(60)
           ->value_name("DB"),
       "audio: leave out begin and end below -DB of full scale (60 where no number is given)")  //
      ("min-length", size(o.min_length), "windows: shortest; 0: as --max-length")               //
      ("max-length", size(o.max_length),
       "windows: longest, drawn log-uniformly; 0: whole records (lm: 1024, of audio 8192)")  //
      ("lengths",
       po::value<std::string>()
           ->default_value(lengths_text(o.lengths))
           ->notifier([&o](const std::string& given) { o.lengths = parse_lengths(given); })
           ->value_name("LIST"),
       "windows: longest, and for how many epochs: 1k:2,4k:2,16k (the last to the end)")       //
      ("validation", option(o.validation, "PATH"), "file or folder; else a part is held out")  //
      ("validation-fraction", option(o.validation_fraction, "SHARE"),
       "held out where there is no --validation; 0: none")  //
      ("validation-tokens", size(o.validation_tokens),
       "validation set thinned to this; 0: all of it")  //
      ("no-reverse-complement", flag(no_reverse_complement),
       "the strand matters: no such augmentation")  //
      ("mutate",
       po::value<std::string>()
           ->default_value(o.mutate_to > o.mutate ? fmt::format("{}:{}", o.mutate, o.mutate_to)
                                                  : fmt::format("{}", o.mutate))
           ->notifier([&o](const std::string& given) { parse_mutate(given, o); })
           ->value_name("SHARE"),
       "augmentation: substitutions per base; 0:0.1: each sequence with a share between these")  //
      ("balance", flag(o.balance), "weigh classes inversely to their counts");
  steps.add_options()                                                               //
      ("epochs", option(o.epochs, "NUMBER"), "passes over the data")                //
      ("steps", size(o.steps, "COUNT"), "instead of epochs; 0: from epochs")        //
      ("batch-tokens", size(o.batch_tokens), "bases or codes of audio in a batch")  //
      ("accumulate", size(o.accumulate, "COUNT"), "batches of a step")              //
      ("chunk",
       po::value<std::string>()
           ->default_value(chunk_text(o.chunk))
           ->notifier([&o](const std::string& given) {
             o.chunk = given == "auto" ? TrainOptions::kAutoChunk : size_from(given, "chunk");
           })
           ->value_name("SIZE"),
       "tokens of a sequence at once, gradients exact all the same; 0: whole; auto: as memory "
       "allows")  //
      ("truncate", flag(o.truncate),
       "with --chunk: gradients end where a chunk begins; the state is carried")  //
      ("lr", option(o.lr, "NUMBER"), "peak learning rate")                        //
      ("min-lr", option(o.min_lr, "SHARE"), "at the end, as a part of --lr")      //
      ("warmup", option(o.warmup, "SHARE"), "part of all steps")                  //
      ("weight-decay", option(o.weight_decay, "NUMBER"), "AdamW's")               //
      ("clip", option(o.clip, "NUMBER"), "largest gradient norm; 0: none");
  run.add_options()                                                  //
      ("output,o", option(o.out, "MODEL"), "model folder to write")  //
      ("resume", flag(o.resume),
       "go on from the last checkpoint; options and data are remembered")                       //
      ("eval-every", size(o.eval_every, "COUNT"), "steps; 0: twenty times in the run")          //
      ("checkpoint-every", size(o.checkpoint_every, "COUNT"), "steps; 0: at every evaluation")  //
      ("shard-size", size(o.shard_size),
       "most bytes of a file of the model and of checkpoints; 0: one file")  //
      ("patience", size(o.patience, "COUNT"),
       "stop after so many evaluations without improvement; 0: never")  //
      ("metric", option(o.metric, "NAME"),
       "mcc | accuracy | auroc | loss: which model is best; default mcc, lm: loss")  //
      ("max-minutes", option(o.max_minutes, "NUMBER"),
       "stop after this, with an evaluation, a checkpoint and status 124; 0: no limit")  //
      ("log", option(o.log, "FILE"), "JSON lines; default MODEL/train/log.jsonl");
  all.add(network).add(data).add(steps).add(run);
  return all;
}

struct Given {
  TrainOptions options;
  CommonOptions common;
  po::variables_map values;
};

// Options over the defaults in `base`. False: help was asked for.
bool parse_over(int argc, char** argv, const TrainOptions& base, Given& given) {
  given = {};
  given.options = base;
  given.common.seed = base.seed;
  given.common.threads = base.threads;
  given.common.precision = base.precision;
  bool no_reverse_complement = false;
  po::options_description options = describe(given.options, no_reverse_complement);
  options.add(describe(given.common));
  if (!parse(argc, argv, "train [options] DATA… -o MODEL", kText, options, {"data"}, true,
             given.values))
    return false;
  // A run that began from a model that ships may be called as it is.
  given.options.from_folder = find_model(given.options.from, given.options.out);
  given.options.reverse_complement = !no_reverse_complement;
  given.options.seed = given.common.seed;
  given.options.threads = given.common.threads;
  given.options.precision = given.common.precision;
  return true;
}

// --preset NAME or --preset=NAME, before anything else is read, so that --help shows what it sets.
std::string preset_named(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.starts_with("--preset=")) return word.substr(9);
    if (word == "--preset" && i + 1 < argc) return argv[i + 1];
  }
  return TrainOptions{}.preset;
}

// Recordings under a preset of DNA: said before anything else about them is.
void refuse_recordings(const std::vector<std::string>& data, const std::string& preset) {
  for (const std::string& path : data)
    if (const std::string found = recording_in(path); !found.empty())
      throw UsageError(fmt::format("{}: a recording, and the preset {} reads DNA", found, preset),
                       "--preset audio-small");
}

}  // namespace

int run_train(int argc, char** argv) {
  TrainOptions base;
  apply_preset(preset_named(argc, argv), base);
  Given given;
  if (!parse_over(argc, argv, base, given)) return 0;
  if (given.options.out.empty()) throw UsageError("no model folder to write to: -o MODEL");
  if (given.options.resume && has_checkpoint(given.options.out)) {
    base = parse_train_options(peek_checkpoint(given.options.out).options);
    if (!parse_over(argc, argv, base, given)) return 0;
  } else if (given.options.preset != base.preset) {  // from --config
    apply_preset(given.options.preset, base = {});
    if (!parse_over(argc, argv, base, given)) return 0;
  } else if (!given.options.from.empty() && given.values["preset"].defaulted() &&
             read_config(given.options.found_from()).audio.rate > 0) {
    apply_preset("audio-small", base = {});
    if (!parse_over(argc, argv, base, given)) return 0;
  }
  TrainOptions& options = given.options;
  check(!options.resume || has_checkpoint(options.out) || !options.data.empty(),
        "'{}' holds no run to resume", options.out);
  if (options.data.empty()) throw UsageError("no data to train on");
  if (!given.values["condition-dropout"].defaulted() && !options.condition)
    throw UsageError("--condition-dropout is for a conditional model", "--condition");
  if (!given.values["mask-share"].defaulted() &&
      (options.objective != Objective::mlm || !options.target_column.empty()))
    throw UsageError("--mask-share is for a masked language model",
                     options.target_column.empty() ? "--objective mlm" : "without --target-column");
  if (!options.lengths.empty() && options.lengths.back().second > 0 && !options.resume)
    for (const char* name : {"epochs", "steps"})
      if (!given.values[name].defaulted())
        throw UsageError(fmt::format("--{}: --lengths says where the run ends", name),
                         "leave the last epochs of --lengths out");
  if (!options.audio) refuse_recordings(options.data, options.preset);
  std::vector<std::string> read = options.data;
  read.insert(read.end(), {options.validation, options.table, options.labels});
  check_outputs({options.log}, read);
  if (matrix_dtype(given.common) == DType::bf16 &&
      device_of(given.common).kind == Device::Kind::cpu)
    throw UsageError("--precision bf16: training on a CPU is in f32");
  if (!options.from.empty()) {  // the network is that model's
    const Config config = read_config(options.found_from());
    if (options.audio != (config.audio.rate > 0))
      throw UsageError(fmt::format("'{}' is a model of {}, the preset '{}' of {}", options.from,
                                   config.audio.rate > 0 ? "audio" : "DNA", options.preset,
                                   options.audio ? "audio" : "DNA"));
    TrainOptions preset;
    apply_preset(options.preset, preset);
    const auto layers = static_cast<int64_t>(config.layers.size());
    if (!given.values["preset"].defaulted() && (preset.d != config.d || preset.layers != layers))
      throw UsageError(fmt::format("--preset {} is d {} with {}, '{}' has d {} with {}",
                                   options.preset, preset.d, counted(preset.layers, "layer"),
                                   options.from, config.d, counted(layers, "layer")),
                       "leave --preset out: the network is that of --from, --lr the learning rate");
    const auto same = [&](const char* name, int64_t& member, int64_t value) {
      check(given.values[name].defaulted() || member == value, "--{} {}: '{}' has {}", name, member,
            options.from, value);
      member = value;
    };
    same("d-model", options.d, config.d);
    same("layers", options.layers, layers);
    same("state", options.n, config.n);
    same("dt-rank", options.dt_rank, config.dt_rank);
    if (options.audio) {
      same("rate", options.rate, config.audio.rate);
      const std::string codes = config.audio.codes == SampleCodes::pcm16 ? "pcm16" : "mulaw";
      check(given.values["codes"].defaulted() || options.codes == codes, "--codes {}: '{}' has {}",
            options.codes, options.from, codes);
      options.codes = codes;
      if (given.values["trim"].defaulted()) options.trim = config.audio.trim;
    }
    if (!given.values["preset"].defaulted() && preset.bidirectional != config.bidirectional)
      throw UsageError(fmt::format("--preset {}: '{}' is {} both ends", options.preset,
                                   options.from, config.bidirectional ? "of" : "not of"),
                       "leave --preset out: the network is that of --from");
    if (given.values["strands"].defaulted() && config.equivariant &&
        options.objective == Objective::classify)
      options.strands = "equivariant";
    same("s4d-states", options.s4d_states, config.s4d_states);
    for (const char* name :
         {"mixers", "s4d-init", "topology", "pool", "widths", "mlp", "bidirectional", "kmer"})
      check(given.values[name].defaulted(), "--{}: the network is that of --from", name);
  }

  Signals signals;  // before the backend, whose threads inherit what is blocked
  const auto backend = make_backend(given.common);

  const bool terminal = isatty(STDERR_FILENO) != 0;
  TrainHooks hooks;
  hooks.line = [&](const std::string& text) {
    std::fprintf(stderr, "%s%s\n", terminal ? "\r\033[K" : "", text.c_str());
  };
  if (terminal)
    hooks.progress = [](const std::string& text) {
      std::fprintf(stderr, "\r\033[K%s", text.c_str());
    };
  hooks.interrupted = [&] { return signals.taken(); };
  return train(*backend, options, hooks);
}

}  // namespace coil
