#include "genomics/alphabet.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>

namespace coil::dna {
namespace {

// Values of the tables beside the codes: both have the top bit, so that one OR over a line tells
// that the line holds something else than letters.
constexpr uint8_t kSkipped = 254;

using Table = std::array<uint8_t, 256>;

constexpr void set(Table& table, std::string_view letters, uint8_t code) {
  for (char letter : letters) {
    table[static_cast<uint8_t>(letter)] = code;
    if (letter >= 'A' && letter <= 'Z') table[static_cast<uint8_t>(letter - 'A' + 'a')] = code;
  }
}

constexpr Table make_table(uint8_t gap) {
  Table table{};
  for (uint8_t& code : table) code = kInvalid;
  set(table, "A", kA);
  set(table, "C", kC);
  set(table, "G", kG);
  set(table, "TU", kT);
  set(table, "NRYSWKMBDHVX", kN);
  set(table, "-.", gap);
  set(table, " \t\r\n\v\f", kSkipped);
  return table;
}

constexpr Table kSkipping = make_table(kSkipped), kGapIsN = make_table(kN);

const Table& table_of(Gaps gaps) { return gaps == Gaps::skip ? kSkipping : kGapIsN; }

}  // namespace

uint8_t code_of(char base) {
  const uint8_t code = kSkipping[static_cast<uint8_t>(base)];
  return code == kSkipped ? kInvalid : code;
}

char letter_of(uint8_t code) { return code >= kA && code <= kN ? "?ACGTN"[code] : '?'; }

void reverse_complement(std::span<uint8_t> codes) {
  std::reverse(codes.begin(), codes.end());
  for (uint8_t& code : codes) code = complement(code);
}

size_t encode(std::string_view text, Gaps gaps, std::vector<uint8_t>& codes) {
  const Table& table = table_of(gaps);
  const size_t before = codes.size();
  codes.resize(before + text.size());
  uint8_t* out = codes.data() + before;
  uint8_t seen = 0;
  for (size_t i = 0; i < text.size(); ++i) seen |= out[i] = table[static_cast<uint8_t>(text[i])];
  if (!(seen & 0x80)) return text.size();
  // Rare: something to leave out or to complain about.
  size_t kept = 0, i = 0;
  for (; i < text.size() && out[i] != kInvalid; ++i)
    if (out[i] != kSkipped) out[kept++] = out[i];
  codes.resize(before + kept);
  return i;
}

bool is_skipped(char byte, Gaps gaps) {
  return table_of(gaps)[static_cast<uint8_t>(byte)] == kSkipped;
}

std::string describe(char byte) {
  const auto value = static_cast<uint8_t>(byte);
  return value > 32 && value < 127 ? fmt::format("'{}'", byte)
                                   : fmt::format("byte 0x{:02x}", value);
}

std::string why_not_dna(char byte) {
  const bool protein = byte && std::strchr("EFILPQZJOefilpqzjo*", byte);
  return protein ? "which is no DNA letter (protein given as DNA?)" : "which is no DNA letter";
}

}  // namespace coil::dna
