// Scratch memory of DeviceModel: what steps of a size take, and what of it shares one arena because it never lives at
// the same time. 7B: 1.05 MB (bf16 states: half) a row of a verify for k and v of all layers, which a commit reads; 0.2
// MB a row else.
#include <algorithm>

#include "kernels/cuda/device_model.h"

namespace linspec::cuda {
namespace {

constexpr int64_t kF32 = sizeof(float), kBf16 = sizeof(uint16_t);
constexpr int64_t kPage = int64_t{2} << 20;  // the device hands out memory in these

}  // namespace

int64_t DeviceModel::QkvBytes(int64_t rows) const { return Align(rows * qkv_width() * kF32); }
int64_t DeviceModel::GateUpBytes(int64_t rows) const { return Align(rows * 2 * shape_.intermediate_size * kBf16); }

DeviceModel::ScratchSizes DeviceModel::PrefillSizes(int64_t rows, int64_t groups) const {
  const int64_t attention = QkvBytes(rows) + PrefillScratchFloats(ShapeOf(0), groups) * kF32;
  const int64_t mlp = GateUpBytes(rows) + rows * shape_.intermediate_size * kBf16;
  return {rows * shape_.hidden_size * kF32,
          rows * shape_.hidden_size * kBf16,
          rows * attention_width() * kBf16,
          rows * shape_.head_dim / 2 * int64_t{sizeof(float2)},
          std::max(attention, mlp),
          0,
          0,
          0,
          rows * NormParts(shape_.hidden_size) * kF32};
}

DeviceModel::ScratchSizes DeviceModel::VerifySizes(int64_t rows, int64_t kept_rows) const {
  ScratchSizes sizes = PrefillSizes(rows, 0);
  sizes[4] = std::max(sizes[4], rows * shape_.vocab_size * kF32);
  sizes[5] = shape_.num_layers * std::max(kept_rows, kept_rows_) * kv_width() * state_element_bytes();
  sizes[6] = rows * shape_.hidden_size * kF32;
  sizes[7] = rows * int64_t{sizeof(int32_t)};
  return sizes;
}

DeviceModel::ScratchSizes DeviceModel::LargestSizes(const LinspecCudaStepSize& size) const {
  const int verify_rows = VerifyRows(size.verify_rows);
  ScratchSizes sizes = VerifySizes(verify_rows, verify_rows);
  const ScratchSizes prefill = PrefillSizes(size.prefill_rows, size.prefill_groups);
  std::transform(sizes.begin(), sizes.end(), prefill.begin(), sizes.begin(),
                 [](int64_t a, int64_t b) { return std::max(a, b); });
  return sizes;
}

std::array<const Buffer*, 9> DeviceModel::ScratchBuffers() const {
  return {&x_, &normed_, &attention_, &angles_, &arena_, &kept_kv_, &hidden_, &sampled_, &squares_};
}

uint64_t DeviceModel::ScratchStamp() const {
  uint64_t stamp = kept_rows_;  // by which the layers of kept_kv_ lie apart
  for (const Buffer* buffer : ScratchBuffers()) stamp += buffer->generation();
  return stamp;
}

int64_t DeviceModel::ScratchBytes(const LinspecCudaStepSize& size) const {
  const ScratchSizes sizes = LargestSizes(size);
  int64_t bytes = products_.bytes_to_reserve();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] > ScratchBuffers()[i]->bytes()) bytes += Align(sizes[i], kPage);
  }
  return bytes;
}

int32_t DeviceModel::ReserveScratch(const ScratchSizes& sizes) {
  LINSPEC_CUDA_TRY(products_.Reserve());
  Buffer* const buffers[] = {&x_, &normed_, &attention_, &angles_, &arena_, &kept_kv_, &hidden_, &sampled_, &squares_};
  for (size_t i = 0; i < sizes.size(); ++i) LINSPEC_CUDA_TRY(buffers[i]->Reserve(context_, sizes[i]));
  return kLinspecCudaOk;
}

int32_t DeviceModel::Reserve(const LinspecCudaStepSize& size) {
  LINSPEC_CUDA_TRY(context_->Enter());
  if (size.verify_rows < 1 || size.prefill_rows < 0 || size.prefill_groups < 0) {
    return context_->Fail(kLinspecCudaInvalid, "reserve: the size of a step is out of range");
  }
  LINSPEC_CUDA_TRY(ReserveScratch(LargestSizes(size)));
  kept_rows_ = std::max<int64_t>(kept_rows_, VerifyRows(size.verify_rows));
  return kLinspecCudaOk;
}

int32_t DeviceModel::ReserveVerify(int num_rows, int kept_rows) {
  LINSPEC_CUDA_TRY(ReserveScratch(VerifySizes(num_rows, kept_rows)));
  kept_rows_ = std::max<int64_t>(kept_rows_, kept_rows);
  for (StartedStep& step : steps_) {
    LINSPEC_CUDA_TRY(step.sampled.Reserve(context_, num_rows * int64_t{sizeof(int32_t)}));
  }
  return kLinspecCudaOk;
}

int32_t DeviceModel::ReservePrefill(const LinspecCudaStep& step, int64_t* num_groups) {
  *num_groups = 0;
  for (int i = 0; i < step.num_tasks; ++i) {
    *num_groups += PrefillGroups(step.tasks[i].length, step.tasks[i].num_rows, shape_.group_size);
  }
  return ReserveScratch(PrefillSizes(step.num_rows, *num_groups));
}

}  // namespace linspec::cuda
