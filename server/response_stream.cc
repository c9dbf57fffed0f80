#include "server/response_stream.h"

#include <algorithm>
#include <utility>

namespace linspec {

constexpr size_t kKeptItems = 16;  // more than a reader that keeps up lets wait

StopMatcher::StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {
  std::erase_if(stops_, [](const std::string& stop) { return stop.empty(); });
}

std::string StopMatcher::Push(std::string_view text) {
  if (matched()) return "";
  held_.append(text);
  size_t first = std::string::npos;
  for (size_t i = 0; i < stops_.size(); ++i) {
    const size_t at = held_.find(stops_[i]);
    if (at < first) first = at, matched_ = static_cast<int>(i);
  }
  size_t keep = 0;
  if (matched()) {
    keep = held_.size() - first;
  } else {  // the longest suffix that is a proper prefix of a stop string
    for (const std::string& stop : stops_) {
      for (size_t n = std::min(stop.size() - 1, held_.size()); n > keep; --n) {
        if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) {
          keep = n;
          break;
        }
      }
    }
  }
  std::string out = held_.substr(0, held_.size() - keep);
  held_.erase(0, out.size());
  released_ += out.size();
  return out;
}

std::string StopMatcher::Finish() {
  if (matched()) return "";
  released_ += held_.size();
  return std::exchange(held_, "");
}

std::shared_ptr<ResponseStream> ResponseStream::Create(const Tokenizer* tokenizer, ResponseStreamOptions options) {
  return std::shared_ptr<ResponseStream>(new ResponseStream(tokenizer, std::move(options)));
}

ResponseStream::ResponseStream(const Tokenizer* tokenizer, ResponseStreamOptions options)
    : options_(std::move(options)),
      decoder_(tokenizer, options_.skip_special_tokens),
      matcher_(options_.stop),
      prompt_left_(options_.num_prompt_tokens) {
  // Output continues the prompt: a decoder that strips the first token's space must not strip it here.
  if (prompt_left_ == 0 && options_.last_prompt_token >= 0) {
    decoder_.Push(options_.last_prompt_token);
    decoder_.Finish();
  }
}

OutputSink ResponseStream::MakeSink() {
  return [self = shared_from_this()](RequestOutput&& output) { return self->Push(std::move(output)); };
}

void ResponseStream::SetNotify(std::function<void()> notify) {
  auto run = std::make_shared<const std::function<void()>>(std::move(notify));
  {
    std::lock_guard lock(mutex_);
    notify_ = run;
    if (queue_.empty()) return;
    notified_ = true;
  }
  (*run)();
}

bool ResponseStream::Push(RequestOutput&& output) {
  if (cancelled_) return false;
  int64_t bytes = sizeof(Item);
  for (const SampledToken& token : output.tokens) {
    bytes += sizeof(SampledToken) + static_cast<int64_t>(token.top_logprobs.size() * sizeof(TokenLogprob));
  }
  std::shared_ptr<const std::function<void()>> notify;
  {
    std::lock_guard lock(mutex_);
    // The final output is always taken: it is small and tells the consumer how its request ended.
    if (output.finish_reason == FinishReason::kNone && queued_bytes_ + bytes > options_.max_buffer_bytes) {
      overflowed_ = true;  // the engine will not call again, so this is the end
      output.tokens.clear();
      output.finish_reason = FinishReason::kCancelled;
    }
    queued_bytes_ += bytes;
    queue_.push_back({std::move(output), Clock::now()});
    if ((!notified_ || overflowed_) && notify_)
      notified_ = true, notify = notify_;  // an overflow cannot wait for a Take
  }
  if (notify) (*notify)();
  return !overflowed_;
}

void ResponseStream::Cancel() {
  cancelled_ = true;
  std::lock_guard lock(mutex_);
  notify_ = nullptr;
}

StreamDelta ResponseStream::Take() {
  {
    std::lock_guard lock(mutex_);
    taken_.swap(queue_);
    queued_bytes_ = 0;
    notified_ = false;
  }
  StreamDelta delta;
  for (Item& item : taken_) {
    if (finished_) break;
    Consume(std::move(item), &delta);
  }
  if (taken_.capacity() <= kKeptItems)
    taken_.clear();
  else
    taken_ = {};
  return delta;
}

void ResponseStream::Consume(Item item, StreamDelta* delta) {
  RequestOutput& output = item.output;
  usage_.prompt_tokens = output.num_prompt_tokens;
  usage_.cached_tokens = output.num_cached_tokens;
  usage_.draft_tokens = output.num_draft_tokens;
  usage_.accepted_tokens = output.num_accepted_tokens;
  usage_.verify_steps = output.num_verify_steps;
  times_.engine = output.times;
  if (!output.tokens.empty()) {
    if (times_.last_output != Clock::time_point()) {
      times_.gaps.push_back(std::chrono::duration<float>(item.at - times_.last_output).count());
    }
    times_.last_output = item.at;
  }
  for (SampledToken& token : output.tokens) {
    AppendToken(std::move(token), delta);
    if (matcher_.matched()) return EndAtStop(delta);
  }
  if (output.finish_reason == FinishReason::kNone) return ReleaseTokens(delta, false);
  if (options_.detokenize) {
    std::string tail = decoder_.Finish();
    decoded_bytes_ += tail.size();
    delta->text += matcher_.Push(tail);
    if (matcher_.matched()) return EndAtStop(delta);
    delta->text += matcher_.Finish();
  }
  ReleaseTokens(delta, true);
  if (output.stop_token >= 0) {
    ++usage_.completion_tokens;
    pending_.emplace_back().sampled.token = output.stop_token;
    ReleaseBeyondText(delta);
  }
  delta->finish_reason = output.finish_reason;
  delta->status = output.status;
  delta->stop_token = output.stop_token;
  finished_ = true;
}

void ResponseStream::AppendToken(SampledToken token, StreamDelta* delta) {
  OutputToken entry{.sampled = std::move(token), .text_start = echo_bytes_ + decoded_bytes_};
  if (prompt_left_ > 0) {  // an echoed prompt token: its text is released as it comes, stop strings do not apply
    --prompt_left_;
    entry.from_prompt = true;
    if (options_.detokenize) {
      std::string text = decoder_.Push(entry.sampled.token);
      if (prompt_left_ == 0) text += decoder_.Finish();  // output must not begin inside the prompt's last character
      echo_bytes_ += text.size();
      delta->text += text;
    }
    entry.text_end = echo_bytes_;
    delta->tokens.push_back(std::move(entry));
    return;
  }
  ++usage_.completion_tokens;
  if (options_.detokenize) {
    const std::string text = decoder_.Push(entry.sampled.token);
    decoded_bytes_ += text.size();
    delta->text += matcher_.Push(text);
  }
  entry.text_end = echo_bytes_ + decoded_bytes_;
  pending_.push_back(std::move(entry));
}

// A token goes out once its text has begun to go out, so that logprobs never run ahead of what they describe.
void ResponseStream::ReleaseTokens(StreamDelta* delta, bool all) {
  const size_t released = echo_bytes_ + matcher_.released();
  while (!pending_.empty() &&
         (all || pending_.front().text_start < released || pending_.front().text_end <= released)) {
    delta->tokens.push_back(std::move(pending_.front()));
    pending_.pop_front();
  }
}

void ResponseStream::ReleaseBeyondText(StreamDelta* delta) {
  for (OutputToken& token : pending_) {
    token.beyond_text = true;
    delta->tokens.push_back(std::move(token));
  }
  pending_.clear();
}

void ResponseStream::EndAtStop(StreamDelta* delta) {
  ReleaseTokens(delta, options_.include_stop);
  ReleaseBeyondText(delta);
  if (options_.include_stop) delta->text += matcher_.matched_stop();
  delta->stop_string = matcher_.matched_stop();
  delta->finish_reason = FinishReason::kStop;
  usage_.accepted_tokens =
      std::min(usage_.accepted_tokens, usage_.completion_tokens);  // drafts past the stop are of no use
  finished_ = true;
  Cancel();
}

}  // namespace linspec
