// One HTTP connection: reads, parses, hands a request to the handler, writes the answer. A private part of
// http_server.cc in a file of its own: it includes Asio and Beast, so nothing else may include it.
//
// Threads: everything on the connection's strand, except Shutdown (any thread).
#pragma once

#include <fmt/format.h>

#include <array>
#include <atomic>
#include <boost/asio.hpp>
#include <boost/asio/ssl.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <chrono>
#include <mutex>
#include <optional>
#include <unordered_set>

#include "server/errors.h"
#include "server/http_news.h"
#include "server/http_server.h"
#include "server/http_text.h"

namespace linspec::http_internal {

namespace net = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using tcp = net::ip::tcp;
using Socket = net::basic_stream_socket<tcp, net::strand<net::io_context::executor_type>>;
using TlsStream = net::ssl::stream<Socket>;
using Error = boost::system::error_code;
using SteadyClock = std::chrono::steady_clock;

constexpr size_t kMaxPipelinedBytes = 64 << 10;  // read ahead while an answer is in the making
constexpr size_t kReadBytes = 8 << 10;

inline std::chrono::nanoseconds Duration(double seconds) {
  return std::chrono::nanoseconds(static_cast<int64_t>(seconds * 1e9));
}

inline std::string HeaderOf(const http::request<http::string_body>& message, http::field field) {
  const auto value = message[field];
  return {value.data(), value.size()};
}

struct Shared {
  HttpServerOptions options;
  HttpHandler handler;
  std::shared_ptr<NewsQueue> news;
  std::atomic<int> open = 0;
  std::atomic<bool> stopping = false;
  std::mutex mutex;  // guards live
  std::unordered_set<std::shared_ptr<ConnectionBase>> live;
};

// Reads always, unless enough is buffered: so a peer that closes is noticed while its answer is being made.
template <class Stream>
class Connection : public ConnectionBase, public std::enable_shared_from_this<Connection<Stream>> {
 public:
  Connection(Stream stream, Shared* shared)
      : stream_(std::move(stream)), shared_(shared), timer_(socket().get_executor()) {
    ++shared_->open;
  }
  ~Connection() override { --shared_->open; }

  void Run(bool over_limit) {
    net::dispatch(socket().get_executor(), [self = this->shared_from_this(), over_limit] {
      self->over_limit_ = over_limit;
      self->WatchClock();
      if constexpr (std::is_same_v<Stream, TlsStream>) {
        self->SetDeadline(self->shared_->options.header_timeout_s);
        self->stream_.async_handshake(net::ssl::stream_base::server,
                                      [self](Error error) { error ? self->Close() : self->Begin(); });
      } else {
        self->Begin();
      }
    });
  }

  void Shutdown(bool at_once) override {
    net::post(socket().get_executor(), [self = this->shared_from_this(), at_once] {
      self->keep_alive_ = false;
      if (at_once || (self->operation_ == nullptr && !self->writing_)) self->Close();
    });
  }

  void OnNews() override {
    net::dispatch(socket().get_executor(), [self = this->shared_from_this()] { self->Advance(); });
  }

 private:
  Socket& socket() {
    if constexpr (std::is_same_v<Stream, TlsStream>)
      return stream_.next_layer();
    else
      return stream_;
  }

  void Begin() {
    if (over_limit_) return SendError(WithRetryAfter(absl::UnavailableError("too many open connections"), 1));
    NextRequest();
  }

  void NextRequest() {
    parser_.emplace();
    parser_->header_limit(static_cast<uint32_t>(shared_->options.max_header_bytes));
    parser_->body_limit(static_cast<uint64_t>(shared_->options.max_body_bytes));
    head_bytes_ = 0;
    continued_ = false;
    receiving_ = true;
    SetDeadline(buffer_.size() > 0 ? shared_->options.header_timeout_s : shared_->options.idle_timeout_s);
    Parse();
  }

  void Parse() {
    while (receiving_ && buffer_.size() > 0) {
      const bool in_head = !parser_->is_header_done();
      parser_->eager(!in_head);  // stops where the head ends, so that its bytes can be counted
      Error error;
      const size_t used = parser_->put(buffer_.data(), error);
      buffer_.consume(used);
      if (in_head) head_bytes_ += used;
      if (error && error != http::error::need_more) return RejectParse(error);
      // The parser's own limit is on what it has not consumed yet, line by line, and so depends on how a head is cut.
      // What is left of an unfinished head belongs to it.
      const size_t head = head_bytes_ + (parser_->is_header_done() ? 0 : buffer_.size());
      if (head > static_cast<size_t>(shared_->options.max_header_bytes)) {
        return RejectParse(http::error::header_limit);
      }
      if (parser_->is_done()) return Dispatch();
      if (error || used == 0) break;
    }
    if (parser_->is_header_done() && !continued_) {
      continued_ = true;
      const std::string expect = HeaderOf(parser_->get(), http::field::expect);
      if (beast::iequals(expect, "100-continue")) return Continue();
    }
    Read();
  }

  void Continue() { Write("HTTP/1.1 100 Continue\r\n\r\n", &Connection::AwaitBody); }

  void AwaitBody() {
    SetDeadline(shared_->options.header_timeout_s);
    Read();
  }

  void RejectParse(Error error) {
    const HttpServerOptions& o = shared_->options;
    if (error == http::error::body_limit) {
      return SendError(
          HttpError(413, fmt::format("the body is larger than {} bytes (--max-body-bytes)", o.max_body_bytes)));
    }
    if (error == http::error::header_limit) {
      return SendError(
          HttpError(431, fmt::format("the head is larger than {} bytes (--max-header-bytes)", o.max_header_bytes)));
    }
    SendError(HttpError(400, fmt::format("malformed HTTP request: {}", error.message())));
  }

  void Read() {
    if (reading_ || closed_ ||
        buffer_.size() > kMaxPipelinedBytes + static_cast<size_t>(shared_->options.max_header_bytes))
      return;
    reading_ = true;
    // Not into buffer_: what is parsed while this read is under way moves the place that it would write to.
    stream_.async_read_some(net::buffer(incoming_), [self = this->shared_from_this()](Error error, size_t size) {
      self->reading_ = false;
      if (error) return self->Close();  // also a half-closed client: it is treated as gone
      if (self->lingering_) return self->Read();
      if (self->receiving_ && self->buffer_.size() == 0 && !self->parser_->got_some()) {
        self->SetDeadline(self->shared_->options.header_timeout_s);
      }
      self->buffer_.commit(net::buffer_copy(self->buffer_.prepare(size), net::buffer(self->incoming_, size)));
      if (self->receiving_)
        self->Parse();
      else
        self->Read();
    });
  }

  void Dispatch() {
    receiving_ = false;
    started_ = SteadyClock::now();
    auto message = parser_->release();
    http_1_0_ = message.version() < 11;
    keep_alive_ = keep_alive_ && message.keep_alive() && !shared_->stopping;
    const std::string target = OriginForm(std::string(message.target()));
    const size_t question = target.find('?');
    request_ = {.method = std::string(message.method_string()),
                .path = target.substr(0, question),
                .query = question == std::string::npos ? "" : target.substr(question + 1),
                .body = std::move(message.body()),
                .authorization = HeaderOf(message, http::field::authorization),
                .content_type = HeaderOf(message, http::field::content_type),
                .content_encoding = HeaderOf(message, http::field::content_encoding),
                .request_id = std::string(message["X-Request-Id"])};
    if (!http_1_0_ && message.count(http::field::host) != 1) {
      return SendError(HttpError(400, "HTTP/1.1 needs exactly one Host header"));
    }
    if (const std::string expect = HeaderOf(message, http::field::expect);
        !expect.empty() && !beast::iequals(expect, "100-continue")) {
      return SendError(HttpError(417, fmt::format("Expect: '{}' is not supported", expect.substr(0, 100))));
    }
    // Of other codings the length is known, what they encode is not.
    if (const std::string coding = HeaderOf(message, http::field::transfer_encoding);
        !coding.empty() && !beast::iequals(coding, "chunked")) {
      return SendError(HttpError(501, fmt::format("Transfer-Encoding: '{}' is not supported", coding.substr(0, 100))));
    }
    ClearDeadline();
    auto notify = [weak = std::weak_ptr<ConnectionBase>(this->weak_from_this()), news = shared_->news] {
      news->Push(weak);
    };
    HttpRequest request = request_;
    request_.body.clear();
    request_.body.shrink_to_fit();
    operation_ = shared_->handler(std::move(request), std::move(notify));
    Advance();  // takes what came before anybody was woken for it, too
  }

  // Moves the answer on: head first, then whatever body is ready; one write at a time.
  void Advance() {
    if (operation_ == nullptr || closed_) return;
    if (writing_) {
      if (operation_->Abandoned()) Close();
      return;
    }
    if (!head_sent_) {
      HttpReply reply;
      if (!operation_->Poll(&reply)) return Read();  // notices a peer that leaves
      head_sent_ = true;
      status_ = reply.status;
      streaming_ = reply.streaming;
      if (!streaming_) return Write(Head(reply) + (request_.method == "HEAD" ? "" : reply.body), &Connection::Finish);
      Read();
      return Write(Head(reply), &Connection::Advance);
    }
    thread_local std::string frame;  // the thread's: its memory is warm, whichever stream comes next
    frame.assign(kChunkHead, ' ');   // the operation appends to it, so that a piece need not be moved to be framed
    const bool done = operation_->Next(&frame);
    const bool empty = frame.size() == kChunkHead;
    if (empty && !done) return;
    const size_t begin = http_1_0_ || empty ? kChunkHead : FrameChunk(&frame);
    if (done && !http_1_0_) frame += "0\r\n\r\n";
    const std::string_view data = std::string_view(frame).substr(begin);
    if (done) return Write(std::string(data), &Connection::Finish);
    const size_t sent = SendAtOnce(data);
    if (sent < data.size()) Write(std::string(data.substr(sent)), &Connection::Advance);
  }

  // The usual case of a stream's piece: the kernel has room for it, and no completion needs to be waited for. Returns
  // how much it took; what is left (an error too) is Write's.
  size_t SendAtOnce(std::string_view data) {
    if constexpr (std::is_same_v<Stream, TlsStream>) return 0;
    const auto start = SteadyClock::now();
    Error error;
    const size_t sent = stream_.write_some(net::buffer(data), error);
    if (sent == data.size()) {
      shared_->options.write_observer(std::chrono::duration<double>(SteadyClock::now() - start).count());
    }
    return sent;
  }

  std::string Head(const HttpReply& reply) {
    if (streaming_ && http_1_0_) keep_alive_ = false;
    std::string head = fmt::format("HTTP/1.1 {} {}\r\nServer: linspec\r\nDate: {}\r\n", reply.status,
                                   HttpReason(reply.status), HttpDateNow());
    if (reply.status != 204) head += fmt::format("Content-Type: {}\r\n", reply.content_type);
    const auto add = [&](const auto& headers) {
      for (const auto& [name, value] : headers) head += fmt::format("{}: {}\r\n", name, value);
    };
    add(shared_->options.extra_headers);
    add(reply.headers);
    if (!streaming_)
      head += fmt::format("Content-Length: {}\r\n", reply.body.size());
    else if (!http_1_0_)
      head += "Transfer-Encoding: chunked\r\n";
    if (!keep_alive_)
      head += "Connection: close\r\n";
    else if (http_1_0_)
      head += "Connection: keep-alive\r\n";
    return head + "\r\n";
  }

  // The request could not be understood, so where the next one begins is unknown: answer and close.
  void SendError(const absl::Status& status) {
    receiving_ = false;
    keep_alive_ = false;
    const HttpReply reply = shared_->options.error_reply(status);
    status_ = reply.status;
    if (started_ == SteadyClock::time_point()) started_ = SteadyClock::now();
    Write(Head(reply) + reply.body, &Connection::Finish);
  }

  // `then` is a member, not a lambda: a type of its own for each would compile Asio's write once for each.
  void Write(std::string data, void (Connection::*then)()) {
    if (closed_) return;
    writing_ = true;
    output_ = std::move(data);
    SetDeadline(shared_->options.idle_timeout_s);
    const auto start = SteadyClock::now();
    net::async_write(
        stream_, net::buffer(output_), [self = this->shared_from_this(), then, start](Error error, size_t) {
          self->writing_ = false;
          self->shared_->options.write_observer(std::chrono::duration<double>(SteadyClock::now() - start).count());
          if (self->closed_) return;
          if (error) return self->Close();
          self->ClearDeadline();
          (self.get()->*then)();
        });
  }

  void Finish() {
    operation_.reset();
    const double seconds = std::chrono::duration<double>(SteadyClock::now() - started_).count();
    shared_->options.observer(request_, status_, seconds);
    head_sent_ = streaming_ = false;
    request_ = {};
    started_ = {};
    if (keep_alive_) return NextRequest();
    LingeringClose();
  }

  // A client that is still sending would get a reset, and lose our answer, if we just closed: let it read first.
  void LingeringClose() {
    Error ignored;
    socket().shutdown(tcp::socket::shutdown_send, ignored);
    lingering_ = true;
    buffer_.consume(buffer_.size());
    SetDeadline(1.0);
    Read();
  }

  void Close() {
    if (closed_) return;
    closed_ = true;
    operation_.reset();  // cancels what runs
    timer_.cancel();
    Error ignored;
    socket().close(ignored);
    std::lock_guard lock(shared_->mutex);
    shared_->live.erase(this->shared_from_this());
  }

  void SetDeadline(double seconds) {
    deadline_ = SteadyClock::now() + Duration(seconds);
    if (deadline_ < timer_at_) WatchClock();
  }
  void ClearDeadline() { deadline_ = SteadyClock::time_point::max(); }

  // One timer that is rarely moved: it wakes at the latest known deadline and looks whether that still holds.
  void WatchClock() {
    timer_at_ = std::min(deadline_, SteadyClock::now() + std::chrono::seconds(30));
    timer_.expires_at(timer_at_);
    timer_.async_wait([weak = this->weak_from_this()](Error error) {
      auto self = weak.lock();
      if (error || !self || self->closed_) return;
      if (SteadyClock::now() < self->deadline_) return self->WatchClock();
      const bool unfinished = self->receiving_ && (self->buffer_.size() > 0 || self->parser_->got_some());
      if (unfinished && !self->writing_) {
        self->SendError(HttpError(408, "the request did not arrive in time"));
        return self->WatchClock();
      }
      self->Close();
    });
  }

  Stream stream_;
  Shared* const shared_;
  net::basic_waitable_timer<SteadyClock, net::wait_traits<SteadyClock>, Socket::executor_type> timer_;
  SteadyClock::time_point deadline_ = SteadyClock::time_point::max(), timer_at_ = SteadyClock::time_point::max();
  beast::flat_buffer buffer_;                // read, not yet parsed
  std::array<char, kReadBytes> incoming_{};  // of the read under way
  std::optional<http::request_parser<http::string_body>> parser_;
  size_t head_bytes_ = 0;  // of the head that is being received: request line and headers, as far as parsed
  std::unique_ptr<HttpOperation> operation_;
  HttpRequest request_;
  std::string output_;
  SteadyClock::time_point started_;
  int status_ = 0;
  bool over_limit_ = false, receiving_ = false, continued_ = false, reading_ = false, writing_ = false;
  bool head_sent_ = false, streaming_ = false, http_1_0_ = false, keep_alive_ = true, lingering_ = false;
  bool closed_ = false;
};

}  // namespace linspec::http_internal
