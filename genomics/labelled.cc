#include "genomics/labelled.h"

#include <algorithm>
#include <filesystem>
#include <utility>

#include "genomics/alphabet.h"
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

// Codes of letters, kUncounted for what is none.
std::array<uint8_t, 256> code_table(const std::string& letters) {
  std::array<uint8_t, 256> codes;
  codes.fill(kUncounted);
  for (size_t i = 0; i < letters.size(); ++i)
    codes[static_cast<uint8_t>(letters[i])] = static_cast<uint8_t>(i);
  return codes;
}

bool is_alignment(FileKind kind) {
  return kind == FileKind::sam || kind == FileKind::bam || kind == FileKind::cram;
}

}  // namespace

LabelledSource::LabelledSource(const std::vector<std::string>& paths,
                               const LabelledOptions& options, int64_t first)
    : options_(options), code_of_(code_table(options.alphabet)) {
  for (const std::string& label : options_.known) index_of(label);
  if (options_.labelling != Labelling::none && !options_.table.empty()) read_label_table();
  for (const std::string& path : paths) list(path);
  file_ = static_cast<size_t>(first);
}

std::vector<std::string> LabelledSource::files() const {
  std::vector<std::string> paths;
  for (const File& file : files_) paths.push_back(file.path);
  return paths;
}

int32_t LabelledSource::index_of(const std::string& label) {
  const auto [entry, added] = index_.try_emplace(label, static_cast<int32_t>(labels_.size()));
  if (added) labels_.push_back(label);
  return entry->second;
}

// `where`: the file and line for the message.
int32_t LabelledSource::known_label(const std::string& label, const std::string& where) {
  check(!label.empty(), "{}: the label is empty", where);
  if (!options_.known.empty())
    check(index_.contains(label), "{} has label '{}', which is not one of the model's: {}", where,
          label, join(options_.known));
  return index_of(label);
}

// A header line needs no rule of its own: it is a row whose name no record has.
void LabelledSource::read_label_table() {
  Table table(options_.table);
  std::vector<std::string> row = table.header();
  do {
    check(row.size() >= 2, "{}: line {} has one column; a name and a label were expected",
          options_.table, table.line());
    const auto [entry, added] = by_name_.try_emplace(row[0], Row{row[1], table.line()});
    check(added || entry->second.label == row[1],
          "{}: line {} labels '{}' as '{}', line {} as '{}'", options_.table, table.line(), row[0],
          row[1], entry->second.line, entry->second.label);
  } while (table.next(row));
}

void LabelledSource::list(const std::string& path) {
  if (path != "-" && fs::is_directory(path)) return list_folder(path);
  const bool labelled = options_.labelling == Labelling::all;
  File file{.path = path, .kind = path == "-" ? FileKind::fasta : sniff(path)};
  if (file.kind != FileKind::unknown) check_is_dna(path);
  if (is_alignment(file.kind)) {
    if (labelled || (file.kind == FileKind::cram && !options_.cram))
      throw Error(fmt::format("{}: {}; FASTA, FASTQ, CSV or TSV was expected", path,
                              labelled ? "alignments have no labels" : "CRAM needs its reference"),
                  fmt::format("samtools fasta {} > reads.fa", path));
  } else if (file.kind != FileKind::unknown) {
    file.by_table = options_.labelling != Labelling::none && !options_.table.empty();
    if (labelled && !file.by_table)
      throw Error(fmt::format("{}: a FASTA or FASTQ file alone has no labels", path),
                  "give a table of names and labels, or a folder that holds one folder per class");
  }
  files_.push_back(std::move(file));
}

// Letters of an alphabet and targets stand in tables.
void LabelledSource::check_is_dna(const std::string& path) const {
  check(options_.alphabet.empty(), "{}: is no table, and an alphabet of letters is of CSV or TSV",
        path);
  check(options_.target_column.empty(), "{}: is no table, and targets stand in a column of one",
        path);
}

void LabelledSource::list_folder(const std::string& folder) {
  const std::vector<std::string> folders = sorted_entries(folder, true);
  const std::vector<std::string> here = sorted_entries(folder, false);
  const bool classes = options_.labelling == Labelling::all ||
                       (options_.labelling == Labelling::found && here.empty());
  if (!classes) {
    check(!here.empty() || !folders.empty(), "{}: no files in this folder", folder);
    for (const std::string& file : here) list(file);
    for (const std::string& inner : folders) list_folder(inner);
    return;
  }
  check(!folders.empty(), "{}: no folders in it; one folder per class was expected", folder);
  for (const std::string& inner : folders) {
    const std::vector<std::string> files = sorted_entries(inner, false);
    check(!files.empty(), "{}: no files in this folder; FASTA or FASTQ of one class was expected",
          inner);
    const int32_t label = known_label(fs::path(inner).filename().string(), inner);
    for (const std::string& path : files) {
      const FileKind kind = sniff(path);
      check(kind == FileKind::fasta || kind == FileKind::fastq,
            "{}: neither FASTA nor FASTQ, which a class's folder should hold", path);
      check_is_dna(path);
      files_.push_back({.path = path, .kind = kind, .label = label});
    }
  }
}

void LabelledSource::open() {
  const File& file = files_[file_];
  before_ = record_ + 1;
  if (file.kind == FileKind::unknown) {
    table_ = std::make_unique<Table>(file.path);
    const size_t none = table_->header().size();
    sequence_at_ = table_->column(options_.sequence_column);
    label_at_ = options_.labelling == Labelling::all     ? table_->column(options_.label_column)
                : options_.labelling == Labelling::found ? table_->find(options_.label_column)
                                                         : none;
    group_at_ = options_.group_column.empty() ? none : table_->column(options_.group_column);
    target_at_ = options_.target_column.empty() ? none : table_->column(options_.target_column);
    name_at_ = std::min(table_->find("name"), table_->find("id"));
    rows_ = 0;
  } else if (is_alignment(file.kind)) {
    source_ = open_alignments(file.path, options_.alignment);
  } else {  // names must be unique where labels go by them
    source_ = open_fasta({file.path}, file.by_table);
  }
}

bool LabelledSource::next(Segment& segment) {
  for (; file_ < files_.size(); ++file_) {
    const File& file = files_[file_];
    if (!source_ && !table_) open();
    if (table_) {
      if (next_row(segment)) return true;
      check(rows_ > 0, "{}: no records", file.path);
      table_.reset();
      continue;
    }
    if (!source_->next(segment)) {
      source_.reset();
      continue;
    }
    record_ = segment.record += before_;
    segment.file = static_cast<int64_t>(file_);
    if (segment.first) {
      label_ = file.label;
      group_.clear();
      if (file.by_table) {
        const auto row = by_name_.find(segment.name);
        check(row != by_name_.end(), "{}: record '{}' has no label in {}", file.path, segment.name,
              options_.table);
        label_ = known_label(row->second.label,
                             fmt::format("{}: line {}", options_.table, row->second.line));
      }
    }
    segment.label = label_;
    return true;
  }
  return false;
}

bool LabelledSource::next_row(Segment& segment) {
  if (codes_.empty()) {
    if (!table_->next(row_)) return false;
    ++rows_;
    const std::string where = fmt::format("{}: line {}", files_[file_].path, table_->line());
    check(row_.size() == table_->header().size(), "{} has {} columns where the header has {}",
          where, row_.size(), table_->header().size());
    const std::string& text = row_[sequence_at_];
    const bool targets = target_at_ < row_.size();
    if (options_.alphabet.empty()) {
      // Beside targets a gap has a place of its own.
      const size_t read = dna::encode(text, targets ? dna::Gaps::as_n : dna::Gaps::skip, codes_);
      if (read < text.size())
        fail("{} has {} at base {}, {}", where, dna::describe(text[read]), codes_.size() + 1,
             dna::why_not_dna(text[read]));
    } else {
      read_letters(text, where);
    }
    check(!codes_.empty(), "{}: the sequence is empty", where);
    if (targets) read_targets(row_[target_at_], where);
    label_ = label_at_ < row_.size() ? known_label(row_[label_at_], where) : -1;
    group_ = group_at_ < row_.size() ? row_[group_at_] : "";
    name_ = name_at_ < row_.size() ? row_[name_at_] : std::to_string(rows_);
    position_ = 0;
    ++record_;
  }
  const auto length = static_cast<int64_t>(codes_.size());
  const int64_t count = std::min(kRun, length - position_);
  segment = {.record = record_,
             .file = static_cast<int64_t>(file_),
             .position = position_,
             .first = position_ == 0,
             .last = position_ + count == length,
             .name = position_ == 0 ? name_ : "",
             .label = label_,
             .codes = {codes_.begin() + position_, codes_.begin() + position_ + count}};
  if (!targets_.empty())
    segment.targets = {targets_.begin() + position_, targets_.begin() + position_ + count};
  position_ += count;
  if (segment.last) {
    codes_.clear();
    targets_.clear();
  }
  return true;
}

void LabelledSource::read_letters(const std::string& text, const std::string& where) {
  codes_.reserve(text.size());
  for (const char letter : text) {
    const uint8_t code = code_of_[static_cast<uint8_t>(letter)];
    check(code != kUncounted, "{} has {} at place {}, which is no letter of the alphabet '{}'",
          where, dna::describe(letter), codes_.size() + 1, options_.alphabet);
    codes_.push_back(code);
  }
}

// Of DNA an N is not counted either: nothing is to be told there.
void LabelledSource::read_targets(const std::string& text, const std::string& where) {
  check(text.size() == codes_.size(), "{}: column '{}' has {} letters, the sequence {}", where,
        options_.target_column, text.size(), codes_.size());
  const bool dna = options_.alphabet.empty();
  targets_.reserve(text.size());
  for (const char letter : text) {
    uint8_t code = kUncounted;
    if (letter != '.') {
      code = dna ? dna::code_of(letter) : code_of_[static_cast<uint8_t>(letter)];
      check(code != kUncounted,
            "{}: column '{}' has {} at place {}, which is neither '.' nor a letter of the alphabet "
            "'{}'",
            where, options_.target_column, dna::describe(letter), targets_.size() + 1,
            dna ? "ACGT" : options_.alphabet);
      if (dna && code == dna::kN) code = kUncounted;
    }
    targets_.push_back(code);
  }
}

double LabelledSource::fraction() const {  // files count alike
  const double inside = source_ ? source_->fraction() : 0;
  return (static_cast<double>(file_) + std::max(0.0, inside)) /
         static_cast<double>(std::max<size_t>(1, files_.size()));
}

}  // namespace coil
