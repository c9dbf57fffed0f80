// What the scheduler sees of a model: verify reads states, commit advances them, prefill does both for known tokens.
//
// Threads: engine thread only. Returned spans live until the next call on the same model.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda_device.h"
#include "kernels/ops.h"
#include "models/device_stats.h"
#include "models/draft_tree.h"
#include "models/model_config.h"
#include "models/state_pool.h"

namespace linspec {

// A change to one logit before a token is chosen, in the order of sampler.h: + bias, divided by repetition where
// positive and multiplied where negative, less subtract. subtract = +inf bans the token.
struct LogitEdit {
  int32_t token;
  float bias = 0, repetition = 1, subtract = 0;
};

// How the token after a row is chosen: the part of SamplingParams that models choose by (Model::chooses_tokens).
struct RowSampling {
  uint64_t seed = 0;
  int64_t position = 0;  // of the token to choose
  float temperature = 0, top_p = 1, min_p = 0;
  int32_t top_k = 0;
  int32_t edits_begin = 0, edits_count = 0;  // into VerifyBatch::edits, each token once
};

// Rows of several requests, ragged: request r owns rows [row_starts[r], row_starts[r + 1]).
struct VerifyBatch {
  std::vector<int32_t> tokens;      // [num_rows]
  std::vector<int32_t> parents;     // [num_rows] index inside the request, -1 for its root
  std::vector<int32_t> row_starts;  // [num_requests + 1]
  std::vector<int32_t> slots;       // [num_requests]

  // For models that choose tokens: how, for every row, or empty. Others leave them alone.
  std::vector<RowSampling> sampling;  // [num_rows]
  std::vector<LogitEdit> edits;
  bool want_logits = true, want_hidden = true;  // on the host

  void Add(int32_t slot, const DraftTree& tree);
  // A batch of roots with sampling becomes the one after it: every root is the token chosen after the one before it, or
  // 0 where none could be.
  void Advance(std::span<const int32_t> sampled);
  int num_requests() const { return static_cast<int>(slots.size()); }
  int num_rows() const { return static_cast<int>(tokens.size()); }
};

struct PrefillChunk {
  int32_t slot;
  std::span<const int32_t> tokens;  // follow what the slot has committed
};

struct VerifyResult {
  std::span<const float> logits;     // [num_rows, V]; empty if not wanted and the model could spare it
  std::span<const float> hidden;     // [num_rows, D] after the final norm: input of Medusa heads; likewise
  std::span<const int32_t> sampled;  // [num_rows] with sampling, from a model that chooses tokens: -1 where there is
                                     // no token to choose. Then logits are those after the edits
  std::span<const DraftTree> trees = {};   // [num_requests] that were verified, of a step of StartDrafted
  std::span<const DraftTree> drafts = {};  // and what they were taken from: they begin alike
};

class DraftGuesser;

// How a model drafts for a step that it starts before the one ahead of it was read.
struct SelfDraft {
  DraftGuesser* heads = nullptr;  // of this model: Model::CanDraftWith
  int num_levels = 1, top_k = 1;  // that they guess; the model may ask for fewer levels
  int num_rows = 1;               // of all trees; the model may take more where that costs nothing
  int max_nodes = 2;              // of a tree; likewise fewer
};

// A verify step by its size.
struct VerifySize {
  int requests = 1, rows = 1;  // rows: of all trees together
  int largest_tree = 1;        // rows of it
};

// The object behind a model that computes on a GPU, for what computes there beside it.
struct CudaHandle {
  std::shared_ptr<CudaDevice> device;
  LinspecCudaModel* model = nullptr;
};

class Model {
 public:
  virtual ~Model() = default;
  virtual const ModelConfig& config() const = 0;
  virtual int64_t weight_bytes() const = 0;  // held in memory
  // Of these, what one Verify reads: the embedding table is only indexed.
  virtual int64_t streamed_bytes() const { return weight_bytes(); }
  virtual DType weight_dtype() const { return DType::kF32; }  // of the matrices
  virtual DType state_dtype() const { return DType::kF32; }   // of the pools that CreatePool makes: kF32 or kBF16
  // States live where the model computes. More slots than fit: RESOURCE_EXHAUSTED.
  virtual absl::StatusOr<std::unique_ptr<StatePool>> CreatePool(int num_slots) const;
  // How many slots fit beside the model now, with room for its scratch; -1: the machine's memory is not ours to fill.
  virtual int64_t SlotsThatFit() const { return -1; }
  // Rows of the largest step that there is memory for beside the states of such a pool. Larger ones may fail.
  virtual int64_t MaxVerifyRows(const StatePool& /*pool*/) const { return std::numeric_limits<int32_t>::max(); }
  // Steps of up to max_requests requests with up to max_nodes rows each, max_rows in all, of which each kind is slow
  // the first time: one of each kind, the largest first. Empty on a CPU.
  virtual std::vector<VerifySize> WarmUpSizes(int /*max_requests*/, int /*max_rows*/, int /*max_nodes*/) const {
    return {};
  }
  virtual int64_t free_device_bytes() const { return -1; }  // -1: not a device's
  // Not OK once the device has failed: no call will succeed any more. Any thread.
  virtual absl::Status health() const { return absl::OkStatus(); }
  // What a device backend holds and does, for the metrics; empty on a CPU. Any thread, and must not wait for the
  // engine's.
  virtual std::vector<DeviceStats> device_stats() const { return {}; }
  virtual CudaHandle cuda() const { return {}; }  // null members on a CPU
  virtual std::string Describe() const = 0;       // one line for the start-up print: parameters, dtype, instruction set

  // Advances each slot past its chunk's tokens. No logits: the last prompt token goes through Verify as one node.
  virtual absl::Status Prefill(std::span<const PrefillChunk> chunks, StatePool* pool) = 0;
  // Logits of every node. Writes no state; keeps the nodes' k and v until Commit or the next Verify.
  virtual absl::StatusOr<VerifyResult> Verify(const VerifyBatch& batch, const StatePool& pool) = 0;
  // The same in two halves, so that the caller can work while a device does: nothing but StartNext may be called in
  // between. Slots may be acquired, released and copied, since the pool's work is queued behind the model's.
  virtual absl::Status StartVerify(const VerifyBatch& batch, const StatePool& pool);
  virtual absl::StatusOr<VerifyResult> FinishVerify();
  virtual bool CanRunAhead() const { return false; }
  // Where it can: commits every root of the one batch that is started and not finished, and starts what Advance will
  // make of it, before anybody has seen the tokens. For distinct slots, one node each, with sampling and neither logits
  // nor hidden states wanted. FinishVerify then gives the results of the first; the second is finished, committed or
  // followed by a third like any other. An error leaves the first to be finished, with its roots committed or not.
  virtual absl::Status StartNext(StatePool* pool);
  // Likewise for trees: walks each along the tokens that are chosen, commits that, drafts behind it with the heads,
  // and starts a step of the trees that come of it, each cut where its slot's group ends. The rows of a request are
  // chosen as its first row was, but for positions. FinishVerify gives the results of the first; Commit then only tells
  // the model what the engine accepted of it, which has to be what the model did itself: else the second fails. An
  // error leaves the first to be finished, and slots in no usable state.
  virtual bool CanDraftWith(const DraftGuesser& /*heads*/, int64_t /*num_requests*/) const { return false; }
  virtual absl::Status StartDrafted(const SelfDraft& draft, StatePool* pool);
  // A node's bits are those of decoding token by token also when its path crosses a group's end inside the tree. Where
  // not, the engine cuts trees there.
  virtual bool exact_across_groups() const { return true; }
  // Prefill leaves the bits that decoding the same tokens leaves. Where not, what was decoded is not kept for prompts.
  virtual bool prefills_as_it_decodes() const { return true; }
  // Verify fills VerifyResult::sampled.
  virtual bool chooses_tokens() const { return false; }
  // Grows the trees of the last Verify or Extend: batch holds the same requests, each with its old nodes first.
  // Computes the new nodes only; the result has one row for each of them, in batch order, with the bits that Verify
  // would give. For drafters that look a level at a time; optional.
  virtual absl::StatusOr<VerifyResult> Extend(const VerifyBatch& batch, const StatePool& pool);
  // paths[r]: accepted nodes of request r from its root on (indices inside the request), empty for none. batch must be
  // the last one verified, and is so once: INTERNAL for another batch or for a path that is not one.
  virtual absl::Status Commit(const VerifyBatch& batch, std::span<const std::vector<int32_t>> paths,
                              StatePool* pool) = 0;
  // The token embeddings [tokens, D], for drafters that share them. Optional.
  virtual absl::Status Embed(std::span<const int32_t> tokens, std::span<float> out);
  // Applies the unembedding (lm_head) to final hidden states that the caller made, such as those of Medusa heads that
  // share it: hidden [rows, D], result [rows, V]. Leaves the verified batch alone. Optional.
  virtual absl::StatusOr<std::span<const float>> Unembed(std::span<const float> hidden);

 private:
  std::optional<absl::StatusOr<VerifyResult>> started_;
};

struct LoadOptions {
  std::string path = {};              // model folder
  std::string weight_dtype = "auto";  // auto (as stored; F16 and F32 files become bf16), f32, bf16, int8, fp8 (GPU)
  // f32, bf16: half the memory, with the drift that docs/quality.md measures. UNIMPLEMENTED on a GPU.
  std::string state_dtype = "f32";
  int num_threads = 0;
  std::string isa = "auto";               // auto, scalar, avx2, avx512
  std::shared_ptr<CpuOps> ops = {};       // null: made from the two above; models of one engine thread may share one
  std::shared_ptr<CudaDevice> cuda = {};  // where the model runs; null: on the CPU
  bool deterministic = false;             // GPU: a row's bits never depend on the rows beside it, also in large batches
  std::function<void(double)> progress = {};  // fraction loaded, may be empty
};

// Errors name the file, the tensor or the field.
absl::StatusOr<std::unique_ptr<Model>> LoadModel(const LoadOptions& options);
// A model with weights drawn from seed, for tests and benchmarks: the same for the same seed on any machine.
// options.path is not used; "auto" weights are bf16.
absl::StatusOr<std::unique_ptr<Model>> BuildRandomModel(const ModelConfig& config, uint64_t seed,
                                                        const LoadOptions& options = {});

}  // namespace linspec
