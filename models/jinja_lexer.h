// Splits a template into text, {{ expression }} and {% statement %} parts, with Jinja's white-space control
// (trim_blocks and lstrip_blocks on, as Hugging Face sets them), and the inside of a part into words.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace linspec::jinja {

struct Part {
  enum Kind { kText, kExpression, kStatement } kind;
  std::string content;
  int line;
};
std::vector<Part> SplitParts(std::string_view source);

struct Word {
  enum Kind { kName, kInt, kFloat, kString, kOperator, kEnd } kind;
  std::string text;
  int line;
};
std::vector<Word> SplitWords(std::string_view content, int line);

}  // namespace linspec::jinja
