#include "audio/dataset.h"

#include <regex.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <unordered_map>
#include <utility>

#include "audio/codes.h"
#include "audio/resample.h"
#include "audio/sound.h"
#include "kernels/error.h"

namespace coil::audio {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kBlock = 1 << 14;  // samples read and resampled at once

std::vector<Recording> recordings_below(const std::string& folder) {
  std::vector<Recording> found;
  std::error_code error;
  fs::recursive_directory_iterator entry(folder, fs::directory_options::follow_directory_symlink,
                                         error),
      end;
  for (; !error && entry != end; entry.increment(error)) {
    const bool hidden = entry->path().filename().string().starts_with('.');
    if (entry->is_directory()) {
      if (hidden) entry.disable_recursion_pending();
      continue;
    }
    const std::string path = entry->path().string();
    if (!hidden && has_audio_name(path))
      found.push_back({path, entry->path().lexically_relative(folder).string()});
  }
  check(!error, "{}: cannot list: {}", folder, error.message());
  check(!found.empty(), "{}: no audio in this folder: no file is named .wav, .flac, .ogg, .mp3, …",
        folder);
  std::sort(found.begin(), found.end(),
            [](const Recording& a, const Recording& b) { return a.name < b.name; });
  return found;
}

// The label of a recording, as text, and where it stands.
class Labels {
 public:
  explicit Labels(const LabelOptions& options) : options_(options) {
    if (!options.table.empty()) read_table();
    if (!options.pattern.empty()) compile();
  }
  ~Labels() {
    if (!options_.pattern.empty()) regfree(&pattern_);
  }
  Labels(const Labels&) = delete;
  Labels& operator=(const Labels&) = delete;

  std::string of(const Recording& file) const {
    if (!options_.table.empty()) return by_table(file);
    if (options_.pattern.empty()) return by_folder(file);
    const std::string name = fs::path(file.name).filename().string();
    regmatch_t match[2];
    check(regexec(&pattern_, name.c_str(), 2, match, 0) == 0,
          "{}: no label: its name does not match '{}'", file.path, options_.pattern);
    const regmatch_t& part = match[match[1].rm_so >= 0 ? 1 : 0];
    return name.substr(part.rm_so, part.rm_eo - part.rm_so);
  }

 private:
  // POSIX's: what std::regex of GCC 12 is made of gives warnings under its sanitizers.
  void compile() {
    const int error = regcomp(&pattern_, options_.pattern.c_str(), REG_EXTENDED);
    if (error == 0) return;
    char why[256];
    regerror(error, &pattern_, why, sizeof why);
    throw UsageError(fmt::format("'{}' is no regular expression: {}", options_.pattern, why));
  }

  void read_table() {
    std::ifstream in(options_.table);
    check(in.good(), "{}: cannot open", options_.table);
    int64_t number = 0;
    for (std::string line; std::getline(in, line);) {
      ++number;
      if (line.ends_with('\r')) line.pop_back();
      if (line.empty()) continue;
      const size_t tab = line.find('\t');
      check(tab != std::string::npos,
            "{}: line {} has one column; a file, a tab and a label were expected", options_.table,
            number);
      const std::string label = line.substr(tab + 1, line.find('\t', tab + 1) - tab - 1);
      const auto [row, added] = rows_.try_emplace(line.substr(0, tab), label);
      check(added || row->second == label, "{}: line {} labels '{}' as '{}', a line before as '{}'",
            options_.table, number, row->first, label, row->second);
    }
  }

  std::string by_table(const Recording& file) const {
    const fs::path name = file.name;
    fs::path bare = name;
    for (const std::string& key : {file.path, file.name, bare.replace_extension().string(),
                                   name.filename().string(), name.stem().string()}) {
      const auto row = rows_.find(key);
      if (row != rows_.end()) return row->second;
    }
    fail("{}: no label in {}", file.path, options_.table);
  }

  static std::string by_folder(const Recording& file) {
    const fs::path name = file.name;
    if (!name.has_parent_path())
      throw Error(
          fmt::format("{}: no label", file.path),
          "--labels TABLE, --label-pattern REGEX, a folder that holds one folder per class; "
          "coil score: --label NAME");
    return name.begin()->string();
  }

  const LabelOptions& options_;
  regex_t pattern_;
  std::unordered_map<std::string, std::string> rows_;
};

void add_labels(Recordings& all, const LabelOptions& options) {
  const Labels labels(options);
  std::vector<std::string> texts;
  for (const Recording& file : all.files) {
    texts.push_back(labels.of(file));
    check(!texts.back().empty(), "{}: its label is empty", file.path);
  }
  all.labels = options.known;
  if (all.labels.empty()) {
    const std::set<std::string> found(texts.begin(), texts.end());
    all.labels.assign(found.begin(), found.end());
    sort_labels(all.labels);
    check(all.labels.size() > 1 || !options.complete,
          "only one class, '{}', in the recordings given; two are needed", all.labels[0]);
  }
  std::vector<int64_t> counts(all.labels.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    const auto place = std::find(all.labels.begin(), all.labels.end(), texts[i]);
    check(place != all.labels.end(), "{} has label '{}', which is not one of the model's: {}",
          all.files[i].path, texts[i], fmt::join(all.labels, ", "));
    all.files[i].label = static_cast<int32_t>(place - all.labels.begin());
    ++counts[all.files[i].label];
  }
  if (!options.known.empty() || !options.complete) return;
  for (size_t i = 0; i < counts.size(); ++i)
    check(counts[i] > 1, "class '{}' is seen once; at least two recordings of a class are needed",
          all.labels[i]);
}

class RecordingSource final : public Source {
 public:
  RecordingSource(Recordings recordings, const ReadOptions& options)
      : files_(std::move(recordings.files)), options_(options) {
    COIL_ASSERT(options.rate > 0 && Source::kRun % codes_of_a_sample(options.codes) == 0);
  }

  bool next(Segment& segment) override {
    if (!sound_) {
      if (file_ == files_.size()) return false;
      open();
    }
    while (!ended_ && static_cast<int64_t>(codes_.size()) <= kRun) read_block();
    const Recording& file = files_[file_];
    check(!codes_.empty(), "{}: too short: no sample is left at {} Hz", file.path, options_.rate);
    const auto count = std::min(codes_.size(), static_cast<size_t>(kRun));
    segment = {.record = static_cast<int64_t>(file_),
               .file = static_cast<int64_t>(file_),
               .position = position_,
               .offset = offset_,
               .first = position_ == 0,
               .last = ended_ && count == codes_.size(),
               .name = position_ == 0 ? file.path : "",
               .label = file.label,
               .codes = {codes_.begin(), codes_.begin() + static_cast<int64_t>(count)}};
    codes_.erase(codes_.begin(), codes_.begin() + static_cast<int64_t>(count));
    position_ += static_cast<int64_t>(count);
    if (segment.last) {
      sound_.reset();
      ++file_;
    }
    return true;
  }

  // Files count alike.
  double fraction() const override {
    const double inside = sound_ ? static_cast<double>(sound_->position()) /
                                       static_cast<double>(std::max<int64_t>(1, sound_->frames()))
                                 : 0;
    return (static_cast<double>(file_) + std::min(1.0, inside)) /
           static_cast<double>(files_.size());
  }

 private:
  void open() {
    const std::string& path = files_[file_].path;
    sound_ = std::make_unique<Sound>(path);
    resampler_ = std::make_unique<Resampler>(sound_->rate(), options_.rate, path);
    end_ = sound_->frames();
    position_ = offset_ = 0;
    ended_ = false;
    if (options_.trim > 0) trim(path);
    tell(path);
  }

  // Two passes over the file: one finds the first and the last sample that is loud enough.
  void trim(const std::string& path) {
    const auto quiet = static_cast<float>(std::pow(10.0, -options_.trim / 20));
    int64_t begin = -1, end = 0;
    samples_.resize(kBlock);
    while (const int64_t count = sound_->read(samples_)) {
      const int64_t at = sound_->position() - count;
      for (int64_t i = 0; i < count; ++i) {
        if (std::fabs(samples_[i]) < quiet) continue;
        if (begin < 0) begin = at + i;
        end = at + i + 1;
      }
    }
    check(begin >= 0, "{}: nothing in it is as loud as -{:g} dB, so trimming leaves no samples",
          path, options_.trim);
    sound_->seek(begin);
    end_ = end;
    offset_ = codes_of_a_sample(options_.codes) *
              std::llround(static_cast<double>(begin) * static_cast<double>(options_.rate) /
                           static_cast<double>(sound_->rate()));
  }

  void tell(const std::string& path) {
    const bool other_rate = sound_->rate() != options_.rate, mixed = sound_->channels() > 1;
    if (!options_.note || (!other_rate && !mixed)) return;
    if (!told_.insert({sound_->rate(), sound_->channels()}).second) return;
    std::string text = fmt::format("note: {}: {} Hz, {} channel{}:", path, sound_->rate(),
                                   sound_->channels(), mixed ? "s" : "");
    if (other_rate) text += fmt::format(" resampled to {} Hz", options_.rate);
    if (mixed) text += fmt::format("{} the channels' mean is read", other_rate ? "," : "");
    options_.note(text + "; so are others like it");
  }

  void read_block() {
    samples_.resize(static_cast<size_t>(std::min(kBlock, end_ - sound_->position())));
    const int64_t count = sound_->read(samples_);
    ended_ = count < kBlock;
    resampled_.clear();
    resampler_->run(std::span(samples_).first(count), ended_, resampled_);
    encode(resampled_, options_.codes, codes_);
  }

  std::vector<Recording> files_;
  ReadOptions options_;
  size_t file_ = 0;
  std::unique_ptr<Sound> sound_;  // of file_, while it is read
  std::unique_ptr<Resampler> resampler_;
  std::vector<float> samples_, resampled_;
  std::vector<uint8_t> codes_;  // read, not yet handed over
  int64_t end_ = 0, position_ = 0, offset_ = 0;
  bool ended_ = false;
  std::set<std::pair<int64_t, int>> told_;
};

}  // namespace

Recordings list_recordings(const std::vector<std::string>& paths, const LabelOptions& options) {
  Recordings all;
  for (const std::string& path : paths) {
    if (!fs::is_directory(path)) {
      all.files.push_back({path, fs::path(path).filename().string()});
      continue;
    }
    std::vector<Recording> found = recordings_below(path);
    all.files.insert(all.files.end(), found.begin(), found.end());
  }
  if (options.labelled) add_labels(all, options);
  return all;
}

int64_t common_rate(const Recordings& recordings) {
  std::map<int64_t, int64_t> counts;
  for (const Recording& file : recordings.files) ++counts[Sound(file.path).rate()];
  const auto most =
      std::max_element(counts.begin(), counts.end(), [](const auto& a, const auto& b) {
        return a.second < b.second;  // the first of equals: the lower rate
      });
  COIL_ASSERT(most != counts.end());
  return most->first;
}

std::unique_ptr<Source> open_recordings(Recordings recordings, const ReadOptions& options) {
  return std::make_unique<RecordingSource>(std::move(recordings), options);
}

Examples read_recordings(const Recordings& recordings, const ReadOptions& options) {
  Examples all;
  all.labels = recordings.labels;
  RecordingSource source(recordings, options);
  std::vector<uint8_t> codes;
  for (Segment segment; source.next(segment);) {
    codes.insert(codes.end(), segment.codes.begin(), segment.codes.end());
    if (!segment.last) continue;
    const Recording& file = recordings.files[segment.record];
    all.items.push_back({.record = segment.record,
                         .begin = 0,
                         .length = static_cast<int64_t>(codes.size()),
                         .label = file.label});
    all.names.push_back(file.name);
    codes.shrink_to_fit();
    all.codes.push_back(std::exchange(codes, {}));
  }
  return all;
}

}  // namespace coil::audio
