#include "tests/front_door/grpc_load.h"

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "linspec/v1/linspec.grpc.pb.h"

namespace linspec::front_door {
namespace {

constexpr int kChannels = 4;

struct Shared {
  std::function<void(int, const std::string&)> on_text;
  std::mutex mutex;  // guards on_text's calls and open
  std::condition_variable done;
  int open = 0;
};

class Stream : public grpc::ClientReadReactor<v1::GenerateResponse> {
 public:
  Stream(v1::LinSpec::Stub* stub, int id, int max_tokens, Shared* shared) : id_(id), shared_(shared) {
    request_.set_text("Once upon a time");
    request_.mutable_sampling()->set_temperature(0);
    request_.mutable_stopping()->set_max_tokens(max_tokens);
    request_.mutable_stopping()->set_ignore_eos(true);
    stub->async()->Generate(&context_, &request_, this);
    StartRead(&response_);
    StartCall();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    {
      std::lock_guard lock(shared_->mutex);
      shared_->on_text(id_, response_.text());
    }
    StartRead(&response_);
  }

  void OnDone(const grpc::Status& status) override {
    if (!status.ok()) {
      std::fprintf(stderr, "stream failed: %s\n", status.error_message().c_str());
      std::exit(1);
    }
    std::lock_guard lock(shared_->mutex);
    if (--shared_->open == 0) shared_->done.notify_all();
  }

 private:
  const int id_;
  Shared* const shared_;
  grpc::ClientContext context_;
  v1::GenerateRequest request_;
  v1::GenerateResponse response_;
};

}  // namespace

void RunGrpcStreams(int port, int streams, int max_tokens,
                    std::function<void(int stream, const std::string& text)> on_text) {
  std::vector<std::unique_ptr<v1::LinSpec::Stub>> stubs;
  for (int i = 0; i < kChannels; ++i) {
    grpc::ChannelArguments arguments;
    arguments.SetInt("channel", i);  // distinct arguments: distinct connections
    stubs.push_back(v1::LinSpec::NewStub(
        grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(port), grpc::InsecureChannelCredentials(), arguments)));
  }
  Shared shared;
  shared.on_text = std::move(on_text);
  shared.open = streams;
  std::vector<std::unique_ptr<Stream>> calls;
  for (int i = 0; i < streams; ++i) {
    calls.push_back(std::make_unique<Stream>(stubs[i % kChannels].get(), i, max_tokens, &shared));
  }
  std::unique_lock lock(shared.mutex);
  shared.done.wait(lock, [&] { return shared.open == 0; });
}

}  // namespace linspec::front_door
