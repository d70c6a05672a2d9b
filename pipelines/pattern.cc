#include "pipelines/pattern.h"

#include <regex.h>

#include "kernels/error.h"

namespace coil {

struct Pattern::Compiled {
  regex_t regex;
};

Pattern::Pattern(const std::string& text, const std::string& option)
    : compiled_(std::make_unique<Compiled>()), text_(text), option_(option) {
  const int error = regcomp(&compiled_->regex, text.c_str(), REG_EXTENDED);
  if (error == 0) return;
  char why[256];
  regerror(error, &compiled_->regex, why, sizeof why);
  throw UsageError(fmt::format("{} '{}' is no regular expression: {}", option, text, why));
}

Pattern::~Pattern() { regfree(&compiled_->regex); }

std::string Pattern::find(const std::string& name) const {
  regmatch_t match[2];
  check(regexec(&compiled_->regex, name.c_str(), 2, match, 0) == 0, "'{}' does not match {} '{}'",
        name, option_, text_);
  const regmatch_t& part = match[match[1].rm_so >= 0 ? 1 : 0];
  return name.substr(static_cast<size_t>(part.rm_so), static_cast<size_t>(part.rm_eo - part.rm_so));
}

}  // namespace coil
