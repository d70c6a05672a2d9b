// coil eval: the metrics of a model on labelled data; bits per base or sample of a language model.

#include <cmath>
#include <nlohmann/json.hpp>

#include "apps/command.h"
#include "apps/inputs.h"
#include "apps/models.h"
#include "genomics/dataset.h"
#include "kernels/error.h"
#include "pipelines/batches.h"
#include "pipelines/evaluate.h"
#include "pipelines/front_end.h"

namespace coil {
namespace {

namespace po = boost::program_options;
using nlohmann::json;

struct EvalOptions {
  std::string model;
  std::vector<std::string> data;
  std::string sequence_column = "sequence", label_column = "label", table, target_column;
  Size window{0}, batch_tokens{0};
  std::string strands = "both";
  LabelChoice labels;
  bool json = false;
  std::string out, split;
};

po::options_description describe(EvalOptions& o) {
  po::options_description options("Options", 100);
  options.add_options()  //
      ("model", po::value(&o.model)->value_name("MODEL"),
       "model folder or shipped model; also as the first argument")  //
      ("data", po::value(&o.data)->value_name("DATA"),
       "CSV/TSV, a folder per class, or FASTA with --table; for a language model any of these, "
       "FASTA, FASTQ, SAM or BAM. Of audio: recordings or a folder of them. Of either: datasets")  //
      ("sequence-column", option(o.sequence_column, "NAME"), "of CSV/TSV")  //
      ("label-column", option(o.label_column, "NAME"), "of CSV/TSV")        //
      ("target-column", option(o.target_column, "NAME"),
       "of CSV/TSV: what each place is to put out; default: as in training")                      //
      ("table", option(o.table, "FILE"), "name<TAB>label of the records of FASTA files")          //
      ("window", option(o.window, "SIZE"), "cut records into windows of this; 0: whole records")  //
      ("strands", option(o.strands, "WHICH"), "both (averaged) | forward")                        //
      ("batch-tokens", option(o.batch_tokens, "SIZE"),
       "rows computed at once; 0: by the size of the model")         //
      ("json", po::bool_switch(&o.json), "JSON instead of a table")  //
      ("output,o", option(o.out, "FILE"), "default: standard output");
  options.add(describe_split(o.split)).add(describe(o.labels));
  return options;
}

json number(double value) { return std::isfinite(value) ? json(value) : json(nullptr); }

std::string as_json(const Evaluation& evaluation, const Config& config) {
  const Metrics& m = evaluation.metrics;
  json out = {{"count", m.count}, {"loss", number(m.loss)}};
  if (config.language()) {
    out[fmt::format("bits_per_{}", FrontEnd(config).unit())] = number(evaluation.bits_per_base);
    if (config.objective == Objective::mlm) out["accuracy"] = number(m.accuracy);
    return out.dump(2) + "\n";
  }
  out["accuracy"] = m.accuracy;
  out["macro_f1"] = m.macro_f1;
  out["mcc"] = m.mcc;
  out["auroc"] = number(m.auroc);
  json recall, precision;
  for (size_t k = 0; k < config.labels.size(); ++k) {
    recall[config.labels[k]] = number(m.recall[k]);
    precision[config.labels[k]] = number(m.precision[k]);
  }
  out["recall"] = recall;
  out["precision"] = precision;
  out["labels"] = config.labels;
  out["confusion"] = m.confusion;
  return out.dump(2) + "\n";
}

std::string as_table(const Evaluation& evaluation, const Config& config) {
  const Metrics& m = evaluation.metrics;
  const std::string unit = FrontEnd(config).unit();
  if (config.objective == Objective::lm)
    return fmt::format("{1:<{0}}{2}\n{3:<{0}}{4:.4f}\n{5:<{0}}{6:.4f}\n", unit.size() + 11,
                       unit + "s", m.count, "bits per " + unit, evaluation.bits_per_base,
                       "loss (nats)", m.loss);
  if (config.objective == Objective::mlm)
    return fmt::format("{1:<{0}}{2}\n{3:<{0}}{4:.4f}\n{5:<{0}}{6:.4f}\n{7:<{0}}{8:.4f}\n",
                       unit.size() + 11, "places", m.count, "accuracy", m.accuracy,
                       "bits per " + unit, evaluation.bits_per_base, "loss (nats)", m.loss);
  std::string out = fmt::format(
      "examples  {}\naccuracy  {:.4f}\nmacro F1  {:.4f}\nMCC       {:.4f}\nAUROC     {:.4f}\nloss  "
      "    {:.4f}\n\n",
      m.count, m.accuracy, m.macro_f1, m.mcc, m.auroc, m.loss);
  const auto& labels = config.labels;
  size_t name = 5;
  for (const std::string& label : labels) name = std::max(name, label.size());
  const auto cell = [](double value) {
    return std::isnan(value) ? "-" : fmt::format("{:.4f}", value);
  };
  out += fmt::format("{:<{}}  {:>9}  {:>9}  {:>9}\n", "class", name, "examples", "recall",
                     "precision");
  for (size_t k = 0; k < labels.size(); ++k) {
    int64_t count = 0;
    for (const int64_t n : m.confusion[k]) count += n;
    out += fmt::format("{:<{}}  {:>9}  {:>9}  {:>9}\n", labels[k], name, count, cell(m.recall[k]),
                       cell(m.precision[k]));
  }
  // Columns carry numbers, since class names would make them too wide.
  out += "\nconfusion: rows are the truth, columns the answer\n";
  out += fmt::format("{:<{}}", "", name + 4);
  for (size_t j = 0; j < labels.size(); ++j)
    out += fmt::format("  {:>7}", fmt::format("[{}]", j + 1));
  out += "\n";
  for (size_t k = 0; k < labels.size(); ++k) {
    out += fmt::format("{:<{}}", fmt::format("{:<4}{}", fmt::format("[{}]", k + 1), labels[k]),
                       name + 4);
    for (const int64_t n : m.confusion[k]) out += fmt::format("  {:>7}", n);
    out += "\n";
  }
  return out;
}

Examples dna_or_letters(const EvalOptions& options, const Config& config) {
  check(config.letters() || config.alphabet == "dna",
        "'{}': its alphabet is '{}', expected 'dna' or letters", options.model, config.alphabet);
  return read_examples(options.data, {.sequence_column = options.sequence_column,
                                      .label_column = options.label_column,
                                      .table = options.table,
                                      .min_length = options.window,
                                      .max_length = options.window,
                                      .labels = config.labels,
                                      .labelled = config.objective == Objective::classify,
                                      .target_column = options.target_column,
                                      .alphabet = config.letters() ? config.alphabet : ""});
}

Examples recordings(const EvalOptions& options, const Config& config) {
  const bool labelled = config.objective == Objective::classify || config.condition;
  Examples all = read_recordings(recordings_of(config, options.data, options.labels, labelled),
                                 reading_of(config, options.labels));
  if (options.window > 0)
    all.items = cut_windows(all.items, options.window, options.window, 0, FrontEnd(config).step());
  return all;
}

Examples datasets(const EvalOptions& options, const Config& config) {
  const bool labelled = config.objective == Objective::classify || config.condition;
  const DatasetReading reading = dataset_reading(config, options.split, options.labels, labelled);
  if (!options.table.empty()) throw UsageError("--table: a dataset has its labels");
  std::vector<std::shared_ptr<const Dataset>> opened;
  for (const std::string& path : options.data) {
    opened.push_back(std::make_shared<const Dataset>(path));
    check_holds(*opened.back(), codes_of(config), fmt::format("'{}'", options.model));
  }
  Examples all = read_datasets(opened, reading);
  if (options.window > 0)
    all.items = cut_windows(all.items, options.window, options.window, 0, FrontEnd(config).step());
  return all;
}

// The column that the model was trained on, or another one given; only such a model reads one.
void settle_targets(EvalOptions& options, const Config& config, bool stored) {
  if (config.target_column.empty()) {
    if (!options.target_column.empty())
      throw UsageError(
          fmt::format("--target-column: '{}' was trained without targets", options.model));
  } else if (options.target_column.empty()) {
    options.target_column = config.target_column;
  }
  check(!stored || (options.target_column.empty() && !config.letters()),
        "'{}' reads {}, which stand in CSV or TSV, not in a dataset", options.model,
        config.letters() ? "letters" : "targets");
}

}  // namespace

int run_eval(int argc, char** argv) {
  EvalOptions options;
  CommonOptions common;
  po::options_description described = describe(options);
  described.add(describe(common));
  po::variables_map values;
  if (!parse(argc, argv, "eval [options] MODEL DATA…",
             "Measures a model on labelled data: accuracy, recall, macro-F1, MCC, AUROC and the "
             "confusion\n"
             "matrix; bits per base or sample of a language model, and accuracy of a masked one.",
             described, {"model", "data"}, true, values))
    return 0;
  if (options.model.empty()) throw UsageError("no model folder");
  if (options.data.empty()) throw UsageError("no data to evaluate on");
  options.model = find_model(options.model);
  if (options.strands != "both" && options.strands != "forward")
    throw UsageError(fmt::format("--strands '{}': expected both or forward", options.strands));

  std::vector<std::string> read = options.data;
  read.insert(read.end(), {options.table, options.labels.table});
  for (const std::string& file : files_of_model(options.model)) read.push_back(file);
  check_outputs({options.out}, read);
  const auto backend = make_backend(common);
  const Model model = load_model(*backend, options.model, matrix_dtype(common));
  const Config& config = model.config;
  const bool stored = are_datasets(options.data);
  settle_targets(options, config, stored);
  if (!stored && !options.split.empty()) throw UsageError("--split: no DATA is a dataset");
  const Examples all = stored                  ? datasets(options, config)
                       : config.audio.rate > 0 ? recordings(options, config)
                                               : dna_or_letters(options, config);
  settle_strands(config, values["strands"].defaulted(), options.strands);
  const EvaluateOptions how{.batch_tokens = options.batch_tokens,
                            .both_strands = options.strands == "both",
                            .note = &kPrintNote,
                            .seed = common.seed};
  const Evaluation evaluation =
      with_memory_hint(*backend, model, "--batch-tokens", options.batch_tokens,
                       [&] { return evaluate(*backend, model, all, all.items, how); });
  Output out(options.out);
  out.write(options.json ? as_json(evaluation, config) : as_table(evaluation, config));
  out.close();
  return 0;
}

}  // namespace coil
