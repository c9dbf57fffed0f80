// Host time of an engine step: admission, plan, packing, acceptance and delivery, with a model that costs nothing and
// chooses tokens itself, as one on a GPU does. ninja -C build/cpu bench_engine && build/cpu/bench_engine
#include <benchmark/benchmark.h>

#include <chrono>
#include <memory>
#include <utility>
#include <vector>

#include "models/ngram_drafter.h"
#include "scheduler/engine.h"

namespace linspec {
namespace {

class NullModel : public Model {
 public:
  NullModel() {
    config_.hidden_size = config_.head_dim = 4;
    config_.num_layers = config_.num_heads = config_.num_kv_heads = 1;
    config_.vocab_size = 32000;
  }
  const ModelConfig& config() const override { return config_; }
  int64_t weight_bytes() const override { return 0; }
  std::string Describe() const override { return "null"; }
  bool chooses_tokens() const override { return true; }
  absl::Status Prefill(std::span<const PrefillChunk> chunks, StatePool* pool) override {
    for (const PrefillChunk& chunk : chunks) {
      pool->set_length(chunk.slot, pool->length(chunk.slot) + std::ssize(chunk.tokens));
    }
    return absl::OkStatus();
  }
  absl::StatusOr<VerifyResult> Verify(const VerifyBatch& batch, const StatePool&) override {
    sampled_.assign(batch.num_rows(), 7);
    VerifyResult result;
    result.sampled = sampled_;
    return result;
  }
  absl::Status Commit(const VerifyBatch& batch, std::span<const std::vector<int32_t>> paths, StatePool* pool) override {
    for (int r = 0; r < batch.num_requests(); ++r) {
      pool->set_length(batch.slots[r], pool->length(batch.slots[r]) + std::ssize(paths[r]));
    }
    return absl::OkStatus();
  }

 protected:
  std::vector<int32_t> sampled_;

 private:
  ModelConfig config_;
};

// range(0) requests that never end; range(1): a drafter is loaded, though no request uses it.
void BM_EngineStep(benchmark::State& state) {
  EngineOptions options;
  options.max_requests = static_cast<int>(state.range(0));
  options.max_step_tokens = 8192;
  options.speculation = SpeculationMode::kOff;
  std::vector<std::unique_ptr<Drafter>> drafters;
  if (state.range(1) != 0) drafters.push_back(std::make_unique<NgramDrafter>());
  auto engine = Engine::Create(std::make_unique<NullModel>(), std::move(drafters), options, nullptr);
  if (!engine.ok()) return state.SkipWithError(std::string(engine.status().message()).c_str());
  int64_t tokens = 0;
  for (int i = 0; i < options.max_requests; ++i) {
    Request request;
    request.id = i + 1;
    request.prompt_tokens = {1, 2, 3};
    request.sampling.max_tokens = 1 << 20;
    request.sampling.ignore_eos = true;
    request.sink = [&tokens](RequestOutput&& output) {
      tokens += std::ssize(output.tokens);
      return true;
    };
    if (!(*engine)->Submit(std::move(request)).ok()) return state.SkipWithError("submit");
  }
  for (int i = 0; i < 4; ++i) (*engine)->Step();
  for (auto _ : state) (*engine)->Step();
  state.counters["tokens"] = static_cast<double>(tokens);
}
BENCHMARK(BM_EngineStep)->ArgsProduct({{1, 64, 256, 1024}, {0, 1}})->Unit(benchmark::kMicrosecond);

// Text that repeats itself but for a token now and then, from a model that takes as long as a small one on a GPU.
class RepeatingModel final : public NullModel {
 public:
  absl::StatusOr<VerifyResult> Verify(const VerifyBatch& batch, const StatePool& pool) override {
    const auto start = Clock::now();
    absl::StatusOr<VerifyResult> result = NullModel::Verify(batch, pool);
    for (int row = 0; row < batch.num_rows(); ++row) {
      const int64_t position = batch.sampling.empty() ? 0 : batch.sampling[row].position;
      const bool surprise = position % 11 == 5;
      sampled_[row] = static_cast<int32_t>(surprise ? position * 7919 % 32000 : position % 40);
    }
    while (Clock::now() - start < std::chrono::nanoseconds(200'000 + 500 * batch.num_rows())) {
    }
    return result;
  }
};

// Host time of a step in which range(0) requests, which come and go, look their drafts up in their own text; without
// the model's.
void BM_SpeculativeStep(benchmark::State& state) {
  EngineOptions options;
  options.max_requests = static_cast<int>(state.range(0));
  options.max_step_tokens = 8192;
  options.max_draft_nodes = 16;
  std::vector<std::unique_ptr<Drafter>> drafters;
  drafters.push_back(std::make_unique<NgramDrafter>());
  double model_s = 0, draft_s = 0, tokens = 0, steps = 0, drafts = 0, accepted = 0;
  auto engine =
      Engine::Create(std::make_unique<RepeatingModel>(), std::move(drafters), options, [&](const StepStats& step) {
        model_s += step.verify_s - step.deliver_s;
        draft_s += step.draft_s;
        tokens += step.num_output_tokens;
        steps += 1;
        drafts += step.num_drafts;
        accepted += step.num_accepted_tokens;
      });
  if (!engine.ok()) return state.SkipWithError(std::string(engine.status().message()).c_str());
  uint64_t id = 0;
  int running = 0;
  const auto refill = [&] {
    for (; running < options.max_requests; ++running) {
      Request request;
      request.id = ++id;
      request.prompt_tokens.assign(100, 5);
      request.sampling.max_tokens = 100 + static_cast<int>(id * 37 % 100);
      request.sampling.ignore_eos = true;
      request.sampling.temperature = 0;
      request.sink = [&running](RequestOutput&& output) {
        running -= output.finish_reason != FinishReason::kNone;
        return true;
      };
      if (!(*engine)->Submit(std::move(request)).ok()) return;
    }
  };
  for (auto _ : state) {
    refill();
    model_s = 0;
    const auto start = Clock::now();
    (*engine)->Step();
    state.SetIterationTime(std::chrono::duration<double>(Clock::now() - start).count() - model_s);
  }
  state.counters["tokens_per_step"] = tokens / steps;
  state.counters["drafts"] = drafts / steps;
  state.counters["accepted"] = accepted / std::max(drafts, 1.0);
  state.counters["draft_us"] = 1e6 * draft_s / steps;
}
BENCHMARK(BM_SpeculativeStep)->Arg(1)->Arg(16)->Arg(64)->UseManualTime()->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace linspec

BENCHMARK_MAIN();
