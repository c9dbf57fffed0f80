// Sends a workload at its times and collects what came back, and how well this client itself kept up.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "loadtest/client.h"
#include "loadtest/options.h"
#include "loadtest/workload.h"

namespace boost::asio {
class io_context;
}

namespace linspec::loadtest {

struct RunResult {
  std::vector<RequestRecord> records;  // of the requests that were sent
  double duration = 0;                 // first arrival to last answer, seconds
  int max_in_flight = 0;
  bool interrupted = false;  // SIGINT: nothing more was sent
  // How late this client was: its timers, and the requests themselves. Large values mean that it, not the server, was
  // measured.
  double loop_lag_p99 = 0, loop_lag_max = 0, start_lateness_p99 = 0;
  // Processor seconds of this client per second and thread: event loops, or for gRPC, which brings threads of its own,
  // processors. 1: no pause anywhere.
  double cpu_per_thread = 0;
  bool client_was_bottleneck() const {
    return loop_lag_p99 > 0.02 || start_lateness_p99 > 0.05 || cpu_per_thread > 0.95;
  }
};

using ClientFactory = std::function<std::unique_ptr<Client>(boost::asio::io_context*)>;

// Blocks until every request ended. Live progress goes to standard error unless options.quiet.
RunResult RunWorkload(const std::vector<PlannedRequest>& workload, const Options& options,
                      const ClientFactory& factory);

}  // namespace linspec::loadtest
