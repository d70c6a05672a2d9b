// FNV-1a: names data that must be the same again. Not against forgery.
#pragma once

#include <cstddef>
#include <cstdint>

namespace coil {

constexpr uint64_t kHashStart = 0xcbf29ce484222325;

inline uint64_t hash_bytes(const void* data, size_t bytes, uint64_t hash = kHashStart) {
  const auto* const at = static_cast<const uint8_t*>(data);
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ at[i]) * 0x100000001b3;
  return hash;
}

}  // namespace coil
