// HDF5 files made column by column, whole or absent: see pipelines/hdf5_column.h.
#pragma once

#include "pipelines/hdf5_column.h"

namespace coil::hdf5 {

// A new file: PATH.tmp until seal() makes it durable and gives it its name. Made anew it is the
// same, byte by byte: no times are kept.
class Writer {
 public:
  class Column;
  explicit Writer(const std::string& path);
  ~Writer();  // not sealed: PATH.tmp is removed
  void attribute(const std::string& name, const std::string& text);
  void attribute(const std::string& name, int64_t number);
  void group(const std::string& name);
  // Appended to from its first row to its last; all must be closed before seal().
  std::unique_ptr<Column> column(const std::string& name, const Layout& layout);
  // A whole column (pipelines/utf8.h).
  void texts(const std::string& name, const std::vector<std::string>& texts);
  void seal();

 private:
  struct File;
  std::unique_ptr<File> file_;
};

class Writer::Column {
 public:
  Column(File& file, std::string name, const Layout& layout);
  ~Column();
  void append(const void* rows, int64_t count);
  void append_text(const std::string& text);
  // A chunk as it is stored, deflated or not; not to be mixed with append().
  void append_chunk(std::span<const uint8_t> stored);
  // Writes the rest and, of appended rows, their CRC-32 as the attribute "crc32".
  void close();

 private:
  void write_chunk(std::span<const uint8_t> stored);
  File& file_;
  std::string name_;
  Layout layout_;
  int64_t handle_, chunks_ = 0, appended_ = 0;
  uint32_t crc_ = 0;
  bool raw_ = false;
  std::vector<uint8_t> buffer_, stored_;  // of the chunk that is being filled
  Deflater deflater_;
};

}  // namespace coil::hdf5
