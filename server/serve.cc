// `linspec serve`: load, listen, wait for a signal, drain.
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <thread>

#include "server/auth.h"
#include "server/commands.h"
#include "server/errors.h"
#include "server/grpc_service.h"
#include "server/http_api.h"
#include "server/http_server.h"
#include "server/metrics.h"
#include "server/model_files.h"

namespace linspec {
namespace {

void SetUpLogging(const ServerConfig::OperationsOptions& options) {
  if (options.log_format == "json") {
    spdlog::set_pattern(R"({"time":"%Y-%m-%dT%H:%M:%S.%e%z","level":"%l","message":"%v"})");
  } else {
    spdlog::set_pattern("%Y-%m-%d %H:%M:%S.%e %l %v");
  }
  const std::string level = options.log_level == "error" ? "err" : options.log_level;
  spdlog::set_level(spdlog::level::from_str(level));
}

// SIGINT and SIGTERM are waited for, never handled: blocked here, before any thread exists, so that all inherit it.
sigset_t BlockSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  return signals;
}

absl::StatusOr<std::unique_ptr<HttpServer>> StartHttp(const ServerConfig& config, HttpApi* api) {
  if (config.network.http_port < 0) return std::unique_ptr<HttpServer>();
  HttpServerOptions options;
  options.host = config.network.host;
  options.port = config.network.http_port;
  options.io_threads = config.network.io_threads;
  options.max_connections = config.network.max_connections;
  options.max_body_bytes = config.network.max_body_bytes;
  options.max_header_bytes = config.network.max_header_bytes;
  options.header_timeout_s = config.network.header_timeout_s;
  options.idle_timeout_s = config.network.idle_timeout_s;
  options.tls_cert = config.security.tls_cert;
  options.tls_key = config.security.tls_key;
  options.tls_client_ca = config.security.tls_client_ca;
  options.error_reply = [api](const absl::Status& status) { return api->ErrorReply(status); };
  options.observer = [api](const HttpRequest& request, int status, double s) { api->Observe(request, status, s); };
  return HttpServer::Start(std::move(options), [api](HttpRequest request, HttpNotify notify) {
    return api->Handle(std::move(request), std::move(notify));
  });
}

void PrintReady(const ServerConfig& config, Service* service, int http_port, int grpc_port) {
  const EngineStats stats = service->engine().stats();
  fmt::print("model     {} ({})\n{}\n", service->model_name(),
             config.model.path.empty() ? "bundled" : config.model.path, service->engine().Describe());
  fmt::print("capacity  {} requests fit, {:.2f} MiB each at any context length\n", stats.slots_total,
             static_cast<double>(stats.bytes_per_slot) / (1 << 20));
  fmt::print("flags     (* differs from the default)\n{}\n", DescribeConfig(config));
  const bool tls = !config.security.tls_cert.empty();
  const std::string base = fmt::format("{}://{}:{}", tls ? "https" : "http", config.network.host, http_port);
  if (http_port > 0) fmt::print("REST      {}\n", base);
  if (grpc_port > 0) fmt::print("gRPC      {}:{}\n", config.network.host, grpc_port);
  if (http_port > 0) {
    const char* key = config.security.api_key_file.empty() ? "" : " -H 'Authorization: Bearer YOUR_KEY'";
    fmt::print(
        "\ncurl -N {}/v1/completions{} -H 'Content-Type: application/json' \\\n"
        "  -d '{{\"prompt\": \"Once upon a time\", \"max_tokens\": 64, \"stream\": true}}'\n\n",
        base, key);
  }
  std::fflush(stdout);
}

// A second signal ends the process at once, whatever is still running.
void DrainUntilDoneOrSignal(const sigset_t& signals, const ServerConfig& config, Service* service) {
  const auto timeout = std::chrono::milliseconds(static_cast<int64_t>(config.operations.drain_timeout_s * 1000));
  std::thread impatient([signals] {
    int signal = 0;
    sigwait(&signals, &signal);
    spdlog::warn("second signal: ending at once");
    std::_Exit(130);
  });
  impatient.detach();  // ends with the process
  if (!service->engine().Drain(timeout)) spdlog::warn("drain timeout: the requests left were aborted");
}

}  // namespace

absl::Status Serve(std::span<const std::string> args) {
  auto config = ParseServerConfig(args);
  if (!config.ok()) return config.status();
  const sigset_t signals = BlockSignals();
  SetUpLogging(config->operations);
  auto auth = Authenticator::Create(config->security.api_key_file, config->security.public_metrics);
  if (!auth.ok()) return auth.status();

  fmt::print("linspec {}\n", kVersion);
  // The metrics carry the model's name, which is known after loading; the engine reports only once it runs.
  std::unique_ptr<Metrics> metrics;
  auto parts = LoadParts(*config, [&metrics](const StepStats& step) { metrics->OnStep(step); });
  if (!parts.ok()) return parts.status();
  metrics = std::make_unique<Metrics>(parts->model_name, config->operations.metrics_alias == "vllm");
  Service service(*config, *std::move(parts), metrics.get());
  service.engine().Start();

  HttpApi api(&service, auth->get());
  auto http = StartHttp(*config, &api);
  if (!http.ok()) return http.status();
  auto grpc = GrpcFrontEnd::Start(&service, auth->get());
  if (!grpc.ok()) return grpc.status();
  PrintReady(*config, &service, *http ? (*http)->port() : 0, *grpc ? (*grpc)->port() : 0);

  int signal = 0;
  sigwait(&signals, &signal);
  spdlog::info("signal {}: draining for at most {} s", signal, config->operations.drain_timeout_s);
  service.StopAdmitting();
  if (*grpc) (*grpc)->SetServing(false);
  DrainUntilDoneOrSignal(signals, *config, &service);
  if (*http) (*http)->Stop(2.0);
  if (*grpc) (*grpc)->Stop(2.0);
  spdlog::info("drained; bye");
  return absl::OkStatus();
}

}  // namespace linspec
