// HTTP/1.1 over Boost.Beast's parser and Asio: connections, limits, timeouts, framing. Knows nothing of routes: each
// request becomes an HttpOperation made by the handler.
//
// Threads: `io_threads` of its own; a connection and its operation live on one strand. The engine reaches a connection
// only through the notify function of its operation, and after a step's notifications through waker() (http_news.h).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace linspec {

struct HttpRequest {
  std::string method = {}, path = {}, query = {};  // path without query, as sent
  std::string body = {};
  std::string authorization = {}, content_type = {}, content_encoding = {}, request_id = {};
};

struct HttpReply {
  int status = 200;
  std::string content_type = "application/json";
  std::vector<std::pair<std::string, std::string>> headers = {};
  std::string body = {};   // when not streaming
  bool streaming = false;  // the body comes from HttpOperation::Next
};

// One request's answer in the making. Destroying it cancels what runs for it.
class HttpOperation {
 public:
  virtual ~HttpOperation() = default;
  // True once the head (and, when not streaming, the body) is in *reply. Asked again after each notify.
  virtual bool Poll(HttpReply* reply) = 0;
  // Appends all body bytes that are ready; true once they are the last. Asked after each notify, and after a write that
  // took its time.
  virtual bool Next(std::string* /*body*/) { return true; }
  // The client fell too far behind for its answer to be completed: the connection is closed, a write under way or not.
  virtual bool Abandoned() const { return false; }
};

using HttpNotify = std::function<void()>;  // from any thread; heard at the next waker()
using HttpHandler = std::function<std::unique_ptr<HttpOperation>(HttpRequest, HttpNotify)>;

struct HttpServerOptions {
  std::string host;
  int port = 0;  // 0: any free one
  int io_threads = 2;
  int max_connections = 16384;
  int64_t max_body_bytes = 4 << 20;
  int64_t max_header_bytes = 16 << 10;
  int64_t send_buffer_bytes = 256 << 10;         // the kernel's, per connection: what a slow reader can pile up there
  double header_timeout_s = 10;                  // headers and body
  double idle_timeout_s = 60;                    // silence between requests; a stalled write
  std::string tls_cert, tls_key, tls_client_ca;  // files; empty: plain
  std::vector<std::pair<std::string, std::string>> extra_headers;  // on every answer
  // Answers a request that never reached the handler: parse errors, limits.
  std::function<HttpReply(const absl::Status&)> error_reply;
  std::function<void(const HttpRequest&, int status, double seconds)> observer;  // after the last byte
  std::function<void(double seconds)> write_observer;                            // each write, until it was taken
};

class HttpServer {
 public:
  // Binds and serves. Errors name address and port and say what to do; bad TLS files name the file.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(HttpServerOptions options, HttpHandler handler);
  ~HttpServer();  // Stop()

  int port() const;
  int open_connections() const;
  // Has the I/O threads look at what was notified since the last time. From any thread; outlives the server.
  std::function<void()> waker() const;
  // Stops accepting, closes idle connections, lets answers in progress finish for at most `grace_s`, then closes all.
  void Stop(double grace_s);

 private:
  struct Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace linspec
