// The chains of a draft model on a GPU: all levels of all requests are one launch and one wait.
//
// Threads: engine thread only. Ownership: borrows the model, which must outlive it; nothing else of the model may run
// between a Guess and its Commit.
#pragma once

#include <memory>

#include "models/draft_chains.h"
#include "models/model.h"

namespace linspec {

// Null for a model on a CPU.
std::unique_ptr<DraftChains> MakeCudaChains(const Model& draft);

}  // namespace linspec
