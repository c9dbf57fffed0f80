// A chat template and a context, separated by a zero byte (no zero byte: a fixed context). Parsing and rendering must
// end with text or a status, within their budgets.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "models/chat_template.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t split = input.find('\0');
  const std::string_view context =
      split == std::string_view::npos
          ? R"({"messages": [{"role": "user", "content": "a\u00e9 {{ x }}"}, {"role": "assistant", "content": null}],
               "tools": [{"type": "function", "name": "f", "parameters": {"b": 1, "a": [2.5, true]}}], "n": 3})"
          : input.substr(split + 1);
  const auto parsed = linspec::ChatTemplate::Parse(input.substr(0, split));
  if (parsed.ok()) (void)(*parsed)->Render(context);
  return 0;
}
