// Labelled and plain DNA for training and evaluation, held in memory as one byte a base.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "model/batch.h"

namespace coil {

struct DatasetOptions {
  std::string sequence_column = "sequence", label_column = "label";  // CSV / TSV (plain or gzip)
  std::string table;               // FASTA plus a two-column table name<TAB>label (header line optional)
  int64_t min_length = 0;          // windows of a length drawn from min … max: folders and language modelling
  int64_t max_length = 0;          //   (0: whole records)
  std::vector<std::string> labels; // of a model or of the training set: a label outside is an error. empty: found
  bool labelled = true;            // false: language modelling, any DNA file
};

// `paths`: CSV/TSV files; one folder per class of FASTA/FASTQ (a folder of folders); FASTA files with a table;
// or, not labelled, any FASTA/FASTQ/CSV. With windows, items tile the records without overlap at max_length;
// training draws its own (draw_window).
// Errors: missing columns (naming those found), a class seen once, labels unknown to the model, no records.
Examples read_examples(const std::vector<std::string>& paths, const DatasetOptions& options);

// Splits off every `1/fraction`-th example of each class (a fixed permutation keyed by seed).
void split(Examples& all, double fraction, uint64_t seed, std::vector<Example>& train, std::vector<Example>& held_out);

// A random window of the item's record for training: length log-uniform in min…max, anywhere in its record.
Example draw_window(const Examples& all, const Example& item, int64_t min_length, int64_t max_length,
                    uint64_t random_length, uint64_t random_begin);

}  // namespace coil
