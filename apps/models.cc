#include "apps/models.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <vector>

#include "apps/command.h"
#include "kernels/error.h"

namespace coil {
namespace {

namespace fs = std::filesystem;

bool is_model(const fs::path& folder) {
  std::error_code error;
  return fs::is_regular_file(folder / "config.json", error);
}

// Folders of models, in the order in which they are searched.
std::vector<fs::path> model_folders() {
  std::vector<fs::path> folders;
  if (const char* listed = std::getenv("COIL_MODELS")) {
    std::istringstream list(listed);
    for (std::string folder; std::getline(list, folder, ':');)
      if (!folder.empty()) folders.emplace_back(folder);
  }
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error).parent_path();
  if (error) return folders;
  if (const fs::path source = program.parent_path().parent_path();  // of SOURCE/build/cpu/coil
      program.parent_path().filename() == "build" && fs::exists(source / "CMakeLists.txt", error))
    folders.push_back(source / "models");
  else if (fs::is_directory(program / "models", error))  // beside the program: scripts/package
    folders.push_back(program / "models");
  else
    folders.push_back(program.parent_path() / COIL_SHARE / "models");  // of PREFIX/bin/coil
  return folders;
}

std::vector<std::string> models_in(const std::vector<fs::path>& folders) {
  std::vector<std::string> names;
  std::error_code error;
  for (const fs::path& folder : folders)
    for (const auto& entry : fs::directory_iterator(folder, error))
      if (is_model(entry.path())) names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  names.erase(std::unique(names.begin(), names.end()), names.end());
  return names;
}

}  // namespace

std::string find_model(const std::string& model, const std::string& except) {
  std::error_code error;
  const bool here = fs::is_directory(model, error) && !fs::equivalent(model, except, error);
  if (model.empty() || model.find('/') != std::string::npos || here) return model;
  const std::vector<fs::path> folders = model_folders();
  std::string looked = ".";
  for (const fs::path& folder : folders) {
    if (is_model(folder / model)) return (folder / model).string();
    looked += fmt::format(", {}", folder.string());
  }
  const std::vector<std::string> names = models_in(folders);
  throw Error(fmt::format("no model '{}': looked for a folder of that name in {}", model, looked),
              names.empty() ? "MODEL is a folder, or a name in one of the folders of COIL_MODELS"
                            : fmt::format("models found: {}", fmt::join(names, ", ")));
}

}  // namespace coil
