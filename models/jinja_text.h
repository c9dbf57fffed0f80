// What filters and methods of the template language do to strings, by ASCII's case rules as to letters.
#pragma once

#include <cstdint>
#include <string>

#include "models/jinja_value.h"

namespace linspec::jinja {

// The string in `value`; fails naming `what` needed one.
const std::string& Text(const Value& value, const char* what);

std::string Upper(std::string text);
std::string Lower(std::string text);
std::string Capitalize(std::string text);
std::string Title(std::string text);
std::string Strip(std::string text, const Value& characters, bool left, bool right);  // no string: white space
// At most `limit` times; all if negative.
std::string Replace(const std::string& text, const std::string& from, const std::string& to, int64_t limit);
List Split(const std::string& text, const Value& separator, int64_t limit);      // no string: at runs of white space
int64_t LimitOf(const Value& value);                                             // -1 if it is no number
bool StartsOrEndsWith(const std::string& text, const Value& affix, bool start);  // affix: a string or a list of some

}  // namespace linspec::jinja
