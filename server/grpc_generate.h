// The reactor behind Generate: one call's choices become one stream of messages. A private part of grpc_service.cc in a
// file of its own.
//
// Threads: gRPC's, and the pump's. A reactor has a lock of its own for the hand-over, held over no gRPC call.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "linspec/v1/linspec.grpc.pb.h"
#include "server/auth.h"
#include "server/service.h"

namespace linspec {

// A thread between engine and gRPC: starting a write may touch the socket, which the engine must never wait for.
class Pump {
 public:
  Pump() : thread_([this] { Run(); }) {}
  ~Pump();
  void Post(std::function<void()> work);  // any thread

 private:
  void Run();

  std::mutex mutex_;  // guards work_ and stopping_
  std::condition_variable wake_;
  std::deque<std::function<void()>> work_;
  bool stopping_ = false;
  std::thread thread_;  // last: runs as soon as it exists
};

// The tenant of a call by its authorization metadata; as Authenticator::Check.
absl::StatusOr<std::string> CheckGrpcKey(const grpc::CallbackServerContext& context, Authenticator* auth);

// The reactor owns itself until gRPC says OnDone; the rest must outlive it.
grpc::ServerWriteReactor<v1::GenerateResponse>* StartGenerate(grpc::CallbackServerContext* context,
                                                              const v1::GenerateRequest& request, Service* service,
                                                              Authenticator* auth, Pump* pump);

}  // namespace linspec
