#include "server/grpc_metrics.h"

#include <array>
#include <chrono>
#include <cstddef>

namespace linspec {
namespace {

constexpr std::array kCodes = {
    "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED"};

}  // namespace

RpcMetrics::~RpcMetrics() {
  metrics_->OnRpc(method_, code_, std::chrono::duration<double>(Clock::now() - start_).count());
}

void RpcMetrics::Sends(const grpc::Status& status) {
  const auto code = static_cast<size_t>(status.error_code());
  code_ = code < kCodes.size() ? kCodes[code] : "UNKNOWN";
}

}  // namespace linspec
