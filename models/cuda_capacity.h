// What a model's steps and states take of a GPU's memory, so that they fit side by side. Threads: engine thread.
#pragma once

#include <cstdint>

#include "kernels/cuda_device.h"

namespace linspec {

// Of one prefill pass: bound the scratch; the bits do not depend on them.
inline constexpr int64_t kPrefillRows = 2048, kPrefillGroups = 48;

// The pieces of a pass so far.
class PrefillPassSize {
 public:
  bool full() const { return rows_ == kPrefillRows || groups_ == kPrefillGroups; }
  // How many of the next `left` tokens of a sequence, `length` of which are committed, still fit: at least one unless
  // the pass is full. Counts them.
  int64_t Take(int64_t length, int64_t left, int64_t group_size);

 private:
  int64_t rows_ = 0, groups_ = 0;
};

// Steps of a server of so many requests: all decode at once, or fewer verify trees of no more than 1,024 rows together,
// or prompts are taken in.
LinspecCudaStepSize StepSizeOf(int64_t num_slots);

// The most slots whose states and steps fit beside what the device holds now; 0 when it has failed.
int64_t CudaSlotsThatFit(CudaDevice* device, LinspecCudaModel* model, int64_t state_bytes);

}  // namespace linspec
