// A server that streams canned tokens at a fixed pace over HTTP/1.1: what the load tester itself is measured against.
// One thread, epoll, no JSON: it costs so little that a client can be driven to its own limit.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_map>

namespace linspec::loadtest {

class FakeOpenAiServer {
 public:
  using Clock = std::chrono::steady_clock;

  // Every stream gets its first token at once and one more each `gap`. port 0: any free one.
  explicit FakeOpenAiServer(Clock::duration gap, int port = 0) : gap_(gap) {
    listener_ = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    const int one = 1;
    setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<uint16_t>(port));
    socklen_t size = sizeof(address);
    if (bind(listener_, reinterpret_cast<sockaddr*>(&address), size) != 0 || listen(listener_, 16384) != 0) {
      throw std::runtime_error("cannot listen");
    }
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    epoll_ = epoll_create1(EPOLL_CLOEXEC);
    Watch(listener_);
    thread_ = std::thread([this] { Run(); });
  }
  ~FakeOpenAiServer() {
    stopping_ = true;
    thread_.join();
    for (const auto& [descriptor, connection] : connections_) close(descriptor);
    close(listener_);
    close(epoll_);
  }
  int port() const { return port_; }
  int64_t max_streams() const { return max_streams_; }

 private:
  struct Connection {
    std::string input;
    int tokens_left = 0, tokens = 0;
  };
  struct Due {
    Clock::time_point at;
    int descriptor;
    uint64_t generation;  // of the descriptor's connection: numbers are used again
  };

  void Watch(int descriptor) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = descriptor;
    epoll_ctl(epoll_, EPOLL_CTL_ADD, descriptor, &event);
  }

  void Run() {
    std::array<epoll_event, 512> events{};
    while (!stopping_) {
      int wait_ms = 50;
      if (!due_.empty()) {
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(due_.front().at - Clock::now());
        wait_ms = static_cast<int>(std::clamp<int64_t>(left.count(), 0, 50));
      }
      const int count = epoll_wait(epoll_, events.data(), static_cast<int>(events.size()), wait_ms);
      for (int i = 0; i < count; ++i) {
        if (events[i].data.fd == listener_)
          Accept();
        else
          Receive(events[i].data.fd);
      }
      // All streams have the same gap, so the queue is in order of time.
      for (const Clock::time_point now = Clock::now(); !due_.empty() && due_.front().at <= now;) {
        const Due due = due_.front();
        due_.pop_front();
        const auto found = generations_.find(due.descriptor);
        if (found != generations_.end() && found->second == due.generation) SendToken(due.descriptor, now);
      }
    }
  }

  void Accept() {
    for (int descriptor; (descriptor = accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
      const int one = 1;
      setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
      connections_[descriptor] = {};
      generations_[descriptor] = ++next_generation_;
      Watch(descriptor);
    }
  }

  void Receive(int descriptor) {
    std::array<char, 16384> bytes{};
    Connection& connection = connections_[descriptor];
    for (;;) {
      const ssize_t size = recv(descriptor, bytes.data(), bytes.size(), 0);
      if (size < 0 && errno == EAGAIN) break;
      if (size <= 0) return Drop(descriptor);
      connection.input.append(bytes.data(), static_cast<size_t>(size));
    }
    const size_t head_end = connection.input.find("\r\n\r\n");
    if (head_end == std::string::npos) return;
    const size_t length = Number(connection.input, "Content-Length: ");
    if (connection.input.size() < head_end + 4 + length) return;
    Answer(descriptor, &connection);
  }

  void Answer(int descriptor, Connection* connection) {
    std::string input;
    input.swap(connection->input);
    if (input.starts_with("GET /v1/models")) return Reply(descriptor, "200 OK", R"({"data":[{"id":"fake"}]})");
    if (!input.starts_with("POST /v1/completions")) return Reply(descriptor, "404 Not Found", "{}");
    connection->tokens_left = connection->tokens = static_cast<int>(Number(input, "\"max_tokens\":"));
    Send(descriptor, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
    max_streams_ = std::max<int64_t>(max_streams_, ++streams_);
    SendToken(descriptor, Clock::now());
  }

  void SendToken(int descriptor, Clock::time_point now) {
    Connection& connection = connections_[descriptor];
    if (connection.tokens_left-- > 0) {
      Send(descriptor, Chunk(R"(data: {"id":"cmpl-1","object":"text_completion","created":1,"model":"fake",)"
                             R"("choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]})"
                             "\n\n"));
      due_.push_back({now + gap_, descriptor, generations_[descriptor]});
      return;
    }
    --streams_;
    Send(descriptor, Chunk(R"(data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":)" +
                           std::to_string(connection.tokens) + "}}\n\ndata: [DONE]\n\n") +
                         "0\r\n\r\n");
  }

  static std::string Chunk(const std::string& data) {
    std::array<char, 16> size{};
    std::snprintf(size.data(), size.size(), "%zx\r\n", data.size());
    return size.data() + data + "\r\n";
  }
  static size_t Number(const std::string& text, const std::string& key) {
    const size_t at = text.find(key);
    return at == std::string::npos ? 0 : std::strtoul(text.c_str() + at + key.size(), nullptr, 10);
  }
  void Reply(int descriptor, const std::string& status, const std::string& body) {
    Send(descriptor, "HTTP/1.1 " + status + "\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body);
  }
  // A reader so slow that the socket is full loses data, which it then reports: good enough for a fake.
  void Send(int descriptor, const std::string& data) { (void)send(descriptor, data.data(), data.size(), MSG_NOSIGNAL); }
  void Drop(int descriptor) {
    if (connections_[descriptor].tokens_left > 0) --streams_;
    connections_.erase(descriptor);
    generations_.erase(descriptor);
    close(descriptor);
  }

  const Clock::duration gap_;
  int listener_ = -1, epoll_ = -1, port_ = 0;
  std::unordered_map<int, Connection> connections_;
  std::unordered_map<int, uint64_t> generations_;
  uint64_t next_generation_ = 0;
  std::deque<Due> due_;
  int64_t streams_ = 0;
  std::atomic<int64_t> max_streams_ = 0;
  std::atomic<bool> stopping_ = false;
  std::thread thread_;  // last
};

}  // namespace linspec::loadtest
