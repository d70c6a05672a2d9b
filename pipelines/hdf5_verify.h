// Is a dataset, or what there is of one that was not finished, as it was written?
#pragma once

#include <string>
#include <vector>

namespace coil {

struct Verdict {
  std::vector<std::string> damages;  // a line each; none: all is as it was written
  std::vector<std::string> notes;    // what could not be looked at, or is still to be done
  std::string summary;               // of what is whole
};

// Reads all of it: the length and the checksum of the file and, where these are right or another
// program wrote the file anew, the shapes and the checksum of every dataset and chunk. Where `path`
// does not exist and PATH.parts does: each of its parts, and that none is missing. Throws where
// there is nothing to look at.
Verdict verify_dataset(const std::string& path, int threads);

}  // namespace coil
