// `linspec bench-speculation`: what each drafter brings, beside plain decoding of the same prompts in the same run.
//
// Every mode gets the same prompts in turn, group by group, and each repeat starts with the next mode, so that a noisy
// machine slows all of them alike. Since speculation changes no text, all modes do the same work, which is checked.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "server/commands.h"
#include "server/config.h"
#include "server/flags.h"
#include "server/metrics.h"
#include "server/model_files.h"

namespace linspec {
namespace {

using nlohmann::json;

constexpr size_t kDepths = 8;  // shown

struct BenchPrompt {
  std::string set;
  std::vector<int32_t> tokens;
};

// What one mode did with some groups of prompts.
struct Tally {
  int64_t tokens = 0, request_steps = 0, drafted = 0;
  double seconds = 0, cpu_seconds = 0, draft_s = 0, verify_s = 0, accept_s = 0;
  std::array<int64_t, kDepths> drafted_per_depth{}, accepted_per_depth{};
  std::vector<double> group_seconds;

  // One group's.
  void Add(const Tally& group) {
    tokens += group.tokens;
    request_steps += group.request_steps;
    drafted += group.drafted;
    seconds += group.seconds;
    cpu_seconds += group.cpu_seconds;
    draft_s += group.draft_s;
    verify_s += group.verify_s;
    accept_s += group.accept_s;
    for (size_t d = 0; d < kDepths; ++d) {
      drafted_per_depth[d] += group.drafted_per_depth[d];
      accepted_per_depth[d] += group.accepted_per_depth[d];
    }
    group_seconds.push_back(group.seconds);
  }
  void Add(const StepStats& step) {
    request_steps += step.num_decode_requests;
    tokens += step.num_output_tokens;
    drafted += step.num_draft_tokens;
    draft_s += step.draft_s;
    verify_s += step.verify_s + step.commit_s;
    accept_s += step.accept_s;
    for (size_t d = 0; d < kDepths; ++d) {
      drafted_per_depth[d] += step.drafted_per_depth[d];
      accepted_per_depth[d] += step.accepted_per_depth[d];
    }
  }
  double TokensPerStep() const {
    return static_cast<double>(tokens) / static_cast<double>(std::max<int64_t>(request_steps, 1));
  }
  double TokensPerSecond() const { return static_cast<double>(tokens) / seconds; }
};

// The middle one of how much longer plain decoding took, group by group: an interruption spoils one group only.
double MedianSpeedUp(const Tally& tally, const Tally& plain) {
  std::vector<double> ratios;
  for (size_t i = 0; i < tally.group_seconds.size(); ++i) {
    ratios.push_back(plain.group_seconds[i] / tally.group_seconds[i]);
  }
  std::nth_element(ratios.begin(), ratios.begin() + static_cast<int64_t>(ratios.size() / 2), ratios.end());
  return ratios[ratios.size() / 2];
}

json ToJson(const Tally& tally, const Tally& plain) {
  json acceptance = json::array();
  for (size_t d = 0; d < kDepths && tally.drafted_per_depth[d] > 0; ++d) {
    acceptance.push_back(static_cast<double>(tally.accepted_per_depth[d]) /
                         static_cast<double>(tally.drafted_per_depth[d]));
  }
  return {{"tokens", tally.tokens},
          {"tokens_per_step", tally.TokensPerStep()},
          {"tokens_per_s", tally.TokensPerSecond()},
          {"speed_up", tally.TokensPerSecond() / plain.TokensPerSecond()},
          {"median_speed_up", MedianSpeedUp(tally, plain)},
          {"cpu_speed_up", plain.cpu_seconds / tally.cpu_seconds},
          {"drafted_per_step",
           static_cast<double>(tally.drafted) / static_cast<double>(std::max<int64_t>(tally.request_steps, 1))},
          {"draft_share", tally.draft_s / tally.seconds},
          {"verify_share", tally.verify_s / tally.seconds},
          {"accept_share", tally.accept_s / tally.seconds},
          {"accepted_per_depth", acceptance}};
}

class SpeculationBench {
 public:
  SpeculationBench(Service* service, std::vector<std::string> modes, int max_tokens, int repeats)
      : service_(service), modes_(std::move(modes)), max_tokens_(max_tokens), repeats_(repeats) {}

  void OnStep(const StepStats& step) { current_.Add(step); }

  // All modes over all prompts of a set, `batch` at a time. One Tally per mode; the first mode is plain decoding.
  absl::StatusOr<std::vector<Tally>> Run(std::span<const BenchPrompt> prompts, int batch, float temperature);

 private:
  absl::Status RunGroup(std::span<const BenchPrompt* const> group, const std::string& mode, float temperature,
                        std::vector<std::vector<int32_t>>* texts);

  Service* const service_;
  const std::vector<std::string> modes_;
  const int max_tokens_, repeats_;
  Tally current_;
  uint64_t next_id_ = 1;
};

absl::Status SpeculationBench::RunGroup(std::span<const BenchPrompt* const> group, const std::string& mode,
                                        float temperature, std::vector<std::vector<int32_t>>* texts) {
  const absl::StatusOr<SpeculationMode> speculation = ParseSpeculation(mode);
  if (!speculation.ok()) return speculation.status();
  texts->assign(group.size(), {});
  absl::Status failed;
  for (size_t i = 0; i < group.size(); ++i) {
    Request request;
    request.id = next_id_++;
    request.prompt_tokens = group[i]->tokens;
    request.sampling.temperature = temperature;
    request.sampling.seed = 1 + i;
    request.sampling.max_tokens = max_tokens_;
    request.speculation = *speculation;
    std::vector<int32_t>* text = &(*texts)[i];
    request.sink = [text, &failed](RequestOutput&& output) {
      for (const SampledToken& token : output.tokens) text->push_back(token.token);
      if (output.finish_reason == FinishReason::kError) failed = output.status;
      return true;
    };
    if (absl::Status status = service_->engine().Submit(std::move(request)); !status.ok()) return status;
  }
  current_ = {};
  const auto start = Clock::now();
  const std::clock_t cpu = std::clock();
  while (service_->engine().Step()) {
  }
  current_.cpu_seconds = static_cast<double>(std::clock() - cpu) / CLOCKS_PER_SEC;
  current_.seconds = std::chrono::duration<double>(Clock::now() - start).count();
  return failed;
}

absl::StatusOr<std::vector<Tally>> SpeculationBench::Run(std::span<const BenchPrompt> prompts, int batch,
                                                         float temperature) {
  std::vector<Tally> tallies(modes_.size());
  std::vector<std::vector<int32_t>> plain, texts;
  size_t first = 0;  // mode
  for (int repeat = 0; repeat < repeats_; ++repeat) {
    for (size_t begin = 0; begin < prompts.size(); begin += batch) {
      std::vector<const BenchPrompt*> group;
      for (int i = 0; i < batch; ++i) group.push_back(&prompts[(begin + i) % prompts.size()]);
      plain.clear();
      for (size_t i = 0; i < modes_.size(); ++i) {
        const size_t m = (first + i) % modes_.size();
        if (absl::Status status = RunGroup(group, modes_[m], temperature, &texts); !status.ok()) return status;
        if (plain.empty()) plain = texts;
        if (texts != plain) return absl::InternalError(fmt::format("{} changed the text", modes_[m]));
        tallies[m].Add(current_);
      }
      ++first;
    }
  }
  return tallies;
}

// JSON lines with `set`, and `prompt` or `messages`.
absl::StatusOr<std::map<std::string, std::vector<BenchPrompt>>> ReadPrompts(const std::string& path, int per_set,
                                                                            const Service& service) {
  const absl::StatusOr<std::string> text = ReadFile(path);
  if (!text.ok()) return text.status();
  std::map<std::string, std::vector<BenchPrompt>> sets;
  std::istringstream lines(*text);
  int number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    const json entry = json::parse(line, nullptr, /*allow_exceptions=*/false);
    const bool chat = entry.is_object() && entry.contains("messages") && entry["messages"].is_array();
    if (!entry.is_object() || !entry.value("set", json()).is_string() ||
        (!chat && !entry.value("prompt", json()).is_string())) {
      return absl::InvalidArgumentError(
          fmt::format("{}:{}: expected an object with set, and prompt or messages", path, number));
    }
    PromptInput input =
        chat ? PromptInput(std::vector<ChatMessage>()) : PromptInput(entry["prompt"].get<std::string>());
    for (const json& message : chat ? entry["messages"] : json::array()) {
      if (!message.is_object() || !message.value("role", json()).is_string() ||
          !message.value("content", json()).is_string()) {
        return absl::InvalidArgumentError(fmt::format("{}:{}: a message needs role and content", path, number));
      }
      std::get<std::vector<ChatMessage>>(input).push_back({message["role"], message["content"]});
    }
    auto tokens = service.ToTokens(input);
    if (!tokens.ok()) {
      return absl::InvalidArgumentError(fmt::format("{}:{}: {}", path, number, std::string(tokens.status().message())));
    }
    std::vector<BenchPrompt>& set = sets[entry["set"]];
    if (std::ssize(set) < per_set) set.push_back({entry["set"], *std::move(tokens)});
  }
  if (sets.empty()) return absl::InvalidArgumentError(fmt::format("--prompts: '{}' has none", path));
  return sets;
}

void PrintRow(const std::string& set, int batch, double temperature, const std::string& mode, const json& cell) {
  std::string acceptance;
  for (const json& rate : cell["accepted_per_depth"]) acceptance += fmt::format(" {:.2f}", rate.get<double>());
  fmt::print("| {} | {} | {} | {} | {:.2f} | {:.0f} | {:.2f} | {:.2f} | {:.2f} | {:.0f} % |{} |\n", set, batch,
             temperature, mode, cell["tokens_per_step"].get<double>(), cell["tokens_per_s"].get<double>(),
             cell["speed_up"].get<double>(), cell["median_speed_up"].get<double>(), cell["cpu_speed_up"].get<double>(),
             100 * cell["draft_share"].get<double>(), acceptance);
  std::fflush(stdout);
}

std::vector<std::string> SplitList(const std::string& text) {
  std::vector<std::string> items;
  std::istringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) items.push_back(item);
  return items;
}

}  // namespace

absl::Status BenchSpeculation(std::span<const std::string> args) {
  CommandFlags flags(args);
  const std::string path = flags.String("prompts", "tests/data/prompts/speculation.jsonl");
  std::vector<std::string> modes = SplitList(flags.String("drafters", "draft,medusa,recurrent,ngram,auto"));
  const auto batches = flags.Ints("batch", "1,2,4,8,16", 1, 4096);
  const auto temperatures = flags.Ints("temperature", "0,1", 0, 2);
  const int max_tokens = flags.Int("max-tokens", 128, 1, 1 << 20);
  const int repeats = flags.Int("repeats", 1, 1, 1000);
  const int per_set = flags.Int("prompts-per-set", 1 << 20, 1, 1 << 20);
  const std::string out = flags.String("json", "");
  if (!flags.status().ok()) return flags.status();
  auto config = ParseServerConfig(flags.rest());
  if (!config.ok()) return config.status();
  modes.insert(modes.begin(), "off");
  config->engine.max_requests = *std::max_element(batches.begin(), batches.end());
  config->engine.prefix_cache = 0;

  SpeculationBench* observer = nullptr;
  auto parts = LoadParts(*config, [&observer](const StepStats& step) {
    if (observer != nullptr) observer->OnStep(step);
  });
  if (!parts.ok()) return parts.status();
  Metrics metrics({.model_name = "bench"});
  Log log(LogFormat::kText, LogLevel::kOff);
  Service service(*config, *std::move(parts), &metrics, &log);
  const auto sets = ReadPrompts(path, per_set, service);
  if (!sets.ok()) return sets.status();
  SpeculationBench bench(&service, modes, max_tokens, repeats);
  observer = &bench;

  json cells = json::array();
  fmt::print(
      "| prompts | batch | temperature | drafter | tokens/step | tokens/s | speed-up | median | by CPU time | drafting "
      "| accepted "
      "per depth |\n"
      "|---|---|---|---|---|---|---|---|---|---|---|\n");
  for (const int temperature : temperatures) {
    for (const int batch : batches) {
      for (const auto& [set, prompts] : *sets) {
        const auto tallies = bench.Run(prompts, batch, static_cast<float>(temperature));
        if (!tallies.ok()) return tallies.status();
        for (size_t m = 0; m < modes.size(); ++m) {
          json cell = ToJson((*tallies)[m], tallies->front());
          PrintRow(set, batch, temperature, modes[m], cell);
          cell.update({{"prompts", set}, {"batch", batch}, {"temperature", temperature}, {"drafter", modes[m]}});
          cells.push_back(std::move(cell));
        }
      }
    }
  }
  if (out.empty()) return absl::OkStatus();
  std::ofstream file(out);
  file << json{{"model", service.engine().Describe()}, {"config", DescribeConfig(*config)}, {"cells", cells}}.dump(1)
       << "\n";
  return file.good() ? absl::OkStatus() : absl::UnavailableError(fmt::format("--json: cannot write '{}'", out));
}

}  // namespace linspec
