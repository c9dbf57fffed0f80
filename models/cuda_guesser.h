// Draft heads on the GPU of their target: the hidden states stay there, and all levels of all requests are one launch.
//
// Ownership: a guesser owns its weights and borrows the target, which must outlive it. Threads: engine thread only.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "models/draft_guesser.h"
#include "models/model.h"

namespace linspec {

// The Medusa heads in `folder`; weight_dtype as in LoadOptions, without f32. REQUIRES: target->cuda().model. Errors as
// MedusaWeights::Load, and those of the device.
absl::StatusOr<std::unique_ptr<DraftGuesser>> LoadCudaMedusaGuesser(const std::string& folder, Model* target,
                                                                    const std::string& weight_dtype);

// The recurrent head in `folder`, likewise; each level follows the best guess of the one before.
absl::StatusOr<std::unique_ptr<DraftGuesser>> LoadCudaRecurrentGuesser(const std::string& folder, Model* target,
                                                                       const std::string& weight_dtype);

}  // namespace linspec
