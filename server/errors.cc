#include "server/errors.h"

#include <fmt/format.h>

#include <cstdlib>
#include <optional>

#include "absl/strings/cord.h"
#include "server/json_text.h"

namespace linspec {
namespace {

constexpr char kField[] = "linspec/field";
constexpr char kRetryAfter[] = "linspec/retry_after_s";
constexpr char kHttpStatus[] = "linspec/http_status";

std::string Payload(const absl::Status& status, const char* key) {
  const auto payload = status.GetPayload(key);
  return payload.has_value() ? std::string(*payload) : std::string();
}

// Debian's absl::string_view is not std's, and Cord's constructor from std::string is a template that clang and g++
// mangle differently.
void SetPayload(const char* key, const std::string& value, absl::Status* status) {
  status->SetPayload(key, absl::Cord(absl::string_view(value.data(), value.size())));
}

struct HttpMapping {
  int status;
  const char* type;
  const char* code;
};

HttpMapping Map(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kOk:
      return {200, "", ""};
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kFailedPrecondition:
      return {400, "invalid_request_error", "invalid_value"};
    case absl::StatusCode::kUnauthenticated:
      return {401, "authentication_error", "invalid_api_key"};
    case absl::StatusCode::kPermissionDenied:
      return {403, "permission_error", "permission_denied"};
    case absl::StatusCode::kNotFound:
      return {404, "invalid_request_error", "not_found"};
    case absl::StatusCode::kAlreadyExists:
      return {409, "invalid_request_error", "already_exists"};
    case absl::StatusCode::kResourceExhausted:
      return {503, "overloaded_error", "server_overloaded"};
    case absl::StatusCode::kUnavailable:
      return {503, "overloaded_error", "unavailable"};
    case absl::StatusCode::kDeadlineExceeded:
      return {504, "timeout_error", "deadline_exceeded"};
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kCancelled:
      return {503, "server_error", "aborted"};
    case absl::StatusCode::kUnimplemented:
      return {501, "invalid_request_error", "unsupported"};
    default:
      return {500, "server_error", "internal_error"};
  }
}

}  // namespace

absl::Status FieldError(const std::string& field, const std::string& message) {
  absl::Status status = absl::InvalidArgumentError(field.empty() ? message : fmt::format("{}: {}", field, message));
  if (!field.empty()) SetPayload(kField, field, &status);
  return status;
}

absl::Status ModelNotFound(const std::string& message) {
  absl::Status status = absl::NotFoundError("model: " + message);
  SetPayload(kField, "model", &status);
  return status;
}

absl::Status WithRetryAfter(absl::Status status, int seconds) {
  SetPayload(kRetryAfter, std::to_string(seconds), &status);
  return status;
}

absl::Status TenantLimit(const std::string& message) {
  absl::Status status = absl::ResourceExhaustedError(message);
  SetPayload(kHttpStatus, "429", &status);
  return status;
}

absl::Status HttpError(int http_status, const std::string& message) {
  absl::Status status = absl::InvalidArgumentError(message);
  SetPayload(kHttpStatus, std::to_string(http_status), &status);
  return status;
}

std::string ErrorField(const absl::Status& status) { return Payload(status, kField); }

int RetryAfterSeconds(const absl::Status& status) { return std::atoi(Payload(status, kRetryAfter).c_str()); }

int HttpStatusOf(const absl::Status& status) {
  const std::string explicit_status = Payload(status, kHttpStatus);
  return explicit_status.empty() ? Map(status.code()).status : std::atoi(explicit_status.c_str());
}

const char* HttpReason(int http_status) {
  switch (http_status) {
    case 200:
      return "OK";
    case 204:
      return "No Content";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 403:
      return "Forbidden";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 408:
      return "Request Timeout";
    case 409:
      return "Conflict";
    case 413:
      return "Content Too Large";
    case 415:
      return "Unsupported Media Type";
    case 417:
      return "Expectation Failed";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    case 501:
      return "Not Implemented";
    case 503:
      return "Service Unavailable";
    case 504:
      return "Gateway Timeout";
    default:
      return "Internal Server Error";
  }
}

std::string OpenAiErrorCode(const absl::Status& status) {
  switch (HttpStatusOf(status)) {
    case 404:
      return ErrorField(status) == "model" ? "model_not_found" : "not_found";
    case 405:
      return "method_not_allowed";
    case 413:
      return "request_too_large";
    case 429:
      return "rate_limit_exceeded";
    default:
      return Map(status.code()).code;
  }
}

std::string OpenAiErrorJson(const absl::Status& status) {
  const std::string field = ErrorField(status);
  std::string json = "{\"error\":{\"message\":";
  AppendJsonString(std::string(status.message()), &json);
  json += fmt::format(",\"type\":\"{}\",\"param\":",
                      HttpStatusOf(status) == 429 ? "rate_limit_error" : Map(status.code()).type);
  if (field.empty())
    json += "null";
  else
    AppendJsonString(field, &json);
  json += fmt::format(",\"code\":\"{}\"}}}}", OpenAiErrorCode(status));
  return json;
}

}  // namespace linspec
