// Files of results as text: what `coil dataset head` and `info` print of them.
#pragma once

#include <cstdint>
#include <string>

#include "apps/command.h"

namespace coil {

// A line for each of the first `most` units, under the names of columns that classify and score
// use.
void print_results(const std::string& path, int64_t most, Output& out);
void print_results_info(const std::string& path, Output& out);

}  // namespace coil
