// Keeps a streamed record's codes so that its reverse strand can be read from the end: 2 bits a
// base and a bit of mask for N, in pages of 64 Ki bases; up to 1 MiB in memory, beyond that in an
// unlinked temporary file (TMPDIR, else /tmp), in which the masks of pages without N are holes: 25
// MB of disk for 100 Mb. Errors: the temporary file cannot be made, written (full disk) or read.
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
  Spill(Spill&&) noexcept;
  Spill& operator=(Spill&&) noexcept;
  void append(std::span<const uint8_t> codes);  // A C G T N only
  int64_t length() const;
  // Codes [begin, begin+count) of what was appended, or of its reverse complement. Both keep the
  // page last read: one thread at a time.
  void read(int64_t begin, int64_t count, std::vector<uint8_t>& codes) const;
  void read_reverse(int64_t begin, int64_t count, std::vector<uint8_t>& codes) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace coil
