// Many Generate streams of one gRPC client, for measuring servers on the same machine.
//
// Threads: on_text runs on gRPC's threads, one call at a time.
#pragma once

#include <functional>
#include <string>

namespace linspec::front_door {

// Opens the streams at once over a few channels and returns when all have ended. Exits the process when one fails.
void RunGrpcStreams(int port, int streams, int max_tokens,
                    std::function<void(int stream, const std::string& text)> on_text);

}  // namespace linspec::front_door
