// The text formats a client reads: server-sent events, the JSON in them, and Prometheus metrics. No I/O.
#pragma once

#include <array>
#include <string>
#include <string_view>
#include <vector>

namespace linspec::loadtest {

// Feeds bytes as they arrive, in pieces of any size; returns the data of each event that is complete.
class SseParser {
 public:
  std::vector<std::string> Push(std::string_view bytes);

 private:
  void Line(std::string_view line, std::vector<std::string>* events);
  std::string line_, data_;
  bool has_data_ = false;
  bool after_cr_ = false;  // "\r\n" is one line end, even across pieces
};

// What one event of a streamed answer says to somebody who measures.
struct StreamEvent {
  std::vector<std::string> texts;  // of its choices, as far as they are strings and not empty
  bool has_usage = false, is_error = false;
  int prompt_tokens = 0, completion_tokens = 0;
};
// False when data is not a JSON object. No tree is built: a client reads tens of thousands of events a second.
bool ParseStreamEvent(std::string_view data, StreamEvent* event);

// Counters of speculative decoding, summed over labels other than position.
struct SpeculationCounters {
  bool found = false;
  double drafts = 0, draft_tokens = 0, accepted_tokens = 0;
  std::vector<double> accepted_per_position;
  SpeculationCounters Since(const SpeculationCounters& before) const;
};

// Reads linspec_spec_decode_*, or vllm:spec_decode_* when there are none.
SpeculationCounters ParseSpeculationCounters(std::string_view metrics);

}  // namespace linspec::loadtest
