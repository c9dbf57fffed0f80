#include "scheduler/request.h"

#include <iterator>

#include "absl/strings/cord.h"

namespace linspec {
namespace {

constexpr std::string_view kSpeculationModes[] = {"", "off", "draft", "medusa", "recurrent", "ngram", "auto"};
constexpr char kShareExceeded[] = "linspec/share_exceeded";

}  // namespace

std::string_view SpeculationModeName(SpeculationMode mode) { return kSpeculationModes[static_cast<size_t>(mode)]; }

std::optional<SpeculationMode> FindSpeculationMode(std::string_view name) {
  for (size_t i = 1; i < std::size(kSpeculationModes); ++i) {
    if (kSpeculationModes[i] == name) return static_cast<SpeculationMode>(i);
  }
  return std::nullopt;
}

std::string SpeculationModeNames() {
  std::string names;
  for (size_t i = 1; i < std::size(kSpeculationModes); ++i) {
    names += (names.empty() ? "" : ", ") + std::string(kSpeculationModes[i]);
  }
  return names;
}

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
