#include "loadtest/workload.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "loadtest/statistics.h"

namespace linspec::loadtest {
namespace {

// Frequent words, each a token of its own in most vocabularies.
constexpr std::string_view kWords[] = {"the",  "of",   "and",  "to",     "in",    "was",   "that", "his",   "he",
                                       "it",   "with", "for",  "had",    "her",   "not",   "but",  "she",   "they",
                                       "from", "all",  "one",  "there",  "were",  "this",  "when", "out",   "up",
                                       "said", "them", "time", "little", "house", "water", "day",  "night", "old",
                                       "man",  "good", "long", "way",    "again", "came",  "went", "down"};

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(fmt::format("cannot open {}", path));
  std::ostringstream text;
  text << file.rdbuf();
  return std::move(text).str();
}

template <typename Random>
std::string RandomPrompt(int num_words, Random* random) {
  std::uniform_int_distribution<size_t> pick(0, std::size(kWords) - 1);
  std::string prompt;
  for (int i = 0; i < num_words; ++i) {
    if (i > 0) prompt += ' ';
    prompt += kWords[pick(*random)];
  }
  return prompt;
}

// Mean `length` whatever the distribution; at least 1, at most 64 means (a heavy tail must not ask for a million
// tokens).
template <typename Random>
int RandomLength(int length, const Options& options, Random* random) {
  const double ratio = options.random_range_ratio;
  if (options.length_distribution == "uniform") {
    const int low = std::max(1, static_cast<int>(std::floor(length * (1 - ratio))));
    const int high = std::max(low, static_cast<int>(std::ceil(length * (1 + ratio))));
    return std::uniform_int_distribution<int>(low, high)(*random);
  }
  const double drawn = options.length_distribution == "lognormal"
                           ? std::lognormal_distribution<double>(std::log(length) - ratio * ratio / 2, ratio)(*random)
                           : std::exponential_distribution<double>(1.0 / length)(*random);
  return static_cast<int>(std::lround(std::clamp(drawn, 1.0, 64.0 * length)));
}

// Rate for request i of n: from start to end, in equal steps or equal factors.
double RampedRate(const Options& options, size_t i, size_t n) {
  const double share = n > 1 ? static_cast<double>(i) / static_cast<double>(n - 1) : 0;
  const double start = options.ramp_up_start_rps, end = options.ramp_up_end_rps;
  return options.ramp_up_strategy == "linear" ? start + (end - start) * share : start * std::pow(end / start, share);
}

// One JSON object a line, with "prompt", "text" or "turns" (its first).
absl::StatusOr<std::vector<std::string>> ReadPrompts(const std::string& path) {
  absl::StatusOr<std::string> text = ReadFile(path);
  if (!text.ok()) return text.status();
  std::vector<std::string> prompts;
  std::istringstream lines(*text);
  std::string line;
  for (int number = 1; std::getline(lines, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const nlohmann::json row = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    const nlohmann::json* prompt = nullptr;
    if (row.is_object()) {
      for (const char* key : {"prompt", "text", "turns"}) {
        if (row.contains(key)) prompt = &row.at(key);
      }
    }
    if (prompt != nullptr && prompt->is_array() && !prompt->empty()) prompt = &prompt->front();
    if (prompt == nullptr || !prompt->is_string()) {
      return absl::InvalidArgumentError(
          fmt::format("{}:{}: expected an object with a string \"prompt\", \"text\" or \"turns\"", path, number));
    }
    prompts.push_back(prompt->get<std::string>());
  }
  if (prompts.empty()) return absl::InvalidArgumentError(fmt::format("{}: no prompts", path));
  return prompts;
}

// A JSON array of {"conversations": [{"value": ...}, ...]}; what the first speaker says first is the prompt.
absl::StatusOr<std::vector<std::string>> ReadShareGpt(const std::string& path) {
  absl::StatusOr<std::string> text = ReadFile(path);
  if (!text.ok()) return text.status();
  const nlohmann::json rows = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
  if (!rows.is_array()) return absl::InvalidArgumentError(fmt::format("{}: expected a JSON array", path));
  std::vector<std::string> prompts;
  const auto first_turn = "/conversations/0/value"_json_pointer;
  for (const nlohmann::json& row : rows) {
    if (row.is_object() && row.contains(first_turn) && row.at(first_turn).is_string())
      prompts.push_back(row.at(first_turn).get<std::string>());
  }
  if (prompts.empty()) return absl::InvalidArgumentError(fmt::format("{}: no conversation in it", path));
  return prompts;
}

std::vector<std::string_view> Fields(std::string_view line) {
  if (line.ends_with('\r')) line.remove_suffix(1);
  std::vector<std::string_view> fields;
  while (true) {
    const size_t comma = line.find(',');
    fields.push_back(line.substr(0, comma));
    if (comma == std::string_view::npos) return fields;
    line.remove_prefix(comma + 1);
  }
}

template <typename T>
bool ParseAll(std::string_view text, T* out) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *out);
  return error == std::errc() && end == text.data() + text.size();
}

bool ParseTime(std::string_view text, double* seconds) {
  if (ParseAll(text, seconds)) return std::isfinite(*seconds);
  int year = 0, month = 0, day = 0, hour = 0, minute = 0;
  double second = 0;
  const std::string copy(text);
  if (std::sscanf(copy.c_str(), "%d-%d-%d%*c%d:%d:%lf", &year, &month, &day, &hour, &minute, &second) != 6)
    return false;
  const std::chrono::year_month_day date{std::chrono::year(year), std::chrono::month(month), std::chrono::day(day)};
  if (!date.ok()) return false;
  *seconds = std::chrono::sys_days(date).time_since_epoch().count() * 86400.0 + hour * 3600 + minute * 60 + second;
  return true;
}

int Column(const std::vector<std::string_view>& header, std::initializer_list<std::string_view> names) {
  for (size_t i = 0; i < header.size(); ++i) {
    if (std::find(names.begin(), names.end(), header[i]) != names.end()) return static_cast<int>(i);
  }
  return -1;
}

}  // namespace

absl::StatusOr<std::vector<TraceRow>> ParseTrace(std::string_view csv) {
  std::vector<TraceRow> rows;
  int number = 0, arrival = -1, prompt = -1, output = -1;
  while (!csv.empty()) {
    const size_t end = std::min(csv.find('\n'), csv.size());
    const std::vector<std::string_view> fields = Fields(csv.substr(0, end));
    csv.remove_prefix(std::min(end + 1, csv.size()));
    if (++number == 1) {
      arrival = Column(fields, {"arrival", "TIMESTAMP"});
      prompt = Column(fields, {"prompt_tokens", "ContextTokens"});
      output = Column(fields, {"output_tokens", "GeneratedTokens"});
      if (arrival < 0 || prompt < 0 || output < 0) {
        return absl::InvalidArgumentError("trace line 1: expected columns arrival, prompt_tokens, output_tokens");
      }
      continue;
    }
    if (fields.size() == 1 && fields[0].empty()) continue;
    TraceRow row;
    const int last = std::max({arrival, prompt, output});
    if (static_cast<int>(fields.size()) <= last || !ParseTime(fields[arrival], &row.arrival) ||
        !ParseAll(fields[prompt], &row.prompt_tokens) || !ParseAll(fields[output], &row.output_tokens) ||
        row.prompt_tokens < 0 || row.output_tokens < 0) {
      return absl::InvalidArgumentError(fmt::format("trace line {}: not understood", number));
    }
    rows.push_back(row);
  }
  if (rows.empty()) return absl::InvalidArgumentError("trace: no rows");
  std::stable_sort(rows.begin(), rows.end(),
                   [](const TraceRow& a, const TraceRow& b) { return a.arrival < b.arrival; });
  for (size_t i = rows.size(); i-- > 0;) rows[i].arrival -= rows[0].arrival;
  return rows;
}

absl::StatusOr<std::vector<PlannedRequest>> MakeWorkload(const Options& options) {
  std::vector<std::string> prompts;
  std::vector<TraceRow> trace;
  if (options.dataset_name == "custom" || options.dataset_name == "sharegpt") {
    absl::StatusOr<std::vector<std::string>> read =
        options.dataset_name == "custom" ? ReadPrompts(options.dataset_path) : ReadShareGpt(options.dataset_path);
    if (!read.ok()) return read.status();
    prompts = *std::move(read);
  } else if (options.dataset_name == "trace") {
    const absl::StatusOr<std::string> text = ReadFile(options.dataset_path);
    if (!text.ok()) return text.status();
    absl::StatusOr<std::vector<TraceRow>> rows = ParseTrace(*text);
    if (!rows.ok()) return rows.status();
    trace = *std::move(rows);
  }

  std::mt19937_64 random(options.seed);
  ArrivalGenerator arrivals(options.request_rate, options.burstiness, options.seed + 1);
  std::bernoulli_distribution cancel(options.cancel_fraction), slow(options.slow_fraction);
  const size_t count = trace.empty() ? static_cast<size_t>(options.num_prompts)
                                     : std::min(trace.size(), static_cast<size_t>(options.num_prompts));
  std::vector<PlannedRequest> workload(count);
  for (size_t i = 0; i < count; ++i) {
    PlannedRequest& request = workload[i];
    if (!options.ramp_up_strategy.empty()) arrivals.SetRate(RampedRate(options, i, count));
    if (!trace.empty()) {
      request.arrival = options.trace_arrivals ? trace[i].arrival / options.trace_speed : arrivals.Next();
      request.prompt = RandomPrompt(std::max(1, trace[i].prompt_tokens), &random);
      request.max_tokens = std::max(1, trace[i].output_tokens);
    } else {
      request.arrival = arrivals.Next();
      request.max_tokens = RandomLength(options.random_output_len, options, &random);
      request.prompt = !prompts.empty()
                           ? prompts[i % prompts.size()]
                           : RandomPrompt(RandomLength(options.random_input_len, options, &random), &random);
    }
    if (cancel(random)) request.cancel_after_chunks = options.cancel_after;
    if (slow(random)) request.read_delay_ms = options.slow_delay_ms;
  }
  return workload;
}

}  // namespace linspec::loadtest
