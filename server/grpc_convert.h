// Protobuf messages to our values and back; absl::Status to grpc::Status with typed details. Pure functions.
//
// Threads: pure.
#pragma once

#include <grpcpp/support/status.h>

#include <string>

#include "absl/status/statusor.h"
#include "linspec/v1/linspec.pb.h"
#include "server/candidates.h"
#include "server/generate_call.h"

namespace linspec {

// Details: google.rpc.RetryInfo for overload, google.rpc.BadRequest for a bad field.
grpc::Status ToGrpcStatus(const absl::Status& status);

// INVALID_ARGUMENT names the field: no prompt, an unknown enum, whatever CheckCall refuses. Tenant and deadline are the
// caller's to fill in.
absl::StatusOr<GenerateCall> CallFromProto(const v1::GenerateRequest& request, const CallLimits& limits);
absl::StatusOr<std::vector<ChatMessage>> MessagesFromProto(const v1::ChatMessages& chat, const CallLimits& limits);

// One message of a call's stream. The request id and the usage are the caller's.
void FillResponse(const Choice& choice, const GenerateCall& call, const Tokenizer& tokenizer,
                  v1::GenerateResponse* response);
void FillUsage(const StreamUsage& usage, v1::Usage* out);

}  // namespace linspec
