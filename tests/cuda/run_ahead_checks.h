// Steps that are started before the ones ahead of them are read, against the same steps one by one: tokens and states,
// to the bit, with a request that ends in between and one that takes its slot while a step still runs.
#pragma once

#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "models/model.h"
#include "tests/cuda/model_checks.h"

namespace linspec {

// Requests that decode plainly, each in its own way.
class PlainRun {
 public:
  PlainRun(Model* model, int count, bool ahead)
      : model_(model), ahead_(ahead), pool_(Must(model->CreatePool(count), "pool")), slots_(count) {
    for (int r = 0; r < count; ++r) Join(r, r);
  }

  void Join(int request, int seed) {
    slots_[request] = StateSlot();
    slots_[request] = pool_->Acquire();
    joins_.emplace_back(request, seed);
  }

  // The tokens of so many steps. drop: of this request the last one is not committed, and another takes its slot.
  std::vector<std::vector<int32_t>> Run(int steps, int drop) {
    Prefill();
    std::vector<std::vector<int32_t>> tokens;
    for (int step = 0; step < steps; ++step) {
      const bool last = step + 1 == steps;
      if (step == 0 || !ahead_) Must(model_->StartVerify(batch_, *pool_), "start");
      if (ahead_ && !last) Must(model_->StartNext(pool_.get()), "start the next");
      if (ahead_ && last && drop >= 0) Join(drop, 1000);  // its row still runs
      const VerifyResult result = Must(model_->FinishVerify(), "finish");
      tokens.emplace_back(result.sampled.begin(), result.sampled.end());
      if (!ahead_ || last) Commit(last ? drop : -1);
      if (!ahead_ && last && drop >= 0) Join(drop, 1000);
      batch_.Advance(tokens.back());
    }
    return tokens;
  }

  // Of all slots, and how many tokens they hold.
  std::pair<std::vector<std::byte>, std::vector<int64_t>> States() {
    std::vector<std::byte> bytes(pool_->total_bytes());
    const CudaHandle cuda = model_->cuda();
    Must(cuda.device->Check(
             cuda.device->api().download(cuda.device->context(), bytes.data(), pool_->data(), pool_->total_bytes()),
             "download"),
         "states");
    std::vector<int64_t> lengths;
    for (const StateSlot& slot : slots_) lengths.push_back(pool_->length(slot.id()));
    return {std::move(bytes), std::move(lengths)};
  }

  // Calls that must not come while a step runs.
  bool RefusesWhileAStepRuns() {
    Prefill();
    Must(model_->StartVerify(batch_, *pool_), "start");
    const int32_t token[] = {1};
    const PrefillChunk chunks[] = {{slots_[0].id(), token}};
    const std::vector<std::vector<int32_t>> roots(slots_.size(), {0});
    const absl::Status refused[] = {model_->StartVerify(batch_, *pool_), model_->Prefill(chunks, pool_.get()),
                                    model_->Commit(batch_, roots, pool_.get())};
    Must(model_->StartNext(pool_.get()), "start the next");
    const absl::Status third = model_->StartNext(pool_.get());
    for (int step = 0; step < 2; ++step) Must(model_->FinishVerify(), "finish");
    bool all = absl::IsInternal(third) && absl::IsInternal(model_->FinishVerify().status());
    for (const absl::Status& status : refused) all = all && absl::IsInternal(status);
    return all;
  }

 private:
  void Prefill() {
    for (const auto& [request, seed] : std::exchange(joins_, {})) {
      const std::vector<int32_t> prompt = Tokens(20 + seed % 90, model_->config().vocab_size, seed);
      const PrefillChunk chunks[] = {{slots_[request].id(), prompt}};
      Must(model_->Prefill(chunks, pool_.get()), "prefill");
    }
    const std::vector<int32_t> before = std::exchange(batch_, {}).tokens;
    for (int r = 0; r < static_cast<int>(slots_.size()); ++r) {
      batch_.Add(slots_[r].id(), DraftTree::Root(before.empty() ? r : before[r]));
      batch_.sampling.push_back({.seed = static_cast<uint64_t>(r),
                                 .position = pool_->length(slots_[r].id()) + 1,
                                 .temperature = r % 3 == 0 ? 0.0f : 0.9f,
                                 .top_p = r % 3 == 2 ? 0.9f : 1.0f,
                                 .edits_begin = 0,
                                 .edits_count = r % 2});
    }
    batch_.edits.push_back({.token = 3, .bias = 1.5f});
    batch_.want_logits = batch_.want_hidden = false;
  }

  void Commit(int without) {
    std::vector<std::vector<int32_t>> paths(slots_.size(), {0});
    if (without >= 0) paths[without].clear();
    Must(model_->Commit(batch_, paths, pool_.get()), "commit");
  }

  Model* const model_;
  const bool ahead_;
  std::unique_ptr<StatePool> pool_;
  std::vector<StateSlot> slots_;
  std::vector<std::pair<int, int>> joins_;  // requests whose prompts are still to be read
  VerifyBatch batch_;
};

inline void RunsAhead(const std::string& name, Model* model) {
  int different = 0, steps = 0, states = 0;
  for (const int count : {1, 3, 64}) {
    std::vector<std::vector<int32_t>> tokens[2];
    std::pair<std::vector<std::byte>, std::vector<int64_t>> left[2];
    for (const bool ahead : {false, true}) {
      PlainRun run(model, count, ahead);
      for (const int part : {40, 1, 70}) {  // past the end of a group
        const auto chosen = run.Run(part, count / 2);
        tokens[ahead].insert(tokens[ahead].end(), chosen.begin(), chosen.end());
      }
      left[ahead] = run.States();
    }
    steps += static_cast<int>(tokens[0].size());
    for (size_t i = 0; i < tokens[0].size(); ++i) different += tokens[0][i] != tokens[1][i];
    states += left[0] != left[1];
  }
  const bool refuses = PlainRun(model, 2, true).RefusesWhileAStepRuns();
  Report(name + ": steps ahead as one by one", different == 0 && states == 0 && refuses,
         fmt::format("{} of {} steps and {} of 3 pools of states differ{}", different, steps, states,
                     refuses ? "" : "; a call that must not come was taken"));
}

}  // namespace linspec
