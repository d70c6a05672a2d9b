// Labelled and plain DNA for training and evaluation, held in memory as one byte a base.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/batch.h"

namespace coil {

struct DatasetOptions {
  std::string sequence_column = "sequence", label_column = "label";  // CSV / TSV (plain or gzip)
  std::string table = {};  // FASTA plus a two-column table name<TAB>label (header line optional)
  int64_t min_length = 0;  // windows of a length drawn from min … max (min 0: all of max)
  int64_t max_length = 0;  //   (0: whole records)
  // Of a model or of the training set: a label outside is an error. Empty: those found.
  std::vector<std::string> labels = {};
  bool labelled = true;  // false: language modelling, any DNA file but CRAM
  std::string target_column = {}, alphabet = {};  // of tables: see LabelledOptions
};

// `paths`: CSV/TSV files with a header line; a folder that holds one folder per class of
// FASTA/FASTQ (the class is the folder's name; hidden files, indexes and texts are passed over);
// FASTA/FASTQ files with a table; or, not labelled, any FASTA/FASTQ/SAM/BAM/CSV and folders of
// them. With windows, items tile the records without overlap at max_length; a rest shorter than
// min_length is dropped unless it is the whole record; training draws its own (draw_window). Found
// labels are sorted, by value where all are whole numbers. Errors: missing columns (naming those
// found), fewer than two classes or a class seen once (where `labels` is empty: a set to train on),
// labels unknown to the model, no DNA letter, no records.
Examples read_examples(const std::vector<std::string>& paths, const DatasetOptions& options);

// Splits off a `fraction` of the examples of each class (a fixed permutation keyed by seed; at
// least one where fraction > 0 and the class has two). Where a record holds several items it is cut
// into records of its own for each held-out item and for each stretch between them, so that no
// window drawn from a training item's record reaches into a held-out one. Replaces all.items.
void split(Examples& all, double fraction, uint64_t seed, std::vector<Example>& train,
           std::vector<Example>& held_out);

// A random window of the item's record for training: length log-uniform in min…max (both 64-bit
// numbers are uniform random bits), anywhere in its record; the whole record where that is shorter.
// max 0: the item itself.
Example draw_window(const Examples& all, const Example& item, int64_t min_length,
                    int64_t max_length, uint64_t random_length, uint64_t random_begin);

}  // namespace coil
