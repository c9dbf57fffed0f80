// Whether a model computes one thing in every way it can: a request token by token, by prefill, as a tree, and beside
// many others, trees too. A device runs kernels that no test saw on this chip, driver and shape; this is the test that
// comes along.
//
// It finds what is wrong, not what is rounded: logits may differ by kSelfCheckTolerance of their spread, ten times what
// bf16 activations cause. Takes a few thousand rows and, for the many, whatever slots are free up to 128; all come
// back.
// Threads: engine thread only.
#pragma once

#include "absl/status/status.h"
#include "models/model.h"
#include "models/state_pool.h"

namespace linspec {

inline constexpr double kSelfCheckTolerance = 0.2;

// INTERNAL names the two ways that disagree and by how much; or the model's own error.
absl::Status CheckSelf(Model* model, StatePool* pool);

}  // namespace linspec
