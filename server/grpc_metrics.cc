#include "server/grpc_metrics.h"

#include <array>
#include <string_view>

#include "linspec/v1/linspec.grpc.pb.h"

namespace linspec {
namespace {

using grpc::experimental::InterceptionHookPoints;
using grpc::experimental::InterceptorBatchMethods;
using grpc::experimental::ServerRpcInfo;

constexpr std::array kCodes = {
    "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED"};

// Reports once, when the call is over: with the status sent, or CANCELLED when it never was.
class RpcMetricsInterceptor : public grpc::experimental::Interceptor {
 public:
  RpcMetricsInterceptor(std::string method, Metrics* metrics) : method_(std::move(method)), metrics_(metrics) {}
  ~RpcMetricsInterceptor() override {
    metrics_->OnRpc(method_, code_, std::chrono::duration<double>(Clock::now() - start_).count());
  }

  void Intercept(InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_STATUS)) {
      const auto code = static_cast<size_t>(methods->GetSendStatus().error_code());
      code_ = code < kCodes.size() ? kCodes[code] : "UNKNOWN";
    }
    methods->Proceed();
  }

 private:
  const std::string method_;
  Metrics* const metrics_;
  const Clock::time_point start_ = Clock::now();
  const char* code_ = "CANCELLED";
};

class Factory : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit Factory(Metrics* metrics) : metrics_(metrics) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(ServerRpcInfo* info) override {
    const std::string_view path = info->method();  // "/linspec.v1.LinSpec/Generate"
    const std::string_view service = v1::LinSpec::service_full_name();
    if (path.size() < service.size() + 2 || path.substr(1, service.size()) != service) return nullptr;
    return new RpcMetricsInterceptor(std::string(path.substr(service.size() + 2)), metrics_);
  }

 private:
  Metrics* const metrics_;
};

}  // namespace

std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> RpcMetricsInterceptors(
    Metrics* metrics) {
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> factories;
  factories.push_back(std::make_unique<Factory>(metrics));
  return factories;
}

}  // namespace linspec
