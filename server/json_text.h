// Writing JSON by hand where a stream chunk is written for every token.
#pragma once

#include <string>
#include <string_view>

namespace linspec {

// Quoted and escaped; bytes that are not UTF-8 become U+FFFD, so the result is always valid JSON.
void AppendJsonString(std::string_view text, std::string* out);
// Length of the valid UTF-8 character at text[0], 0 if there is none.
int Utf8Length(std::string_view text);
bool IsUtf8(std::string_view text);
std::string ToUtf8(std::string_view text);  // invalid bytes become U+FFFD

}  // namespace linspec
