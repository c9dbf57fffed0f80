// The only file of the load tester that knows Boost.Beast.
#include <fmt/format.h>

#include <boost/asio/connect.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/ssl.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <nlohmann/json.hpp>
#include <optional>

#include "loadtest/client.h"
#include "loadtest/stream_meter.h"
#include "loadtest/wire_text.h"

namespace linspec::loadtest {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
namespace ssl = asio::ssl;
using tcp = asio::ip::tcp;
using Json = nlohmann::json;

constexpr size_t kMaxErrorText = 300;
constexpr size_t kReadBytes = 4096;
constexpr int kSlowReceiveBuffer = 4096;  // a slow reader soon fills it, and the server feels it

http::request<http::string_body> MakeRequest(http::verb verb, const Target& target, const std::string& path) {
  http::request<http::string_body> request{verb, path, 11};
  request.set(http::field::host, fmt::format("{}:{}", target.host, target.port));
  request.set(http::field::user_agent, "linspec-loadtest");
  request.set(http::field::connection, "close");
  if (!target.bearer_token.empty()) request.set(http::field::authorization, "Bearer " + target.bearer_token);
  return request;
}

std::string CompletionBody(const Target& target, const PlannedRequest& planned, const Options& options) {
  Json body = {{"model", target.model},
               {"max_tokens", planned.max_tokens},
               {"temperature", options.temperature},
               {"stream", true},
               {"stream_options", {{"include_usage", true}}}};
  if (options.top_p < 1) body["top_p"] = options.top_p;
  if (options.ignore_eos) body["ignore_eos"] = true;
  if (options.backend == "openai-chat") {
    body["messages"] = Json::array({{{"role", "user"}, {"content", planned.prompt}}});
  } else {
    body["prompt"] = planned.prompt;
  }
  return body.dump(-1, ' ', false, Json::error_handler_t::replace);
}

using TlsStream = ssl::stream<tcp::socket>;

// The server's name is checked, and told (SNI) where it is no address.
void PrepareTls(TlsStream* stream, const std::string& host) {
  beast::error_code no_address;
  asio::ip::make_address(host, no_address);
  if (no_address) SSL_set_tlsext_host_name(stream->native_handle(), host.c_str());
  stream->set_verify_callback(ssl::host_name_verification(host));
}

// Stream: tcp::socket or TlsStream.
template <class Stream>
class RestExchange : public std::enable_shared_from_this<RestExchange<Stream>> {
 public:
  RestExchange(asio::io_context* loop, Stream stream, const PlannedRequest& planned, Done done)
      : stream_(std::move(stream)),
        timeout_(*loop),
        pause_(*loop),
        cancel_after_(planned.cancel_after_chunks),
        read_delay_ms_(planned.read_delay_ms),
        done_(std::move(done)) {
    parser_.body_limit(boost::none);
    parser_.eager(true);
  }

  void Run(const tcp::endpoint& endpoint, http::request<http::string_body> request, double timeout_s) {
    request_ = std::move(request);
    timeout_.expires_after(
        std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(timeout_s)));
    timeout_.async_wait([weak = this->weak_from_this()](beast::error_code error) {
      const auto self = weak.lock();
      if (!error && self) self->End("timeout");
    });
    if (read_delay_ms_ > 0) {
      beast::error_code ignored;  // a larger buffer only makes the reader less slow
      socket().open(endpoint.protocol(), ignored);
      socket().set_option(asio::socket_base::receive_buffer_size(kSlowReceiveBuffer), ignored);
    }
    socket().async_connect(endpoint, [self = this->shared_from_this()](beast::error_code error) {
      if (error) return self->Fail("connect", error);
      beast::error_code ignored;
      self->socket().set_option(tcp::no_delay(true), ignored);
      self->Connected();
    });
  }

 private:
  static constexpr bool kTls = std::is_same_v<Stream, TlsStream>;
  tcp::socket& socket() {
    if constexpr (kTls)
      return stream_.next_layer();
    else
      return stream_;
  }

  void Connected() {
    if constexpr (kTls) {
      stream_.async_handshake(ssl::stream_base::client, [self = this->shared_from_this()](beast::error_code error) {
        error ? self->Fail("TLS", error) : self->Send();
      });
    } else {
      Send();
    }
  }

  void Send() {
    http::async_write(stream_, request_, [self = this->shared_from_this()](beast::error_code error, size_t) {
      error ? self->Fail("write", error) : self->Read();
    });
  }

  void Read() {
    stream_.async_read_some(buffer_.prepare(kReadBytes),
                            [self = this->shared_from_this()](beast::error_code error, size_t size) {
                              self->buffer_.commit(size);
                              self->OnRead(error);
                            });
  }

  void OnRead(beast::error_code error) {
    if (done_ == nullptr) return;
    beast::error_code parse_error;
    while (buffer_.size() > 0 && !parser_.is_done() && !parse_error) {
      buffer_.consume(parser_.put(buffer_.data(), parse_error));
    }
    if (parse_error && parse_error != http::error::need_more) return Fail("read", parse_error);
    if (error == asio::error::eof || error == ssl::error::stream_truncated) {
      // A body without a length ends here; any other is cut off, which is put_eof's error.
      if (parse_error = {}; parser_.got_some() && !parser_.is_done()) parser_.put_eof(parse_error);
      if (!parser_.is_done()) return Fail("read", parse_error ? parse_error : error);
    } else if (error) {
      return Fail("read", error);
    }
    if (parser_.is_header_done()) {
      if (parser_.get().result_int() == 200) {
        Consume();
      } else if (parser_.is_done() || parser_.get().body().size() > kMaxErrorText) {
        return End(
            fmt::format("HTTP {}: {}", parser_.get().result_int(), parser_.get().body().substr(0, kMaxErrorText)));
      }
    }
    if (!error_.empty()) return End(error_);
    if (cancel_after_ >= 0 && meter_.chunks() >= cancel_after_) return Drop();
    if (parser_.is_done()) return End(saw_done_ ? "" : "the stream ended without [DONE]");
    if (read_delay_ms_ == 0) return Read();
    pause_.expires_after(std::chrono::milliseconds(read_delay_ms_));
    pause_.async_wait([self = this->shared_from_this()](beast::error_code) { self->Read(); });
  }

  void Consume() {
    std::string& body = parser_.get().body();
    for (const std::string& data : sse_.Push(body)) {
      if (data == "[DONE]")
        saw_done_ = true;
      else
        Event(data);
      if (!error_.empty()) return;
    }
    body.clear();
  }

  void Event(const std::string& data) {
    if (!ParseStreamEvent(data, &event_)) {
      error_ = "an event is not a JSON object: " + data.substr(0, kMaxErrorText);
      return;
    }
    if (event_.is_error) error_ = "error event: " + data.substr(0, kMaxErrorText);
    for (const std::string& text : event_.texts) meter_.Chunk(text);
    if (event_.has_usage) meter_.Usage(event_.prompt_tokens, event_.completion_tokens);
  }

  void Fail(const char* what, beast::error_code error) { End(fmt::format("{}: {}", what, error.message())); }
  void End(std::string error) {
    Close();
    if (Done done = std::exchange(done_, nullptr)) done(meter_.Finish(std::move(error)));
  }
  void Drop() {
    Close();
    if (Done done = std::exchange(done_, nullptr)) done(meter_.Cancelled());
  }
  void Close() {
    timeout_.cancel();
    beast::error_code ignored;
    socket().close(ignored);
  }

  Stream stream_;
  asio::steady_timer timeout_, pause_;
  beast::flat_buffer buffer_;
  http::request<http::string_body> request_;
  http::response_parser<http::string_body> parser_;
  SseParser sse_;
  StreamEvent event_;
  StreamMeter meter_;
  int cancel_after_, read_delay_ms_;
  bool saw_done_ = false;
  std::string error_;
  Done done_;
};

class RestClient : public Client {
 public:
  RestClient(asio::io_context* loop, Target target, const Options* options)
      : loop_(loop), target_(std::move(target)), options_(options) {}

  void Start(const PlannedRequest& planned, Done done) override {
    auto request = MakeRequest(http::verb::post, target_, target_.path);
    request.set(http::field::content_type, "application/json");
    request.body() = CompletionBody(target_, planned, *options_);
    request.prepare_payload();
    const auto run = [&](auto stream) {
      auto exchange =
          std::make_shared<RestExchange<decltype(stream)>>(loop_, std::move(stream), planned, std::move(done));
      exchange->Run(Endpoint(), std::move(request), options_->timeout);
    };
    if (target_.tls == nullptr) return run(tcp::socket(*loop_));
    TlsStream stream(*loop_, *target_.tls->context);
    PrepareTls(&stream, target_.host);
    run(std::move(stream));
  }

 private:
  // Resolved once: name look-ups are no part of a server's latency.
  const tcp::endpoint& Endpoint() {
    if (!endpoint_) {
      beast::error_code error;
      const auto found = tcp::resolver(*loop_).resolve(target_.host, std::to_string(target_.port), error);
      endpoint_ = error || found.empty() ? tcp::endpoint() : found.begin()->endpoint();
    }
    return *endpoint_;
  }

  asio::io_context* loop_;
  Target target_;
  const Options* options_;
  std::optional<tcp::endpoint> endpoint_;
};

}  // namespace

std::unique_ptr<Client> CreateRestClient(asio::io_context* loop, Target target, const Options* options) {
  return std::make_unique<RestClient>(loop, std::move(target), options);
}

absl::StatusOr<std::string> HttpGet(const Target& target, const std::string& path) {
  const std::string url =
      fmt::format("{}://{}:{}{}", target.tls == nullptr ? "http" : "https", target.host, target.port, path);
  const auto unavailable = [&](const std::string& why) {
    return absl::UnavailableError(fmt::format("GET {}: {}", url, why));
  };
  asio::io_context loop;
  beast::error_code error;
  const auto endpoints = tcp::resolver(loop).resolve(target.host, std::to_string(target.port), error);
  if (error) return unavailable(error.message());
  http::response<http::string_body> response;
  const auto exchange = [&](auto* stream) {
    beast::flat_buffer buffer;
    http::write(*stream, MakeRequest(http::verb::get, target, path), error);
    if (!error) http::read(*stream, buffer, response, error);
  };
  if (target.tls == nullptr) {
    tcp::socket socket(loop);
    asio::connect(socket, endpoints, error);
    if (!error) exchange(&socket);
  } else {
    TlsStream stream(loop, *target.tls->context);
    PrepareTls(&stream, target.host);
    asio::connect(stream.next_layer(), endpoints, error);
    if (!error) stream.handshake(ssl::stream_base::client, error);
    if (!error) exchange(&stream);
  }
  if (error) return unavailable(error.message());
  if (response.result_int() != 200) return unavailable(fmt::format("HTTP {}", response.result_int()));
  return response.body();
}

}  // namespace linspec::loadtest
