#include "server/grpc_service.h"

#include <fmt/format.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

#include "linspec/v1/linspec.grpc.pb.h"
#include "server/errors.h"
#include "server/grpc_convert.h"
#include "server/grpc_metrics.h"
#include "server/json_text.h"
#include "server/model_files.h"

namespace linspec {
namespace {

constexpr char kServiceName[] = "linspec.v1.LinSpec";

// A thread between engine and gRPC: starting a write may touch the socket, which the engine must never wait for.
class Pump {
 public:
  Pump() : thread_([this] { Run(); }) {}
  ~Pump() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }
  void Post(std::function<void()> work) {
    {
      std::lock_guard lock(mutex_);
      work_.push_back(std::move(work));
    }
    wake_.notify_one();
  }

 private:
  void Run() {
    std::unique_lock lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return stopping_ || !work_.empty(); });
      if (work_.empty()) return;
      std::function<void()> work = std::move(work_.front());
      work_.pop_front();
      lock.unlock();
      work();
      lock.lock();
    }
  }

  std::mutex mutex_;  // guards work_ and stopping_
  std::condition_variable wake_;
  std::deque<std::function<void()>> work_;
  bool stopping_ = false;
  std::thread thread_;  // last: runs as soon as it exists
};

absl::StatusOr<std::string> CheckKey(const grpc::CallbackServerContext& context, Authenticator* auth) {
  const auto found = context.client_metadata().find("authorization");
  if (found == context.client_metadata().end()) return auth->Check("");
  return auth->Check(std::string_view(found->second.data(), found->second.size()));
}

// One Generate stream. Lives until gRPC says OnDone; the engine's notify holds it weakly.
class GenerateReactor : public grpc::ServerWriteReactor<v1::GenerateResponse>,
                        public std::enable_shared_from_this<GenerateReactor> {
 public:
  static GenerateReactor* Start(grpc::CallbackServerContext* context, const v1::GenerateRequest& request,
                                Service* service, Authenticator* auth, Pump* pump) {
    auto reactor = std::make_shared<GenerateReactor>(context, service);
    reactor->self_ = reactor;
    GenerateReactor* raw = reactor.get();
    if (absl::Status status = reactor->Begin(request, auth, pump); !status.ok()) {
      service->log().Write(LogLevel::kInfo, "request refused",
                           {{"request_id", request.request_id()},
                            {"handler", "Generate"},
                            {"status", absl::StatusCodeToString(status.code())},
                            {"param", ErrorField(status)}});
      reactor->finishing_ = true;
      reactor->Finish(ToGrpcStatus(status));
    }
    return raw;
  }

  GenerateReactor(grpc::CallbackServerContext* context, Service* service) : context_(context), service_(service) {}

  void OnWriteDone(bool ok) override {
    const auto keep = shared_from_this();
    {
      std::lock_guard lock(mutex_);
      busy_ = false;
      service_->metrics().OnWrite(std::chrono::duration<double>(Clock::now() - write_start_).count());
      if (!ok) request_.reset();
    }
    Advance();
  }

  void OnCancel() override {
    const auto keep = shared_from_this();
    {
      std::lock_guard lock(mutex_);
      request_.reset();  // gives the slot back now, not when the stream is torn down
    }
    Advance();
  }

  void OnDone() override { self_.reset(); }

 private:
  absl::Status Begin(const v1::GenerateRequest& request, Authenticator* auth, Pump* pump) {
    auto tenant = CheckKey(*context_, auth);
    if (!tenant.ok()) return tenant.status();
    if (absl::Status status = service_->CheckAdmission(request.ByteSizeLong(), *tenant); !status.ok()) return status;
    if (absl::Status status = service_->CheckModelName(request.model()); !status.ok()) return status;
    auto spec = SpecFromProto(request);
    if (!spec.ok()) return spec.status();
    auto prompt = PromptFromProto(request);
    if (!prompt.ok()) return prompt.status();
    auto tokens = service_->ToTokens(*prompt);
    if (!tokens.ok()) return tokens.status();
    spec->tenant = *tenant;
    spec->log_id = request.request_id();
    const auto deadline = context_->deadline();
    if (deadline != std::chrono::system_clock::time_point::max()) {
      spec->deadline =
          Clock::now() + std::chrono::duration_cast<Clock::duration>(deadline - std::chrono::system_clock::now());
    }
    shape_ = {.token_ids = request.response().token_ids() || request.response().skip_text(),
              .logprobs = spec->sampling.logprobs >= 0};
    auto running = service_->Start(*std::move(tokens), *std::move(spec));
    if (!running.ok()) return running.status();
    request_id_ = request.request_id().empty() ? std::to_string((*running)->id()) : request.request_id();
    RunningRequest* raw = running->get();
    {
      std::lock_guard lock(mutex_);
      request_ = *std::move(running);
    }
    raw->SetNotify([weak = weak_from_this(), pump] {
      pump->Post([weak] {
        if (auto self = weak.lock()) self->Advance();
      });
    });
    return absl::OkStatus();
  }

  // Starts the next write, or ends the stream. gRPC may run OnWriteDone inside StartWrite, so no lock is held there.
  void Advance() {
    grpc::Status end = grpc::Status::OK;
    bool write = false;
    {
      std::lock_guard lock(mutex_);
      if (finishing_) return;
      if (busy_) {  // a reader that fell behind by a whole buffer gets no more
        if (request_ != nullptr && request_->overflowed()) context_->TryCancel();
        return;
      }
      if (request_ == nullptr) {
        finishing_ = true;
        end = grpc::Status(grpc::StatusCode::CANCELLED, "cancelled");
      } else {
        const StreamDelta delta = request_->Take();
        if (delta.empty()) return;
        response_.Clear();
        response_.set_request_id(request_id_);
        FillResponse(delta, shape_, service_->tokenizer(), &response_);
        finishing_ = delta.finish_reason != FinishReason::kNone;
        if (finishing_) end = EndStatus(delta);
        write = !finishing_ || end.ok();
        busy_ = write;
        write_start_ = Clock::now();
      }
    }
    if (!write) return Finish(end);
    if (finishing_) return StartWriteAndFinish(&response_, grpc::WriteOptions(), end);
    StartWrite(&response_);
  }

  // REQUIRES: mutex_ held.
  grpc::Status EndStatus(const StreamDelta& delta) {
    const StreamUsage& usage = request_->usage();
    v1::Usage* out = response_.mutable_usage();
    out->set_prompt_tokens(usage.prompt_tokens);
    out->set_completion_tokens(usage.completion_tokens);
    out->set_draft_tokens(usage.draft_tokens);
    out->set_accepted_draft_tokens(usage.accepted_tokens);
    out->set_verify_steps(usage.verify_steps);
    switch (delta.finish_reason) {
      case FinishReason::kCancelled:
        if (request_->overflowed()) {
          return ToGrpcStatus(
              absl::ResourceExhaustedError("the client did not read its stream (--stream-buffer-bytes)"));
        }
        return service_->draining() ? ToGrpcStatus(absl::UnavailableError("the server is shutting down"))
                                    : ToGrpcStatus(absl::AbortedError("aborted"));
      case FinishReason::kDeadline:
        return ToGrpcStatus(absl::DeadlineExceededError("the deadline passed"));
      case FinishReason::kError:
        return ToGrpcStatus(delta.status.ok() ? absl::InternalError("generation failed") : delta.status);
      default:
        return grpc::Status::OK;
    }
  }

  grpc::CallbackServerContext* const context_;
  Service* const service_;
  std::shared_ptr<GenerateReactor> self_;
  std::string request_id_;
  ResponseShape shape_;
  v1::GenerateResponse response_;  // gRPC's while busy_
  std::mutex mutex_;               // guards the rest
  std::unique_ptr<RunningRequest> request_;
  bool busy_ = false, finishing_ = false;
  Clock::time_point write_start_;
};

class LinSpecService final : public v1::LinSpec::CallbackService {
 public:
  LinSpecService(linspec::Service* service, Authenticator* auth) : service_(service), auth_(auth) {}

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext* context,
                                                           const v1::GenerateRequest* request) override {
    return GenerateReactor::Start(context, *request, service_, auth_, &pump_);
  }

  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context, const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override {
    return Unary(context, [&](const std::string&) { return DoTokenize(*request, response); });
  }

  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context, const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override {
    return Unary(context, [&](const std::string&) -> absl::Status {
      const std::vector<int32_t> ids(request->token_ids().begin(), request->token_ids().end());
      auto text = service_->tokenizer().Decode(ids, request->skip_special_tokens());
      if (!text.ok()) return FieldError("token_ids", std::string(text.status().message()));
      response->set_text(ToUtf8(*text));
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context, const v1::GetModelRequest*,
                                     v1::GetModelResponse* response) override {
    return Unary(context, [&](const std::string&) {
      const ModelConfig& model = service_->engine().model_config();
      const auto& limits = service_->config().engine;
      response->set_name(service_->model_name());
      response->set_parameters(model.NumParameters());
      response->set_vocab_size(model.vocab_size);
      response->set_hidden_size(model.hidden_size);
      response->set_num_layers(model.num_layers);
      response->set_group_size(model.linear_attention.group_size);
      response->set_state_bytes_per_request(model.StateBytes());
      response->set_max_requests(service_->engine().options().max_requests);
      response->set_max_prompt_tokens(limits.max_prompt_tokens);
      response->set_max_output_tokens(limits.max_output_tokens);
      for (const std::string& drafter : service_->drafters()) response->add_drafters(drafter);
      response->set_version(kVersion);
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const v1::AbortRequest* request,
                                  v1::AbortResponse*) override {
    return Unary(context, [&](const std::string& tenant) { return service_->Abort(request->request_id(), tenant); });
  }

  grpc::ServerUnaryReactor* GetStats(grpc::CallbackServerContext* context, const v1::GetStatsRequest*,
                                     v1::GetStatsResponse* response) override {
    return Unary(context, [&](const std::string&) {
      const EngineStats stats = service_->engine().stats();
      response->set_slots_total(stats.slots_total);
      response->set_slots_free(stats.slots_free);
      response->set_requests_running(stats.num_running);
      response->set_requests_waiting(stats.num_waiting);
      response->set_prompt_tokens_waiting(stats.waiting_tokens);
      response->set_requests_finished(stats.requests_finished);
      response->set_output_tokens(stats.output_tokens);
      response->set_engine_steps(stats.steps);
      response->set_speculation_on(stats.speculation_on);
      return absl::OkStatus();
    });
  }

 private:
  template <class Work>
  grpc::ServerUnaryReactor* Unary(grpc::CallbackServerContext* context, Work work) {
    auto tenant = CheckKey(*context, auth_);
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(ToGrpcStatus(tenant.ok() ? work(*tenant) : tenant.status()));
    return reactor;
  }

  absl::Status DoTokenize(const v1::TokenizeRequest& request, v1::TokenizeResponse* response) const {
    absl::StatusOr<std::vector<int32_t>> tokens;
    switch (request.input_case()) {
      case v1::TokenizeRequest::kText:
        tokens = service_->tokenizer().Encode(
            request.text(), {.add_special_tokens = !request.has_add_special_tokens() || request.add_special_tokens()});
        break;
      case v1::TokenizeRequest::kChat:
        tokens = service_->ToTokens(MessagesFromProto(request.chat()));
        break;
      default:
        return FieldError("input", "is required: text or chat");
    }
    if (!tokens.ok()) return tokens.status();
    response->mutable_token_ids()->Add(tokens->begin(), tokens->end());
    for (const int32_t id : *tokens) response->add_tokens(ToUtf8(service_->tokenizer().TokenBytes(id)));
    return absl::OkStatus();
  }

  linspec::Service* const service_;  // not the generated base class
  Authenticator* const auth_;
  Pump pump_;
};

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> Credentials(const ServerConfig::SecurityOptions& security) {
  if (security.tls_cert.empty()) return grpc::InsecureServerCredentials();
  auto cert = ReadFile(security.tls_cert);
  if (!cert.ok())
    return absl::InvalidArgumentError(fmt::format("--tls-cert: {}", std::string(cert.status().message())));
  auto key = ReadFile(security.tls_key);
  if (!key.ok()) return absl::InvalidArgumentError(fmt::format("--tls-key: {}", std::string(key.status().message())));
  grpc::SslServerCredentialsOptions options;
  options.pem_key_cert_pairs.push_back({*key, *cert});
  if (!security.tls_client_ca.empty()) {
    auto ca = ReadFile(security.tls_client_ca);
    if (!ca.ok())
      return absl::InvalidArgumentError(fmt::format("--tls-client-ca: {}", std::string(ca.status().message())));
    options.pem_root_certs = *ca;
    options.client_certificate_request = GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
  }
  return grpc::SslServerCredentials(options);
}

void SetLimits(const ServerConfig& config, grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(static_cast<int>(config.network.max_body_bytes));
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a second server on the port is an error, not a lottery
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, static_cast<int>(config.network.max_header_bytes));
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, 4096);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 60000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20000);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10000);
}

}  // namespace

struct GrpcFrontEnd::Impl {
  Impl(Service* service, Authenticator* auth) : calls(service, auth) {}
  LinSpecService calls;
  std::unique_ptr<grpc::Server> server;
  int port = 0;
};

GrpcFrontEnd::GrpcFrontEnd(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
GrpcFrontEnd::~GrpcFrontEnd() { Stop(0); }

absl::StatusOr<std::unique_ptr<GrpcFrontEnd>> GrpcFrontEnd::Start(Service* service, Authenticator* auth) {
  const ServerConfig& config = service->config();
  if (config.network.grpc_port < 0) return std::unique_ptr<GrpcFrontEnd>();
  auto credentials = Credentials(config.security);
  if (!credentials.ok()) return credentials.status();
  grpc::EnableDefaultHealthCheckService(true);
  // Reflection has no place to check a key, so with keys there is none.
  if (!auth->enabled()) grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  auto impl = std::make_unique<Impl>(service, auth);
  const std::string address = fmt::format("{}:{}", config.network.host, config.network.grpc_port);
  grpc::ServerBuilder builder;
  SetLimits(config, &builder);
  builder.experimental().SetInterceptorCreators(RpcMetricsInterceptors(&service->metrics()));
  builder.AddListeningPort(address, *credentials, &impl->port);
  builder.RegisterService(&impl->calls);
  impl->server = builder.BuildAndStart();
  if (impl->server == nullptr || impl->port == 0) {
    return absl::FailedPreconditionError(
        fmt::format("cannot listen on {} for gRPC; choose another port with --grpc-port, or "
                    "stop what uses it (ss -ltnp)",
                    address));
  }
  std::unique_ptr<GrpcFrontEnd> front(new GrpcFrontEnd(std::move(impl)));
  front->SetServing(true);
  return front;
}

int GrpcFrontEnd::port() const { return impl_->port; }

void GrpcFrontEnd::SetServing(bool serving) {
  auto* health = impl_->server->GetHealthCheckService();
  health->SetServingStatus(serving);
  health->SetServingStatus(kServiceName, serving);
}

void GrpcFrontEnd::Stop(double grace_s) {
  if (impl_->server == nullptr) return;
  impl_->server->Shutdown(std::chrono::system_clock::now() +
                          std::chrono::milliseconds(static_cast<int64_t>(grace_s * 1000)));
  impl_->server.reset();
}

}  // namespace linspec
