// Before the first request: steps and drafts of every kind that is slow the first time. A GPU captures a CUDA graph for
// each size, which takes as long as several steps; a request that meets it would wait, and the measured costs of
// speculation would be wrong.
//
// Bounded in time and in the device's memory; what is left out is captured when it comes. Threads: start-up only.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "models/drafter.h"
#include "models/model.h"
#include "scheduler/engine.h"

namespace linspec {

// Sequences that never were, for drafters: real ones count up from 1 and never get there. Who uses them forgets them.
inline constexpr uint64_t kScratchSequence = uint64_t{1} << 63;

// Uses scratch slots of the pool and gives them back. A drafter that fails is left out. Errors: the model's, but for
// want of memory, which ends the warm-up.
absl::StatusOr<WarmUpReport> WarmUp(Model* model, StatePool* pool, std::span<const std::unique_ptr<Drafter>> drafters,
                                    const EngineOptions& options);

}  // namespace linspec
