#include "genomics/dataset.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <numeric>
#include <unordered_map>
#include <utility>

#include "genomics/alignment.h"
#include "genomics/alphabet.h"
#include "genomics/fasta.h"
#include "genomics/table.h"
#include "kernels/error.h"

namespace coil {
namespace {

namespace fs = std::filesystem;

std::string join(const std::vector<std::string>& names) {
  constexpr size_t kShown = 12;
  std::string text;
  for (size_t i = 0; i < names.size() && i < kShown; ++i) text += (i ? ", " : "") + names[i];
  return names.size() > kShown ? fmt::format("{}, … ({} in all)", text, names.size()) : text;
}

std::vector<std::string> sorted_entries(const std::string& folder, bool folders) {
  std::vector<std::string> entries;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    constexpr const char* kPassedOver[] = {".fai", ".gzi", ".bai",  ".csi",
                                           ".txt", ".md",  ".json", ".html"};
    const std::string ending = entry.path().extension().string();
    if (name.starts_with('.') || entry.is_directory() != folders) continue;
    if (!folders &&
        std::find(std::begin(kPassedOver), std::end(kPassedOver), ending) != std::end(kPassedOver))
      continue;
    entries.push_back(entry.path().string());
  }
  check(!error, "{}: cannot list: {}", folder, error.message());
  std::sort(entries.begin(), entries.end());
  return entries;
}

class Reader {
 public:
  explicit Reader(const DatasetOptions& options) : options_(options) {
    for (const std::string& label : options.labels) index_of(label);
    if (options.labelled && !options.table.empty()) read_label_table();
  }

  void read(const std::string& path) {
    if (path != "-" && fs::is_directory(path)) return read_folder(path);
    const FileKind kind = path == "-" ? FileKind::fasta : sniff(path);
    if (kind == FileKind::sam || kind == FileKind::bam || kind == FileKind::cram) {
      if (options_.labelled || kind == FileKind::cram)
        throw Error(fmt::format("{}: {}; FASTA, FASTQ, CSV or TSV was expected", path,
                                options_.labelled ? "alignments have no labels"
                                                  : "CRAM needs its reference"),
                    fmt::format("samtools fasta {} > reads.fa", path));
      return read_records(open_alignments(path, {}), [](const std::string&) { return -1; });
    }
    if (kind == FileKind::unknown) return read_table(path);
    if (!options_.labelled) return read_fasta(path, -1);
    if (options_.table.empty())
      throw Error(fmt::format("{}: a FASTA or FASTQ file alone has no labels", path),
                  "give a table of names and labels, or a folder that holds one folder per class");
    read_fasta_by_table(path);
  }

  Examples finish() {
    check(!all_.codes.empty(), "no records in the data given");
    if (options_.labelled) {
      if (options_.labels.empty()) order_labels();
      all_.labels = labels_;
    }
    for (size_t record = 0; record < all_.codes.size(); ++record) tile(record);
    if (options_.labelled && options_.labels.empty()) check_classes();
    return std::move(all_);
  }

 private:
  int32_t index_of(const std::string& label) {
    const auto [entry, added] = index_.try_emplace(label, static_cast<int32_t>(labels_.size()));
    if (added) labels_.push_back(label);
    return entry->second;
  }

  // `where`: the file and line for the message.
  int32_t known_label(const std::string& label, const std::string& where) {
    check(!label.empty(), "{}: the label is empty", where);
    if (!options_.labels.empty())
      check(index_.contains(label), "{} has label '{}', which is not one of the model's: {}", where,
            label, join(options_.labels));
    return index_of(label);
  }

  void add(std::string name, std::vector<uint8_t> codes, int32_t label) {
    codes.shrink_to_fit();
    all_.names.push_back(std::move(name));
    all_.codes.push_back(std::move(codes));
    label_of_.push_back(label);
  }

  void read_table(const std::string& path) {
    Table table(path);
    const size_t sequence = table.column(options_.sequence_column);
    const size_t label = options_.labelled ? table.column(options_.label_column) : 0;
    const size_t name = std::min(table.find("name"), table.find("id"));
    std::vector<std::string> row;
    int64_t rows = 0;
    while (table.next(row)) {
      ++rows;
      const std::string where = fmt::format("{}: line {}", path, table.line());
      check(row.size() == table.header().size(), "{} has {} columns where the header has {}", where,
            row.size(), table.header().size());
      const std::string& text = row[sequence];
      std::vector<uint8_t> codes;
      const size_t read = dna::encode(text, dna::Gaps::skip, codes);
      if (read < text.size())
        fail("{} has {} at base {}, {}", where, dna::describe(text[read]), codes.size() + 1,
             dna::why_not_dna(text[read]));
      check(!codes.empty(), "{}: the sequence is empty", where);
      const int32_t known = options_.labelled ? known_label(row[label], where) : -1;
      add(name < row.size() ? row[name] : std::to_string(rows), std::move(codes), known);
    }
    check(rows > 0, "{}: no records", path);
  }

  // label_for(name): of a record about to be added.
  template <class LabelFor>
  void read_records(const std::unique_ptr<Source>& source, LabelFor&& label_for) {
    Segment segment;
    std::vector<uint8_t> codes;
    std::string name;
    while (source->next(segment)) {
      if (segment.first) name = segment.name;
      codes.insert(codes.end(), segment.codes.begin(), segment.codes.end());
      if (!segment.last) continue;
      const int32_t label = label_for(name);
      add(std::move(name), std::exchange(codes, {}), label);
    }
  }

  void read_fasta(const std::string& path, int32_t label) {
    read_records(open_fasta({path}, false), [&](const std::string&) { return label; });
  }

  void read_fasta_by_table(const std::string& path) {
    read_records(open_fasta({path}), [&](const std::string& name) {
      const auto row = table_.find(name);
      check(row != table_.end(), "{}: record '{}' has no label in {}", path, name, options_.table);
      return known_label(row->second.label,
                         fmt::format("{}: line {}", options_.table, row->second.line));
    });
  }

  // A header line needs no rule of its own: it is a row whose name no record has.
  void read_label_table() {
    Table table(options_.table);
    std::vector<std::string> row = table.header();
    do {
      check(row.size() >= 2, "{}: line {} has one column; a name and a label were expected",
            options_.table, table.line());
      const auto [entry, added] = table_.try_emplace(row[0], Row{row[1], table.line()});
      check(added || entry->second.label == row[1],
            "{}: line {} labels '{}' as '{}', line {} as '{}'", options_.table, table.line(),
            row[0], row[1], entry->second.line, entry->second.label);
    } while (table.next(row));
  }

  void read_folder(const std::string& folder) {
    const std::vector<std::string> folders = sorted_entries(folder, true);
    if (!options_.labelled) {
      int64_t read_files = 0;
      for (const std::string& file : sorted_entries(folder, false)) read(file), ++read_files;
      for (const std::string& inner : folders) read_folder(inner), ++read_files;
      check(read_files > 0, "{}: no files in this folder", folder);
      return;
    }
    check(!folders.empty(), "{}: no folders in it; one folder per class was expected", folder);
    for (const std::string& inner : folders) {
      const std::vector<std::string> files = sorted_entries(inner, false);
      check(!files.empty(), "{}: no files in this folder; FASTA or FASTQ of one class was expected",
            inner);
      const int32_t label = known_label(fs::path(inner).filename().string(), inner);
      for (const std::string& file : files) {
        const FileKind kind = sniff(file);
        check(kind == FileKind::fasta || kind == FileKind::fastq,
              "{}: neither FASTA nor FASTQ, which a class's folder should hold", file);
        read_fasta(file, label);
      }
    }
  }

  void order_labels() {
    std::vector<std::string> sorted = labels_;
    sort_labels(sorted);
    std::vector<int32_t> place(labels_.size());
    for (size_t i = 0; i < sorted.size(); ++i)
      place[index_.at(sorted[i])] = static_cast<int32_t>(i);
    for (int32_t& label : label_of_) label = place[label];
    labels_ = std::move(sorted);
  }

  void tile(size_t record) {
    const auto length = static_cast<int64_t>(all_.codes[record].size());
    const int64_t step = options_.max_length > 0 ? options_.max_length : length;
    const int64_t shortest = options_.min_length > 0 ? options_.min_length : step;
    for (int64_t begin = 0; begin < length; begin += step) {
      const int64_t size = std::min(step, length - begin);
      if (begin > 0 && size < shortest) break;
      all_.items.push_back({static_cast<int64_t>(record), begin, size, label_of_[record]});
    }
  }

  void check_classes() const {
    check(labels_.size() > 1, "only one class, '{}', in the data given; a classifier needs two",
          labels_[0]);
    std::vector<int64_t> counts(labels_.size());
    for (const Example& item : all_.items) ++counts[item.label];
    for (size_t i = 0; i < counts.size(); ++i)
      check(counts[i] > 1, "class '{}' is seen once; at least two examples of a class are needed",
            labels_[i]);
  }

  struct Row {
    std::string label;
    int64_t line;
  };
  const DatasetOptions& options_;
  Examples all_;
  std::vector<int32_t> label_of_;  // of the records
  std::vector<std::string> labels_;
  std::unordered_map<std::string, int32_t> index_;
  std::unordered_map<std::string, Row> table_;
};

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a fixed order keyed by (seed, item).
uint64_t mix(uint64_t seed, uint64_t item) {
  uint64_t z = seed + (item + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Gives every held-out item and every stretch of training items between them a record of its own.
void cut_records(Examples& all, const std::vector<bool>& held) {
  std::vector<std::vector<uint8_t>> codes;
  std::vector<std::string> names;
  for (size_t i = 0; i < all.items.size();) {
    const int64_t record = all.items[i].record;
    size_t end = i + 1;
    bool cut = held[i];
    for (; end < all.items.size() && all.items[end].record == record; ++end) cut |= held[end];
    std::vector<uint8_t> whole = std::move(all.codes[record]);
    if (!cut || end == i + 1) {
      for (size_t k = i; k < end; ++k) all.items[k].record = static_cast<int64_t>(codes.size());
      codes.push_back(std::move(whole));
      names.push_back(all.names[record]);
      i = end;
      continue;
    }
    while (i < end) {
      size_t stop = i + 1;
      while (!held[i] && stop < end && !held[stop]) ++stop;
      const int64_t begin = all.items[i].begin;
      const int64_t past = all.items[stop - 1].begin + all.items[stop - 1].length;
      for (; i < stop; ++i) {
        all.items[i].record = static_cast<int64_t>(codes.size());
        all.items[i].begin -= begin;
      }
      codes.emplace_back(whole.begin() + begin, whole.begin() + past);
      names.push_back(all.names[record]);
    }
  }
  all.codes = std::move(codes);
  all.names = std::move(names);
}

}  // namespace

Examples read_examples(const std::vector<std::string>& paths, const DatasetOptions& options) {
  check(options.max_length == 0 || options.min_length <= options.max_length,
        "the shortest window ({}) is longer than the longest ({})", options.min_length,
        options.max_length);
  Reader reader(options);
  for (const std::string& path : paths) reader.read(path);
  return reader.finish();
}

void split(Examples& all, double fraction, uint64_t seed, std::vector<Example>& train,
           std::vector<Example>& held_out) {
  check(fraction >= 0 && fraction < 1,
        "a validation fraction of 0 or more and below 1 was expected, not {}", fraction);
  std::vector<std::vector<size_t>> classes(std::max<size_t>(1, all.labels.size()));
  for (size_t i = 0; i < all.items.size(); ++i)
    classes[std::max(0, all.items[i].label)].push_back(i);
  std::vector<bool> held(all.items.size());
  for (std::vector<size_t>& items : classes) {
    std::sort(items.begin(), items.end(),
              [&](size_t a, size_t b) { return mix(seed, a) < mix(seed, b); });
    const auto n = static_cast<int64_t>(items.size());
    const int64_t wanted =
        fraction > 0 ? std::max<int64_t>(1, std::llround(fraction * static_cast<double>(n))) : 0;
    for (int64_t i = 0; i < std::min(wanted, n - 1); ++i) held[items[i]] = true;
  }
  cut_records(all, held);
  train.clear();
  held_out.clear();
  for (size_t i = 0; i < held.size(); ++i) (held[i] ? held_out : train).push_back(all.items[i]);
}

Example draw_window(const Examples& all, const Example& item, int64_t min_length,
                    int64_t max_length, uint64_t random_length, uint64_t random_begin) {
  if (max_length <= 0) return item;
  const auto whole = static_cast<int64_t>(all.codes[item.record].size());
  const auto low = static_cast<double>(min_length > 0 ? min_length : max_length);
  const double uniform = static_cast<double>(random_length >> 11) * 0x1p-53;
  const auto drawn =
      static_cast<int64_t>(low * std::pow(static_cast<double>(max_length + 1) / low, uniform));
  Example window = item;
  window.length = std::min(std::clamp(drawn, static_cast<int64_t>(low), max_length), whole);
  const auto places = static_cast<unsigned __int128>(whole - window.length + 1);
  window.begin = static_cast<int64_t>((places * random_begin) >> 64);
  return window;
}

}  // namespace coil
