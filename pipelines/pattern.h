// A POSIX extended regular expression over names: the first group where it has one, else the match.
#pragma once

#include <memory>
#include <string>

namespace coil {

class Pattern {
 public:
  Pattern(const std::string& text, const std::string& option);  // throws UsageError, naming both
  ~Pattern();
  std::string find(const std::string& name) const;  // throws where the name does not match

 private:
  struct Compiled;
  std::unique_ptr<Compiled> compiled_;
  std::string text_, option_;
};

}  // namespace coil
