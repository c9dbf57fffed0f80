// How the choices of a call are written as JSON, whole or as server-sent events. One writer a call.
//
// Threads: one consumer's.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/candidates.h"
#include "server/openai_json.h"
#include "server/response_stream.h"

namespace linspec {

class AnswerWriter {
 public:
  virtual ~AnswerWriter() = default;
  // The body of a plain answer; choices by index.
  virtual std::string Whole(const std::vector<Choice>& choices, const StreamUsage& usage) = 0;

  // Events, appended to *out: Begin once, Piece for what is new of a choice, then End or Error once.
  virtual void Begin(std::string* /*out*/) {}
  virtual void Piece(const Choice& piece, const StreamUsage& usage_so_far, std::string* out) = 0;
  virtual void End(const StreamUsage& usage, std::string* out) = 0;
  virtual void Error(const absl::Status& status, std::string* out) = 0;
};

using TokenBytesFn = std::function<std::string(int32_t)>;

// What every answer of a call begins with.
struct AnswerHead {
  std::string request_id, model;
  int64_t created = 0;  // seconds since 1970
};

// /v1/completions and /v1/chat/completions. The call must outlive the writer.
std::unique_ptr<AnswerWriter> MakeCompletionWriter(const OpenAiCall* call, AnswerHead head, TokenBytesFn token_bytes);
// /v1/responses (responses_format.cc).
std::unique_ptr<AnswerWriter> MakeResponsesWriter(const OpenAiCall* call, AnswerHead head);

}  // namespace linspec
