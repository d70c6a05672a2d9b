// The DNA alphabet. Token ids: 0 is none, A 1, C 2, G 3, T 4, N 5; vocabulary 16. U reads as T; IUPAC codes
// (R Y S W K M B D H V) and '.', '-', '*' … read as the table in alphabet.cc says; case is a soft-mask and ignored.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace coil::dna {

constexpr uint8_t kNone = 0, kA = 1, kC = 2, kG = 3, kT = 4, kN = 5;
constexpr int64_t kVocab = 16;
constexpr uint8_t kInvalid = 255;

uint8_t code_of(char base);         // kInvalid for what is no DNA letter (E F I L P Q X Z J O, digits, NUL, …)
char letter_of(uint8_t code);       // "ACGTN"
inline uint8_t complement(uint8_t code) { return code >= kA && code <= kT ? 5 - code : code; }
void reverse_complement(std::span<uint8_t> codes);  // in place

}  // namespace coil::dna
