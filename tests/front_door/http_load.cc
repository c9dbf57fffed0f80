#include "tests/front_door/http_load.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "tests/front_door/null_engine.h"

namespace linspec::front_door {

HttpLoad::HttpLoad(int port, Callback on_data, Callback on_end)
    : port_(port), on_data_(std::move(on_data)), on_end_(std::move(on_end)), epoll_(epoll_create1(0)) {}

HttpLoad::~HttpLoad() {
  for (const auto& connection : connections_) Close(connection.get());
  close(epoll_);
}

HttpConnection* HttpLoad::Open(std::string request, bool reading) {
  connections_.push_back(std::make_unique<HttpConnection>());
  HttpConnection* connection = connections_.back().get();
  connection->id = static_cast<int>(connections_.size()) - 1;
  connection->request = std::move(request);
  connection->started_ns = NowNs();
  connection->reading = reading;
  connection->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  if (connection->fd < 0) {
    std::perror("socket (ulimit -n?)");
    std::exit(1);
  }
  const int one = 1, small = 4096;
  setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  if (!reading) setsockopt(connection->fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof(small));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port_));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (connect(connection->fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0 && errno != EINPROGRESS) {
    std::perror("connect");
    std::exit(1);
  }
  epoll_event event{.events = EPOLLOUT | (reading ? EPOLLIN : EPOLLRDHUP), .data = {.ptr = connection}};
  epoll_ctl(epoll_, EPOLL_CTL_ADD, connection->fd, &event);
  ++num_open_;
  return connection;
}

void HttpLoad::Close(HttpConnection* connection) {
  if (connection->fd < 0) return;
  close(connection->fd);
  connection->fd = -1;
  connection->received = {};
  --num_open_;
}

void HttpLoad::Poll(int timeout_ms) {
  std::array<epoll_event, 1024> events;
  const int count = epoll_wait(epoll_, events.data(), static_cast<int>(events.size()), timeout_ms);
  for (int i = 0; i < count; ++i) {
    auto* connection = static_cast<HttpConnection*>(events[i].data.ptr);
    const uint32_t what = events[i].events;
    if (connection->fd >= 0 && (what & EPOLLOUT)) Write(connection);
    if (connection->fd >= 0 && (what & (EPOLLIN | EPOLLHUP | EPOLLERR | EPOLLRDHUP))) Read(connection);
  }
}

void HttpLoad::Write(HttpConnection* connection) {
  const ssize_t sent = send(connection->fd, connection->request.data(), connection->request.size(), MSG_NOSIGNAL);
  if (sent > 0) connection->request.erase(0, static_cast<size_t>(sent));
  if (!connection->request.empty()) return;
  epoll_event event{.events = connection->reading ? EPOLLIN : EPOLLRDHUP, .data = {.ptr = connection}};
  epoll_ctl(epoll_, EPOLL_CTL_MOD, connection->fd, &event);
}

void HttpLoad::Read(HttpConnection* connection) {
  if (!connection->reading) return on_end_(connection);
  std::array<char, 65536> buffer;
  const ssize_t size = recv(connection->fd, buffer.data(), buffer.size(), 0);
  if (size < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (size <= 0) return on_end_(connection);
  connection->received.append(buffer.data(), static_cast<size_t>(size));
  on_data_(connection);
}

std::string PostCompletion(int max_tokens, bool stream, bool keep_alive) {
  const std::string body =
      fmt::format(R"({{"prompt":"Once upon a time","max_tokens":{},"temperature":0,"ignore_eos":true,"stream":{}}})",
                  max_tokens, stream);
  return fmt::format(
      "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{}Content-Length: {}\r\n\r\n{}",
      keep_alive ? "" : "Connection: close\r\n", body.size(), body);
}

}  // namespace linspec::front_door
