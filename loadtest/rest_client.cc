// The only file of the load tester that knows Boost.Beast.
#include <fmt/format.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
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
using tcp = asio::ip::tcp;
using Json = nlohmann::json;

constexpr size_t kMaxErrorText = 300;
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

class RestExchange : public std::enable_shared_from_this<RestExchange> {
 public:
  RestExchange(asio::io_context* loop, const PlannedRequest& planned, Done done)
      : stream_(*loop),
        pause_(*loop),
        cancel_after_(planned.cancel_after_chunks),
        read_delay_ms_(planned.read_delay_ms),
        done_(std::move(done)) {
    parser_.body_limit(boost::none);
    // An eager parser keeps reading until the line end after a chunk is followed by the next chunk: every token would be
    // seen one late, or all at the end.
    parser_.eager(false);
  }

  void Run(const tcp::endpoint& endpoint, http::request<http::string_body> request, double timeout_s) {
    request_ = std::move(request);
    stream_.expires_after(
        std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::duration<double>(timeout_s)));
    if (read_delay_ms_ > 0) {
      beast::error_code ignored;  // a larger buffer only makes the reader less slow
      stream_.socket().open(endpoint.protocol(), ignored);
      stream_.socket().set_option(asio::socket_base::receive_buffer_size(kSlowReceiveBuffer), ignored);
    }
    stream_.async_connect(endpoint, [self = shared_from_this()](beast::error_code error) {
      if (error) return self->Fail("connect", error);
      beast::error_code ignored;
      self->stream_.socket().set_option(tcp::no_delay(true), ignored);
      http::async_write(self->stream_, self->request_, [self](beast::error_code error, size_t) {
        if (error) return self->Fail("write", error);
        self->Read();
      });
    });
  }

 private:
  void Read() {
    http::async_read_some(stream_, buffer_, parser_,
                          [self = shared_from_this()](beast::error_code error, size_t) { self->OnRead(error); });
  }

  void OnRead(beast::error_code error) {
    if (error) return Fail("read", error);
    if (parser_.is_header_done()) {
      if (parser_.get().result_int() == 200) {
        Consume();
      } else if (parser_.is_done() || parser_.get().body().size() > kMaxErrorText) {
        return End(
            fmt::format("HTTP {}: {}", parser_.get().result_int(), parser_.get().body().substr(0, kMaxErrorText)));
      }
    }
    if (done_ == nullptr) return;
    if (!error_.empty()) return End(error_);
    if (cancel_after_ >= 0 && meter_.chunks() >= cancel_after_) return Drop();
    if (parser_.is_done()) return End(saw_done_ ? "" : "the stream ended without [DONE]");
    if (read_delay_ms_ == 0) return Read();
    pause_.expires_after(std::chrono::milliseconds(read_delay_ms_));
    pause_.async_wait([self = shared_from_this()](beast::error_code) { self->Read(); });
  }

  void Consume() {
    std::string& body = parser_.get().body();
    for (const std::string& data : sse_.Push(body)) {
      if (data == "[DONE]") {
        saw_done_ = true;
        continue;
      }
      const Json event = Json::parse(data, nullptr, /*allow_exceptions=*/false);
      if (!event.is_object()) {
        error_ = "an event is not a JSON object: " + data.substr(0, kMaxErrorText);
        return;
      }
      Event(event);
    }
    body.clear();
  }

  void Event(const Json& event) {
    if (const auto error = event.find("error"); error != event.end()) {
      error_ = "error event: " + error->dump().substr(0, kMaxErrorText);
      return;
    }
    if (const auto choices = event.find("choices"); choices != event.end() && choices->is_array()) {
      for (const Json& choice : *choices) {
        if (!choice.is_object()) continue;
        const Json* text = nullptr;
        if (const auto delta = choice.find("delta"); delta != choice.end() && delta->is_object()) {
          if (const auto content = delta->find("content"); content != delta->end()) text = &*content;
        } else if (const auto plain = choice.find("text"); plain != choice.end()) {
          text = &*plain;
        }
        if (text == nullptr || !text->is_string()) continue;
        if (const auto& value = text->get_ref<const std::string&>(); !value.empty()) meter_.Chunk(value);
      }
    }
    if (const auto usage = event.find("usage"); usage != event.end() && usage->is_object()) {
      const auto count = [&](const char* key) {
        const auto value = usage->find(key);
        return value != usage->end() && value->is_number_integer() ? value->get<int>() : 0;
      };
      meter_.Usage(count("prompt_tokens"), count("completion_tokens"));
    }
  }

  void Fail(const char* what, beast::error_code error) {
    End(fmt::format("{}: {}", what, error == beast::error::timeout ? "timeout" : error.message()));
  }
  void End(std::string error) {
    Close();
    if (Done done = std::exchange(done_, nullptr)) done(meter_.Finish(std::move(error)));
  }
  void Drop() {
    Close();
    if (Done done = std::exchange(done_, nullptr)) done(meter_.Cancelled());
  }
  void Close() { stream_.close(); }

  beast::tcp_stream stream_;
  asio::steady_timer pause_;
  beast::flat_buffer buffer_;
  http::request<http::string_body> request_;
  http::response_parser<http::string_body> parser_;
  SseParser sse_;
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
    auto exchange = std::make_shared<RestExchange>(loop_, planned, std::move(done));
    auto request = MakeRequest(http::verb::post, target_, target_.path);
    request.set(http::field::content_type, "application/json");
    request.body() = CompletionBody(target_, planned, *options_);
    request.prepare_payload();
    exchange->Run(Endpoint(), std::move(request), options_->timeout);
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
  const auto unavailable = [&](const beast::error_code& error) {
    return absl::UnavailableError(
        fmt::format("GET http://{}:{}{}: {}", target.host, target.port, path, error.message()));
  };
  asio::io_context loop;
  beast::error_code error;
  const auto endpoints = tcp::resolver(loop).resolve(target.host, std::to_string(target.port), error);
  if (error) return unavailable(error);
  beast::tcp_stream stream(loop);
  stream.connect(endpoints, error);
  if (error) return unavailable(error);
  http::write(stream, MakeRequest(http::verb::get, target, path), error);
  if (error) return unavailable(error);
  beast::flat_buffer buffer;
  http::response<http::string_body> response;
  http::read(stream, buffer, response, error);
  if (error) return unavailable(error);
  if (response.result_int() != 200) {
    return absl::UnavailableError(
        fmt::format("GET http://{}:{}{}: HTTP {}", target.host, target.port, path, response.result_int()));
  }
  return response.body();
}

}  // namespace linspec::loadtest
