// What one way of decoding did in `linspec bench-speculation`, and its figures beside plain decoding's. Seconds, unless
// named otherwise. Threads: one at a time.
#pragma once

#include <array>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "scheduler/engine.h"

namespace linspec {

struct SpeculationTally {
  static constexpr size_t kDepths = 8;  // shown

  // Decoding steps of one kind: what they took and brought, beside what the speculation controller expected.
  struct Steps {
    int64_t count = 0, requests = 0, rows = 0, tokens = 0;
    double draft_s = 0, verify_s = 0, expected_draft_s = 0, expected_verify_s = 0, expected_tokens = 0;
    void Add(const StepStats& step);
    void Add(const Steps& other);
  };

  int64_t tokens = 0, request_steps = 0, drafted = 0;
  double seconds = 0, cpu_seconds = 0, draft_s = 0, verify_s = 0, accept_s = 0;
  double saved_s = 0;  // as the ledger has it
  std::array<int64_t, kDepths> drafted_per_depth{}, accepted_per_depth{};
  Steps plain, unused, speculative;  // nothing drafted; drafts of which none was worth verifying; verified
  std::vector<double> rates;         // tokens per second of each load

  void Add(const StepStats& step);
  void Add(const SpeculationTally& load);
  double TokensPerStep() const;
  double TokensPerSecond() const { return static_cast<double>(tokens) / seconds; }
  // Of a drafter that the ledger watched: plain decoding has none, nor have drafters that always draft.
  std::optional<double> BookedSpeedUp() const;
  double TokensPerCpuSecond() const { return static_cast<double>(tokens) / cpu_seconds; }
};

// Figures of one drafter. REQUIRES: both hold the same loads.
nlohmann::json ToJson(const SpeculationTally& tally, const SpeculationTally& plain);

// Lines of Markdown: of the table of all drafters, and of the one that sets what was expected beside what came.
std::string TallyHeader();
std::string TallyRow(const std::string& cell, const nlohmann::json& figures);
std::string ExpectationHeader();
std::string ExpectationRows(const std::string& cell, const nlohmann::json& figures);

}  // namespace linspec
