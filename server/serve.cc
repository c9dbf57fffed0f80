// `linspec serve`: load, listen, wait for a signal, drain.
#include <fmt/format.h>

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

Log MakeLog(const ServerConfig::OperationsOptions& options) {
  const LogFormat format = options.log_format == "json" ? LogFormat::kJson : LogFormat::kText;
  for (const auto& [name, level] : {std::pair("debug", LogLevel::kDebug), std::pair("info", LogLevel::kInfo),
                                    std::pair("warn", LogLevel::kWarn), std::pair("error", LogLevel::kError)}) {
    if (options.log_level == name) return Log(format, level);
  }
  return Log(format, LogLevel::kOff);
}

void AddCollectors(Metrics* metrics, const Log* log, Service* service, const HttpServer* http) {
  metrics->AddCollector(ProcessSamples);
  metrics->AddCollector([service] { return DeviceSamples(service->engine().device_stats()); });
  metrics->AddCollector([log, http]() -> std::vector<MetricSample> {
    const double connections = http == nullptr ? 0 : http->open_connections();
    return {{"linspec_log_lines_lost_total",
             "Log lines that could not be written",
             true,
             {},
             static_cast<double>(log->lines_lost())},
            {"linspec_http_connections_open", "Open HTTP connections", false, {}, connections}};
  });
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

absl::StatusOr<std::unique_ptr<HttpServer>> StartHttp(const ServerConfig& config, HttpApi* api, Metrics* metrics) {
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
  options.write_observer = [metrics](double seconds) { metrics->OnWrite(seconds); };
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

// With JSON logs every line of standard output is JSON, the greeting included.
void LogReady(const ServerConfig& config, Service* service, int http_port, int grpc_port, Log* log) {
  const EngineStats stats = service->engine().stats();
  log->Write(LogLevel::kInfo, "ready",
             {{"version", kVersion},
              {"model", service->model_name()},
              {"description", service->engine().Describe()},
              {"capacity_requests", stats.slots_total},
              {"state_bytes_per_request", stats.bytes_per_slot},
              {"host", config.network.host},
              {"http_port", int64_t{http_port}},
              {"grpc_port", int64_t{grpc_port}},
              {"flags", ChangedFlags(config)}});
}

// A second signal ends the process at once, whatever is still running.
void DrainUntilDoneOrSignal(const sigset_t& signals, const ServerConfig& config, Service* service, Log* log) {
  const auto timeout = std::chrono::milliseconds(static_cast<int64_t>(config.operations.drain_timeout_s * 1000));
  std::thread impatient([signals] {
    int signal = 0;
    sigwait(&signals, &signal);
    fmt::print(stderr, "linspec: second signal: ending at once\n");  // the log would not be written any more
    std::_Exit(130);
  });
  impatient.detach();  // ends with the process
  if (!service->engine().Drain(timeout)) {
    log->Write(LogLevel::kWarn, "drain timeout: the requests left were aborted");
  }
}

}  // namespace

absl::Status Serve(std::span<const std::string> args) {
  auto config = ParseServerConfig(args);
  if (!config.ok()) return config.status();
  const sigset_t signals = BlockSignals();
  Log log(MakeLog(config->operations));
  auto auth = Authenticator::Create(config->security.api_key_file, config->security.public_metrics);
  if (!auth.ok()) return auth.status();

  const bool json = log.format() == LogFormat::kJson;
  if (!json) fmt::print("linspec {}\n", kVersion);
  // The metrics carry the model's name, which is known after loading; the engine reports only once it runs.
  std::unique_ptr<Metrics> metrics;
  auto parts = LoadParts(*config, [&metrics](const StepStats& step) { metrics->OnStep(step); });
  if (!parts.ok()) return parts.status();
  metrics = std::make_unique<Metrics>(MetricsOptions{.model_name = parts->model_name,
                                                     .drafters = parts->drafters,
                                                     .alias_vllm = config->operations.metrics_alias == "vllm"});
  Service service(*config, *std::move(parts), metrics.get(), &log);
  service.engine().Start();

  HttpApi api(&service, auth->get());
  auto http = StartHttp(*config, &api, metrics.get());
  if (!http.ok()) return http.status();
  auto grpc = GrpcFrontEnd::Start(&service, auth->get());
  if (!grpc.ok()) return grpc.status();
  AddCollectors(metrics.get(), &log, &service, http->get());
  const int http_port = *http ? (*http)->port() : 0, grpc_port = *grpc ? (*grpc)->port() : 0;
  if (json)
    LogReady(*config, &service, http_port, grpc_port, &log);
  else
    PrintReady(*config, &service, http_port, grpc_port);

  int signal = 0;
  sigwait(&signals, &signal);
  log.Write(LogLevel::kInfo, "draining",
            {{"signal", int64_t{signal}}, {"timeout_s", config->operations.drain_timeout_s}});
  service.StopAdmitting();
  if (*grpc) (*grpc)->SetServing(false);
  DrainUntilDoneOrSignal(signals, *config, &service, &log);
  if (*http) (*http)->Stop(2.0);
  if (*grpc) (*grpc)->Stop(2.0);
  log.Write(LogLevel::kInfo, "drained");
  return absl::OkStatus();
}

}  // namespace linspec
