#include "server/grpc_generate.h"

#include <chrono>
#include <memory>
#include <utility>

#include "server/candidates.h"
#include "server/grpc_convert.h"
#include "server/grpc_metrics.h"

namespace linspec {
namespace {

constexpr size_t kHeadStart = 16;  // enough that the pump does not catch up with the engine

// Lives until gRPC says OnDone; the engine's notify holds it weakly.
class GenerateReactor : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                        public std::enable_shared_from_this<GenerateReactor> {
 public:
  GenerateReactor(grpc::CallbackServerContext* context, Service* service)
      : context_(context), service_(service), rpc_("Generate", &service->metrics()) {}

  void Start(const grpc::ByteBuffer& request, Authenticator* auth, Pump* pump) {
    self_ = shared_from_this();
    const absl::Status status = Begin(request, auth, pump);
    if (status.ok()) return;
    service_->log().Write(LogLevel::kInfo, "request refused",
                          {{"request_id", request_id_},
                           {"handler", "Generate"},
                           {"status", absl::StatusCodeToString(status.code())},
                           {"param", ErrorField(status)}});
    const grpc::Status end = ToGrpcStatus(status);
    rpc_.Sends(end);
    Finish(end);  // Advance does nothing for a call that never started
  }

  void OnWriteDone(bool ok) override {
    const auto keep = shared_from_this();
    {
      std::lock_guard lock(mutex_);
      busy_ = false;
      service_->metrics().OnWrite(std::chrono::duration<double>(Clock::now() - write_start_).count());
      if (!ok) candidates_.reset();
      if (!missed_ && candidates_ != nullptr) return;  // nothing came meanwhile, and what comes tells
    }
    Advance();
  }

  void OnCancel() override {
    const auto keep = shared_from_this();
    {
      std::lock_guard lock(mutex_);
      cancelled_ = true;
      candidates_.reset();  // gives the slots back now, not when the stream is torn down
    }
    Advance();
  }

  void OnDone() override { self_.reset(); }

 private:
  absl::Status Begin(const grpc::ByteBuffer& bytes, Authenticator* auth, Pump* pump) {
    auto tenant = CheckGrpcKey(*context_, auth);
    if (!tenant.ok()) return tenant.status();
    if (absl::Status status = service_->CheckAdmission(*tenant); !status.ok()) return status;
    v1::GenerateRequest request;
    if (absl::Status status = ParseMessage(bytes, &request); !status.ok()) return status;
    auto call = CallFromProto(request, service_->call_limits());
    if (!call.ok()) return call.status();
    if (absl::Status status = service_->CheckModelName(call->model); !status.ok()) return status;
    if (call->name.empty()) call->name = NewRequestId();  // so that every call can be aborted by the id it is told
    call->tenant = *tenant;
    const auto deadline = context_->deadline();
    if (deadline != std::chrono::system_clock::time_point::max()) {
      call->deadline =
          Clock::now() + std::chrono::duration_cast<Clock::duration>(deadline - std::chrono::system_clock::now());
    }
    request_id_ = call->log_id = call->name;
    auto candidates = Candidates::Start(service_, *std::move(call), [weak = weak_from_this(), pump] {
      pump->Post([weak] {
        if (auto self = weak.lock()) self->Advance();
      });
    });
    if (!candidates.ok()) return candidates.status();
    {
      std::lock_guard lock(mutex_);
      started_ = true;
      if (!cancelled_) candidates_ = *std::move(candidates);
    }
    Advance();  // news may have come before there was anybody to take it
    return absl::OkStatus();
  }

  // Starts the next write, or ends the stream. gRPC may run OnWriteDone inside StartWrite, so no lock is held there.
  void Advance() {
    grpc::Status end = grpc::Status::OK;
    bool last = false, write = false;
    {
      std::lock_guard lock(mutex_);
      if (!started_ || finishing_) return;
      if (busy_) {
        missed_ = true;
        // A reader that fell behind by a whole buffer gets no more.
        if (candidates_ != nullptr && candidates_->overflowed()) context_->TryCancel();
        return;
      }
      if (candidates_ == nullptr) {
        last = true;
        end = grpc::Status(grpc::StatusCode::CANCELLED, "cancelled");
      } else {
        Choice choice;
        missed_ = candidates_->size() > 1;  // of several choices, others may have news too
        const absl::StatusOr<bool> more = candidates_->Next(&choice);
        if (more.ok() && !*more) return;
        write = more.ok();
        last = !write || candidates_->finished();
        write ? FillMessage(choice, last) : void(end = ToGrpcStatus(more.status()));
      }
      busy_ = write;
      write_start_ = Clock::now();
      finishing_ = last;
    }
    if (last) rpc_.Sends(end);
    if (!write) return Finish(end);
    if (last) return StartWriteAndFinish(&response_, grpc::WriteOptions(), end);
    StartWrite(&response_);
  }

  // REQUIRES: mutex_ held, candidates_ there, and not busy_.
  void FillMessage(const Choice& choice, bool last) {
    message_.Clear();
    message_.set_request_id(request_id_);
    FillResponse(choice, candidates_->call(), service_->tokenizer(), &message_);
    if (last) FillUsage(candidates_->usage(), message_.mutable_usage());
    response_.Clear();  // Serialize fills an empty buffer only
    bool own = false;
    grpc::SerializationTraits<v1::GenerateResponse>::Serialize(message_, &response_, &own);
  }

  grpc::CallbackServerContext* const context_;
  Service* const service_;
  RpcMetrics rpc_;
  std::shared_ptr<GenerateReactor> self_;
  std::string request_id_;
  grpc::ByteBuffer response_;  // gRPC's while busy_
  std::mutex mutex_;           // guards the rest
  std::unique_ptr<Candidates> candidates_;
  v1::GenerateResponse message_;  // its memory serves one message after the other
  bool started_ = false, cancelled_ = false, busy_ = false, finishing_ = false;
  bool missed_ = false;  // news came while busy_, or more may be waiting
  Clock::time_point write_start_;
};

}  // namespace

Pump::~Pump() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void Pump::Post(std::function<void()> work) {
  {
    std::lock_guard lock(mutex_);
    work_.push_back(std::move(work));
    if (work_.size() != kHeadStart) return;
  }
  wake_.notify_one();
}

void Pump::Wake() {
  {
    std::lock_guard lock(mutex_);
    if (work_.empty()) return;
  }
  wake_.notify_one();
}

void Pump::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait(lock, [this] { return stopping_ || !work_.empty(); });
    if (work_.empty()) return;
    std::vector<std::function<void()>> work = std::exchange(work_, {});
    lock.unlock();
    for (const std::function<void()>& run : work) run();
    work.clear();  // what it holds goes without the lock
    lock.lock();
  }
}

absl::StatusOr<std::string> CheckGrpcKey(const grpc::CallbackServerContext& context, Authenticator* auth) {
  const auto found = context.client_metadata().find("authorization");
  if (found == context.client_metadata().end()) return auth->Check("");
  return auth->Check(std::string_view(found->second.data(), found->second.size()));
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* StartGenerate(grpc::CallbackServerContext* context,
                                                          const grpc::ByteBuffer& request, Service* service,
                                                          Authenticator* auth, Pump* pump) {
  auto reactor = std::make_shared<GenerateReactor>(context, service);
  GenerateReactor* raw = reactor.get();
  raw->Start(request, auth, pump);
  return raw;
}

}  // namespace linspec
