#include "genomics/spill.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>

#include "genomics/alphabet.h"
#include "kernels/error.h"

namespace coil {
namespace {

constexpr int64_t kPage = 1 << 16;          // bases
constexpr int64_t kPacked = kPage / 4;      // bytes of two bits a base
constexpr int64_t kMask = kPage / 8;        // bytes of one bit a base: N
constexpr int64_t kSlot = kPacked + kMask;  // of the file: page i lies at i · kSlot
constexpr size_t kPagesInMemory = (1 << 20) / kSlot;

struct Page {
  std::array<uint8_t, kPacked> bases{};
  std::array<uint8_t, kMask> mask{};
  bool masked = false;
};

void pack(std::span<const uint8_t> codes, Page& page) {
  page.masked = false;
  for (size_t i = 0; i < codes.size(); ++i) {
    COIL_ASSERT(codes[i] >= dna::kA && codes[i] <= dna::kN);
    if (codes[i] == dna::kN) {
      page.mask[i / 8] |= 1 << i % 8;
      page.masked = true;
    } else {
      page.bases[i / 4] |= (codes[i] - dna::kA) << 2 * (i % 4);
    }
  }
}

void unpack(const Page& page, std::vector<uint8_t>& codes) {
  codes.resize(kPage);
  for (int64_t i = 0; i < kPage; ++i) codes[i] = dna::kA + (page.bases[i / 4] >> 2 * (i % 4) & 3);
  for (int64_t i = 0; i < kMask; ++i)
    for (int bit = 0; page.mask[i] >> bit; ++bit)
      if (page.mask[i] >> bit & 1) codes[8 * i + bit] = dna::kN;
}

}  // namespace

struct Spill::Impl {
  std::vector<uint8_t> tail;  // codes of the page that is being filled
  std::vector<Page> pages;    // whole pages in memory, after those in the file
  int64_t pages_in_file = 0;
  int file = -1;
  std::string folder;          // of the file, for messages
  std::vector<uint8_t> codes;  // of page `unpacked`
  int64_t unpacked = -1;

  ~Impl() {
    if (file >= 0) ::close(file);
  }

  [[noreturn]] void fail_file(const char* what) const {
    throw Error(
        fmt::format("{}: cannot {} a temporary file: {}", folder, what, std::strerror(errno)),
        "set TMPDIR to a folder with room for a quarter byte per base of the longest record");
  }

  void open() {
    const char* set = std::getenv("TMPDIR");
    folder = set && *set ? set : "/tmp";
    std::string path = folder + "/coil-XXXXXX";
    file = ::mkstemp(path.data());
    if (file < 0) fail_file("make");
    ::unlink(path.c_str());
  }

  void write(const uint8_t* bytes, int64_t count, int64_t at) {
    while (count > 0) {
      const ssize_t n = ::pwrite(file, bytes, count, at);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) fail_file("write");
      bytes += n, count -= n, at += n;
    }
  }

  void flush() {
    if (file < 0) open();
    for (const Page& page : pages) {
      const int64_t at = pages_in_file++ * kSlot;
      write(page.bases.data(), kPacked, at);
      if (page.masked) write(page.mask.data(), kMask, at + kPacked);
    }
    pages.clear();
    // The last slot whole, so that reading it does not stop short.
    if (::ftruncate(file, pages_in_file * kSlot) != 0) fail_file("write");
  }

  void read(int64_t index, Page& page) {
    std::vector<uint8_t> slot(kSlot);
    for (int64_t done = 0; done < kSlot;) {
      const ssize_t n = ::pread(file, slot.data() + done, kSlot - done, index * kSlot + done);
      if (n < 0 && errno == EINTR) continue;
      if (n == 0) errno = EIO;
      if (n <= 0) fail_file("read");
      done += n;
    }
    std::copy_n(slot.begin(), kPacked, page.bases.begin());
    std::copy_n(slot.begin() + kPacked, kMask, page.mask.begin());
  }

  // Codes of page `index`; of the last one, only what has been appended.
  const uint8_t* page(int64_t index) {
    const int64_t whole = pages_in_file + static_cast<int64_t>(pages.size());
    if (index == whole) return tail.data();
    if (index == unpacked) return codes.data();
    if (index >= pages_in_file) {
      unpack(pages[index - pages_in_file], codes);
    } else {
      Page page;
      read(index, page);
      unpack(page, codes);
    }
    unpacked = index;
    return codes.data();
  }
};

Spill::Spill() : impl_(std::make_unique<Impl>()) {}
Spill::~Spill() = default;
Spill::Spill(Spill&&) noexcept = default;
Spill& Spill::operator=(Spill&&) noexcept = default;

void Spill::append(std::span<const uint8_t> codes) {
  Impl& spill = *impl_;
  while (!codes.empty()) {
    const size_t n = std::min(codes.size(), kPage - spill.tail.size());
    spill.tail.insert(spill.tail.end(), codes.begin(), codes.begin() + n);
    codes = codes.subspan(n);
    if (spill.tail.size() < kPage) break;
    pack(spill.tail, spill.pages.emplace_back());
    spill.tail.clear();
    if (spill.pages.size() == kPagesInMemory) spill.flush();
  }
}

int64_t Spill::length() const {
  return (impl_->pages_in_file + static_cast<int64_t>(impl_->pages.size())) * kPage +
         static_cast<int64_t>(impl_->tail.size());
}

void Spill::read(int64_t begin, int64_t count, std::vector<uint8_t>& codes) const {
  read_reverse(length() - begin - count, count, codes);
  dna::reverse_complement(codes);
}

void Spill::read_reverse(int64_t begin, int64_t count, std::vector<uint8_t>& codes) const {
  COIL_ASSERT(begin >= 0 && count >= 0 && begin + count <= length());
  codes.resize(count);
  // Forward positions [end - count, end), read from the end, page by page.
  int64_t end = length() - begin;
  for (int64_t out = 0; out < count;) {
    const int64_t index = (end - 1) / kPage;
    const int64_t from = std::max(index * kPage, end - (count - out));
    const uint8_t* page = impl_->page(index);
    while (end > from) codes[out++] = dna::complement(page[--end - index * kPage]);
  }
}

}  // namespace coil
