// HDF5 files as columns: one- or two-dimensional datasets of numbers or of texts of one width, in
// chunks of 64 KiB, deflated or not. The only homes of HDF5's API are
// pipelines/hdf5_{handles,writer,reader}.cc.
//
// HDF5 keeps one state for the whole process, so every call stands under one lock. Chunks pass it
// as they are stored (H5Dread_chunk, H5Dwrite_chunk): libdeflate works outside of it.
//
// A file that Writer made begins with a block of 512 bytes, which HDF5 calls a user block and all
// its readers pass over: a line of text with the length and the CRC-32 of what follows. It tells a
// cut file and any byte that has changed, those of HDF5's own structures too.
//
// Errors are one line: the file, what was expected, what was found.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace coil::hdf5 {

constexpr int64_t kBlock = 512;  // bytes before HDF5's own

enum class Type : uint8_t { u8, i8, i16, i32, u32, i64, f32, f64, text };
const char* name_of(Type type);  // "uint8", …
int64_t size_of(Type type);      // bytes; 1 for text, whose width a column says

constexpr int64_t kChunkBytes = 64 << 10;
constexpr int kLevel = 1;  // of deflate

struct Layout {
  Type type = Type::u8;
  int64_t rows = 0;
  int64_t columns = 0;  // 0: one dimension
  int64_t width = 0;    // of text, in bytes, padded with NUL
  bool deflate = true;  // zlib streams, HDF5's filter 1
  int64_t row_bytes() const;
  int64_t chunk_rows() const;  // as many as make kChunkBytes, at least one
};

// zlib streams by libdeflate; one of these per thread.
class Deflater {
 public:
  Deflater();
  ~Deflater();
  Deflater(const Deflater&) = delete;
  Deflater& operator=(const Deflater&) = delete;
  void deflate(std::span<const uint8_t> raw, std::vector<uint8_t>& stored);
  bool inflate(std::span<const uint8_t> stored, std::span<uint8_t> raw);  // false: damaged

 private:
  struct Tables;
  std::unique_ptr<Tables> tables_;
};

uint32_t crc32(std::span<const uint8_t> bytes, uint32_t before = 0);

// Where HDF5's signature stands in a file: 0, or after a user block; -1: it is none, or cannot be
// read.
int64_t signature_at(const std::string& path);
inline bool is_hdf5(const std::string& path) { return signature_at(path) >= 0; }

// What the first 512 bytes say of a file.
struct Seal {
  bool present = false;
  int64_t bytes = 0;  // after the block
  uint32_t crc = 0;
};
Seal read_seal(const std::string& path);  // throws where the block has changed
// CRC-32 of a file from a byte on, and how many bytes that are. `stop`: true ends it early.
uint32_t crc32_of_file(const std::string& path, int64_t from, int64_t& bytes,
                       const std::atomic<bool>* stop = nullptr);

std::string seal_block(const Seal& seal);  // the 512 bytes

}  // namespace coil::hdf5
