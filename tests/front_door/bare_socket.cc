#include <fmt/format.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tests/front_door/bare_servers.h"

namespace linspec::front_door {
namespace {

constexpr int kThreads = 2;  // as linspec's --io-threads

struct Stream {
  int fd = -1;
  int sent = 0;
};

bool Send(int fd, const std::string& data) {
  return send(fd, data.data(), data.size(), MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(data.size());
}

// A thread and its share of the streams: at each step one send for each, in order.
class Sender {
 public:
  Sender(const std::vector<std::string>* chunks, int num_tokens)
      : chunks_(*chunks), num_tokens_(num_tokens), thread_([this] { Run(); }) {}
  ~Sender() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_one();
    thread_.join();
    for (const Stream& stream : streams_) close(stream.fd);
  }

  void Add(int fd) {
    std::lock_guard lock(mutex_);
    streams_.push_back({.fd = fd});
  }
  void Tick(int step) {
    {
      std::lock_guard lock(mutex_);
      step_ = step;
      due_ = true;
    }
    wake_.notify_one();
  }

 private:
  void Run() {
    std::unique_lock lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return stopping_ || due_; });
      if (stopping_) return;
      due_ = false;
      std::erase_if(streams_, [this](Stream& stream) {
        if (!Send(stream.fd, chunks_[step_ % kVocab])) std::abort();  // the client reads, so there is always room
        if (++stream.sent < num_tokens_) return false;
        Send(stream.fd, "0\r\n\r\n");
        close(stream.fd);
        return true;
      });
    }
  }

  const std::vector<std::string>& chunks_;
  const int num_tokens_;
  std::mutex mutex_;  // guards the rest
  std::condition_variable wake_;
  std::vector<Stream> streams_;
  int step_ = 0;
  bool due_ = false, stopping_ = false;
  std::thread thread_;  // last
};

}  // namespace

void RunBareSocket(std::chrono::microseconds pace, int num_tokens, SharedState* shared) {
  std::vector<std::string> chunks;
  for (int i = 0; i < kVocab; ++i) chunks.push_back(BareChunk(i));
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  if (bind(listener, reinterpret_cast<sockaddr*>(&address), size) != 0 || listen(listener, 4096) != 0) std::abort();
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
  std::vector<std::unique_ptr<Sender>> senders;
  for (int i = 0; i < kThreads; ++i) senders.push_back(std::make_unique<Sender>(&chunks, num_tokens));
  std::thread acceptor([&] {
    for (int i = 0;; ++i) {
      const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
      if (fd < 0) return;
      char request[4096];
      if (recv(fd, request, sizeof request, 0) <= 0) return;
      Send(fd, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n");
      senders[i % kThreads]->Add(fd);
    }
  });
  shared->http_port = ntohs(address.sin_port);
  auto next = std::chrono::steady_clock::now();
  for (int step = 0; !shared->stop; ++step) {
    next += pace;
    std::this_thread::sleep_until(next);
    shared->step_ns[step % kVocab] = NowNs();
    for (const auto& sender : senders) sender->Tick(step);
  }
  shutdown(listener, SHUT_RDWR);
  acceptor.join();
  close(listener);
}

}  // namespace linspec::front_door
