// Keeps a streamed record's codes so that its reverse strand can be read from the end: 2 bits a base with runs
// of N beside them; up to 1 MiB in memory, beyond that in an unlinked temporary file (TMPDIR).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace coil {

class Spill {
 public:
  Spill();
  ~Spill();
  void append(std::span<const uint8_t> codes);
  int64_t length() const;
  // Codes [begin, begin+count) of the reverse complement of what was appended.
  void read_reverse(int64_t begin, int64_t count, std::vector<uint8_t>& codes) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace coil
