// `linspec bench-speculation`: what each drafter brings, beside plain decoding of the same prompts in the same run.
//
// Every mode gets the same prompts in turn, load by load, and each load starts with the next mode, so that a noisy
// machine slows all of them alike. Since speculation changes no text, all modes write the same, which is checked. As
// many requests are kept running as the batch says: as one ends, the next begins. Were all to begin together, the time
// would be that of the request that gains least, and show nothing of what the others make room for.
#include <fmt/format.h>

#include <algorithm>
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
#include "server/speculation_tally.h"

namespace linspec {
namespace {

using nlohmann::json;

constexpr double kSuitsDevice = -1, kSecondsOnGpu = 1;
constexpr int kRequestsPerSlot = 4;  // of a load

struct BenchPrompt {
  std::string set;
  std::vector<int32_t> tokens;
};

// How much is measured of each cell.
struct BenchSize {
  int max_tokens, repeats, warm_up_loads;
  double min_seconds;  // of each mode
};

class SpeculationBench {
 public:
  SpeculationBench(Service* service, std::vector<std::string> modes, BenchSize size)
      : service_(service), modes_(std::move(modes)), size_(size) {}

  void OnStep(const StepStats& step) {
    if (measuring_) current_.Add(step);
  }

  // All modes over all prompts of a set, `batch` running at a time. One tally per mode, plain decoding's first.
  absl::StatusOr<std::vector<SpeculationTally>> Run(std::span<const BenchPrompt> prompts, int batch, float temperature);

 private:
  // Prompts that are worked off with `batch` requests running.
  struct Load {
    std::vector<const BenchPrompt*> prompts;
    int batch;
  };
  Request MakeRequest(const Load& load, size_t i, SpeculationMode mode, float temperature);
  // Leaves in current_ what it did while `batch` requests were running: what is left when no more come says nothing.
  absl::Status RunLoad(const Load& load, const std::string& mode, float temperature,
                       std::vector<std::vector<int32_t>>* texts);
  // Every mode in turn, beginning with number `first`; what they did into tallies, unless null.
  absl::Status RunModes(const Load& load, size_t first, float temperature, std::vector<SpeculationTally>* tallies);

  Service* const service_;
  const std::vector<std::string> modes_;
  const BenchSize size_;
  SpeculationTally current_;
  bool measuring_ = false;
  uint64_t next_id_ = 1;
  int pass_ = 0;  // over the prompts of a cell: sampling draws anew in each
};

Request SpeculationBench::MakeRequest(const Load& load, size_t i, SpeculationMode mode, float temperature) {
  Request request;
  request.id = next_id_++;
  request.prompt_tokens = load.prompts[i]->tokens;
  request.sampling.temperature = temperature;
  request.sampling.seed = 1 + i + pass_ * load.prompts.size();
  // The first ones end one after the other, as on a server that has run for a while.
  const auto batch = static_cast<size_t>(load.batch);
  request.sampling.max_tokens = i < batch ? std::max<int>(size_.max_tokens * (i + 1) / batch, 1) : size_.max_tokens;
  request.speculation = mode;
  return request;
}

absl::Status SpeculationBench::RunLoad(const Load& load, const std::string& mode, float temperature,
                                       std::vector<std::vector<int32_t>>* texts) {
  const absl::StatusOr<SpeculationMode> speculation = ParseSpeculation(mode);
  if (!speculation.ok()) return speculation.status();
  texts->assign(load.prompts.size(), {});
  absl::Status failed;
  size_t next = 0, ended = 0;
  current_ = {};
  measuring_ = true;
  const auto start = Clock::now();
  const std::clock_t cpu = std::clock();
  do {
    for (; next < load.prompts.size() && next - ended < static_cast<size_t>(load.batch); ++next) {
      Request request = MakeRequest(load, next, *speculation, temperature);
      request.sink = [text = &(*texts)[next], &failed, &ended](RequestOutput&& output) {
        for (const SampledToken& token : output.tokens) text->push_back(token.token);
        if (output.finish_reason == FinishReason::kError) failed = output.status;
        ended += output.finish_reason != FinishReason::kNone;
        return true;
      };
      if (absl::Status status = service_->engine().Submit(std::move(request)); !status.ok()) return status;
    }
    if (measuring_ && next - ended < static_cast<size_t>(load.batch)) {
      current_.cpu_seconds = static_cast<double>(std::clock() - cpu) / CLOCKS_PER_SEC;
      current_.seconds = std::chrono::duration<double>(Clock::now() - start).count();
      measuring_ = false;
    }
  } while (service_->engine().Step());
  return failed;
}

absl::Status SpeculationBench::RunModes(const Load& load, size_t first, float temperature,
                                        std::vector<SpeculationTally>* tallies) {
  std::vector<std::vector<int32_t>> plain, texts;
  for (size_t i = 0; i < modes_.size(); ++i) {
    const size_t m = (first + i) % modes_.size();
    if (absl::Status status = RunLoad(load, modes_[m], temperature, &texts); !status.ok()) return status;
    if (plain.empty()) plain = texts;
    if (texts != plain) return absl::InternalError(fmt::format("{} changed the text", modes_[m]));
    if (tallies != nullptr) (*tallies)[m].Add(current_);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<SpeculationTally>> SpeculationBench::Run(std::span<const BenchPrompt> prompts, int batch,
                                                                    float temperature) {
  // Several requests at once: enough of them that a slot is taken again and again.
  const size_t per_load = batch == 1 ? 1 : static_cast<size_t>(batch) * kRequestsPerSlot;
  std::vector<Load> loads;
  for (size_t begin = 0; begin < prompts.size(); begin += per_load) {
    Load& load = loads.emplace_back(Load{{}, batch});
    for (size_t i = 0; i < per_load; ++i) load.prompts.push_back(&prompts[(begin + i) % prompts.size()]);
  }
  std::vector<SpeculationTally> tallies(modes_.size());
  size_t first = 0;  // mode
  pass_ = 0;
  for (int i = 0; i < size_.warm_up_loads; ++i) {
    if (absl::Status status = RunModes(loads[i % loads.size()], first++, temperature, nullptr); !status.ok()) {
      return status;
    }
  }
  const auto measured = [&] {  // by the mode that was quickest
    double least = tallies[0].seconds;
    for (const SpeculationTally& tally : tallies) least = std::min(least, tally.seconds);
    return least;
  };
  while (pass_ < size_.repeats || measured() < size_.min_seconds) {
    ++pass_;
    for (const Load& load : loads) {
      if (absl::Status status = RunModes(load, first++, temperature, &tallies); !status.ok()) return status;
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
  BenchSize size{.max_tokens = flags.Int("max-tokens", 128, 1, 1 << 20),
                 .repeats = flags.Int("repeats", 1, 1, 1000),
                 .warm_up_loads = flags.Int("warm-up", 1, 0, 1000),
                 .min_seconds = flags.Double("min-seconds", kSuitsDevice, kSuitsDevice, 3600)};
  const int per_set = flags.Int("prompts-per-set", 1 << 20, 1, 1 << 20);
  const bool expectation = flags.Int("expectations", 0, 0, 1) == 1;
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
  // A GPU is through with a set of prompts in a few hundredths of a second.
  if (size.min_seconds < 0) size.min_seconds = service.engine().device_stats().empty() ? 0 : kSecondsOnGpu;
  SpeculationBench bench(&service, modes, size);
  observer = &bench;

  json cells = json::array();
  std::string expectations = ExpectationHeader();
  fmt::print("{}", TallyHeader());
  for (const int temperature : temperatures) {
    for (const int batch : batches) {
      for (const auto& [set, prompts] : *sets) {
        const auto tallies = bench.Run(prompts, batch, static_cast<float>(temperature));
        if (!tallies.ok()) return tallies.status();
        for (size_t m = 0; m < modes.size(); ++m) {
          json figures = ToJson((*tallies)[m], tallies->front());
          const std::string cell = fmt::format("| {} | {} | {} | {} |", set, batch, temperature, modes[m]);
          fmt::print("{}", TallyRow(cell, figures));
          std::fflush(stdout);
          expectations += ExpectationRows(cell, figures);
          figures.update({{"prompts", set}, {"batch", batch}, {"temperature", temperature}, {"drafter", modes[m]}});
          cells.push_back(std::move(figures));
        }
      }
    }
  }
  if (expectation) fmt::print("{}", expectations);
  if (out.empty()) return absl::OkStatus();
  std::ofstream file(out);
  file << json{{"model", service.engine().Describe()}, {"config", DescribeConfig(*config)}, {"cells", cells}}.dump(1)
       << "\n";
  return file.good() ? absl::OkStatus() : absl::UnavailableError(fmt::format("--json: cannot write '{}'", out));
}

}  // namespace linspec
