#include "apps/inputs.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <sstream>

#include "apps/command.h"
#include "audio/sound.h"
#include "genomics/fasta.h"
#include "genomics/intervals.h"
#include "kernels/error.h"

namespace coil {
namespace {

namespace po = boost::program_options;

bool is_alignment(FileKind kind) {
  return kind == FileKind::sam || kind == FileKind::bam || kind == FileKind::cram;
}

// Positions of a region are those of its sequence, so its name is too: chr1:1001-2000 becomes chr1.
class RegionsOf final : public Source {
 public:
  explicit RegionsOf(std::unique_ptr<Source> source) : source_(std::move(source)) {}
  bool next(Segment& segment) override {
    if (!source_->next(segment)) return false;
    if (segment.first) segment.name.resize(std::min(segment.name.rfind(':'), segment.name.size()));
    return true;
  }
  double fraction() const override { return source_->fraction(); }

 private:
  std::unique_ptr<Source> source_;
};

// Says on stderr where a file of alignments is empty.
class Remarked final : public Source {
 public:
  Remarked(std::unique_ptr<Source> source, const std::string& name)
      : source_(std::move(source)), name_(name == "-" ? "standard input" : name) {}
  bool next(Segment& segment) override {
    const bool more = source_->next(segment);
    if (!more && empty_) fmt::print(stderr, "warning: {}: no records\n", name_);
    empty_ = false;
    return more;
  }
  double fraction() const override { return source_->fraction(); }

 private:
  std::unique_ptr<Source> source_;
  std::string name_;
  bool empty_ = true;
};

int64_t size_or_auto(const char* option, const std::string& text) {
  if (text == "auto") return 0;
  std::istringstream in(text);
  Size size;
  if (!(in >> size) || in.peek() != EOF || size.value < 1) {
    throw UsageError(
        fmt::format("--{}: '{}' is neither auto nor a size of at least 1", option, text));
  }
  return size.value;
}

}  // namespace

AlignmentOptions InputOptions::alignment() const {
  return {.reference = reference, .secondary = secondary, .supplementary = supplementary};
}

po::options_description describe_split(std::string& split) {
  po::options_description description("Datasets");
  description.add_options()("split", option(split, "NAME"),
                            "of a dataset, the records of this split alone");
  return description;
}

po::options_description describe(InputOptions& options) {
  po::options_description description("Input");
  description.add_options()  //
      ("input", po::value(&options.inputs)->value_name("FILE"),
       "FASTA or FASTQ (plain, gzip, bgzip), SAM, BAM, CRAM; - is standard input. For a model of "
       "audio: recordings (WAV, FLAC, OGG, MP3, AIFF, …) or folders of them. Of either: datasets "
       "of "
       "coil dataset")  //
      ("region", po::value(&options.regions)->value_name("REGION"),
       "only chr1:1,000-2,000 of one indexed FASTA (1-based, both ends in); may be repeated")  //
      ("bed", po::value(&options.bed)->value_name("FILE"), "only the regions of a BED file")   //
      ("reference", po::value(&options.reference)->value_name("FASTA"),
       "reference of CRAM input, with .fai")  //
      ("alignments", po::bool_switch(&options.alignments),
       "standard input is SAM, BAM or CRAM, not FASTA or FASTQ")                           //
      ("secondary", po::bool_switch(&options.secondary), "read secondary alignments too")  //
      ("supplementary", po::bool_switch(&options.supplementary),
       "read supplementary alignments too");
  return description;
}

std::unique_ptr<Source> open_inputs(const InputOptions& options) {
  const std::vector<std::string>& inputs = options.inputs;
  if (inputs.empty()) throw UsageError("no INPUT given");
  const bool datasets = std::any_of(inputs.begin(), inputs.end(), is_dataset);
  const bool regions = !options.regions.empty() || !options.bed.empty();
  if (datasets && (options.paired || regions))
    throw UsageError("--paired, --region and --bed do not go with a dataset");
  if (!datasets && !options.split.empty()) throw UsageError("--split: no input is a dataset");
  if (options.paired) {
    if (inputs.size() > 2) {
      throw UsageError(fmt::format(
          "--paired: {} inputs given, expected two FASTQ files or one interleaved", inputs.size()));
    }
    return open_pairs(inputs[0], inputs.size() > 1 ? inputs[1] : "");
  }
  if (regions) {
    if (inputs.size() != 1) {
      throw UsageError(fmt::format("--region, --bed: {} inputs given, expected one indexed FASTA",
                                   inputs.size()));
    }
    std::vector<Interval> intervals;
    for (const std::string& region : options.regions) intervals.push_back(parse_region(region));
    if (!options.bed.empty()) {
      const std::vector<Interval> more = read_bed(options.bed);
      intervals.insert(intervals.end(), more.begin(), more.end());
    }
    return std::make_unique<RegionsOf>(open_regions(inputs[0], std::move(intervals)));
  }
  std::vector<bool> alignments;
  std::vector<std::shared_ptr<const Dataset>> opened;
  for (const std::string& input : inputs) {
    opened.push_back(is_dataset(input) ? std::make_shared<const Dataset>(input) : nullptr);
    if (opened.back()) check_holds(*opened.back(), {}, "a model of DNA");
    alignments.push_back(input == "-" ? options.alignments
                                      : !opened.back() && is_alignment(sniff(input)));
  }
  const auto open = [inputs, opened, alignments, split = options.split,
                     alignment = options.alignment()](size_t i) {
    if (opened[i]) return open_dataset(opened[i], {.split = split});
    return alignments[i]
               ? std::make_unique<Remarked>(open_alignments(inputs[i], alignment), inputs[i])
               : open_fasta({inputs[i]});
  };
  return chain(inputs.size(), open);
}

po::options_description describe(LabelChoice& choice) {
  po::options_description description("Audio");
  description.add_options()  //
      ("label", po::value(&choice.label)->value_name("NAME"),
       "conditional model: the label of all recordings")  //
      ("labels", po::value(&choice.table)->value_name("FILE"),
       "file<TAB>label of the recordings")  //
      ("label-pattern", po::value(&choice.pattern)->value_name("REGEX"),
       "the label is what its first group matches in a file's name")  //
      ("trim", option(choice.trim, "DB"),
       "leave out begin and end below -DB of full scale; 0: nothing; auto: as in training");
  return description;
}

std::string recording_in(const std::string& path) {
  std::error_code error;
  if (audio::has_audio_name(path)) return path;
  for (std::filesystem::recursive_directory_iterator entry(path, error), end;
       !error && entry != end; entry.increment(error))
    if (audio::has_audio_name(entry->path().string())) return entry->path().string();
  return "";
}

int32_t find_label(const Config& config, const std::string& label) {
  const auto place = std::find(config.labels.begin(), config.labels.end(), label);
  check(place != config.labels.end(), "--label '{}' is not one of the model's: {}", label,
        fmt::join(config.labels, ", "));
  return static_cast<int32_t>(place - config.labels.begin());
}

audio::Recordings recordings_of(const Config& config, const std::vector<std::string>& inputs,
                                const LabelChoice& choice, bool labelled) {
  if (inputs.empty()) throw UsageError("no INPUT given");
  for (const std::string& input : inputs)
    if (input == "-")
      throw UsageError("audio is read from files, not from standard input",
                       "give files or folders");
  const bool one = !choice.label.empty();
  const int given = one + !choice.table.empty() + !choice.pattern.empty();
  if (given > 0 && !labelled)
    throw UsageError("--label, --labels, --label-pattern: the model takes no label");
  if (given > 1)
    throw UsageError("--label, --labels, --label-pattern: expected one of them, not several");
  audio::Recordings recordings = audio::list_recordings(inputs, {.labelled = labelled && !one,
                                                                 .table = choice.table,
                                                                 .pattern = choice.pattern,
                                                                 .known = config.labels});
  if (!labelled || !one) return recordings;
  const int32_t label = find_label(config, choice.label);
  recordings.labels = config.labels;
  for (audio::Recording& file : recordings.files) file.label = label;
  return recordings;
}

audio::ReadOptions reading_of(const Config& config, const LabelChoice& choice) {
  double trim = config.audio.trim;
  if (choice.trim != "auto") {
    char* end = nullptr;
    trim = std::strtod(choice.trim.c_str(), &end);
    if (choice.trim.empty() || *end != '\0' || !(trim >= 0 && trim <= 200))
      throw UsageError(
          fmt::format("--trim: '{}' is neither auto nor a number from 0 to 200", choice.trim));
  }
  return {.rate = config.audio.rate,
          .codes = config.audio.codes,
          .trim = trim,
          .note = [](const std::string& text) { fmt::print(stderr, "{}\n", text); }};
}

DatasetReading dataset_reading(const Config& config, const std::string& split,
                               const LabelChoice& choice, bool labelled) {
  if (!choice.table.empty() || !choice.pattern.empty() || choice.trim != "auto")
    throw UsageError(
        "--labels, --label-pattern and --trim: a dataset has its labels, and was "
        "trimmed when it was built");
  DatasetReading reading{.split = split};
  if (!labelled && !choice.label.empty())
    throw UsageError("--label, --labels, --label-pattern: the model takes no label");
  if (!labelled) return reading;
  if (!choice.label.empty()) {
    reading.label = find_label(config, choice.label);
    return reading;
  }
  reading.labelled = true;
  reading.labels = config.labels;
  return reading;
}

std::unique_ptr<Source> open_sounds(const Config& config, const InputOptions& options,
                                    const LabelChoice& choice) {
  if (!options.regions.empty() || !options.bed.empty() || !options.reference.empty() ||
      options.paired || options.alignments || options.secondary || options.supplementary)
    throw UsageError(
        "the model reads audio: --region, --bed, --reference, --paired and options of alignments "
        "are for DNA");
  if (!are_datasets(options.inputs)) {
    if (!options.split.empty()) throw UsageError("--split: no input is a dataset");
    return open_recordings(recordings_of(config, options.inputs, choice, config.condition),
                           reading_of(config, choice));
  }
  const DatasetReading reading = dataset_reading(config, options.split, choice, config.condition);
  std::vector<std::shared_ptr<const Dataset>> opened;
  for (const std::string& path : options.inputs) {
    opened.push_back(std::make_shared<const Dataset>(path));
    check_holds(*opened.back(), codes_of(config), "the model");
  }
  return chain(opened.size(), [=](size_t i) { return open_dataset(opened[i], reading); });
}

void settle_strands(const Config& config, bool defaulted, std::string& strands) {
  if (config.equivariant && strands != "both")
    throw UsageError(
        fmt::format("--strands {}: the model is equivariant, the mean of both strands", strands));
  const bool targets = !config.target_column.empty();  // of the strand given
  if (config.audio.rate == 0 && !config.letters() && !targets) return;
  if (!defaulted && strands != "forward")
    throw UsageError(fmt::format("--strands {}: {} no other strand", strands,
                                 config.audio.rate > 0 ? "audio has"
                                 : targets             ? "targets have"
                                                       : "letters have"));
  strands = "forward";
}

double parse_min_probability(const std::string& text) {
  if (text == "auto") return -1;
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value >= 0 && value <= 1)) {
    throw UsageError(
        fmt::format("--min-probability: '{}' is neither auto nor a number between 0 and 1", text));
  }
  return value;
}

std::vector<std::string> files_of(const InputOptions& options) {
  std::vector<std::string> files = options.inputs;
  files.push_back(options.bed);
  files.push_back(options.reference);
  return files;
}

std::vector<std::string> files_of_model(const std::string& folder) {
  std::vector<std::string> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    if (name == "config.json" || name == "labels.txt" || name.ends_with(".safetensors") ||
        name.ends_with(".safetensors.index.json"))
      files.push_back(entry.path().string());
  }
  std::sort(files.begin(), files.end());
  return files;
}

po::options_description describe(EngineOptions& options) {
  po::options_description description("Engine");
  description.add_options()  //
      ("strands", option(options.strands, "WHICH"),
       "both (averaged, twice the work) | forward | reverse")  //
      ("batch", option(options.batch, "SIZE"),
       "bases or samples computed at a time: auto keeps a layer's activations in the cache, or "
       "fills a GPU as far as its memory goes")  //
      ("chunk", option(options.chunk, "SIZE"),
       "most of one sequence among them: auto is the batch");
  return description;
}

StreamOptions EngineOptions::resolve(const Config& config) const {
  if (config.bidirectional && chunk != "auto")
    throw UsageError(
        fmt::format("--chunk {}: the model reads from both ends, sequences whole", chunk));
  return {.strands = parse_strands(strands),
          .batch = size_or_auto("batch", batch),
          .chunk = size_or_auto("chunk", chunk),
          .note = &kPrintNote};
}

const Note kPrintNote = [](const std::string& text) {
  fmt::print(stderr, "{}note: {}\n", isatty(STDERR_FILENO) == 1 ? "\r\033[K" : "", text);
};

Progress::Progress(std::string command)
    : command_(std::move(command)), terminal_(isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() {
  if (shown_) fmt::print(stderr, "\r\033[K");
}

void Progress::operator()(const Stream& stream) {
  using std::chrono::duration;
  if (!terminal_) return;
  const auto now = Clock::now();
  if (now - last_ < std::chrono::milliseconds(500)) return;
  last_ = now;
  shown_ = true;
  const double seconds = duration<double>(now - begin_).count(), done = stream.fraction();
  const auto steps = static_cast<double>(stream.steps());
  fmt::print(stderr, "\r\033[Kcoil {}: {:.2f} M steps, {:.0f} k/s", command_, steps * 1e-6,
             steps * 1e-3 / seconds);
  if (done > 0) {
    const auto left = static_cast<int64_t>(seconds * (1 - done) / done);
    fmt::print(stderr, ", {:.0f} %, {}:{:02}:{:02} left", 100 * done, left / 3600, left / 60 % 60,
               left % 60);
  }
  std::fflush(stderr);
}

std::string command_line(int argc, char** argv) {
  std::string line = "coil";
  for (int i = 0; i < argc; i++) line += fmt::format(" {}", argv[i]);
  return line;
}

}  // namespace coil
