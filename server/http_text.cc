#include "server/http_text.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <array>
#include <charconv>
#include <cstdint>
#include <utility>

namespace linspec {

std::string HttpDate(std::time_t at) { return fmt::format("{:%a, %d %b %Y %H:%M:%S} GMT", fmt::gmtime(at)); }

const std::string& HttpDateNow() {
  thread_local std::pair<std::time_t, std::string> made;
  const std::time_t now = std::time(nullptr);
  if (made.second.empty() || made.first != now) made = {now, HttpDate(now)};
  return made.second;
}

std::string OriginForm(std::string target) {
  const size_t scheme = target.find("://");
  if (target.starts_with('/') || scheme == std::string::npos) return target;
  const size_t path = target.find_first_of("/?", scheme + 3);
  if (path == std::string::npos) return "/";
  return (target[path] == '?' ? "/" : "") + target.substr(path);
}

std::string PercentDecoded(const std::string& text) {
  std::string decoded;
  for (size_t i = 0; i < text.size(); ++i) {
    uint8_t byte = 0;
    const char* const digits = text.data() + i + 1;
    const bool escape =
        text[i] == '%' && i + 2 < text.size() && std::from_chars(digits, digits + 2, byte, 16).ptr == digits + 2;
    decoded += escape ? static_cast<char>(byte) : text[i];
    if (escape) i += 2;
  }
  return decoded;
}

size_t FrameChunk(std::string* frame) {
  std::array<char, kChunkHead> head;
  const auto [end, error] = std::to_chars(head.data(), head.data() + kChunkHead - 2, frame->size() - kChunkHead, 16);
  const auto digits = static_cast<size_t>(end - head.data());
  const size_t begin = kChunkHead - 2 - digits;
  frame->replace(begin, digits, head.data(), digits);
  frame->replace(kChunkHead - 2, 2, "\r\n");
  *frame += "\r\n";
  return begin;
}

}  // namespace linspec
