// coil dataset build | info | verify | head | merge | split: HDF5 files of sequences or recordings.
#include "apps/dataset.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>

#include "apps/inputs.h"
#include "genomics/alphabet.h"
#include "kernels/error.h"
#include "pipelines/hdf5_read.h"
#include "pipelines/hdf5_verify.h"
#include "pipelines/run_log.h"
#include "pipelines/windows.h"

namespace coil {
namespace {

namespace po = boost::program_options;
using Json = nlohmann::ordered_json;

const char* unit_of(const Dataset& dataset) { return dataset.what().audio() ? "sample" : "base"; }

std::shared_ptr<const Dataset> open(const std::string& path) {
  return std::make_shared<const Dataset>(path);
}

// Passes segments on, files counted from `first`.
class Shifted final : public Source {
 public:
  Shifted(std::unique_ptr<Source> source, int64_t first)
      : source_(std::move(source)), first_(first) {}
  bool next(Segment& segment) override {
    if (!source_->next(segment)) return false;
    segment.file += first_;
    return true;
  }
  double fraction() const override { return source_->fraction(); }

 private:
  std::unique_ptr<Source> source_;
  int64_t first_;
};

struct One {
  std::string path;
  int threads = 0;
};
po::options_description describe(One& o) {
  po::options_description text("Options");
  text.add_options()                                                          //
      ("dataset", po::value(&o.path)->value_name("DATASET"), "what to read")  //
      ("threads", option(o.threads, "COUNT"), "0: all");
  return text;
}

// Records by class or split: "a 100, b 20, none 3".
std::string counts(const std::vector<std::string>& names, const std::map<int, int64_t>& found) {
  std::string text;
  for (const auto& [index, count] : found)
    if (index >= 0)
      text += fmt::format("{}{} {}", text.empty() ? "" : ", ", names[static_cast<size_t>(index)],
                          count);
  const auto none = found.find(-1);
  if (none != found.end() && !names.empty())
    text += fmt::format("{}none {}", text.empty() ? "" : ", ", none->second);
  return text.empty() ? "none" : text;
}

void print_info(const Dataset& d, Output& out) {
  constexpr int64_t kBlock = 1 << 16;
  std::map<int, int64_t> classes, splits;
  int64_t shortest = d.size(), longest = 0;
  for (int64_t at = 0; at < d.records(); at += kBlock) {
    const Dataset::Records some = d.read(at, std::min(kBlock, d.records() - at));
    for (size_t i = 0; i < some.names.size(); ++i) {
      const int64_t length = some.offsets[i + 1] - some.offsets[i];
      shortest = std::min(shortest, length);
      longest = std::max(longest, length);
      ++classes[some.labels[i]];
      ++splits[some.split[i]];
    }
  }
  const hdf5::Reader& file = d.reader();
  const char* const unit = unit_of(d);
  out.write(fmt::format("holds      {}, {}, {}\n", d.what().describe(),
                        counted(d.records(), "record"), counted(d.size(), unit)));
  out.write(fmt::format("schema     {} {}, made by {}, {}\n", kDatasetSchema, d.version(),
                        file.text_attribute("creator"),
                        d.deflated() ? "deflate" : "not compressed"));
  out.write(fmt::format("lengths    {} to {}, {:.0f} on average\n", shortest, longest,
                        static_cast<double>(d.size()) / static_cast<double>(d.records())));
  out.write(fmt::format("classes    {}\n", counts(d.classes(), classes)));
  out.write(fmt::format("splits     {}\n", counts(d.splits(), splits)));
  const std::vector<std::string> paths = file.texts("sources/path");
  const auto bytes = file.column("sources/bytes", hdf5::Type::i64);
  const auto sums = file.column("sources/crc32", hdf5::Type::u32);
  std::vector<int64_t> sizes(paths.size());
  std::vector<uint32_t> crcs(paths.size());
  bytes->read(0, bytes->rows(), sizes.data());
  sums->read(0, sums->rows(), crcs.data());
  constexpr size_t kShown = 20;
  for (size_t i = 0; i < std::min(paths.size(), kShown); ++i)
    out.write(fmt::format(
        "{:<11}{}  {}\n", i == 0 ? "sources" : "", paths[i],
        sizes[i] < 0 ? "a stream"
                     : fmt::format("{}  crc32 {:08x}", counted(sizes[i], "byte"), crcs[i])));
  if (paths.size() > kShown) out.write(fmt::format("{:<11}… {} in all\n", "", paths.size()));
}

int run_info(int argc, char** argv) {
  One o;
  po::variables_map values;
  if (!parse(argc, argv, "dataset info DATASET", "What a dataset holds, and what it was made of.",
             describe(o), {"dataset"}, false, values))
    return 0;
  if (o.path.empty()) throw UsageError("no DATASET given");
  Output out("");
  print_info(Dataset(o.path), out);
  out.close();
  return 0;
}

int run_verify(int argc, char** argv) {
  One o;
  po::variables_map values;
  if (!parse(argc, argv, "dataset verify DATASET",
             "Reads all of a dataset, or the parts of one that was not finished, and says what is "
             "not as it was written.",
             describe(o), {"dataset"}, false, values))
    return 0;
  if (o.path.empty()) throw UsageError("no DATASET given");
  const Verdict verdict = verify_dataset(o.path, o.threads);
  for (const std::string& note : verdict.notes) fmt::print(stderr, "note: {}\n", note);
  if (verdict.damages.empty()) {
    Output out("");
    out.write(verdict.summary + "\n");
    out.close();
    return 0;
  }
  for (size_t i = 0; i + 1 < verdict.damages.size(); ++i)
    fmt::print(stderr, "{}\n", verdict.damages[i]);
  throw Error(verdict.damages.back());
}

// The facts of records that come from datasets: classes and splits by their names.
struct Joined {
  std::vector<std::shared_ptr<const Dataset>> from;
  std::vector<std::string> splits;
  explicit Joined(const std::vector<std::string>& paths) {
    for (const std::string& path : paths) {
      from.push_back(open(path));
      check(from.back()->what() == from[0]->what(), "{}: holds {}; {} holds {}", path,
            from.back()->what().describe(), paths[0], from[0]->what().describe());
      for (const std::string& split : from.back()->splits())
        if (std::find(splits.begin(), splits.end(), split) == splits.end()) splits.push_back(split);
    }
  }
  Facts facts(const Segment& segment) const {
    const Dataset& dataset = *from[static_cast<size_t>(segment.file)];
    Facts facts;
    if (segment.label >= 0) facts.label = dataset.classes()[static_cast<size_t>(segment.label)];
    if (segment.split >= 0)
      facts.split =
          static_cast<int8_t>(std::find(splits.begin(), splits.end(),
                                        dataset.splits()[static_cast<size_t>(segment.split)]) -
                              splits.begin());
    return facts;
  }
  BuildInput input(const std::vector<std::string>& paths, const DatasetReading& reading) const {
    BuildInput input{.what = from[0]->what(), .sources = paths, .splits = splits};
    input.open = [from = from, reading](int64_t first) {
      return shift_files(chain(from.size() - static_cast<size_t>(first),
                               [=](size_t i) {
                                 return open_dataset(from[i + static_cast<size_t>(first)], reading);
                               }),
                         first);
    };
    input.facts = [joined = *this](const Segment& segment) { return joined.facts(segment); };
    return input;
  }
};

struct Many {
  std::vector<std::string> paths;
  DatasetOutput output;
};

int run_merge(int argc, char** argv) {
  Many o;
  po::options_description text("Options");
  text.add_options()("datasets", po::value(&o.paths)->value_name("DATASET..."), "to be joined");
  text.add(describe(o.output));
  po::variables_map values;
  if (!parse(argc, argv, "dataset merge -o OUT DATASET...",
             "Joins datasets: their records one after another, classes and splits by name.", text,
             {"datasets"}, true, values))
    return 0;
  if (o.paths.empty()) throw UsageError("no DATASET given");
  check_outputs({o.output.out}, o.paths);
  const Joined joined(o.paths);
  return build_and_tell(joined.input(o.paths, {.threads = o.output.threads}), o.output,
                        Json{{"merge", true}}.dump());
}

int run_split(int argc, char** argv) {
  Many o;
  SplitOptions split;
  po::options_description text("Options");
  text.add_options()("datasets", po::value(&o.paths)->value_name("DATASET"), "to be split");
  text.add(describe(o.output)).add(describe(split));
  po::variables_map values;
  if (!parse(argc, argv, "dataset split DATASET -o PREFIX",
             "A dataset for each split: PREFIX-train.h5, … by the splits that DATASET was built "
             "with,\nor by --split.",
             text, {"datasets"}, false, values))
    return 0;
  if (o.paths.empty()) throw UsageError("no DATASET given");
  if (o.output.out.empty()) throw UsageError("no prefix of the outputs: -o PREFIX");
  if (split.group != "name")
    throw UsageError("--group: a dataset has names alone", "--group-pattern REGEX");
  const Joined joined(o.paths);
  const auto drawn = std::make_shared<Splits>(split, false);
  const bool draw = !split.shares.empty();
  const std::vector<std::string> names = draw ? drawn->names() : joined.splits;
  if (names.empty())
    throw Error(fmt::format("{}: has no splits", o.paths[0]), "--split 8:1:1 makes some");
  for (size_t i = 0; i < names.size(); ++i) {
    DatasetReading reading{.threads = o.output.threads};
    if (!draw) reading.split = names[i];
    BuildInput input = joined.input(o.paths, reading);
    input.splits = names;
    if (draw) {
      input.open = [open = input.open, drawn, i](int64_t first) {
        return keep_records(open(first), [=](const Segment& segment) {
          return drawn->of(segment, "", "") == static_cast<int8_t>(i);
        });
      };
      input.facts = [facts = input.facts, i](const Segment& segment) {
        return Facts{facts(segment).label, static_cast<int8_t>(i)};
      };
    }
    Json how{{"part of", names[i]}};
    add_to(how, split);
    DatasetOutput output = o.output;
    output.out = fmt::format("{}-{}.h5", o.output.out, names[i]);
    check_outputs({output.out}, o.paths);
    build_and_tell(input, output, how.dump());
  }
  return 0;
}

// The begin of a record as text: bases, or samples.
std::string begin_of(const Segment& segment, const CodesOf& what) {
  constexpr size_t kLetters = 60, kSamples = 8;
  std::string text;
  const size_t step = static_cast<size_t>(what.step());
  const size_t shown = what.audio() ? kSamples * step : kLetters;
  for (size_t i = 0; i + step <= std::min(shown, segment.codes.size()); i += step) {
    if (!what.audio()) {
      text += dna::letter_of(segment.codes[i]);
      continue;
    }
    const int value =
        what.wide() ? segment.codes[i] * 256 + segment.codes[i + 1] - 32768 : segment.codes[i];
    text += fmt::format("{}{}", text.empty() ? "" : " ", value);
  }
  return text + (segment.codes.size() > shown || !segment.last ? "…" : "");
}

int run_head(int argc, char** argv) {
  Many o;
  Size most{10};
  std::string split;
  po::options_description text("Options");
  text.add_options()                                                               //
      ("datasets", po::value(&o.paths)->value_name("DATASET"), "to be looked at")  //
      ("records,n", option(most, "COUNT"), "the first so many")                    //
      ("split", option(split, "NAME"), "of this split");
  text.add(describe(o.output));
  po::variables_map values;
  if (!parse(argc, argv, "dataset head DATASET [-n COUNT] [-o OUT]",
             "The first records: a table with how each begins or, with -o, a dataset of them.",
             text, {"datasets"}, false, values))
    return 0;
  if (o.paths.empty()) throw UsageError("no DATASET given");
  if (most < 1) throw UsageError("--records: expected at least 1");
  const Joined joined(o.paths);
  const DatasetReading reading{.split = split, .most = most, .threads = o.output.threads};
  if (!o.output.out.empty()) {
    check_outputs({o.output.out}, o.paths);
    return build_and_tell(joined.input(o.paths, reading), o.output,
                          Json{{"records", most.value}, {"of split", split}}.dump());
  }
  const Dataset& dataset = *joined.from[0];
  const auto source = open_dataset(joined.from[0], reading);
  Output out("");
  out.write(fmt::format("name\tstart\t{}s\tlabel\tsplit\tbegins\n", unit_of(dataset)));
  std::string begin, name, label, part;
  for (Segment segment; source->next(segment);) {
    if (segment.first) {
      const Facts facts = joined.facts(segment);
      name = segment.name;
      label = facts.label;
      part = facts.split < 0 ? "" : joined.splits[static_cast<size_t>(facts.split)];
      begin = begin_of(segment, dataset.what());
    }
    if (!segment.last) continue;
    const int64_t step = dataset.what().step();
    out.write(fmt::format("{}\t{}\t{}\t{}\t{}\t{}\n", name, segment.offset / step,
                          (segment.position + static_cast<int64_t>(segment.codes.size())) / step,
                          label, part, begin));
  }
  out.close();
  return 0;
}

constexpr Command kVerbs[] = {
    {"", "build", "from sequences or recordings", true, run_dataset_build},
    {"", "info", "what it holds and what it was made of", true, run_info},
    {"", "verify", "whether every byte is as it was written", true, run_verify},
    {"", "head", "the first records, as a table or a dataset", true, run_head},
    {"", "merge", "several become one", true, run_merge},
    {"", "split", "one becomes one for each split", true, run_split},
};

}  // namespace

std::unique_ptr<Source> shift_files(std::unique_ptr<Source> source, int64_t first) {
  if (first == 0) return source;
  return std::make_unique<Shifted>(std::move(source), first);
}

po::options_description describe(DatasetOutput& o) {
  po::options_description text("Output", 100);
  text.add_options()                                                              //
      ("output,o", po::value(&o.out)->value_name("OUT"), "the dataset to write")  //
      ("compress", option(o.compress, "NAME"), "deflate | none")                  //
      ("part-size", option(o.part, "SIZE"),
       "bytes of codes in a part, which is the most that a kill costs")  //
      ("threads", option(o.threads, "COUNT"), "0: all")                  //
      ("force", po::bool_switch(&o.force),
       "take over from a process of another host, which must not live any more");
  return text;
}

po::options_description describe(SplitOptions& o) {
  po::options_description text("Splits", 100);
  text.add_options()  //
      ("split", option(o.shares, "SHARES"),
       "8:1:1 for train, validation and test, or 9:1 for the first two")  //
      ("group", option(o.group, "WHAT"),
       "what stays in one split: name | file | a column of CSV/TSV")  //
      ("group-pattern", option(o.pattern, "REGEX"),
       "or what its first group matches in a record's name, of audio in a file's")  //
      ("seed", option(o.seed, "NUMBER"), "of the splits");
  return text;
}

void add_to(Json& how, const SplitOptions& o) {
  how["split"] = o.shares;
  if (!o.shares.empty())
    how.update({{"group", o.group}, {"group-pattern", o.pattern}, {"seed", o.seed}});
}

Splits::Splits(const SplitOptions& options, bool audio) : options_(options), audio_(audio) {
  if (!options.pattern.empty())
    pattern_ = std::make_unique<Pattern>(options.pattern, "--group-pattern");
  if (options.shares.empty()) {
    if (options.group != "name" || pattern_) throw UsageError("--group needs --split");
    return;
  }
  const char* at = options.shares.c_str();
  for (char* end = nullptr;; at = end + 1) {
    shares_.push_back(std::strtod(at, &end));
    if (end == at || !(shares_.back() > 0 && shares_.back() < 1e9) || (*end != ':' && *end != '\0'))
      shares_.clear();
    if (shares_.empty() || *end == '\0') break;
  }
  if (shares_.size() != 2 && shares_.size() != 3)
    throw UsageError(
        fmt::format("--split: '{}' is neither like 8:1:1 nor like 9:1", options.shares));
  if (pattern_ && options.group != "name")
    throw UsageError("--group and --group-pattern: expected one of them");
  if (audio && !column().empty())
    throw UsageError(fmt::format("--group {}: recordings have no columns", options.group),
                     "--group-pattern REGEX");
}

std::vector<std::string> Splits::names() const {
  std::vector<std::string> names{"train", "validation", "test"};
  names.resize(shares_.size());
  return names;
}

std::string Splits::column() const {
  return options_.group == "name" || options_.group == "file" ? "" : options_.group;
}

int8_t Splits::of(const Segment& segment, const std::string& file, const std::string& group) const {
  if (shares_.empty()) return -1;
  std::string key = options_.group == "file" ? file : segment.name;
  if (pattern_) {
    key = pattern_->find(audio_ ? segment.name.substr(segment.name.rfind('/') + 1) : segment.name);
  } else if (!column().empty()) {
    check(!group.empty(), "record '{}' has no group: --group {} is a column of CSV or TSV",
          segment.name, options_.group);
    key = group;
  }
  return draw_split(key, shares_, options_.seed);
}

int build_and_tell(const BuildInput& input, const DatasetOutput& output, const std::string& how) {
  if (output.out.empty()) throw UsageError("no dataset to write: -o OUT");
  if (output.compress != "deflate" && output.compress != "none")
    throw UsageError(fmt::format("--compress '{}': expected deflate or none", output.compress));
  if (output.part < 1) throw UsageError("--part-size: expected at least 1");
  const bool terminal = isatty(STDERR_FILENO) == 1;
  const auto begin = std::chrono::steady_clock::now();
  auto last = begin;
  const auto progress = [&](int64_t size, double fraction) {
    const auto now = std::chrono::steady_clock::now();
    if (!terminal || now - last < std::chrono::milliseconds(500)) return;
    last = now;
    const double seconds = std::chrono::duration<double>(now - begin).count();
    fmt::print(stderr, "\r\033[Kcoil dataset: {:.1f} M, {:.0f} M/s",
               static_cast<double>(size) * 1e-6, static_cast<double>(size) * 1e-6 / seconds);
    if (fraction > 0) {
      const auto left = static_cast<int64_t>(seconds * (1 - fraction) / fraction);
      fmt::print(stderr, ", {:.0f} %, {}:{:02}:{:02} left", 100 * fraction, left / 3600,
                 left / 60 % 60, left % 60);
    }
    std::fflush(stderr);
  };
  const BuildResult result = build_dataset(
      input, {.out = link_target(output.out),
              .how = how,
              .deflate = output.compress == "deflate",
              .part = output.part,
              .threads = output.threads,
              .force = output.force,
              .note = [](const std::string& text) { fmt::print(stderr, "note: {}\n", text); },
              .progress = progress});
  if (terminal) fmt::print(stderr, "\r\033[K");
  const Dataset made(output.out);
  if (result.stood) {
    fmt::print(stderr, "'{}' is there already, made of the same input with the same options\n",
               output.out);
    return 0;
  }
  if (result.continued > 0)
    fmt::print(stderr, "went on with {}\n", counted(result.continued, "part"));
  fmt::print(stderr, "'{}': {}, {}\n", output.out, counted(made.records(), "record"),
             counted(made.size(), unit_of(made)));
  if (Json::parse(how).value("split", "").empty()) return 0;
  std::vector<int64_t> found(made.splits().size());
  constexpr int64_t kBlock = 1 << 16;
  for (int64_t at = 0; at < made.records(); at += kBlock)
    for (const int8_t split : made.read(at, std::min(kBlock, made.records() - at)).split)
      if (split >= 0) ++found[static_cast<size_t>(split)];
  for (size_t i = 0; i < found.size(); ++i)
    if (found[i] == 0 && how.find("part of") == std::string::npos)
      fmt::print(stderr,
                 "note: no record is in split {}: splits are drawn by group, and there are few; "
                 "another --seed draws others\n",
                 made.splits()[i]);
  return 0;
}

int run_dataset(int argc, char** argv) {
  std::string names;
  for (const Command& verb : kVerbs) {
    if (argc > 1 && std::string_view(argv[1]) == verb.name) return verb.run(argc - 1, argv + 1);
    names += fmt::format("{}{}", names.empty() ? "" : " | ", verb.name);
  }
  if (argc > 1 && (!std::strcmp(argv[1], "--help") || !std::strcmp(argv[1], "-h"))) {
    Output out("");
    out.write(fmt::format("usage: coil dataset {}\n\n", names));
    for (const Command& verb : kVerbs)
      out.write(fmt::format("  coil dataset {:<8}{}\n", verb.name, verb.summary));
    out.write("\n  coil dataset build --help   its options, with their defaults\n");
    out.close();
    return 0;
  }
  throw UsageError(argc > 1 ? fmt::format("unknown command '{}'", argv[1]) : "no command",
                   fmt::format("usage: coil dataset {}", names));
}

}  // namespace coil
