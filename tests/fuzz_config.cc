// libFuzzer: any text as config.json. It is refused by a coil::Error of one line, or what was
// understood can be written and is read back the same.
//   fuzz_config -max_total_time=300 CORPUS
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "kernels/error.h"
#include "model/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  const std::string text(reinterpret_cast<const char*>(bytes), size);
  try {
    const coil::Config config = coil::parse_config(text, "fuzz");
    const std::string written = coil::to_json(config);
    try {
      if (coil::to_json(coil::parse_config(written, "fuzz")) != written) std::abort();
    } catch (const coil::Error&) {
      std::abort();  // refuses what it wrote itself
    }
  } catch (const coil::Error& error) {
    if (std::strchr(error.what(), '\n')) std::abort();
  }
  return 0;
}
