// safetensors files (the format of Hugging Face): 8 bytes header length, JSON header, data. A header that lies
// about offsets, shapes, sizes or dtypes is refused before anything is read; nothing is read out of bounds.
#pragma once

#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/tensor.h"

namespace coil {

enum class FileType : uint8_t { F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL };

struct FileTensor {
  FileType type;
  std::vector<int64_t> shape;
  int64_t begin, end;  // bytes within the data
};

// The header of a file of `file_bytes`, checked. `where` names the file in messages. This is what is fuzzed.
std::map<std::string, FileTensor> parse_safetensors_header(std::string_view header, int64_t data_bytes,
                                                           const std::string& where);

// A file, or a folder with model.safetensors or model.safetensors.index.json and its shards.
class SafetensorsReader {
 public:
  explicit SafetensorsReader(const std::string& path);
  ~SafetensorsReader();
  std::vector<std::string> names() const;
  bool has(const std::string& name) const;
  const FileTensor& info(const std::string& name) const;  // throws, naming the file, if absent
  // Converted to f32 (from F64 F32 F16 BF16) or i32 (from integers; out of range throws).
  std::vector<float> read_f32(const std::string& name) const;
  std::vector<int32_t> read_i32(const std::string& name) const;
  std::string metadata(const std::string& key) const;  // "" where absent

 private:
  struct File;
  std::vector<std::unique_ptr<File>> files_;
  std::map<std::string, std::pair<const File*, FileTensor>> tensors_;
};

// Host tensors (f32, bf16, f64, i32, u8) under names, written to path + ".tmp", fsynced, renamed. shard_bytes
// above 0: into folder-style shards model-0000i-of-0000n.safetensors with an index beside them.
struct NamedView {
  std::string name;
  View view;
};
void write_safetensors(const std::string& path, std::span<const NamedView> tensors,
                       const std::map<std::string, std::string>& metadata = {});
void write_sharded(const std::string& folder, std::span<const NamedView> tensors, int64_t shard_bytes);

}  // namespace coil
