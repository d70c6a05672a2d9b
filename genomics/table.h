// CSV and TSV, plain or compressed: a header line, then rows. Fields may be quoted as RFC 4180 says
// (commas, line ends and doubled quotes inside quotes). Tab separates where the header line holds a
// tab, else the comma.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "genomics/byte_stream.h"

namespace coil {

class Table {
 public:
  explicit Table(const std::string& path);  // reads the header; throws where there is none
  const std::vector<std::string>& header() const { return header_; }
  size_t find(std::string_view name) const;    // header().size() or more where there is none
  size_t column(std::string_view name) const;  // throws, naming the columns found
  bool next(std::vector<std::string>& row);    // false at the end; blank lines are passed over
  int64_t line() const { return row_line_; }   // in which the last row began

 private:
  int get();  // the next byte, -1 at the end
  ByteStream stream_;
  std::string_view rest_;
  char separator_ = 0;  // 0: not known yet
  int64_t line_ = 1, row_line_ = 1;
  std::vector<std::string> header_;
};

}  // namespace coil
