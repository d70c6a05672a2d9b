// coil dataset: HDF5 files of sequences or recordings. The commands stand in dataset_build.cc and
// dataset_tools.cc; here is what they share.
#include "apps/dataset.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "pipelines/hdf5_dataset.h"
#include "pipelines/run_log.h"

namespace coil {
namespace {

namespace po = boost::program_options;
using Json = nlohmann::ordered_json;

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

constexpr Command kVerbs[] = {
    {"", "build", "from sequences or recordings", true, run_dataset_build},
    {"", "info", "what it holds and what it was made of", true, run_dataset_info},
    {"", "verify", "whether every byte is as it was written", true, run_dataset_verify},
    {"", "head", "the first records, as a table or a dataset", true, run_dataset_head},
    {"", "merge", "several become one", true, run_dataset_merge},
    {"", "split", "one becomes one for each split", true, run_dataset_split},
    {"", "bench", "how fast windows are read from it in random order", true, run_dataset_bench},
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

void refuse_existing(const std::string& out) {
  if (std::filesystem::exists(out))
    throw Error(fmt::format("'{}' exists", out), "name another output, or remove it");
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
             counted(made.size(), made.what().audio() ? "sample" : "base"));
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
