#include "genomics/table.h"

#include "kernels/error.h"

namespace coil {

Table::Table(const std::string& path) : stream_(path) {
  rest_ = stream_.block();
  if (rest_.starts_with("\xef\xbb\xbf")) rest_.remove_prefix(3);
  separator_ = rest_.substr(0, rest_.find('\n')).find('\t') == std::string_view::npos ? ',' : '\t';
  check(next(header_), "{}: empty; a header line with the columns' names was expected",
        stream_.name());
}

size_t Table::find(std::string_view name) const {
  size_t i = 0;
  while (i < header_.size() && header_[i] != name) ++i;
  return i;
}

size_t Table::column(std::string_view name) const {
  const size_t found = find(name);
  if (found < header_.size()) return found;
  std::string names;
  for (const std::string& column : header_) {
    // A file of another kind has a "header" of any length and content.
    if (names.size() > 200) break;
    names += (names.empty() ? "'" : ", '") + column.substr(0, 40) + "'";
  }
  for (char& c : names)
    if (static_cast<unsigned char>(c) < 32) c = '?';
  fail("{}: no column '{}'; its columns are {}", stream_.name(), name, names);
}

int Table::get() {
  if (rest_.empty() && (rest_ = stream_.block()).empty()) return -1;
  const char c = rest_[0];
  rest_.remove_prefix(1);
  check(c != '\0', "{}: NUL byte in line {}", stream_.name(), line_);
  line_ += c == '\n';
  return static_cast<unsigned char>(c);
}

bool Table::next(std::vector<std::string>& row) {
  int c;
  do {
    row_line_ = line_;
    c = get();
  } while (c == '\n' || c == '\r');
  if (c < 0) return false;
  row.assign(1, {});
  bool quoted = false;
  for (;; c = get()) {
    std::string& field = row.back();
    if (quoted) {
      check(c >= 0, "{}: the quote opened in line {} is not closed", stream_.name(), row_line_);
      if (c != '"') {
        field += static_cast<char>(c);
      } else if (!rest_.empty() || !(rest_ = stream_.block()).empty()) {
        quoted = rest_[0] == '"';  // doubled: a quote within the field
        if (quoted) field += static_cast<char>(get());
      } else {
        quoted = false;
      }
    } else if (c == '"' && field.empty()) {
      quoted = true;
    } else if (c == separator_) {
      row.emplace_back();
    } else if (c == '\n' || c < 0) {
      if (!field.empty() && field.back() == '\r') field.pop_back();
      return true;
    } else {
      field += static_cast<char>(c);
    }
  }
}

}  // namespace coil
