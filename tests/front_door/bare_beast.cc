#include <fmt/format.h>

#include <boost/asio.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http.hpp>
#include <functional>
#include <set>
#include <thread>

#include "tests/front_door/bare_servers.h"

namespace linspec::front_door {
namespace {

namespace net = boost::asio;
namespace http = boost::beast::http;
using tcp = net::ip::tcp;
using Error = boost::system::error_code;

constexpr int kThreads = 2;  // as linspec's --io-threads

class Session;

struct Hub {
  std::mutex mutex;  // guards sessions
  std::set<std::shared_ptr<Session>> sessions;
  std::vector<std::string> chunks;
  bool paced = false;
  int num_tokens = 0;
};

class Session : public std::enable_shared_from_this<Session> {
 public:
  Session(tcp::socket socket, Hub* hub) : stream_(std::move(socket)), hub_(hub) {}

  void Run() {
    http::async_read(stream_, buffer_, request_, [self = shared_from_this()](Error error, size_t) {
      if (error) return;
      self->out_ = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
      self->Write([self] {
        if (!self->hub_->paced) return self->Flood();
        std::lock_guard lock(self->hub_->mutex);
        self->hub_->sessions.insert(self);
      });
    });
  }

  void Tick(int step) {
    net::post(stream_.get_executor(), [self = shared_from_this(), step] {
      if (self->writing_) return;  // late by a whole step: this one is lost, which the client would see
      self->out_ = self->hub_->chunks[step % kVocab];
      self->Write([self] { self->Sent(); });
    });
  }

 private:
  void Flood() {
    out_ = hub_->chunks[sent_ % kVocab];
    Write([self = shared_from_this()] {
      if (++self->sent_ < self->hub_->num_tokens) return self->Flood();
      self->out_ = "0\r\n\r\n";
      self->Write([self] { self->stream_.close(); });
    });
  }

  void Sent() {
    if (++sent_ < hub_->num_tokens) return;
    {
      std::lock_guard lock(hub_->mutex);
      hub_->sessions.erase(shared_from_this());
    }
    out_ = "0\r\n\r\n";
    Write([self = shared_from_this()] { self->stream_.close(); });
  }

  void Write(std::function<void()> then) {
    writing_ = true;
    net::async_write(stream_, net::buffer(out_),
                     [self = shared_from_this(), then = std::move(then)](Error error, size_t) {
                       self->writing_ = false;
                       if (!error) then();
                     });
  }

  tcp::socket stream_;
  Hub* const hub_;
  boost::beast::flat_buffer buffer_;
  http::request<http::string_body> request_;
  std::string out_;
  bool writing_ = false;
  int sent_ = 0;
};

void Accept(net::io_context* context, tcp::acceptor* acceptor, Hub* hub) {
  acceptor->async_accept(net::make_strand(*context), [=](Error error, tcp::socket socket) {
    if (error) return;
    socket.set_option(tcp::no_delay(true));
    std::make_shared<Session>(std::move(socket), hub)->Run();
    Accept(context, acceptor, hub);
  });
}

}  // namespace

void RunBareBeast(std::chrono::microseconds pace, int num_tokens, SharedState* shared) {
  Hub hub;
  hub.paced = pace.count() > 0;
  hub.num_tokens = num_tokens;
  for (int i = 0; i < kVocab; ++i) hub.chunks.push_back(BareChunk(i));
  net::io_context context;
  tcp::acceptor acceptor(context, tcp::endpoint(net::ip::address_v4::loopback(), 0));
  acceptor.listen(4096);
  Accept(&context, &acceptor, &hub);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back([&] { context.run(); });
  shared->http_port = acceptor.local_endpoint().port();
  auto next = std::chrono::steady_clock::now();
  for (int step = 0; !shared->stop; ++step) {
    next += hub.paced ? pace : std::chrono::milliseconds(10);
    std::this_thread::sleep_until(next);
    if (!hub.paced) continue;
    shared->step_ns[step % kVocab] = NowNs();
    std::lock_guard lock(hub.mutex);
    for (const auto& session : hub.sessions) session->Tick(step);
  }
  context.stop();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace linspec::front_door
