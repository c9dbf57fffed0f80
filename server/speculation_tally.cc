#include "server/speculation_tally.h"

#include <fmt/format.h>

#include <algorithm>

namespace linspec {
namespace {

using nlohmann::json;

double PerStep(double sum, int64_t steps) { return sum / static_cast<double>(std::max<int64_t>(steps, 1)); }

// The middle one of how much faster than plain decoding, load by load: an interruption spoils one load only.
double MedianSpeedUp(const SpeculationTally& tally, const SpeculationTally& plain) {
  std::vector<double> ratios;
  for (size_t i = 0; i < tally.rates.size(); ++i) ratios.push_back(tally.rates[i] / plain.rates[i]);
  std::nth_element(ratios.begin(), ratios.begin() + static_cast<int64_t>(ratios.size() / 2), ratios.end());
  return ratios[ratios.size() / 2];
}

// Averages of a step.
json ToJson(const SpeculationTally::Steps& steps) {
  return {{"count", steps.count},
          {"requests", PerStep(static_cast<double>(steps.requests), steps.count)},
          {"rows", PerStep(static_cast<double>(steps.rows), steps.count)},
          {"tokens", PerStep(static_cast<double>(steps.tokens), steps.count)},
          {"expected_tokens", PerStep(steps.expected_tokens, steps.count)},
          {"draft_s", PerStep(steps.draft_s, steps.count)},
          {"expected_draft_s", PerStep(steps.expected_draft_s, steps.count)},
          {"verify_s", PerStep(steps.verify_s, steps.count)},
          {"expected_verify_s", PerStep(steps.expected_verify_s, steps.count)}};
}

}  // namespace

void SpeculationTally::Steps::Add(const StepStats& step) {
  count += 1;
  requests += step.num_decode_requests;
  rows += step.num_verify_rows;
  tokens += step.num_output_tokens;
  draft_s += step.draft_s;
  verify_s += step.verify_s + step.commit_s;
  expected_draft_s += step.expected_draft_s;
  expected_verify_s += step.expected_verify_s;
  expected_tokens += step.expected_tokens;
}

void SpeculationTally::Steps::Add(const Steps& other) {
  count += other.count;
  requests += other.requests;
  rows += other.rows;
  tokens += other.tokens;
  draft_s += other.draft_s;
  verify_s += other.verify_s;
  expected_draft_s += other.expected_draft_s;
  expected_verify_s += other.expected_verify_s;
  expected_tokens += other.expected_tokens;
}

void SpeculationTally::Add(const StepStats& step) {
  request_steps += step.num_decode_requests;
  tokens += step.num_output_tokens;
  drafted += step.num_draft_tokens;
  draft_s += step.draft_s;
  verify_s += step.verify_s + step.commit_s;
  accept_s += step.accept_s;
  saved_s += step.speculation_saved_s;
  for (size_t d = 0; d < kDepths; ++d) {
    drafted_per_depth[d] += step.drafted_per_depth[d];
    accepted_per_depth[d] += step.accepted_per_depth[d];
  }
  if (step.num_decode_requests == 0) return;
  (step.num_drafts > 0 ? speculative : step.expected_draft_s > 0 ? unused : plain).Add(step);
}

void SpeculationTally::Add(const SpeculationTally& load) {
  tokens += load.tokens;
  request_steps += load.request_steps;
  drafted += load.drafted;
  seconds += load.seconds;
  cpu_seconds += load.cpu_seconds;
  draft_s += load.draft_s;
  verify_s += load.verify_s;
  accept_s += load.accept_s;
  saved_s += load.saved_s;
  for (size_t d = 0; d < kDepths; ++d) {
    drafted_per_depth[d] += load.drafted_per_depth[d];
    accepted_per_depth[d] += load.accepted_per_depth[d];
  }
  plain.Add(load.plain);
  unused.Add(load.unused);
  speculative.Add(load.speculative);
  rates.push_back(load.TokensPerSecond());
}

double SpeculationTally::TokensPerStep() const { return PerStep(static_cast<double>(tokens), request_steps); }

std::optional<double> SpeculationTally::BookedSpeedUp() const {
  if (saved_s == 0) return std::nullopt;
  return 1 + saved_s / seconds;
}

json ToJson(const SpeculationTally& tally, const SpeculationTally& plain) {
  json acceptance = json::array();
  for (size_t d = 0; d < SpeculationTally::kDepths && tally.drafted_per_depth[d] > 0; ++d) {
    acceptance.push_back(PerStep(static_cast<double>(tally.accepted_per_depth[d]), tally.drafted_per_depth[d]));
  }
  const std::optional<double> booked = tally.BookedSpeedUp();
  return {
      {"tokens", tally.tokens},
      {"seconds", tally.seconds},
      {"tokens_per_step", tally.TokensPerStep()},
      {"tokens_per_s", tally.TokensPerSecond()},
      {"speed_up", tally.TokensPerSecond() / plain.TokensPerSecond()},
      {"median_speed_up", MedianSpeedUp(tally, plain)},
      {"cpu_speed_up", tally.TokensPerCpuSecond() / plain.TokensPerCpuSecond()},
      {"booked_speed_up", booked ? json(*booked) : json()},
      {"drafted_per_step", PerStep(static_cast<double>(tally.drafted), tally.request_steps)},
      {"draft_share", tally.draft_s / tally.seconds},
      {"verify_share", tally.verify_s / tally.seconds},
      {"accept_share", tally.accept_s / tally.seconds},
      {"accepted_per_depth", acceptance},
      {"steps",
       {{"plain", ToJson(tally.plain)}, {"unused", ToJson(tally.unused)}, {"speculative", ToJson(tally.speculative)}}}};
}

std::string TallyHeader() {
  return "| prompts | batch | temperature | drafter | tokens/step | tokens/s | speed-up | median | by CPU time "
         "| by the ledger | drafting | accepted per depth |\n"
         "|---|---|---|---|---|---|---|---|---|---|---|---|\n";
}

std::string TallyRow(const std::string& cell, const json& figures) {
  std::string acceptance;
  for (const json& rate : figures["accepted_per_depth"]) acceptance += fmt::format(" {:.2f}", rate.get<double>());
  const auto figure = [&](const char* name) { return figures[name].get<double>(); };
  const std::string booked =
      figures["booked_speed_up"].is_null() ? "" : fmt::format("{:.2f} ", figure("booked_speed_up"));
  return fmt::format("{} {:.2f} | {:.0f} | {:.2f} | {:.2f} | {:.2f} | {}| {:.0f} % |{} |\n", cell,
                     figure("tokens_per_step"), figure("tokens_per_s"), figure("speed_up"), figure("median_speed_up"),
                     figure("cpu_speed_up"), booked, 100 * figure("draft_share"), acceptance);
}

std::string ExpectationHeader() {
  return "\nA step's average; in brackets what was expected of it.\n\n"
         "| prompts | batch | temperature | drafter | steps | count | requests | rows | tokens | us to draft "
         "| us to verify and commit |\n"
         "|---|---|---|---|---|---|---|---|---|---|---|\n";
}

std::string ExpectationRows(const std::string& cell, const json& figures) {
  std::string rows;
  for (const char* kind : {"plain", "unused", "speculative"}) {
    const json& steps = figures["steps"][kind];
    if (steps["count"] == 0) continue;
    const auto figure = [&](const char* name, double factor = 1) { return factor * steps[name].get<double>(); };
    rows += fmt::format("{} {} | {} | {:.1f} | {:.1f} | {:.1f} ({:.1f}) | {:.0f} ({:.0f}) | {:.0f} ({:.0f}) |\n", cell,
                        kind, steps["count"].get<int64_t>(), figure("requests"), figure("rows"), figure("tokens"),
                        figure("expected_tokens"), figure("draft_s", 1e6), figure("expected_draft_s", 1e6),
                        figure("verify_s", 1e6), figure("expected_verify_s", 1e6));
  }
  return rows;
}

}  // namespace linspec
