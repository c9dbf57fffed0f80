// What a model's steps and states take of a GPU's memory, so that they fit side by side. Threads: engine thread.
#pragma once

#include <cstdint>

#include "kernels/cuda_device.h"

namespace linspec {

// Of one prefill pass: bound the scratch; the bits do not depend on them.
inline constexpr int64_t kPrefillRows = 2048, kPrefillGroups = 48;

// Steps of a server of so many requests: all decode at once, or prompts are taken in. Trees may make larger ones.
LinspecCudaStepSize StepSizeOf(int64_t num_slots);

// The most slots whose states and steps fit beside what the device holds now; 0 when it has failed.
int64_t CudaSlotsThatFit(CudaDevice* device, LinspecCudaModel* model, int64_t state_bytes);

}  // namespace linspec
