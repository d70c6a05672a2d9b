// DNA with what is known of each record, streamed: FASTA and FASTQ, alignments, CSV and TSV tables,
// folders of them. A label stands in a column of the table, in a table beside FASTA, or is the name
// of the folder.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "genomics/alignment.h"
#include "genomics/fasta.h"
#include "genomics/table.h"
#include "model/batch.h"

namespace coil {

enum class Labelling : uint8_t { none, found /* where there are any */, all /* or an error */ };

struct LabelledOptions {
  Labelling labelling = Labelling::all;
  std::string sequence_column = "sequence", label_column = "label";  // CSV / TSV
  std::string group_column = {};                                     // likewise: "" for none
  // Likewise: what is to be put out at each place of the sequence, '.' where nothing is.
  std::string target_column = {};
  std::string alphabet = {};            // CSV / TSV alone: letters, the i-th is code i; "": DNA
  std::string table = {};               // name<TAB>label of FASTA records (header line optional)
  std::vector<std::string> known = {};  // a label outside is an error; empty: those found
  bool cram = false;                    // whether CRAM is read, with the reference of:
  AlignmentOptions alignment = {};
};

// Errors name the file and the line or record: missing columns, a record or file without a label
// where all must have one, a label that is not known, no DNA letter, no records.
class LabelledSource final : public Source {
 public:
  // Lists folders and tells files' kinds; reads from file `first` on.
  LabelledSource(const std::vector<std::string>& paths, const LabelledOptions& options,
                 int64_t first = 0);
  bool next(Segment& segment) override;  // label: index into labels(), -1 none
  double fraction() const override;
  // Those known, or those found so far in the order they came.
  const std::vector<std::string>& labels() const { return labels_; }
  const std::string& group() const { return group_; }  // of the record that next() is in
  std::vector<std::string> files() const;

 private:
  struct File {
    std::string path;
    FileKind kind = FileKind::fasta;
    int32_t label = -1;  // of all its records
    bool by_table = false;
  };
  void list(const std::string& path);
  void list_folder(const std::string& folder);
  void check_is_dna(const std::string& path) const;
  void open();
  bool next_row(Segment& segment);
  void read_letters(const std::string& text, const std::string& where);
  void read_targets(const std::string& text, const std::string& where);
  int32_t index_of(const std::string& label);
  int32_t known_label(const std::string& label, const std::string& where);
  void read_label_table();

  const LabelledOptions options_;
  const std::array<uint8_t, 256> code_of_;  // of the alphabet's letters
  std::vector<File> files_;
  size_t file_ = 0;  // the one that is read
  std::unique_ptr<Source> source_;
  std::unique_ptr<Table> table_;
  // Columns of table_.
  size_t sequence_at_ = 0, label_at_ = 0, group_at_ = 0, name_at_ = 0, target_at_ = 0;
  int64_t rows_ = 0;
  std::vector<std::string> row_;
  std::vector<uint8_t> codes_, targets_;  // of a row, from position_ on not yet handed over
  int64_t position_ = 0;
  int64_t record_ = -1, before_ = 0;  // before_: records of the files before this one
  int32_t label_ = -1;
  std::string name_, group_;
  std::vector<std::string> labels_;
  std::unordered_map<std::string, int32_t> index_;
  struct Row {
    std::string label;
    int64_t line;
  };
  std::unordered_map<std::string, Row> by_name_;
};

}  // namespace coil
