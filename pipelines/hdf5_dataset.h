// Schema "coil dataset", version 1: DNA or audio of any number of records, one after another.
//   codes      (codes)        uint8: DNA 1 A, 2 C, 3 G, 4 T, 5 N; mulaw 0 … 255. int16: pcm16
//   offsets    (records + 1)  int64: record i is codes[offsets[i] : offsets[i + 1]], from 0
//   starts     (records)      int64: where it begins in the sequence it was cut from, in codes
//   names      (records)      text
//   labels     (records)      int32: index into classes, -1 none
//   split      (records)      int8: index into splits, -1 none
//   classes, splits           text: names of classes, sorted; train, validation, test
//   checksums  (chunks)       uint32: CRC-32 of each chunk of codes, the last one filled with 0
//   sources/   path, bytes, crc32 of what it was made from; manifest: options, as JSON
// Attributes: schema, version, creator, alphabet ("dna" or "audio"); of audio rate and encoding
// ("mulaw" or "pcm16"). Every dataset but codes has an attribute crc32 of its rows. docs/hdf5.md.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "model/batch.h"
#include "model/config.h"
#include "pipelines/hdf5_reader.h"

namespace coil {

constexpr const char* kDatasetSchema = "coil dataset";
constexpr int64_t kDatasetVersion = 1;

// What the codes of a dataset are.
struct CodesOf {
  int64_t rate = 0;  // Hz; 0: DNA
  SampleCodes encoding = SampleCodes::mulaw;

  bool audio() const { return rate > 0; }
  bool wide() const { return audio() && encoding == SampleCodes::pcm16; }
  // Codes as the networks read them, uint8_t: two of a sample of 16 bits.
  int64_t step() const { return wide() ? 2 : 1; }
  hdf5::Type type() const { return wide() ? hdf5::Type::i16 : hdf5::Type::u8; }
  std::string describe() const;  // "DNA", "audio, 16000 Hz mulaw"
  bool operator==(const CodesOf&) const = default;
};
CodesOf codes_of(const Config& config);

// A path that is to be read as a dataset: by content, or by its ending .h5 or .hdf5.
bool is_dataset(const std::string& path);

class Dataset {
 public:
  // Throws on what is no dataset that this version reads, on shapes and types that do not fit
  // together, and on offsets that go backwards or past the end.
  explicit Dataset(const std::string& path);

  const std::string& path() const { return reader_.path(); }
  const hdf5::Reader& reader() const { return reader_; }
  const CodesOf& what() const { return what_; }
  int64_t version() const { return version_; }
  int64_t records() const { return names_->rows(); }
  int64_t size() const { return codes_->rows(); }              // of codes: bases or samples
  int64_t chunk_size() const { return codes_->chunk_rows(); }  // bases or samples
  int64_t chunks() const { return (size() + chunk_size() - 1) / chunk_size(); }
  bool deflated() const { return codes_->layout().deflate; }
  const std::vector<std::string>& classes() const { return classes_; }
  const std::vector<std::string>& splits() const { return splits_; }
  // Index of a split; throws where there is none of that name, naming those there. "": -1.
  int8_t find_split(const std::string& name) const;

  struct Records {
    int64_t first = 0;             // the number of the first one
    std::vector<int64_t> offsets;  // one more than records: in bases or samples
    std::vector<int64_t> starts;
    std::vector<std::string> names;
    std::vector<int32_t> labels;
    std::vector<int8_t> split;
    int64_t count() const { return static_cast<int64_t>(names.size()); }
  };
  Records read(int64_t first, int64_t count) const;
  std::vector<int64_t> offsets(int64_t first, int64_t count) const;

  // Chunk `index` as it lies in `codes`, checked against its checksum: from any thread, each with
  // its own deflater and buffer. Whole chunks, the last one filled with 0.
  void chunk(int64_t index, hdf5::Deflater& deflater, std::vector<uint8_t>& stored,
             std::vector<uint8_t>& raw) const;

 private:
  void check_offsets() const;
  hdf5::Reader reader_;
  CodesOf what_;
  int64_t version_ = 0;
  std::unique_ptr<hdf5::Reader::Column> codes_, offsets_, starts_, names_, labels_, split_;
  std::vector<std::string> classes_, splits_;
  std::vector<uint32_t> checksums_;
};

}  // namespace coil
