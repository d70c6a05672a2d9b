#include "apps/command.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <numeric>
#include <sstream>

#include "kernels/error.h"

namespace coil {

namespace po = boost::program_options;

std::istream& operator>>(std::istream& in, Size& size) {
  std::string word;
  in >> word;
  double factor = 1;
  if (!word.empty()) {
    switch (word.back()) {
      case 'k':
      case 'K':
        factor = 1e3;
        break;
      case 'm':
      case 'M':
        factor = 1e6;
        break;
      case 'g':
      case 'G':
        factor = 1e9;
        break;
      default:
        break;
    }
    if (factor != 1) word.pop_back();
  }
  double number = 0;
  const auto [end, error] =
      std::from_chars(word.data(), word.data() + word.size(), number, std::chars_format::fixed);
  const double value = std::round(number * factor);
  const bool good = error == std::errc{} && end == word.data() + word.size() && number >= 0 &&
                    value < 0x1p62 &&
                    std::abs(value - number * factor) < 1e-6 * std::max(1.0, value);
  if (good)
    size.value = static_cast<int64_t>(value);
  else
    in.setstate(std::ios::failbit);
  return in;
}

std::ostream& operator<<(std::ostream& out, const Size& size) {
  constexpr std::pair<int64_t, const char*> kUnits[] = {
      {1'000'000'000, "G"}, {1'000'000, "M"}, {1'000, "k"}};
  for (const auto& [unit, letter] : kUnits)
    if (size.value >= unit && size.value % unit == 0) return out << size.value / unit << letter;
  return out << size.value;
}

po::options_description describe(CommonOptions& options) {
  po::options_description text("Common options");
  text.add_options()  //
      ("device", option(options.device, "DEVICE"),
       "auto | cpu | cuda | cuda:0, cuda:1, …: auto takes a GPU where there is one")  //
      ("threads", option(options.threads, "COUNT"), "CPU threads; 0: all")            //
      ("seed", option(options.seed, "NUMBER"), "of every random number")              //
      ("precision", option(options.precision, "TYPE"),
       "f32 | bf16: how matrices are kept and multiplied");
  return text;
}

Device device_of(const CommonOptions& options) {
  const std::string& name = options.device;
  if (name == "cpu") return {};
  if (name == "auto") return {cuda_devices() > 0 ? Device::Kind::cuda : Device::Kind::cpu, 0};
  int index = 0;
  const char* const end = name.data() + name.size();
  const bool good = name == "cuda" || (name.starts_with("cuda:") &&
                                       std::from_chars(name.data() + 5, end, index).ptr == end &&
                                       name.size() > 5 && index >= 0);
  if (!good)
    throw UsageError(
        fmt::format("--device: expected auto, cpu, cuda or cuda:0, cuda:1, …, found '{}'", name));
  return {Device::Kind::cuda, index};
}

std::unique_ptr<Backend> make_backend(const CommonOptions& options) {
  const Device device = device_of(options);
  if (options.threads < 0 || options.threads > 4096)
    throw UsageError(fmt::format("--threads: expected 0 to 4096, found {}", options.threads));
  if (device.kind == Device::Kind::cuda) return make_cuda_backend(device.index);
  return make_cpu_backend(options.threads);
}

DType matrix_dtype(const CommonOptions& options) {
  if (options.precision == "f32") return DType::f32;
  if (options.precision == "bf16") return DType::bf16;
  throw UsageError(fmt::format("--precision: expected f32 or bf16, found '{}'", options.precision));
}

std::string nearest(const std::string& word, const std::vector<std::string>& names) {
  std::string best;
  size_t best_distance = 3;  // two typing errors at most
  for (const std::string& name : names) {
    if (!word.empty() && name.starts_with(word)) return name;
    std::vector<size_t> row(name.size() + 1);  // Levenshtein, one row
    std::iota(row.begin(), row.end(), size_t{0});
    for (size_t i = 0; i < word.size(); ++i) {
      size_t diagonal = row[0];
      row[0] = i + 1;
      for (size_t j = 0; j < name.size(); ++j) {
        const size_t replaced = diagonal + (word[i] != name[j]);
        diagonal = row[j + 1];
        row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
      }
    }
    if (row.back() < best_distance && row.back() < name.size()) {
      best_distance = row.back();
      best = name;
    }
  }
  return best;
}

namespace {

// Boost lists positionals as options: "  --model FOLDER  …" becomes "  MODEL           …".
std::string help_text(const po::options_description& options,
                      const std::vector<std::string>& positional) {
  std::stringstream printed;
  printed << options;
  std::string text, line;
  while (std::getline(printed, line)) {
    for (std::string name : positional) {
      const std::string prefix = fmt::format("  --{} ", name);
      if (!line.starts_with(prefix)) continue;
      const size_t value_end = std::min(line.size(), line.find(' ', prefix.size()));
      std::transform(name.begin(), name.end(), name.begin(),
                     [](unsigned char c) { return std::toupper(c); });
      line.replace(2, value_end - 2, fmt::format("{:<{}}", name, value_end - 2));
    }
    text += line + "\n";
  }
  return text.substr(std::min(text.size(), text.find_first_not_of('\n')));
}

// What an option takes: Boost says only that a value is invalid.
std::string expected_by(const po::option_description* option) {
  const auto* typed =
      option ? dynamic_cast<const po::typed_value_base*>(option->semantic().get()) : nullptr;
  if (!typed) return "";
  const std::type_info& type = typed->value_type();
  if (type == typeid(Size) || type == typeid(std::vector<Size>))
    return ": expected a size such as 4096, 4k or 1M";
  if (type == typeid(double)) return ": expected a number";
  if (type == typeid(int) || type == typeid(uint64_t)) return ": expected a whole number";
  return "";
}

std::string explain(const po::error& error, const po::options_description& options) {
  if (const auto* invalid = dynamic_cast<const po::validation_error*>(&error)) {
    std::string name = invalid->get_option_name();
    name.erase(0, name.find_first_not_of('-'));
    return error.what() + expected_by(options.find_nothrow(name, false));
  }
  const auto* unknown = dynamic_cast<const po::unknown_option*>(&error);
  if (!unknown) return error.what();
  std::string name = unknown->get_option_name();
  name.erase(0, name.find_first_not_of('-'));
  std::vector<std::string> names;
  for (const auto& option : options.options()) names.push_back(option->long_name());
  const std::string likely = nearest(name, names);
  return fmt::format("unknown option '{}'{}", unknown->get_option_name(),
                     likely.empty() ? "" : fmt::format("; did you mean --{}?", likely));
}

}  // namespace

bool parse(int argc, char** argv, const std::string& usage, const std::string& text,
           const po::options_description& options, const std::vector<std::string>& positional,
           bool rest, po::variables_map& values) {
  std::string config;
  po::options_description general("Help"), all;
  general.add_options()("help,h", "print this and exit")(
      "config", po::value(&config)->value_name("FILE"),
      "read options from a file of 'name = value' lines; the command line wins");
  all.add(options).add(general);
  po::positional_options_description places;
  for (size_t i = 0; i < positional.size(); ++i)
    places.add(positional[i].c_str(), rest && i + 1 == positional.size() ? -1 : 1);

  const std::string usage_line = fmt::format("usage: coil {}", usage);
  try {
    // Whole names only: a prefix that is unique today may not be tomorrow.
    constexpr int kStyle =
        po::command_line_style::default_style & ~po::command_line_style::allow_guessing;
    po::store(
        po::command_line_parser(argc, argv).options(all).positional(places).style(kStyle).run(),
        values);
  } catch (const po::error& error) {
    if (dynamic_cast<const po::too_many_positional_options_error*>(&error))
      throw UsageError("too many arguments", usage_line);
    throw UsageError(explain(error, all), usage_line);
  }
  if (values.count("help")) {
    Output out("");
    out.write(fmt::format("{}\n\n{}\n\n{}", usage_line, text, help_text(all, positional)));
    out.close();
    return false;
  }
  if (values.count("config")) {
    const std::string path = values["config"].as<std::string>();
    std::ifstream file(path);
    check(static_cast<bool>(file), "cannot open '{}': {}", path, std::strerror(errno));
    try {
      po::store(po::parse_config_file(file, all), values);
    } catch (const po::error& error) {
      throw UsageError(fmt::format("'{}': {}", path, explain(error, all)), usage_line);
    }
  }
  try {
    po::notify(values);
  } catch (const po::error& error) {
    throw UsageError(error.what(), usage_line);
  }
  return true;
}

namespace {

// A device, a pipe, or what /dev/stdout and /dev/fd/3 stand for: written straight to.
bool is_special(const std::string& path) {
  std::error_code error;
  const auto kind = std::filesystem::status(path, error).type();
  return path.starts_with("/dev/") || (kind != std::filesystem::file_type::regular &&
                                       kind != std::filesystem::file_type::not_found);
}

}  // namespace

std::string link_target(const std::string& path) {
  namespace fs = std::filesystem;
  fs::path at = path;
  std::error_code error;
  for (int links = 0; links < 40 && fs::is_symlink(at, error); ++links) {
    const fs::path next = fs::read_symlink(at, error);
    if (error) break;
    at = next.is_absolute() ? next : at.parent_path() / next;
  }
  return at.string();
}

std::string hdf5_output(const std::string& path) {
  if (path.empty()) throw UsageError("no output given: -o OUT");
  std::error_code error;
  if (path == "-" || is_special(path) || std::filesystem::is_directory(path, error))
    throw UsageError(fmt::format("--output '{}': HDF5 is written to a file", path), "-o OUT.h5");
  return link_target(path);
}

void check_outputs(const std::vector<std::string>& outputs,
                   const std::vector<std::string>& inputs) {
  namespace fs = std::filesystem;
  std::error_code error;
  std::vector<fs::path> places;
  for (const std::string& output : outputs) {
    if (output.empty() || output == "-" || is_special(output)) continue;
    const std::string target = link_target(output);
    for (const std::string& input : inputs)
      if (fs::equivalent(target, input, error) || fs::equivalent(target + ".tmp", input, error))
        throw UsageError(
            fmt::format("'{}' is read and would be written: name another output", output));
    places.push_back(fs::weakly_canonical(fs::absolute(target, error), error));
    if (std::count(places.begin(), places.end(), places.back()) > 1)
      throw UsageError(fmt::format("'{}' is named for two outputs", output));
  }
}

Output::Output(const std::string& path) : file_(stdout), path_(path) {
  if (path_.empty() || path_ == "-") {
    name_ = "standard output";
    return;
  }
  name_ = fmt::format("'{}'", path);
  if (!is_special(path)) {
    path_ = link_target(path);
    partial_ = path_ + ".tmp";
  }
  // An earlier file that may not be written may not be replaced either.
  const bool barred = access(path_.c_str(), W_OK) != 0 && errno != ENOENT;
  if (!barred) file_ = std::fopen(partial_.empty() ? path_.c_str() : partial_.c_str(), "we");
  check(!barred && file_ != nullptr, "cannot write {}: {}", name_, std::strerror(errno));
}

Output::~Output() {
  if (!file_ || file_ == stdout) return;
  std::fclose(file_);
  if (!partial_.empty()) unlink(partial_.c_str());
}

void Output::write(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), file_) != text.size())
    fail("cannot write {}: {}", name_, std::strerror(errno));
}

void Output::close() {
  if (!file_) return;
  std::FILE* file = std::exchange(file_, nullptr);
  const bool failed = std::fflush(file) != 0 || std::ferror(file);
  const int reason = failed ? errno : 0;
  const bool close_failed = file != stdout && std::fclose(file) != 0;
  const bool lost = failed || close_failed ||
                    (!partial_.empty() && std::rename(partial_.c_str(), path_.c_str()) != 0);
  if (!lost) return;
  const int why = failed ? reason : errno;
  if (!partial_.empty()) unlink(partial_.c_str());
  fail("cannot write {}: {}", name_, std::strerror(why));
}

}  // namespace coil
