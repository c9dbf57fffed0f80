// What plain sockets, Boost.Beast and gRPC reach alone: servers without a front door that write the bytes of an answer,
// prepared, to every stream, one message a token. Each runs until the shared state says stop.
#pragma once

#include <fmt/format.h>

#include <chrono>
#include <string>

#include "tests/front_door/null_engine.h"

namespace linspec::front_door {

// A token of a streamed completion, framed as a chunk of HTTP.
inline std::string BareChunk(int step) {
  const std::string event = fmt::format(
      "data: {{\"id\":\"cmpl-0123456789abcdef0123456789abcdef\",\"object\":\"text_completion\",\"created\":1700000000,"
      "\"model\":\"null\",\"choices\":[{{\"index\":0,\"text\":\"{}\",\"logprobs\":null,\"finish_reason\":null}}]}}\n\n",
      TokenText(step));
  return fmt::format("{:x}\r\n{}\r\n", event.size(), event);
}

// pace 0: each stream writes as fast as its connection takes it. num_tokens: a stream's length.
void RunBareBeast(std::chrono::microseconds pace, int num_tokens, SharedState* shared);
// send() and nothing else, on as many threads: the floor. pace must not be 0.
void RunBareSocket(std::chrono::microseconds pace, int num_tokens, SharedState* shared);
void RunBareGrpc(std::chrono::microseconds pace, int num_tokens, SharedState* shared);

}  // namespace linspec::front_door
