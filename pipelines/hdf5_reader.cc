#include "pipelines/hdf5_reader.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "pipelines/hdf5_handles.h"

namespace coil::hdf5 {
namespace {

int64_t size_of_file(const std::string& path) {
  struct stat status {};
  const bool found = ::stat(path.c_str(), &status) == 0;
  check(found, "{}: cannot open: {}", path, std::strerror(errno));
  check(!S_ISDIR(status.st_mode), "{}: is a folder, expected a file of HDF5", path);
  return status.st_size;
}

}  // namespace

Reader::Reader(const std::string& path) : path_(path) {
  const int64_t size = size_of_file(path);
  check(is_hdf5(path), "{}: is not HDF5", path);
  const Lock lock;
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_file_locking(access, false, true);
  handle_ = H5Fopen(path.c_str(), H5F_ACC_RDONLY, access);
  if (handle_ < 0 && cause().starts_with("truncated file"))
    fail("{}: truncated: it has {} bytes, and HDF5's begin tells of more", path, size);
  expect(handle_, path, "cannot open as HDF5");
}

Reader::~Reader() {
  const Lock lock;
  if (handle_ >= 0) H5Fclose(handle_);
}

bool Reader::has(const std::string& name) const {
  const Lock lock;
  const size_t slash = name.rfind('/');
  if (slash != std::string::npos && slash > 0 &&
      H5Lexists(handle_, name.substr(0, slash).c_str(), H5P_DEFAULT) <= 0)
    return false;
  return H5Lexists(handle_, name.c_str(), H5P_DEFAULT) > 0;
}

bool Reader::has_attribute(const std::string& name) const {
  const Lock lock;
  return H5Aexists(handle_, name.c_str()) > 0;
}

std::string Reader::text_attribute(const std::string& name) const {
  const Lock lock;
  const std::string what = fmt::format("no attribute '{}'", name);
  check(has_attribute(name), "{}: has no attribute '{}'", path_, name);
  const Handle made(expect(H5Aopen(handle_, name.c_str(), H5P_DEFAULT), path_, what), H5Aclose);
  const Handle type(expect(H5Aget_type(made), path_, what), H5Tclose);
  check(H5Tget_class(type) == H5T_STRING, "{}: attribute '{}' is {}, expected text", path_, name,
        describe(type));
  std::string text;
  if (H5Tis_variable_str(type) > 0) {
    char* value = nullptr;
    expect(H5Aread(made, type, &value), path_, what);
    if (value) text = value;
    H5free_memory(value);
  } else {
    text.resize(H5Tget_size(type));
    expect(H5Aread(made, type, text.data()), path_, what);
    text.resize(std::min(text.size(), text.find('\0')));
  }
  return text;
}

int64_t Reader::number_attribute(const std::string& name) const {
  const Lock lock;
  const std::string what = fmt::format("no attribute '{}'", name);
  check(has_attribute(name), "{}: has no attribute '{}'", path_, name);
  const Handle made(expect(H5Aopen(handle_, name.c_str(), H5P_DEFAULT), path_, what), H5Aclose);
  const Handle type(expect(H5Aget_type(made), path_, what), H5Tclose);
  const Handle space(expect(H5Aget_space(made), path_, what), H5Sclose);
  check(H5Tget_class(type) == H5T_INTEGER && H5Sget_simple_extent_npoints(space) == 1,
        "{}: attribute '{}' is {}, expected a whole number", path_, name, describe(type));
  int64_t number = 0;
  expect(H5Aread(made, H5T_NATIVE_INT64, &number), path_, what);
  return number;
}

std::unique_ptr<Reader::Column> Reader::column(const std::string& name, Type type,
                                               bool matrix) const {
  check(has(name), "{}: has no dataset '{}'", path_, name);
  return std::make_unique<Column>(path_, handle_, name, type, matrix);
}

std::vector<std::string> Reader::texts(const std::string& name) const {
  const auto read = column(name, Type::text);
  const auto width = static_cast<size_t>(read->layout().width);
  std::string all(width * static_cast<size_t>(read->rows()), '\0');
  read->read(0, read->rows(), all.data());
  std::vector<std::string> texts;
  for (size_t at = 0; at < all.size(); at += width) {
    std::string text = all.substr(at, width);
    text.resize(std::min(text.size(), text.find('\0')));
    texts.push_back(std::move(text));
  }
  return texts;
}

std::vector<std::string> Reader::columns() const {
  const Lock lock;
  std::vector<std::string> names;
  const auto visit = [](hid_t, const char* name, const H5O_info_t* info, void* out) -> herr_t {
    if (info->type == H5O_TYPE_DATASET)
      static_cast<std::vector<std::string>*>(out)->emplace_back(name);
    return 0;
  };
  expect(H5Ovisit(handle_, H5_INDEX_NAME, H5_ITER_INC, visit, &names), path_, "cannot list");
  return names;
}

Reader::Column::Column(const std::string& path, int64_t file, std::string name, Type type,
                       bool matrix)
    : path_(path), name_(std::move(name)) {
  const Lock lock;
  const std::string what = fmt::format("cannot read '{}'", name_);
  handle_ = expect(H5Dopen2(file, name_.c_str(), H5P_DEFAULT), path_, what);
  const Handle found(expect(H5Dget_type(handle_), path_, what), H5Tclose);
  const Handle space(expect(H5Dget_space(handle_), path_, what), H5Sclose);
  const Handle creation(expect(H5Dget_create_plist(handle_), path_, what), H5Pclose);
  const Handle wanted(file_type(type, std::max<int64_t>(1, H5Tget_size(found))), H5Tclose);
  const bool same =
      H5Tget_class(found) == H5Tget_class(wanted) && H5Tget_size(found) == H5Tget_size(wanted) &&
      (type == Type::text                       ? H5Tis_variable_str(found) == 0
       : type == Type::f32 || type == Type::f64 ? true
                                                : H5Tget_sign(found) == H5Tget_sign(wanted));
  const std::string other = describe(found);
  const int rank = H5Sget_simple_extent_ndims(space);
  const auto refuse = [&](const std::string& text) {
    H5Dclose(handle_);
    fail("{}: '{}' {}", path_, name_, text);
  };
  if (!same) refuse(fmt::format("is {}, expected {}", other, name_of(type)));
  if (rank != (matrix ? 2 : 1))
    refuse(fmt::format("has {} dimensions, expected {}", rank, matrix ? 2 : 1));
  hsize_t size[2] = {0, 0}, chunk[2] = {0, 0};
  H5Sget_simple_extent_dims(space, size, nullptr);
  layout_ = {.type = type,
             .rows = static_cast<int64_t>(size[0]),
             .columns = static_cast<int64_t>(size[1]),
             .width = type == Type::text ? static_cast<int64_t>(H5Tget_size(found)) : 0};
  if (H5Pget_layout(creation) == H5D_CHUNKED) {
    H5Pget_chunk(creation, 2, chunk);
    chunk_rows_ = static_cast<int64_t>(chunk[0]);
  }
  filtered_ = H5Pget_nfilters(creation) > 0;
  layout_.deflate = filtered_;
}

Reader::Column::~Column() {
  const Lock lock;
  if (handle_ >= 0) H5Dclose(handle_);
}

void Reader::Column::check_filters() const {
  const Lock lock;
  const Handle creation(H5Dget_create_plist(handle_), H5Pclose);
  for (int i = 0; i < H5Pget_nfilters(creation); ++i) {
    unsigned flags = 0, config = 0;
    size_t values = 0;
    char name[64] = "";
    const H5Z_filter_t filter =
        H5Pget_filter2(creation, i, &flags, &values, nullptr, sizeof name, name, &config);
    check(filter == H5Z_FILTER_DEFLATE,
          "{}: '{}' is stored with filter {} ({}), expected deflate or none", path_, name_,
          static_cast<int>(filter), name[0] ? name : "no name");
  }
  check(chunk_rows_ > 0, "{}: '{}' is not stored in chunks", path_, name_);
}

void Reader::Column::read(int64_t begin, int64_t count, void* rows) const {
  if (count == 0) return;
  COIL_ASSERT(begin >= 0 && begin + count <= layout_.rows);
  const Lock lock;
  const std::string what = fmt::format("cannot read '{}'", name_);
  const int rank = layout_.columns > 0 ? 2 : 1;
  const hsize_t from[] = {static_cast<hsize_t>(begin), 0};
  const hsize_t size[] = {static_cast<hsize_t>(count), static_cast<hsize_t>(layout_.columns)};
  const Handle space(H5Dget_space(handle_), H5Sclose);
  const Handle memory(H5Screate_simple(rank, size, nullptr), H5Sclose);
  const Handle type(file_type(layout_.type, layout_.width), H5Tclose);
  expect(H5Sselect_hyperslab(space, H5S_SELECT_SET, from, nullptr, size, nullptr), path_, what);
  expect(H5Dread(handle_, type, memory, space, H5P_DEFAULT, rows), path_, what);
}

void Reader::Column::read_chunk(int64_t index, std::vector<uint8_t>& stored, bool& deflated) const {
  const Lock lock;
  const std::string what = fmt::format("cannot read chunk {} of '{}'", index, name_);
  const hsize_t at[] = {static_cast<hsize_t>(index * chunk_rows_), 0};
  hsize_t bytes = 0;
  uint32_t mask = 0;
  expect(H5Dget_chunk_storage_size(handle_, at, &bytes), path_, what);
  check(bytes > 0, "{}: chunk {} of '{}' is missing", path_, index, name_);
  // More than deflate ever makes of it: a size that lies.
  const int64_t most = chunk_rows_ * layout_.row_bytes() * 2 + 1024;
  check(static_cast<int64_t>(bytes) <= most,
        "{}: chunk {} of '{}' has {} bytes, expected at most {}", path_, index, name_, bytes, most);
  stored.resize(bytes);
  expect(H5Dread_chunk(handle_, H5P_DEFAULT, at, &mask, stored.data()), path_, what);
  deflated = filtered_ && (mask & 1) == 0;
}

bool Reader::Column::has_crc() const {
  const Lock lock;
  return H5Aexists(handle_, "crc32") > 0;
}

uint32_t Reader::Column::crc() const {
  const Lock lock;
  const std::string what = fmt::format("cannot read the checksum of '{}'", name_);
  const Handle made(expect(H5Aopen(handle_, "crc32", H5P_DEFAULT), path_, what), H5Aclose);
  uint32_t crc = 0;
  expect(H5Aread(made, H5T_NATIVE_UINT32, &crc), path_, what);
  return crc;
}

uint32_t Reader::Column::crc_of_rows() const {
  const int64_t step = std::max<int64_t>(1, (1 << 20) / layout_.row_bytes());
  std::vector<uint8_t> rows;
  uint32_t crc = 0;
  for (int64_t at = 0; at < layout_.rows; at += step) {
    const int64_t count = std::min(step, layout_.rows - at);
    rows.resize(static_cast<size_t>(count * layout_.row_bytes()));
    read(at, count, rows.data());
    crc = crc32(rows, crc);
  }
  return crc;
}

}  // namespace coil::hdf5
