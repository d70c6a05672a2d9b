// One writer at a time; parts that are whole or absent.
#include "pipelines/parts.h"

#include <sys/wait.h>

#include "tests/hdf5_files.h"

namespace coil {
namespace {

Part some_part() {
  Part part{.about = R"({"n":3})", .values = {}};
  const int64_t numbers[] = {1, -2, 3};
  part.add("numbers", numbers, 3);
  part.add("nothing", numbers, 0);
  return part;
}

TEST(OutputLock, RefusesASecondWriter) {
  const Folder folder;
  const std::string path = folder / "d.h5";
  {
    const OutputLock lock(path, false);
    EXPECT_NE(error_of([&] {
                OutputLock again(path, false);
              }).find(fmt::format("is being written by process {} on", getpid())),
              std::string::npos);
    EXPECT_NE(error_of([&] { OutputLock again(path, true); }), "");  // force is for other hosts
  }
  EXPECT_FALSE(std::filesystem::exists(path + ".lock"));
  const OutputLock again(path, false);
}

TEST(OutputLock, TakesOverFromTheDead) {
  const Folder folder;
  const std::string path = folder / "d.h5";
  char host[256] = "";
  gethostname(host, sizeof host - 1);
  const pid_t child = fork();
  if (child == 0) _exit(0);
  waitpid(child, nullptr, 0);
  write_bytes(path + ".lock", fmt::format("{} {} 12345\n", host, child));
  { const OutputLock lock(path, false); }
  // The number of a process that lives, which is another one since it began at another time.
  write_bytes(path + ".lock", fmt::format("{} {} 1\n", host, getpid()));
  { const OutputLock lock(path, false); }
  write_bytes(path + ".lock", "");  // killed before it wrote its name
  { const OutputLock lock(path, false); }
}

TEST(OutputLock, AnotherHostNeedsForce) {
  const Folder folder;
  const std::string path = folder / "d.h5";
  write_bytes(path + ".lock", "elsewhere 77 12345\n");
  EXPECT_EQ(error_of([&] { OutputLock lock(path, false); }),
            fmt::format("'{}' is being written by process 77 on elsewhere", path));
  const OutputLock lock(path, true);
}

TEST(PartStore, PartsComeBackAsTheyWere) {
  const Folder folder;
  const std::string path = folder / "d.h5";
  PartStore parts(path, R"({"a":1})");
  parts.write(3, some_part());
  EXPECT_TRUE(parts.has(3));
  EXPECT_FALSE(parts.has(0));
  const Part back = parts.read(3);
  EXPECT_EQ(back.about, R"({"n":3})");
  EXPECT_EQ(parts.about(3), R"({"n":3})");
  EXPECT_EQ(back.of<int64_t>("numbers")[1], -2);
  EXPECT_TRUE(back.of<int64_t>("nothing").empty());
  EXPECT_EQ(PartStore(path, R"({"a":1})").found(), 1);
  EXPECT_EQ(error_of([&] { PartStore other(path, R"({"a":2,"b":{"c":"x"}})"); }),
            fmt::format("'{}' was begun with other input or options: a (1 then, 2 now), b/c (none "
                        "then, \"x\" now)",
                        path));
  parts.remove();
  EXPECT_FALSE(PartStore::exist(path));
}

TEST(PartStore, EveryFlippedByteAndEveryCutIsFound) {
  const Folder folder;
  const std::string path = folder / "d.h5";
  const PartStore parts(path, "{}");
  parts.write(0, some_part());
  const std::string file = parts.folder() + "/00000000.part", whole = bytes_of(file);
  for (size_t i = 0; i < whole.size(); ++i) {
    std::string changed = whole;
    changed[i] = static_cast<char>(changed[i] ^ 0x10);
    write_bytes(file, changed);
    EXPECT_NE(error_of([&] { parts.read(0); }), "") << i;
    write_bytes(file, whole.substr(0, i));
    EXPECT_NE(error_of([&] { parts.read(0); }), "") << i;
  }
}

TEST(PartStore, WhatAKillLeftIsPassedOver) {
  const Folder folder;
  const std::string path = folder / "d.h5";
  std::filesystem::create_directory(path + ".parts");  // killed before the manifest
  { const PartStore parts(path, "{}"); }
  write_bytes(path + ".parts/00000000.part.tmp", "half");
  const PartStore parts(path, "{}");
  EXPECT_EQ(parts.found(), 0);
  EXPECT_EQ(PartStore(path, R"({"a":1})").found(), 0);  // nothing is lost with the options
  EXPECT_FALSE(std::filesystem::exists(path + ".parts/00000000.part.tmp"));
}

}  // namespace
}  // namespace coil
