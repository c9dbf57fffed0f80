// The operation behind the generating routes: the choices of a call (candidates.h) become one answer, whole or as
// server-sent events, in the words of its writer (answer_writer.h).
//
// Threads: one connection's strand; the notify function travels to the engine.
#pragma once

#include <memory>
#include <string>

#include "server/http_server.h"
#include "server/openai_json.h"
#include "server/service.h"

namespace linspec {

// Errors (nothing is left running then): those of Candidates::Start.
absl::StatusOr<std::unique_ptr<HttpOperation>> StartGeneration(Service* service, OpenAiCall call,
                                                               std::string request_id, HttpNotify notify);

}  // namespace linspec
