// The DNA alphabet. Token ids: 0 is none, A 1, C 2, G 3, T 4, N 5; vocabulary 16. Lower case is a
// soft-mask and ignored; U reads as T; the IUPAC codes R Y S W K M B D H V and the mask letter X
// read as N. Gaps ('-', '.') are left out of FASTA and tables, where they come from alignments; in
// FASTQ, BAM and regions, where every letter has a place of its own, they read as N. Everything
// else ('*', E F I L P Q Z J O, digits, NUL, …) is no DNA letter: an error that names it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace coil::dna {

constexpr uint8_t kNone = 0, kA = 1, kC = 2, kG = 3, kT = 4, kN = 5;
constexpr uint8_t kMask = 6;  // in place of a base that is to be told
constexpr int64_t kVocab = 16;
constexpr uint8_t kInvalid = 255;

uint8_t code_of(char base);    // kInvalid for what is no DNA letter, gaps and white space too
char letter_of(uint8_t code);  // "ACGTN"; '?' for any other code
inline uint8_t complement(uint8_t code) { return code >= kA && code <= kT ? 5 - code : code; }
void reverse_complement(std::span<uint8_t> codes);  // in place

enum class Gaps : uint8_t { skip, as_n };
// Appends the codes of `text`; white space is left out. Returns text.size(), or the place of the
// first byte that is no DNA letter, `codes` then ending with what stood before it.
size_t encode(std::string_view text, Gaps gaps, std::vector<uint8_t>& codes);
bool is_skipped(char byte, Gaps gaps);  // white space, or a gap that is left out

// For messages: "'L' …, which is no DNA letter (protein given as DNA?)" is spelled the same
// everywhere.
std::string describe(char byte);     // 'L' or byte 0x00
std::string why_not_dna(char byte);  // "which is no DNA letter (protein given as DNA?)"

}  // namespace coil::dna
