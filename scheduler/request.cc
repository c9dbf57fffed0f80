#include "scheduler/request.h"

#include "absl/strings/cord.h"

namespace linspec {
namespace {

constexpr char kShareExceeded[] = "linspec/share_exceeded";

}  // namespace

absl::Status ShareExceededError(const std::string& message) {
  absl::Status status = absl::ResourceExhaustedError(message);
  status.SetPayload(kShareExceeded, absl::Cord());
  return status;
}

bool IsShareExceeded(const absl::Status& status) { return status.GetPayload(kShareExceeded).has_value(); }

const char* FinishReasonName(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "none";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kDeadline:
      return "deadline";
    case FinishReason::kError:
      return "error";
  }
  return "unknown";
}

}  // namespace linspec
