// A command of the one binary: `coil NAME …`. One file per command; apps/main.cc holds the table
// and the one try/catch. Options (Boost.Program_options) are bound to a struct whose initialisers
// are the defaults, so that --help prints live defaults; every command also takes --config FILE
// (key = value lines), the command line wins.
#pragma once

#include <fmt/ostream.h>

#include <boost/program_options.hpp>
#include <cstdint>
#include <istream>
#include <memory>
#include <string>
#include <vector>

#include "kernels/ops.h"

namespace coil {

struct Command {
  const char* group;  // heading in `coil --help`
  const char* name;
  const char* summary;                // one line of `coil --help`
  bool report;                        // ends with time and peak memory on stderr
  int (*run)(int argc, char** argv);  // argv[0] is the command's name; returns the exit status
};

int run_bench(int argc, char** argv);
int run_calibrate(int argc, char** argv);
int run_batch(int argc, char** argv);
int run_classify(int argc, char** argv);
int run_embed(int argc, char** argv);
int run_convert(int argc, char** argv);
int run_dataset(int argc, char** argv);
int run_eval(int argc, char** argv);
int run_generate(int argc, char** argv);
int run_info(int argc, char** argv);
int run_score(int argc, char** argv);
int run_train(int argc, char** argv);

// A size on the command line: 4096, 4k, 1M, 2G (powers of ten for bases: 4k is 4000).
struct Size {
  int64_t value = 0;
  operator int64_t() const { return value; }
};
std::istream& operator>>(std::istream& in, Size& size);
std::ostream& operator<<(std::ostream& out, const Size& size);

// An option bound to a member, whose value now is the default. `name` stands for the value in
// --help.
template <class T>
boost::program_options::typed_value<T>* option(T& member, const char* name) {
  return boost::program_options::value(&member)
      ->default_value(member, fmt::format("{}", fmt::streamed(member)))
      ->value_name(name);
}

// What every command takes.
struct CommonOptions {
  std::string device = "auto";  // auto | cpu | cuda | cuda:i
  int threads = 0;              // 0: all
  uint64_t seed = 1;
  std::string precision = "f32";  // f32 | bf16: matrices
};
boost::program_options::options_description describe(CommonOptions& options);
Device device_of(const CommonOptions& options);  // of --device; throws on an unknown one
std::unique_ptr<Backend> make_backend(const CommonOptions& options);
DType matrix_dtype(const CommonOptions& options);  // of --precision; throws on an unknown one

// Parses, prints help (and returns false) on --help, reads --config, throws UsageError on what it
// does not know. `usage` is the line after "usage: coil ". `positional` names the options that may
// be given without their name, in order, the last one taking the rest where `rest`; --help shows
// them in capitals, and they can stand in --config. Add describe(CommonOptions&) to `options` for
// --device, --threads, --seed and --precision; --help and --config come from here.
bool parse(int argc, char** argv, const std::string& usage, const std::string& text,
           const boost::program_options::options_description& options,
           const std::vector<std::string>& positional, bool rest,
           boost::program_options::variables_map& values);

// The name most like `word`, or "" where none is close.
std::string nearest(const std::string& word, const std::vector<std::string>& names);

// Standard output or a file, flushed and checked (full disk, closed pipe) by close(). A file is
// written as PATH.tmp and gets its name in close(): a run that fails leaves an earlier one as it
// was. Devices and pipes are written straight to.
class Output {
 public:
  explicit Output(const std::string& path);  // "" or "-": stdout
  ~Output();
  void write(std::string_view text);
  void close();  // throws naming the file and the reason

 private:
  std::FILE* file_;
  std::string path_, partial_, name_;  // partial_: empty where there is none; name_: for messages
};

// What a path stands for: symbolic links are written through, not replaced.
std::string link_target(const std::string& path);
// Where an HDF5 file is to be written: what a link points to. Throws on a pipe or device, and on
// nothing at all.
std::string hdf5_output(const std::string& path);
// Throws where an output is one of the inputs, or another output. Empty ones do not count.
void check_outputs(const std::vector<std::string>& outputs, const std::vector<std::string>& inputs);

}  // namespace coil
