// The gRPC front end: linspec.v1, grpc.health.v1 and reflection on the callback API.
//
// Threads: gRPC's own. A stream's reactor is driven by gRPC and by the engine's notify; it holds a lock of its own
// for the
// hand-over and never blocks the engine on the network.
#pragma once

#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "server/auth.h"
#include "server/service.h"

namespace linspec {

class GrpcFrontEnd {
 public:
  // Null when --grpc-port is -1. Errors name the address and say what to do.
  static absl::StatusOr<std::unique_ptr<GrpcFrontEnd>> Start(Service* service, Authenticator* auth);
  ~GrpcFrontEnd();  // Stop(0)

  int port() const;
  // Has news from the engine written that came since the last time. From any thread; outlives the front end.
  std::function<void()> waker() const;
  void SetServing(bool serving);  // health.v1, of the server and of linspec.v1.LinSpec
  // Refuses new calls, lets running ones end for at most grace_s, then cancels them.
  void Stop(double grace_s);

 private:
  struct Impl;
  explicit GrpcFrontEnd(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace linspec
