// Errors of two families.
//   coil::Error   what a user, a file or a device got wrong: thrown, caught once in apps/main.cc,
//   printed as
//                 one line "coil train: <message>" and, where there is one, "hint: <hint>"; exit
//                 status 1.
//   COIL_ASSERT   our own bug: prints expression, file and line, aborts. Never on a caller's input.
// A message names the thing, what was expected and what was found.
#pragma once

#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

namespace coil {

class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message, std::string hint = {})
      : std::runtime_error(message), hint_(std::move(hint)) {}
  const std::string& hint() const { return hint_; }  // empty: none

 private:
  std::string hint_;
};

// A command line that cannot be understood: exit status 2 instead of 1.
class UsageError : public Error {
 public:
  using Error::Error;
};

// A device without room for what was asked: less at a time may fit.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

template <class... Parts>
[[noreturn]] void fail(fmt::format_string<Parts...> format, Parts&&... parts) {
  throw Error(fmt::format(format, std::forward<Parts>(parts)...));
}

template <class... Parts>
void check(bool ok, fmt::format_string<Parts...> format, Parts&&... parts) {
  if (!ok) [[unlikely]]
    throw Error(fmt::format(format, std::forward<Parts>(parts)...));
}

}  // namespace coil

#define COIL_ASSERT(condition)                                                          \
  do {                                                                                  \
    if (!(condition)) [[unlikely]] {                                                    \
      std::fprintf(stderr, "coil: bug: %s at %s:%d\n", #condition, __FILE__, __LINE__); \
      std::abort();                                                                     \
    }                                                                                   \
  } while (0)
