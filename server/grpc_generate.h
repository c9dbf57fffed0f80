// The reactor behind Generate: one call's choices become one stream of messages. A private part of grpc_service.cc in a
// file of its own.
//
// Threads: gRPC's, and the pump's. A reactor has a lock of its own for the hand-over, held over no gRPC call.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "linspec/v1/linspec.grpc.pb.h"
#include "server/auth.h"
#include "server/errors.h"
#include "server/service.h"

namespace linspec {

// A thread between engine and gRPC: starting a write may touch the socket, which the engine must never wait for. The
// engine posts all of a step, and wakes it once.
class Pump {
 public:
  Pump() : thread_([this] { Run(); }) {}
  ~Pump();
  void Post(std::function<void()> work);  // any thread; begun at the next Wake, or when enough waits
  void Wake();                            // any thread

 private:
  void Run();

  std::mutex mutex_;  // guards work_ and stopping_
  std::condition_variable wake_;
  std::vector<std::function<void()>> work_;
  bool stopping_ = false;
  std::thread thread_;  // last: runs as soon as it exists
};

// The tenant of a call by its authorization metadata; as Authenticator::Check.
absl::StatusOr<std::string> CheckGrpcKey(const grpc::CallbackServerContext& context, Authenticator* auth);

// A message from the wire; INVALID_ARGUMENT when it is none. (gRPC itself would answer UNIMPLEMENTED.)
template <class Message>
absl::Status ParseMessage(const grpc::ByteBuffer& bytes, Message* message) {
  grpc::ByteBuffer copy(bytes);  // of references: parsing empties it
  if (grpc::SerializationTraits<Message>::Deserialize(&copy, message).ok()) return absl::OkStatus();
  return FieldError("request", "is not a " + message->GetTypeName() + ", or a string in it is not UTF-8");
}

// The reactor owns itself until gRPC says OnDone; the rest must outlive it.
grpc::ServerWriteReactor<grpc::ByteBuffer>* StartGenerate(grpc::CallbackServerContext* context,
                                                          const grpc::ByteBuffer& request, Service* service,
                                                          Authenticator* auth, Pump* pump);

}  // namespace linspec
