#include "server/generation_probe.h"

#include <utility>

namespace linspec {

GenerationProbe::GenerationProbe(Service* service, double interval_s) : service_(service), interval_(interval_s) {
  if (interval_s > 0) thread_ = std::thread([this] { Run(); });
}

GenerationProbe::~GenerationProbe() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  if (thread_.joinable()) thread_.join();
}

void GenerationProbe::Run() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    lock.unlock();
    if (!service_->draining()) {
      const bool ok = Look();
      if (!ok && service_->can_generate()) {
        service_->log().Write(LogLevel::kError, "no token came", {{"seconds_since_asking", interval_.count()}});
      }
      if (ok && !service_->can_generate()) service_->log().Write(LogLevel::kInfo, "tokens come again");
      service_->SetCanGenerate(ok);
    }
    lock.lock();
    wake_.wait_for(lock, interval_, [this] { return stopping_; });
  }
}

bool GenerationProbe::Look() {
  const int64_t output_tokens = service_->engine().stats().output_tokens;
  const bool came = std::exchange(output_tokens_, output_tokens) != output_tokens;
  const bool missed = std::exchange(asked_, !came) && !came;
  if (!came && !*outstanding_) Ask();  // another question would only wait behind the one that is out
  return came || (service_->can_generate() && !missed);
}

void GenerationProbe::Ask() {
  *outstanding_ = true;
  Request request;
  request.id = service_->NextId();
  request.prompt_tokens = {0};
  request.tenant = "probe";  // no key's name: its one request takes its turn before those of busy keys
  request.sampling.max_tokens = 1;
  request.sampling.temperature = 0;
  request.sampling.ignore_eos = true;
  request.speculation = SpeculationMode::kOff;
  request.sink = [outstanding = outstanding_](RequestOutput&& output) {
    if (output.finish_reason != FinishReason::kNone) *outstanding = false;
    return true;
  };
  // A refused question is one without an answer: the next look says so.
  if (!service_->engine().Submit(std::move(request)).ok()) *outstanding_ = false;
}

}  // namespace linspec
