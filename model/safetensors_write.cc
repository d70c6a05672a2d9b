// Writing safetensors files, one or sharded; the format is described in safetensors.cc.
#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "kernels/error.h"
#include "model/atomic_file.h"
#include "model/safetensors.h"

namespace coil {
namespace {

namespace fs = std::filesystem;

FileType file_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return FileType::F32;
    case DType::bf16:
      return FileType::BF16;
    case DType::f64:
      return FileType::F64;
    case DType::i32:
      return FileType::I32;
    case DType::u8:
      return FileType::U8;
  }
  COIL_ASSERT(false);
}

// What an index names; nothing where there is none.
std::set<std::string> files_in(const fs::path& index) {
  std::set<std::string> files;
  if (!fs::exists(index)) return files;
  constexpr int64_t kMostBytes = 100 << 20;
  const auto json = nlohmann::json::parse(read_file(index.string(), kMostBytes), nullptr, false);
  if (!json.is_object() || !json.contains("weight_map")) return files;
  for (const auto& [tensor, file] : json["weight_map"].items())
    if (file.is_string()) files.insert(file.get<std::string>());
  return files;
}

}  // namespace

void write_safetensors(const std::string& path, std::span<const NamedView> tensors,
                       const std::map<std::string, std::string>& metadata) {
  // Widest type first: every tensor is then aligned to its own element, whatever stands before it.
  std::vector<const NamedView*> order;
  for (const NamedView& tensor : tensors) {
    COIL_ASSERT(tensor.view.contiguous() && tensor.view.device == Device{});
    order.push_back(&tensor);
  }
  std::stable_sort(order.begin(), order.end(), [](const NamedView* a, const NamedView* b) {
    return size_of(a->view.dtype) > size_of(b->view.dtype);
  });
  nlohmann::ordered_json header;
  header["__metadata__"]["format"] = "pt";
  for (const auto& [key, value] : metadata) header["__metadata__"][key] = value;
  int64_t end = 0;
  for (const NamedView* tensor : order) {
    COIL_ASSERT(!header.contains(tensor->name));
    const View& view = tensor->view;
    const int64_t begin = end;
    end += view.count() * size_of(view.dtype);
    header[tensor->name] = {{"dtype", name_of(file_type(view.dtype))},
                            {"shape", std::vector<int64_t>(view.size, view.size + view.rank)},
                            {"data_offsets", {begin, end}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t length = text.size();

  AtomicFile file(path);
  file.write(&length, 8);
  file.write(text.data(), text.size());
  for (const NamedView* tensor : order)
    file.write(tensor->view.data,
               static_cast<size_t>(tensor->view.count() * size_of(tensor->view.dtype)));
  file.commit();
}

void write_sharded(const std::string& folder, std::span<const NamedView> tensors,
                   int64_t shard_bytes, const std::string& stem) {
  const std::string one = stem + ".safetensors", listed = one + ".index.json";
  constexpr int64_t kHeaderBytes = 64, kEntryBytes = 160;  // room for JSON around the names
  std::vector<size_t> first = {0};                         // of each shard
  int64_t bytes = kHeaderBytes, total = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t data = tensors[i].view.count() * size_of(tensors[i].view.dtype);
    const int64_t entry = data + kEntryBytes + static_cast<int64_t>(tensors[i].name.size());
    if (shard_bytes > 0 && i > first.back() && bytes + entry > shard_bytes) {
      first.push_back(i);
      bytes = kHeaderBytes;
    }
    bytes += entry;
    total += data;
  }
  first.push_back(tensors.size());
  const size_t shards = first.size() - 1;

  // Until the new index is there the one of now stands, with all that it names.
  const std::string other = stem + ".1";
  const bool in_use =
      std::ranges::any_of(files_in(fs::path(folder) / listed),
                          [&](const auto& file) { return file.starts_with(stem + "-"); });
  const std::string& begin = in_use ? other : stem;

  std::set<std::string> written;
  nlohmann::ordered_json index;
  index["metadata"]["total_size"] = total;
  for (size_t i = 0; i < shards; ++i) {
    const std::string name =
        shards == 1 ? one : fmt::format("{}-{:05}-of-{:05}.safetensors", begin, i + 1, shards);
    const auto part = tensors.subspan(first[i], first[i + 1] - first[i]);
    write_safetensors((fs::path(folder) / name).string(), part);
    written.insert(name);
    for (const NamedView& tensor : part) index["weight_map"][tensor.name] = name;
  }
  if (shards > 1) {
    write_file_atomically((fs::path(folder) / listed).string(), index.dump(2) + "\n");
    written.insert(listed);
  }
  // Of an earlier save. The one file goes first: it is what a reader prefers.
  std::vector<fs::path> stale;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    const bool shard = (name.starts_with(stem + "-") || name.starts_with(other + "-")) &&
                       name.ends_with(".safetensors");
    if ((name == one || name == listed || shard) && !written.count(name))
      stale.push_back(entry.path());
  }
  std::sort(stale.begin(), stale.end(), [&](const fs::path& a, const fs::path& b) {
    return (a.filename() == one) > (b.filename() == one);
  });
  for (const fs::path& path : stale) {
    std::error_code error;
    check(fs::remove(path, error) || !error, "cannot remove '{}': {}", path.string(),
          error.message());
  }
  sync_folder(folder);
}

}  // namespace coil
