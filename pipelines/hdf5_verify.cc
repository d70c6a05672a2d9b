#include "pipelines/hdf5_verify.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <mutex>
#include <thread>

#include "kernels/error.h"
#include "pipelines/hdf5_build.h"
#include "pipelines/hdf5_dataset.h"
#include "pipelines/hdf5_results.h"
#include "pipelines/parts.h"
#include "pipelines/run_log.h"

namespace coil {
namespace {

namespace fs = std::filesystem;

constexpr size_t kShown = 5;  // chunks that are named

// Runs f; what it throws is a damage.
template <class F>
bool attempt(Verdict& verdict, F f) {
  try {
    f();
    return true;
  } catch (const Error& error) {
    verdict.damages.emplace_back(error.what());
    return false;
  }
}

// Every chunk against its checksum, on all threads.
void verify_chunks(const Dataset& dataset, int threads, Verdict& verdict) {
  std::atomic<int64_t> next = 0;
  std::mutex mutex;
  std::vector<std::pair<int64_t, std::string>> found;
  const auto work = [&] {
    hdf5::Deflater deflater;
    std::vector<uint8_t> stored, raw;
    for (int64_t i; (i = next++) < dataset.chunks();) try {
        dataset.chunk(i, deflater, stored, raw);
      } catch (const Error& error) {
        std::lock_guard lock(mutex);
        found.emplace_back(i, error.what());
      }
  };
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back(work);
  work();
  for (std::thread& thread : team) thread.join();
  std::sort(found.begin(), found.end());
  for (size_t i = 0; i < std::min(found.size(), kShown); ++i)
    verdict.damages.push_back(found[i].second);
  if (found.size() > kShown)
    verdict.damages.push_back(fmt::format("{}: {} chunks in all are damaged, of {}", dataset.path(),
                                          found.size(), dataset.chunks()));
}

void verify_columns(const Dataset& dataset, Verdict& verdict) {
  using hdf5::Type;
  const std::pair<const char*, Type> columns[] = {
      {"offsets", Type::i64},       {"starts", Type::i64},        {"names", Type::text},
      {"labels", Type::i32},        {"split", Type::i8},          {"checksums", Type::u32},
      {"classes", Type::text},      {"splits", Type::text},       {"sources/path", Type::text},
      {"sources/bytes", Type::i64}, {"sources/crc32", Type::u32}, {"sources/manifest", Type::text}};
  for (const auto& [name, type] : columns)
    attempt(verdict, [&, name = name, type = type] {
      const auto column = dataset.reader().column(name, type);
      check(column->has_crc(), "{}: '{}' has no checksum", dataset.path(), name);
      const uint32_t expected = column->crc(), sum = column->crc_of_rows();
      check(sum == expected, "{}: damaged: the checksum of '{}' is {:08x}, expected {:08x}",
            dataset.path(), name, sum, expected);
    });
}

bool is_results_manifest(const std::string& folder) {
  std::ifstream in(folder + "/manifest.json");
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  return text.find("\"task\"") != std::string::npos;
}

void verify_results(const std::string& path, Verdict& verdict) {
  const hdf5::Reader file(path);
  ResultsAbout about = read_results_about(file);
  std::vector<ResultColumn> all = about.columns;
  all.push_back({"names", hdf5::Type::text});
  for (const char* name : {"starts", "ends"}) all.push_back({name, hdf5::Type::i64});
  if (about.per_position()) all.push_back({"position_offsets", hdf5::Type::i64});
  for (const ResultColumn& wanted : all)
    attempt(verdict, [&] {
      const auto column = file.column(wanted.name, wanted.type, wanted.columns > 0);
      const uint32_t expected = column->crc(), sum = column->crc_of_rows();
      check(sum == expected, "{}: damaged: the checksum of '{}' is {:08x}, expected {:08x}", path,
            wanted.name, sum, expected);
    });
  verdict.summary = fmt::format("{}: {} of {}, each as it was written", path, about.task,
                                counted(file.column("names", hdf5::Type::text)->rows(), "record"));
}

Verdict verify_parts(const std::string& path) {
  Verdict verdict;
  const std::string folder = path + ".parts";
  std::vector<std::string> files;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder))
    if (entry.path().extension() == ".part") files.push_back(entry.path().string());
  std::sort(files.begin(), files.end());
  if (!fs::exists(folder + "/manifest.json"))
    verdict.damages.push_back(fmt::format("{}: manifest.json is missing", folder));
  int64_t expected = 0;
  bool last = false;
  const bool results = is_results_manifest(folder);
  for (const std::string& file : files) {
    const int64_t unit = std::atoll(fs::path(file).stem().c_str());
    for (; expected < unit; ++expected)
      if (!results)  // whose parts are made in any order
        verdict.damages.push_back(fmt::format("{}: part {} is missing", folder, expected));
    ++expected;
    attempt(verdict, [&] {
      const std::string about = PartStore::read_file(file).about;
      if (!results) last |= parse_about(about).last;
    });
  }
  const std::string count = counted(std::ssize(files), "part");
  verdict.notes.push_back(fmt::format(
      "{}: not finished: {} of it {} there{}; the command that made them goes on with them", path,
      count, files.size() == 1 ? "is" : "are", last ? ", all that there are" : ""));
  verdict.summary = fmt::format("{}: {}, each as it was written", folder, count);
  return verdict;
}

}  // namespace

Verdict verify_dataset(const std::string& path, int threads) {
  if (!fs::exists(path) && PartStore::exist(path)) return verify_parts(path);
  if (threads <= 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  Verdict verdict;
  hdf5::Seal seal;
  int64_t bytes = 0;
  const bool begin = attempt(verdict, [&] {
    const bool readable = ::access(path.c_str(), R_OK) == 0;
    check(readable, "{}: cannot open: {}", path, std::strerror(errno));
    seal = hdf5::read_seal(path);
    check(seal.present || hdf5::signature_at(path) <= 0, "{}: its first {} bytes are damaged", path,
          hdf5::kBlock);
    if (!seal.present) return;
    const uint32_t sum = hdf5::crc32_of_file(path, hdf5::kBlock, bytes);
    check(bytes >= seal.bytes, "{}: truncated: {} bytes, expected {}", path, bytes + hdf5::kBlock,
          seal.bytes + hdf5::kBlock);
    check(sum == seal.crc,
          "{}: damaged, or written to by another program: the checksum of the file is {:08x}, "
          "expected {:08x}",
          path, sum, seal.crc);
  });
  if (begin && !seal.present)
    verdict.notes.push_back(
        fmt::format("{}: has no checksum of the whole file: another program wrote it anew", path));
  // HDF5 1.10 itself may crash on structures that are damaged, so it does not get to see them.
  if (!verdict.damages.empty()) return verdict;
  attempt(verdict, [&] {
    if (is_results(path)) return verify_results(path, verdict);
    const Dataset dataset(path);
    verify_columns(dataset, verdict);
    verify_chunks(dataset, threads, verdict);
    verdict.summary =
        fmt::format("{}: {}, {}, each as it was written", path,
                    counted(dataset.records(), "record"), counted(dataset.chunks(), "chunk"));
  });
  return verdict;
}

}  // namespace coil
