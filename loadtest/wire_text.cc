#include "loadtest/wire_text.h"

#include <algorithm>
#include <charconv>
#include <optional>

namespace linspec::loadtest {
namespace {

constexpr size_t kMaxPositions = 256;

struct Sample {
  std::string_view name, labels;
  double value = 0;
};

std::optional<Sample> ParseSample(std::string_view line) {
  if (line.empty() || line.front() == '#') return std::nullopt;
  Sample sample;
  const size_t name_end = line.find_first_of("{ ");
  if (name_end == std::string_view::npos) return std::nullopt;
  sample.name = line.substr(0, name_end);
  line.remove_prefix(name_end);
  if (line.front() == '{') {
    const size_t end = line.rfind('}');
    if (end == std::string_view::npos) return std::nullopt;
    sample.labels = line.substr(1, end - 1);
    line.remove_prefix(end + 1);
  }
  line.remove_prefix(std::min(line.find_first_not_of(' '), line.size()));
  const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), sample.value);
  if (error != std::errc()) return std::nullopt;
  return sample;
}

std::optional<size_t> Position(std::string_view labels) {
  constexpr std::string_view kKey = "position=\"";
  const size_t at = labels.find(kKey);
  if (at == std::string_view::npos) return std::nullopt;
  const std::string_view text = labels.substr(at + kKey.size());
  size_t position = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), position);
  if (error != std::errc() || position >= kMaxPositions) return std::nullopt;
  return position;
}

SpeculationCounters ParseWithPrefix(std::string_view metrics, std::string_view prefix) {
  SpeculationCounters counters;
  while (!metrics.empty()) {
    const size_t end = std::min(metrics.find('\n'), metrics.size());
    const std::optional<Sample> sample = ParseSample(metrics.substr(0, end));
    metrics.remove_prefix(std::min(end + 1, metrics.size()));
    if (!sample || !sample->name.starts_with(prefix)) continue;
    const std::string_view name = sample->name.substr(prefix.size());
    if (name == "num_drafts_total") {
      counters.drafts += sample->value;
    } else if (name == "num_draft_tokens_total") {
      counters.draft_tokens += sample->value;
    } else if (name == "num_accepted_tokens_total") {
      counters.accepted_tokens += sample->value;
    } else if (name == "num_accepted_tokens_per_pos_total") {
      if (const std::optional<size_t> position = Position(sample->labels)) {
        auto& values = counters.accepted_per_position;
        if (values.size() <= *position) values.resize(*position + 1);
        values[*position] += sample->value;
      }
    } else {
      continue;
    }
    counters.found = true;
  }
  return counters;
}

}  // namespace

std::vector<std::string> SseParser::Push(std::string_view bytes) {
  std::vector<std::string> events;
  for (const char c : bytes) {
    const bool ends_pair = after_cr_ && c == '\n';
    after_cr_ = c == '\r';
    if (ends_pair) continue;
    if (c == '\n' || c == '\r') {
      Line(line_, &events);
      line_.clear();
    } else {
      line_.push_back(c);
    }
  }
  return events;
}

void SseParser::Line(std::string_view line, std::vector<std::string>* events) {
  if (line.empty()) {
    if (has_data_) events->push_back(std::move(data_));
    data_.clear();
    has_data_ = false;
    return;
  }
  // Other fields (event, id, retry) and comments carry nothing for us.
  constexpr std::string_view kData = "data:";
  if (!line.starts_with(kData)) return;
  line.remove_prefix(kData.size());
  if (line.starts_with(' ')) line.remove_prefix(1);
  if (has_data_) data_.push_back('\n');
  data_.append(line);
  has_data_ = true;
}

SpeculationCounters SpeculationCounters::Since(const SpeculationCounters& before) const {
  SpeculationCounters delta = *this;
  delta.drafts -= before.drafts;
  delta.draft_tokens -= before.draft_tokens;
  delta.accepted_tokens -= before.accepted_tokens;
  const size_t positions = std::min(delta.accepted_per_position.size(), before.accepted_per_position.size());
  for (size_t i = 0; i < positions; ++i) delta.accepted_per_position[i] -= before.accepted_per_position[i];
  return delta;
}

SpeculationCounters ParseSpeculationCounters(std::string_view metrics) {
  SpeculationCounters own = ParseWithPrefix(metrics, "linspec_spec_decode_");
  return own.found ? own : ParseWithPrefix(metrics, "vllm:spec_decode_");
}

}  // namespace linspec::loadtest
