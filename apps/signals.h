// Ctrl-C and SIGTERM for commands that end in good order: train, generate.
#pragma once

#include <algorithm>
#include <csignal>

namespace coil {

// SIGINT and SIGTERM wait, blocked in every thread that is started from here on, until they are
// asked for between steps. No handler runs: the sgemm of oneDNN 2.6 keeps data further below the
// stack pointer than the 128 bytes that a handler's frame spares, and one Ctrl-C in eight ended in
// a corrupted heap.
class Signals {
 public:
  Signals() {
    sigemptyset(&set_);
    for (const int number : {SIGINT, SIGTERM}) {
      std::signal(number, SIG_DFL);  // a shell starts background jobs with SIGINT ignored
      sigaddset(&set_, number);
    }
    pthread_sigmask(SIG_BLOCK, &set_, &before_);
  }
  ~Signals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;

  // The first that came, else 0. After it a second one ends the program at once.
  int taken() {
    if (first_ > 0) return first_;
    const timespec now = {};
    first_ = sigtimedwait(&set_, nullptr, &now);
    if (first_ > 0) pthread_sigmask(SIG_UNBLOCK, &set_, nullptr);
    return std::max(first_, 0);
  }

 private:
  sigset_t set_, before_;
  int first_ = 0;
};

}  // namespace coil
