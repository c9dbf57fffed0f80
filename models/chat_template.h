// Chat templates: the part of Jinja2 that the templates of real models use, rendered as Hugging Face transformers does
// (trim_blocks, lstrip_blocks, sandboxed: no attribute access beyond data, bounded work and output).
//
// Threads: Render is const and safe from any thread.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace linspec {

class ChatTemplate {
 public:
  // INVALID_ARGUMENT with line number for a syntax error or an unsupported construct.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> Parse(std::string_view source);
  virtual ~ChatTemplate() = default;
  // context_json: an object with messages, add_generation_prompt, bos_token, eos_token, tools, ...
  // INVALID_ARGUMENT: the template called raise_exception or met a type error; RESOURCE_EXHAUSTED: over its work
  // budget.
  virtual absl::StatusOr<std::string> Render(std::string_view context_json) const = 0;
};

}  // namespace linspec
