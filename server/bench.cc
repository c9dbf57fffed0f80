// `linspec bench`: decode and prefill speed of the model alone, beside the floors that memory and multipliers set,
// measured in the same run.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <random>

#include "kernels/cpu/peak.h"
#include "scheduler/warm_up.h"
#include "server/commands.h"
#include "server/config.h"
#include "server/flags.h"
#include "server/model_files.h"

namespace linspec {
namespace {

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// A device has chosen a token for each row; from a CPU come logits, of which the host takes the best, as a server does.
absl::Status CheckChosen(const VerifyResult& result) {
  const bool on_device = !result.sampled.empty();
  const bool ok = on_device ? *std::min_element(result.sampled.begin(), result.sampled.end()) >= 0
                            : std::isfinite(*std::max_element(result.logits.begin(), result.logits.end()));
  return ok ? absl::OkStatus() : absl::InternalError("bench: the logits are not finite");
}

// Bytes of one request's state that a step reads: S, and of the ring what lies in the open group or in reach of the
// convolution, averaged over the places in a group.
double StateBytesRead(const ModelConfig& config, DType dtype) {
  const int group = config.linear_attention.group_size, reach = config.linear_attention.conv_kernel - 1;
  double slots = 0;
  for (int phase = 0; phase < group; ++phase)
    slots += std::max(phase, std::min(reach, group)) / static_cast<double>(group);
  const double d = config.head_dim;
  return config.num_layers * config.num_kv_heads * (d * d + 2 * slots * d) * static_cast<double>(DTypeSize(dtype));
}

// Multiply-adds of one row: with weights, and of attention in fp32, averaged likewise.
struct RowWork {
  double weights, floats;
};
RowWork WorkOfRow(const ModelConfig& config) {
  const LinearAttentionConfig& attention = config.linear_attention;
  double window = 0;  // keys and values that a row is multiplied with
  for (int phase = 0; phase < attention.group_size; ++phase) {
    const int local = attention.local ? phase + 1 : 0;
    window += local + std::max(local, attention.conv_kernel);
  }
  window /= attention.group_size;
  const double d = config.head_dim, heads = config.num_heads, layers = config.num_layers;
  const double dim = static_cast<double>(config.hidden_size), inner = static_cast<double>(config.intermediate_size);
  const double layer = dim * (2 * heads + 2 * config.num_kv_heads) * d + 3 * dim * inner;
  const double state = attention.global == GlobalBranch::kNone ? 0 : d * d;
  return {.weights = layers * layer + static_cast<double>(config.vocab_size) * dim,
          .floats = layers * heads * (state + window * d)};
}

// The ceilings of the machine that the model runs on.
class Machinery {
 public:
  explicit Machinery(const Machine& machine) : machine_(machine) {}
  absl::Status Measure(DType weights) {
    if (machine_.cuda == nullptr) {
      float_macs_per_s_ = MeasureMultiplyAddPeak(machine_.ops->isa(), DType::kF32, machine_.ops->num_threads());
      weight_macs_per_s_ = weights != DType::kI8
                               ? float_macs_per_s_
                               : MeasureMultiplyAddPeak(machine_.ops->isa(), DType::kI8, machine_.ops->num_threads());
      return absl::OkStatus();
    }
    const auto ceilings = machine_.cuda->Measure();
    if (ceilings.ok()) {
      device_bytes_per_s_ = ceilings->read_bytes_per_s;
      weight_macs_per_s_ = float_macs_per_s_ = ceilings->bf16_flops_per_s / 2;
    }
    return ceilings.status();
  }
  // Bytes/s that a step of `bytes` could read: from cache or memory on a CPU, from memory on a GPU.
  double ReadBandwidth(double bytes) const {
    if (machine_.cuda != nullptr) return device_bytes_per_s_;
    return MeasureReadBandwidth(machine_.ops->isa(), machine_.ops->num_threads(), static_cast<int64_t>(bytes));
  }
  double weight_macs_per_s() const { return weight_macs_per_s_; }  // 0: not measured
  // The products of so many rows alone; 0 where no ceiling was measured.
  double ArithmeticSeconds(const RowWork& row, double rows) const {
    if (weight_macs_per_s_ <= 0) return 0;
    return rows * (row.weights / weight_macs_per_s_ + row.floats / float_macs_per_s_);
  }

 private:
  const Machine machine_;
  double device_bytes_per_s_ = 0, weight_macs_per_s_ = 0, float_macs_per_s_ = 0;
};

class Bencher {
 public:
  Bencher(Model* model, double seconds, int chunk, bool run_ahead)
      : model_(model), seconds_(seconds), chunk_(chunk), run_ahead_(run_ahead) {}

  struct Step {
    double seconds = 0, device_seconds = 0;  // mean of a step; device_seconds 0 on a CPU
    double best_seconds = 1e9;               // of the fastest step: what a shared machine can do when it is quiet
    double tokens = 1;                       // mean, of one request
  };
  // Steps of `batch` requests that each have `context` tokens behind them. nodes > 1: each brings a chain of so many
  // rows, of which a draft at depth d is accepted with probability acceptance[d - 1] once those before it were.
  absl::StatusOr<Step> DecodeStep(int batch, int context, int nodes, const std::vector<double>& acceptance);
  absl::StatusOr<double> PrefillTokensPerSecond(int prompt);

 private:
  absl::Status Start(std::span<const StateSlot> slots, const DraftTree& tree, const StatePool& pool);
  std::vector<int32_t> Prompt(int length) const {
    std::vector<int32_t> tokens(length);
    for (int i = 0; i < length; ++i) tokens[i] = static_cast<int32_t>((i * 7919LL + 13) % model_->config().vocab_size);
    return tokens;
  }

  double DeviceSeconds() const {
    for (const DeviceStats& device : model_->device_stats()) {
      for (const auto& [what, seconds] : device.busy_seconds) {
        if (what == "verify") return seconds;
      }
    }
    return 0;
  }

  Model* const model_;
  const double seconds_;
  const int chunk_;  // tokens of one Prefill call
  const bool run_ahead_;
  VerifyBatch batch_;  // of the step under way
};

absl::Status Bencher::Start(std::span<const StateSlot> slots, const DraftTree& tree, const StatePool& pool) {
  batch_ = {};
  for (const StateSlot& slot : slots) batch_.Add(slot.id(), tree);
  if (model_->chooses_tokens()) {
    batch_.sampling.resize(batch_.num_rows());
    batch_.want_logits = batch_.want_hidden = false;
  }
  return model_->StartVerify(batch_, pool);
}

absl::StatusOr<Bencher::Step> Bencher::DecodeStep(int batch_size, int context, int nodes,
                                                  const std::vector<double>& acceptance) {
  auto pool = model_->CreatePool(batch_size);
  if (!pool.ok()) return pool.status();
  const int group = model_->config().linear_attention.group_size;
  // The state has one size whatever it has seen: a short prompt fills it, the rest of the context is counted, not
  // computed.
  const int computed = std::min(context, 4 * group);
  const std::vector<int32_t> prompt = Prompt(computed);
  std::vector<StateSlot> slots;
  for (int i = 0; i < batch_size; ++i) {
    slots.push_back((*pool)->Acquire());
    // Requests stand at different places of their groups, as they do in a server.
    const PrefillChunk chunks[] = {
        {slots.back().id(), std::span(prompt).first(computed - i * 7 % std::min(computed, group))}};
    if (absl::Status status = model_->Prefill(chunks, pool->get()); !status.ok()) return status;
    const int64_t skipped = (context - computed) / group * group;  // whole groups keep the phase
    (*pool)->set_length(slots.back().id(), (*pool)->length(slots.back().id()) + skipped);
  }
  DraftTree chain = DraftTree::Root(1);
  for (int node = 1; node < nodes; ++node) chain.Add(node, node - 1);
  std::mt19937 random(1);
  std::uniform_real_distribution<double> uniform;
  // As the engine does: a plain step on a device is started before the one ahead of it is read.
  const bool ahead = nodes == 1 && run_ahead_ && model_->CanRunAhead();
  if (ahead) {
    if (absl::Status started = Start(slots, chain, **pool); !started.ok()) return started;
  }
  Step mean;
  double tokens = 0, device_begin = 0;
  int steps = -3;  // warm-up: graphs are made
  while (steps < 8 || mean.seconds < seconds_) {
    std::vector<std::vector<int32_t>> paths(batch_size, {0});
    for (std::vector<int32_t>& path : paths) {
      for (int node = 1; node < nodes && uniform(random) < acceptance[std::min<size_t>(node, acceptance.size()) - 1];
           ++node) {
        path.push_back(node);
      }
      if (steps >= 0) tokens += static_cast<double>(path.size());
    }
    const auto start = Clock::now();
    absl::Status status = ahead ? model_->StartNext(pool->get()) : Start(slots, chain, **pool);
    if (!status.ok()) return status;
    auto result = model_->FinishVerify();
    if (!result.ok()) return result.status();
    if (absl::Status chosen = CheckChosen(*result); !chosen.ok()) return chosen;
    if (!ahead) status = model_->Commit(batch_, paths, pool->get());
    if (!status.ok()) return status;
    if (++steps == 0) device_begin = DeviceSeconds();
    if (steps <= 0) continue;
    const double seconds = SecondsSince(start);
    mean.seconds += seconds;
    mean.best_seconds = std::min(mean.best_seconds, seconds);
  }
  mean.device_seconds = (DeviceSeconds() - device_begin) / steps;
  if (ahead) {
    if (auto last = model_->FinishVerify(); !last.ok()) return last.status();
  }
  mean.seconds /= steps;
  mean.tokens = tokens / steps / batch_size;
  return mean;
}

absl::StatusOr<double> Bencher::PrefillTokensPerSecond(int length) {
  auto pool = model_->CreatePool(1);
  if (!pool.ok()) return pool.status();
  const std::vector<int32_t> prompt = Prompt(length);
  const auto chunk = static_cast<size_t>(chunk_);
  double best = 0, total = 0;
  for (int pass = 0; pass < 2 || total < seconds_; ++pass) {
    StateSlot slot = (*pool)->Acquire();
    const auto start = Clock::now();
    for (size_t begin = 0; begin < prompt.size(); begin += chunk) {
      const auto part = std::span<const int32_t>(prompt).subspan(begin, std::min(chunk, prompt.size() - begin));
      const PrefillChunk chunks[] = {{slot.id(), part}};
      if (absl::Status status = model_->Prefill(chunks, pool->get()); !status.ok()) return status;
    }
    // The first token: a device has then really done the prompt.
    VerifyBatch first;
    first.Add(slot.id(), DraftTree::Root(prompt.back()));
    if (auto done = model_->Verify(first, **pool); !done.ok()) return done.status();
    const double seconds = SecondsSince(start);
    total += seconds;
    best = std::max(best, length / seconds);
  }
  return best;
}

// config.json of LLaMA-2 at a size people know, linearized; or the file that `shape` names.
absl::StatusOr<std::string> ShapeJson(const std::string& shape) {
  struct Known {
    const char* name;
    int hidden, inner, layers, heads;
  };
  for (const Known& k : {Known{"7b", 4096, 11008, 32, 32}, Known{"13b", 5120, 13824, 40, 40}}) {
    if (shape != k.name) continue;
    return fmt::format(
        R"({{"model_type": "llama", "hidden_size": {}, "intermediate_size": {}, "num_hidden_layers": {},
        "num_attention_heads": {}, "num_key_value_heads": {}, "head_dim": 128, "vocab_size": 32000,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false, "bos_token_id": 1,
        "eos_token_id": 2, "max_position_embeddings": 4096, "linear_attention": {{"version": 1, "group_size": 64,
        "conv_kernel": 32, "local": "relu_squared", "global": "rms_norm", "decay": true, "qk_norm_eps": 1e-6,
        "global_norm_eps": 1e-6}}}})",
        k.hidden, k.inner, k.layers, k.heads, k.heads);
  }
  return ReadFile(shape);
}

absl::StatusOr<std::unique_ptr<Model>> BenchModel(const std::string& shape, const ServerConfig::ModelOptions& options,
                                                  const Machine& machine) {
  LoadOptions load;
  load.path = options.path;
  load.weight_dtype = options.weight_dtype;
  load.state_dtype = options.state_dtype;
  load.ops = machine.ops;
  load.cuda = machine.cuda;
  load.deterministic = options.deterministic;
  if (shape.empty()) {
    if (load.path.empty()) {
      auto bundled = FindBundledModel("target");
      if (!bundled.ok()) return bundled.status();
      load.path = *std::move(bundled);
    }
    return LoadModel(load);
  }
  auto json = ShapeJson(shape);
  if (!json.ok()) return json.status();
  auto config = ParseModelConfig(*json);
  if (!config.ok()) return config.status();
  return BuildRandomModel(*config, 1, load);
}

absl::Status PrintPrefill(const ModelConfig& model, const std::vector<int>& prompts, Bencher* bencher) {
  const char* comma = "\n";
  for (const int prompt : prompts) {
    auto rate = bencher->PrefillTokensPerSecond(prompt);
    if (!rate.ok()) return rate.status();
    const double flops = 2.0 * static_cast<double>(model.num_layers * model.NumLayerMatrixParameters()) * *rate;
    fmt::print("{}  {{\"prompt_tokens\": {}, \"tokens_per_s\": {:.1f}, \"product_tflop_s\": {:.2f}}}", comma, prompt,
               *rate, flops / 1e12);
    comma = ",\n";
  }
  return absl::OkStatus();
}

// What a server of so many requests makes ready before the first one.
absl::Status PrintWarmUp(Model* model, const EngineOptions& options) {
  auto pool = model->CreatePool(options.max_requests);
  if (!pool.ok()) return pool.status();
  const auto warm = WarmUp(model, pool->get(), {}, options);
  if (!warm.ok()) return warm.status();
  fmt::print(
      ",\n\"warm_up\": {{\"requests\": {}, \"sizes\": {}, \"left_out\": {}, \"seconds\": {:.2f}, \"bytes\": {}}}",
      options.max_requests, warm->sizes, warm->left_out, warm->seconds, warm->bytes);
  return absl::OkStatus();
}

}  // namespace

absl::Status Bench(std::span<const std::string> args) {
  CommandFlags flags(args);
  const std::string shape = flags.String("shape", "");
  const auto batches = flags.Ints("batch", "1,4,16", 1, 4096);
  const auto contexts = flags.Ints("context", "128,4096,65536", 1, 1 << 30);
  const auto prompts = flags.Ints("prefill", "512,2048", 1, 1 << 24);
  const auto draft_nodes = flags.Ints("draft-nodes", "1", 1, kMaxTreeNodes);
  const std::vector<double> acceptance = flags.Doubles("acceptance", "0.7", 0, 1);
  const double seconds = flags.Double("seconds", 2, 0.01, 3600);
  const int warm_up_requests = flags.Int("warm-up-requests", 0, 0, 1 << 20);
  if (!flags.status().ok()) return flags.status();
  auto config = ParseServerConfig(flags.rest());
  if (!config.ok()) return config.status();
  auto machine = OpenMachine(config->model);
  if (!machine.ok()) return machine.status();
  auto model = BenchModel(shape, config->model, *machine);
  if (!model.ok()) return model.status();
  Machinery machinery(*machine);
  if (absl::Status measured = machinery.Measure((*model)->weight_dtype()); !measured.ok()) return measured;
  const double bandwidth = machinery.ReadBandwidth(512e6);
  const DType state_dtype = (*model)->state_dtype();
  const int64_t state_bytes = (*model)->config().StateBytes(state_dtype);
  const double state_read = StateBytesRead((*model)->config(), state_dtype);
  const RowWork row_work = WorkOfRow((*model)->config());
  const auto weight_bytes = static_cast<double>((*model)->streamed_bytes());
  fmt::print(
      "{{\n\"model\": \"{}\",\n\"threads\": {}, \"read_bandwidth_gb_s\": {:.2f}, \"weight_bytes_per_step\": {:.0f}, "
      "\"state_dtype\": \"{}\", \"state_bytes_per_request\": {}, \"requests_that_fit\": {}, \"matrix_tflop_s\": "
      "{:.2f},\n\"decode\": [",
      (*model)->Describe(), machine->ops->num_threads(), bandwidth / 1e9, weight_bytes, DTypeName(state_dtype),
      state_bytes, (*model)->SlotsThatFit(), machinery.weight_macs_per_s() * 2e-12);
  Bencher bencher(model->get(), seconds, MaxStepTokens(*config, *machine), config->engine.run_ahead);
  const char* comma = "\n";
  for (const int batch : batches) {
    const double step_bytes = weight_bytes + batch * state_read;
    const double step_bandwidth = machinery.ReadBandwidth(step_bytes);
    for (const int context : contexts) {
      for (const int nodes : draft_nodes) {
        auto step = bencher.DecodeStep(batch, context, nodes, acceptance);
        if (!step.ok()) return step.status();
        const double memory_s = step_bytes / step_bandwidth;
        const double arithmetic_s = machinery.ArithmeticSeconds(row_work, static_cast<double>(batch) * nodes);
        fmt::print(
            "{}  {{\"batch\": {}, \"context\": {}, \"nodes\": {}, \"tokens_per_s\": {:.1f}, "
            "\"tokens_per_step\": {:.2f}, \"ms_per_step\": {:.3f}, \"best_ms\": {:.3f}, \"device_ms\": {:.3f}, "
            "\"working_set_gb_s\": {:.1f}, \"bandwidth_floor_ms\": {:.3f}, \"arithmetic_floor_ms\": {:.3f}, "
            "\"fraction_of_floor\": {:.3f}}}",
            comma, batch, context, nodes, batch * step->tokens / step->seconds, step->tokens, step->seconds * 1e3,
            step->best_seconds * 1e3, step->device_seconds * 1e3, step_bandwidth / 1e9, memory_s * 1e3,
            arithmetic_s * 1e3, std::max(memory_s, arithmetic_s) / step->seconds);
        std::fflush(stdout);
        comma = ",\n";
      }
    }
  }
  fmt::print("],\n\"prefill\": [");
  if (absl::Status status = PrintPrefill((*model)->config(), prompts, &bencher); !status.ok()) return status;
  fmt::print("]");
  if (warm_up_requests > 0) {
    const EngineOptions options{.max_requests = warm_up_requests,
                                .max_step_tokens = MaxStepTokens(*config, *machine),
                                .max_draft_nodes = *std::max_element(draft_nodes.begin(), draft_nodes.end())};
    if (absl::Status status = PrintWarmUp(model->get(), options); !status.ok()) return status;
  }
  fmt::print("\n}}\n");
  return absl::OkStatus();
}

}  // namespace linspec
