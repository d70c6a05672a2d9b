#include "pipelines/hdf5_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "model/atomic_file.h"
#include "pipelines/hdf5_handles.h"
#include "pipelines/utf8.h"

namespace coil::hdf5 {

struct Writer::File {
  std::string path, partial;
  hid_t id = -1;
  bool sealed = false, failed = false;

  // HDF5 1.10 crashes when what it could not write is closed: after an error its handles are left.
  template <class Result>
  Result expect(Result result, const std::string& what) {
    failed |= result < 0;
    return hdf5::expect(result, path, what);
  }
};

Writer::Writer(const std::string& path) : file_(std::make_unique<File>()) {
  file_->path = path;
  file_->partial = path + ".tmp";
  const Lock lock;
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  const Handle creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  H5Pset_libver_bounds(access, H5F_LIBVER_EARLIEST, H5F_LIBVER_V18);
  H5Pset_file_locking(access, false, true);
  H5Pset_userblock(creation, kBlock);
  // HDF5 would say "unable to create file" alone.
  const int descriptor =
      ::open(file_->partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  check(descriptor >= 0, "cannot write '{}': {}", file_->partial, std::strerror(errno));
  ::close(descriptor);
  file_->id = expect(H5Fcreate(file_->partial.c_str(), H5F_ACC_TRUNC, creation, access),
                     file_->partial, "cannot write");
}

Writer::~Writer() {
  if (file_->sealed) return;
  const Lock lock;
  if (file_->id >= 0 && !file_->failed) H5Fclose(file_->id);
  ::unlink(file_->partial.c_str());
}

void Writer::attribute(const std::string& name, const std::string& text) {
  const Lock lock;
  const Handle type(H5Tcopy(H5T_C_S1), H5Tclose), space(H5Screate(H5S_SCALAR), H5Sclose);
  H5Tset_size(type, H5T_VARIABLE);
  H5Tset_cset(type, H5T_CSET_UTF8);
  const std::string what = fmt::format("cannot write attribute '{}'", name);
  const Handle made(
      file_->expect(H5Acreate2(file_->id, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT),
                    what),
      H5Aclose);
  const char* const value = text.c_str();
  file_->expect(H5Awrite(made, type, &value), what);
}

void Writer::attribute(const std::string& name, int64_t number) {
  const Lock lock;
  const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  const std::string what = fmt::format("cannot write attribute '{}'", name);
  const Handle made(file_->expect(H5Acreate2(file_->id, name.c_str(), H5T_STD_I64LE, space,
                                             H5P_DEFAULT, H5P_DEFAULT),
                                  what),
                    H5Aclose);
  file_->expect(H5Awrite(made, H5T_NATIVE_INT64, &number), what);
}

void Writer::group(const std::string& name) {
  const Lock lock;
  file_->expect(H5Gclose(file_->expect(
                    H5Gcreate2(file_->id, name.c_str(), H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT),
                    fmt::format("cannot write group '{}'", name))),
                "cannot write");
}

std::unique_ptr<Writer::Column> Writer::column(const std::string& name, const Layout& layout) {
  return std::make_unique<Column>(*file_, name, layout);
}

void Writer::texts(const std::string& name, const std::vector<std::string>& texts) {
  size_t width = 1;
  std::vector<std::string> converted;
  for (const std::string& text : texts)
    width = std::max(width, converted.emplace_back(as_utf8(text)).size());
  const auto made = column(name, {.type = Type::text,
                                  .rows = static_cast<int64_t>(texts.size()),
                                  .width = static_cast<int64_t>(width)});
  for (const std::string& text : converted) made->append_text(text);
  made->close();
}

Writer::Column::Column(File& file, std::string name, const Layout& layout)
    : file_(file), name_(std::move(name)), layout_(layout) {
  const Lock lock;
  const int rank = layout.columns > 0 ? 2 : 1;
  const hsize_t size[] = {static_cast<hsize_t>(layout.rows), static_cast<hsize_t>(layout.columns)};
  const hsize_t most[] = {H5S_UNLIMITED, size[1]};  // so that a chunk may be longer than the column
  const hsize_t chunk[] = {static_cast<hsize_t>(layout.chunk_rows()), size[1]};
  const Handle space(H5Screate_simple(rank, size, most), H5Sclose);
  const Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  const Handle type(file_type(layout.type, layout.width), H5Tclose);
  H5Pset_chunk(creation, rank, chunk);
  H5Pset_obj_track_times(creation, false);
  if (layout.deflate) H5Pset_deflate(creation, kLevel);
  handle_ = file_.expect(
      H5Dcreate2(file.id, name_.c_str(), type, space, H5P_DEFAULT, creation, H5P_DEFAULT),
      fmt::format("cannot write '{}'", name_));
}

Writer::Column::~Column() {
  const Lock lock;
  if (handle_ >= 0 && !file_.failed) H5Dclose(handle_);
}

void Writer::Column::append(const void* rows, int64_t count) {
  COIL_ASSERT(!raw_ || count == 0);
  const auto full = static_cast<size_t>(layout_.chunk_rows() * layout_.row_bytes());
  const auto* from = static_cast<const uint8_t*>(rows);
  auto bytes = static_cast<size_t>(count * layout_.row_bytes());
  crc_ = crc32({from, bytes}, crc_);
  appended_ += count;
  while (bytes > 0) {
    const size_t taken = std::min(bytes, full - buffer_.size());
    buffer_.insert(buffer_.end(), from, from + taken);
    from += taken;
    bytes -= taken;
    if (buffer_.size() < full) continue;
    if (layout_.deflate) deflater_.deflate(buffer_, stored_);
    write_chunk(layout_.deflate ? stored_ : buffer_);
    buffer_.clear();
  }
}

void Writer::Column::append_text(const std::string& text) {
  std::string padded = text;
  padded.resize(static_cast<size_t>(layout_.width), '\0');
  append(padded.data(), 1);
}

void Writer::Column::append_chunk(std::span<const uint8_t> stored) {
  COIL_ASSERT(appended_ == 0);
  raw_ = true;
  write_chunk(stored);
}

void Writer::Column::write_chunk(std::span<const uint8_t> stored) {
  const Lock lock;
  const hsize_t at[] = {static_cast<hsize_t>(chunks_ * layout_.chunk_rows()), 0};
  file_.expect(H5Dwrite_chunk(handle_, H5P_DEFAULT, 0, at, stored.size(), stored.data()),
               fmt::format("cannot write '{}'", name_));
  ++chunks_;
}

void Writer::Column::close() {
  if (!buffer_.empty()) {
    buffer_.resize(static_cast<size_t>(layout_.chunk_rows() * layout_.row_bytes()));
    if (layout_.deflate) deflater_.deflate(buffer_, stored_);
    write_chunk(layout_.deflate ? stored_ : buffer_);
    buffer_.clear();
  }
  COIL_ASSERT(raw_ || appended_ == layout_.rows);
  COIL_ASSERT(!raw_ || chunks_ == (layout_.rows + layout_.chunk_rows() - 1) / layout_.chunk_rows());
  const Lock lock;
  const std::string what = fmt::format("cannot write '{}'", name_);
  if (!raw_) {
    const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
    const Handle made(
        file_.expect(H5Acreate2(handle_, "crc32", H5T_STD_U32LE, space, H5P_DEFAULT, H5P_DEFAULT),
                     what),
        H5Aclose);
    file_.expect(H5Awrite(made, H5T_NATIVE_UINT32, &crc_), what);
  }
  file_.expect(H5Dclose(handle_), what);
  handle_ = -1;
}

void Writer::seal() {
  {
    const Lock lock;
    file_->expect(H5Fclose(file_->id), "cannot write");
    file_->id = -1;
  }
  const std::string& partial = file_->partial;
  const int descriptor = ::open(partial.c_str(), O_RDWR | O_CLOEXEC);
  check(descriptor >= 0, "cannot write '{}': {}", partial, std::strerror(errno));
  const auto sync = [&] {
    if (::fsync(descriptor) == 0) return;
    const int reason = errno;
    ::close(descriptor);
    fail("cannot write '{}': {}", file_->path, std::strerror(reason));
  };
  sync();
  Seal seal;
  seal.crc = crc32_of_file(partial, kBlock, seal.bytes);
  const std::string block = seal_block(seal);
  const ssize_t written = ::pwrite(descriptor, block.data(), block.size(), 0);
  check(written == kBlock, "cannot write '{}': {}", partial, std::strerror(errno));
  sync();
  ::close(descriptor);
  const bool renamed = ::rename(partial.c_str(), file_->path.c_str()) == 0;
  check(renamed, "cannot rename '{}' to '{}': {}", partial, file_->path, std::strerror(errno));
  file_->sealed = true;
  sync_folder(std::filesystem::path(file_->path).parent_path().string());
}

}  // namespace coil::hdf5
