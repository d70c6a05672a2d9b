// Bytes of a file (plain, gzip or bgzip; "-" is stdin) block by block through htslib's BGZF.
// Errors: cannot open or read; a gzip stream that ends early; a bgzip file without its end marker.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace coil {

class ByteStream {
 public:
  explicit ByteStream(const std::string& path);
  ~ByteStream();
  std::string_view block();      // the next bytes, valid until the next call; empty at the end
  bool line(std::string& text);  // the next line without its end (LF or CRLF); false at the end
  double fraction() const;       // of the file's bytes read so far; negative where it has no size
  const std::string& name() const { return name_; }  // for messages: the path or "standard input"

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  std::string name_;
  std::string_view rest_;  // of the block that line() is in
};

// htslib reports through coil::Error here, never on stderr. Called by whatever opens a file.
void silence_htslib();

}  // namespace coil
