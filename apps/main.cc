// coil COMMAND …: the table of commands and the one try/catch. Results go to stdout, everything
// else to stderr. Exit status: 0, 1 for an error in data, files or machine, 2 for bad usage; of a
// training that ended early, what pipelines/train.h says.
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string_view>

#include "apps/command.h"
#include "kernels/error.h"

namespace {

using coil::Command;

constexpr Command kCommands[] = {
    {"Use a model", "classify", "label DNA records, windows, read pairs, files; recordings", true,
     coil::run_classify},
    {"Use a model", "score", "log-likelihood: bits per base or sample", true, coil::run_score},
    {"Use a model", "generate", "audio from a language model, written as it is made", true,
     coil::run_generate},
    {"Use a model", "embed", "hidden states as vectors, in HDF5", true, coil::run_embed},
    {"Use a model", "batch", "any of these over a dataset, resumed after a kill", true,
     coil::run_batch},
    {"Make a model", "train", "train a classifier or a language model", true, coil::run_train},
    {"Make a model", "eval", "metrics of a model on labelled data", true, coil::run_eval},
    {"Make a model", "calibrate", "thresholds below which classify says unknown", true,
     coil::run_calibrate},
    {"Prepare data", "dataset", "build, info, verify, head, merge, split: HDF5 datasets", true,
     coil::run_dataset},
    {"Look after models", "info", "shapes, parameters and a memory plan", false, coil::run_info},
    {"Look after models", "convert", "from and to Hugging Face Mamba folders", true,
     coil::run_convert},
    {"Look after models", "bench", "speed of operations and models on this machine", true,
     coil::run_bench},
};

const Command* find(std::string_view name) {
  for (const Command& command : kCommands)
    if (name == command.name) return &command;
  return nullptr;
}

std::string help() {
  std::string text =
      "coil: classify, score and train on DNA and audio of any length with Mamba models\n"
      "usage: coil COMMAND [options] …\n";
  std::string_view group;
  for (const Command& command : kCommands) {
    if (group != command.group) text += fmt::format("\n{}\n", group = command.group);
    text += fmt::format("  {:<10}{}\n", command.name, command.summary);
  }
  text +=
      "\nHelp\n"
      "  coil COMMAND --help   options of a command, with their defaults\n"
      "  coil --version\n";
  return text;
}

void print(const std::string& text) {
  coil::Output out("");
  out.write(text);
  out.close();
}

const Command& find_or_fail(const std::string& name) {
  if (const Command* command = find(name)) return *command;
  std::vector<std::string> names;
  for (const Command& command : kCommands) names.push_back(command.name);
  const std::string likely = coil::nearest(name, names);
  throw coil::UsageError(
      fmt::format("unknown command '{}'", name),
      likely.empty() ? "coil --help" : fmt::format("did you mean coil {}?", likely));
}

// "coil 0.1.0 · 12.3 s · peak 180 MB"
void report(std::chrono::steady_clock::time_point start) {
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  fmt::print(stderr, "coil " COIL_VERSION " · {:.1f} s · peak {:.0f} MB\n", seconds.count(),
             static_cast<double>(usage.ru_maxrss) * 1024e-6);
}

int dispatch(int argc, char** argv, std::string& name) {
  const auto start = std::chrono::steady_clock::now();
  if (argc < 2) {
    fmt::print(stderr, "{}", help());
    return 2;
  }
  const std::string word = argv[1];
  if (word == "--version" || word == "version") {
    print("coil " COIL_VERSION
          "\nApache License 2.0, https://www.apache.org/licenses/LICENSE-2.0; no warranty\n");
    return 0;
  }
  if (word == "--help" || word == "-h" || (word == "help" && argc == 2)) {
    print(help());
    return 0;
  }
  if (word == "help") {
    const Command& command = find_or_fail(argv[2]);
    char ask[] = "--help";
    char* arguments[] = {argv[2], ask, nullptr};
    return command.run(2, arguments);
  }
  const Command& command = find_or_fail(word);
  name = fmt::format("coil {}", command.name);
  bool asks_help = false;
  for (int i = 2; i < argc; ++i)
    asks_help |= !std::strcmp(argv[i], "--help") || !std::strcmp(argv[i], "-h");
  const int status = command.run(argc - 1, argv + 1);
  coil::Output("").close();  // a full disk or a closed pipe is never silent
  if (command.report && !asks_help) report(start);
  return status;
}

// OpenMP's threads spin up to 17 ms for the next operation, which costs ten times the work itself
// where another program wants the core (docs/performance.md); 1,000 turns are about 50 us. libgomp
// reads this before main, so the program starts anew with it set; what a user has set stays.
void spin_briefly(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") || std::getenv("GOMP_SPINCOUNT")) return;
  setenv("GOMP_SPINCOUNT", "1000", 1);
  execv("/proc/self/exe", argv);  // comes back only if it cannot
}

// Where a daemon has closed one of the three, the next file opened would get its number, and what
// is said on stderr would go into it. Results for a closed stdout are refused when written.
void keep_standard_files() {
  for (const int file : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO})
    if (fcntl(file, F_GETFD) < 0) open("/dev/null", file == STDERR_FILENO ? O_WRONLY : O_RDONLY);
}

}  // namespace

int main(int argc, char** argv) {
  keep_standard_files();
  spin_briefly(argv);
  static char buffer[64 << 10];  // a page of help is one write, which `| head` may cut short
  std::setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
  // A closed pipe and a file that may not grow are errors of write(), reported like any other.
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);
  std::string name = "coil";
  try {
    return dispatch(argc, argv, name);
  } catch (const coil::Error& error) {
    const bool usage = dynamic_cast<const coil::UsageError*>(&error) != nullptr;
    fmt::print(stderr, "{}: {}\n", name, error.what());
    if (error.hint().starts_with("usage: "))
      fmt::print(stderr, "{}\n", error.hint());
    else if (!error.hint().empty())
      fmt::print(stderr, "hint: {}\n", error.hint());
    else if (usage)
      fmt::print(stderr, "hint: {} --help\n", name);
    return usage ? 2 : 1;
  } catch (const std::bad_alloc&) {
    fmt::print(stderr,
               "{}: out of memory\nhint: coil info MODEL --length … prints what a run needs\n",
               name);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}: {}\n", name, error.what());
  }
  return 1;
}
