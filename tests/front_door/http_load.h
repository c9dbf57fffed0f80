// A small HTTP client for thousands of connections on one thread (epoll), for measuring servers on the same machine.
//
// Threads: one.
#pragma once

#include <netinet/in.h>
#include <sys/epoll.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace linspec::front_door {

// One connection and what has come over it.
struct HttpConnection {
  int fd = -1;
  std::string request;   // what is still to be sent
  std::string received;  // what the callback has left unread
  int64_t started_ns = 0;
  int id = 0;
  bool reading = true;
};

class HttpLoad {
 public:
  // on_data: after bytes arrived; on_end: the peer closed. Either may call Close.
  using Callback = std::function<void(HttpConnection*)>;
  HttpLoad(int port, Callback on_data, Callback on_end);
  ~HttpLoad();

  // Connects and sends. reading false: never reads, with a small receive buffer.
  HttpConnection* Open(std::string request, bool reading = true);
  void Close(HttpConnection* connection);
  void Poll(int timeout_ms);
  int num_open() const { return num_open_; }
  const std::deque<std::unique_ptr<HttpConnection>>& connections() const { return connections_; }

 private:
  void Write(HttpConnection* connection);
  void Read(HttpConnection* connection);

  const int port_;
  const Callback on_data_, on_end_;
  const int epoll_;
  int num_open_ = 0;
  std::deque<std::unique_ptr<HttpConnection>> connections_;  // closed ones too: events may still name them
};

std::string PostCompletion(int max_tokens, bool stream, bool keep_alive);

}  // namespace linspec::front_door
