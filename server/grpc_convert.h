// Protobuf messages to our values and back; absl::Status to grpc::Status with typed details. Pure functions.
//
// Threads: pure.
#pragma once

#include <grpcpp/support/status.h>

#include <string>

#include "absl/status/statusor.h"
#include "linspec/v1/linspec.pb.h"
#include "server/response_stream.h"
#include "server/service.h"

namespace linspec {

// Details: google.rpc.RetryInfo for overload, google.rpc.BadRequest for a bad field.
grpc::Status ToGrpcStatus(const absl::Status& status);

// INVALID_ARGUMENT names the field: no prompt, an unknown enum, more or longer stop strings than allowed.
absl::StatusOr<GenerateSpec> SpecFromProto(const v1::GenerateRequest& request);
absl::StatusOr<PromptInput> PromptFromProto(const v1::GenerateRequest& request);
std::vector<ChatMessage> MessagesFromProto(const v1::ChatMessages& chat);

struct ResponseShape {
  bool token_ids = false;
  bool logprobs = false;
};
void FillResponse(const StreamDelta& delta, const ResponseShape& shape, const Tokenizer& tokenizer,
                  v1::GenerateResponse* response);

}  // namespace linspec
