// Bytes that a client sends to a real connection over a socket, on one thread without a clock: the connection may
// answer and may close, but what it writes must be HTTP, and the requests that reach the handler must be complete, and
// the same wherever the bytes were parted on their way.
#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/http_connection.h"

namespace {

using namespace linspec;                 // NOLINT
using namespace linspec::http_internal;  // NOLINT

void Require(bool condition) {
  if (!condition) std::abort();
}

class Echo : public HttpOperation {
 public:
  explicit Echo(HttpRequest request) : request_(std::move(request)) {}
  bool Poll(HttpReply* reply) override {
    *reply = {.body = request_.body, .streaming = request_.path == "/stream"};
    return true;
  }
  bool Next(std::string* body) override {
    *body += request_.body;
    return true;
  }

 private:
  const HttpRequest request_;
};

HttpReply ErrorReply(const absl::Status& status) {
  return {.status = HttpStatusOf(status), .body = OpenAiErrorJson(status)};
}

struct Harness {
  Harness() {
    shared.options.max_body_bytes = 4096;
    shared.options.max_header_bytes = 2048;
    shared.options.error_reply = ErrorReply;
    shared.options.observer = [](const HttpRequest&, int status, double) { Require(status >= 100 && status < 600); };
    shared.options.write_observer = [](double) {};
    shared.handler = [this](HttpRequest request, HttpNotify) {
      Require(!request.method.empty() && request.body.size() <= 4096);
      handled.push_back(request.method + " " + request.path + "?" + request.query + "\n" + request.body);
      return std::make_unique<Echo>(std::move(request));
    };
  }

  net::io_context context;
  Shared shared;
  std::vector<std::string> handled;
};

// The bytes come in two pieces, parted at `split`: what came before is dealt with first.
void Exchange(Harness* harness, const uint8_t* data, size_t size, size_t split) {
  // Not over TCP: thousands of exchanges a second would leave no port that is not in TIME-WAIT.
  int ends[2];
  Require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  tcp::socket client(harness->context, tcp::v4(), ends[0]);
  Socket socket(net::make_strand(harness->context), tcp::v4(), ends[1]);
  auto connection = std::make_shared<Connection<Socket>>(std::move(socket), &harness->shared);
  harness->shared.live.insert(connection);
  connection->Run(false);
  client.non_blocking(true);
  std::string answer;
  Error error;
  for (const auto& [begin, end] : {std::pair(size_t{0}, split), std::pair(split, size)}) {
    client.write_some(net::buffer(data + begin, end - begin), error);
    harness->context.restart();
    harness->context.poll();
    char buffer[16384];
    for (size_t n = client.read_some(net::buffer(buffer), error); n > 0 && !error;
         n = client.read_some(net::buffer(buffer), error)) {
      answer.append(buffer, n);
    }
  }
  connection->Shutdown(true);
  connection.reset();
  harness->context.restart();
  harness->context.poll();
  Require(answer.empty() || answer.starts_with("HTTP/1.1 "));
  Require(harness->shared.live.empty() && harness->shared.open == 0);  // nothing is left of a closed connection
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static auto* const harness = new Harness;
  size = std::min<size_t>(size, 4096);  // of one read, so that the pieces are what the connection sees
  harness->handled.clear();
  Exchange(harness, data, size, size);
  const std::vector<std::string> at_once = std::exchange(harness->handled, {});
  Exchange(harness, data, size, size / 2);
  Require(harness->handled == at_once);
  return 0;
}
