#include "apps/results.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numbers>

#include "kernels/error.h"
#include "pipelines/hdf5_results.h"
#include "pipelines/run_log.h"

namespace coil {
namespace {

using hdf5::Type;

template <class T>
std::vector<T> rows(const hdf5::Reader& file, const std::string& name, Type type, int64_t begin,
                    int64_t count, bool matrix = false) {
  const auto column = file.column(name, type, matrix);
  std::vector<T> values(static_cast<size_t>(count * column->layout().row_bytes()) / sizeof(T));
  column->read(begin, count, values.data());
  return values;
}

std::vector<std::string> names_of(const hdf5::Reader& file, int64_t begin, int64_t count) {
  const auto width = static_cast<size_t>(file.column("names", Type::text)->layout().width);
  const std::vector<char> all = rows<char>(file, "names", Type::text, begin, count);
  std::vector<std::string> names;
  for (int64_t i = 0; i < count; ++i) {
    const char* const at = all.data() + static_cast<size_t>(i) * width;
    names.emplace_back(at, strnlen(at, width));
  }
  return names;
}

}  // namespace

void print_results(const std::string& path, int64_t most, Output& out) {
  const hdf5::Reader file(path);
  const ResultsAbout about = read_results_about(file);
  const int64_t all = file.column("names", Type::text)->rows();
  if (most <= 0 || most > all) most = all;
  const bool score = about.task == "score", classify = about.task == "classify";
  std::string head = "name\tstart\tend";
  int64_t width = 0;
  if (classify) {
    head += "\tlabel\tprobability";
    for (const std::string& name : about.classes) head += "\t" + name;
  } else if (score) {
    head += "\tcounted\tlog_likelihood\tbits";
  } else if (!about.per_position()) {
    width = file.column("vectors", Type::f32, true)->layout().columns;
    for (int64_t j = 0; j < width; ++j) head += fmt::format("\tv{}", j);
  } else {
    head += "\tpositions";
  }
  out.write(head + "\n");
  constexpr int64_t kBlock = 1024;
  for (int64_t first = 0; first < most; first += kBlock) {
    const int64_t count = std::min(kBlock, most - first);
    const auto names = names_of(file, first, count);
    const auto starts = rows<int64_t>(file, "starts", Type::i64, first, count),
               ends = rows<int64_t>(file, "ends", Type::i64, first, count);
    std::vector<float> matrix;
    std::vector<int32_t> labels;
    std::vector<double> sums, counted;
    std::vector<int64_t> offsets;
    if (classify) {
      matrix = rows<float>(file, "probabilities", Type::f32, first, count, true);
      labels = rows<int32_t>(file, "labels", Type::i32, first, count);
      width = static_cast<int64_t>(about.classes.size());
    } else if (score) {
      sums = rows<double>(file, "log_likelihood", Type::f64, first, count);
      counted = rows<double>(file, "counted", Type::f64, first, count);
    } else if (!about.per_position()) {
      matrix = rows<float>(file, "vectors", Type::f32, first, count, true);
    } else {
      offsets = rows<int64_t>(file, "position_offsets", Type::i64, first, count + 1);
    }
    for (int64_t i = 0; i < count; ++i) {
      std::string line = fmt::format("{}\t{}\t{}", names[i], starts[i], ends[i]);
      const float* const row = matrix.data() + i * width;
      if (classify) {
        const auto best = std::max_element(row, row + width);
        line += fmt::format(
            "\t{}\t{:.6f}",
            labels[i] < 0 || labels[i] >= width ? "unknown" : about.classes[labels[i]], *best);
        for (int64_t j = 0; j < width; ++j) line += fmt::format("\t{:.6f}", row[j]);
      } else if (score) {
        const double bits = counted[i] > 0 ? -sums[i] / counted[i] / std::numbers::ln2
                                           : std::numeric_limits<double>::quiet_NaN();
        line += fmt::format("\t{:.10g}\t{:.6f}\t{:.6f}", counted[i], sums[i], bits);
      } else if (!about.per_position()) {
        for (int64_t j = 0; j < width; ++j) line += fmt::format("\t{:.6g}", row[j]);
      } else {
        line += fmt::format("\t{}", offsets[i + 1] - offsets[i]);
      }
      out.write(line + "\n");
    }
  }
}

void print_results_info(const std::string& path, Output& out) {
  const hdf5::Reader file(path);
  const ResultsAbout about = read_results_about(file);
  const int64_t units = file.column("names", Type::text)->rows();
  out.write(fmt::format("holds      {} of {}\n", about.task, counted(units, "record")));
  out.write(fmt::format("schema     {} {}, made by {}\n", kResultsSchema,
                        file.number_attribute("version"), file.text_attribute("creator")));
  if (!about.layer.empty())
    out.write(fmt::format("vectors    layer {}, pooling {}\n", about.layer, about.pooling));
  if (!about.classes.empty())
    out.write(fmt::format("classes    {}\n", fmt::join(about.classes, ", ")));
  out.write(fmt::format("parts      {} to {} of {}\n", about.parts_first, about.parts_end,
                        about.parts_all));
  for (size_t i = 0; i < about.sources.size(); ++i)
    out.write(fmt::format("{:<11}{}\n", i == 0 ? "sources" : "", about.sources[i]));
}

}  // namespace coil
