// Which mixers the layers have, and the stages of a U-Net: as words of a command line and of a
// person; each stage as a network of its own.
#include <algorithm>
#include <charconv>
#include <sstream>
#include <utility>

#include "kernels/error.h"
#include "model/config.h"

namespace coil {
namespace {

constexpr std::pair<const char*, MixerKind> kMixers[] = {{"mamba1", MixerKind::mamba1},
                                                         {"s4d", MixerKind::s4d}};

}  // namespace

const char* name_of(MixerKind kind) {
  return std::ranges::find(kMixers, kind, &std::pair<const char*, MixerKind>::second)->first;
}

std::optional<MixerKind> mixer_named(const std::string& name) {
  const auto found = std::ranges::find_if(kMixers, [&](const auto& m) { return name == m.first; });
  if (found == std::end(kMixers)) return std::nullopt;
  return found->second;
}

std::vector<LayerConfig> parse_mixers(const std::string& names, int64_t layers) {
  std::vector<LayerConfig> pattern;
  std::istringstream list(names);
  for (std::string name; std::getline(list, name, ',');) {
    const std::optional<MixerKind> mixer = mixer_named(name);
    check(mixer.has_value(), "mixers '{}': expected mamba1 or s4d, found '{}'", names, name);
    pattern.push_back({*mixer});
  }
  check(!pattern.empty(), "mixers: expected names, found none");
  std::vector<LayerConfig> all;
  for (int64_t i = 0; i < layers; ++i) all.push_back(pattern[i % pattern.size()]);
  return all;
}

std::string mixer_names(const std::vector<LayerConfig>& layers) {
  std::string names;
  for (const LayerConfig& layer : layers)
    names += fmt::format("{}{}", names.empty() ? "" : ",", name_of(layer.mixer));
  return names;
}

std::string mixer_names(const Config& config) {
  std::string names = mixer_names(config.layers);
  for (const Config::Stage& stage : config.inner) names += "/" + mixer_names(stage.layers);
  return names;
}

int64_t all_layers(const Config& config) {
  size_t count = config.layers.size();
  for (const Config::Stage& stage : config.inner) count += stage.layers.size();
  return static_cast<int64_t>(count);
}

Config inner_config(const Config& config) {
  COIL_ASSERT(!config.inner.empty());
  const Config::Stage& stage = config.inner[0];
  Config inside = config;
  inside.d = stage.d;
  inside.e = std::max<int64_t>(1, config.e * stage.d / config.d);
  inside.dt_rank = (config.dt_rank * stage.d + config.d - 1) / config.d;
  inside.layers = stage.layers;
  inside.inner.erase(inside.inner.begin());
  inside.labels.clear();
  inside.unknown.clear();
  inside.unknown_excerpt = 0;
  return inside;
}

namespace {

std::vector<int64_t> numbers_of(const char* what, const std::string& text, int64_t low,
                                int64_t high) {
  std::vector<int64_t> sizes;
  std::istringstream list(text);
  for (std::string word; std::getline(list, word, ',');) {
    int64_t size = 0;
    const auto [stop, error] = std::from_chars(word.data(), word.data() + word.size(), size);
    check(error == std::errc() && stop == word.data() + word.size() && size >= low && size <= high,
          "{} '{}': expected whole numbers from {} to {}, found '{}'", what, text, low, high, word);
    sizes.push_back(size);
  }
  return sizes;
}

}  // namespace

void add_stages(Config& config, const std::string& pool, const std::string& widths,
                const std::string& mixers) {
  const std::vector<int64_t> factors = numbers_of("pool", pool, 2, kMaxPool);
  check(!factors.empty() && factors.size() <= kMaxInner,
        "pool '{}': expected 1 to {} whole numbers from 2 to {}, found {}", pool, kMaxInner,
        kMaxPool, factors.size());
  const std::vector<int64_t> given = numbers_of("widths", widths, 1, kMaxStageWidth);
  check(given.empty() || given.size() == factors.size(),
        "widths '{}': expected {}, one for each number of pool, found {}", widths, factors.size(),
        given.size());
  std::vector<std::string> names;
  std::istringstream list(mixers);
  for (std::string of_stage; std::getline(list, of_stage, '/');) names.push_back(of_stage);
  check(!names.empty() && names.size() <= factors.size() + 1,
        "mixers '{}': expected names for up to {} stages, found {}", mixers, factors.size() + 1,
        names.size());
  check(config.d <= kMaxStageWidth, "widths: expected at most {}, found {}", kMaxStageWidth,
        config.d);
  const auto count = static_cast<int64_t>(config.layers.size());
  config.layers = parse_mixers(names[0], count);
  config.inner.clear();
  int64_t d = config.d;
  for (size_t i = 0; i < factors.size(); ++i) {
    d = given.empty() ? 2 * d : given[i];
    check(d <= kMaxStageWidth, "widths: expected at most {}, found {} in stage {}", kMaxStageWidth,
          d, i + 1);
    config.inner.push_back(
        {.pool = factors[i],
         .d = d,
         .layers = parse_mixers(names[std::min(i + 1, names.size() - 1)], count)});
  }
}

}  // namespace coil
