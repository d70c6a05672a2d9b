#include "pipelines/batch.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <filesystem>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "kernels/error.h"
#include "pipelines/classify.h"
#include "pipelines/embed.h"
#include "pipelines/score.h"

namespace coil {
namespace {

// The first record of each part, and the number of records; bases or samples before each.
struct Parts {
  std::vector<int64_t> records, codes;
  int64_t count() const { return static_cast<int64_t>(records.size()) - 1; }
};

Parts parts_of(const Dataset& dataset, int64_t part_size) {
  constexpr int64_t kBlock = 1 << 16;
  Parts parts;
  int64_t last = -1;
  for (int64_t first = 0; first < dataset.records(); first += kBlock) {
    const int64_t count = std::min(kBlock, dataset.records() - first);
    const std::vector<int64_t> offsets = dataset.offsets(first, count);
    for (int64_t i = 0; i < count; ++i)
      if (const int64_t part = offsets[i] / part_size; part != last) {
        parts.records.push_back(first + i);
        parts.codes.push_back(offsets[i]);
        last = part;
      }
  }
  parts.records.push_back(dataset.records());
  parts.codes.push_back(dataset.size());
  return parts;
}

// Parts are taken one after another by threads; the first error ends the work.
class PartPool {
 public:
  PartPool(const std::vector<Backend*>& backends, std::vector<int64_t> units,
           std::function<void(Backend&, int64_t)> compute, std::atomic<bool>& stop)
      : units_(std::move(units)), compute_(std::move(compute)), stop_(stop) {
    for (Backend* backend : backends) threads_.emplace_back([this, backend] { work(*backend); });
  }
  // Waits some time, or until all have ended; true when they have.
  bool wait() {
    std::unique_lock lock(mutex_);
    return ended_.wait_for(lock, std::chrono::milliseconds(200),
                           [this] { return done_ == threads_.size(); });
  }
  void join() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    if (error_) std::rethrow_exception(error_);
  }
  ~PartPool() {
    if (!threads_.empty()) stop_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  void work(Backend& backend) {
    try {
      for (size_t i; !stop_ && (i = next_++) < units_.size();) compute_(backend, units_[i]);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      stop_ = true;
    }
    std::lock_guard lock(mutex_);
    ++done_;
    ended_.notify_all();
  }
  std::vector<int64_t> units_;
  std::function<void(Backend&, int64_t)> compute_;
  std::atomic<size_t> next_ = 0;
  std::atomic<bool>& stop_;  // set by the first error too: the others end between batches
  std::mutex mutex_;
  std::condition_variable ended_;
  std::exception_ptr error_;
  size_t done_ = 0;
  std::vector<std::thread> threads_;
};

struct Interrupted {};

// One that was damaged is computed again.
bool whole(const PartStore& store, int64_t unit) {
  if (!store.has(unit)) return false;
  try {
    store.read(unit);
    return true;
  } catch (const Error&) {  // written over when it is there again
    return false;
  }
}

}  // namespace

const char* name_of(Task task) {
  return task == Task::classify ? "classify" : task == Task::score ? "score" : "embed";
}

ResultsAbout results_about(Task task, const Config& config, bool per_position, Pooling pooling,
                           const std::string& layer) {
  using hdf5::Type;
  ResultsAbout about;
  about.task = name_of(task);
  switch (task) {
    case Task::classify:
      about.classes = config.labels;
      about.columns = {{"probabilities", Type::f32, static_cast<int64_t>(config.labels.size())},
                       {"labels", Type::i32}};
      break;
    case Task::score:
      about.columns = {{"log_likelihood", Type::f64}, {"counted", Type::f64}};
      if (per_position) about.columns.push_back({"log_likelihoods", Type::f32, 0, true});
      break;
    case Task::embed:
      about.columns = {{"vectors", Type::f32, config.d, per_position}};
      about.layer = layer;
      about.pooling = per_position ? "none" : pooling == Pooling::mean ? "mean" : "last";
  }
  return about;
}

void compute_results(Backend& backend, const Model& model, Source& source, const BatchWork& work,
                     ResultPart& part, const std::function<void()>& some,
                     const std::function<void(const Stream&)>& progress) {
  if (work.task == Task::classify) {
    std::vector<float> row;
    const auto emit = [&](const Answer& answer) {
      part.unit(answer.name, answer.begin, answer.end);
      row.assign(answer.probabilities.begin(), answer.probabilities.end());
      part.add("probabilities", row.data(), row.size());
      part.add("labels", &answer.label, 1);
      some();
    };
    classify(backend, model, source,
             {.stream = work.stream, .files = {}, .min_probability = work.min_probability}, emit,
             progress);
    return;
  }
  int64_t positions = 0;  // of the unit that is coming
  if (work.task == Task::score) {
    const auto emit = [&](const Score& score) {
      part.unit(score.name, score.begin, score.end, positions);
      part.add("log_likelihood", &score.log_likelihood, 1);
      part.add("counted", &score.counted, 1);
      positions = 0;
      some();
    };
    const auto take = [&](std::span<const float> values) {
      part.add("log_likelihoods", values.data(), values.size());
      positions += static_cast<int64_t>(values.size());
      some();
    };
    score(backend, model, source, {.stream = work.stream, .per_position = work.per_position}, emit,
          {}, progress, take);
    return;
  }
  int64_t begin = -1;
  const auto emit = [&](const Embedding& embedding) {
    if (begin < 0) begin = embedding.begin;
    part.add("vectors", embedding.values.data(), embedding.values.size());
    if (work.per_position) positions += embedding.end - embedding.begin;
    if (embedding.last) {
      part.unit(embedding.name, begin, embedding.end, positions);
      begin = -1;
      positions = 0;
    }
    some();
  };
  embed(backend, model, source,
        {.stream = work.stream, .pooling = work.pooling, .per_position = work.per_position}, emit,
        progress);
}

BatchDone batch(const std::vector<Backend*>& backends, const Model& model,
                std::shared_ptr<const Dataset> dataset, const BatchWork& work) {
  const Parts parts = parts_of(*dataset, work.part_size);
  ResultsAbout about =
      results_about(work.task, model.config, work.per_position, work.pooling, work.layer);
  about.sources = work.sources;
  about.manifest = work.manifest;
  about.parts_all = parts.count();
  about.parts_first = parts.count() * (work.shard - 1) / work.shards;
  about.parts_end = parts.count() * work.shard / work.shards;
  BatchDone done{.parts = about.parts_end - about.parts_first};

  auto of_shard = nlohmann::ordered_json::parse(work.manifest);
  of_shard["shard"] = fmt::format("{}/{}", work.shard, work.shards);
  const std::string manifest = of_shard.dump();
  const OutputLock lock(work.out, work.force);
  if (std::filesystem::exists(work.out)) {
    const hdf5::Reader file(work.out);
    const ResultsAbout then = read_results_about(file);
    std::string differing = manifest_differences(then.manifest, work.manifest);
    if (differing.empty() &&
        (then.parts_first != about.parts_first || then.parts_end != about.parts_end))
      differing = fmt::format("shard (parts {} to {} then, {} to {} now)", then.parts_first,
                              then.parts_end, about.parts_first, about.parts_end);
    if (!differing.empty())
      throw Error(fmt::format("'{}' exists and is of other work: {}", work.out, differing),
                  "name another output, or remove it");
    int64_t bytes = 0;
    check(hdf5::crc32_of_file(work.out, hdf5::kBlock, bytes) == hdf5::read_seal(work.out).crc,
          "'{}' exists, of the same work, and is damaged: remove it to make it anew", work.out);
    if (PartStore::exist(work.out)) PartStore(work.out, manifest).remove();
    done.stood = true;
    return done;
  }
  PartStore store(work.out, manifest);
  std::vector<int64_t> missing;
  int64_t all = 0;
  for (int64_t i = about.parts_first; i < about.parts_end; ++i) {
    if (whole(store, i)) continue;
    missing.push_back(i);
    all += parts.codes[i + 1] - parts.codes[i];
  }
  done.found = done.parts - static_cast<int64_t>(missing.size());

  std::atomic<int64_t> finished = 0;
  std::atomic<bool> stop = false;
  const auto compute = [&](Backend& own, int64_t i) {
    DatasetReading reading = work.reading;
    reading.first = parts.records[i];
    reading.end = parts.records[i + 1];
    reading.threads = 1;
    const std::unique_ptr<Source> source = open_dataset(dataset, reading);
    ResultPart part;
    const int64_t size = parts.codes[i + 1] - parts.codes[i];
    const int64_t each = dataset->what().step() * (work.stream.strands == Strands::both ? 2 : 1);
    int64_t told = 0;
    if (stop) throw Interrupted();
    compute_results(
        own, model, *source, work, part, [] {},
        [&](const Stream& stream) {
          if (stop) throw Interrupted();
          const int64_t now = std::clamp(stream.steps() / each, told, size);
          finished += now - told;
          told = now;
        });
    store.write(i, part.take());
    finished += size - told;
  };
  {
    PartPool pool(backends, missing, compute, stop);
    while (!pool.wait()) {
      if (work.progress) work.progress(finished, all);
      if (work.interrupted && work.interrupted()) stop = true;
    }
    try {
      pool.join();
    } catch (const Interrupted&) {
    }
  }
  if (stop) {
    done.interrupted = true;
    return done;
  }
  assemble_results(work.out, about, store);
  store.remove();
  return done;
}

}  // namespace coil
