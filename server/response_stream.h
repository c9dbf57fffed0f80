// Bounded channel from the engine to one connection. The engine thread only appends; the connection's thread takes,
// detokenizes and looks for stop strings, holding back no more text than could still become a stop string.
//
// Threads: the sink runs on the engine thread; Take on one consumer at a time; Cancel on any. The sink keeps the stream
// alive, so it may outlive its connection; after Cancel the engine drops it at the request's next output.
#pragma once

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "models/tokenizer.h"
#include "scheduler/request.h"

namespace linspec {

// Finds the first stop string in text that arrives in pieces. Bytes, not characters: a stop may end inside a token.
class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stops);
  // Appends text; returns what can no longer be part of a stop string. Once matched, nothing more comes.
  std::string Push(std::string_view text);
  std::string Finish();  // what was held back, when no stop came
  bool matched() const { return matched_ >= 0; }
  const std::string& matched_stop() const { return stops_[matched_]; }
  size_t released() const { return released_; }  // bytes returned so far

 private:
  std::vector<std::string> stops_;
  std::string held_;
  int matched_ = -1;
  size_t released_ = 0;
};

struct OutputToken {
  SampledToken sampled;
  size_t text_start = 0, text_end = 0;  // in the output's text (echoed prompt included)
  bool from_prompt = false;
  bool beyond_text = false;  // generated, but not in the text: it ended the output, or a stop string took its text
};

// What became ready since the last Take.
struct StreamDelta {
  std::string text;
  std::vector<OutputToken> tokens;                   // those whose text begins inside the text released so far; in the
                                                     // last delta also those beyond it
  FinishReason finish_reason = FinishReason::kNone;  // other than kNone: the last delta
  std::string stop_string;                           // which stop string ended it
  int32_t stop_token = -1;                           // which eos or stop token ended it
  absl::Status status;                               // when kError
  bool empty() const { return text.empty() && tokens.empty() && finish_reason == FinishReason::kNone; }
};

struct StreamUsage {
  int64_t prompt_tokens = 0, cached_tokens = 0;  // of the prompt: not computed again
  int64_t completion_tokens = 0, draft_tokens = 0, accepted_tokens = 0, verify_steps = 0;
};

// Latencies of one request as its consumer saw them; for the metrics.
struct StreamTimes {
  RequestTimes engine;
  Clock::time_point last_output;
  std::vector<float> gaps;  // seconds between outputs, since the last ClearGaps
};

struct ResponseStreamOptions {
  std::vector<std::string> stop = {};
  bool include_stop = false;
  bool skip_special_tokens = true;
  bool detokenize = true;          // false: token ids only, no text
  int64_t num_prompt_tokens = 0;   // prompt tokens that the first output starts with (prompt logprobs)
  int32_t last_prompt_token = -1;  // what the output continues
  int64_t max_buffer_bytes = 256 << 10;
};

class ResponseStream : public std::enable_shared_from_this<ResponseStream> {
 public:
  // tokenizer must outlive the stream.
  static std::shared_ptr<ResponseStream> Create(const Tokenizer* tokenizer, ResponseStreamOptions options);

  OutputSink MakeSink();
  // notify runs on the engine thread, at most once between two Takes and once more at an overflow; it must not block
  // or call Take itself.
  void SetNotify(std::function<void()> notify);

  StreamDelta Take();                          // may be empty
  void Cancel();                               // the consumer is gone
  bool finished() const { return finished_; }  // a delta with a finish reason was taken
  bool overflowed() const { return overflowed_; }
  const StreamUsage& usage() const { return usage_; }
  const StreamTimes& times() const { return times_; }
  void ClearGaps() { times_.gaps.clear(); }

 private:
  struct Item {
    RequestOutput output;
    Clock::time_point at;
  };
  ResponseStream(const Tokenizer* tokenizer, ResponseStreamOptions options);
  bool Push(RequestOutput&& output);
  void Consume(Item item, StreamDelta* delta);
  void AppendToken(SampledToken token, StreamDelta* delta);
  void ReleaseTokens(StreamDelta* delta, bool all);
  void EndAtStop(StreamDelta* delta);
  void ReleaseBeyondText(StreamDelta* delta);

  const ResponseStreamOptions options_;

  std::mutex mutex_;  // guards the next four
  std::vector<Item> queue_;
  int64_t queued_bytes_ = 0;
  bool notified_ = false;
  std::shared_ptr<const std::function<void()>> notify_;  // shared: it is run without the lock, and not copied for that

  std::atomic<bool> cancelled_ = false, overflowed_ = false;

  std::vector<Item> taken_;  // from here on: the consumer's. Keeps the memory of the last Take for the queue
  IncrementalDecoder decoder_;
  StopMatcher matcher_;
  std::deque<OutputToken> pending_;
  size_t decoded_bytes_ = 0;  // text that came out of the decoder, after the echoed prompt
  size_t echo_bytes_ = 0;
  int64_t prompt_left_ = 0;
  bool finished_ = false;
  StreamUsage usage_;
  StreamTimes times_;
};

}  // namespace linspec
