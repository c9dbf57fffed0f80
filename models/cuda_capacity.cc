#include "models/cuda_capacity.h"

#include <algorithm>

#include "kernels/cuda/step_buckets.h"
#include "models/draft_tree.h"

namespace linspec {
namespace {

constexpr int64_t kMostSlots = 1 << 20;
// Of device memory when slots fill it, for what is not scratch: kernels, which load when first launched, graphs, and
// the inputs of steps.
constexpr int64_t kSystemBytes = int64_t{256} << 20;

}  // namespace

int64_t PrefillPassSize::Take(int64_t length, int64_t left, int64_t group_size) {
  const int64_t begin = length % group_size;
  const int64_t taken = std::min({left, kPrefillRows - rows_, (kPrefillGroups - groups_) * group_size - begin});
  rows_ += taken;
  groups_ += (begin + taken + group_size - 1) / group_size;
  return taken;
}

LinspecCudaStepSize StepSizeOf(int64_t num_slots) {
  const int64_t trees = std::min<int64_t>(num_slots * kMaxTreeNodes, cuda::kMaxGraphRows);
  return {.verify_rows = static_cast<int32_t>(std::max(num_slots, trees)),
          .prefill_rows = kPrefillRows,
          .prefill_groups = kPrefillGroups};
}

int64_t CudaSlotsThatFit(CudaDevice* device, LinspecCudaModel* model, int64_t state_bytes) {
  const auto info = device->Info();
  if (!info.ok()) return 0;
  const auto fits = [&](int64_t slots) {
    const LinspecCudaStepSize size = StepSizeOf(slots);
    int64_t scratch = 0;
    if (!device->Check(device->api().scratch_bytes(model, &size, &scratch), "scratch memory").ok()) return false;
    return slots * state_bytes + scratch + kSystemBytes <= info->free_bytes;
  };
  int64_t fit = 0, too_many = std::min(info->free_bytes / state_bytes, kMostSlots) + 1;
  while (too_many - fit > 1) {
    const int64_t middle = fit + (too_many - fit) / 2;
    (fits(middle) ? fit : too_many) = middle;
  }
  return fit;
}

}  // namespace linspec
