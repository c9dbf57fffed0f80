#include "loadtest/wire_text.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

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

// Keeps the few values of an event that matter, by where they are: error; choices[].text; choices[].delta.content;
// usage.prompt_tokens and usage.completion_tokens.
class EventReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit EventReader(StreamEvent* event) : event_(event) {}
  bool is_object() const { return is_object_; }

  bool key(string_t& name) override {
    if (depth_ <= kDeepest) keys_[depth_] = KeyOf(name);
    if (depth_ == 1 && keys_[1] == Key::kError) event_->is_error = true;
    return true;
  }
  bool string(string_t& value) override {
    const bool text = At(3, Key::kChoices) && keys_[3] == Key::kText;
    const bool content = At(4, Key::kChoices) && keys_[3] == Key::kDelta && keys_[4] == Key::kContent;
    if ((text || content) && !value.empty()) event_->texts.push_back(std::move(value));
    return true;
  }
  bool number_integer(number_integer_t value) override { return Number(value); }
  bool number_unsigned(number_unsigned_t value) override { return Number(static_cast<int64_t>(value)); }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override {
    if (depth_ == 0) is_object_ = true;
    if (depth_ == 1 && keys_[1] == Key::kUsage) event_->has_usage = true;
    return Enter();
  }
  bool start_array(size_t) override { return Enter(); }
  bool end_object() override { return --depth_, true; }
  bool end_array() override { return --depth_, true; }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception&) override { return false; }

 private:
  enum class Key : uint8_t { kOther, kError, kChoices, kUsage, kText, kDelta, kContent, kPrompt, kCompletion };
  static constexpr int kDeepest = 4;

  static Key KeyOf(std::string_view name) {
    constexpr std::pair<std::string_view, Key> kKeys[] = {
        {"error", Key::kError},          {"choices", Key::kChoices},
        {"usage", Key::kUsage},          {"text", Key::kText},
        {"delta", Key::kDelta},          {"content", Key::kContent},
        {"prompt_tokens", Key::kPrompt}, {"completion_tokens", Key::kCompletion}};
    for (const auto& [known, key] : kKeys) {
      if (known == name) return key;
    }
    return Key::kOther;
  }
  bool At(int depth, Key top) const { return depth_ == depth && is_object_ && keys_[1] == top; }
  bool Enter() {
    if (++depth_ <= kDeepest) keys_[depth_] = Key::kOther;
    return true;
  }
  bool Number(int64_t value) {
    if (!At(2, Key::kUsage)) return true;
    const int count = static_cast<int>(std::clamp<int64_t>(value, 0, std::numeric_limits<int>::max()));
    if (keys_[2] == Key::kPrompt) event_->prompt_tokens = count;
    if (keys_[2] == Key::kCompletion) event_->completion_tokens = count;
    return true;
  }

  StreamEvent* const event_;
  int depth_ = 0;
  bool is_object_ = false;
  std::array<Key, kDeepest + 1> keys_{};  // [d] the latest key of the object at depth d
};

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
  while (!bytes.empty()) {
    if (std::exchange(after_cr_, false) && bytes.front() == '\n') {
      bytes.remove_prefix(1);
      continue;
    }
    const size_t end = bytes.find_first_of("\r\n");
    if (end == std::string_view::npos) {
      line_.append(bytes);
      break;
    }
    if (line_.empty()) {
      Line(bytes.substr(0, end), &events);
    } else {
      Line(line_.append(bytes.substr(0, end)), &events);
      line_.clear();
    }
    after_cr_ = bytes[end] == '\r';
    bytes.remove_prefix(end + 1);
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

bool ParseStreamEvent(std::string_view data, StreamEvent* event) {
  *event = {};
  EventReader reader(event);
  return nlohmann::json::sax_parse(data.begin(), data.end(), &reader) && reader.is_object();
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
