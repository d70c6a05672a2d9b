#include "pipelines/hdf5_column.h"

#include <fcntl.h>
#include <libdeflate.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "kernels/error.h"

namespace coil::hdf5 {
namespace {

constexpr char kSignature[] = "\x89HDF\r\n\x1a\n";

int open_to_read(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  check(descriptor >= 0, "{}: cannot open: {}", path, std::strerror(errno));
  return descriptor;
}

}  // namespace

const char* name_of(Type type) {
  constexpr const char* kNames[] = {"uint8", "int8",    "int16",   "int32", "uint32",
                                    "int64", "float32", "float64", "text"};
  return kNames[static_cast<int>(type)];
}

int64_t size_of(Type type) {
  constexpr int64_t kSizes[] = {1, 1, 2, 4, 4, 8, 4, 8, 1};
  return kSizes[static_cast<int>(type)];
}

int64_t Layout::row_bytes() const {
  return (type == Type::text ? width : size_of(type)) * std::max<int64_t>(1, columns);
}
int64_t Layout::chunk_rows() const { return std::max<int64_t>(1, kChunkBytes / row_bytes()); }

struct Deflater::Tables {
  libdeflate_compressor* out = libdeflate_alloc_compressor(kLevel);
  libdeflate_decompressor* in = libdeflate_alloc_decompressor();
  ~Tables() {
    libdeflate_free_compressor(out);
    libdeflate_free_decompressor(in);
  }
};

Deflater::Deflater() : tables_(std::make_unique<Tables>()) {
  if (!tables_->out || !tables_->in) throw std::bad_alloc();
}
Deflater::~Deflater() = default;

void Deflater::deflate(std::span<const uint8_t> raw, std::vector<uint8_t>& stored) {
  stored.resize(libdeflate_zlib_compress_bound(tables_->out, raw.size()));
  stored.resize(
      libdeflate_zlib_compress(tables_->out, raw.data(), raw.size(), stored.data(), stored.size()));
  COIL_ASSERT(!stored.empty());
}

bool Deflater::inflate(std::span<const uint8_t> stored, std::span<uint8_t> raw) {
  return libdeflate_zlib_decompress(tables_->in, stored.data(), stored.size(), raw.data(),
                                    raw.size(), nullptr) == LIBDEFLATE_SUCCESS;
}

uint32_t crc32(std::span<const uint8_t> bytes, uint32_t before) {
  // libdeflate takes a null pointer for the begin of a checksum.
  return bytes.empty() ? before : libdeflate_crc32(before, bytes.data(), bytes.size());
}

std::string seal_block(const Seal& seal) {
  std::string block = fmt::format("Coil, HDF5 after these 512 bytes. {} bytes, CRC-32 {:08x}\n",
                                  seal.bytes, seal.crc);
  block.resize(kBlock, '\0');
  return block;
}

int64_t signature_at(const std::string& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0 || !S_ISREG(status.st_mode)) return -1;
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) return -1;
  int64_t found = -1;
  char text[8];
  for (int64_t at = 0; found < 0 && at + 8 <= status.st_size; at = at == 0 ? kBlock : 2 * at)
    if (::pread(descriptor, text, 8, at) == 8 && std::memcmp(text, kSignature, 8) == 0) found = at;
  ::close(descriptor);
  return found;
}

Seal read_seal(const std::string& path) {
  const int descriptor = open_to_read(path);
  std::string block(kBlock, '\0');
  const ssize_t count = ::pread(descriptor, block.data(), block.size(), 0);
  ::close(descriptor);
  Seal seal;
  if (count != kBlock || !block.starts_with("Coil, HDF5 after")) return seal;
  long long bytes = 0;
  unsigned crc = 0;
  const int read = std::sscanf(
      block.c_str(), "Coil, HDF5 after these 512 bytes. %lld bytes, CRC-32 %8x", &bytes, &crc);
  seal = {.present = true, .bytes = bytes, .crc = crc};
  check(read == 2 && block == seal_block(seal), "{}: its first 512 bytes are damaged", path);
  return seal;
}

uint32_t crc32_of_file(const std::string& path, int64_t from, int64_t& bytes,
                       const std::atomic<bool>* stop) {
  const int descriptor = open_to_read(path);
  std::vector<uint8_t> block(1 << 20);
  uint32_t crc = 0;
  bytes = 0;
  for (;;) {
    const ssize_t count = ::pread(descriptor, block.data(), block.size(), from + bytes);
    if (count < 0 && errno == EINTR) continue;
    const int reason = errno;
    if (count <= 0) ::close(descriptor);
    check(count >= 0, "{}: cannot read: {}", path, std::strerror(reason));
    if (count == 0) return crc;
    if (stop && *stop) {
      ::close(descriptor);
      return crc;
    }
    crc = crc32({block.data(), static_cast<size_t>(count)}, crc);
    bytes += count;
  }
}

}  // namespace coil::hdf5
