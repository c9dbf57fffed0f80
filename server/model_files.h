// From a configuration to loaded parts: finds the model folder, loads weights, tokenizer, chat template and drafters.
//
// Threads: start-up only.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/cuda_device.h"
#include "kernels/ops.h"
#include "models/chat_template.h"
#include "models/generation_config.h"
#include "models/model.h"
#include "models/tokenizer.h"
#include "scheduler/engine.h"
#include "server/config.h"
#include "server/service.h"

namespace linspec {

// The folder of the bundled model `name` ("target", "draft"): beside the executable, beside the sources, or under the
// working directory. NOT_FOUND lists where it looked.
absl::StatusOr<std::string> FindBundledModel(const std::string& name);

// What models compute on.
struct Machine {
  std::shared_ptr<CpuOps> ops;
  std::shared_ptr<CudaDevice> cuda;  // null: everything runs on the CPU
};
// --device auto takes a GPU if there is one, and says on standard error why not where the plugin is; cuda insists on
// it.
absl::StatusOr<Machine> OpenMachine(const ServerConfig::ModelOptions& options);

// Token budget of a step: the configured one, or what keeps the machine busy without making others wait long.
int MaxStepTokens(const ServerConfig& config, const Machine& machine);

struct ModelFiles {
  std::string path;
  Machine machine;  // the model's, to share with its drafters
  std::unique_ptr<Model> model;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;  // null: the folder has none
  std::string chat_template_source;
  GenerationConfig generation;  // empty: the folder has none, or it is not to be read
};
// Errors name the file.
absl::StatusOr<ModelFiles> LoadModelFiles(const ServerConfig::ModelOptions& options);

// The flags as they are; 0 for "what suits the machine" is LoadParts' to replace. The mode of speculation is not set.
EngineOptions EngineOptionsOf(const ServerConfig& config);
// Everything that a Service needs; the engine is not started yet.
absl::StatusOr<Service::Parts> LoadParts(const ServerConfig& config, std::function<void(const StepStats&)> observer);

absl::StatusOr<std::string> ReadFile(const std::string& path);
absl::StatusOr<SpeculationMode> ParseSpeculation(const std::string& name);

}  // namespace linspec
