// MODEL on a command line: a folder, or the name of a model that ships with Coil.
#pragma once

#include <string>

namespace coil {

// The folder that `model` stands for. Paths with a '/', and folders that are here, stand for
// themselves; any other name is looked for in the folders of COIL_MODELS, then in those that ship
// with the program. Throws where there is none of that name, saying where it looked. `except`: a
// folder that it does not stand for, which may not be there.
std::string find_model(const std::string& model, const std::string& except = "");

}  // namespace coil
