#include <fmt/format.h>
#include <grpcpp/grpcpp.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>

#include "linspec/v1/linspec.grpc.pb.h"
#include "loadtest/client.h"
#include "loadtest/stream_meter.h"

namespace linspec::loadtest {
namespace {

namespace asio = boost::asio;

v1::GenerateRequest MakeRequest(const Target& target, const PlannedRequest& planned, const Options& options) {
  v1::GenerateRequest request;
  request.set_model(target.model);
  request.set_text(planned.prompt);
  request.mutable_sampling()->set_temperature(static_cast<float>(options.temperature));
  request.mutable_sampling()->set_top_p(static_cast<float>(options.top_p));
  request.mutable_stopping()->set_max_tokens(planned.max_tokens);
  request.mutable_stopping()->set_ignore_eos(options.ignore_eos);
  return request;
}

// Lives until gRPC says OnDone; the record then goes to the event loop.
class GrpcExchange : public grpc::ClientReadReactor<v1::GenerateResponse> {
 public:
  GrpcExchange(asio::io_context* loop, const PlannedRequest& planned, Done done)
      : loop_(loop),
        cancel_after_(planned.cancel_after_chunks),
        read_delay_ms_(planned.read_delay_ms),
        done_(std::move(done)),
        pause_(*loop),
        work_(loop->get_executor()) {}

  void Run(v1::LinSpec::Stub* stub, const v1::GenerateRequest& request, const Target& target, double timeout_s) {
    request_ = request;
    context_.set_deadline(std::chrono::system_clock::now() +
                          std::chrono::milliseconds(static_cast<int64_t>(timeout_s * 1000)));
    if (!target.bearer_token.empty()) context_.AddMetadata("authorization", "Bearer " + target.bearer_token);
    stub->async()->Generate(&context_, &request_, this);
    StartRead(&response_);
    StartCall();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (!response_.text().empty()) meter_.Chunk(response_.text());
    if (response_.has_usage()) {
      meter_.Usage(static_cast<int>(response_.usage().prompt_tokens()),
                   static_cast<int>(response_.usage().completion_tokens()));
    }
    if (cancel_after_ >= 0 && meter_.chunks() >= cancel_after_) {
      dropped_ = true;
      context_.TryCancel();
      return;
    }
    if (read_delay_ms_ == 0) return StartRead(&response_);
    AddHold();  // the next read starts from the event loop, outside gRPC's reactions
    pause_.expires_after(std::chrono::milliseconds(read_delay_ms_));
    pause_.async_wait([this](const boost::system::error_code&) {
      StartRead(&response_);
      RemoveHold();
    });
  }

  void OnDone(const grpc::Status& status) override {
    RequestRecord record =
        dropped_ ? meter_.Cancelled()
                 : meter_.Finish(status.ok() ? ""
                                             : fmt::format("gRPC {}: {}", static_cast<int>(status.error_code()),
                                                           status.error_message()));
    // Destroyed on the loop, where the timer lives.
    asio::post(*loop_, [this, record = std::move(record)]() mutable {
      done_(std::move(record));
      delete this;
    });
  }

 private:
  asio::io_context* loop_;
  int cancel_after_, read_delay_ms_;
  bool dropped_ = false;
  Done done_;
  asio::steady_timer pause_;
  asio::executor_work_guard<asio::io_context::executor_type> work_;  // the loop must outlast the call
  grpc::ClientContext context_;
  v1::GenerateRequest request_;
  v1::GenerateResponse response_;
  StreamMeter meter_;
};

std::shared_ptr<grpc::ChannelCredentials> Credentials(const Target& target) {
  if (target.tls == nullptr) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions options;
  options.pem_root_certs = target.tls->ca;
  options.pem_cert_chain = target.tls->cert;
  options.pem_private_key = target.tls->key;
  return grpc::SslCredentials(options);
}

class GrpcClient : public Client {
 public:
  GrpcClient(asio::io_context* loop, Target target, const Options* options)
      : loop_(loop), target_(std::move(target)), options_(options) {
    // Streams share a connection up to the server's limit, often 100 to a few thousand: spread them over several. A
    // pool of its own keeps gRPC from merging the channels again.
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    for (int i = 0; i < kChannels; ++i) {
      stubs_.push_back(v1::LinSpec::NewStub(grpc::CreateCustomChannel(fmt::format("{}:{}", target_.host, target_.port),
                                                                      Credentials(target_), arguments)));
    }
  }

  void Start(const PlannedRequest& planned, Done done) override {
    auto* exchange = new GrpcExchange(loop_, planned, std::move(done));
    exchange->Run(stubs_[next_++ % stubs_.size()].get(), MakeRequest(target_, planned, *options_), target_,
                  options_->timeout);
  }

 private:
  asio::io_context* loop_;
  Target target_;
  const Options* options_;
  static constexpr int kChannels = 4;
  std::vector<std::unique_ptr<v1::LinSpec::Stub>> stubs_;
  size_t next_ = 0;
};

}  // namespace

std::unique_ptr<Client> CreateGrpcClient(asio::io_context* loop, Target target, const Options* options) {
  return std::make_unique<GrpcClient>(loop, std::move(target), options);
}

}  // namespace linspec::loadtest
