// `linspec bench`: speed of the model alone (decode of batches, verification of one request's tree, prefill) beside the
// floors that memory and multipliers set, measured in the same run.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "server/bench_floor.h"
#include "server/commands.h"
#include "server/config.h"
#include "server/flags.h"
#include "server/model_files.h"

namespace linspec {
namespace {

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

double Median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size()) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

int32_t ArgMax(std::span<const float> row) {
  return static_cast<int32_t>(std::max_element(row.begin(), row.end()) - row.begin());
}

// Medians over rounds. Machines are shared and noisy: each round reads the bandwidth and times one group of steps in turn.
struct StepTimes {
  double step = 0, best_step = 0;  // seconds
  double bandwidth = 0;            // bytes/s
};

class Bencher {
 public:
  Bencher(Model* model, const Machinery* machinery, double seconds, int chunk)
      : model_(model), machinery_(machinery), seconds_(seconds), chunk_(chunk) {}

  // Steps of `batch` requests that each have `context` tokens behind them, verify a chain of `rows` nodes and commit its
  // root. A round is one group of positions, so that every phase of a group weighs the same.
  absl::StatusOr<StepTimes> Step(int batch, int rows, int context, double bytes);
  absl::StatusOr<double> PrefillTokensPerSecond(int prompt);  // median

 private:
  std::vector<int32_t> Prompt(int length) const {
    std::vector<int32_t> tokens(length);
    for (int i = 0; i < length; ++i) tokens[i] = static_cast<int32_t>((i * 7919LL + 13) % model_->config().vocab_size);
    return tokens;
  }
  absl::Status FillSlot(int32_t slot, int context, StatePool* pool);
  absl::Status OneStep(const std::vector<StateSlot>& slots, int rows, StatePool* pool);

  Model* const model_;
  const Machinery* const machinery_;
  const double seconds_;
  const int chunk_;            // tokens of one Prefill call
  std::vector<int32_t> next_;  // [batch] pending token of each request
};

// The state has one size whatever it has seen: a short prompt fills it, the rest of the context is counted, not computed.
absl::Status Bencher::FillSlot(int32_t slot, int context, StatePool* pool) {
  const int group = model_->config().linear_attention.group_size;
  const int computed = std::min(context, 4 * group);
  const std::vector<int32_t> prompt = Prompt(computed);
  const PrefillChunk chunks[] = {{slot, prompt}};
  if (absl::Status status = model_->Prefill(chunks, pool); !status.ok()) return status;
  const int skipped = (context - computed) / group * group;  // whole groups keep the phase
  pool->set_length(slot, computed + skipped);
  return absl::OkStatus();
}

absl::Status Bencher::OneStep(const std::vector<StateSlot>& slots, int rows, StatePool* pool) {
  const auto vocab = static_cast<size_t>(model_->config().vocab_size);
  VerifyBatch batch;
  batch.row_starts = {0};
  for (size_t i = 0; i < slots.size(); ++i) {
    DraftTree tree = DraftTree::Root(next_[i]);
    for (int node = 1; node < rows; ++node) tree.Add(static_cast<int32_t>((next_[i] + node) % vocab), node - 1);
    batch.Add(slots[i].id(), tree);
  }
  if (model_->chooses_tokens()) {
    batch.sampling.resize(batch.num_rows());
    batch.want_logits = batch.want_hidden = false;
  }
  auto result = model_->Verify(batch, *pool);
  if (!result.ok()) return result.status();
  for (size_t i = 0; i < slots.size(); ++i) {
    const size_t row = i * rows;
    next_[i] = model_->chooses_tokens() ? result->sampled[row] : ArgMax(result->logits.subspan(row * vocab, vocab));
    if (next_[i] < 0) return absl::InternalError("bench: the logits are not finite");
  }
  const std::vector<std::vector<int32_t>> paths(slots.size(), {0});
  return model_->Commit(batch, paths, pool);
}

absl::StatusOr<StepTimes> Bencher::Step(int batch, int rows, int context, double bytes) {
  auto pool = model_->CreatePool(batch);
  if (!pool.ok()) return pool.status();
  std::vector<StateSlot> slots;
  for (int i = 0; i < batch; ++i) {
    slots.push_back((*pool)->Acquire());
    if (absl::Status status = FillSlot(slots.back().id(), context, pool->get()); !status.ok()) return status;
  }
  next_.assign(batch, 1);
  const int round = model_->config().linear_attention.group_size;
  std::vector<double> steps, bandwidths;
  StepTimes times{.best_step = 1e9};
  const auto begin = Clock::now();
  for (int i = -1; i < 3 || SecondsSince(begin) < seconds_; ++i) {  // round -1 warms up
    bandwidths.push_back(machinery_->ReadBandwidth(bytes));
    if (absl::Status status = OneStep(slots, rows, pool->get()); !status.ok()) return status;
    const auto start = Clock::now();
    for (int step = 1; step < round; ++step) {
      const auto step_start = Clock::now();
      if (absl::Status status = OneStep(slots, rows, pool->get()); !status.ok()) return status;
      if (i >= 0) times.best_step = std::min(times.best_step, SecondsSince(step_start));
    }
    if (i >= 0) steps.push_back(SecondsSince(start) / (round - 1));
  }
  times.step = Median(steps);
  times.bandwidth = Median(bandwidths);
  return times;
}

absl::StatusOr<double> Bencher::PrefillTokensPerSecond(int length) {
  auto pool = model_->CreatePool(1);
  if (!pool.ok()) return pool.status();
  const std::vector<int32_t> prompt = Prompt(length);
  const auto chunk = static_cast<size_t>(chunk_);
  std::vector<double> rates;
  const auto first = Clock::now();
  for (int pass = 0; pass < 4 || SecondsSince(first) < seconds_; ++pass) {
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
    if (pass > 0) rates.push_back(length / SecondsSince(start));
  }
  return Median(rates);
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

// One line of the result: what was measured and how far it is from the larger floor.
void PrintStep(const char* comma, int batch, int rows, int context, const StepTimes& times, const Work& work,
               const Machinery& machinery) {
  const double memory = work.bytes / times.bandwidth, arithmetic = machinery.ArithmeticSeconds(work);
  fmt::print(
      "{}  {{\"batch\": {}, \"rows\": {}, \"context\": {}, \"rows_per_s\": {:.1f}, \"ms_per_step\": {:.3f}, "
      "\"best_ms\": {:.3f}, \"working_set_gb_s\": {:.1f}, \"memory_floor_ms\": {:.3f}, \"arithmetic_floor_ms\": "
      "{:.3f}, "
      "\"fraction_of_floor\": {:.3f}}}",
      comma, batch, rows, context, batch * rows / times.step, times.step * 1e3, times.best_step * 1e3,
      times.bandwidth / 1e9, memory * 1e3, arithmetic * 1e3, std::max(memory, arithmetic) / times.step);
  std::fflush(stdout);
}

struct BenchOptions {
  std::string shape;
  std::vector<int> batches, contexts, rows, prompts;
  double seconds;
  int chunk;
};

absl::Status RunBench(const BenchOptions& options, Model* model, const Machinery& machinery) {
  const ModelConfig& config = model->config();
  const auto weight_bytes = static_cast<double>(model->streamed_bytes());
  fmt::print(
      "{{\n\"model\": \"{}\",\n{}, \"read_bandwidth_gb_s\": {:.2f}, \"weight_bytes_per_step\": {:.0f}, "
      "\"state_bytes_per_request\": {}, \"requests_that_fit\": {},\n",
      model->Describe(), machinery.Describe(), machinery.ReadBandwidth(512e6) / 1e9, weight_bytes, config.StateBytes(),
      model->SlotsThatFit());
  Bencher bencher(model, &machinery, options.seconds, options.chunk);
  const auto print_steps = [&](const char* name, const std::vector<int>& sizes, bool batched) -> absl::Status {
    fmt::print("\"{}\": [", name);
    const char* comma = "\n";
    for (const int size : sizes) {
      const int batch = batched ? size : 1, rows = batched ? 1 : size;
      const Work work = StepWork(config, weight_bytes, batch, rows);
      for (const int context : options.contexts) {
        const auto times = bencher.Step(batch, rows, context, work.bytes);
        if (!times.ok()) return times.status();
        PrintStep(comma, batch, rows, context, *times, work, machinery);
        comma = ",\n";
      }
    }
    fmt::print("],\n");
    return absl::OkStatus();
  };
  if (absl::Status status = print_steps("decode", options.batches, true); !status.ok()) return status;
  if (absl::Status status = print_steps("verify", options.rows, false); !status.ok()) return status;
  fmt::print("\"prefill\": [");
  const char* comma = "\n";
  for (const int prompt : options.prompts) {
    auto rate = bencher.PrefillTokensPerSecond(prompt);
    if (!rate.ok()) return rate.status();
    fmt::print("{}  {{\"prompt_tokens\": {}, \"tokens_per_s\": {:.1f}}}", comma, prompt, *rate);
    comma = ",\n";
  }
  fmt::print("]\n}}\n");
  return absl::OkStatus();
}

}  // namespace

absl::Status Bench(std::span<const std::string> args) {
  CommandFlags flags(args);
  BenchOptions options;
  options.shape = flags.String("shape", "");
  options.batches = flags.Ints("batch", "1,4,16", 1, 4096);
  options.contexts = flags.Ints("context", "128,4096,65536", 1, 1 << 30);
  options.rows = flags.Ints("rows", "1,4,8", 1, kMaxTreeNodes);
  options.prompts = flags.Ints("prefill", "512,2048", 1, 1 << 24);
  options.seconds = flags.Double("seconds", 2, 0.01, 3600);
  if (!flags.status().ok()) return flags.status();
  auto config = ParseServerConfig(flags.rest());
  if (!config.ok()) return config.status();
  options.chunk = config->engine.max_step_tokens;
  auto machine = OpenMachine(config->model);
  if (!machine.ok()) return machine.status();
  auto model = BenchModel(options.shape, config->model, *machine);
  if (!model.ok()) return model.status();
  auto machinery = Machinery::Measure(*machine, (*model)->weight_dtype());
  if (!machinery.ok()) return machinery.status();
  return RunBench(options, model->get(), *machinery);
}

}  // namespace linspec
