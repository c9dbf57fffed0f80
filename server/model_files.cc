#include "server/model_files.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "kernels/ops.h"
#include "models/cuda_chains.h"
#include "models/cuda_guesser.h"
#include "models/draft_model_drafter.h"
#include "models/head_chain_drafter.h"
#include "models/medusa_drafter.h"
#include "models/ngram_drafter.h"
#include "models/recurrent_drafter.h"

namespace linspec {
namespace {

namespace fs = std::filesystem;

absl::Status InFile(const std::string& path, const absl::Status& status) {
  return absl::Status(status.code(), fmt::format("{}: {}", path, std::string(status.message())));
}

// Whether there is something to read, or something in the way that reading will name: a loop of links, a forbidden
// folder.
bool MayExist(const fs::path& path) {
  std::error_code error;
  return fs::exists(path, error) || error;
}

struct TemplateText {
  std::string source, from;  // "" if the folder has none; the file
};

// chat_template.jinja, or the template inside tokenizer_config.json (a string, or the one named "default").
absl::StatusOr<TemplateText> FindChatTemplate(const std::string& folder) {
  const std::string own = folder + "/chat_template.jinja";
  const std::string config = folder + "/tokenizer_config.json";
  std::string source, from = own;
  if (MayExist(own)) {
    auto text = ReadFile(own);
    if (!text.ok()) return text.status();
    source = *std::move(text);
  } else if (MayExist(config)) {
    auto text = ReadFile(config);
    if (!text.ok()) return text.status();
    from = config;
    const auto json = nlohmann::json::parse(*text, nullptr, false);
    if (!json.is_object()) return absl::InvalidArgumentError(fmt::format("{}: not a JSON object", config));
    const auto found = json.find("chat_template");
    if (found != json.end() && found->is_string()) source = found->get<std::string>();
    if (found != json.end() && found->is_array()) {
      for (const auto& named : *found) {
        if (named.is_object() && named.value("name", nlohmann::json()) == "default" && named.contains("template") &&
            named["template"].is_string()) {
          source = named["template"].get<std::string>();
        }
      }
    }
  }
  return TemplateText{.source = std::move(source), .from = from};
}

absl::Status LoadChatTemplate(ModelFiles* files) {
  auto text = FindChatTemplate(files->path);
  if (!text.ok()) return text.status();
  if (text->source.empty()) return absl::OkStatus();
  auto parsed = ChatTemplate::Parse(text->source);
  if (!parsed.ok()) return InFile(text->from, parsed.status());
  files->chat_template = *std::move(parsed);
  files->chat_template_source = std::move(text->source);
  return absl::OkStatus();
}

absl::Status LoadGenerationConfig(ModelFiles* files) {
  const std::string path = (fs::path(files->path) / "generation_config.json").string();
  if (!MayExist(path)) return absl::OkStatus();
  auto text = ReadFile(path);
  if (!text.ok()) return text.status();
  auto parsed = ParseGenerationConfig(*text, files->model->config().vocab_size);
  if (!parsed.ok()) return InFile(path, parsed.status());
  files->generation = *std::move(parsed);
  const std::vector<int32_t>& known = files->model->config().eos_token_ids;
  std::erase_if(files->generation.eos_token_ids,
                [&](int32_t id) { return std::ranges::find(known, id) != known.end(); });
  return absl::OkStatus();
}

// Target and draft run on one engine thread, so they share one pool of worker threads.
absl::StatusOr<std::shared_ptr<CpuOps>> MakeOps(const ServerConfig::ModelOptions& options) {
  CpuOps::Options ops;
  ops.num_threads = options.threads;
  for (const Isa isa : kIsas) {
    if (options.isa == IsaName(isa)) ops.isa = isa;
  }
  auto made = CpuOps::Create(ops);
  if (!made.ok()) return InFile("--isa " + options.isa, made.status());
  return std::shared_ptr<CpuOps>(*std::move(made));
}

// A line that is rewritten as the loading goes on; nothing for models that load at once.
std::function<void(double)> LoadProgress(const std::string& path) {
  return [path, start = Clock::now(), shown = false](double fraction) mutable {
    shown |= fraction < 0.9 && Clock::now() - start > std::chrono::milliseconds(500);
    if (!shown) return;
    fmt::print(stderr, "\rloading {}: {:3.0f} %{}", path, 100 * fraction, fraction < 1 ? "" : "\n");
  };
}

LoadOptions OptionsFor(const std::string& path, const ServerConfig::ModelOptions& options, const Machine& machine) {
  LoadOptions load;
  load.path = path;
  load.weight_dtype = options.weight_dtype;
  load.state_dtype = options.state_dtype;
  load.ops = machine.ops;
  load.cuda = machine.cuda;
  load.deterministic = options.deterministic;
  if (isatty(STDERR_FILENO)) load.progress = LoadProgress(path);
  return load;
}

// Slots when nobody said: what a GPU holds, less a reserve for drafters' states and those kept, or what suits a CPU.
int MaxRequests(const ServerConfig& config, const Model& model) {
  constexpr int kOnCpu = 64, kMostOnGpu = 2048;
  if (config.engine.max_requests > 0) return config.engine.max_requests;
  const int64_t fit = model.SlotsThatFit();
  return fit < 0 ? kOnCpu
                 : static_cast<int>(std::clamp<int64_t>(fit * 9 / 10 - config.engine.prefix_cache, 1, kMostOnGpu));
}

// Shape of draft trees when nobody said. Rows are nearly free on a GPU: beside the likeliest path, the other tokens
// that a drafter thought possible are worth verifying.
int DraftTopK(const ServerConfig& config, const Machine& machine) {
  constexpr int kOnCpu = 1, kOnGpu = 4;
  if (config.engine.draft_top_k > 0) return config.engine.draft_top_k;
  return machine.cuda == nullptr ? kOnCpu : kOnGpu;
}

int MaxDraftNodes(const ServerConfig& config, const Machine& machine) {
  constexpr int kOnCpu = 8, kOnGpu = 16;
  if (config.engine.max_draft_nodes > 0) return config.engine.max_draft_nodes;
  return machine.cuda == nullptr ? kOnCpu : kOnGpu;
}

absl::StatusOr<std::unique_ptr<Drafter>> LoadDraft(const std::string& path, const ServerConfig& config,
                                                   const Machine& machine, int64_t vocab_size, int max_sequences) {
  auto model = LoadModel(OptionsFor(path, config.model, machine));
  if (!model.ok()) return InFile("--draft-model " + path, model.status());
  std::unique_ptr<DraftChains> chains = MakeCudaChains(**model);
  auto drafter = DraftModelDrafter::Create(*std::move(model), vocab_size,
                                           {.max_sequences = max_sequences,
                                            .max_depth = config.engine.draft_depth,
                                            .top_k = DraftTopK(config, machine),
                                            .min_confidence = 0},
                                           std::move(chains));
  if (!drafter.ok()) return InFile("--draft-model " + path, drafter.status());
  return std::unique_ptr<Drafter>(*std::move(drafter));
}

// Heads run where their target does.
absl::StatusOr<std::unique_ptr<DraftGuesser>> LoadMedusaGuesser(const ModelFiles& files, const std::string& dtype) {
  if (files.machine.cuda != nullptr) return LoadCudaMedusaGuesser(files.path, files.model.get(), dtype);
  auto heads = MedusaHeads::Load(files.path, files.model->config(), dtype, files.machine.ops);
  if (!heads.ok()) return heads.status();
  return MakeMedusaGuesser(*std::move(heads), files.model.get());
}

// The heads beside the target; null if there are none.
absl::StatusOr<std::unique_ptr<Drafter>> LoadMedusa(const ModelFiles& files, const ServerConfig& config) {
  if (!MayExist(fs::path(files.path) / kMedusaConfigFile)) return std::unique_ptr<Drafter>();
  auto heads = LoadMedusaGuesser(files, config.model.weight_dtype);
  if (!heads.ok()) return heads.status();
  MedusaOptions options;
  if (config.engine.medusa_tree == "mc_sim_7b_63") options.tree = MedusaTree::kMcSim7b63;
  auto drafter = MedusaDrafter::Create(*std::move(heads), options);
  if (!drafter.ok()) return drafter.status();
  return std::unique_ptr<Drafter>(*std::move(drafter));
}

// The recurrent head beside the target; null if there is none.
absl::StatusOr<std::unique_ptr<Drafter>> LoadRecurrent(const ModelFiles& files, const ServerConfig& config) {
  if (!MayExist(fs::path(files.path) / kRecurrentHeadConfigFile)) return std::unique_ptr<Drafter>();
  const std::string& dtype = config.model.weight_dtype;
  const int depth = config.engine.draft_depth, top_k = DraftTopK(config, files.machine);
  if (files.machine.cuda != nullptr) {
    auto head = LoadCudaRecurrentGuesser(files.path, files.model.get(), dtype);
    if (!head.ok()) return head.status();
    auto drafter = HeadChainDrafter::Create("recurrent", *std::move(head), {.max_depth = depth, .top_k = top_k});
    if (!drafter.ok()) return drafter.status();
    return std::unique_ptr<Drafter>(*std::move(drafter));
  }
  auto head = RecurrentHead::Load(files.path, files.model->config(), dtype, files.machine.ops);
  if (!head.ok()) return head.status();
  auto drafter = RecurrentDrafter::Create(*std::move(head), files.model.get(),
                                          {.max_depth = depth, .top_k = top_k, .min_confidence = 0});
  if (!drafter.ok()) return drafter.status();
  return std::unique_ptr<Drafter>(*std::move(drafter));
}

// The draft to load: what was asked for, or the bundled one beside the bundled target; "" for none.
std::string DraftPath(const ServerConfig& config) {
  if (config.model.draft_path == "none") return "";
  if (!config.model.draft_path.empty()) return config.model.draft_path;
  if (!config.model.path.empty()) return "";
  return FindBundledModel("draft").value_or("");
}

// What the folder offers and what the default mode needs; the n-gram drafter is always there, and last.
absl::StatusOr<std::vector<std::unique_ptr<Drafter>>> LoadDrafters(const ModelFiles& files, const ServerConfig& config,
                                                                   SpeculationMode mode, int max_requests) {
  std::vector<std::unique_ptr<Drafter>> drafters;
  const std::string draft = DraftPath(config);
  if (mode == SpeculationMode::kDraft && draft.empty()) {
    return absl::InvalidArgumentError("--speculation draft needs --draft-model FOLDER");
  }
  if (!draft.empty()) {
    auto drafter = LoadDraft(draft, config, files.machine, files.model->config().vocab_size, max_requests);
    if (!drafter.ok()) return drafter.status();
    drafters.push_back(*std::move(drafter));
  }
  auto medusa = LoadMedusa(files, config);
  if (!medusa.ok()) return medusa.status();
  if (mode == SpeculationMode::kMedusa && *medusa == nullptr) {
    return absl::InvalidArgumentError(
        fmt::format("--speculation medusa needs {} and {} in {}", kMedusaConfigFile, kMedusaWeightsFile, files.path));
  }
  if (*medusa != nullptr) drafters.push_back(*std::move(medusa));
  auto recurrent = LoadRecurrent(files, config);
  if (!recurrent.ok()) return recurrent.status();
  if (mode == SpeculationMode::kRecurrent && *recurrent == nullptr) {
    return absl::InvalidArgumentError(fmt::format("--speculation recurrent needs {} and {} in {}",
                                                  kRecurrentHeadConfigFile, kRecurrentHeadWeightsFile, files.path));
  }
  if (*recurrent != nullptr) drafters.push_back(*std::move(recurrent));
  drafters.push_back(std::make_unique<NgramDrafter>());
  return drafters;
}

// The folder's name. The bundled model's folder is called "target": a place, not a name.
std::string ModelName(const ServerConfig& config, const std::string& path) {
  if (config.model.path.empty()) return "linspec-bundled";
  const fs::path folder(path);
  return (folder.has_filename() ? folder : folder.parent_path()).filename().string();
}

}  // namespace

absl::StatusOr<Machine> OpenMachine(const ServerConfig::ModelOptions& options) {
  Machine machine;
  auto ops = MakeOps(options);
  if (!ops.ok()) return ops.status();
  machine.ops = *std::move(ops);
  if (options.device == "cpu") return machine;
  auto cuda = CudaDevice::Open(options.cuda_plugin);
  if (cuda.ok()) {
    machine.cuda = *std::move(cuda);
  } else if (options.device == "cuda") {
    return InFile("--device cuda", cuda.status());
  } else if (!absl::IsNotFound(cuda.status())) {  // without a plugin nobody expects a GPU
    fmt::print(stderr, "linspec: computing on the CPU: {}\n", std::string(cuda.status().message()));
  }
  return machine;
}

int MaxStepTokens(const ServerConfig& config, const Machine& machine) {
  constexpr int kOnCpu = 512, kOnGpu = 2048;
  if (config.engine.max_step_tokens > 0) return config.engine.max_step_tokens;
  return machine.cuda != nullptr ? kOnGpu : kOnCpu;
}

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  if (file) text << file.rdbuf();
  std::error_code error;
  if (!file || fs::is_directory(path, error)) return absl::NotFoundError(fmt::format("cannot read '{}'", path));
  return text.str();
}

absl::StatusOr<SpeculationMode> ParseSpeculation(const std::string& name) {
  if (const auto mode = FindSpeculationMode(name)) return *mode;
  return absl::InvalidArgumentError(fmt::format("--speculation: '{}' is not one of {}", name, SpeculationModeNames()));
}

absl::StatusOr<std::string> FindBundledModel(const std::string& name) {
  std::error_code error;
  const fs::path binary = fs::read_symlink("/proc/self/exe", error).parent_path();
  const fs::path candidates[] = {binary / "../share/linspec/models" / name, binary / "../../models/bundled" / name,
                                 fs::path("models/bundled") / name};
  std::string looked;
  for (const fs::path& path : candidates) {
    if (fs::exists(path / "config.json", error)) return path.lexically_normal().string();
    looked += "\n  " + path.lexically_normal().string();
  }
  return absl::NotFoundError(
      fmt::format("no bundled model '{}'; give one with --model FOLDER. Looked in:{}", name, looked));
}

absl::StatusOr<ModelFiles> LoadModelFiles(const ServerConfig::ModelOptions& options) {
  ModelFiles files;
  files.path = options.path;
  if (files.path.empty()) {
    auto bundled = FindBundledModel("target");
    if (!bundled.ok()) return bundled.status();
    files.path = *std::move(bundled);
  }
  if (std::error_code error; !fs::is_directory(files.path, error)) {
    return absl::NotFoundError(
        fmt::format("--model: '{}' is not a folder; it should hold config.json, model.safetensors and "
                    "tokenizer.json",
                    files.path));
  }
  auto tokenizer = Tokenizer::FromFile(files.path + "/tokenizer.json");
  if (!tokenizer.ok()) return InFile(files.path + "/tokenizer.json", tokenizer.status());
  files.tokenizer = *std::move(tokenizer);
  if (absl::Status status = LoadChatTemplate(&files); !status.ok()) return status;
  auto machine = OpenMachine(options);
  if (!machine.ok()) return machine.status();
  files.machine = *std::move(machine);
  auto model = LoadModel(OptionsFor(files.path, options, files.machine));
  if (!model.ok()) return InFile("--model " + files.path, model.status());
  files.model = *std::move(model);
  if (options.generation_config == "auto") {
    if (absl::Status status = LoadGenerationConfig(&files); !status.ok()) return status;
  }
  return files;
}

EngineOptions EngineOptionsOf(const ServerConfig& config) {
  const auto& engine = config.engine;
  EngineOptions options;
  options.max_requests = engine.max_requests;
  options.prefix_cache_entries = std::min(engine.prefix_cache, engine.max_requests);
  options.max_queue_requests = engine.max_queue_requests;
  options.max_queue_tokens = engine.max_queue_tokens;
  options.max_step_tokens = engine.max_step_tokens;
  options.max_prompt_tokens = engine.max_prompt_tokens;
  options.max_output_tokens = engine.max_output_tokens;
  options.max_draft_nodes = engine.max_draft_nodes;
  if (engine.acceptance == "rejection") options.acceptance = AcceptanceMode::kRejection;
  if (engine.acceptance == "typical") options.acceptance = AcceptanceMode::kTypical;
  options.calibrate = engine.adaptive_speculation;
  options.max_draft_slowdown = engine.max_draft_slowdown;
  options.warm_up_s = engine.warm_up_s;
  options.run_ahead = engine.run_ahead;
  return options;
}

absl::StatusOr<Service::Parts> LoadParts(const ServerConfig& config, std::function<void(const StepStats&)> observer) {
  auto mode = ParseSpeculation(config.engine.speculation);
  if (!mode.ok()) return mode.status();
  auto files = LoadModelFiles(config.model);
  if (!files.ok()) return files.status();
  EngineOptions options = EngineOptionsOf(config);
  options.speculation = *mode;
  options.max_requests = MaxRequests(config, *files->model);
  options.prefix_cache_entries = std::min(config.engine.prefix_cache, options.max_requests);
  options.max_step_tokens = MaxStepTokens(config, files->machine);
  options.max_draft_nodes = MaxDraftNodes(config, files->machine);
  auto drafters = LoadDrafters(*files, config, *mode, options.max_requests);
  if (!drafters.ok()) return drafters.status();
  Service::Parts parts;
  for (const auto& drafter : *drafters) parts.drafters.emplace_back(drafter->name());
  auto engine = Engine::Create(std::move(files->model), *std::move(drafters), options, std::move(observer));
  if (!engine.ok()) return engine.status();
  parts.engine = *std::move(engine);
  parts.tokenizer = std::move(files->tokenizer);
  parts.chat_template = std::move(files->chat_template);
  parts.chat_template_source = std::move(files->chat_template_source);
  parts.generation = std::move(files->generation);
  parts.model_name = config.model.served_name.empty() ? ModelName(config, files->path) : config.model.served_name;
  return parts;
}

}  // namespace linspec
