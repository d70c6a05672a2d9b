#include "pipelines/parts.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "kernels/error.h"
#include "model/atomic_file.h"
#include "pipelines/hdf5_column.h"

namespace coil {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr char kMagic[] = "coil part 1\n";
constexpr size_t kMagicBytes = sizeof kMagic - 1;
constexpr int64_t kLongest = 64 << 20;  // of a manifest or a part's header

std::string host_name() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

// When a process was started, in the kernel's ticks; "" where there is none that lives: one that
// was killed and not yet waited for counts as dead.
std::string start_of(int64_t pid) {
  std::ifstream file(fmt::format("/proc/{}/stat", pid));
  std::string text;
  std::getline(file, text);
  const size_t name_end = text.rfind(')');  // the name may hold blanks
  if (name_end == std::string::npos) return "";
  std::istringstream fields(text.substr(name_end + 1));
  std::string field;
  for (int i = 3; fields >> field; ++i) {
    if (i == 3 && (field == "Z" || field == "X")) return "";
    if (i == 22) return field;
  }
  return "";
}

struct Owner {
  std::string host, start;
  int64_t pid = 0;
};

Owner owner_in(int descriptor) {
  char text[512] = "";
  const ssize_t count = ::pread(descriptor, text, sizeof text - 1, 0);
  Owner owner;
  if (count <= 0) return owner;
  std::istringstream words(text);
  words >> owner.host >> owner.pid >> owner.start;
  return owner;
}

}  // namespace

OutputLock::OutputLock(const std::string& output, bool force) : path_(output + ".lock") {
  for (;;) {
    descriptor_ = ::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    const int reason = errno;
    check(descriptor_ >= 0, "cannot write '{}': {}", path_,
          reason == ELOOP ? "it is a link" : std::strerror(reason));
    const bool held = ::flock(descriptor_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    // Its owner may have removed the name between our open and our lock.
    struct stat ours {
    }, named{};
    const bool same = ::fstat(descriptor_, &ours) == 0 && ::stat(path_.c_str(), &named) == 0 &&
                      ours.st_ino == named.st_ino;
    if (!held && !same) {
      ::close(descriptor_);
      continue;
    }
    const Owner owner = owner_in(descriptor_);
    if (!held && ours.st_size > 0 && owner.pid <= 0) {
      ::close(std::exchange(descriptor_, -1));
      throw Error(fmt::format("'{}' is no lock of coil", path_), "name another output");
    }
    const bool here = owner.host == host_name();
    const bool lives = here && !owner.start.empty() && start_of(owner.pid) == owner.start;
    const bool unknown = owner.pid > 0 && !here && !force;
    if (!held && !lives && !unknown) break;
    ::close(std::exchange(descriptor_, -1));
    throw Error(fmt::format("'{}' is being written by process {} on {}", output, owner.pid,
                            owner.host.empty() ? "this host" : owner.host),
                held || here ? fmt::format("wait for it, or end it; '{}' says who", path_)
                             : "--force, if that process no longer lives");
  }
  const std::string text = fmt::format("{} {} {}\n", host_name(), ::getpid(), start_of(::getpid()));
  const bool written =
      ::ftruncate(descriptor_, 0) == 0 &&
      ::pwrite(descriptor_, text.data(), text.size(), 0) == static_cast<ssize_t>(text.size()) &&
      ::fsync(descriptor_) == 0;
  if (written) return;
  const int reason = errno;
  ::unlink(path_.c_str());
  ::close(std::exchange(descriptor_, -1));
  fail("cannot write '{}': {}", path_, std::strerror(reason));
}

OutputLock::~OutputLock() {
  if (descriptor_ < 0) return;
  ::unlink(path_.c_str());
  ::close(descriptor_);
}

std::string manifest_differences(const std::string& then, const std::string& now) {
  const auto flat = [](const std::string& text) {
    const Json parsed = Json::parse(text, nullptr, false);
    return parsed.is_object() ? parsed.flatten() : Json::object();
  };
  const Json a = flat(then), b = flat(now);
  std::set<std::string> keys;
  for (const auto& [key, value] : a.items()) keys.insert(key);
  for (const auto& [key, value] : b.items()) keys.insert(key);
  std::vector<std::string> found;
  for (const std::string& key : keys) {
    const std::string x = a.contains(key) ? a[key].dump() : "none";
    const std::string y = b.contains(key) ? b[key].dump() : "none";
    if (x != y) found.push_back(fmt::format("{} ({} then, {} now)", key.substr(1), x, y));
  }
  constexpr size_t kShown = 4;
  const size_t more = found.size() - std::min(found.size(), kShown);
  found.resize(std::min(found.size(), kShown));
  return fmt::format("{}{}", fmt::join(found, ", "), more ? fmt::format(" and {} more", more) : "");
}

PartStore::PartStore(const std::string& output, const std::string& manifest)
    : folder_(output + ".parts") {
  const std::string named = folder_ + "/manifest.json";
  std::error_code error;
  fs::create_directory(folder_, error);
  check(!error, "cannot make the folder '{}': {}", folder_, error.message());
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_)) {
    const std::string name = entry.path().filename().string();
    if (name.ends_with(".tmp")) fs::remove(entry.path(), error);  // of a process that died
    found_ += name.ends_with(".part");
  }
  check(found_ == 0 || fs::exists(named),
        "'{}' holds parts, and no manifest.json that says of what", folder_);
  if (found_ == 0) {
    write_file_atomically(named, manifest);
    sync_folder(fs::path(folder_).parent_path().string());
    return;
  }
  const std::string differing = manifest_differences(coil::read_file(named, kLongest), manifest);
  if (differing.empty()) return;
  throw Error(fmt::format("'{}' was begun with other input or options: {}", output, differing),
              fmt::format("say what was said then, or remove '{}' to begin anew", folder_));
}

std::string PartStore::path(int64_t unit) const {
  return fmt::format("{}/{:08}.part", folder_, unit);
}

void PartStore::discard(const std::string& output, const std::string& key,
                        const std::string& value) {
  if (!exist(output)) return;
  const std::string folder = output + ".parts", named = folder + "/manifest.json";
  const std::string text = fs::exists(named) ? coil::read_file(named, kLongest) : "";
  const Json manifest = Json::parse(text, nullptr, false);
  const bool ours = manifest.is_object() && manifest.value(key, "") == value;
  if (!ours)
    throw Error(fmt::format("'{}' holds parts of another command", folder),
                "end what was begun, name another output, or remove it");
  PartStore(output, text).remove();
}

bool PartStore::exist(const std::string& output) { return fs::is_directory(output + ".parts"); }

bool PartStore::has(int64_t unit) const { return fs::exists(path(unit)); }

void PartStore::write(int64_t unit, const Part& part) const {
  Json header{{"about", Json::parse(part.about)}};
  Json& values = header["values"] = Json::array();
  for (const auto& [name, bytes] : part.values) values.push_back({name, bytes.size()});
  const std::string text = header.dump();
  const uint64_t length = text.size();
  AtomicFile file(path(unit));
  uint32_t crc = 0;
  const auto put = [&](const void* data, size_t bytes) {
    crc = hdf5::crc32({static_cast<const uint8_t*>(data), bytes}, crc);
    file.write(data, bytes);
  };
  put(kMagic, kMagicBytes);
  put(&length, sizeof length);
  put(text.data(), text.size());
  for (const auto& [name, bytes] : part.values) put(bytes.data(), bytes.size());
  const uint32_t sum = crc;
  file.write(&sum, sizeof sum);
  file.commit();
}

namespace {

// The header of a part, and where its values begin.
Json header_of(std::ifstream& file, const std::string& path, size_t& begin) {
  std::string magic(kMagicBytes, '\0');
  uint64_t length = 0;
  file.read(magic.data(), kMagicBytes);
  file.read(reinterpret_cast<char*>(&length), sizeof length);
  check(file.good() && magic == kMagic && length <= static_cast<uint64_t>(kLongest),
        "{}: is no part, or damaged", path);
  std::string text(length, '\0');
  file.read(text.data(), static_cast<std::streamsize>(length));
  Json header = file.good() ? Json::parse(text, nullptr, false) : Json();
  check(header.is_object() && header.contains("about") && header.contains("values"),
        "{}: damaged: its header cannot be read", path);
  begin = kMagicBytes + sizeof length + length;
  return header;
}

std::ifstream open_part(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  check(file.good(), "{}: missing or not readable: {}", path, std::strerror(errno));
  return file;
}

}  // namespace

Part PartStore::read_file(const std::string& path) {
  int64_t size = 0;
  constexpr int64_t kSum = sizeof(uint32_t);
  std::ifstream file = open_part(path);
  std::vector<uint8_t> all(fs::file_size(path));
  file.read(reinterpret_cast<char*>(all.data()), static_cast<std::streamsize>(all.size()));
  size = static_cast<int64_t>(all.size()) - kSum;
  uint32_t sum = 0;
  if (size > 0) std::memcpy(&sum, all.data() + size, kSum);
  check(file.good() && size > 0 && hdf5::crc32({all.data(), static_cast<size_t>(size)}) == sum,
        "{}: damaged or cut: its checksum is wrong", path);
  file.seekg(0);
  size_t at = 0;
  const Json header = header_of(file, path, at);
  Part part{.about = header["about"].dump(), .values = {}};
  for (const Json& value : header["values"]) {
    const auto bytes = value[1].get<size_t>();
    check(at + bytes <= static_cast<size_t>(size), "{}: damaged", path);
    part.values[value[0].get<std::string>()] = {all.begin() + static_cast<int64_t>(at),
                                                all.begin() + static_cast<int64_t>(at + bytes)};
    at += bytes;
  }
  return part;
}

Part PartStore::read(int64_t unit) const { return read_file(path(unit)); }

std::string PartStore::about(int64_t unit) const {
  const std::string file_path = path(unit);
  std::ifstream file = open_part(file_path);
  size_t begin = 0;
  return header_of(file, file_path, begin)["about"].dump();
}

void PartStore::remove(int64_t unit) const { ::unlink(path(unit).c_str()); }

void PartStore::remove() {
  // The manifest last: what a kill leaves behind is still known.
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder_, error)) {
    const std::string ending = entry.path().extension().string();
    if (ending == ".part" || ending == ".tmp") fs::remove(entry.path(), error);
  }
  fs::remove(folder_ + "/manifest.json", error);
  fs::remove(folder_, error);  // what is not ours stays, and the folder with it
}

}  // namespace coil
