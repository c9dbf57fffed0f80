#include "kernels/cuda/device_model.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace linspec::cuda {
namespace {

constexpr int64_t Align(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

int32_t DeviceModel::Create(Context* context, const LinspecCudaShape& shape, const LinspecCudaWeights& weights,
                            bool deterministic, std::unique_ptr<DeviceModel>* model) {
  const bool fits = shape.head_dim >= 4 && shape.head_dim <= kMaxHeadDim && shape.head_dim % 4 == 0 &&
                    shape.hidden_size % 16 == 0 && shape.intermediate_size % 16 == 0 &&
                    shape.num_heads * shape.head_dim % 16 == 0 && shape.group_size <= 256;
  if (!fits) {
    return context->Fail(kLinspecCudaUnsupported,
                         "the CUDA kernels need a head_dim that is a multiple of 4 and at most 128, and hidden_size, "
                         "intermediate_size and num_heads * head_dim that are multiples of 16");
  }
  std::unique_ptr<DeviceModel> made(new DeviceModel(context, shape, weights, deterministic));
  if (made->bf16_states() ? !SupportsBf16States(made->ShapeOf(0)) : shape.state_type != kLinspecCudaF32) {
    return context->Fail(kLinspecCudaUnsupported,
                         "bf16 states need a head_dim of 64 or 128, groups of 8, 16, 32 or 64, at most 32 taps, and a "
                         "chip with 228 KB of shared memory a multiprocessor");
  }
  std::vector<cudaEvent_t*> events = {&made->prefill_uploaded_, &made->prefill_begin_, &made->prefill_end_};
  for (StartedStep& step : made->steps_) events.insert(events.end(), {&step.begin, &step.end});
  for (cudaEvent_t* event : events) {
    LINSPEC_CUDA_TRY(context->Check(cudaEventCreate(event), "event"));
  }
  *model = std::move(made);
  return kLinspecCudaOk;
}

DeviceModel::DeviceModel(Context* context, const LinspecCudaShape& shape, const LinspecCudaWeights& weights,
                         bool deterministic)
    : context_(context),
      shape_(shape),
      weights_(weights),
      layers_(weights.layers, weights.layers + shape.num_layers),
      products_(context, deterministic),
      graphs_(context),
      chain_graphs_(context) {
  weights_.layers = layers_.data();
}

DeviceModel::~DeviceModel() {
  cudaStreamSynchronize(context_->stream());
  for (const cudaEvent_t event : {prefill_uploaded_, prefill_begin_, prefill_end_, steps_[0].begin, steps_[0].end,
                                  steps_[1].begin, steps_[1].end}) {
    if (event != nullptr) cudaEventDestroy(event);
  }
}

int32_t DeviceModel::CheckStep(const LinspecCudaStep& step) const {
  if (step.num_tasks >= 1 && step.num_rows >= 1 && step.states.base != nullptr) return kLinspecCudaOk;
  return context_->Fail(kLinspecCudaInvalid, "a step needs tasks, rows and states");
}

int32_t DeviceModel::CheckIdle() {
  return in_flight() ? context_->Fail(kLinspecCudaInvalid, "a verify was not finished") : kLinspecCudaOk;
}

int DeviceModel::VerifyRows(int num_rows) { return num_rows <= kMaxGraphRows ? RowBucket(num_rows) : num_rows; }

DeviceModel::BlockLayout DeviceModel::LayoutOf(int num_tasks, int num_rows, bool sampling) {
  BlockLayout layout{};
  layout.tasks = 0;
  layout.tokens = Align(int64_t{num_tasks} * static_cast<int64_t>(sizeof(Task)));
  layout.positions = layout.tokens + Align(int64_t{num_rows} * 4);
  layout.ancestors = layout.positions + Align(int64_t{num_rows} * 8);
  layout.edits = layout.ancestors + Align(int64_t{num_rows} * 8);
  layout.sampling = layout.edits + Align(sizeof(void*));
  layout.size =
      layout.sampling + (sampling ? Align(int64_t{num_rows} * static_cast<int64_t>(sizeof(LinspecCudaSampling))) : 0);
  return layout;
}

DeviceModel::StepInput DeviceModel::PackInput(const LinspecCudaStep& step, int num_tasks, int num_rows, std::byte* host,
                                              std::byte* device, const LinspecCudaLogitEdit* edits) const {
  static_assert(sizeof(Task) == sizeof(LinspecCudaTask));
  int max_rows = 1;
  for (int i = 0; i < step.num_tasks; ++i) max_rows = std::max(max_rows, step.tasks[i].num_rows);
  max_rows = TreeBucket(max_rows);
  const BlockLayout at = LayoutOf(num_tasks, num_rows, step.sampling != nullptr);
  auto* tasks = reinterpret_cast<Task*>(host + at.tasks);
  std::memcpy(static_cast<void*>(tasks), step.tasks, step.num_tasks * sizeof(Task));
  for (int i = 0; i < step.num_tasks; ++i) {  // its root, for CommitRoots
    tasks[i].path_begin = 0;
    tasks[i].path_length = 1;
  }
  for (int i = step.num_tasks; i < num_tasks; ++i) tasks[i] = {0, -1, 0, 0, 0, 0};
  const auto fill = [&](int64_t offset, const auto* values, auto padding) {
    auto* to = reinterpret_cast<std::remove_const_t<std::remove_pointer_t<decltype(values)>>*>(host + offset);
    std::copy_n(values, step.num_rows, to);
    std::fill(to + step.num_rows, to + num_rows, padding);
  };
  fill(at.tokens, step.tokens, 0);
  fill(at.positions, step.positions, 0);
  if (step.ancestors != nullptr) fill(at.ancestors, step.ancestors, uint64_t{1});
  LinspecCudaSampling greedy = {};
  greedy.top_p = 1.0f;
  if (step.sampling != nullptr) fill(at.sampling, step.sampling, greedy);
  *reinterpret_cast<const LinspecCudaLogitEdit**>(host + at.edits) = edits;
  StepInput views = ViewsOf(num_tasks, num_rows, max_rows, device);
  if (step.ancestors == nullptr) views.ancestors = nullptr;
  if (step.sampling == nullptr) views.sampling = nullptr;
  return views;
}

DeviceModel::StepInput DeviceModel::ViewsOf(int num_tasks, int num_rows, int max_rows, std::byte* device) {
  const BlockLayout at = LayoutOf(num_tasks, num_rows, true);
  return {.tasks = reinterpret_cast<const Task*>(device + at.tasks),
          .tokens = reinterpret_cast<const int32_t*>(device + at.tokens),
          .positions = reinterpret_cast<const int64_t*>(device + at.positions),
          .ancestors = reinterpret_cast<const uint64_t*>(device + at.ancestors),
          .sampling = reinterpret_cast<const LinspecCudaSampling*>(device + at.sampling),
          .edits = reinterpret_cast<const LinspecCudaLogitEdit* const*>(device + at.edits),
          .num_tasks = num_tasks,
          .num_rows = num_rows,
          .max_rows = max_rows,
          .num_groups = 0};
}

StepArrays DeviceModel::ArraysOf(int num_tasks, int num_rows) const {
  auto* block = verify_block_.as<std::byte>();
  const BlockLayout at = LayoutOf(num_tasks, num_rows, true);
  return {.tasks = reinterpret_cast<Task*>(block + at.tasks),
          .tokens = reinterpret_cast<int32_t*>(block + at.tokens),
          .positions = reinterpret_cast<int64_t*>(block + at.positions),
          .ancestors = reinterpret_cast<uint64_t*>(block + at.ancestors),
          .sampling = reinterpret_cast<LinspecCudaSampling*>(block + at.sampling)};
}

int32_t DeviceModel::VerifyStart(const LinspecCudaStep& step) {
  LINSPEC_CUDA_TRY(context_->Enter());
  LINSPEC_CUDA_TRY(CheckStep(step));
  if (step.ancestors == nullptr) return context_->Fail(kLinspecCudaInvalid, "verify needs ancestor sets");
  LINSPEC_CUDA_TRY(CheckIdle());
  const bool graph = step.num_rows <= kMaxGraphRows, sampling = step.sampling != nullptr;
  const int num_rows = VerifyRows(step.num_rows);
  const int num_tasks = graph ? PowerOfTwo(step.num_tasks) : step.num_tasks;
  const int64_t block_bytes = LayoutOf(num_tasks, num_rows, sampling).size;
  LINSPEC_CUDA_TRY(ReserveVerify(num_rows, num_rows));
  LINSPEC_CUDA_TRY(verify_block_.Reserve(context_, block_bytes));
  LINSPEC_CUDA_TRY(host_verify_block_.Reserve(context_, block_bytes));
  if (step.num_edits > 0) {
    const int64_t bytes = step.num_edits * static_cast<int64_t>(sizeof(LinspecCudaLogitEdit));
    LINSPEC_CUDA_TRY(edits_.Reserve(context_, bytes));
    LINSPEC_CUDA_TRY(host_edits_.Reserve(context_, bytes));
    std::memcpy(host_edits_.as<void>(), step.edits, bytes);
    LINSPEC_CUDA_TRY(context_->Check(
        cudaMemcpyAsync(edits_.as<void>(), host_edits_.as<void>(), bytes, cudaMemcpyHostToDevice, context_->stream()),
        "upload logit edits"));
  }
  last_ = {.input = PackInput(step, num_tasks, num_rows, host_verify_block_.as<std::byte>(),
                              verify_block_.as<std::byte>(), edits_.as<LinspecCudaLogitEdit>()),
           .states = step.states,
           .num_tasks = step.num_tasks,
           .num_rows = step.num_rows,
           .graph = graph,
           .chosen = sampling && !step.want_logits && !step.want_hidden,
           .made = false};
  hidden_rows_ = step.num_rows;
  LINSPEC_CUDA_TRY(BeginStep());
  LINSPEC_CUDA_TRY(context_->Check(cudaMemcpyAsync(verify_block_.as<void>(), host_verify_block_.as<void>(), block_bytes,
                                                   cudaMemcpyHostToDevice, context_->stream()),
                                   "upload a step"));
  return StartLast(/*advanced=*/false, step.want_logits, step.want_hidden);
}

int32_t DeviceModel::VerifyNext() {
  LINSPEC_CUDA_TRY(context_->Enter());
  if (num_in_flight_ != 1 || !last_.may_be_advanced()) {
    return context_->Fail(kLinspecCudaInvalid, "only one step of single rows that are chosen can be advanced");
  }
  LINSPEC_CUDA_TRY(CommitOnDevice(last_.input.tasks, nullptr, &root_layers_));
  LINSPEC_CUDA_TRY(BeginStep());
  return StartLast(/*advanced=*/true, /*logits=*/false, /*hidden=*/false);
}

int32_t DeviceModel::BeginStep() {
  return context_->Check(cudaEventRecord(steps_[num_started_ % 2].begin, context_->stream()), "event");
}

int32_t DeviceModel::StartLast(bool advanced, bool logits, bool hidden) {
  StartedStep& step = steps_[num_started_ % 2];
  LINSPEC_CUDA_TRY(last_.graph ? ReplayVerify(advanced) : EnqueueVerify(advanced));
  LINSPEC_CUDA_TRY(EnqueueResults(logits, hidden, &step));
  LINSPEC_CUDA_TRY(context_->Check(cudaEventRecord(step.end, context_->stream()), "event"));
  ++num_started_;
  ++num_in_flight_;
  return kLinspecCudaOk;
}

int32_t DeviceModel::EnqueueVerify(bool advanced) {
  const StepInput& input = last_.input;
  if (advanced) {
    const StepArrays step = ArraysOf(input.num_tasks, input.num_rows);
    LaunchAdvance({.tasks = step.tasks,
                   .tokens = step.tokens,
                   .positions = step.positions,
                   .sampling = step.sampling,
                   .sampled = sampled_.as<int32_t>()},
                  input.num_tasks, input.num_rows, context_->stream());
  }
  Layers(input, last_.states, Attention::kVerify);
  Head(input);
  return context_->CheckLaunch("verify");
}

uint64_t DeviceModel::VerifyStamp() const {
  return reinterpret_cast<uintptr_t>(last_.states.base) + ScratchStamp() + verify_block_.generation() +
         host_verify_block_.generation();
}

// A step that is advanced has the kernels of the one that it follows, and one more.
int32_t DeviceModel::ReplayVerify(bool advanced) {
  const StepInput& input = last_.input;
  const int sampling = input.sampling != nullptr;
  const int kernels = advanced ? -1 : input.num_rows * 4 + (input.max_rows > 1 ? 2 : 0) + sampling;
  return graphs_.Run({input.num_tasks, input.num_rows, input.max_rows, sampling, advanced}, kernels, VerifyStamp(),
                     [&] { return EnqueueVerify(advanced); });
}

int32_t DeviceModel::EnqueueResults(bool logits, bool hidden, StartedStep* step) {
  step->result = {};
  const auto fetch = [&](Buffer& to, const void* from, int64_t bytes) {
    LINSPEC_CUDA_TRY(to.Reserve(context_, bytes));
    return context_->Check(cudaMemcpyAsync(to.as<void>(), from, bytes, cudaMemcpyDeviceToHost, context_->stream()),
                           "download results");
  };
  const int64_t rows = last_.num_rows;
  if (last_.input.sampling != nullptr) {
    LINSPEC_CUDA_TRY(fetch(step->sampled, sampled_.as<void>(), rows * static_cast<int64_t>(sizeof(int32_t))));
    step->result.sampled = step->sampled.as<int32_t>();
  }
  if (last_.made) LINSPEC_CUDA_TRY(FetchMade(step));
  if (logits) {
    LINSPEC_CUDA_TRY(
        fetch(host_logits_, this->logits(), rows * shape_.vocab_size * static_cast<int64_t>(sizeof(float))));
    step->result.logits = host_logits_.as<float>();
  }
  if (hidden) {
    LINSPEC_CUDA_TRY(
        fetch(host_hidden_, hidden_.as<void>(), rows * shape_.hidden_size * static_cast<int64_t>(sizeof(float))));
    step->result.hidden = host_hidden_.as<float>();
  }
  return kLinspecCudaOk;
}

// Waits for the step, not for what was started behind it.
int32_t DeviceModel::VerifyFinish(LinspecCudaVerifyResult* result) {
  if (!in_flight()) return context_->Fail(kLinspecCudaInvalid, "no verify was started");
  StartedStep& step = steps_[(num_started_ - num_in_flight_) % 2];
  --num_in_flight_;
  LINSPEC_CUDA_TRY(context_->Enter());
  LINSPEC_CUDA_TRY(context_->Check(cudaEventSynchronize(step.end), "verify"));
  LINSPEC_CUDA_TRY(context_->Check(cudaEventElapsedTime(&step.result.verify_ms, step.begin, step.end), "time"));
  if (std::exchange(prefilled_, false)) {
    LINSPEC_CUDA_TRY(
        context_->Check(cudaEventElapsedTime(&step.result.prefill_ms, prefill_begin_, prefill_end_), "time"));
  }
  *result = step.result;
  return kLinspecCudaOk;
}

// The layers are described once for all steps that use the same memory, behind the path of a root.
int32_t DeviceModel::CommitOnDevice(const Task* tasks, const int32_t* paths, DeviceLayers* layers) {
  const int64_t layers_at = Align(sizeof(int32_t));
  LINSPEC_CUDA_TRY(
      layers->params.Reserve(context_, layers_at + shape_.num_layers * static_cast<int64_t>(sizeof(AttentionParams))));
  auto* block = layers->params.as<std::byte>();
  auto* device = reinterpret_cast<const AttentionParams*>(block + layers_at);
  if (const uint64_t stamp = VerifyStamp() + accepted_.generation(); stamp != layers->stamp) {
    std::vector<AttentionParams> params;
    for (int i = 0; i < shape_.num_layers; ++i) {
      params.push_back(AttentionOf(i, last_.states));
      params.back().kv = kept_kv(i);
      params.back().tasks = tasks;
      params.back().paths = paths != nullptr ? paths : reinterpret_cast<const int32_t*>(block);
    }
    const cudaStream_t stream = context_->stream();
    LINSPEC_CUDA_TRY(context_->Check(cudaMemsetAsync(block, 0, layers_at, stream), "upload layers"));
    // From pageable memory, which is free again when the call returns.
    LINSPEC_CUDA_TRY(
        context_->Check(cudaMemcpyAsync(block + layers_at, params.data(), params.size() * sizeof(AttentionParams),
                                        cudaMemcpyHostToDevice, stream),
                        "upload layers"));
    layers->stamp = stamp;
  }
  LaunchCommitLayers(ShapeOf(0), bf16_states(), device, shape_.num_layers, last_.input.num_tasks, context_->stream());
  return context_->CheckLaunch("commit");
}

int32_t DeviceModel::Prefill(const LinspecCudaStep& step) {
  LINSPEC_CUDA_TRY(context_->Enter());
  LINSPEC_CUDA_TRY(CheckIdle());
  LINSPEC_CUDA_TRY(CheckStep(step));
  const int64_t block_bytes = LayoutOf(step.num_tasks, step.num_rows, false).size;
  int64_t num_groups = 0;
  LINSPEC_CUDA_TRY(ReservePrefill(step, &num_groups));
  LINSPEC_CUDA_TRY(prefill_block_.Reserve(context_, block_bytes));
  LINSPEC_CUDA_TRY(host_prefill_block_.Reserve(context_, block_bytes));
  // The upload of the prefill before this one may still be reading the host block.
  LINSPEC_CUDA_TRY(context_->Check(cudaEventSynchronize(prefill_uploaded_), "prefill upload"));
  if (!std::exchange(prefilled_, true)) {
    LINSPEC_CUDA_TRY(context_->Check(cudaEventRecord(prefill_begin_, context_->stream()), "event"));
  }
  LinspecCudaStep chains = step;
  chains.ancestors = nullptr;
  chains.sampling = nullptr;
  StepInput input = PackInput(chains, step.num_tasks, step.num_rows, host_prefill_block_.as<std::byte>(),
                              prefill_block_.as<std::byte>(), nullptr);
  input.num_groups = static_cast<int>(num_groups);
  LINSPEC_CUDA_TRY(context_->Check(cudaMemcpyAsync(prefill_block_.as<void>(), host_prefill_block_.as<void>(),
                                                   block_bytes, cudaMemcpyHostToDevice, context_->stream()),
                                   "upload a prefill"));
  LINSPEC_CUDA_TRY(context_->Check(cudaEventRecord(prefill_uploaded_, context_->stream()), "event"));
  Layers(input, step.states, Attention::kPrefill);
  LINSPEC_CUDA_TRY(context_->Check(cudaEventRecord(prefill_end_, context_->stream()), "event"));
  return context_->CheckLaunch("prefill");
}

int32_t DeviceModel::Commit(const LinspecCudaStates& states, const LinspecCudaTask* tasks, int num_tasks,
                            const int32_t* paths, int num_paths) {
  LINSPEC_CUDA_TRY(context_->Enter());
  LINSPEC_CUDA_TRY(CheckIdle());
  const int64_t paths_at = Align(int64_t{num_tasks} * static_cast<int64_t>(sizeof(Task)));
  const int64_t layers_at = paths_at + Align(int64_t{num_paths} * 4);
  const int64_t bytes = layers_at + shape_.num_layers * static_cast<int64_t>(sizeof(AttentionParams));
  LINSPEC_CUDA_TRY(commit_block_.Reserve(context_, bytes));
  LINSPEC_CUDA_TRY(host_commit_block_.Reserve(context_, bytes));
  // The host block is free: a verify was finished since the commit before this one.
  auto* host = host_commit_block_.as<std::byte>();
  auto* device = commit_block_.as<std::byte>();
  std::memcpy(host, tasks, num_tasks * sizeof(Task));
  std::memcpy(host + paths_at, paths, int64_t{num_paths} * 4);
  for (int i = 0; i < shape_.num_layers; ++i) {
    AttentionParams params = AttentionOf(i, states);
    params.kv = kept_kv(i);
    params.tasks = reinterpret_cast<const Task*>(device);
    params.paths = reinterpret_cast<const int32_t*>(device + paths_at);
    std::memcpy(host + layers_at + i * sizeof(AttentionParams), &params, sizeof(params));
  }
  LINSPEC_CUDA_TRY(context_->Check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, context_->stream()),
                                   "upload a commit"));
  LaunchCommitLayers(ShapeOf(0), bf16_states(), reinterpret_cast<const AttentionParams*>(device + layers_at),
                     shape_.num_layers, num_tasks, context_->stream());
  return context_->CheckLaunch("commit");
}

int32_t DeviceModel::Unembed(const float* hidden, int rows, float* logits) {
  LINSPEC_CUDA_TRY(context_->Enter());
  LINSPEC_CUDA_TRY(CheckIdle());
  const int64_t dim = shape_.hidden_size, f32 = sizeof(float);
  // Not what a verify keeps: a commit may follow.
  LINSPEC_CUDA_TRY(products_.Reserve());
  LINSPEC_CUDA_TRY(normed_.Reserve(context_, rows * dim * static_cast<int64_t>(sizeof(uint16_t))));
  LINSPEC_CUDA_TRY(arena_.Reserve(context_, rows * shape_.vocab_size * f32));
  const cudaStream_t stream = context_->stream();
  std::vector<uint16_t> rounded(rows * dim);
  std::transform(hidden, hidden + rows * dim, rounded.begin(), RoundToBf16);
  LINSPEC_CUDA_TRY(context_->Check(
      cudaMemcpyAsync(normed_.as<void>(), rounded.data(), rows * dim * 2, cudaMemcpyHostToDevice, stream), "upload"));
  products_.Matmul(weights_.lm_head, normed_.as<uint16_t>(), this->logits(), false, rows);
  LINSPEC_CUDA_TRY(context_->Check(
      cudaMemcpyAsync(logits, this->logits(), rows * shape_.vocab_size * f32, cudaMemcpyDeviceToHost, stream),
      "download"));
  return context_->Sync("unembed");
}

}  // namespace linspec::cuda
