// Counts one gRPC call of our service by method and status code, and times it. Health checks and reflection are not
// counted. No interceptor does it: with one, gRPC takes every write of a stream through its completion queue twice.
//
// Threads: one at a time.
#pragma once

#include <grpcpp/grpcpp.h>

#include "scheduler/request.h"
#include "server/metrics.h"

namespace linspec {

class RpcMetrics {
 public:
  // method: one of our service's, a literal. metrics must outlive this.
  RpcMetrics(const char* method, Metrics* metrics) : method_(method), metrics_(metrics) {}
  ~RpcMetrics();  // reports
  RpcMetrics(const RpcMetrics&) = delete;

  void Sends(const grpc::Status& status);  // the call's end; CANCELLED if it never comes

 private:
  const char* const method_;
  Metrics* const metrics_;
  const Clock::time_point start_ = Clock::now();
  const char* code_ = "CANCELLED";
};

}  // namespace linspec
