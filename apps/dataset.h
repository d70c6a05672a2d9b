// What the commands of `coil dataset` share.
#pragma once

#include <boost/program_options.hpp>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "apps/command.h"
#include "pipelines/hdf5_build.h"
#include "pipelines/pattern.h"

namespace coil {

// Of an output that is not begun anew over what is there.
void refuse_existing(const std::string& out);

int run_dataset_bench(int argc, char** argv);
int run_dataset_build(int argc, char** argv);
int run_dataset_head(int argc, char** argv);
int run_dataset_info(int argc, char** argv);
int run_dataset_merge(int argc, char** argv);
int run_dataset_split(int argc, char** argv);
int run_dataset_verify(int argc, char** argv);

struct DatasetOutput {
  std::string out;
  std::string compress = "deflate";
  Size part{32'000'000};
  int threads = 0;
  bool force = false;
};
boost::program_options::options_description describe(DatasetOutput& output);

struct SplitOptions {
  std::string shares;  // "8:1:1"
  std::string group = "name", pattern;
  uint64_t seed = 1;
};
boost::program_options::options_description describe(SplitOptions& options);
void add_to(nlohmann::ordered_json& how, const SplitOptions& options);

// Which split a record falls into.
class Splits {
 public:
  Splits(const SplitOptions& options, bool audio);  // throws UsageError
  std::vector<std::string> names() const;           // none where there was no --split
  std::string column() const;                       // of a table that gives the group; ""
  // `file`: that it stands in; `group`: of the table.
  int8_t of(const Segment& segment, const std::string& file, const std::string& group) const;

 private:
  SplitOptions options_;
  bool audio_;
  std::vector<double> shares_;
  std::unique_ptr<Pattern> pattern_;
};

// Adds to Segment::file.
std::unique_ptr<Source> shift_files(std::unique_ptr<Source> source, int64_t first);

// Builds, with progress, and says on stderr what there is now.
int build_and_tell(const BuildInput& input, const DatasetOutput& output, const std::string& how);

}  // namespace coil
