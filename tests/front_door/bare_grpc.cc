#include <grpcpp/grpcpp.h>

#include <atomic>
#include <mutex>
#include <set>
#include <thread>

#include "linspec/v1/linspec.grpc.pb.h"
#include "tests/front_door/bare_servers.h"

namespace linspec::front_door {
namespace {

class Writer;

struct Hub {
  std::mutex mutex;  // guards writers
  std::set<Writer*> writers;
  bool paced = false;
  int num_tokens = 0;
};

class Writer : public grpc::ServerWriteReactor<v1::GenerateResponse> {
 public:
  explicit Writer(Hub* hub) : hub_(hub) {
    response_.set_request_id("0123456789abcdef0123456789abcdef");
    if (!hub_->paced) {
      Write(0);
      return;
    }
    std::lock_guard lock(hub_->mutex);
    hub_->writers.insert(this);
  }

  // REQUIRES: hub mutex held. False: it has ended.
  bool Tick(int step) {
    if (sent_ < hub_->num_tokens) {
      if (!writing_.exchange(true)) Write(step);
      return true;
    }
    Finish(grpc::Status::OK);
    return false;
  }

  // gRPC may run this inside StartWrite, so the hub is not touched here.
  void OnWriteDone(bool ok) override {
    sent_ = ok ? sent_ + 1 : hub_->num_tokens;
    writing_ = false;
    if (hub_->paced) return;
    sent_ < hub_->num_tokens ? Write(sent_) : Finish(grpc::Status::OK);
  }

  void OnDone() override { delete this; }

 private:
  void Write(int step) {
    response_.set_text(TokenText(step));
    StartWrite(&response_);
  }

  Hub* const hub_;
  v1::GenerateResponse response_;
  std::atomic<bool> writing_ = false;
  std::atomic<int> sent_ = 0;
};

class BareService : public v1::LinSpec::CallbackService {
 public:
  explicit BareService(Hub* hub) : hub_(hub) {}
  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext*,
                                                           const v1::GenerateRequest*) override {
    return new Writer(hub_);
  }

 private:
  Hub* const hub_;
};

}  // namespace

void RunBareGrpc(std::chrono::microseconds pace, int num_tokens, SharedState* shared) {
  Hub hub;
  hub.paced = pace.count() > 0;
  hub.num_tokens = num_tokens;
  BareService service(&hub);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const auto server = builder.BuildAndStart();
  shared->grpc_port = port;
  auto next = std::chrono::steady_clock::now();
  for (int step = 0; !shared->stop; ++step) {
    next += hub.paced ? pace : std::chrono::milliseconds(10);
    std::this_thread::sleep_until(next);
    if (!hub.paced) continue;
    shared->step_ns[step % kVocab] = NowNs();
    std::lock_guard lock(hub.mutex);
    std::erase_if(hub.writers, [step](Writer* writer) { return !writer->Tick(step); });
  }
  server->Shutdown(std::chrono::system_clock::now());
}

}  // namespace linspec::front_door
