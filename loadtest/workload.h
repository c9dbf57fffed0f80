// What to send and when: prompts, lengths, arrival times and which clients misbehave. Made before the clock starts, a
// function of the options and their seed only.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "loadtest/options.h"

namespace linspec::loadtest {

struct PlannedRequest {
  double arrival = 0;  // seconds after the start
  std::string prompt;
  int max_tokens = 0;
  int cancel_after_chunks = -1;  // -1: never
  int read_delay_ms = 0;         // 0: reads at once
};

absl::StatusOr<std::vector<PlannedRequest>> MakeWorkload(const Options& options);

// CSV with a header that names arrival (seconds, or "YYYY-MM-DD hh:mm:ss.f"), prompt tokens and output tokens; the
// column names of the Azure LLM traces (TIMESTAMP, ContextTokens, GeneratedTokens) are known too.
struct TraceRow {
  double arrival = 0;  // seconds after the first row
  int prompt_tokens = 0, output_tokens = 0;
};
absl::StatusOr<std::vector<TraceRow>> ParseTrace(std::string_view csv);

}  // namespace linspec::loadtest
