#include "pipelines/workers.h"

#include <algorithm>
#include <utility>

#include "kernels/error.h"

namespace coil {

Workers::Workers(Backend& whole) : whole_(whole) {
  if (whole.device().kind == Device::Kind::cpu) count_ = std::clamp(whole.threads(), 1, kMost);
  workers_.resize(count_);
  for (int i = 1; i < count_; i++) workers_[i].thread = std::thread([this, i] { serve(i); });
}

Workers::~Workers() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  for (int i = 1; i < count_; i++) workers_[i].thread.join();
}

// A backend is used by its worker alone.
void Workers::work_on(int i) {
  Worker& worker = workers_[i];
  try {
    if (n_ == 1) {
      (*work_)(i, whole_);
      return;
    }
    const int threads = whole_.threads() / n_;
    std::unique_ptr<Backend>& backend = worker.backends[threads];
    if (!backend) backend = make_cpu_backend(threads);
    (*work_)(i, *backend);
  } catch (...) {
    worker.error = std::current_exception();
  }
}

void Workers::serve(int i) {
  for (int64_t seen = 0;;) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stop_ || (turn_ > seen && i < n_); });
      if (stop_) return;
      seen = turn_;
    }
    work_on(i);
    const std::lock_guard lock(mutex_);
    left_ -= 1;
    if (left_ == 0) changed_.notify_all();
  }
}

void Workers::run(int n, const std::function<void(int, Backend&)>& work) {
  COIL_ASSERT(n >= 1 && n <= count_);
  {
    const std::lock_guard lock(mutex_);
    work_ = &work;
    n_ = n;
    left_ = n - 1;
    turn_ += 1;
  }
  if (n > 1) changed_.notify_all();
  work_on(0);
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return left_ == 0; });
    n_ = 0;
  }
  for (Worker& worker : workers_) {
    if (worker.error) std::rethrow_exception(std::exchange(worker.error, nullptr));
  }
}

}  // namespace coil
