// Looks into files of audio for what libsndfile passes over in silence.
#pragma once

#include <string>

namespace coil::audio {

// Throws where an Ogg file does not end its stream, or an RF64 or Wave64 file is shorter than its
// header says.
void check_end(const std::string& path);

// ": 0 Hz, 2 channels" of the header of a WAV file; else empty.
std::string wav_header_text(const std::string& path);

}  // namespace coil::audio
