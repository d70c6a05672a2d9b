#include "pipelines/hdf5_results.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "pipelines/utf8.h"

namespace coil {
namespace {

using Json = nlohmann::ordered_json;
using hdf5::Type;

struct Counts {
  int64_t units = 0, positions = 0, longest = 1;
  void add(const Counts& other) {
    units += other.units;
    positions += other.positions;
    longest = std::max(longest, other.longest);
  }
};

Counts counts_of(const std::string& about) {
  const Json json = Json::parse(about);
  return {json.at("units"), json.at("positions"), json.at("longest_name")};
}

class ResultsFile {
 public:
  ResultsFile(const std::string& out, const ResultsAbout& about, const Counts& counts)
      : about_(about), file_(out) {
    file_.attribute("schema", std::string(kResultsSchema));
    file_.attribute("version", kResultsVersion);
    file_.attribute("creator", std::string("coil " COIL_VERSION));
    file_.attribute("task", about.task);
    if (!about.layer.empty()) file_.attribute("layer", about.layer);
    if (!about.pooling.empty()) file_.attribute("pooling", about.pooling);
    file_.attribute("parts_first", about.parts_first);
    file_.attribute("parts_end", about.parts_end);
    file_.attribute("parts_all", about.parts_all);
    names_ =
        file_.column("names", {.type = Type::text, .rows = counts.units, .width = counts.longest});
    for (const char* name : {"starts", "ends"})
      columns_[name] = file_.column(name, {.type = Type::i64, .rows = counts.units});
    for (const ResultColumn& column : about.columns)
      columns_[column.name] =
          file_.column(column.name, {.type = column.type,
                                     .rows = column.of_positions ? counts.positions : counts.units,
                                     .columns = column.columns});
    if (!about.per_position()) return;
    offsets_ = file_.column("position_offsets", {.type = Type::i64, .rows = counts.units + 1});
    offsets_->append(&offset_, 1);
  }

  void append(const Part& part) {
    std::span<const char> text = part.of<char>("names");
    for (const uint32_t length : part.of<uint32_t>("name_bytes")) {
      names_->append_text({text.data(), length});
      text = text.subspan(length);
    }
    append(part, "starts", Type::i64, 0);
    append(part, "ends", Type::i64, 0);
    for (const ResultColumn& column : about_.columns)
      append(part, column.name, column.type, column.columns);
    if (!offsets_) return;
    for (const int64_t count : part.of<int64_t>("positions")) {
      offset_ += count;
      offsets_->append(&offset_, 1);
    }
  }

  // All that a file with the same columns holds.
  void append(const hdf5::Reader& from) {
    each_block(*from.column("names", Type::text),
               [&](const std::vector<uint8_t>& block, int64_t width) {
                 for (size_t at = 0; at < block.size(); at += static_cast<size_t>(width)) {
                   std::string name(block.begin() + static_cast<int64_t>(at),
                                    block.begin() + static_cast<int64_t>(at) + width);
                   names_->append_text(name.substr(0, name.find('\0')));
                 }
               });
    const auto copy = [&](const std::string& name, Type type, bool matrix) {
      each_block(
          *from.column(name, type, matrix), [&](const std::vector<uint8_t>& block, int64_t row) {
            columns_.at(name)->append(block.data(), static_cast<int64_t>(block.size()) / row);
          });
    };
    copy("starts", Type::i64, false);
    copy("ends", Type::i64, false);
    for (const ResultColumn& column : about_.columns)
      copy(column.name, column.type, column.columns > 0);
    if (!offsets_) return;
    const int64_t before = offset_;
    bool first = true;  // 0, which stands there already
    each_block(*from.column("position_offsets", Type::i64), [&](const std::vector<uint8_t>& block,
                                                                int64_t) {
      for (size_t at = first ? sizeof(int64_t) : 0; at < block.size(); at += sizeof(int64_t)) {
        int64_t own = 0;
        std::memcpy(&own, block.data() + at, sizeof own);
        offset_ = before + own;
        offsets_->append(&offset_, 1);
      }
      first = false;
    });
  }

  void seal() {
    names_->close();
    for (const auto& [name, column] : columns_) column->close();
    if (offsets_) offsets_->close();
    if (!about_.classes.empty()) file_.texts("classes", about_.classes);
    file_.group("sources");
    file_.texts("sources/path", about_.sources);
    file_.texts("sources/manifest", {about_.manifest});
    file_.seal();
  }

 private:
  // f(rows, bytes of a row), some megabytes at a time.
  template <class F>
  static void each_block(const hdf5::Reader::Column& column, const F& f) {
    const int64_t row = column.layout().row_bytes();
    const int64_t most = std::max<int64_t>(1, (int64_t{4} << 20) / row);
    std::vector<uint8_t> block;
    for (int64_t first = 0; first < column.rows(); first += most) {
      const int64_t count = std::min(most, column.rows() - first);
      block.resize(static_cast<size_t>(count * row));
      column.read(first, count, block.data());
      f(block, row);
    }
  }
  void append(const Part& part, const std::string& name, Type type, int64_t columns) {
    const std::span<const uint8_t> bytes = part.of<uint8_t>(name);
    const int64_t row = hdf5::size_of(type) * std::max<int64_t>(1, columns);
    columns_.at(name)->append(bytes.data(), static_cast<int64_t>(bytes.size()) / row);
  }

  const ResultsAbout& about_;
  hdf5::Writer file_;
  std::unique_ptr<hdf5::Writer::Column> names_, offsets_;
  std::map<std::string, std::unique_ptr<hdf5::Writer::Column>> columns_;
  int64_t offset_ = 0;
};

}  // namespace

bool ResultsAbout::per_position() const {
  return std::ranges::any_of(columns, &ResultColumn::of_positions);
}

void ResultPart::unit(const std::string& found, int64_t start, int64_t end, int64_t positions) {
  const std::string name = as_utf8(found);
  const auto length = static_cast<uint32_t>(name.size());
  part_.add("names", name.data(), name.size());
  part_.add("name_bytes", &length, 1);
  part_.add("starts", &start, 1);
  part_.add("ends", &end, 1);
  part_.add("positions", &positions, 1);
  units_ += 1;
  positions_ += positions;
  longest_ = std::max(longest_, static_cast<int64_t>(name.size()));
}

int64_t ResultPart::bytes() const {
  int64_t sum = 0;
  for (const auto& [name, values] : part_.values) sum += static_cast<int64_t>(values.size());
  return sum;
}

Part ResultPart::take() {
  part_.about =
      Json{{"units", units_}, {"positions", positions_}, {"longest_name", longest_}}.dump();
  Part taken = std::move(part_);
  *this = {};
  return taken;
}

void assemble_results(const std::string& out, const ResultsAbout& about, const PartStore& parts) {
  Counts counts;
  for (int64_t i = about.parts_first; i < about.parts_end; ++i)
    counts.add(counts_of(parts.about(i)));
  ResultsFile file(out, about, counts);
  for (int64_t i = about.parts_first; i < about.parts_end; ++i) file.append(parts.read(i));
  file.seal();
}

bool is_results(const std::string& path) {
  if (!hdf5::is_hdf5(path)) return false;
  const hdf5::Reader file(path);
  return file.has_attribute("schema") && file.text_attribute("schema") == kResultsSchema;
}

namespace {

// Rows that do not fit together would be read past the end of some.
void check_rows(const hdf5::Reader& file, const ResultsAbout& about) {
  const int64_t units = file.column("names", Type::text)->rows();
  int64_t all = 0;
  if (about.per_position()) {
    const auto offsets = file.column("position_offsets", Type::i64);
    check(offsets->rows() == units + 1, "{}: 'position_offsets' has {} rows, expected {}",
          file.path(), offsets->rows(), units + 1);
    offsets->read(units, 1, &all);
  }
  std::vector<ResultColumn> columns = about.columns;
  columns.push_back({"starts", Type::i64});
  columns.push_back({"ends", Type::i64});
  for (const ResultColumn& column : columns) {
    const int64_t rows = file.column(column.name, column.type, column.columns > 0)->rows();
    const int64_t expected = column.of_positions ? all : units;
    check(rows == expected, "{}: '{}' has {} rows, expected {}", file.path(), column.name, rows,
          expected);
  }
  const auto classes = static_cast<int64_t>(about.classes.size());
  check(about.task != "classify" || about.columns[0].columns == classes,
        "{}: {} classes, expected {}", file.path(), classes, about.columns[0].columns);
}

}  // namespace

ResultsAbout read_results_about(const hdf5::Reader& file) {
  check(file.has_attribute("schema"),
        "{}: is HDF5, but no results of coil's: it has no attribute 'schema'", file.path());
  const std::string schema = file.text_attribute("schema");
  check(schema == kResultsSchema, "{}: its schema is '{}', expected '{}'", file.path(), schema,
        kResultsSchema);
  const int64_t version = file.number_attribute("version");
  check(version <= kResultsVersion,
        "{}: results of version {}, expected at most {}: from a newer Coil", file.path(), version,
        kResultsVersion);
  ResultsAbout about{.task = file.text_attribute("task"),
                     .sources = file.texts("sources/path"),
                     .manifest = file.texts("sources/manifest").at(0),
                     .parts_first = file.number_attribute("parts_first"),
                     .parts_end = file.number_attribute("parts_end"),
                     .parts_all = file.number_attribute("parts_all")};
  for (const auto& [name, to] : {std::pair{"layer", &about.layer}, {"pooling", &about.pooling}})
    if (file.has_attribute(name)) *to = file.text_attribute(name);
  if (file.has("classes")) about.classes = file.texts("classes");
  const bool positions = file.has("position_offsets");
  const auto add = [&](const char* name, Type type, bool matrix, bool of_positions) {
    const int64_t columns = matrix ? file.column(name, type, true)->layout().columns : 0;
    about.columns.push_back({name, type, columns, of_positions});
  };
  if (about.task == "classify") {
    add("probabilities", Type::f32, true, false);
    add("labels", Type::i32, false, false);
  } else if (about.task == "score") {
    add("log_likelihood", Type::f64, false, false);
    add("counted", Type::f64, false, false);
    if (positions) add("log_likelihoods", Type::f32, false, true);
  } else if (about.task == "embed") {
    add("vectors", Type::f32, true, positions);
  } else {
    fail("{}: task '{}', expected classify, score or embed", file.path(), about.task);
  }
  check_rows(file, about);
  return about;
}

void merge_results(const std::string& out, const std::vector<std::string>& paths) {
  struct Shard {
    std::string path;
    ResultsAbout about;
  };
  std::vector<Shard> shards;
  Counts counts;
  for (const std::string& path : paths) {
    const hdf5::Reader file(path);  // one at a time: an array may have made thousands
    Shard shard{path, read_results_about(file)};
    const hdf5::Layout names = file.column("names", Type::text)->layout();
    Counts own{.units = names.rows, .longest = names.width};
    if (shard.about.per_position()) {
      const auto offsets = file.column("position_offsets", Type::i64);
      offsets->read(own.units, 1, &own.positions);
    }
    counts.add(own);
    shards.push_back(std::move(shard));
  }
  std::ranges::sort(shards, {}, [](const Shard& shard) {
    return std::pair(shard.about.parts_first, shard.about.parts_end);
  });
  ResultsAbout about = shards[0].about;
  for (const Shard& shard : shards) {
    const std::string differing = manifest_differences(about.manifest, shard.about.manifest);
    check(differing.empty(), "{}: is of another work than {}: {}", shard.path, shards[0].path,
          differing);
    check(shard.about.classes == about.classes, "{}: its classes are not those of {}", shard.path,
          shards[0].path);
  }
  int64_t end = 0;
  for (const Shard& shard : shards) {
    check(shard.about.parts_first == end,
          "{}: holds parts {} to {} of {}, expected those from {} on: a shard is missing or there "
          "twice",
          shard.path, shard.about.parts_first, shard.about.parts_end, about.parts_all, end);
    end = shard.about.parts_end;
  }
  check(end == about.parts_all, "parts {} to {} of {} are missing: another shard has them", end,
        about.parts_all, about.parts_all);
  about.parts_first = 0;
  about.parts_end = about.parts_all;
  ResultsFile file(out, about, counts);
  for (const Shard& shard : shards) file.append(hdf5::Reader(shard.path));
  file.seal();
}

}  // namespace coil
