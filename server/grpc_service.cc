#include "server/grpc_service.h"

#include <fmt/format.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <chrono>

#include "linspec/v1/linspec.grpc.pb.h"
#include "server/errors.h"
#include "server/grpc_convert.h"
#include "server/grpc_generate.h"
#include "server/grpc_metrics.h"
#include "server/json_text.h"
#include "server/model_files.h"

namespace linspec {
namespace {

constexpr char kServiceName[] = "linspec.v1.LinSpec";

using RawService = v1::LinSpec::WithRawCallbackMethod_Generate<v1::LinSpec::WithRawCallbackMethod_Tokenize<
    v1::LinSpec::WithRawCallbackMethod_Detokenize<v1::LinSpec::WithRawCallbackMethod_GetModel<
        v1::LinSpec::WithRawCallbackMethod_Abort<v1::LinSpec::WithRawCallbackMethod_GetStats<v1::LinSpec::Service>>>>>>;

// Raw: messages are parsed here, so that one that is none gets an answer of ours.
class LinSpecService final : public RawService {
 public:
  using Bytes = grpc::ByteBuffer;
  using Context = grpc::CallbackServerContext;

  LinSpecService(linspec::Service* service, Authenticator* auth) : service_(service), auth_(auth) {}
  const std::shared_ptr<Pump>& pump() const { return pump_; }

  grpc::ServerWriteReactor<Bytes>* Generate(Context* context, const Bytes* request) override {
    return StartGenerate(context, *request, service_, auth_, pump_.get());
  }

  grpc::ServerUnaryReactor* Tokenize(Context* context, const Bytes* request, Bytes* response) override {
    return Unary<v1::TokenizeRequest, v1::TokenizeResponse>(
        "Tokenize", context, *request, response,
        [this](const std::string&, const auto& in, auto* out) { return DoTokenize(in, out); });
  }

  grpc::ServerUnaryReactor* Detokenize(Context* context, const Bytes* request, Bytes* response) override {
    return Unary<v1::DetokenizeRequest, v1::DetokenizeResponse>(
        "Detokenize", context, *request, response,
        [this](const std::string&, const auto& in, auto* out) { return DoDetokenize(in, out); });
  }

  grpc::ServerUnaryReactor* GetModel(Context* context, const Bytes* request, Bytes* response) override {
    return Unary<v1::GetModelRequest, v1::GetModelResponse>("GetModel", context, *request, response,
                                                            [this](const std::string&, const auto&, auto* out) {
                                                              FillModel(out);
                                                              return absl::OkStatus();
                                                            });
  }

  grpc::ServerUnaryReactor* Abort(Context* context, const Bytes* request, Bytes* response) override {
    return Unary<v1::AbortRequest, v1::AbortResponse>(
        "Abort", context, *request, response,
        [this](const std::string& tenant, const auto& in, auto*) { return service_->Abort(in.request_id(), tenant); });
  }

  grpc::ServerUnaryReactor* GetStats(Context* context, const Bytes* request, Bytes* response) override {
    return Unary<v1::GetStatsRequest, v1::GetStatsResponse>("GetStats", context, *request, response,
                                                            [this](const std::string&, const auto&, auto* out) {
                                                              FillStats(out);
                                                              return absl::OkStatus();
                                                            });
  }

 private:
  template <class Request, class Response, class Work>
  grpc::ServerUnaryReactor* Unary(const char* method, Context* context, const Bytes& bytes, Bytes* response,
                                  Work work) {
    RpcMetrics rpc(method, &service_->metrics());
    const auto answer = [&]() -> absl::Status {
      auto tenant = CheckGrpcKey(*context, auth_);
      if (!tenant.ok()) return tenant.status();
      Request in;
      if (absl::Status status = ParseMessage(bytes, &in); !status.ok()) return status;
      Response out;
      if (absl::Status status = work(*tenant, in, &out); !status.ok()) return status;
      bool own = false;
      grpc::SerializationTraits<Response>::Serialize(out, response, &own);
      return absl::OkStatus();
    };
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    const grpc::Status end = ToGrpcStatus(answer());
    rpc.Sends(end);
    reactor->Finish(end);
    return reactor;
  }

  void FillModel(v1::GetModelResponse* out) const {
    const ModelConfig& model = service_->engine().model_config();
    const auto& limits = service_->config().engine;
    out->set_name(service_->model_name());
    out->set_parameters(model.NumParameters());
    out->set_vocab_size(model.vocab_size);
    out->set_hidden_size(model.hidden_size);
    out->set_num_layers(model.num_layers);
    out->set_group_size(model.linear_attention.group_size);
    const EngineStats stats = service_->engine().stats();
    out->set_state_bytes_per_request(stats.bytes_per_slot);
    out->set_state_dtype(DTypeName(stats.state_dtype));
    out->set_max_requests(service_->engine().options().max_requests);
    out->set_max_prompt_tokens(limits.max_prompt_tokens);
    out->set_max_output_tokens(limits.max_output_tokens);
    for (const std::string& drafter : service_->drafters()) out->add_drafters(drafter);
    out->set_version(kVersion);
    const SamplingDefaults& defaults = service_->generation().sampling;
    v1::SamplingParameters* sampling = out->mutable_default_sampling();
    sampling->set_temperature(defaults.temperature);
    sampling->set_top_p(defaults.top_p);
    sampling->set_top_k(defaults.top_k);
    sampling->set_min_p(defaults.min_p);
    sampling->set_repetition_penalty(defaults.repetition_penalty);
    out->set_default_chat_tokens(service_->call_limits().default_chat_tokens);
  }

  void FillStats(v1::GetStatsResponse* out) const {
    const EngineStats stats = service_->engine().stats();
    out->set_slots_total(stats.slots_total);
    out->set_slots_free(stats.slots_free);
    out->set_requests_running(stats.num_running);
    out->set_requests_waiting(stats.num_waiting);
    out->set_prompt_tokens_waiting(stats.waiting_tokens);
    out->set_requests_finished(stats.requests_finished);
    out->set_output_tokens(stats.output_tokens);
    out->set_engine_steps(stats.steps);
    out->set_speculation_on(stats.speculation_on);
    out->set_prefix_cache_entries(stats.prefix_cache_entries);
    out->set_can_generate(service_->can_generate());
  }

  absl::Status DoDetokenize(const v1::DetokenizeRequest& request, v1::DetokenizeResponse* response) const {
    if (absl::Status status = service_->CheckModelName(request.model()); !status.ok()) return status;
    const std::vector<int32_t> ids(request.token_ids().begin(), request.token_ids().end());
    auto text = service_->tokenizer().Decode(ids, request.skip_special_tokens());
    if (!text.ok()) return FieldError("token_ids", std::string(text.status().message()));
    response->set_text(ToUtf8(*text));
    return absl::OkStatus();
  }

  absl::Status DoTokenize(const v1::TokenizeRequest& request, v1::TokenizeResponse* response) const {
    if (absl::Status status = service_->CheckModelName(request.model()); !status.ok()) return status;
    absl::StatusOr<std::vector<int32_t>> tokens;
    switch (request.input_case()) {
      case v1::TokenizeRequest::kText:
        tokens = service_->tokenizer().Encode(
            request.text(), {.add_special_tokens = !request.has_add_special_tokens() || request.add_special_tokens()});
        break;
      case v1::TokenizeRequest::kChat: {
        auto messages = MessagesFromProto(request.chat(), service_->call_limits());
        if (!messages.ok()) return messages.status();
        tokens = service_->ToTokens(*std::move(messages));
        break;
      }
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
  const std::shared_ptr<Pump> pump_ = std::make_shared<Pump>();
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
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, config.network.max_grpc_streams);
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

std::function<void()> GrpcFrontEnd::waker() const {
  return [pump = impl_->calls.pump()] { pump->Wake(); };
}

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
