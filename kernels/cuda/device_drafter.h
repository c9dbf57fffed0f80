// Draft heads on the GPU: candidates of every level for all requests of a step from one launch, without a word from the
// host in between. The step's rows go up in one small block and the candidates come down in another, or both stay where
// they are (Guess); graphs are kept for each bucket of (rows, levels, candidates).
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

// Candidates on the device, of what Guess queued.
struct DraftGuesses {
  const LinspecCudaDraftCandidate* candidates;  // [num_levels][row_stride][top_k], best first
  int row_stride;
  bool chain;  // a level's candidates are guesses below the best one of the level before; else below any of its
};

class DeviceDrafter {
 public:
  // A step's rows on the device, in one place for all steps with the same stamp.
  struct Input {
    const LinspecCudaDraftRow* rows;  // [a bucket of rows]
    const float* const* hidden;       // one pointer
    const uint32_t* call;             // as NextCall says
    uint64_t stamp;
  };

  // kLinspecCudaUnsupported: a shape without kernels.
  static int32_t CreateRecurrent(DeviceModel* target, const LinspecCudaRecurrentHead& head,
                                 std::unique_ptr<DeviceDrafter>* drafter);
  static int32_t CreateMedusa(DeviceModel* target, const LinspecCudaMedusaHeads& heads,
                              std::unique_ptr<DeviceDrafter>* drafter);
  virtual ~DeviceDrafter() = default;

  int32_t Draft(const LinspecCudaDraftStep& step, LinspecCudaDraftResult* result);
  // Queues the guesses of num_rows rows and more that pad them. The rows must be written by then, in stream order.
  int32_t Guess(const Input& input, int num_rows, int num_levels, int top_k, DraftGuesses* guesses);
  uint32_t NextCall() { return ++call_; }
  virtual int max_levels() const = 0;
  const DeviceModel& target() const { return *target_; }

 protected:
  // What one launch computes; num_rows with padding.
  struct Work {
    DraftInput input;
    const uint32_t* call;  // the number of this call, on the device
    int num_levels, top_k;
    LinspecCudaDraftCandidate* candidates;  // [num_levels, num_rows, top_k]
  };

  explicit DeviceDrafter(DeviceModel* target) : target_(target), graphs_(target->context()) {}
  virtual bool is_chain() const = 0;  // as DraftGuesses::chain
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
  int32_t ReserveAll(int num_rows, int num_levels, int top_k);
  // Of all that graphs point to.
  uint64_t GraphStamp() const;
  // Writes the padded rows into the pinned block.
  void Pack(const LinspecCudaDraftStep& step, int num_rows);

  GraphCache graphs_;
  uint32_t call_ = 0;
  uint64_t input_stamp_ = 0;                    // of the last Guess
  Buffer block_, kept_candidates_;              // the latter: of Guess
  Buffer host_block_{true}, candidates_{true};  // candidates are few: the device writes them where the host reads them
};

}  // namespace linspec::cuda
