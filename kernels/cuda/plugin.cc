// The table of plugin_api.h over Context and DeviceModel.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/context.h"
#include "kernels/cuda/device_drafter.h"
#include "kernels/cuda/device_model.h"
#include "kernels/cuda/weights.h"

struct LinspecCudaContext {
  explicit LinspecCudaContext(linspec::cuda::Context* context) : impl(context) {}
  std::unique_ptr<linspec::cuda::Context> impl;
  linspec::cuda::Buffer staging;  // pieces of a matrix on their way to pack
  linspec::cuda::Buffer staging_scales;
  linspec::cuda::Buffer host_staging{true};
};
struct LinspecCudaModel {
  std::unique_ptr<linspec::cuda::DeviceModel> impl;
};

struct LinspecCudaDrafter {
  std::unique_ptr<linspec::cuda::DeviceDrafter> impl;
};

namespace linspec::cuda {
namespace {

constexpr int64_t kStagingBytes = int64_t{64} << 20;
std::string create_error;  // of the last create that failed; create is called at start-up, by one thread

int32_t Create(int32_t device, LinspecCudaContext** context) {
  Context* made = nullptr;
  const int32_t code = Context::Create(device, &made, &create_error);
  if (code == kLinspecCudaOk) *context = new LinspecCudaContext(made);
  return code;
}

void Destroy(LinspecCudaContext* context) { delete context; }

const char* LastError(LinspecCudaContext* context) {
  return context == nullptr ? create_error.c_str() : context->impl->last_error().c_str();
}

int32_t DeviceInfo(LinspecCudaContext* context, LinspecCudaDeviceInfo* info) {
  Context& c = *context->impl;
  LINSPEC_CUDA_TRY(c.Enter());
  size_t free_bytes = 0, total_bytes = 0;
  LINSPEC_CUDA_TRY(c.Check(cudaMemGetInfo(&free_bytes, &total_bytes), "memory info"));
  const cudaDeviceProp& properties = c.properties();
  *info = {};
  info->total_bytes = static_cast<int64_t>(total_bytes);
  info->free_bytes = static_cast<int64_t>(free_bytes);
  info->major = properties.major;
  info->minor = properties.minor;
  info->num_sms = properties.multiProcessorCount;
  info->has_cublas = c.cublas() != nullptr;
  std::snprintf(info->cublas, sizeof(info->cublas), "%s", c.cublas_note().c_str());
  std::snprintf(info->name, sizeof(info->name), "%.120s", properties.name);
  return kLinspecCudaOk;
}

// Median time of `work` queued eight times, in seconds.
template <typename Work>
int32_t Time(Context& c, Work work, double* seconds) {
  cudaEvent_t begin = nullptr, end = nullptr;
  LINSPEC_CUDA_TRY(c.Check(cudaEventCreate(&begin), "event"));
  LINSPEC_CUDA_TRY(c.Check(cudaEventCreate(&end), "event"));
  std::vector<float> times;
  for (int repeat = 0; repeat < 8; ++repeat) {
    cudaEventRecord(begin, c.stream());
    work();
    cudaEventRecord(end, c.stream());
    LINSPEC_CUDA_TRY(c.Sync("measure"));
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, begin, end);
    if (repeat > 1) times.push_back(milliseconds);  // the first two warm up
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  *seconds = times[times.size() / 2] * 1e-3;
  return kLinspecCudaOk;
}

int32_t Measure(LinspecCudaContext* context, LinspecCudaCeilings* ceilings) {
  Context& c = *context->impl;
  LINSPEC_CUDA_TRY(c.Enter());
  const int64_t floats = int64_t{1} << 29;
  const int blocks = c.properties().multiProcessorCount * 8;
  Buffer data, sums;
  LINSPEC_CUDA_TRY(data.Reserve(&c, floats * 4));
  LINSPEC_CUDA_TRY(sums.Reserve(&c, blocks * 4));
  LINSPEC_CUDA_TRY(c.Check(cudaMemsetAsync(data.as<void>(), 0x3D, floats * 4, c.stream()), "fill"));
  double seconds = 0;
  LINSPEC_CUDA_TRY(
      Time(c, [&] { LaunchReadSum(data.as<float>(), floats, sums.as<float>(), blocks, c.stream()); }, &seconds));
  *ceilings = {.read_bytes_per_s = static_cast<double>(floats) * 4 / seconds, .bf16_flops_per_s = 0};
  if (c.cublas() == nullptr) return kLinspecCudaOk;
  constexpr int64_t kSide = 8192;
  const int64_t bytes = kSide * kSide * 2;
  auto* operands = data.as<std::byte>();  // two of random bf16 values between -1 and 1, and the product behind them
  for (int i = 0; i < 2; ++i) {
    LinspecCudaSource source = {};
    source.rows = source.cols = kSide;
    source.stream = i;
    source.spread = 1.0f;
    const LinspecCudaMatrix matrix{operands + i * bytes, nullptr, kSide, kSide, kLinspecCudaBf16, 0};
    LINSPEC_CUDA_TRY(LaunchPack(source, nullptr, nullptr, 0, kSide, matrix, c.stream()));
  }
  const GemmParams product{.w = {operands, nullptr, kSide, kSide, kLinspecCudaBf16, 0},
                           .x = reinterpret_cast<const uint16_t*>(operands + bytes),
                           .y = reinterpret_cast<float*>(operands + 2 * bytes),
                           .accumulate = false};
  int32_t code = kLinspecCudaOk;
  LINSPEC_CUDA_TRY(Time(c, [&] { code = c.cublas()->Launch(product, kSide, c.stream()); }, &seconds));
  if (code == kLinspecCudaOk) ceilings->bf16_flops_per_s = 2.0 * kSide * kSide * kSide / seconds;
  return kLinspecCudaOk;
}

int32_t Alloc(LinspecCudaContext* context, int64_t bytes, void** device) {
  LINSPEC_CUDA_TRY(context->impl->Enter());
  return context->impl->Alloc(bytes, device);
}

int32_t Release(LinspecCudaContext* context, void* device) {
  LINSPEC_CUDA_TRY(context->impl->Enter());
  return context->impl->Check(cudaFree(device), "free");
}

int32_t Zero(LinspecCudaContext* context, void* device, int64_t bytes) {
  LINSPEC_CUDA_TRY(context->impl->Enter());
  return context->impl->Check(cudaMemsetAsync(device, 0, bytes, context->impl->stream()), "zero");
}

int32_t CopyBytes(LinspecCudaContext* context, void* to, const void* from, int64_t bytes, cudaMemcpyKind kind,
                  bool wait, const char* what) {
  Context& c = *context->impl;
  LINSPEC_CUDA_TRY(c.Enter());
  LINSPEC_CUDA_TRY(c.Check(cudaMemcpyAsync(to, from, bytes, kind, c.stream()), what));
  return wait ? c.Sync(what) : kLinspecCudaOk;
}

int32_t Copy(LinspecCudaContext* context, void* to, const void* from, int64_t bytes) {
  return CopyBytes(context, to, from, bytes, cudaMemcpyDeviceToDevice, false, "copy");
}
int32_t Upload(LinspecCudaContext* context, void* device, const void* host, int64_t bytes) {
  return CopyBytes(context, device, host, bytes, cudaMemcpyHostToDevice, true, "upload");
}
int32_t Download(LinspecCudaContext* context, void* host, const void* device, int64_t bytes) {
  return CopyBytes(context, host, device, bytes, cudaMemcpyDeviceToHost, true, "download");
}

int32_t Pack(LinspecCudaContext* context, const LinspecCudaSource* source, const LinspecCudaMatrix* matrix) {
  Context& c = *context->impl;
  LINSPEC_CUDA_TRY(c.Enter());
  const int64_t last = source->rows - 1;
  const int64_t last_row = source->row_begin + (source->interleave != 0 ? last / 8 * 16 + last % 8 : last);
  if (source->row_begin < 0 || last < 0 || last_row >= matrix->rows || source->cols != matrix->cols) {
    return c.Fail(kLinspecCudaInvalid, "pack: the rows do not fit the matrix");
  }
  const bool bytes = matrix->type == kLinspecCudaI8 || matrix->type == kLinspecCudaFp8;
  if (bytes && matrix->cols % 16 != 0) {  // columns change places within each 16 (stored_column.h)
    return c.Fail(kLinspecCudaUnsupported, "pack: int8 and fp8 need a number of columns that is a multiple of 16");
  }
  const int64_t row_bytes = source->cols * TypeBytes(source->type);
  const int64_t piece = source->data == nullptr
                            ? source->rows
                            : std::clamp<int64_t>(kStagingBytes / std::max<int64_t>(row_bytes, 1), 1, source->rows);
  for (int64_t row = 0; row < source->rows; row += piece) {
    const int64_t rows = std::min(piece, source->rows - row);
    const void* staged = nullptr;
    if (source->data != nullptr) {
      LINSPEC_CUDA_TRY(context->staging.Reserve(&c, rows * row_bytes));
      LINSPEC_CUDA_TRY(context->host_staging.Reserve(&c, rows * row_bytes));
      LINSPEC_CUDA_TRY(c.Sync("pack"));  // the piece before this one may still be read
      std::memcpy(context->host_staging.as<void>(), static_cast<const std::byte*>(source->data) + row * row_bytes,
                  rows * row_bytes);
      LINSPEC_CUDA_TRY(c.Check(cudaMemcpyAsync(context->staging.as<void>(), context->host_staging.as<void>(),
                                               rows * row_bytes, cudaMemcpyHostToDevice, c.stream()),
                               "upload weights"));
      staged = context->staging.as<void>();
    }
    if (source->type == kLinspecCudaI8 && source->data != nullptr) {
      LINSPEC_CUDA_TRY(context->staging_scales.Reserve(&c, rows * 4));
      LINSPEC_CUDA_TRY(c.Check(cudaMemcpyAsync(context->staging_scales.as<void>(), source->scales + row, rows * 4,
                                               cudaMemcpyHostToDevice, c.stream()),
                               "upload scales"));
    }
    const int32_t code =
        LaunchPack(*source, staged, context->staging_scales.as<float>(), row, rows, *matrix, c.stream());
    if (code != kLinspecCudaOk) return c.Fail(code, "pack: no conversion between these types");
    LINSPEC_CUDA_TRY(c.CheckLaunch("pack"));
  }
  return kLinspecCudaOk;
}

int32_t CreateModel(LinspecCudaContext* context, const LinspecCudaShape* shape, const LinspecCudaWeights* weights,
                    int32_t deterministic, LinspecCudaModel** model) {
  LINSPEC_CUDA_TRY(context->impl->Enter());
  LINSPEC_CUDA_TRY(context->impl->Sync("load weights"));  // the weights are there: their way in is no longer needed
  for (Buffer* buffer : {&context->staging, &context->staging_scales, &context->host_staging}) buffer->Release();
  std::unique_ptr<DeviceModel> made;
  LINSPEC_CUDA_TRY(DeviceModel::Create(context->impl.get(), *shape, *weights, deterministic != 0, &made));
  *model = new LinspecCudaModel{.impl = std::move(made)};
  return kLinspecCudaOk;
}

void DestroyModel(LinspecCudaModel* model) { delete model; }

int32_t ScratchBytes(LinspecCudaModel* model, const LinspecCudaStepSize* size, int64_t* bytes) {
  *bytes = model->impl->ScratchBytes(*size);
  return kLinspecCudaOk;
}
int32_t Reserve(LinspecCudaModel* model, const LinspecCudaStepSize* size) { return model->impl->Reserve(*size); }

int32_t Prefill(LinspecCudaModel* model, const LinspecCudaStep* step) { return model->impl->Prefill(*step); }
int32_t VerifyStart(LinspecCudaModel* model, const LinspecCudaStep* step) { return model->impl->VerifyStart(*step); }
int32_t VerifyNext(LinspecCudaModel* model) { return model->impl->VerifyNext(); }
int32_t VerifyFollow(LinspecCudaModel* model, LinspecCudaDrafter* drafter, const LinspecCudaFollow* follow) {
  return model->impl->VerifyFollow(drafter->impl.get(), *follow);
}
int32_t VerifyFinish(LinspecCudaModel* model, LinspecCudaVerifyResult* result) {
  return model->impl->VerifyFinish(result);
}
int32_t Commit(LinspecCudaModel* model, const LinspecCudaStates* states, const LinspecCudaTask* tasks,
               int32_t num_tasks, const int32_t* paths, int32_t num_paths) {
  return model->impl->Commit(*states, tasks, num_tasks, paths, num_paths);
}
int32_t Unembed(LinspecCudaModel* model, const float* hidden, int32_t rows, float* logits) {
  return model->impl->Unembed(hidden, rows, logits);
}

int32_t CreateRecurrentDrafter(LinspecCudaModel* target, const LinspecCudaRecurrentHead* head,
                               LinspecCudaDrafter** drafter) {
  std::unique_ptr<DeviceDrafter> made;
  LINSPEC_CUDA_TRY(DeviceDrafter::CreateRecurrent(target->impl.get(), *head, &made));
  *drafter = new LinspecCudaDrafter{.impl = std::move(made)};
  return kLinspecCudaOk;
}

int32_t CreateMedusaDrafter(LinspecCudaModel* target, const LinspecCudaMedusaHeads* heads,
                            LinspecCudaDrafter** drafter) {
  std::unique_ptr<DeviceDrafter> made;
  LINSPEC_CUDA_TRY(DeviceDrafter::CreateMedusa(target->impl.get(), *heads, &made));
  *drafter = new LinspecCudaDrafter{.impl = std::move(made)};
  return kLinspecCudaOk;
}

void DestroyDrafter(LinspecCudaDrafter* drafter) { delete drafter; }

int32_t Draft(LinspecCudaDrafter* drafter, const LinspecCudaDraftStep* step, LinspecCudaDraftResult* result) {
  return drafter->impl->Draft(*step, result);
}

int32_t DraftChains(LinspecCudaModel* draft, const LinspecCudaChainStep* step, LinspecCudaDraftResult* result) {
  return draft->impl->DraftChains(*step, result);
}

constexpr LinspecCudaApi kApi = {
    .abi_version = LINSPEC_CUDA_ABI_VERSION,
    .size = sizeof(LinspecCudaApi),
    .create = Create,
    .destroy = Destroy,
    .last_error = LastError,
    .device_info = DeviceInfo,
    .measure = Measure,
    .alloc = Alloc,
    .release = Release,
    .zero = Zero,
    .copy = Copy,
    .upload = Upload,
    .download = Download,
    .pack = Pack,
    .create_model = CreateModel,
    .destroy_model = DestroyModel,
    .scratch_bytes = ScratchBytes,
    .reserve = Reserve,
    .prefill = Prefill,
    .verify_start = VerifyStart,
    .verify_next = VerifyNext,
    .verify_follow = VerifyFollow,
    .verify_finish = VerifyFinish,
    .commit = Commit,
    .unembed = Unembed,
    .create_recurrent_drafter = CreateRecurrentDrafter,
    .create_medusa_drafter = CreateMedusaDrafter,
    .destroy_drafter = DestroyDrafter,
    .draft = Draft,
    .draft_chains = DraftChains,
};

}  // namespace
}  // namespace linspec::cuda

extern "C" __attribute__((visibility("default"))) const LinspecCudaApi* linspec_cuda_api(uint32_t abi_version) {
  return abi_version == LINSPEC_CUDA_ABI_VERSION ? &linspec::cuda::kApi : nullptr;
}
