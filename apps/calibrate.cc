// coil calibrate MODEL --known … --unknown …: the thresholds below which classify says "unknown".
#include "pipelines/calibrate.h"

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
  Size pieces{CalibrateOptions{}.pieces};
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
       "of known pieces that must not become unknown")  //
      ("pieces", option(options.pieces, "COUNT"), "of each length, about");
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
  if (!parse(argc, argv, "calibrate MODEL --known FILE... [--unknown FILE...] [--into MODEL]",
             "Finds by length the probability below which coil classify says \"unknown\". Columns: "
             "length, threshold, known (pieces), kept (share), unknown (pieces), caught (share).",
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
  CalibrateOptions how{.keep = options.keep, .pieces = options.pieces};
  if (!options.lengths.empty()) how.lengths.assign(options.lengths.begin(), options.lengths.end());
  for (const int64_t length : how.lengths) {
    if (length < 1) throw UsageError("--lengths: expected at least 1");
  }

  const std::unique_ptr<Backend> backend = make_backend(options.common);
  const Config config = read_config(options.model);
  check_classifier(config, options.model);
  settle_strands(config, values["strands"].defaulted(), options.engine.strands);
  how.stream = options.engine.resolve();
  Config target;
  if (!options.into.empty()) {
    target = read_config(options.into);
    check_classifier(target, options.into);
  }
  const Model model = load_model(*backend, options.model, matrix_dtype(options.common));
  const std::vector<Calibration> rows =
      with_memory_hint(*backend, model, "--batch", how.stream.batch, [&] {
        return calibrate(*backend, model, opener(config, options.known),
                         options.unknown.empty() ? OpenSource() : opener(config, options.unknown),
                         how);
      });
  Output out("");
  out.write("length\tthreshold\tknown\tkept\tunknown\tcaught\n");
  target.unknown.clear();
  for (const Calibration& row : rows) {
    out.write(fmt::format("{}\t{:.6f}\t{}\t{:.4f}\t{}\t{:.4f}\n", row.length, row.threshold,
                          row.known, row.kept, row.unknown, row.caught));
    target.unknown.push_back({.length = row.length, .probability = row.threshold});
  }
  out.close();
  if (!options.into.empty()) write_config(target, options.into);
  return 0;
}

}  // namespace coil
