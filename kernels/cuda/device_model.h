// A linearized transformer on the GPU: the forward pass of models/linear_transformer.h as a queue of kernels.
//
// One step is one upload of a packed input block, the layers, the head, and (with sampling) the choice of a token per
// row. A verify step of a shape seen before is replayed as a CUDA graph, one per bucket of (tasks, rows): everything
// else that changes between steps is data. VerifyNext starts the step after a plain one before that was read: without
// an upload, because the device advances the block of the one before, in a graph of its own kind. VerifyFollow does so
// for trees (device_follow.cc). Rows and tasks that pad a bucket belong to no slot; their results are never read and
// reach no state.
//
// A draft model drafts chains (device_chain.cc): level by level the token that it chose itself goes through the layers,
// above the k and v that the levels before left in kept_kv_. All levels are one graph.
//
// Activations: fp32 residual stream and attention, bf16 inputs of the matrix products. Threads: one at a time per
// context. Ownership: owns its scratch; weights and states are the caller's and must outlive it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/cuda/context.h"
#include "kernels/cuda/follow.h"
#include "kernels/cuda/graph_cache.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/products.h"
#include "kernels/cuda/sampling.h"

namespace linspec::cuda {

class DeviceDrafter;
struct DraftGuesses;

class DeviceModel {
 public:
  static int32_t Create(Context* context, const LinspecCudaShape& shape, const LinspecCudaWeights& weights,
                        bool deterministic, std::unique_ptr<DeviceModel>* model);
  ~DeviceModel();

  int32_t Prefill(const LinspecCudaStep& step);
  int32_t VerifyStart(const LinspecCudaStep& step);
  int32_t VerifyNext();
  int32_t VerifyFollow(DeviceDrafter* drafter, const LinspecCudaFollow& follow);
  int32_t VerifyFinish(LinspecCudaVerifyResult* result);
  int32_t Commit(const LinspecCudaStates& states, const LinspecCudaTask* tasks, int num_tasks, const int32_t* paths,
                 int num_paths);
  int32_t Unembed(const float* hidden, int rows, float* logits);
  int32_t DraftChains(const LinspecCudaChainStep& step, LinspecCudaDraftResult* result);
  // Device memory that steps of up to this size need beyond what is held already.
  int64_t ScratchBytes(const LinspecCudaStepSize& size) const;
  int32_t Reserve(const LinspecCudaStepSize& size);  // takes it now, so that no such step can fail for want of it

  Context* context() const { return context_; }
  const LinspecCudaShape& shape() const { return shape_; }
  const LinspecCudaWeights& weights() const { return weights_; }
  Products& products() { return products_; }
  // The states after the final norm of the last verify [hidden_rows, D], fp32; both change with the next one.
  const float* hidden() const { return hidden_.as<float>(); }
  int hidden_rows() const { return hidden_rows_; }
  bool in_flight() const { return num_in_flight_ > 0; }  // a verify is started and not finished

 private:
  // Device views of one step's input block, and its size in tasks and rows (padding included).
  struct StepInput {
    const Task* tasks;
    const int32_t* tokens;
    const int64_t* positions;
    const uint64_t* ancestors;
    const LinspecCudaSampling* sampling;       // null: nothing is chosen
    const LinspecCudaLogitEdit* const* edits;  // one pointer, in the block
    int num_tasks, num_rows;
    int max_rows;                        // of one task, or more
    int num_groups;                      // prefill: that the tasks touch
    const int32_t* kept_rows = nullptr;  // chains: where in kept_kv_ each row's k and v go; null: row by row
    int last_rows = 0;                   // chains: as AttentionParams
  };
  // A verify that is started: when it runs, and what it will have given. Two of them, in turn.
  struct StartedStep {
    cudaEvent_t begin = nullptr, end = nullptr;
    Buffer sampled{true}, made{true};
    LinspecCudaVerifyResult result = {};
  };
  // The verify started last, for what follows it.
  struct LastStep {
    StepInput input;
    LinspecCudaStates states;
    int num_tasks, num_rows;  // without padding
    bool graph, chosen;       // chosen: with sampling, and what else the host does not need to see
    bool made;                // its trees, by the device
    bool may_be_advanced() const { return chosen && !made && num_rows == num_tasks; }
  };
  // AttentionParams of all layers for commits whose tasks are on the device, and what they were made from.
  struct DeviceLayers {
    Buffer params;
    uint64_t stamp = 0;
  };
  struct BlockLayout {  // byte offsets in the input block
    int64_t tasks, tokens, positions, ancestors, sampling, edits, size;
  };
  enum class Attention : uint8_t { kVerify, kPrefill };
  struct ChainSize {  // with padding
    int tasks, first_rows, levels, top_k;
    int max_known;  // rows of one task at the first level, or more
    int Row(int level) const { return level == 0 ? 0 : first_rows + (level - 1) * tasks; }  // in arrays of all levels
  };
  struct ChainLayout {  // byte offsets in the input block; kept: StepInput::kept_rows
    int64_t rows, tasks, tokens, positions, kept, size;
  };

  DeviceModel(Context* context, const LinspecCudaShape& shape, const LinspecCudaWeights& weights, bool deterministic);

  static BlockLayout LayoutOf(int num_tasks, int num_rows, bool sampling);
  int32_t CheckStep(const LinspecCudaStep& step) const;
  int32_t CheckIdle();  // nothing is in flight
  // Bytes of x_, normed_, attention_, angles_, arena_, kept_kv_, hidden_, sampled_, squares_ for a step of one kind.
  using ScratchSizes = std::array<int64_t, 9>;
  ScratchSizes VerifySizes(int64_t rows, int64_t kept_rows) const;
  ScratchSizes PrefillSizes(int64_t rows, int64_t groups) const;
  ScratchSizes LargestSizes(const LinspecCudaStepSize& size) const;
  std::array<const Buffer*, 9> ScratchBuffers() const;  // in that order
  uint64_t ScratchStamp() const;                        // of their addresses, for captured graphs
  static int VerifyRows(int num_rows);                  // that a step of num_rows is padded to
  int32_t ReserveScratch(const ScratchSizes& sizes);
  int32_t ReserveVerify(int num_rows, int kept_rows);
  int32_t ReservePrefill(const LinspecCudaStep& step, int64_t* num_groups);
  // Where things are in arena_, in a step of `rows`. Those of one line live at the same time, those of different lines
  // do not: the products of the attention and of the MLP, then the logits.
  float* qkv() const { return arena_.as<float>(); }
  float* prefill_states(int64_t rows) const {
    return reinterpret_cast<float*>(arena_.as<std::byte>() + QkvBytes(rows));
  }
  uint16_t* gate_up() const { return arena_.as<uint16_t>(); }
  uint16_t* activated(int64_t rows) const {
    return reinterpret_cast<uint16_t*>(arena_.as<std::byte>() + GateUpBytes(rows));
  }
  float* logits() const { return arena_.as<float>(); }
  void* kept_kv(int layer) const {
    return kept_kv_.as<std::byte>() + layer * kept_rows_ * kv_width() * state_element_bytes();
  }
  int64_t QkvBytes(int64_t rows) const;
  int64_t GateUpBytes(int64_t rows) const;
  // Writes step's arrays, padded, into the pinned block `host`; returns the views of the same block at `device`.
  StepInput PackInput(const LinspecCudaStep& step, int num_tasks, int num_rows, std::byte* host, std::byte* device,
                      const LinspecCudaLogitEdit* edits) const;

  // Views of a verify's block at `device`, with sampling; and the arrays in verify_block_.
  static StepInput ViewsOf(int num_tasks, int num_rows, int max_rows, std::byte* device);
  StepArrays ArraysOf(int num_tasks, int num_rows) const;
  // Of the last step. advanced: the device writes its block first, else it is there.
  int32_t EnqueueVerify(bool advanced);
  int32_t ReplayVerify(bool advanced);
  uint64_t VerifyStamp() const;
  int32_t EnqueueResults(bool logits, bool hidden, StartedStep* step);
  int32_t BeginStep();  // of which time is taken, until the end of StartLast
  int32_t StartLast(bool advanced, bool logits, bool hidden);
  // Queues a commit of tasks and paths that are on the device, as many as the last step has. paths: null: roots.
  int32_t CommitOnDevice(const Task* tasks, const int32_t* paths, DeviceLayers* layers);
  int32_t CheckFollow(const DeviceDrafter& drafter, const LinspecCudaFollow& follow);
  int32_t ReserveAccepted();
  int32_t MakeTrees(const LinspecCudaFollow& follow, const DraftGuesses& guesses);
  int32_t FetchMade(StartedStep* step);
  void Layers(const StepInput& input, const LinspecCudaStates& states, Attention attention);
  void Head(const StepInput& input);
  void Logits(int rows, float* hidden);

  static ChainLayout LayoutOf(const ChainSize& size);
  int32_t CheckChains(const LinspecCudaChainStep& step) const;
  int32_t ReserveChains(const ChainSize& size, int64_t block_bytes, int64_t candidate_bytes);
  static void PackChains(const LinspecCudaChainStep& step, const ChainSize& size, std::byte* host);
  void EnqueueChains(const ChainSize& size, const LinspecCudaStates& states);
  LayerParams ShapeOf(int layer) const;
  AttentionParams AttentionOf(int layer, const LinspecCudaStates& states) const;

  int64_t qkv_width() const { return int64_t{shape_.num_heads + 2 * shape_.num_kv_heads} * shape_.head_dim; }
  int64_t kv_width() const { return int64_t{2} * shape_.num_kv_heads * shape_.head_dim; }
  bool bf16_states() const { return shape_.state_type == kLinspecCudaBf16; }
  int64_t state_element_bytes() const { return bf16_states() ? 2 : 4; }
  int64_t attention_width() const { return int64_t{shape_.num_heads} * shape_.head_dim; }

  Context* const context_;
  const LinspecCudaShape shape_;
  LinspecCudaWeights weights_;
  std::vector<LinspecCudaLayer> layers_;
  Products products_;

  // Scratch [rows, ...]: residual stream, inputs of products, sums of squares for norms, what lives only within a layer
  // or at a step's end, and of the last verify or chains k and v of every layer, and the states after the final norm.
  Buffer x_, normed_, attention_, angles_, arena_, kept_kv_, hidden_, sampled_, squares_;
  int hidden_rows_ = 0;
  int64_t kept_rows_ = 0;  // rows a layer's part of kept_kv_ holds
  Buffer verify_block_, prefill_block_, commit_block_, edits_;
  Buffer accepted_, made_;                  // between a step and one that follows it; trees made here, for the host
  const float* accepted_hidden_ = nullptr;  // that accepted_ points to
  DeviceLayers root_layers_, accepted_layers_;
  Buffer host_verify_block_{true}, host_prefill_block_{true}, host_commit_block_{true}, host_edits_{true};
  Buffer host_logits_{true}, host_hidden_{true};
  Buffer chain_block_, chain_tokens_, candidates_;  // chain_tokens_: chosen at the level before
  Buffer host_chain_block_{true}, host_candidates_{true};
  cudaEvent_t prefill_uploaded_ = nullptr, prefill_begin_ = nullptr, prefill_end_ = nullptr;
  bool prefilled_ = false;  // since the verify before

  GraphCache graphs_;        // by tasks, rows, rows of one task, sampling, advanced
  GraphCache chain_graphs_;  // by ChainSize

  LastStep last_ = {};
  std::array<StartedStep, 2> steps_;
  int64_t num_started_ = 0;
  int num_in_flight_ = 0;  // at most 2
};

}  // namespace linspec::cuda
