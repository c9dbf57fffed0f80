// "Can generate", beside "alive" (/health) and "takes requests" (/ready): a thread that looks every few seconds whether
// tokens came out of the engine; when none did it asks for one, and a token that has not come by the next look means
// no. The finding goes to /health_generate, GetStats and the gauge linspec_can_generate.
//
// Threads: one of its own. While the server drains it asks for nothing and leaves the finding as it is.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "server/service.h"

namespace linspec {

class GenerationProbe {
 public:
  // interval_s 0: no probing, can_generate stays true. The service must outlive the probe.
  GenerationProbe(Service* service, double interval_s);
  ~GenerationProbe();

 private:
  void Run();
  bool Look();  // one look: what can_generate should be
  void Ask();

  Service* const service_;
  const std::chrono::duration<double> interval_;
  bool asked_ = false;  // at the last look
  const std::shared_ptr<std::atomic<bool>> outstanding_ = std::make_shared<std::atomic<bool>>(false);
  int64_t output_tokens_ = 0;
  std::mutex mutex_;  // guards stopping_
  std::condition_variable wake_;
  bool stopping_ = false;
  std::thread thread_;  // last
};

}  // namespace linspec
