// coil score MODEL INPUT…: log-likelihood and bits per base of each record under a language model
// of DNA or audio.
#include "pipelines/score.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "apps/command.h"
#include "apps/inputs.h"
#include "apps/models.h"
#include "kernels/error.h"

namespace coil {
namespace {

namespace po = boost::program_options;

struct Options {
  CommonOptions common;
  InputOptions input;
  LabelChoice labels;
  EngineOptions engine{.strands = "forward"};
  std::string model, out;
  bool per_base = false, per_second = false, json = false;
};

po::options_description describe(Options& options) {
  po::options_description description("Options");
  description.add_options()  //
      ("model", po::value(&options.model)->value_name("MODEL"),
       "a language model: model folder, or the name of a shipped one")  //
      ("output,o", po::value(&options.out)->value_name("FILE"),
       "the table; default: standard output")                                    //
      ("json", po::bool_switch(&options.json), "JSON lines instead of a table")  //
      ("per-base", po::bool_switch(&options.per_base),
       "bedGraph of the bits of every counted base instead of a table; forward strand only")  //
      ("per-second", po::bool_switch(&options.per_second),
       "audio: a line for every second of every recording instead of the table");
  description.add(describe(options.input))
      .add(describe_split(options.input.split))
      .add(describe(options.labels))
      .add(describe(options.engine))
      .add(describe(options.common));
  return description;
}

std::string table_line(const Score& score) {
  return fmt::format("{}\t{}\t{}\t{:.15g}\t{:.6f}\t{:.6f}\n", score.name, score.begin, score.end,
                     score.counted, score.log_likelihood, score.bits_per_base());
}

std::string json_line(const Score& score, const char* unit) {
  nlohmann::ordered_json line{{"name", score.name},
                              {"start", score.begin},
                              {"end", score.end},
                              {fmt::format("{}s", unit), nullptr},
                              {"log_likelihood", score.log_likelihood},
                              {fmt::format("bits_per_{}", unit), score.bits_per_base()}};
  // A whole number is written as one; both strands may count half a base.
  if (score.counted == std::floor(score.counted)) {
    line[fmt::format("{}s", unit)] = static_cast<int64_t>(score.counted);
  } else {
    line[fmt::format("{}s", unit)] = score.counted;
  }
  return line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + '\n';
}

}  // namespace

int run_score(int argc, char** argv) {
  Options options;
  po::variables_map values;
  if (!parse(argc, argv, "score MODEL INPUT... [-o OUT]",
             "Log-likelihood of every record. Columns: name, start, end (0-based, half open), "
             "bases or "
             "samples (counted), log_likelihood (natural logarithm), bits_per_base or "
             "bits_per_sample.",
             describe(options), {"model", "input"}, true, values)) {
    return 0;
  }
  if (options.model.empty()) throw UsageError("no MODEL given");
  options.model = find_model(options.model);
  const Strands strands = parse_strands(options.engine.strands);
  std::vector<std::string> read = files_of(options.input);
  read.push_back(options.labels.table);
  for (const std::string& file : files_of_model(options.model)) read.push_back(file);
  check_outputs({options.out}, read);
  if (options.per_base && (strands != Strands::forward || options.json)) {
    throw UsageError(
        "--per-base is bedGraph of the forward strand: it does not go with --json or other "
        "--strands");
  }

  const std::unique_ptr<Backend> backend = make_backend(options.common);
  const Config config = read_config(options.model);
  check_language_model(config, options.model);
  const bool audio = config.audio.rate > 0, track = options.per_base || options.per_second;
  if (audio ? options.per_base : options.per_second)
    throw UsageError(audio ? "--per-base is for DNA: of audio, --per-second"
                           : "--per-second is for audio: of DNA, --per-base");
  if (options.per_second && options.json)
    throw UsageError("--per-second is a table of its own: it does not go with --json");
  settle_strands(config, values["strands"].defaulted(), options.engine.strands);
  const char* const unit = audio ? "sample" : "base";
  const ScoreOptions how{.stream = options.engine.resolve(config), .per_base = track};
  const std::unique_ptr<Source> source =
      audio ? open_sounds(config, options.input, options.labels) : open_inputs(options.input);
  const Model model = load_model(*backend, options.model, matrix_dtype(options.common));

  Output out(options.out);
  if (options.per_second) {
    out.write("name\tstart\tend\tsamples\tbits_per_sample\n");
  } else if (!track && !options.json) {
    out.write(fmt::format("name\tstart\tend\t{0}s\tlog_likelihood\tbits_per_{0}\n", unit));
  }
  int64_t records = 0;
  double counted = 0, log_likelihood = 0;
  {
    Progress progress("score");
    const auto emit = [&](const Score& score) {
      records += 1;
      counted += score.counted;
      log_likelihood += score.log_likelihood;
      if (!track) out.write(options.json ? json_line(score, unit) : table_line(score));
    };
    with_memory_hint(*backend, model, "--batch", how.stream.batch, [&] {
      score(
          *backend, model, *source, how, emit, [&](const std::string& text) { out.write(text); },
          [&](const Stream& stream) { progress(stream); });
    });
  }
  out.close();
  const Score total{.counted = counted, .log_likelihood = log_likelihood};
  fmt::print(stderr, "{} {}, {:.15g} {}s counted, {:.6f} bits per {}\n", records,
             audio ? "recordings" : "records", counted, unit, total.bits_per_base(), unit);
  return 0;
}

}  // namespace coil
