// A GenerateRequest as it comes off the wire. What protobuf accepts is a call within the limits or an INVALID_ARGUMENT
// that says which field, as google.rpc.BadRequest too.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "linspec/v1/linspec.pb.h"
#include "server/errors.h"
#include "server/grpc_convert.h"

namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  linspec::v1::GenerateRequest request;
  if (!request.ParseFromArray(data, static_cast<int>(size))) return 0;
  const linspec::CallLimits limits;
  const auto call = linspec::CallFromProto(request, limits);
  if (!call.ok()) {
    Require(call.status().code() == absl::StatusCode::kInvalidArgument);
    Require(!linspec::ErrorField(call.status()).empty());
    Require(!linspec::ToGrpcStatus(call.status()).error_details().empty());
    return 0;
  }
  Require(call->prompts.size() * static_cast<size_t>(call->best_of) <= static_cast<size_t>(limits.max_n));
  Require(call->sampling.max_tokens <= limits.max_output_tokens && call->sampling.temperature <= 2);
  return 0;
}
