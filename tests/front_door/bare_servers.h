// What Boost.Beast and gRPC reach alone: servers without a front door that write the bytes of an answer, prepared, to
// every stream, one message a token. Each runs until the shared state says stop.
#pragma once

#include <chrono>

#include "tests/front_door/null_engine.h"

namespace linspec::front_door {

// pace 0: each stream writes as fast as its connection takes it. num_tokens: a stream's length.
void RunBareBeast(std::chrono::microseconds pace, int num_tokens, SharedState* shared);
void RunBareGrpc(std::chrono::microseconds pace, int num_tokens, SharedState* shared);

}  // namespace linspec::front_door
