// libFuzzer: any header in front of any data. It is refused by a coil::Error, or every tensor lies
// within the data.
//   fuzz_safetensors -max_total_time=300 CORPUS
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "kernels/error.h"
#include "model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  if (size < 2) return 0;
  uint16_t data_bytes = 0;  // the first two bytes say how much data follows the header
  std::memcpy(&data_bytes, bytes, 2);
  const std::string_view header(reinterpret_cast<const char*>(bytes) + 2, size - 2);
  try {
    int64_t total = 0;
    for (const auto& [name, tensor] : coil::parse_safetensors_header(header, data_bytes, "fuzz")) {
      int64_t bytes_needed = coil::size_of(tensor.type);
      for (const int64_t extent : tensor.shape) {
        if (extent < 0) std::abort();
        bytes_needed = extent == 0 || bytes_needed == 0 ? 0 : bytes_needed * extent;
      }
      if (tensor.begin < 0 || tensor.begin > tensor.end || tensor.end > data_bytes) std::abort();
      if (tensor.end - tensor.begin != bytes_needed) std::abort();
      total += bytes_needed;
    }
    if (total != data_bytes) std::abort();  // neither overlap nor gap
  } catch (const coil::Error& error) {
    if (std::strchr(error.what(), '\n')) std::abort();  // one line
  }
  return 0;
}
