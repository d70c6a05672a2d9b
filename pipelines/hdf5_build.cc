// Values of a part: chunks (as stored, one after another), chunk_bytes and sums (uint32 a chunk);
// of the records that end in it ends, starts (int64), labels (int32, in the order they were found),
// split (int8), name_bytes (uint32), names.
#include "pipelines/hdf5_build.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <future>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>
#include <unordered_map>

#include "kernels/error.h"
#include "model/params.h"
#include "pipelines/hash.h"
#include "pipelines/utf8.h"

namespace coil {
namespace {

constexpr uint32_t kSplitStream = 108;
constexpr int kDrafts = 2;  // parts that wait for their last chunks while the next one is filled

// A part that is being made, or one that was there and is held against what is read again.
struct Draft {
  int64_t unit = 0;
  PartAbout about;
  Part part;  // values of records
  // As stored, and their sums; made for a whole part, so that threads may fill them.
  std::vector<std::vector<uint8_t>> chunks;
  std::vector<uint32_t> sums;
  size_t used = 0;      // chunks in it, when it is closed
  int64_t pending = 1;  // chunks on their way, and one until it is closed
  bool kept = false, compared = true;
  Part before;  // the part that was there
};

// Threads that deflate chunks and write finished parts.
class Team {
 public:
  Team(const BuildOptions& options, const PartStore& parts) : options_(options), parts_(parts) {
    const int threads = options.threads > 0
                            ? options.threads
                            : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    most_ = 4 * static_cast<size_t>(threads);
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }

  ~Team() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void begin(const std::shared_ptr<Draft>&) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return drafts_ <= kDrafts || error_; });
    rethrow();
    ++drafts_;
  }

  void chunk(const std::shared_ptr<Draft>& draft, size_t slot, std::vector<uint8_t> raw) {
    push({draft, slot, std::move(raw)}, 1);
  }

  void close(const std::shared_ptr<Draft>& draft) { push({draft, 0, {}}, 0); }

  void finish() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return drafts_ == 0 || error_; });
    rethrow();
  }

 private:
  struct Job {
    std::shared_ptr<Draft> draft;
    size_t slot;
    std::vector<uint8_t> raw;  // empty: the draft is closed
  };

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

  void push(Job job, int64_t pending) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return jobs_.size() < most_ || error_; });
    rethrow();
    job.draft->pending += pending;
    jobs_.push_back(std::move(job));
    lock.unlock();
    changed_.notify_all();
  }

  void work() {
    hdf5::Deflater deflater;
    for (;;) {
      Job job;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return !jobs_.empty() || stop_; });
        if (jobs_.empty()) return;
        job = std::move(jobs_.front());
        jobs_.pop_front();
      }
      changed_.notify_all();
      try {
        if (!job.raw.empty()) store(job, deflater);
        bool whole;
        {
          std::lock_guard lock(mutex_);
          whole = --job.draft->pending == 0;
        }
        if (!whole) continue;
        finish(*job.draft);
        std::lock_guard lock(mutex_);
        --drafts_;
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
        jobs_.clear();
      }
      changed_.notify_all();
    }
  }

  void store(Job& job, hdf5::Deflater& deflater) const {
    Draft& draft = *job.draft;
    const uint32_t sum = hdf5::crc32(job.raw);
    if (draft.kept) {
      if (!draft.compared) return;
      const auto sums = draft.before.of<uint32_t>("sums");
      if (job.slot >= sums.size() || sums[job.slot] != sum) refuse(draft);
      return;
    }
    draft.sums[job.slot] = sum;
    if (options_.deflate)
      deflater.deflate(job.raw, draft.chunks[job.slot]);
    else
      draft.chunks[job.slot] = std::move(job.raw);
  }

  [[noreturn]] void refuse(const Draft& draft) const {
    throw Error(
        fmt::format("'{}' was begun with other input: what is read now differs from part {}",
                    options_.out, draft.unit),
        fmt::format("remove '{}' to begin anew", parts_.folder()));
  }

  void finish(Draft& draft) const {
    Part& part = draft.part;
    if (draft.kept) {
      if (!draft.compared) return;
      for (const char* name : {"ends", "starts", "labels", "split", "name_bytes", "names"})
        if (!std::ranges::equal(part.of<uint8_t>(name), draft.before.of<uint8_t>(name)))
          refuse(draft);
      return;
    }
    std::vector<uint32_t> bytes;
    std::vector<uint8_t>& all = part.values["chunks"];
    draft.chunks.resize(draft.used);
    draft.sums.resize(draft.used);
    for (std::vector<uint8_t>& chunk : draft.chunks) {
      bytes.push_back(static_cast<uint32_t>(chunk.size()));
      all.insert(all.end(), chunk.begin(), chunk.end());
      chunk = {};
    }
    part.add("chunk_bytes", bytes.data(), bytes.size());
    part.add("sums", draft.sums.data(), draft.sums.size());
    part.about = to_json(draft.about);
    parts_.write(draft.unit, part);
  }

  const BuildOptions& options_;
  const PartStore& parts_;
  size_t most_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  int drafts_ = 0;
  bool stop_ = false;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;  // last: they use all of the above
};

class Builder {
 public:
  Builder(const BuildInput& input, const BuildOptions& options, const PartStore& parts)
      : input_(input), options_(options), parts_(parts), team_(options, parts) {
    const hdf5::Layout layout{.type = input.what.type()};
    width_ = hdf5::size_of(layout.type);
    chunk_bytes_ = static_cast<size_t>(layout.chunk_rows() * width_);
    chunks_ = std::max<int64_t>(1, options.part / static_cast<int64_t>(chunk_bytes_));
    part_size_ = chunks_ * layout.chunk_rows();
  }

  // Returns the number of parts.
  int64_t run() {
    int64_t whole = 0;  // parts 0 … whole-1 are there
    std::vector<PartAbout> there;
    for (; usable(whole); ++whole) there.push_back(parse_about(parts_.about(whole)));
    if (whole > 0 && there.back().last) return whole;
    int64_t first_file = 0;
    for (const PartAbout& about : there)
      for (const std::vector<int64_t>& file : about.files) {
        first_file = file.at(0);
        size_ = file.at(1);
      }
    for (const PartAbout& about : there)
      if (about.first <= size_)
        for (const std::string& label : about.labels) number_of(label);
    begin_draft(size_ / part_size_);
    draft_->compared = size_ % part_size_ == 0;
    slot_ = static_cast<size_t>(size_ % part_size_ * width_) / chunk_bytes_;
    chunk_.resize(static_cast<size_t>(size_ % part_size_ * width_) % chunk_bytes_);
    const std::unique_ptr<Source> source = input_.open(first_file);
    Segment segment;
    int64_t turn = 0;
    while (source->next(segment)) {
      add(segment);
      if (options_.progress && ++turn % 64 == 0) options_.progress(size_, source->fraction());
    }
    if (!chunk_.empty()) {
      chunk_.resize(chunk_bytes_);
      submit();
    }
    draft_->about.last = true;
    const int64_t count = draft_->unit + 1;
    close_draft();
    team_.finish();
    return count;
  }

 private:
  // A part that was cut or damaged is made again.
  bool usable(int64_t unit) const {
    if (!parts_.has(unit)) return false;
    try {
      parts_.read(unit);
      return true;
    } catch (const Error& error) {
      if (options_.note) options_.note(fmt::format("{}: made again", error.what()));
      parts_.remove(unit);
      return false;
    }
  }

  void begin_draft(int64_t unit) {
    draft_ = std::make_shared<Draft>();
    draft_->unit = unit;
    draft_->about.first = unit * part_size_;
    draft_->kept = usable(unit);
    if (draft_->kept) draft_->before = parts_.read(unit);
    draft_->before.values.erase("chunks");
    if (!draft_->kept) {
      draft_->chunks.resize(static_cast<size_t>(chunks_));
      draft_->sums.resize(static_cast<size_t>(chunks_));
    }
    slot_ = 0;
    team_.begin(draft_);
  }

  void close_draft() {
    draft_->about.size = size_ - draft_->about.first;
    draft_->used = slot_;
    team_.close(draft_);
  }

  void submit() {
    team_.chunk(draft_, slot_++, std::exchange(chunk_, {}));
    chunk_.reserve(chunk_bytes_);
  }

  int32_t number_of(const std::string& label) {
    const auto [entry, added] = numbers_.try_emplace(label, static_cast<int32_t>(numbers_.size()));
    if (added && draft_) draft_->about.labels.push_back(label);
    return entry->second;
  }

  void add(const Segment& segment) {
    if (segment.first) {
      if (segment.file != file_) {
        file_ = segment.file;
        draft_->about.files.push_back({file_, size_});
      }
      const Facts facts = input_.facts(segment);
      name_ = as_utf8(segment.name);
      if (name_ != segment.name && options_.note && !std::exchange(noted_, true))
        options_.note(
            fmt::format("{}: record '{}': its name is not UTF-8 and is read as Latin-1, as are "
                        "others that are not",
                        input_.sources[static_cast<size_t>(segment.file)], name_));
      start_ = segment.offset / input_.what.step();
      label_ = facts.label.empty() ? -1 : number_of(as_utf8(facts.label));
      split_ = facts.split;
    }
    put(segment.codes);
    if (!segment.last) return;
    Part& part = draft_->part;
    PartAbout& about = draft_->about;
    const auto bytes = static_cast<uint32_t>(name_.size());
    part.add("ends", &size_, 1);
    part.add("starts", &start_, 1);
    part.add("labels", &label_, 1);
    part.add("split", &split_, 1);
    part.add("name_bytes", &bytes, 1);
    part.add("names", name_.data(), name_.size());
    about.longest_name = std::max<int64_t>(about.longest_name, bytes);
    ++about.records;
  }

  // Codes as the dataset stores them. Segments hold whole samples.
  void put(std::span<const uint8_t> codes) {
    if (input_.what.wide()) {  // high byte, low byte of s + 32768: s, little endian
      wide_.resize(codes.size());
      for (size_t i = 0; i + 1 < codes.size(); i += 2) {
        wide_[i] = codes[i + 1];
        wide_[i + 1] = codes[i] ^ 0x80;
      }
      codes = wide_;
    }
    while (!codes.empty()) {
      const size_t taken = std::min(codes.size(), chunk_bytes_ - chunk_.size());
      chunk_.insert(chunk_.end(), codes.begin(), codes.begin() + static_cast<int64_t>(taken));
      codes = codes.subspan(taken);
      size_ += static_cast<int64_t>(taken) / width_;
      if (chunk_.size() < chunk_bytes_) continue;
      submit();
      if (static_cast<int64_t>(slot_) < chunks_) continue;
      close_draft();
      begin_draft(draft_->unit + 1);
    }
  }

  const BuildInput& input_;
  const BuildOptions& options_;
  const PartStore& parts_;
  int64_t width_ = 1, chunks_ = 1, part_size_ = 1;  // bytes of a code; of a part
  size_t chunk_bytes_ = 0, slot_ = 0;
  int64_t size_ = 0, file_ = -1;
  std::shared_ptr<Draft> draft_;
  std::vector<uint8_t> chunk_, wide_;
  std::unordered_map<std::string, int32_t> numbers_;  // of labels
  bool noted_ = false;                                // that a name is not UTF-8
  // of the record
  std::string name_;
  int64_t start_ = 0;
  int32_t label_ = -1;
  int8_t split_ = -1;
  Team team_;  // last: it works on the drafts
};

}  // namespace

std::string to_json(const PartAbout& about) {
  return nlohmann::json{{"first", about.first},     {"size", about.size},
                        {"records", about.records}, {"longest_name", about.longest_name},
                        {"labels", about.labels},   {"files", about.files},
                        {"last", about.last}}
      .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

PartAbout parse_about(const std::string& text) {
  try {
    const auto json = nlohmann::json::parse(text);
    return {.first = json.at("first"),
            .size = json.at("size"),
            .records = json.at("records"),
            .longest_name = json.at("longest_name"),
            .labels = json.at("labels"),
            .files = json.at("files"),
            .last = json.at("last")};
  } catch (const nlohmann::json::exception& error) {
    fail("a part does not say what it holds: {}", error.what());
  }
}

int8_t draw_split(const std::string& group, const std::vector<double>& shares, uint64_t seed) {
  if (shares.empty()) return -1;
  double total = 0, sum = 0;
  for (const double share : shares) total += share;
  Philox random(seed, kSplitStream, hash_bytes(group.data(), group.size()));
  const double drawn = random.uniform() * total;
  for (size_t i = 0; i + 1 < shares.size(); ++i)
    if (drawn < (sum += shares[i])) return static_cast<int8_t>(i);
  return static_cast<int8_t>(shares.size() - 1);
}

BuildResult build_dataset(const BuildInput& input, const BuildOptions& options) {
  const OutputLock lock(options.out, options.force);
  // Of the files as they are, while they are read; what they were is known by their times.
  const std::string manifest = manifest_of(input, options, true);
  std::vector<int64_t> bytes(input.sources.size(), -1);
  std::vector<uint32_t> sums(input.sources.size(), 0);
  std::atomic<bool> stop = false;
  std::future<void> summed = std::async(std::launch::async, [&] {
    for (size_t i = 0; i < input.sources.size() && !stop; ++i)
      if (input.sources[i] != "-")
        sums[i] = hdf5::crc32_of_file(input.sources[i], 0, bytes[i], &stop);
  });
  // What fails does not wait for the sums of the rest.
  const struct Stop {
    std::atomic<bool>& flag;
    ~Stop() { flag = true; }
  } stopped{stop};
  BuildResult result;
  if (::access(options.out.c_str(), F_OK) == 0) {
    summed.get();
    check_stands(options, manifest_of(input, options, false), sums);
    result.stood = true;
    if (PartStore::exist(options.out)) PartStore(options.out, manifest).remove();
    return result;
  }
  PartStore parts(options.out, manifest);
  result.continued = parts.found();
  const int64_t count = Builder(input, options, parts).run();
  summed.get();
  assemble_dataset(input, options, parts, count, bytes, sums);
  parts.remove();
  return result;
}

}  // namespace coil
