// `linspec serve`: load, listen, wait for a signal, drain.
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "server/commands.h"
#include "server/model_files.h"
#include "server/server.h"

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

// SIGINT and SIGTERM are waited for, never handled: blocked before any thread exists, so that all threads inherit it.
// While the model loads a signal ends the process; afterwards the first begins the drain and the second ends it.
class SignalWatcher {
 public:
  SignalWatcher() {
    sigemptyset(&signals_);
    sigaddset(&signals_, SIGINT);
    sigaddset(&signals_, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
    std::signal(SIGPIPE, SIG_IGN);
    std::thread([this] { Run(); }).detach();  // ends with the process
  }

  void Loaded() {
    std::lock_guard lock(mutex_);
    loaded_ = true;
  }

  int WaitForFirst() {
    std::unique_lock lock(mutex_);
    came_.wait(lock, [this] { return first_ != 0; });
    return first_;
  }

 private:
  [[noreturn]] void Run() {
    while (true) {
      int signal = 0;
      sigwait(&signals_, &signal);
      std::lock_guard lock(mutex_);
      if (!loaded_ || first_ != 0) {
        spdlog::warn("signal {}{}: ending at once", signal, loaded_ ? ", the second" : " while loading");
        std::_Exit(128 + signal);
      }
      first_ = signal;
      came_.notify_one();
    }
  }

  sigset_t signals_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable came_;
  bool loaded_ = false;
  int first_ = 0;
};

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

}  // namespace

absl::Status Serve(std::span<const std::string> args) {
  auto config = ParseServerConfig(args);
  if (!config.ok()) return config.status();
  static auto* const signals = new SignalWatcher;  // never destroyed: its thread runs to the end of the process
  SetUpLogging(config->operations);
  fmt::print("linspec {}\n", kVersion);
  std::fflush(stdout);
  auto server = Server::Start(*config, LoadParts);
  if (!server.ok()) return server.status();
  signals->Loaded();
  PrintReady(*config, &(*server)->service(), (*server)->http_port(), (*server)->grpc_port());

  const int signal = signals->WaitForFirst();
  spdlog::info("signal {}: draining for at most {} s", signal, config->operations.drain_timeout_s);
  (*server)->StopAdmitting();
  (*server)->Drain();
  spdlog::info("drained; bye");
  return absl::OkStatus();
}

}  // namespace linspec
