// An open SAM, BAM or CRAM file of htslib's, its header and the record last read: what the reader
// and the tag writer share, above all which records count.
#pragma once

#include <htslib/sam.h>

#include <memory>
#include <string>

#include "genomics/alignment.h"

namespace coil {

struct CloseAlignments {
  void operator()(htsFile* file) const { hts_close(file); }
  void operator()(sam_hdr_t* header) const { sam_hdr_destroy(header); }
  void operator()(bam1_t* record) const { bam_destroy1(record); }
};
template <class T>
using HtsPointer = std::unique_ptr<T, CloseAlignments>;

class AlignmentFile {
 public:
  // CRAM is decoded whole: a block that is not decoded is not checked either.
  AlignmentFile(const std::string& path, const AlignmentOptions& options);
  bool read();           // the next record, of any kind; false at the end
  bool counted() const;  // the record is one of the source's: it gets an answer
  bam1_t* record() const { return record_.get(); }
  sam_hdr_t* header() const { return header_.get(); }
  const std::string& name() const { return name_; }  // for messages

 private:
  [[noreturn]] void fail_read() const;
  const AlignmentOptions options_;
  std::string name_;
  HtsPointer<htsFile> file_;
  HtsPointer<sam_hdr_t> header_;
  HtsPointer<bam1_t> record_;
  int64_t records_ = 0;
};

// Gives `file` its CRAM reference; makes the reference's index where there is none.
void set_reference(htsFile* file, const std::string& name, const std::string& reference);

}  // namespace coil
