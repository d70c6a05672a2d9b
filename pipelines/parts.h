// Work on a file that survives a kill, a power cut and a full disk: what is finished lies beside
// the file as parts, and one process at a time works on it.
//   OUT.lock    which process that is
//   OUT.parts/  manifest.json, and a file for each finished unit of work
//   OUT         appears when it is whole; only then OUT.parts/ goes
// A part is written to a name of its own, fsynced and renamed into place, never changed after, and
// ends with a CRC-32 of itself. Units have numbers: which are there may have gaps.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace coil {

// The right to write a file, for as long as it lives. It is a file that names host and process,
// since locks on NFS and Lustre may lie; a flock as well, where the file system has it. A process
// that died, by kill -9 too, holds no lock: on the same host the next one takes over.
class OutputLock {
 public:
  // Throws where another process works on `output`; `force`: except one of another host, of which
  // it cannot be told whether it lives.
  OutputLock(const std::string& output, bool force);
  ~OutputLock();
  OutputLock(const OutputLock&) = delete;
  OutputLock& operator=(const OutputLock&) = delete;

 private:
  std::string path_;
  int descriptor_ = -1;
};

// What one unit of work gave.
struct Part {
  std::string about;                                   // JSON: whatever says what it holds
  std::map<std::string, std::vector<uint8_t>> values;  // by name, e.g. a column of results

  template <class T>
  std::span<const T> of(const std::string& name) const {  // empty where there is none
    const auto found = values.find(name);
    if (found == values.end()) return {};
    return {reinterpret_cast<const T*>(found->second.data()), found->second.size() / sizeof(T)};
  }
  template <class T>
  void add(const std::string& name, const T* from, size_t count) {
    const auto* const bytes = reinterpret_cast<const uint8_t*>(from);
    std::vector<uint8_t>& to = values[name];
    to.insert(to.end(), bytes, bytes + count * sizeof(T));
  }
};

class PartStore {
 public:
  // Opens OUT.parts/ or makes it. `manifest`: a JSON object of all that makes the result what it
  // is. Throws where the parts there were made from something else, naming what differs. The caller
  // holds the lock.
  PartStore(const std::string& output, const std::string& manifest);

  int64_t found() const { return found_; }  // when it was opened, whole or not
  bool has(int64_t unit) const;
  // Throws where it is missing, cut or damaged.
  Part read(int64_t unit) const;
  std::string about(int64_t unit) const;  // alone, without a look at the values
  void write(int64_t unit, const Part& part) const;
  void remove(int64_t unit) const;
  void remove();  // all of it, when the output stands
  const std::string& folder() const { return folder_; }

  static bool exist(const std::string& output);
  // Removes parts whose manifest has this entry; throws where there are others.
  static void discard(const std::string& output, const std::string& key, const std::string& value);
  static Part read_file(const std::string& path);

 private:
  std::string path(int64_t unit) const;
  std::string folder_;
  int64_t found_ = 0;
};

// "window (0 then, 1000 now), …": what differs between two JSON objects. Empty: nothing.
std::string manifest_differences(const std::string& then, const std::string& now);

}  // namespace coil
