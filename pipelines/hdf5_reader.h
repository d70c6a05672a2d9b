// Columns of HDF5 files, checked as they are opened: see pipelines/hdf5_column.h.
#pragma once

#include "pipelines/hdf5_column.h"

namespace coil::hdf5 {

class Reader {
 public:
  class Column;
  explicit Reader(const std::string& path);  // throws: not HDF5, cut, damaged
  ~Reader();
  const std::string& path() const { return path_; }
  bool has(const std::string& name) const;            // a column
  bool has_attribute(const std::string& name) const;  // of the file
  std::string text_attribute(const std::string& name) const;
  int64_t number_attribute(const std::string& name) const;
  // Throws where there is none, or one of another type or number of dimensions.
  std::unique_ptr<Column> column(const std::string& name, Type type, bool matrix = false) const;
  std::vector<std::string> texts(const std::string& name) const;  // a whole column
  std::vector<std::string> columns() const;                       // paths of all, sorted

 private:
  std::string path_;
  int64_t handle_ = -1;
};

class Reader::Column {
 public:
  Column(const std::string& path, int64_t file, std::string name, Type type, bool matrix);
  ~Column();
  const Layout& layout() const { return layout_; }
  int64_t rows() const { return layout_.rows; }
  int64_t chunk_rows() const { return chunk_rows_; }          // 0: not in chunks
  void read(int64_t begin, int64_t count, void* rows) const;  // through HDF5's filters
  // A chunk as it is stored: from any thread. `deflated`: whether it is. Only of columns without
  // filters or with deflate alone (check_filters).
  void read_chunk(int64_t index, std::vector<uint8_t>& stored, bool& deflated) const;
  void check_filters() const;  // throws, naming the one that is not known
  bool has_crc() const;
  uint32_t crc() const;          // of the attribute
  uint32_t crc_of_rows() const;  // of what is there
 private:
  std::string path_, name_;
  Layout layout_;
  int64_t chunk_rows_ = 0, handle_ = -1;
  bool filtered_ = false;
};

}  // namespace coil::hdf5
