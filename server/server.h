// A running server: service, probe and both front ends over parts that are loaded already. `linspec serve` is this plus
// signals; benchmarks run it over a model of their own.
//
// Threads: one owner; see design.md for those inside.
#pragma once

#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "server/auth.h"
#include "server/config.h"
#include "server/generation_probe.h"
#include "server/grpc_service.h"
#include "server/http_api.h"
#include "server/http_server.h"
#include "server/log.h"
#include "server/metrics.h"
#include "server/service.h"

namespace linspec {

using StepObserver = std::function<void(const StepStats&)>;
using PartsLoader = std::function<absl::StatusOr<Service::Parts>(const ServerConfig&, StepObserver)>;

class Server {
 public:
  // Loads, starts the engine, listens. The log must outlive the server. Errors name the flag.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerConfig& config, const PartsLoader& load, Log* log);
  ~Server();  // ends at once what still runs

  Service& service() { return *service_; }
  int http_port() const { return http_ ? http_->port() : 0; }  // 0: off
  int grpc_port() const { return grpc_ ? grpc_->port() : 0; }

  void StopAdmitting();  // readiness off, new requests refused
  // Waits for what runs, at most --drain-timeout; aborts the rest, says so to its clients, closes all connections.
  void Drain();

 private:
  explicit Server(Log* log) : log_(log) {}
  absl::Status Listen(const ServerConfig& config);
  void AddCollectors();

  Log* const log_;
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<Authenticator> auth_;
  std::unique_ptr<Service> service_;
  std::unique_ptr<GenerationProbe> probe_;
  std::unique_ptr<HttpApi> api_;
  std::unique_ptr<HttpServer> http_;
  std::unique_ptr<GrpcFrontEnd> grpc_;
};

}  // namespace linspec
