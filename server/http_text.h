// Small texts of HTTP.
//
// Threads: pure, but for the clock.
#pragma once

#include <cstddef>
#include <ctime>
#include <string>

namespace linspec {

// For the Date header: "Sun, 06 Nov 1994 08:49:37 GMT".
std::string HttpDate(std::time_t at);
// The same of now; made once a second and thread.
const std::string& HttpDateNow();
// A request's target as path and query. Clients that think they talk to a proxy send the scheme and host, too, and a
// server has to take that (RFC 9112, 3.2.2).
std::string OriginForm(std::string target);
// %2F and the like as the bytes they stand for; what is no such escape stays.
std::string PercentDecoded(const std::string& text);

inline constexpr size_t kChunkHead = 18;  // 16 digits and CRLF: the longest head of a chunk
// frame: kChunkHead bytes of room, then the bytes of a chunk. Writes its head so that it ends where they begin, and
// CRLF after them. Returns where the head begins.
size_t FrameChunk(std::string* frame);

}  // namespace linspec
