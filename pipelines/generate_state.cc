// What `coil generate` carries from one run to the next: the states of its streams, the codes that
// come next, and how codes are drawn.
#include <charconv>
#include <cstring>

#include "kernels/error.h"
#include "model/safetensors.h"
#include "pipelines/generate.h"

namespace coil {
namespace {

constexpr const char* kFormat = "coil generate 3";
constexpr const char* kPending = "pending";  // (count) i32: tokens that the model has not read yet

template <class T>
T number(const SafetensorsReader& file, const std::string& path, const std::string& key) {
  const std::string text = file.metadata(key);
  T value{};
  const char* const end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  check(error == std::errc() && stop == end && value >= 0,
        "'{}': its {} is '{}', expected a number of at least 0", path, key, text);
  return value;
}

void check_format(const SafetensorsReader& file, const std::string& path) {
  check(file.metadata("coil_state") == kFormat,
        "'{}' is no state of coil generate (of this version)", path);
}

// FNV-1a of words of eight bytes.
class Hash {
 public:
  void add(const void* data, size_t bytes) {
    const auto* from = static_cast<const char*>(data);
    for (; bytes > 0; from += 8) {
      uint64_t word = 0;
      const size_t part = std::min<size_t>(bytes, 8);
      std::memcpy(&word, from, part);
      value_ = (value_ ^ word) * 0x100000001b3;
      bytes -= part;
    }
  }
  std::string text() const { return fmt::format("{:016x}", value_); }

 private:
  uint64_t value_ = 0xcbf29ce484222325;
};

}  // namespace

// Of config and weights.
std::string Generator::fingerprint() const {
  Hash hash;
  const std::string config = to_json(model_.config);
  hash.add(config.data(), config.size());
  std::vector<std::byte> kept;
  for (const Param& param : declare(const_cast<Model&>(model_))) {
    const View host = on_host(backend_, *param.tensor, kept);
    hash.add(host.data, static_cast<size_t>(host.count() * size_of(host.dtype)));
  }
  return hash.text();
}

void Generator::save_state(const std::string& path) const {
  for (size_t i = 0; i < stopped_.size(); ++i)
    check(!stopped_[i], "no state saved in '{}': the guard has stopped stream {}", path, i + 1);
  const auto all = state_.tensors();
  std::vector<std::vector<std::byte>> kept(all.size() + 1);
  std::vector<NamedView> tensors;
  for (size_t i = 0; i < all.size(); ++i)
    tensors.push_back(
        {all[i].first, on_host(backend_, all[i].second.slice(from_, rows_), kept[i])});
  const View ids = on_host(backend_, pending_, kept.back());
  std::vector<int32_t> tokens(ids.as<int32_t>(), ids.as<int32_t>() + options_.count);
  for (int32_t& token : tokens) token += static_cast<int32_t>(pending_in_.begin);
  tensors.push_back({kPending, host_view(tokens.data(), DType::i32, {options_.count})});
  write_safetensors(path, tensors,
                    {{"coil_state", kFormat},
                     {"model", fingerprint()},
                     {"matrices", name_of(model_.embedding.view().dtype)},
                     {"position", fmt::format("{}", position_)},
                     {"label", fmt::format("{}", options_.label + 1)},  // 0: none
                     {"seed", fmt::format("{}", options_.seed)},
                     {"temperature", fmt::format("{}", options_.temperature)},
                     {"top_k", fmt::format("{}", options_.top_k)},
                     {"top_p", fmt::format("{}", options_.top_p)},
                     {"guidance", fmt::format("{}", options_.guidance)}});
}

GenerateOptions Generator::saved_options(const std::string& path) {
  const SafetensorsReader file(path);
  check_format(file, path);
  const std::vector<int64_t>& shape = file.info(kPending).shape;
  check(shape.size() == 1 && shape[0] >= 1, "'{}': tensor {} is no list of tokens", path, kPending);
  return {.count = shape[0],
          .label = number<int32_t>(file, path, "label") - 1,
          .temperature = number<float>(file, path, "temperature"),
          .top_p = number<float>(file, path, "top_p"),
          .top_k = number<int64_t>(file, path, "top_k"),
          .guidance = number<float>(file, path, "guidance"),
          .seed = number<uint64_t>(file, path, "seed")};
}

void Generator::load_state(const std::string& path) {
  const SafetensorsReader file(path);
  check_format(file, path);
  const std::string matrices = name_of(model_.embedding.view().dtype);
  check(file.metadata("matrices") == matrices, "'{}' is of --precision {}, this run of {}", path,
        file.metadata("matrices"), matrices);
  check(file.metadata("model") == fingerprint(),
        "'{}' is the state of another model: config and weights differ", path);
  const std::vector<int32_t> tokens = file.read_i32(kPending);
  check(static_cast<int64_t>(tokens.size()) == options_.count, "'{}' holds {} streams, expected {}",
        path, tokens.size(), options_.count);
  for (const int32_t token : tokens)
    check(token >= 0 && token < model_.config.vocab,
          "'{}': token {} is not in the model's vocabulary of {}", path, token,
          model_.config.vocab);
  for (const auto& [name, tensor] : state_.tensors()) {
    const View own = tensor.slice(0, rows_);
    check(file.info(name).shape == std::vector<int64_t>(own.size, own.size + own.rank),
          "'{}': tensor {} has another shape, expected {}", path, name, own.shape());
    std::vector<float> values = file.read_f32(name);
    View from = own;  // contiguous: whole slots
    from.data = values.data();
    from.device = Device{};
    backend_.copy(from, own);
    backend_.sync();
  }
  position_ = number<int64_t>(file, path, "position");
  set_pending(tokens);
}

}  // namespace coil
