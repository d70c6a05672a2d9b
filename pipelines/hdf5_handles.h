// For hdf5_writer.cc and hdf5_reader.cc alone: HDF5's lock, its errors as ours, its handles, its
// types.
#pragma once

#include <hdf5.h>

#include <mutex>
#include <string>

#include "kernels/error.h"
#include "pipelines/hdf5_column.h"

namespace coil::hdf5 {

// What HDF5 would print goes into our errors instead.
class Lock {
 public:
  Lock();

 private:
  static std::recursive_mutex& mutex();
  std::lock_guard<std::recursive_mutex> guard_;
};

std::string cause();  // the innermost that HDF5 names

template <class Result>
Result expect(Result result, const std::string& path, const std::string& what) {
  if (result >= 0) return result;
  const std::string why = cause();
  H5Eclear2(H5E_DEFAULT);
  fail("{}: {}: {}", path, what, why);
}

// A handle of HDF5's that is closed by its own function.
class Handle {
 public:
  Handle(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {}
  ~Handle() {
    if (id_ >= 0) close_(id_);
  }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  operator hid_t() const { return id_; }

 private:
  hid_t id_;
  herr_t (*close_)(hid_t);
};

// The type in a file: little endian. Text has a width, in bytes.
hid_t file_type(Type type, int64_t width);
std::string describe(hid_t type);  // "int32", "text", …

}  // namespace coil::hdf5
