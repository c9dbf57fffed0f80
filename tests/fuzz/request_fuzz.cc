// A request body, after a first byte that says which route it came to. Whatever is accepted must obey the limits; what
// is refused must be an INVALID_ARGUMENT whose answer is valid JSON.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>

#include "server/errors.h"
#include "server/openai_json.h"

namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

void CheckRefusal(const absl::Status& status) {
  Require(status.code() == absl::StatusCode::kInvalidArgument);
  Require(linspec::HttpStatusOf(status) == 400);
  Require(nlohmann::json::accept(linspec::OpenAiErrorJson(status)));
}

void CheckCall(const absl::StatusOr<linspec::OpenAiCall>& call, const linspec::CallLimits& limits) {
  if (!call.ok()) return CheckRefusal(call.status());
  const linspec::GenerateCall& generate = call->generate;
  Require(!generate.prompts.empty() && generate.n >= 1 && generate.best_of >= generate.n);
  Require(generate.prompts.size() * static_cast<size_t>(generate.best_of) <= static_cast<size_t>(limits.max_n));
  Require(generate.sampling.max_tokens >= (generate.echo ? 0 : 1));
  Require(generate.sampling.max_tokens <= limits.max_output_tokens);
  Require(generate.sampling.stop.size() <= static_cast<size_t>(limits.max_stop_strings));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string body(reinterpret_cast<const char*>(data) + 1, size - 1);
  const linspec::CallLimits limits;
  switch (data[0] % 8) {
    case 0:
      CheckCall(linspec::ParseCompletion(body, limits), limits);
      break;
    case 1:
      CheckCall(linspec::ParseChat(body, limits), limits);
      break;
    case 2:
      if (const auto call = linspec::ParseTokenize(body, limits); !call.ok()) CheckRefusal(call.status());
      break;
    case 4:
      CheckCall(linspec::ParseResponses(body, limits), limits);
      break;
    default:
      if (const auto call = linspec::ParseDetokenize(body); !call.ok()) CheckRefusal(call.status());
  }
  return 0;
}
