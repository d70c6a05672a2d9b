// coil generate MODEL -o OUT.wav: audio drawn from a language model, written as it is made.
#include "pipelines/generate.h"

#include <unistd.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <numbers>
#include <optional>

#include "apps/command.h"
#include "apps/inputs.h"
#include "apps/models.h"
#include "apps/signals.h"
#include "audio/sound.h"
#include "audio/sound_writer.h"
#include "kernels/error.h"
#include "model/atomic_file.h"
#include "pipelines/run_log.h"

namespace coil {
namespace {

namespace po = boost::program_options;

constexpr int64_t kMostStreams = 1000;  // each is an open file

struct Options {
  CommonOptions common;
  std::string model, out, seconds = "10", prompt, label, guard = "warn", save_state, load_state;
  Size count{1}, top_k{0};
  double temperature = 1, top_p = 1, guidance = 1;
};

po::options_description describe(Options& options) {
  po::options_description description("Options");
  description.add_options()  //
      ("model", po::value(&options.model)->value_name("MODEL"),
       "a language model of audio: model folder, or the name of a shipped one")  //
      ("output,o", po::value(&options.out)->value_name("FILE"),
       "16-bit WAV; of several streams out-1.wav, out-2.wav, …; -, a pipe or a device: 16-bit PCM "
       "without header, little endian")                                                   //
      ("seconds", option(options.seconds, "NUMBER"), "of each stream; inf: without end")  //
      ("count", option(options.count, "COUNT"), "streams, made side by side")             //
      ("prompt", po::value(&options.prompt)->value_name("FILE"),
       "a recording that every stream goes on from; it is not written again")  //
      ("label", po::value(&options.label)->value_name("NAME"),
       "conditional model: one of its labels")  //
      ("temperature", option(options.temperature, "NUMBER"),
       "1: as the model says; below: likelier; 0: the likeliest always")                    //
      ("top-k", option(options.top_k, "COUNT"), "draw from the likeliest so many; 0: all")  //
      ("top-p", option(options.top_p, "NUMBER"),
       "draw from the likeliest that have this probability together; 1: all")  //
      ("guidance", option(options.guidance, "NUMBER"),
       "conditional model: above 1, the label counts for more than the model says; twice the "
       "work")  //
      ("guard", option(options.guard, "WHAT"),
       "off | warn | stop | resample: at half a second of loud noise, end the stream or draw it "
       "anew")  //
      ("save-state", po::value(&options.save_state)->value_name("FILE"),
       "at the end, what --load-state needs")  //
      ("load-state", po::value(&options.load_state)->value_name("FILE"),
       "go on where another run ended, as it drew");
  description.add(describe(options.common));
  return description;
}

Guard parse_guard(const std::string& name) {
  if (name == "off") return Guard::off;
  if (name == "warn") return Guard::warn;
  if (name == "stop") return Guard::stop;
  if (name == "resample") return Guard::resample;
  throw UsageError(fmt::format("--guard: expected off, warn, stop or resample, found '{}'", name));
}

// Infinity of "inf".
double parse_seconds(const std::string& text) {
  char* end = nullptr;
  const double seconds = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(seconds > 0) || (seconds > 1e9 && text != "inf"))
    throw UsageError(
        fmt::format("--seconds: expected a number above 0, up to 1e9, or inf, found '{}'", text));
  return seconds;
}

// out.wav, or out-1.wav, out-2.wav, …
std::vector<std::string> output_names(const std::string& path, int64_t count) {
  if (path.empty()) throw UsageError("no output given", "-o OUT.wav, or -o - for a pipe");
  const std::filesystem::path name(path);
  const std::string ending = name.extension().string();
  if (path != "-" && audio::has_audio_name(path) && !audio::has_wav_name(path))
    throw UsageError(fmt::format("--output '{}': WAV is written, not {}", path, ending.substr(1)),
                     "name it .wav, or pipe -o - into sox or flac");
  if (count == 1) return {path};
  if (path == "-")
    throw UsageError(fmt::format("--count {}: standard output takes one stream", count));
  std::vector<std::string> names;
  for (int64_t i = 1; i <= count; ++i) {
    const std::string own = fmt::format("{}-{}{}", name.stem().string(), i, ending);
    names.push_back((name.parent_path() / own).string());
  }
  return names;
}

void check_options(const Options& options) {
  if (options.model.empty()) throw UsageError("no MODEL given");
  const auto expect = [](bool good, const char* name, const char* what, auto found) {
    if (!good) throw UsageError(fmt::format("--{}: expected {}, found {}", name, what, found));
  };
  expect(options.count >= 1 && options.count <= kMostStreams, "count", "1 to 1000",
         options.count.value);
  expect(options.temperature >= 0 && options.temperature <= std::numeric_limits<float>::max(),
         "temperature", "0 or more", options.temperature);
  expect(static_cast<float>(options.top_p) > 0 && options.top_p <= 1, "top-p",
         "more than 0, at most 1", options.top_p);
  expect(options.guidance >= 0 && options.guidance <= 100, "guidance", "0 to 100",
         options.guidance);
  if (options.load_state.empty()) return;
  for (const auto& [name, given] : {std::pair{"--prompt", !options.prompt.empty()},
                                    std::pair{"--label", !options.label.empty()}})
    if (given) throw UsageError(fmt::format("{} does not go with --load-state", name));
}

void check_model(const Config& config, const std::string& where) {
  check(config.objective == Objective::lm, "{}: is a {}, expected a language model", where,
        config.objective == Objective::mlm ? "masked language model" : "classifier");
  check(config.audio.rate > 0, "{}: is no model of audio, which is what generate writes", where);
}

int32_t label_of(const Config& config, const std::string& label, double guidance) {
  if (!config.condition) {
    check(label.empty(), "--label '{}': the model takes no label", label);
    check(guidance == 1, "--guidance {}: the model takes no label", guidance);
    return -1;
  }
  if (label.empty())
    throw Error(fmt::format("the model is conditional: expected --label with one of {}",
                            fmt::join(config.labels, ", ")));
  if (guidance != 1 && config.condition_dropout == 0)
    throw Error(
        fmt::format("--guidance {}: the model knows no recordings without a label", guidance),
        "train it with --condition-dropout above 0");
  return find_label(config, label);
}

// What of the options holds where a state goes on: the command line's if given, else the state's.
GenerateOptions resolve(const Options& options, const po::variables_map& values,
                        const Config& config) {
  GenerateOptions resolved{.count = options.count,
                           .temperature = static_cast<float>(options.temperature),
                           .top_p = static_cast<float>(options.top_p),
                           .top_k = options.top_k,
                           .guidance = static_cast<float>(options.guidance),
                           .seed = options.common.seed};
  if (options.load_state.empty()) {
    resolved.label = label_of(config, options.label, options.guidance);
  } else {
    const GenerateOptions saved = Generator::saved_options(options.load_state);
    if (!values["count"].defaulted() && options.count != saved.count)
      fail("--count {}: '{}' holds {}", options.count.value, options.load_state,
           counted(saved.count, "stream"));
    resolved.count = saved.count;
    resolved.label = saved.label;
    check(config.condition || saved.guidance == 1,
          "'{}' is the state of another model: config and weights differ", options.load_state);
    if (values["guidance"].defaulted())
      resolved.guidance = saved.guidance;
    else if ((resolved.guidance == 1) != (saved.guidance == 1))
      fail("--guidance {}: '{}' was drawn with {}, and holds states for that", options.guidance,
           options.load_state, saved.guidance);
    if (values["temperature"].defaulted()) resolved.temperature = saved.temperature;
    if (values["top-p"].defaulted()) resolved.top_p = saved.top_p;
    if (values["top-k"].defaulted()) resolved.top_k = saved.top_k;
    if (values["seed"].defaulted()) resolved.seed = saved.seed;
  }
  const double samples = parse_seconds(options.seconds) * static_cast<double>(config.audio.rate);
  if (std::isfinite(samples)) {
    resolved.samples = std::llround(samples);
    if (resolved.samples < 1)
      throw UsageError(fmt::format("--seconds {}: less than a sample at {} Hz", options.seconds,
                                   config.audio.rate));
  }
  resolved.guard = parse_guard(options.guard);
  return resolved;
}

}  // namespace

int run_generate(int argc, char** argv) {
  Options options;
  po::variables_map values;
  if (!parse(argc, argv, "generate MODEL -o OUT.wav [options]",
             "Draws audio from a language model, sample by sample, and writes it as it is made.",
             describe(options), {"model"}, false, values)) {
    return 0;
  }
  check_options(options);
  if (options.prompt == "-")
    throw UsageError("audio is read from files, not from standard input", "--prompt FILE");
  options.model = find_model(options.model);
  const Config config = read_config(options.model);
  check_model(config, options.model);
  const GenerateOptions how = resolve(options, values, config);
  const std::vector<std::string> names = output_names(options.out, how.count);
  std::vector<std::string> outputs = names, read = files_of_model(options.model);
  read.push_back(options.prompt);
  outputs.push_back(options.save_state);
  check_outputs(outputs, read);
  check_outputs(names, {options.load_state});  // --save-state may write it anew
  if (!options.save_state.empty()) const AtomicFile can_be_written(options.save_state);

  Signals signals;  // before the backend, whose threads inherit what is blocked
  const std::unique_ptr<Backend> backend = make_backend(options.common);
  const Model model = load_model(*backend, options.model, matrix_dtype(options.common));
  try {
    Generator generator(*backend, model, how);
    if (!options.load_state.empty()) generator.load_state(options.load_state);
    if (!options.prompt.empty()) {
      const std::unique_ptr<Source> prompt = audio::open_recordings(
          {.files = {{.path = options.prompt, .name = options.prompt}}, .labels = {}},
          reading_of(config, {.trim = "0"}));
      generator.read_prompt(
          *prompt, fitting_batch(*backend, config, matrix_dtype(options.common), &kPrintNote));
    }
    std::vector<audio::SoundWriter> writers;
    for (const std::string& name : names)
      writers.emplace_back(link_target(name), config.audio.rate);
    const auto begin = std::chrono::steady_clock::now();
    std::vector<bool> told(names.size());  // of a runaway, once a stream
    const auto tell = [&](int64_t stream, int64_t sample) {
      if (told[stream]) return;
      told[stream] = true;
      fmt::print(stderr, "guard: {}: loud noise up to {:.1f} s\n",
                 names[stream] == "-" ? "standard output" : names[stream],
                 static_cast<double>(sample) / static_cast<double>(config.audio.rate));
    };
    const Generated made = generator.run(
        {.emit = [&](int64_t stream,
                     std::span<const float> samples) { return writers[stream].write(samples); },
         .runaway = tell,
         .interrupted = [&] { return signals.taken() != 0; }});
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    for (audio::SoundWriter& writer : writers) writer.close();
    const auto samples = static_cast<double>(made.samples);
    fmt::print(stderr, "{}, {} samples ({:.3f} s), {:.6f} bits per sample, {:.0f} samples/s\n",
               counted(how.count, "stream"), made.samples,
               samples / static_cast<double>(config.audio.rate),
               made.nats / samples / std::numbers::ln2, samples / seconds.count());
    if (how.guard != Guard::off)
      fmt::print(stderr, "guard: fired {}{}\n", counted(made.runaways, "time"),
                 how.guard == Guard::resample
                     ? fmt::format(", at {} in vain", counted(made.kept, "half second"))
                     : "");
    if (!options.save_state.empty()) {
      check(!made.unwanted, "no state saved in '{}': the reader of {} left before the end",
            options.save_state, names[0] == "-" ? "standard output" : names[0]);
      generator.save_state(options.save_state);
    }
  } catch (const OutOfMemory& error) {
    throw OutOfMemory(error.what(), "a smaller --count");
  }
  return signals.taken() > 0 ? 128 + signals.taken() : 0;
}

}  // namespace coil
