// An engine over the fake model that tests turn by hand, and what its requests received.
#pragma once

#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "scheduler/engine.h"
#include "tests/scheduler/fake_model.h"

namespace linspec {

struct Received {
  std::vector<int32_t> tokens;
  std::vector<SampledToken> sampled;
  RequestOutput last;
  int num_outputs = 0;
  bool finished() const { return last.finish_reason != FinishReason::kNone; }
};

class TestEngine {
 public:
  explicit TestEngine(EngineOptions options = StaticOptions(), std::vector<std::unique_ptr<Drafter>> drafters = {},
                      std::unique_ptr<FakeModel> model = std::make_unique<FakeModel>()) {
    model_ = model.get();
    auto engine = Engine::Create(std::move(model), std::move(drafters), options,
                                 [this](const StepStats& s) { steps.push_back(s); });
    EXPECT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
  }

  static EngineOptions StaticOptions() {
    EngineOptions options;
    options.max_requests = 8;
    options.calibrate = false;
    return options;
  }
  static Request MakeRequest(uint64_t id, std::vector<int32_t> prompt, int max_tokens, float temperature = 0) {
    Request request;
    request.id = id;
    request.prompt_tokens = std::move(prompt);
    request.sampling.max_tokens = max_tokens;
    request.sampling.temperature = temperature;
    return request;
  }

  absl::Status Submit(Request request, int refuse_after_outputs = -1) {
    Received* received = &results[request.id];
    request.sink = [received, refuse_after_outputs](RequestOutput&& output) {
      EXPECT_FALSE(received->finished()) << "an output after the last one";
      ++received->num_outputs;
      for (const SampledToken& token : output.tokens) {
        received->tokens.push_back(token.token);
        received->sampled.push_back(token);
      }
      received->last = std::move(output);
      return received->num_outputs != refuse_after_outputs;
    };
    return engine_->Submit(std::move(request));
  }

  void RunAll() {
    for (int i = 0; i < 200000 && engine_->Step(); ++i) {
    }
    ExpectNoLeak();
  }
  void ExpectNoLeak() {
    const EngineStats stats = engine_->stats();
    EXPECT_EQ(stats.slots_free + stats.num_running, stats.slots_total);
    EXPECT_EQ(stats.num_waiting, 0);
    EXPECT_EQ(stats.waiting_tokens, 0);
  }

  Engine& operator*() { return *engine_; }
  Engine* operator->() { return engine_.get(); }
  FakeModel& model() { return *model_; }

  std::map<uint64_t, Received> results;
  std::vector<StepStats> steps;

 private:
  FakeModel* model_;
  std::unique_ptr<Engine> engine_;
};

}  // namespace linspec
