// coil dataset info | verify | head | merge | split | bench: what is done with datasets that there
// are.

#include <algorithm>
#include <chrono>
#include <map>
#include <nlohmann/json.hpp>

#include "apps/dataset.h"
#include "apps/results.h"
#include "genomics/alphabet.h"
#include "kernels/error.h"
#include "pipelines/hdf5_read.h"
#include "pipelines/hdf5_results.h"
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

}  // namespace

int run_dataset_info(int argc, char** argv) {
  One o;
  po::variables_map values;
  if (!parse(argc, argv, "dataset info DATASET", "What a dataset holds, and what it was made of.",
             describe(o), {"dataset"}, false, values))
    return 0;
  if (o.path.empty()) throw UsageError("no DATASET given");
  Output out("");
  if (is_results(o.path))
    print_results_info(o.path, out);
  else
    print_info(Dataset(o.path), out);
  out.close();
  return 0;
}

int run_dataset_verify(int argc, char** argv) {
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

int run_dataset_merge(int argc, char** argv) {
  Many o;
  po::options_description text("Options");
  text.add_options()("datasets", po::value(&o.paths)->value_name("DATASET..."), "to be joined");
  text.add(describe(o.output));
  po::variables_map values;
  if (!parse(argc, argv, "dataset merge -o OUT DATASET...",
             "Joins datasets: their records one after another, classes and splits by name. Or the "
             "results\nof the shards of coil batch.",
             text, {"datasets"}, true, values))
    return 0;
  if (o.paths.empty()) throw UsageError("no DATASET given");
  check_outputs({o.output.out}, o.paths);
  if (is_results(o.paths[0])) {
    const std::string out = hdf5_output(o.output.out);
    refuse_existing(out);
    const OutputLock lock(out, o.output.force);
    merge_results(out, o.paths);
    fmt::print(stderr, "{}: {}\n", out, counted(std::ssize(o.paths), "shard"));
    return 0;
  }
  const Joined joined(o.paths);
  return build_and_tell(joined.input(o.paths, {.threads = o.output.threads}), o.output,
                        Json{{"merge", true}}.dump());
}

int run_dataset_split(int argc, char** argv) {
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

int run_dataset_head(int argc, char** argv) {
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
             "The first records: a table with how each begins or, with -o, a dataset of them. Of "
             "results: a\ntable of them (-n 0: all).",
             text, {"datasets"}, false, values))
    return 0;
  if (o.paths.empty()) throw UsageError("no DATASET given");
  if (o.paths.size() == 1 && is_results(o.paths[0])) {
    if (most < 0) throw UsageError("--records: expected at least 1, or 0 for all");
    if (!o.output.out.empty())
      throw UsageError("--output: of results a table is printed, on standard output");
    Output out("");
    print_results(o.paths[0], most, out);
    out.close();
    return 0;
  }
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

int run_dataset_bench(int argc, char** argv) {
  One o;
  Size window{4096}, memory{64'000'000};
  int passes = 3;
  uint64_t seed = 1;
  po::options_description text = describe(o);
  text.add_options()                                                              //
      ("window", option(window, "SIZE"), "bases or samples")                      //
      ("memory", option(memory, "SIZE"), "bytes of chunks at once, about")        //
      ("passes", option(passes, "COUNT"), "over all of it; the figures of each")  //
      ("seed", option(seed, "NUMBER"), "of the order");
  po::variables_map values;
  if (!parse(argc, argv, "dataset bench DATASET",
             "Reads windows at arbitrary places in random order, each chunk inflated once per "
             "pass, and\nsays how fast. Columns: pass, windows, bytes, seconds, MB_per_s, crc32 of "
             "all windows.",
             text, {"dataset"}, false, values))
    return 0;
  if (o.path.empty()) throw UsageError("no DATASET given");
  const Dataset dataset(o.path);
  const int64_t most = dataset.chunk_size() * 16;
  if (window < 1 || window > most)
    throw UsageError(fmt::format("--window: expected 1 to {}, found {}", most, window.value));
  Output out("");
  out.write("pass\twindows\tbytes\tseconds\tMB_per_s\tcrc32\n");
  for (int pass = 0; pass < passes; ++pass) {
    const auto begin = std::chrono::steady_clock::now();
    ShuffledWindows windows(dataset, window, seed, pass, {.threads = o.threads, .memory = memory});
    int64_t count = 0, bytes = 0;
    uint32_t crc = 0;  // so that every byte is read
    for (ShuffledWindows::Window one; windows.next(one); ++count) {
      crc = hdf5::crc32(one.bytes, crc);
      bytes += std::ssize(one.bytes);
    }
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    out.write(fmt::format("{}\t{}\t{}\t{:.3f}\t{:.0f}\t{:08x}\n", pass, count, bytes, seconds,
                          static_cast<double>(bytes) * 1e-6 / seconds, crc));
  }
  out.close();
  return 0;
}

}  // namespace coil
