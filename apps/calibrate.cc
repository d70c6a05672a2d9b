// coil calibrate MODEL --known … --unknown …: the thresholds below which classify says "unknown".
#include "pipelines/calibrate.h"

#include <algorithm>

#include "apps/command.h"
#include "apps/inputs.h"
#include "apps/models.h"
#include "kernels/error.h"
#include "pipelines/classify.h"

namespace coil {
namespace {

namespace po = boost::program_options;

struct Options {
  CommonOptions common;
  EngineOptions engine{.strands = "both"};
  std::string model, into;
  std::vector<std::string> known, unknown;
  std::vector<Size> lengths;
  double keep = CalibrateOptions{}.keep;
  Size pieces{CalibrateOptions{}.pieces}, excerpts;
  double overlap = 0, slack = 0;
  bool by_class = false;
};

po::options_description describe(Options& options) {
  std::string lengths;
  for (const int64_t length : CalibrateOptions{}.lengths) {
    lengths += fmt::format("{}{}", lengths.empty() ? "" : " ", length);
  }
  po::options_description description("Options");
  description.add_options()  //
      ("model", po::value(&options.model)->value_name("MODEL"),
       "a classifier trained without the classes of --unknown")  //
      ("known", po::value(&options.known)->multitoken()->value_name("FILE..."),
       "sequences of its classes that it was not trained on")  //
      ("unknown", po::value(&options.unknown)->multitoken()->value_name("FILE..."),
       "sequences of classes left out: how many the thresholds catch is reported")  //
      ("into", po::value(&options.into)->value_name("MODEL"),
       "write the thresholds into this model's config.json; without it they are only printed")  //
      ("lengths", po::value(&options.lengths)->multitoken()->value_name("SIZE..."),
       ("of pieces; default: " + lengths).c_str())  //
      ("keep", option(options.keep, "SHARE"),
       "of known pieces that must not become unknown")                      //
      ("pieces", option(options.pieces, "COUNT"), "of each length, about")  //
      ("overlap", option(options.overlap, "SHARE"),
       "of a piece that the next one may have too, where there are too few otherwise")  //
      ("slack", option(options.slack, "NUMBER"),
       "taken off the log-odds of every threshold: strains that are new are called less surely")  //
      ("excerpts", po::value(&options.excerpts)->value_name("SIZE"),
       "DNA: thresholds not of the probability of the whole, but of its mean over excerpts of so "
       "many bases, each read on its own; classify reads those too, so it takes up to twice as "
       "long")  //
      ("by-class", po::bool_switch(&options.by_class),
       "a threshold for each class that is called; of classes that fewer than 20 known pieces are "
       "called, that of all");
  description.add(describe(options.engine)).add(describe(options.common));
  return description;
}

OpenSource opener(const Config& config, const std::vector<std::string>& files) {
  return [config, files] {
    const InputOptions input{.inputs = files, .reference = {}, .regions = {}, .bed = {}};
    return config.audio.rate > 0 ? open_sounds(config, input, {}) : open_inputs(input);
  };
}

}  // namespace

int run_calibrate(int argc, char** argv) {
  Options options;
  po::variables_map values;
  if (!parse(
          argc, argv, "calibrate MODEL --known FILE... [--unknown FILE...] [--into MODEL]",
          "Finds by length the probability below which coil classify says \"unknown\". Columns: "
          "length, threshold, known (pieces), kept (share), unknown (pieces), caught (share); with "
          "--by-class the threshold of each class.",
          describe(options), {"model"}, false, values)) {
    return 0;
  }
  if (options.model.empty()) throw UsageError("no MODEL given");
  options.model = find_model(options.model);
  if (options.known.empty()) throw UsageError("no --known sequences given");
  if (!(options.keep > 0 && options.keep <= 1)) {
    throw UsageError(fmt::format("--keep: expected above 0 and at most 1, found {}", options.keep));
  }
  if (options.pieces < 1) throw UsageError("--pieces: expected at least 1");
  if (!(options.overlap >= 0 && options.overlap <= 0.99)) {
    throw UsageError(fmt::format("--overlap: expected 0 to 0.99, found {}", options.overlap));
  }
  if (!(options.slack >= 0)) {
    throw UsageError(fmt::format("--slack: expected 0 or more, found {}", options.slack));
  }
  if (options.excerpts > Config::kMaxExcerpt)
    throw UsageError(fmt::format("--excerpts: expected at most {}", Config::kMaxExcerpt));
  CalibrateOptions how{.keep = options.keep,
                       .pieces = options.pieces,
                       .overlap = options.overlap,
                       .by_class = options.by_class,
                       .slack = options.slack,
                       .excerpt = options.excerpts};
  if (!options.lengths.empty()) how.lengths.assign(options.lengths.begin(), options.lengths.end());
  for (const int64_t length : how.lengths) {
    if (length < 1) throw UsageError("--lengths: expected at least 1");
  }

  const std::unique_ptr<Backend> backend = make_backend(options.common);
  const Config config = read_config(options.model);
  check_classifier(config, options.model);
  settle_strands(config, values["strands"].defaulted(), options.engine.strands);
  how.stream = options.engine.resolve(config);
  Config target;
  if (!options.into.empty()) {
    target = read_config(options.into);
    check_classifier(target, options.into);
  }
  const bool dna = config.alphabet == "dna" && (options.into.empty() || target.alphabet == "dna");
  if (how.excerpt > 0 && !dna) throw UsageError("--excerpts is for models that read DNA");
  const Model model = load_model(*backend, options.model, matrix_dtype(options.common));
  const std::vector<Calibration> rows =
      with_memory_hint(*backend, model, "--batch", how.stream.batch, [&] {
        return calibrate(*backend, model, opener(config, options.known),
                         options.unknown.empty() ? OpenSource() : opener(config, options.unknown),
                         how);
      });
  Output out("");
  std::string header = "length\tthreshold\tknown\tkept\tunknown\tcaught";
  if (options.by_class)
    for (const std::string& label : config.labels) header += '\t' + label;
  out.write(header + '\n');
  target.unknown.clear();
  target.unknown_excerpt = how.excerpt;
  for (const Calibration& row : rows) {
    std::string line = fmt::format("{}\t{:.6f}\t{}\t{:.4f}\t{}\t{:.4f}", row.length, row.threshold,
                                   row.known, row.kept, row.unknown, row.caught);
    for (const double threshold : row.by_class) line += fmt::format("\t{:.6f}", threshold);
    out.write(line + '\n');
    target.unknown.push_back({.length = row.length, .probability = row.threshold});
    if (!options.by_class) continue;
    for (const std::string& label : target.labels) {  // one more or less than the model has
      const auto at = std::ranges::find(config.labels, label) - config.labels.begin();
      const bool has = at < static_cast<int64_t>(config.labels.size());
      target.unknown.back().by_class.push_back(has ? row.by_class[at] : row.threshold);
    }
  }
  out.close();
  if (!options.into.empty()) write_config(target, options.into);
  return 0;
}

}  // namespace coil
