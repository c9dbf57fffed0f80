// One request, from the first byte sent to the last byte read, over either API.
//
// Threads: a client belongs to one event loop; Start and `done` run on that loop's thread.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "loadtest/options.h"
#include "loadtest/tls.h"
#include "loadtest/workload.h"

namespace boost::asio {
class io_context;
}

namespace linspec::loadtest {

struct RequestRecord {
  bool ok = false;
  bool cancelled = false;    // we dropped it, on purpose
  bool slow = false;         // we read it slowly, on purpose: its times are ours
  std::string error;         // why not ok
  double scheduled = 0;      // seconds after the start of the test
  double start = 0;          // when it was really sent
  double ttft = 0;           // seconds to the first chunk with text
  double latency = 0;        // seconds to the last chunk with text
  std::vector<double> itls;  // gaps between chunks, seconds
  int prompt_tokens = 0;     // as the server counts them
  int output_tokens = 0;
  int chunks = 0;
  std::string text;

  // Time per output token after the first; negative when there is none.
  double tpot() const { return output_tokens > 1 ? (latency - ttft) / (output_tokens - 1) : -1; }
};

struct Target {
  std::string host, path, model, bearer_token;
  std::string prefix;  // before every path of this server
  int port = 0;
  std::shared_ptr<const Tls> tls;  // null: plain
};

// What `done` receives has ok, cancelled, error, ttft, latency, itls, tokens and text set.
using Done = std::function<void(RequestRecord)>;

class Client {
 public:
  virtual ~Client() = default;
  virtual void Start(const PlannedRequest& request, Done done) = 0;
};

// SSE over HTTP/1.1. Each request opens a connection of its own, as new users do.
std::unique_ptr<Client> CreateRestClient(boost::asio::io_context* loop, Target target, const Options* options);
// linspec.v1; the channel is shared by the loop's requests.
std::unique_ptr<Client> CreateGrpcClient(boost::asio::io_context* loop, Target target, const Options* options);

// Body of a 200 answer; blocking, for set-up and metrics.
absl::StatusOr<std::string> HttpGet(const Target& target, const std::string& path);

}  // namespace linspec::loadtest
