// The client's side of bench_front_door: each scenario loads the server whose ports the shared state names and prints
// what it saw.
//
// Threads: one; gRPC streams bring gRPC's own.
#pragma once

#include <string>

#include "tests/front_door/null_engine.h"

namespace linspec::front_door {

struct ScenarioOptions {
  std::string scenario;  // streams, idle, slow, overload, cancel
  bool grpc = false;
  int streams = 500;
  int tokens = 200;
  double seconds = 10;
  double rate = 100;  // requests a second of overload
};

void RunScenario(const ScenarioOptions& options, SharedState* shared);

}  // namespace linspec::front_door
