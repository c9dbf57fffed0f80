// The controller's closed loop on simulated time: a machine whose costs are known, drafters whose acceptance is known,
// and requests that come and go. Deterministic: times are computed, never measured.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "scheduler/speculation_controller.h"
#include "tests/scheduler/simulated_drafts.h"
#include "tests/scheduler/simulated_machine.h"

namespace linspec {

class SpeculationSimulator {
 public:
  struct Totals {
    double ms = 0, tokens = 0, slowest = 0;  // slowest: step beside a plain one, prompts aside
    int64_t drafts = 0;
    double rate() const { return tokens / ms; }
  };

  SpeculationSimulator(const SimulatedMachine& machine, std::vector<SimulatedText> texts, int batch, int max_tokens,
                       uint32_t seed)
      : machine_(machine), texts_(std::move(texts)), batch_(batch), max_tokens_(max_tokens), random_(seed) {}

  // The start-up measurements, wrong by `error` (a factor each, at random).
  void Calibrate(SpeculationController* controller, double error) {
    std::normal_distribution<double> normal;
    const auto wrong = [&] { return 1e-3 * std::exp(error * normal(random_)); };
    for (int rows = 1; rows <= 64; rows *= 2) {
      controller->step_costs().Calibrate(rows, machine_.VerifyMs(rows, 1) * wrong());
    }
    controller->step_costs().CalibratePerRequest(machine_.request_ms * wrong());
    for (size_t d = 0; d < machine_.drafters.size(); ++d) {
      const SimulatedDrafter& drafter = machine_.drafters[d];
      for (int contexts = 1; contexts <= 16; contexts *= 2) {
        for (const int levels : {4, 1}) {
          controller->draft_costs(static_cast<int>(d))
              .Observe(contexts, levels, 0, drafter.Ms(contexts, levels) * wrong());
        }
      }
      controller->draft_costs(static_cast<int>(d))
          .Observe(1, 1, 1000, (drafter.Ms(1, 1) + 1000 * drafter.catch_up_ms) * wrong());
    }
  }

  // Text number `text` for all requests that start; -1: each another.
  Totals Run(SpeculationController* controller, int steps, int text = -1) {
    Totals totals;
    for (int step = 0; step < steps; ++step) {
      const bool alone = Refill(controller, text) || machine_.ahead == 1;
      const std::vector<SpeculationRequest> requests = Describe();
      start_ = alone ? StepStart::kAlone : controller->StaysPlain() ? StepStart::kAhead : StepStart::kWaited;
      continued_ = !alone && MayContinue(*controller);
      if (continued_) {
        start_ = StepStart::kWaited;
        controller->Continue(static_cast<int>(requests.size()));
        choices_.resize(requests.size(), choices_.front());
      } else {
        choices_ = controller->Choose(requests, 1000, start_);
      }
      Step(requests, choices_, controller, &totals);
    }
    return totals;
  }

  std::vector<bool> Free() const {
    std::vector<bool> free;
    for (const SimulatedDrafter& drafter : machine_.drafters) free.push_back(drafter.free);
    return free;
  }

  // One drafter always, with so many nodes; drafter -1: plain.
  Totals RunFixed(int drafter, int nodes, int steps, int text = -1) {
    Totals totals;
    for (int step = 0; step < steps; ++step) {
      const bool alone = Refill(nullptr, text);
      start_ = alone || drafter >= 0 ? StepStart::kAlone : StepStart::kAhead;
      continued_ = !alone && drafter >= 0 && machine_.drafters[drafter].own_heads;
      const std::vector<SpeculationRequest> requests = Describe();
      std::vector<SpeculationChoice> choices(requests.size());
      for (size_t r = 0; r < requests.size() && drafter >= 0; ++r) {
        choices[r] = {.drafter = drafter, .nodes = std::min(nodes, requests[r].max_nodes)};
      }
      Step(requests, choices, nullptr, &totals);
    }
    return totals;
  }

 private:
  struct Running {
    uint64_t id;
    const SimulatedText* text;
    int tokens_left;
    std::vector<int64_t> unseen;  // [drafter]
  };

  // True if somebody is new.
  bool Refill(SpeculationController* controller, int text) {
    std::erase_if(running_, [&](const Running& request) {
      if (request.tokens_left <= 0 && controller != nullptr) controller->acceptance().Forget(request.id);
      return request.tokens_left <= 0;
    });
    const bool full = std::ssize(running_) == batch_;
    while (std::ssize(running_) < batch_) {
      const size_t which = text >= 0 ? text : next_id_ % texts_.size();
      const int tokens = running_.empty() || batch_ == 1 ? max_tokens_ : 1 + static_cast<int>(random_() % max_tokens_);
      running_.push_back(
          {next_id_++, &texts_[which], tokens, std::vector<int64_t>(machine_.drafters.size(), prompt_tokens)});
      prompts_ms_ += machine_.prompt_ms * static_cast<double>(prompt_tokens);
      prompt_tokens_ += prompt_tokens;
    }
    return !full;
  }

  std::vector<SpeculationRequest> Describe() const {
    std::vector<SpeculationRequest> requests;
    for (const Running& request : running_) {
      SpeculationRequest description{.sequence_id = request.id,
                                     .max_nodes = std::min(max_nodes, request.tokens_left),
                                     .drafter = kAnyDrafter,
                                     .catch_up_tokens = request.unseen,
                                     .tokens_left = request.tokens_left};
      for (size_t d = 0; d < machine_.drafters.size(); ++d) {
        if (machine_.drafters[d].catch_up_ms == 0) description.catch_up_tokens[d] = 0;
      }
      requests.push_back(std::move(description));
    }
    return requests;
  }

  // As Speculator::DraftsOn.
  bool MayContinue(const SpeculationController& controller) const {
    if (machine_.drafts_ahead == 1 || of_all_ == kAnyDrafter || nodes_ < 0.5) return false;
    return machine_.drafters[of_all_].own_heads && controller.MayContinue(of_all_, choices_.front().trial);
  }

  // Whom all requests used, and how many nodes were verified for each.
  void NoteDrafterOfAll(std::span<const SpeculationChoice> choices, int rows) {
    if (continued_) return;
    const SpeculationChoice& first = choices.front();
    const bool all = std::ranges::all_of(
        choices, [&](const auto& choice) { return choice.nodes > 1 && choice.drafter == first.drafter; });
    of_all_ = all && !machine_.drafters[first.drafter].free ? first.drafter : kAnyDrafter;
    nodes_ = static_cast<double>(rows) / static_cast<double>(choices.size()) - 1;
  }

  // What a step spends on drafts; seconds: as the controller sees it, but for what is hidden.
  struct Drafting {
    std::vector<DraftTree> trees;
    std::vector<SpeculationProposal> proposals;
    double ms = 0, seconds = 0, expected_seconds = 0, reading_seconds = 0, contexts = 0;
    int64_t catch_up = 0;
  };

  // As Speculator does: those that cost nothing first, for what they promise.
  void AskFree(int d, std::span<const SpeculationRequest> requests, std::vector<SpeculationChoice>* choices,
               SpeculationController* controller, Drafting* drafting) {
    const SimulatedDrafter& drafter = machine_.drafters[d];
    int asked = 0;
    double gains = 0;
    bool used = false;
    for (size_t r = 0; r < requests.size(); ++r) {
      SpeculationChoice& choice = (*choices)[r];
      const bool runs = start_ == StepStart::kAhead || continued_;
      const bool watched = runs && r < std::max<size_t>(8, requests.size() / 8);
      const bool wanted = !runs && !choice.trial;
      if (!watched && (!wanted || (!controller->AsksAll(d) && choice.free_trial != d))) continue;
      if (requests[r].max_nodes < 2) continue;
      ++asked;
      int levels = 0;
      DraftTree tree =
          SimulateDraft(drafter, (*running_[r].text)[d], {.nodes = requests[r].max_nodes}, &levels, &random_);
      if (tree.num_nodes() < 2) continue;
      const double gain = controller->Gain({requests[r].sequence_id, d, false, &tree}) - choice.gain;
      const bool trial = gain <= 0 && choice.free_trial == d;
      if (gain <= 0 && !trial) continue;
      gains += std::max(gain, 0.0);
      if (watched) continue;
      used = true;
      choice = {.drafter = d, .nodes = tree.num_nodes(), .trial = trial};
      drafting->trees[r] = std::move(tree);
    }
    if (asked == 0) return;
    const double ms = drafter.Ms(asked, 1);
    if (start_ == StepStart::kAhead || continued_) return controller->ObserveFree(d, asked, gains, false, 1e-3 * ms);
    drafting->ms += ms;
    drafting->seconds += 1e-3 * ms;
    drafting->expected_seconds += 1e-3 * ms;
    controller->ObserveFree(d, asked, gains, used, 1e-3 * ms);
  }

  void Ask(int d, std::span<const SpeculationRequest> requests, std::span<const SpeculationChoice> choices,
           SpeculationController* controller, Drafting* drafting) {
    const SimulatedDrafter& drafter = machine_.drafters[d];
    int levels = 0;
    int64_t catch_up = 0;
    std::vector<int> drafted;
    bool trial = controller == nullptr;
    for (size_t r = 0; r < requests.size(); ++r) {
      if (choices[r].nodes <= 1 || choices[r].drafter != d) continue;
      drafted.push_back(static_cast<int>(r));
      trial |= choices[r].trial;
    }
    const int contexts = static_cast<int>(drafted.size());
    if (contexts == 0 || (!trial && !continued_ && !controller->StillPays(d, contexts))) return;
    for (const int r : drafted) {
      int own = 0;
      drafting->trees[r] = SimulateDraft(drafter, (*running_[r].text)[d], choices[r], &own, &random_);
      levels = std::max(levels, own);
      catch_up += requests[r].catch_up_tokens[d];
      running_[r].unseen[d] = 0;
    }
    const double ms = machine_.draft_surprise * drafter.Ms(contexts, levels) +
                      drafter.catch_up_ms * static_cast<double>(catch_up) + std::exchange(prompts_ms_, 0);
    drafting->ms += ms;
    drafting->contexts += contexts;
    drafting->catch_up += catch_up;
    if (controller == nullptr) return;
    for (const int r : drafted) {
      DraftTree* tree = &drafting->trees[r];
      controller->Learn({requests[r].sequence_id, d, choices[r].trial, tree, tree->Depth() >= choices[r].max_levels});
    }
    const double seconds = 1e-3 * ms * Noise();
    drafting->seconds += seconds;
    drafting->expected_seconds += controller->draft_costs(d).Seconds(contexts, levels);
    if (continued_) {
      for (const int r : drafted) Cut(&drafting->trees[r], 1 + std::max(1, static_cast<int>(std::lround(nodes_))));
      return;
    }
    if (catch_up > DraftCosts::kLongCatchUp * contexts) {
      drafting->reading_seconds += controller->draft_costs(d).PerCatchUpToken() * static_cast<double>(catch_up);
    }
    controller->draft_costs(d).Observe(contexts, levels, catch_up, seconds);
  }

  void Step(std::span<const SpeculationRequest> requests, std::vector<SpeculationChoice> choices,
            SpeculationController* controller, Totals* totals) {
    const int batch = static_cast<int>(requests.size());
    Drafting drafting;
    drafting.trees.assign(batch, DraftTree::Root(0));
    std::vector<DraftTree>& trees = drafting.trees;
    for (const bool free : {true, false}) {
      for (int d = 0; d < static_cast<int>(machine_.drafters.size()); ++d) {
        if (machine_.drafters[d].free != free) continue;
        if (free && controller != nullptr) AskFree(d, requests, &choices, controller, &drafting);
        if (!free || controller == nullptr) Ask(d, requests, choices, controller, &drafting);
      }
    }
    for (int r = 0; r < batch && controller != nullptr; ++r) {
      if (trees[r].num_nodes() < 2) continue;
      drafting.proposals.push_back({requests[r].sequence_id, choices[r].drafter, choices[r].trial, &trees[r]});
    }
    if (controller != nullptr && continued_) controller->Expect(drafting.proposals);
    if (controller != nullptr && !continued_) controller->Prune(drafting.proposals, batch, drafting.expected_seconds);
    int rows = 0, step_tokens = 0;
    for (int r = 0; r < batch; ++r) {
      rows += trees[r].num_nodes();
      const std::vector<int32_t> path = SimulateWalk(trees[r], &random_);
      const int tokens = std::min<int>(static_cast<int>(path.size()), running_[r].tokens_left);
      step_tokens += tokens;
      totals->drafts += trees[r].num_nodes() > 1;
      running_[r].tokens_left -= tokens;
      for (int64_t& unseen : running_[r].unseen) unseen += tokens;
      if (controller == nullptr || trees[r].num_nodes() == 1) continue;
      controller->acceptance().Observe(
          {requests[r].sequence_id, choices[r].drafter, &trees[r], path, running_[r].tokens_left > 0});
    }
    totals->tokens += step_tokens;
    NoteDrafterOfAll(choices, rows);
    const double ahead = continued_ ? machine_.drafts_ahead : 1;
    // Noise and drift mislead the controller; what counts is what the steps take without them.
    const double plain_ms = machine_.VerifyMs(batch, batch),
                 verify_ms = machine_.VerifyMs(rows, batch) * (start_ == StepStart::kAhead ? machine_.ahead : 1);
    const double prompts_ms = std::exchange(prompts_ms_, 0), hidden_ms = machine_.hidden_ms * drafting.contexts;
    const double ms = ahead * (verify_ms + drafting.ms) + prompts_ms + hidden_ms;
    totals->ms += ms;
    totals->slowest = std::max(totals->slowest, (verify_ms + drafting.ms) / plain_ms);
    const int64_t prompt_tokens = std::exchange(prompt_tokens_, 0);
    if (controller == nullptr) return;
    const double seconds = 1e-3 * (ahead * verify_ms + prompts_ms) * Noise();
    const double draft_seconds = ahead * drafting.seconds + 1e-3 * hidden_ms * std::exp(speed_);
    controller->ObserveStep({.rows = rows,
                             .requests = batch,
                             .tokens = static_cast<double>(step_tokens),
                             .prompt_tokens = prompt_tokens,
                             .catch_up = drafting.catch_up,
                             .drafter = UsedByMost(choices),
                             .verify_seconds = seconds,
                             .draft_seconds = draft_seconds,
                             .seconds = seconds + draft_seconds,
                             .expected_seconds = drafting.expected_seconds + drafting.reading_seconds +
                                                 controller->step_costs().Estimate(rows, batch),
                             .drafter_of_all = of_all_,
                             .ahead = continued_});
  }

  // The drafter of at least half of the requests, none of them on trial; -1: none.
  int UsedByMost(std::span<const SpeculationChoice> choices) const {
    double used = 0;
    int drafter = kAnyDrafter;
    for (const SpeculationChoice& choice : choices) {
      if (choice.trial) return kAnyDrafter;
      if (choice.nodes <= 1 || machine_.drafters[choice.drafter].free) continue;
      if (drafter != kAnyDrafter && drafter != choice.drafter) return kAnyDrafter;
      drafter = choice.drafter;
      used += 1;
    }
    return used >= 0.5 * static_cast<double>(choices.size()) ? drafter : kAnyDrafter;
  }

  double Noise() {
    std::normal_distribution<double> normal;
    speed_ = std::clamp(speed_ + machine_.drift * normal(random_), -0.7, 0.7);
    return std::exp(speed_ + machine_.noise * normal(random_)) * (Uniform(&random_) < machine_.interruptions ? 3 : 1);
  }

 public:
  int max_nodes = 8;
  int prompt_tokens = 80;

 private:
  const SimulatedMachine machine_;
  const std::vector<SimulatedText> texts_;
  const int batch_, max_tokens_;
  std::mt19937 random_;
  std::vector<Running> running_;
  uint64_t next_id_ = 1;
  StepStart start_ = StepStart::kAlone;  // of the step under way
  bool continued_ = false;               // it has drafts and runs ahead
  std::vector<SpeculationChoice> choices_;
  int of_all_ = kAnyDrafter;
  double nodes_ = 0;
  double speed_ = 0;       // logarithm
  double prompts_ms_ = 0;  // of reading the prompts of requests that are new
  int64_t prompt_tokens_ = 0;
};

}  // namespace linspec
