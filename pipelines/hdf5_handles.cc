#include "pipelines/hdf5_handles.h"

#include <algorithm>

namespace coil::hdf5 {

Lock::Lock() : guard_(mutex()) {
  // Before all else. HDF5's tidying at exit would write once more what could not be written, and
  // crash.
  [[maybe_unused]] static const herr_t once = H5dont_atexit();
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

std::recursive_mutex& Lock::mutex() {
  static std::recursive_mutex one;
  return one;
}

std::string cause() {
  std::string text;
  const auto first = [](unsigned, const H5E_error2_t* error, void* out) -> herr_t {
    auto& found = *static_cast<std::string*>(out);
    if (found.empty() && error->desc) found = error->desc;
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, first, &text);
  // "file write failed: time = …, errno = 28, error message = 'No space left on device', …"
  constexpr char kMessage[] = "error message = '";
  if (const size_t at = text.find(kMessage); at != std::string::npos) {
    text.erase(0, at + sizeof kMessage - 1);
    text.resize(std::min(text.size(), text.find('\'')));
  }
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text.empty() ? "HDF5 gives no reason" : text;
}

hid_t file_type(Type type, int64_t width) {
  switch (type) {
    case Type::u8:
      return H5Tcopy(H5T_STD_U8LE);
    case Type::i8:
      return H5Tcopy(H5T_STD_I8LE);
    case Type::i16:
      return H5Tcopy(H5T_STD_I16LE);
    case Type::i32:
      return H5Tcopy(H5T_STD_I32LE);
    case Type::u32:
      return H5Tcopy(H5T_STD_U32LE);
    case Type::i64:
      return H5Tcopy(H5T_STD_I64LE);
    case Type::f32:
      return H5Tcopy(H5T_IEEE_F32LE);
    case Type::f64:
      return H5Tcopy(H5T_IEEE_F64LE);
    case Type::text:
      break;
  }
  const hid_t text = H5Tcopy(H5T_C_S1);
  H5Tset_size(text, static_cast<size_t>(width));
  H5Tset_strpad(text, H5T_STR_NULLPAD);
  H5Tset_cset(text, H5T_CSET_UTF8);
  return text;
}

std::string describe(hid_t type) {
  const int64_t bits = 8 * static_cast<int64_t>(H5Tget_size(type));
  switch (H5Tget_class(type)) {
    case H5T_INTEGER:
      return fmt::format("{}int{}", H5Tget_sign(type) == H5T_SGN_NONE ? "u" : "", bits);
    case H5T_FLOAT:
      return fmt::format("float{}", bits);
    case H5T_STRING:
      return H5Tis_variable_str(type) > 0 ? "text of any length" : "text";
    default:
      return "of another type";
  }
}

}  // namespace coil::hdf5
