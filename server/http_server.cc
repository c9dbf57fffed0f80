#include "server/http_server.h"

#include <fmt/format.h>

#include <chrono>
#include <mutex>
#include <thread>

#include "server/errors.h"
#include "server/http_connection.h"

namespace linspec {
namespace {

using namespace http_internal;  // NOLINT: the other half of this file

absl::StatusOr<std::unique_ptr<net::ssl::context>> MakeTls(const HttpServerOptions& options) {
  auto context = std::make_unique<net::ssl::context>(net::ssl::context::tls_server);
  Error error;
  context->set_options(net::ssl::context::default_workarounds | net::ssl::context::no_tlsv1 |
                           net::ssl::context::no_tlsv1_1 | net::ssl::context::single_dh_use,
                       error);
  const auto bad = [&](const char* flag, const std::string& file) {
    return absl::InvalidArgumentError(fmt::format("--{}: '{}': {}", flag, file, error.message()));
  };
  if (context->use_certificate_chain_file(options.tls_cert, error); error) return bad("tls-cert", options.tls_cert);
  if (context->use_private_key_file(options.tls_key, net::ssl::context::pem, error); error)
    return bad("tls-key", options.tls_key);
  if (!options.tls_client_ca.empty()) {
    if (context->load_verify_file(options.tls_client_ca, error); error)
      return bad("tls-client-ca", options.tls_client_ca);
    context->set_verify_mode(net::ssl::verify_peer | net::ssl::verify_fail_if_no_peer_cert, error);
  }
  return context;
}

}  // namespace

struct HttpServer::Impl {
  net::io_context context;
  std::unique_ptr<net::ssl::context> tls;
  tcp::acceptor acceptor{context};
  Shared shared;
  std::vector<std::thread> threads;

  void Accept() {
    acceptor.async_accept(net::make_strand(context), [this](Error error, Socket socket) {
      if (error == net::error::operation_aborted || !acceptor.is_open()) return;
      if (!error) Welcome(std::move(socket));
      // Out of descriptors: accepting at once again would spin.
      if (error) std::this_thread::sleep_for(std::chrono::milliseconds(10));
      Accept();
    });
  }

  void Welcome(Socket socket) {
    Error ignored;
    socket.set_option(tcp::no_delay(true), ignored);
    socket.non_blocking(true, ignored);
    socket.set_option(net::socket_base::send_buffer_size(static_cast<int>(shared.options.send_buffer_bytes)), ignored);
    const bool over_limit = shared.open >= shared.options.max_connections;
    const auto run = [&](auto connection) {
      {
        std::lock_guard lock(shared.mutex);
        shared.live.insert(connection);
      }
      connection->Run(over_limit);
    };
    if (tls)
      run(std::make_shared<Connection<TlsStream>>(TlsStream(std::move(socket), *tls), &shared));
    else
      run(std::make_shared<Connection<Socket>>(std::move(socket), &shared));
  }

  void CloseAll(bool at_once) {
    std::lock_guard lock(shared.mutex);
    for (const auto& connection : shared.live) connection->Shutdown(at_once);
  }
};

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() { Stop(0); }

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(HttpServerOptions options, HttpHandler handler) {
  auto impl = std::make_unique<Impl>();
  if (!options.tls_cert.empty()) {
    auto tls = MakeTls(options);
    if (!tls.ok()) return tls.status();
    impl->tls = *std::move(tls);
  }
  Error error;
  const auto address = net::ip::make_address(options.host == "localhost" ? "127.0.0.1" : options.host, error);
  if (error) return absl::InvalidArgumentError(fmt::format("--host: '{}' is not an IP address", options.host));
  const tcp::endpoint endpoint(address, static_cast<uint16_t>(options.port));
  impl->acceptor.open(endpoint.protocol(), error);
  if (!error) impl->acceptor.set_option(net::socket_base::reuse_address(true), error);
  if (!error) impl->acceptor.bind(endpoint, error);
  if (!error) impl->acceptor.listen(4096, error);
  if (error) {
    return absl::FailedPreconditionError(
        fmt::format("cannot listen on {}:{}: {}; choose another port with --http-port, or stop "
                    "what uses it (ss -ltnp)",
                    options.host, options.port, error.message()));
  }
  impl->shared.handler = std::move(handler);
  const int num_threads = options.io_threads;
  impl->shared.options = std::move(options);
  impl->shared.news = std::make_shared<NewsQueue>(&impl->context, num_threads);
  impl->Accept();
  for (int i = 0; i < num_threads; ++i) impl->threads.emplace_back([context = &impl->context] { context->run(); });
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

int HttpServer::port() const {
  Error ignored;
  return impl_->acceptor.local_endpoint(ignored).port();
}

int HttpServer::open_connections() const { return impl_->shared.open; }

std::function<void()> HttpServer::waker() const {
  return [news = impl_->shared.news] { news->Wake(); };
}

void HttpServer::Stop(double grace_s) {
  if (impl_->threads.empty()) return;
  impl_->shared.stopping = true;
  net::post(impl_->context, [this] {
    Error ignored;
    impl_->acceptor.close(ignored);
  });
  impl_->CloseAll(false);
  const auto until = SteadyClock::now() + Duration(grace_s);
  while (impl_->shared.open > 0 && SteadyClock::now() < until)
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  impl_->CloseAll(true);
  const auto closed_by = SteadyClock::now() + std::chrono::seconds(1);
  while (impl_->shared.open > 0 && SteadyClock::now() < closed_by)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  impl_->shared.news->Close();
  impl_->context.stop();
  for (std::thread& thread : impl_->threads) thread.join();
  impl_->threads.clear();
}

}  // namespace linspec
