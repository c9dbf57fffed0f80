// The one place where absl::Status becomes an HTTP answer or a gRPC status, and where details (which field, when to
// come back) are attached to a Status.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace linspec {

// INVALID_ARGUMENT about one request field.
absl::Status FieldError(const std::string& field, const std::string& message);
// NOT_FOUND about the field `model`.
absl::Status ModelNotFound(const std::string& message);
// Overload: RESOURCE_EXHAUSTED or UNAVAILABLE that says after how many seconds to try again.
absl::Status WithRetryAfter(absl::Status status, int seconds);
// A limit of one API key rather than of the server: 429 instead of 503.
absl::Status TenantLimit(const std::string& message);
// An HTTP status code that absl has no word for: 404, 405, 413, 415, 417, 431; or 501, where it is about HTTP itself.
absl::Status HttpError(int http_status, const std::string& message);

std::string ErrorField(const absl::Status& status);  // "" if none
int RetryAfterSeconds(const absl::Status& status);   // 0 if none
int HttpStatusOf(const absl::Status& status);
const char* HttpReason(int http_status);                  // "Not Found"
std::string OpenAiErrorCode(const absl::Status& status);  // "invalid_value"
// {"error":{"message":...,"type":...,"param":...,"code":...}}
std::string OpenAiErrorJson(const absl::Status& status);

}  // namespace linspec
