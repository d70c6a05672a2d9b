#include "pipelines/hdf5_dataset.h"

#include <algorithm>

#include "kernels/error.h"

namespace coil {
namespace {

constexpr int64_t kBlock = 1 << 17;  // rows looked at at once

const char* name_of(SampleCodes codes) { return codes == SampleCodes::pcm16 ? "pcm16" : "mulaw"; }

// Schema and version, before anything else is believed.
int64_t read_version(const hdf5::Reader& reader) {
  const std::string& path = reader.path();
  if (!reader.has_attribute("schema"))
    throw Error(
        fmt::format("{}: is HDF5, but no dataset of coil's: it has no attribute 'schema'", path),
        "coil dataset build -o d.h5 INPUT… makes one");
  const std::string schema = reader.text_attribute("schema");
  check(schema == kDatasetSchema, "{}: its schema is '{}', expected '{}'", path, schema,
        kDatasetSchema);
  const int64_t version = reader.number_attribute("version");
  if (version < 1 || version > kDatasetVersion)
    throw Error(fmt::format("{}: version {} of the schema, expected at most {}", path, version,
                            kDatasetVersion),
                "a newer coil reads it");
  return version;
}

CodesOf read_codes_of(const hdf5::Reader& reader) {
  const std::string alphabet = reader.text_attribute("alphabet");
  if (alphabet == "dna") return {};
  check(alphabet == "audio", "{}: alphabet '{}', expected dna or audio", reader.path(), alphabet);
  CodesOf what{.rate = reader.number_attribute("rate")};
  check(what.rate > 0 && what.rate <= 10'000'000, "{}: a rate of {} Hz", reader.path(), what.rate);
  const std::string encoding = reader.text_attribute("encoding");
  check(encoding == "mulaw" || encoding == "pcm16", "{}: encoding '{}', expected mulaw or pcm16",
        reader.path(), encoding);
  if (encoding == "pcm16") what.encoding = SampleCodes::pcm16;
  return what;
}

}  // namespace

std::string CodesOf::describe() const {
  return audio() ? fmt::format("audio, {} Hz {}", rate, name_of(encoding)) : "DNA";
}

CodesOf codes_of(const Config& config) {
  return {.rate = config.audio.rate, .encoding = config.audio.codes};
}

bool is_dataset(const std::string& path) {
  return path.ends_with(".h5") || path.ends_with(".hdf5") || hdf5::is_hdf5(path);
}

Dataset::Dataset(const std::string& path)
    : reader_(path), what_(), version_(read_version(reader_)) {
  using hdf5::Type;
  what_ = read_codes_of(reader_);
  codes_ = reader_.column("codes", what_.type());
  codes_->check_filters();
  offsets_ = reader_.column("offsets", Type::i64);
  starts_ = reader_.column("starts", Type::i64);
  names_ = reader_.column("names", Type::text);
  labels_ = reader_.column("labels", Type::i32);
  split_ = reader_.column("split", Type::i8);
  classes_ = reader_.texts("classes");
  splits_ = reader_.texts("splits");
  const auto rows = [&](const hdf5::Reader::Column& column, const char* name, int64_t expected) {
    check(column.rows() == expected, "{}: '{}' has {} rows, expected {}", path, name, column.rows(),
          expected);
  };
  rows(*offsets_, "offsets", records() + 1);
  rows(*starts_, "starts", records());
  rows(*labels_, "labels", records());
  rows(*split_, "split", records());
  const auto checksums = reader_.column("checksums", Type::u32);
  rows(*checksums, "checksums", chunks());
  checksums_.resize(static_cast<size_t>(chunks()));
  checksums->read(0, chunks(), checksums_.data());
  check_offsets();
}

void Dataset::check_offsets() const {
  int64_t before = 0;
  for (int64_t at = 0; at < offsets_->rows(); at += kBlock) {
    const int64_t count = std::min(kBlock, offsets_->rows() - at);
    std::vector<int64_t> block(static_cast<size_t>(count));
    offsets_->read(at, count, block.data());
    check(at > 0 || block[0] == 0, "{}: offsets begin at {}, expected 0", path(), block[0]);
    for (int64_t i = 0; i < count; ++i) {
      check(block[i] >= before, "{}: offsets go backwards: record {} ends at {}, before {}", path(),
            at + i - 1, block[i], before);
      check(block[i] > before || at + i == 0, "{}: offsets: record {} is empty", path(),
            at + i - 1);
      check(block[i] <= size(), "{}: offsets go past the end: record {} ends at {} of {}", path(),
            at + i - 1, block[i], size());
      before = block[i];
    }
  }
  check(before == size(), "{}: offsets end at {}, codes at {}", path(), before, size());
}

int8_t Dataset::find_split(const std::string& name) const {
  if (name.empty()) return -1;
  const auto place = std::find(splits_.begin(), splits_.end(), name);
  check(place != splits_.end(), "{}: has no split '{}'{}", path(), name,
        splits_.empty() ? ": it was built without --split"
                        : fmt::format("; it has {}", fmt::join(splits_, ", ")));
  return static_cast<int8_t>(place - splits_.begin());
}

std::vector<int64_t> Dataset::offsets(int64_t first, int64_t count) const {
  std::vector<int64_t> offsets(static_cast<size_t>(count));
  offsets_->read(first, count, offsets.data());
  return offsets;
}

Dataset::Records Dataset::read(int64_t first, int64_t count) const {
  Records some{.first = first, .offsets = offsets(first, count + 1)};
  const auto n = static_cast<size_t>(count);
  some.starts.resize(n);
  some.labels.resize(n);
  some.split.resize(n);
  starts_->read(first, count, some.starts.data());
  labels_->read(first, count, some.labels.data());
  split_->read(first, count, some.split.data());
  const auto width = static_cast<size_t>(names_->layout().width);
  std::string names(width * n, '\0');
  names_->read(first, count, names.data());
  for (size_t i = 0; i < n; ++i) {
    std::string name = names.substr(i * width, width);
    name.resize(std::min(name.size(), name.find('\0')));
    some.names.push_back(std::move(name));
    check(some.labels[i] >= -1 && some.labels[i] < static_cast<int32_t>(classes_.size()),
          "{}: record {} has label {} of {} classes", path(), first + static_cast<int64_t>(i),
          some.labels[i], classes_.size());
    check(some.split[i] >= -1 && some.split[i] < static_cast<int8_t>(splits_.size()),
          "{}: record {} has split {} of {}", path(), first + static_cast<int64_t>(i),
          some.split[i], splits_.size());
  }
  return some;
}

void Dataset::chunk(int64_t index, hdf5::Deflater& deflater, std::vector<uint8_t>& stored,
                    std::vector<uint8_t>& raw) const {
  bool deflated = false;
  codes_->read_chunk(index, stored, deflated);
  const auto bytes = static_cast<size_t>(chunk_size() * hdf5::size_of(what_.type()));
  raw.resize(bytes);
  bool whole = true;
  if (deflated)
    whole = deflater.inflate(stored, raw);
  else if ((whole = stored.size() == bytes))
    raw.swap(stored);
  check(whole && hdf5::crc32(raw) == checksums_[static_cast<size_t>(index)],
        "{}: damaged: chunk {} of 'codes' (from {} on) is not what was written", path(), index,
        index * chunk_size());
}

}  // namespace coil
