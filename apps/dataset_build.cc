// coil dataset build: sequences or recordings become one HDF5 file, with labels, names and splits.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "apps/command.h"
#include "apps/dataset.h"
#include "apps/inputs.h"
#include "genomics/labelled.h"
#include "kernels/error.h"
#include "pipelines/pattern.h"
#include "pipelines/training_data.h"
#include "pipelines/windows.h"

namespace coil {
namespace {

namespace po = boost::program_options;
namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

struct Options {
  InputOptions input;
  DatasetOutput output;
  SplitOptions split;
  std::string sequence_column = "sequence", label_column = "label", table, labels, label_pattern;
  bool no_labels = false;
  Size window{0}, stride{0}, rate{0};
  std::string codes = "mulaw";
  double trim = 0;
};

po::options_description describe(Options& o) {
  po::options_description text("Records", 100), audio("Audio", 100);
  text.add_options()  //
      ("window", option(o.window, "SIZE"),
       "cut records into windows of so many bases or samples; 0: whole records")  //
      ("stride", option(o.stride, "SIZE"),
       "from the begin of a window to the next; 0: the window")                           //
      ("sequence-column", option(o.sequence_column, "NAME"), "of CSV/TSV")                //
      ("label-column", option(o.label_column, "NAME"), "of CSV/TSV")                      //
      ("table", option(o.table, "FILE"), "name<TAB>label of the records of FASTA files")  //
      ("labels", option(o.labels, "FILE"), "audio: file<TAB>label of the recordings")     //
      ("label-pattern", option(o.label_pattern, "REGEX"),
       "the label is what its first group matches in a record's name, of audio in a file's")  //
      ("no-labels", po::bool_switch(&o.no_labels),
       "leave them out; else folders of files give them too");
  audio.add_options()                                                                    //
      ("rate", option(o.rate, "HZ"), "recordings are resampled to it; 0: that of most")  //
      ("codes", option(o.codes, "NAME"), "mulaw (8 bits) | pcm16 (16 bits)")             //
      ("trim",
       po::value<double>(&o.trim)
           ->default_value(o.trim, fmt::format("{:g}", o.trim))
           ->implicit_value(60)
           ->value_name("DB"),
       "leave out begin and end below -DB of full scale");
  po::options_description all;
  all.add(describe(o.output)).add(text).add(describe(o.split)).add(audio).add(describe(o.input));
  return all;
}

// What makes the result what it is, beside the files.
Json how(const Options& o, bool audio) {
  Json how{{"window", o.window.value},
           {"stride", o.stride.value},
           {"no-labels", o.no_labels},
           {"label-pattern", o.label_pattern}};
  add_to(how, o.split);
  if (audio) {
    how.update({{"labels", o.labels}, {"trim", o.trim}});
  } else {
    how.update({{"sequence-column", o.sequence_column},
                {"label-column", o.label_column},
                {"table", o.table},
                {"region", o.input.regions},
                {"bed", o.input.bed},
                {"secondary", o.input.secondary},
                {"supplementary", o.input.supplementary}});
  }
  return how;
}

BuildInput of_recordings(const Options& o) {
  const InputOptions& in = o.input;
  if (!in.regions.empty() || !in.bed.empty() || !in.reference.empty() || in.alignments ||
      !o.table.empty())
    throw UsageError(
        "the input is audio: --region, --bed, --reference, --alignments and --table "
        "are for DNA");
  const bool said = !o.labels.empty() || !o.label_pattern.empty();
  audio::LabelOptions labels{
      .labelled = false, .table = o.labels, .pattern = o.label_pattern, .complete = false};
  audio::Recordings recordings = audio::list_recordings(in.inputs, labels);
  const bool folders = std::ranges::all_of(recordings.files, [](const audio::Recording& file) {
    return fs::path(file.name).has_parent_path();
  });
  labels.labelled = !o.no_labels && (said || folders);
  if (labels.labelled) recordings = audio::list_recordings(in.inputs, labels);
  const audio::ReadOptions reading{
      .rate = o.rate > 0 ? o.rate.value : audio::common_rate(recordings),
      .codes = parse_codes(o.codes),
      .trim = o.trim,
      .note = [](const std::string& text) { fmt::print(stderr, "{}\n", text); }};
  BuildInput input{.what = {.rate = reading.rate, .encoding = reading.codes}};
  for (const audio::Recording& file : recordings.files) input.sources.push_back(file.path);
  const auto splits = std::make_shared<Splits>(o.split, true);
  input.splits = splits->names();
  input.open = [=](int64_t first) {
    audio::Recordings rest = recordings;
    rest.files.erase(rest.files.begin(), rest.files.begin() + first);
    return shift_files(audio::open_recordings(std::move(rest), reading), first);
  };
  input.facts = [=](const Segment& segment) {
    const std::string label =
        segment.label < 0 ? "" : recordings.labels[static_cast<size_t>(segment.label)];
    return Facts{label, splits->of(segment, input.sources[static_cast<size_t>(segment.file)], "")};
  };
  return input;
}

BuildInput of_dna(const Options& o, const po::variables_map& values) {
  const InputOptions& in = o.input;
  for (const char* name : {"rate", "codes", "trim", "labels"})
    if (!values[name].defaulted())
      throw UsageError(fmt::format("--{} is for audio, and the input is DNA", name));
  BuildInput input;
  const auto splits = std::make_shared<Splits>(o.split, false);
  input.splits = splits->names();
  const std::shared_ptr<Pattern> pattern =
      o.label_pattern.empty() ? nullptr
                              : std::make_shared<Pattern>(o.label_pattern, "--label-pattern");
  const bool plain = in.regions.empty() && in.bed.empty() && !in.alignments;
  if (!plain) {  // no labels but by pattern
    input.sources = in.inputs;
    input.open = [=](int64_t first) {
      InputOptions rest = in;
      rest.inputs.erase(rest.inputs.begin(), rest.inputs.begin() + first);
      return shift_files(open_inputs(rest), first);
    };
    input.facts = [=](const Segment& segment) {
      return Facts{pattern ? pattern->find(segment.name) : "",
                   splits->of(segment, in.inputs[static_cast<size_t>(segment.file)], "")};
    };
    return input;
  }
  const bool all = !o.table.empty() || !values["label-column"].defaulted();
  const LabelledOptions reading{.labelling = o.no_labels || pattern ? Labelling::none
                                             : all                  ? Labelling::all
                                                                    : Labelling::found,
                                .sequence_column = o.sequence_column,
                                .label_column = o.label_column,
                                .group_column = splits->column(),
                                .table = o.table,
                                .cram = true,
                                .alignment = in.alignment()};
  input.sources = LabelledSource(in.inputs, reading).files();
  // The source that is open: labels and groups are asked of it.
  const auto open = std::make_shared<LabelledSource*>();
  const std::vector<std::string> files = input.sources;
  input.open = [=](int64_t first) {
    auto source = std::make_unique<LabelledSource>(in.inputs, reading, first);
    *open = source.get();
    return source;
  };
  input.facts = [=](const Segment& segment) {
    const std::string label = pattern ? pattern->find(segment.name)
                              : segment.label < 0
                                  ? ""
                                  : (*open)->labels()[static_cast<size_t>(segment.label)];
    return Facts{label,
                 splits->of(segment, files[static_cast<size_t>(segment.file)], (*open)->group())};
  };
  return input;
}

}  // namespace

int run_dataset_build(int argc, char** argv) {
  Options options;
  po::variables_map values;
  if (!parse(argc, argv, "dataset build -o d.h5 INPUT...",
             "Makes a dataset of DNA (FASTA, FASTQ, SAM, BAM, CRAM, CSV, TSV) or of recordings, or "
             "of\nfolders of them. Run again after an interruption, it goes on; run again when "
             "done, it says so.",
             describe(options), {"input"}, true, values))
    return 0;
  const std::vector<std::string>& inputs = options.input.inputs;
  if (inputs.empty()) throw UsageError("no INPUT given");
  if (options.window == 0 && options.stride > 0) throw UsageError("--stride needs --window");
  for (const std::string& path : inputs) {
    const bool readable = path == "-" || ::access(path.c_str(), R_OK) == 0;
    check(readable, "{}: cannot open: {}", path, std::strerror(errno));
    if (path != "-" && is_dataset(path) && !fs::is_directory(path))
      throw UsageError(fmt::format("{}: is a dataset already", path),
                       "coil dataset merge, split, head");
  }
  std::vector<std::string> read = files_of(options.input);
  read.insert(read.end(), {options.table, options.labels});
  check_outputs({options.output.out}, read);
  const bool audio = std::ranges::any_of(
      inputs, [](const std::string& path) { return !recording_in(path).empty(); });
  BuildInput input = audio ? of_recordings(options) : of_dna(options, values);
  // Tables are input too: other labels are another dataset.
  for (const std::string& path : {options.table, options.labels, options.input.bed})
    if (!path.empty()) input.sources.push_back(path);
  if (options.window > 0) {
    const int64_t step = input.what.step(), window = options.window * step;
    const int64_t stride = options.stride > 0 ? options.stride * step : window;
    input.open = [open = input.open, window, stride](int64_t first) {
      return cut_source(open(first), window, stride);
    };
  }
  return build_and_tell(input, options.output, how(options, audio).dump());
}

}  // namespace coil
