// Stamps the chunks of one streamed answer. Both clients use it, so both are measured alike.
#pragma once

#include <chrono>
#include <utility>

#include "loadtest/client.h"

namespace linspec::loadtest {

class StreamMeter {
 public:
  using Clock = std::chrono::steady_clock;

  // A chunk with text (or tokens) arrived now.
  void Chunk(std::string_view text) {
    const double now = std::chrono::duration<double>(Clock::now() - start_).count();
    if (record_.chunks++ == 0) {
      record_.ttft = now;
    } else {
      record_.itls.push_back(now - record_.latency);
    }
    record_.latency = now;
    record_.text += text;
  }
  void Usage(int prompt_tokens, int output_tokens) {
    record_.prompt_tokens = prompt_tokens;
    record_.output_tokens = output_tokens;
  }
  int chunks() const { return record_.chunks; }

  RequestRecord Finish(std::string error) {
    if (record_.output_tokens == 0) record_.output_tokens = record_.chunks;  // a server that sends no usage
    if (error.empty() && record_.chunks == 0) error = "the answer had no text";
    record_.ok = error.empty();
    record_.error = std::move(error);
    return std::move(record_);
  }
  RequestRecord Cancelled() {
    record_.cancelled = true;
    record_.output_tokens = record_.chunks;
    return std::move(record_);
  }

 private:
  Clock::time_point start_ = Clock::now();
  RequestRecord record_;
};

}  // namespace linspec::loadtest
