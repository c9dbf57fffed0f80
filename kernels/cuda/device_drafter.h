// Draft heads on the GPU: candidates of every level for all requests of a step from one launch, without a word from the
// host in between. The step's rows go up in one small block and the candidates come down in another; graphs are kept
// for each bucket of (rows, levels, candidates).
//
// Threads: one at a time per context. Ownership: owns its scratch; weights are the caller's; the target must outlive
// it.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/cuda/device_model.h"
#include "kernels/cuda/draft_kernels.h"
#include "kernels/cuda/graph_cache.h"

namespace linspec::cuda {

class DeviceDrafter {
 public:
  // kLinspecCudaUnsupported: a shape without kernels.
  static int32_t CreateRecurrent(DeviceModel* target, const LinspecCudaRecurrentHead& head,
                                 std::unique_ptr<DeviceDrafter>* drafter);
  static int32_t CreateMedusa(DeviceModel* target, const LinspecCudaMedusaHeads& heads,
                              std::unique_ptr<DeviceDrafter>* drafter);
  virtual ~DeviceDrafter() = default;

  int32_t Draft(const LinspecCudaDraftStep& step, LinspecCudaDraftResult* result);

 protected:
  // What one launch computes; num_rows with padding.
  struct Work {
    DraftInput input;
    const uint32_t* call;  // the number of this call, on the device
    int num_levels, top_k;
    LinspecCudaDraftCandidate* candidates;  // [num_levels, num_rows, top_k]
  };

  explicit DeviceDrafter(DeviceModel* target) : target_(target), graphs_(target->context()) {}
  virtual int max_levels() const = 0;
  virtual int32_t Reserve(int num_rows, int num_levels) = 0;
  virtual uint64_t Stamp() const = 0;  // changes when what Reserve gave has moved
  // Whether the kernels read a step's rows once, early and by few blocks: then they read them in the host's memory.
  virtual bool ReadsHostBlock(int /*num_rows*/) const { return false; }
  virtual void Enqueue(const Work& work) = 0;

  // Candidates of num_levels levels from first_level on, from their logits [num_levels, num_rows, V].
  void Choose(const Work& work, const float* logits, int first_level, int num_levels, int32_t* next_tokens);
  Context* context() const { return target_->context(); }
  cudaStream_t stream() const { return context()->stream(); }
  int64_t dim() const { return target_->shape().hidden_size; }
  int64_t vocab() const { return target_->shape().vocab_size; }

  DeviceModel* const target_;

 private:
  int32_t CheckStep(const LinspecCudaDraftStep& step) const;
  // Writes the padded rows into the pinned block.
  void Pack(const LinspecCudaDraftStep& step, int num_rows);

  GraphCache graphs_;
  uint32_t call_ = 0;
  Buffer block_;
  Buffer host_block_{true}, candidates_{true};  // candidates are few: the device writes them where the host reads them
};

}  // namespace linspec::cuda
