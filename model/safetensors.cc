// safetensors: u64 little-endian header length, JSON {"name": {"dtype", "shape", "data_offsets"},
// …}, data. Source: https://github.com/huggingface/safetensors, README "Format". Read with pread,
// so that a file that shrinks under us is an error and not a bus error.
#include "model/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "kernels/error.h"
#include "model/atomic_file.h"

namespace coil {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

constexpr int64_t kMaxHeader = 100'000'000;  // the reference implementation's limit

struct TypeInfo {
  FileType type;
  const char* name;
  int64_t bytes;
};
constexpr std::array<TypeInfo, 10> kTypes = {{{FileType::F64, "F64", 8},
                                              {FileType::F32, "F32", 4},
                                              {FileType::F16, "F16", 2},
                                              {FileType::BF16, "BF16", 2},
                                              {FileType::I64, "I64", 8},
                                              {FileType::I32, "I32", 4},
                                              {FileType::I16, "I16", 2},
                                              {FileType::I8, "I8", 1},
                                              {FileType::U8, "U8", 1},
                                              {FileType::BOOL, "BOOL", 1}}};

struct Header {
  std::map<std::string, FileTensor> tensors;
  std::map<std::string, std::string> metadata;
};

// A string from a file in quotes, escaped: whatever it holds, a message stays one line.
std::string quote(const std::string& text) {
  return Json(text.substr(0, 200)).dump(-1, ' ', true, Json::error_handler_t::replace);
}

std::string show(const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  return text.size() <= 80 ? text : text.substr(0, 80) + "…";
}

Json parse_json(std::string_view text, const std::string& where, int max_depth) {
  std::set<std::string> keys;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    check(depth <= max_depth, "{}: JSON nested deeper than {} levels", where, max_depth);
    if (depth == 1 && event == Json::parse_event_t::key) {
      const auto& name = parsed.get_ref<const std::string&>();
      check(keys.insert(name).second, "{}: {} is there twice", where, quote(name));
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), watch);
  } catch (const Json::exception& error) {
    std::string reason = error.what();
    std::replace_if(
        reason.begin(), reason.end(), [](unsigned char c) { return c < ' '; }, ' ');
    fail("{}: not valid JSON: {}", where, reason.substr(0, 300));
  }
}

int64_t natural(const Json& value, const std::string& where, const char* what) {
  check(value.is_number_unsigned() &&
            value.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()),
        "{}: {} must hold whole numbers from 0 to 2^63-1, found {}", where, what, show(value));
  return value.get<int64_t>();
}

FileTensor parse_tensor(const Json& entry, int64_t data_bytes, const std::string& where) {
  check(entry.is_object() && entry.contains("dtype") && entry.contains("shape") &&
            entry.contains("data_offsets"),
        "{}: expected an object with dtype, shape and data_offsets, found {}", where, show(entry));
  FileTensor tensor;
  const Json& dtype = entry["dtype"];
  const auto* type = std::find_if(kTypes.begin(), kTypes.end(), [&](const TypeInfo& candidate) {
    return dtype.is_string() && dtype.get_ref<const std::string&>() == candidate.name;
  });
  check(type != kTypes.end(),
        "{}: unknown dtype {}; expected one of F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL", where,
        show(dtype));
  tensor.type = type->type;

  const Json& shape = entry["shape"];
  check(shape.is_array(), "{}: shape must be a list, found {}", where, show(shape));
  int64_t bytes = type->bytes;
  bool empty = false;
  for (const Json& size : shape) {
    tensor.shape.push_back(natural(size, where, "shape"));
    empty |= tensor.shape.back() == 0;
  }
  for (const int64_t size : tensor.shape)
    check(empty || !__builtin_mul_overflow(bytes, size, &bytes), "{}: shape {} is past 2^63 bytes",
          where, show(shape));
  if (empty) bytes = 0;

  const Json& offsets = entry["data_offsets"];
  check(offsets.is_array() && offsets.size() == 2,
        "{}: data_offsets must be [begin, end], found {}", where, show(offsets));
  tensor.begin = natural(offsets[0], where, "data_offsets");
  tensor.end = natural(offsets[1], where, "data_offsets");
  check(tensor.begin <= tensor.end, "{}: data_offsets {} end before they begin", where,
        show(offsets));
  check(tensor.end <= data_bytes,
        "{}: ends at byte {} of the data, but the file has only {}: truncated?", where, tensor.end,
        data_bytes);
  check(tensor.end - tensor.begin == bytes,
        "{}: {} of shape {} needs {} bytes, data_offsets span {}", where, type->name, show(shape),
        bytes, tensor.end - tensor.begin);
  return tensor;
}

Header parse_header(std::string_view text, int64_t data_bytes, const std::string& where) {
  const Json json = parse_json(text, where, 3);
  check(json.is_object(), "{}: the header must be a JSON object, found {}", where, show(json));
  Header header;
  for (const auto& [name, entry] : json.items()) {
    if (name == "__metadata__") {
      check(entry.is_object(), "{}: __metadata__ must be an object, found {}", where, show(entry));
      for (const auto& [key, value] : entry.items()) {
        check(value.is_string(), "{}: __metadata__ {} must be a string, found {}", where,
              quote(key), show(value));
        header.metadata[key] = value.get<std::string>();
      }
      continue;
    }
    header.tensors[name] =
        parse_tensor(entry, data_bytes, fmt::format("{}: tensor {}", where, quote(name)));
  }

  // In order of their bytes: each begins where the one before ends.
  std::vector<std::pair<const FileTensor*, const std::string*>> order;
  for (const auto& [name, tensor] : header.tensors) order.emplace_back(&tensor, &name);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first->begin, a.first->end) < std::pair(b.first->begin, b.first->end);
  });
  int64_t end = 0;
  const std::string* before = nullptr;
  for (const auto& [tensor, name] : order) {
    check(tensor->begin >= end, "{}: tensors {} and {} overlap", where,
          before ? quote(*before) : "", quote(*name));
    check(tensor->begin == end, "{}: {} bytes before tensor {} belong to no tensor", where,
          tensor->begin - end, quote(*name));
    end = tensor->end;
    before = name;
  }
  check(end == data_bytes, "{}: {} bytes after the last tensor belong to no tensor", where,
        data_bytes - end);
  return header;
}

float from_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t widened = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | widened << 23 | fraction << 13);
}

float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

}  // namespace

const char* name_of(FileType type) { return kTypes[static_cast<size_t>(type)].name; }
int64_t size_of(FileType type) { return kTypes[static_cast<size_t>(type)].bytes; }

std::map<std::string, FileTensor> parse_safetensors_header(std::string_view header,
                                                           int64_t data_bytes,
                                                           const std::string& where) {
  return parse_header(header, data_bytes, where).tensors;
}

struct SafetensorsReader::File {
  std::string path;
  int descriptor = -1;
  int64_t data_begin = 0;
  Header header;

  explicit File(const std::string& name) : path(name) {
    descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    check(descriptor >= 0, "cannot open '{}': {}", path, std::strerror(errno));
    try {
      open_header();
    } catch (...) {
      ::close(descriptor);
      throw;
    }
  }
  ~File() { ::close(descriptor); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  void open_header() {
    struct stat status;
    check(::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode), "'{}' is not a file", path);
    const int64_t size = status.st_size;
    check(size >= 8, "'{}': not a safetensors file: {} bytes, at least 8 expected", path, size);
    uint64_t length = 0;
    read(&length, 8, 0);
    check(length <= static_cast<uint64_t>(kMaxHeader),
          "'{}': not a safetensors file: it begins with a header length of {}, at most {} expected",
          path, length, kMaxHeader);
    check(static_cast<int64_t>(length) <= size - 8,
          "'{}': header of {} bytes in a file of {}: truncated?", path, length, size);
    std::string text(length, '\0');
    read(text.data(), static_cast<int64_t>(length), 8);
    data_begin = 8 + static_cast<int64_t>(length);
    header = parse_header(text, size - data_begin, fmt::format("'{}'", path));
  }

  void read(void* to, int64_t bytes, int64_t offset) const {
    char* out = static_cast<char*>(to);
    while (bytes > 0) {
      const ssize_t got = ::pread(descriptor, out, static_cast<size_t>(bytes), offset);
      if (got < 0 && errno == EINTR) continue;
      check(got >= 0, "cannot read '{}': {}", path, std::strerror(errno));
      check(got > 0, "cannot read '{}': it ends at byte {}", path, offset);
      out += got;
      offset += got;
      bytes -= got;
    }
  }

  template <class T>
  std::vector<T> values(const FileTensor& tensor) const {
    std::vector<T> out(static_cast<size_t>(tensor.end - tensor.begin) / sizeof(T));
    read(out.data(), tensor.end - tensor.begin, data_begin + tensor.begin);
    return out;
  }
};

bool has_tensors(const std::string& folder, const std::string& stem) {
  return fs::exists(fs::path(folder) / (stem + ".safetensors")) ||
         fs::exists(fs::path(folder) / (stem + ".safetensors.index.json"));
}

SafetensorsReader::SafetensorsReader(const std::string& path, const std::string& stem) {
  const std::string one = stem + ".safetensors", listed = one + ".index.json";
  if (!fs::is_directory(path) || fs::exists(fs::path(path) / one)) {
    files_.push_back(
        std::make_unique<File>(fs::is_directory(path) ? (fs::path(path) / one).string() : path));
    for (const auto& [name, tensor] : files_.back()->header.tensors)
      tensors_[name] = {files_.back().get(), tensor};
    return;
  }
  const std::string index = (fs::path(path) / listed).string();
  if (!fs::exists(index))
    throw Error(
        fmt::format("no {} or {} in '{}'", one, listed, path),
        fs::exists(fs::path(path) / "pytorch_model.bin")
            ? "pytorch_model.bin is not read: save it from transformers with save_pretrained"
            : "");
  const std::string where = fmt::format("'{}'", index);
  const Json json = parse_json(read_file(index, kMaxHeader), where, 3);
  check(json.is_object() && json.contains("weight_map") && json["weight_map"].is_object(),
        "{}: expected an object with a weight_map", where);
  std::map<std::string, const File*> shards;
  for (const auto& [name, shard] : json["weight_map"].items()) {
    check(shard.is_string(), "{}: the file of tensor {} must be a string, found {}", where,
          quote(name), show(shard));
    const auto& file = shard.get_ref<const std::string&>();
    check(!file.empty() && file != "." && file != ".." && file.find('/') == std::string::npos &&
              file.find('\0') == std::string::npos,
          "{}: the file of tensor {} must be a name in the same folder, found {}", where,
          quote(name), quote(file));
    const File*& open = shards[file];
    if (!open) {
      files_.push_back(std::make_unique<File>((fs::path(path) / file).string()));
      open = files_.back().get();
    }
    const auto found = open->header.tensors.find(name);
    check(found != open->header.tensors.end(), "'{}': no tensor {}, which {} places there",
          open->path, quote(name), where);
    tensors_[name] = {open, found->second};
  }
}

SafetensorsReader::~SafetensorsReader() = default;

std::vector<std::string> SafetensorsReader::names() const {
  std::vector<std::string> names;
  for (const auto& entry : tensors_) names.push_back(entry.first);
  return names;
}

std::vector<std::string> SafetensorsReader::files() const {
  std::vector<std::string> paths;
  for (const auto& file : files_) paths.push_back(file->path);
  return paths;
}

bool SafetensorsReader::has(const std::string& name) const { return tensors_.count(name) > 0; }

const FileTensor& SafetensorsReader::info(const std::string& name) const {
  const auto found = tensors_.find(name);
  check(found != tensors_.end(), "'{}': no tensor {}; it holds {} tensors",
        files_.empty() ? "" : files_[0]->path, quote(name), tensors_.size());
  return found->second.second;
}

std::vector<float> SafetensorsReader::read_f32(const std::string& name) const {
  const FileTensor& tensor = info(name);
  const File& file = *tensors_.at(name).first;
  if (tensor.type == FileType::F32) return file.values<float>(tensor);
  std::vector<float> out;
  const auto convert = [&]<class T>(const std::vector<T>& values, auto to_float) {
    out.resize(values.size());
    std::transform(values.begin(), values.end(), out.begin(), to_float);
  };
  switch (tensor.type) {
    case FileType::F64:
      convert(file.values<double>(tensor), [](double x) { return static_cast<float>(x); });
      break;
    case FileType::F16:
      convert(file.values<uint16_t>(tensor), from_f16);
      break;
    case FileType::BF16:
      convert(file.values<uint16_t>(tensor), from_bf16);
      break;
    default:
      fail("'{}': tensor {} is {}, a floating-point tensor was expected", file.path, quote(name),
           name_of(tensor.type));
  }
  return out;
}

std::vector<int32_t> SafetensorsReader::read_i32(const std::string& name) const {
  const FileTensor& tensor = info(name);
  const File& file = *tensors_.at(name).first;
  std::vector<int32_t> out;
  const auto convert = [&](const auto& values) {
    out.reserve(values.size());
    for (const auto value : values) {
      check(value >= std::numeric_limits<int32_t>::min() &&
                value <= std::numeric_limits<int32_t>::max(),
            "'{}': tensor {} holds {}, which does not fit into 32 bits", file.path, quote(name),
            static_cast<int64_t>(value));
      out.push_back(static_cast<int32_t>(value));
    }
  };
  switch (tensor.type) {
    case FileType::I64:
      convert(file.values<int64_t>(tensor));
      break;
    case FileType::I32:
      convert(file.values<int32_t>(tensor));
      break;
    case FileType::I16:
      convert(file.values<int16_t>(tensor));
      break;
    case FileType::I8:
      convert(file.values<int8_t>(tensor));
      break;
    case FileType::U8:
    case FileType::BOOL:
      convert(file.values<uint8_t>(tensor));
      break;
    default:
      fail("'{}': tensor {} is {}, an integer tensor was expected", file.path, quote(name),
           name_of(tensor.type));
  }
  return out;
}

std::string SafetensorsReader::metadata(const std::string& key) const {
  for (const auto& file : files_) {
    const auto found = file->header.metadata.find(key);
    if (found != file->header.metadata.end()) return found->second;
  }
  return "";
}

}  // namespace coil
