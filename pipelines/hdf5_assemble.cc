// Parts become a dataset: see pipelines/hdf5_build.h.
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "pipelines/hdf5_build.h"
#include "pipelines/hdf5_writer.h"

namespace coil {

using Json = nlohmann::ordered_json;

std::string manifest_of(const BuildInput& input, const BuildOptions& options, bool of_parts) {
  Json sources = Json::array();
  for (const std::string& path : input.sources) {
    Json source{{"path", path}};
    struct stat status {};
    if (path != "-") {
      const bool found = ::stat(path.c_str(), &status) == 0;
      check(found, "{}: cannot open: {}", path, std::strerror(errno));
      source["bytes"] = static_cast<int64_t>(status.st_size);
      if (of_parts)
        source["modified"] = fmt::format("{}.{:09}", status.st_mtim.tv_sec, status.st_mtim.tv_nsec);
    }
    sources.push_back(std::move(source));
  }
  Json manifest{{"holds", input.what.describe()},
                {"options", Json::parse(options.how)},
                {"compress", options.deflate ? "deflate" : "none"}};
  if (of_parts) manifest["part"] = options.part;
  manifest["sources"] = std::move(sources);
  return manifest.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
}

void check_stands(const BuildOptions& options, const std::string& manifest,
                  const std::vector<uint32_t>& sums) {
  const Dataset dataset(options.out);
  const hdf5::Reader& reader = dataset.reader();
  const auto refuse = [&](const std::string& why) {
    throw Error(
        fmt::format("'{}' exists and was made from other input or options: {}", options.out, why),
        "name another output, or remove it");
  };
  const std::vector<std::string> then = reader.texts("sources/manifest");
  const std::string differing = manifest_differences(then.empty() ? "" : then[0], manifest);
  if (!differing.empty()) refuse(differing);
  const auto column = reader.column("sources/crc32", hdf5::Type::u32);
  std::vector<uint32_t> found(static_cast<size_t>(column->rows()));
  column->read(0, column->rows(), found.data());
  const std::vector<std::string> paths = reader.texts("sources/path");
  for (size_t i = 0; i < std::min(found.size(), sums.size()); ++i)
    if (found[i] != sums[i]) refuse(fmt::format("'{}' has changed since", paths.at(i)));
}

void assemble_dataset(const BuildInput& input, const BuildOptions& options, const PartStore& parts,
                      int64_t count, const std::vector<int64_t>& bytes,
                      const std::vector<uint32_t>& sums) {
  using hdf5::Type;
  int64_t size = 0, records = 0, longest = 1;
  std::vector<std::string> labels;  // as they were found
  for (int64_t i = 0; i < count; ++i) {
    const PartAbout about = parse_about(parts.about(i));
    size += about.size;
    records += about.records;
    longest = std::max(longest, about.longest_name);
    labels.insert(labels.end(), about.labels.begin(), about.labels.end());
  }
  std::vector<std::string> classes = labels;
  sort_labels(classes);
  std::vector<int32_t> place;
  for (const std::string& label : labels)
    place.push_back(
        static_cast<int32_t>(std::find(classes.begin(), classes.end(), label) - classes.begin()));

  hdf5::Writer file(options.out);
  file.attribute("schema", std::string(kDatasetSchema));
  file.attribute("version", kDatasetVersion);
  file.attribute("creator", std::string("coil " COIL_VERSION));
  file.attribute("alphabet", std::string(input.what.audio() ? "audio" : "dna"));
  if (input.what.audio()) {
    file.attribute("rate", input.what.rate);
    file.attribute("encoding", std::string(input.what.wide() ? "pcm16" : "mulaw"));
  }
  const hdf5::Layout layout{.type = input.what.type(), .rows = size, .deflate = options.deflate};
  const int64_t chunks = (size + layout.chunk_rows() - 1) / layout.chunk_rows();
  const auto codes = file.column("codes", layout);
  const auto offsets = file.column("offsets", {.type = Type::i64, .rows = records + 1});
  const auto starts = file.column("starts", {.type = Type::i64, .rows = records});
  const auto names = file.column("names", {.type = Type::text, .rows = records, .width = longest});
  const auto numbers = file.column("labels", {.type = Type::i32, .rows = records});
  const auto split = file.column("split", {.type = Type::i8, .rows = records});
  const auto checksums = file.column("checksums", {.type = Type::u32, .rows = chunks});
  const int64_t zero = 0;
  offsets->append(&zero, 1);
  for (int64_t i = 0; i < count; ++i) {
    const Part part = parts.read(i);
    std::span<const uint8_t> stored = part.of<uint8_t>("chunks");
    for (const uint32_t chunk : part.of<uint32_t>("chunk_bytes")) {
      codes->append_chunk(stored.first(chunk));
      stored = stored.subspan(chunk);
    }
    const auto append = [&]<class T>(hdf5::Writer::Column& column, std::span<const T> rows) {
      column.append(rows.data(), static_cast<int64_t>(rows.size()));
    };
    append(*checksums, part.of<uint32_t>("sums"));
    append(*offsets, part.of<int64_t>("ends"));
    append(*starts, part.of<int64_t>("starts"));
    append(*split, part.of<int8_t>("split"));
    for (const int32_t label : part.of<int32_t>("labels")) {
      const int32_t sorted = label < 0 ? -1 : place.at(static_cast<size_t>(label));
      numbers->append(&sorted, 1);
    }
    std::span<const char> text = part.of<char>("names");
    for (const uint32_t length : part.of<uint32_t>("name_bytes")) {
      names->append_text({text.data(), length});
      text = text.subspan(length);
    }
  }
  for (hdf5::Writer::Column* column : {codes.get(), offsets.get(), starts.get(), names.get(),
                                       numbers.get(), split.get(), checksums.get()})
    column->close();
  file.texts("classes", classes);
  file.texts("splits", input.splits);
  file.group("sources");
  file.texts("sources/path", input.sources);
  const auto rows = static_cast<int64_t>(input.sources.size());
  const auto sizes = file.column("sources/bytes", {.type = Type::i64, .rows = rows});
  sizes->append(bytes.data(), rows);
  sizes->close();
  const auto crcs = file.column("sources/crc32", {.type = Type::u32, .rows = rows});
  crcs->append(sums.data(), rows);
  crcs->close();
  file.texts("sources/manifest", {manifest_of(input, options, false)});
  file.seal();
}

}  // namespace coil
