// coil classify MODEL INPUT…: a table of calls, or a BAM or CRAM with the calls as tags.
#include "pipelines/classify.h"

#include <unistd.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "apps/command.h"
#include "apps/inputs.h"
#include "apps/models.h"
#include "kernels/error.h"

namespace coil {
namespace {

namespace po = boost::program_options;

constexpr const char* kUnknown = "unknown";

const std::string& name_of(const Config& config, int32_t label) {
  static const std::string unknown = kUnknown;
  return label < 0 ? unknown : config.labels[label];
}

std::string table_header(const Config& config, bool all) {
  std::string line = "name\tstart\tend\tlabel\tprobability";
  if (all) {
    for (const std::string& label : config.labels) line += '\t' + label;
  }
  return line + '\n';
}

std::string table_line(const Config& config, const Answer& answer, bool all) {
  std::string line = fmt::format("{}\t{}\t{}\t{}\t{:.6f}", answer.name, answer.begin, answer.end,
                                 name_of(config, answer.label), answer.probability);
  if (all) {
    for (const double p : answer.probabilities) line += fmt::format("\t{:.6f}", p);
  }
  return line + '\n';
}

std::string json_line(const Config& config, const Answer& answer, bool all, bool agreement) {
  nlohmann::ordered_json line{{"name", answer.name},
                              {"start", answer.begin},
                              {"end", answer.end},
                              {"label", name_of(config, answer.label)},
                              {"probability", answer.probability}};
  if (agreement) line["agreement"] = answer.agreement;
  if (all) {
    nlohmann::ordered_json& classes = line["probabilities"];
    for (size_t i = 0; i < config.labels.size(); i++) {
      classes[config.labels[i]] = answer.probabilities[i];
    }
  }
  return line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + '\n';
}

// Answers and bases per class, printed at the end.
class Summary {
 public:
  explicit Summary(const Config& config)
      : config_(config),
        counts_(config.labels.size() + 1),
        unit_(config.audio.rate > 0 ? "samples" : "bases") {}

  void add(const Answer& answer) {
    Count& count = answer.label < 0 ? counts_.back() : counts_[answer.label];
    count.answers += 1;
    count.bases += answer.end - answer.begin;
    total_.answers += 1;
    total_.bases += answer.end - answer.begin;
  }

  void print(const char* what) const {
    size_t width = 7;  // of "unknown"
    for (const std::string& label : config_.labels) width = std::max(width, label.size());
    fmt::print(stderr, "{:<{}}  {:>12}  {:>16}  {:>7}\n", "class", width, what, unit_, "share");
    for (size_t i = 0; i < counts_.size(); i++) {
      if (counts_[i].answers == 0) continue;
      row(i + 1 < counts_.size() ? config_.labels[i] : kUnknown, width, counts_[i]);
    }
    row("total", width, total_);
  }

 private:
  struct Count {
    int64_t answers = 0, bases = 0;
  };
  void row(const std::string& name, size_t width, const Count& count) const {
    fmt::print(stderr, "{:<{}}  {:>12}  {:>16}  {:>5.1f} %\n", name, width, count.answers,
               count.bases, total_.bases > 0 ? 100.0 * count.bases / total_.bases : 0);
  }

  const Config& config_;
  std::vector<Count> counts_;  // per class, then unknown
  Count total_;
  const char* unit_;
};

struct Options {
  CommonOptions common;
  InputOptions input;
  LabelChoice labels;  // trim alone
  EngineOptions engine{.strands = "both"};
  std::string model, out, tag_output, min_probability = "auto";
  Size window, stride;
  bool per_file = false, all = false, json = false;
};

po::options_description describe(Options& options) {
  po::options_description description("Options");
  description.add_options()  //
      ("model", po::value(&options.model)->value_name("MODEL"),
       "a classifier: model folder, or the name of a shipped one")  //
      ("output,o", po::value(&options.out)->value_name("FILE"),
       "the table; default: standard output")                                    //
      ("json", po::bool_switch(&options.json), "JSON lines instead of a table")  //
      ("all", po::bool_switch(&options.all), "the probability of every class")   //
      ("window", po::value(&options.window)->value_name("SIZE"),
       "an answer for every window of so many bases or samples, each read on its own")  //
      ("stride", po::value(&options.stride)->value_name("SIZE"),
       "from the begin of a window to the next; default: the window")               //
      ("per-file", po::bool_switch(&options.per_file), "an answer for every file")  //
      ("paired", po::bool_switch(&options.input.paired),
       "an answer for every read pair of two FASTQ files, or of one interleaved")  //
      ("min-probability", option(options.min_probability, "P"),
       "below it the label is \"unknown\"; auto: the model's thresholds by length, if it has "
       "any")  //
      ("tag-output", po::value(&options.tag_output)->value_name("FILE"),
       "SAM, BAM or CRAM in: write it again with tags YC:Z (label) and YP:f (probability); a table "
       "only "
       "with -o")  //
      ("trim", option(options.labels.trim, "DB"),
       "audio: leave out begin and end below -DB of full scale; 0: nothing; auto: as in training");
  description.add(describe(options.input))
      .add(describe_split(options.input.split))
      .add(describe(options.engine))
      .add(describe(options.common));
  return description;
}

void check_combination(const Options& options) {
  if (options.window == 0 && options.stride != 0) throw UsageError("--stride needs --window");
  if (options.input.paired && (options.per_file || options.window != 0)) {
    throw UsageError(
        "--paired gives one answer per pair: it does not go with --per-file or --window");
  }
  if (options.input.paired && (!options.input.regions.empty() || !options.input.bed.empty())) {
    throw UsageError("--paired does not go with --region or --bed");
  }
  std::vector<std::string> read = files_of(options.input);
  for (const std::string& file : files_of_model(options.model)) read.push_back(file);
  check_outputs({options.out, options.tag_output}, read);
  if (options.tag_output.empty()) return;
  if (options.window != 0 || options.per_file || options.input.paired) {
    throw UsageError(
        "--tag-output gives one answer per alignment: it does not go with --window, --per-file or "
        "--paired");
  }
  if (options.input.inputs.size() != 1) {
    throw UsageError("--tag-output needs exactly one SAM, BAM or CRAM file as input");
  }
  if (options.input.inputs[0] == "-") {
    throw UsageError("--tag-output reads its input twice, so it cannot be standard input");
  }
}

}  // namespace

int run_classify(int argc, char** argv) {
  Options options;
  po::variables_map values;
  if (!parse(argc, argv, "classify MODEL INPUT... [-o OUT]",
             "Gives every sequence a class. Columns: name, start, end (0-based, half open), label, "
             "probability.",
             describe(options), {"model", "input"}, true, values)) {
    return 0;
  }
  if (options.model.empty()) throw UsageError("no MODEL given");
  options.model = find_model(options.model);
  check_combination(options);
  ClassifyOptions how{.per = options.per_file       ? AnswerPer::file
                             : options.input.paired ? AnswerPer::pair
                                                    : AnswerPer::unit,
                      .files = options.input.inputs,
                      .min_probability = parse_min_probability(options.min_probability)};
  parse_strands(options.engine.strands);

  const std::unique_ptr<Backend> backend = make_backend(options.common);
  const Config config = read_config(options.model);
  check_classifier(config, options.model);
  const bool audio = config.audio.rate > 0;
  if (audio && !options.tag_output.empty()) throw UsageError("--tag-output is for alignments");
  settle_strands(config, values["strands"].defaulted(), options.engine.strands);
  how.stream = options.engine.resolve(config);
  how.stream.window = options.window;
  how.stream.stride = options.stride;
  const std::unique_ptr<Source> source =
      audio ? open_sounds(config, options.input, options.labels) : open_inputs(options.input);
  const Model model = load_model(*backend, options.model, matrix_dtype(options.common));

  std::unique_ptr<TagWriter> tags;
  std::unique_ptr<Output> out;
  if (!options.tag_output.empty()) {
    tags = std::make_unique<TagWriter>(options.input.inputs[0], link_target(options.tag_output),
                                       options.input.alignment(), COIL_VERSION,
                                       command_line(argc, argv));
  }
  if (!tags || !options.out.empty()) {
    out = std::make_unique<Output>(options.out);
    if (!options.json) out->write(table_header(config, options.all));
  }
  Summary summary(config);
  const bool agreement = config.unknown_excerpt > 0 && how.min_probability < 0;
  {
    Progress progress("classify");
    const auto emit = [&](const Answer& answer) {
      summary.add(answer);
      if (tags) tags->answer(name_of(config, answer.label), answer.probability);
      if (!out) return;
      out->write(options.json ? json_line(config, answer, options.all, agreement)
                              : table_line(config, answer, options.all));
    };
    with_memory_hint(*backend, model, "--batch", how.stream.batch, [&] {
      classify(*backend, model, *source, how, emit,
               [&](const Stream& stream) { progress(stream); });
    });
  }
  if (tags) tags->close();
  if (out) out->close();
  summary.print(options.per_file       ? "files"
                : options.input.paired ? "pairs"
                : options.window != 0  ? "windows"
                : audio                ? "recordings"
                                       : "records");
  return 0;
}

}  // namespace coil
