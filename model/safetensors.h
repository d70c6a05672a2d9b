// safetensors files (the format of Hugging Face): 8 bytes header length, JSON header, data. A
// header that lies about offsets, shapes, sizes or dtypes is refused before anything is read;
// nothing is read out of bounds.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/tensor.h"

namespace coil {

// STEM.safetensors, or STEM-0000i-of-0000n.safetensors (or STEM.1-…) and
// STEM.safetensors.index.json, which names them.
constexpr const char* kTensorStem = "model";
bool has_tensors(const std::string& folder, const std::string& stem = kTensorStem);

enum class FileType : uint8_t { F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL };
const char* name_of(FileType type);  // as in the file: "F32", …
int64_t size_of(FileType type);      // bytes per element

struct FileTensor {
  FileType type;
  std::vector<int64_t> shape;
  int64_t begin, end;  // bytes within the data
};

// The header of a file with `data_bytes` after it, checked: every tensor lies within the data, its
// bytes are what dtype and shape need, tensors neither overlap nor leave gaps. `where` names the
// file in messages. This is what is fuzzed.
std::map<std::string, FileTensor> parse_safetensors_header(std::string_view header,
                                                           int64_t data_bytes,
                                                           const std::string& where);

// A file, or a folder with STEM.safetensors or STEM.safetensors.index.json and its shards.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const std::string& path, const std::string& stem = kTensorStem);
  ~SafetensorsReader();
  std::vector<std::string> names() const;
  bool has(const std::string& name) const;
  const FileTensor& info(const std::string& name) const;  // throws, naming the file, if absent
  // Converted to f32 (from F64 F32 F16 BF16) or i32 (from integers; out of range throws).
  std::vector<float> read_f32(const std::string& name) const;
  std::vector<int32_t> read_i32(const std::string& name) const;
  std::string metadata(const std::string& key) const;  // "" where absent
  std::vector<std::string> files() const;              // the paths read, one or the shards

 private:
  struct File;
  std::vector<std::unique_ptr<File>> files_;
  std::map<std::string, std::pair<const File*, FileTensor>> tensors_;
};

// Contiguous host tensors (f32, bf16, f64, i32, u8) under names, written to path + ".tmp", fsynced,
// renamed. The metadata always holds {"format": "pt"}, without which transformers refuses the file.
struct NamedView {
  std::string name;
  View view;
};
void write_safetensors(const std::string& path, std::span<const NamedView> tensors,
                       const std::map<std::string, std::string>& metadata = {});
// STEM.safetensors in `folder`, or where that would be longer than shard_bytes (above 0) the shards
// STEM-0000i-of-0000n.safetensors, each at most that long unless it holds one tensor only, and
// their index; where shards of these names are in use they are called STEM.1-…. Tensor files of an
// earlier save are removed, last: whenever it is killed, a reader finds all of one save.
void write_sharded(const std::string& folder, std::span<const NamedView> tensors,
                   int64_t shard_bytes, const std::string& stem = kTensorStem);

}  // namespace coil
