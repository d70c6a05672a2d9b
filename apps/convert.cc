// coil convert IN OUT: a Hugging Face Mamba folder into a Coil model folder, and back. Both hold
// the same tensors under the same names; what differs is what config.json says and which files
// stand beside it.
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "apps/command.h"
#include "apps/models.h"
#include "genomics/alphabet.h"
#include "kernels/error.h"
#include "model/atomic_file.h"
#include "model/head.h"

namespace coil {
namespace {

namespace fs = std::filesystem;
namespace po = boost::program_options;
using Json = nlohmann::ordered_json;

constexpr int64_t kMaxConfig = 16 << 20;

struct ConvertOptions {
  std::string in, out, to = "coil", dtype = "f32", alphabet;
  Size shard_size{0};
};

po::options_description describe(ConvertOptions& options) {
  po::options_description text("Options");
  text.add_options()  //
      ("in", po::value(&options.in)->value_name("IN"),
       "a model folder: config.json and model.safetensors, or its shards and their index")  //
      ("out", po::value(&options.out)->value_name("OUT"), "the folder to write")            //
      ("to", option(options.to, "FORMAT"), "coil | huggingface")                            //
      ("dtype", option(options.dtype, "TYPE"),
       "f32 | bf16: of the matrices; all else stays f32")  //
      ("shard-size", option(options.shard_size, "SIZE"),
       "most bytes of a tensor file; 0: one file")  //
      ("alphabet", po::value(&options.alphabet)->value_name("NAME"),
       "dna: the token ids of IN are Coil's DNA codes, so that classify and score read DNA with "
       "it");
  return text;
}

Json read_json(const fs::path& path) { return Json::parse(read_file(path.string(), kMaxConfig)); }

// What parse_config does not keep but a user of transformers does: token ids, initializer_range and
// the like.
void keep_other_keys(const fs::path& in, const fs::path& out, const Config& config,
                     bool huggingface) {
  static const std::set<std::string> theirs = {"bos_token_id", "eos_token_id", "pad_token_id"};
  static const std::set<std::string> dropped = {"torch_dtype", "architectures", "expand"};
  const Json before = read_json(in / "config.json");
  Json after = read_json(out / "config.json");
  for (const auto& [key, value] : before.items())
    if (theirs.contains(key) || (!after.contains(key) && !dropped.contains(key)))
      after[key] = value;
  if (huggingface && config.objective == Objective::classify)
    for (size_t i = 0; i < config.labels.size(); ++i) {
      after["id2label"][std::to_string(i)] = config.labels[i];
      after["label2id"][config.labels[i]] = i;
    }
  write_file_atomically((out / "config.json").string(), after.dump(2) + "\n");
}

void copy_companions(const fs::path& in, const fs::path& out) {
  for (const char* name : {"generation_config.json", "tokenizer.json", "tokenizer_config.json",
                           "special_tokens_map.json", "vocab.json", "merges.txt", "README.md"}) {
    if (!fs::is_regular_file(in / name)) continue;
    write_file_atomically((out / name).string(), read_file((in / name).string(), int64_t{1} << 30));
  }
}

void check_options(const ConvertOptions& options) {
  if (options.in.empty() || options.out.empty())
    throw UsageError("expected two folders, IN and OUT", "usage: coil convert IN OUT [options]");
  if (options.to != "coil" && options.to != "huggingface")
    throw UsageError(fmt::format("--to: expected coil or huggingface, found '{}'", options.to));
  if (options.dtype != "f32" && options.dtype != "bf16")
    throw UsageError(fmt::format("--dtype: expected f32 or bf16, found '{}'", options.dtype));
  if (!options.alphabet.empty() && options.alphabet != "dna")
    throw UsageError(fmt::format("--alphabet: expected dna, found '{}'", options.alphabet));
  std::error_code error;
  check(!fs::equivalent(options.in, options.out, error), "IN and OUT are the same folder, '{}'",
        options.in);
}

}  // namespace

int run_convert(int argc, char** argv) {
  ConvertOptions options;
  po::variables_map values;
  const std::string text =
      "Reads a Mamba folder of Hugging Face (or of Coil), checks every tensor, and writes a Coil "
      "model folder; with\n"
      "--to huggingface one that transformers loads with MambaForCausalLM.from_pretrained.";
  if (!parse(argc, argv, "convert IN OUT [--to coil|huggingface]", text, describe(options),
             {"in", "out"}, false, values))
    return 0;
  check_options(options);
  options.in = find_model(options.in);
  std::error_code error;
  if (fs::exists(options.out, error) && !fs::is_empty(options.out, error))
    throw Error(fmt::format("'{}' is not an empty folder", options.out), "name a new one");

  const std::unique_ptr<Backend> backend = make_cpu_backend(1);
  Model model =
      load_model(*backend, options.in, options.dtype == "bf16" ? DType::bf16 : DType::f32);
  if (!options.alphabet.empty()) {
    check(model.config.vocab > dna::kN,
          "'{}': --alphabet dna needs a vocabulary of at least {}, found {}", options.in,
          dna::kN + 1, model.config.vocab);
    model.config.alphabet = options.alphabet;
  }
  check(options.to != "huggingface" || model.config.model_type != "coil",
        "'{}': transformers has no network of these mixers: {}", options.in,
        mixer_names(model.config));
  fs::create_directories(options.out, error);
  check(!error, "cannot make the folder '{}': {}", options.out, error.message());
  save_model(*backend, model, options.out, options.shard_size);
  const bool huggingface = options.to == "huggingface";
  keep_other_keys(options.in, options.out, model.config, huggingface);
  copy_companions(options.in, options.out);

  fmt::print(stderr, "{}: {} parameters, written for {}\n", options.out, parameters(model.config),
             huggingface ? "transformers" : "Coil");
  if (huggingface && model.config.objective == Objective::classify)
    fmt::print(stderr,
               "note: transformers has no classification head for Mamba. MambaModel loads the "
               "backbone; the head stays\n"
               "      in the file as score.weight and score.bias, to be applied to the {}.\n",
               model.config.pooling == Pooling::mean ? "mean of the last hidden states"
                                                     : "last hidden state");
  if (huggingface && model.config.objective == Objective::mlm)
    fmt::print(stderr,
               "note: its head tells the token in its own place, not the next one as in "
               "MambaForCausalLM; MambaModel loads the backbone.\n");
  if (huggingface && model.config.alphabet == "dna" &&
      !fs::exists(fs::path(options.in) / "tokenizer.json"))
    fmt::print(stderr, "note: there is no tokenizer; the token ids are A 1, C 2, G 3, T 4, N 5.\n");
  return 0;
}

}  // namespace coil
