// Text in HDF5 is declared UTF-8, and h5py's asstr() raises UnicodeDecodeError for a whole column
// where one row is not. Names come from files that declare nothing: what is no UTF-8 is read as
// Latin-1, in which every byte is a character: nothing is lost.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace coil {

// RFC 3629: no overlong forms, no surrogates, nothing past U+10FFFF.
inline bool is_utf8(std::string_view text) {
  constexpr uint32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<uint8_t>(text[i]);
    const int more = lead < 0x80 ? 0 : lead < 0xc0 ? -1 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
    if (more < 0 || lead > 0xf4 || text.size() - i <= static_cast<size_t>(more)) return false;
    uint32_t code = more == 0 ? lead : lead & (0x3f >> more);
    for (int j = 1; j <= more; ++j) {
      const auto byte = static_cast<uint8_t>(text[i + static_cast<size_t>(j)]);
      if ((byte & 0xc0) != 0x80) return false;
      code = code << 6 | (byte & 0x3f);
    }
    if (code < kLeast[more] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
    i += static_cast<size_t>(more) + 1;
  }
  return true;
}

inline std::string as_utf8(const std::string& text) {
  if (is_utf8(text)) return text;
  std::string wide;
  for (const char letter : text) {
    const auto byte = static_cast<uint8_t>(letter);
    if (byte >= 0x80) wide += static_cast<char>(0xc0 | byte >> 6);
    wide += static_cast<char>(byte < 0x80 ? byte : 0x80 | (byte & 0x3f));
  }
  return wide;
}

}  // namespace coil
