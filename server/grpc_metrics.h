// Counts every gRPC call of our service by method and status code, and times it.
#pragma once

#include <grpcpp/support/server_interceptor.h>

#include <memory>
#include <vector>

#include "server/metrics.h"

namespace linspec {

// For ServerBuilder; metrics must outlive the server. Health checks and reflection are not counted, and a method that our
// service does not have is no label.
std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> RpcMetricsInterceptors(
    Metrics* metrics);

}  // namespace linspec
