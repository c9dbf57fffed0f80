// UTF-8 walking that tolerates any bytes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace linspec {

struct Utf8Char {
  int32_t code;    // -1: invalid byte
  int length;      // bytes consumed, at least 1; for an incomplete but so far valid tail: the bytes there are
  bool truncated;  // the text ends inside a character that may still become valid
};

Utf8Char DecodeUtf8(std::string_view text);  // text must not be empty
void AppendUtf8(int32_t code, std::string* out);
// Invalid sequences become U+FFFD, one per maximal invalid part (as Rust's and Python's lossy decoders do).
std::string ToValidUtf8(std::string_view text);

}  // namespace linspec
