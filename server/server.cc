#include "server/server.h"

#include <chrono>
#include <functional>
#include <utility>
#include <vector>

namespace linspec {
namespace {

constexpr double kCloseGraceS = 2;  // for the last bytes of answers that are complete

HttpServerOptions HttpOptions(const ServerConfig& config, HttpApi* api, Metrics* metrics) {
  HttpServerOptions options;
  options.host = config.network.host;
  options.port = config.network.http_port;
  options.io_threads = config.network.io_threads;
  options.max_connections = config.network.max_connections;
  options.max_body_bytes = config.network.max_body_bytes;
  options.max_header_bytes = config.network.max_header_bytes;
  options.send_buffer_bytes = config.network.stream_buffer_bytes;
  options.header_timeout_s = config.network.header_timeout_s;
  options.idle_timeout_s = config.network.idle_timeout_s;
  options.tls_cert = config.security.tls_cert;
  options.tls_key = config.security.tls_key;
  options.tls_client_ca = config.security.tls_client_ca;
  if (const std::string& origin = config.network.cors_origin; !origin.empty()) {
    options.extra_headers = {{"Access-Control-Allow-Origin", origin},
                             {"Access-Control-Expose-Headers", "Retry-After, X-Request-Id"}};
  }
  options.error_reply = [api](const absl::Status& status) { return api->ErrorReply(status); };
  options.observer = [api](const HttpRequest& request, int status, double s) { api->Observe(request, status, s); };
  options.write_observer = [metrics](double seconds) { metrics->OnWrite(seconds); };
  return options;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerConfig& config, const PartsLoader& load, Log* log) {
  std::unique_ptr<Server> server(new Server(log));
  auto auth = Authenticator::Create(config.security.api_key_file, config.security.public_metrics, log);
  if (!auth.ok()) return auth.status();
  server->auth_ = *std::move(auth);
  // The metrics carry the model's name, which is known after loading; the engine reports only once it runs.
  Server* raw = server.get();
  auto parts = load(config, [raw](const StepStats& step) { raw->metrics_->OnStep(step); });
  if (!parts.ok()) return parts.status();
  server->metrics_ = std::make_unique<Metrics>(MetricsOptions{.model_name = parts->model_name,
                                                              .drafters = parts->drafters,
                                                              .alias_vllm = config.operations.metrics_alias == "vllm",
                                                              .observes = config.operations.metrics});
  server->service_ = std::make_unique<Service>(config, *std::move(parts), server->metrics_.get(), log);
  server->auth_->WatchKeys([raw, limit = config.engine.max_running_per_key](size_t num_keys) {
    raw->service_->engine().SetMaxRunningPerTenant(limit > 0 || num_keys > 1 ? limit : -1);  // a lone key may have all
  });
  if (absl::Status status = server->Listen(config); !status.ok()) return status;
  std::vector<std::function<void()>> wakers;
  if (server->http_ != nullptr) wakers.push_back(server->http_->waker());
  if (server->grpc_ != nullptr) wakers.push_back(server->grpc_->waker());
  server->service_->engine().SetAfterDelivery([wakers] {
    for (const auto& wake : wakers) wake();
  });
  server->service_->engine().Start();  // requests that came already have waited for it
  server->AddCollectors();
  server->probe_ = std::make_unique<GenerationProbe>(server->service_.get(), config.operations.probe_interval_s);
  return server;
}

// HTTP last: who finds /ready answered may call over gRPC too.
absl::Status Server::Listen(const ServerConfig& config) {
  auto grpc = GrpcFrontEnd::Start(service_.get(), auth_.get());
  if (!grpc.ok()) return grpc.status();
  grpc_ = *std::move(grpc);
  api_ = std::make_unique<HttpApi>(service_.get(), auth_.get());
  if (config.network.http_port < 0) return absl::OkStatus();
  auto http = HttpServer::Start(
      HttpOptions(config, api_.get(), metrics_.get()),
      [this](HttpRequest request, HttpNotify notify) { return api_->Handle(std::move(request), std::move(notify)); });
  if (!http.ok()) return http.status();
  http_ = *std::move(http);
  return absl::OkStatus();
}

void Server::AddCollectors() {
  metrics_->AddCollector(ProcessSamples);
  metrics_->AddCollector([this] { return DeviceSamples(service_->engine().device_stats()); });
  metrics_->AddCollector([this]() -> std::vector<MetricSample> {
    const double connections = http_ == nullptr ? 0 : http_->open_connections();
    return {{"linspec_log_lines_lost_total",
             "Log lines that could not be written",
             true,
             {},
             static_cast<double>(log_->lines_lost())},
            {"linspec_http_connections_open", "Open HTTP connections", false, {}, connections}};
  });
}

Server::~Server() {
  probe_.reset();
  http_.reset();
  grpc_.reset();
}

void Server::StopAdmitting() {
  service_->StopAdmitting();
  if (grpc_) grpc_->SetServing(false);
}

void Server::Drain() {
  const double seconds = service_->config().operations.drain_timeout_s;
  if (!service_->engine().Drain(std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000)))) {
    log_->Write(LogLevel::kWarn, "drain timeout: the requests left were aborted");
  }
  if (http_) http_->Stop(kCloseGraceS);
  if (grpc_) grpc_->Stop(kCloseGraceS);
}

}  // namespace linspec
