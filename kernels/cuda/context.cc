#include "kernels/cuda/context.h"

#include <memory>
#include <utility>

namespace linspec::cuda {

int32_t Context::Create(int device, Context** context, std::string* error) {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || device < 0 || device >= count) {
    *error = status != cudaSuccess
                 ? std::string("no usable GPU: ") + cudaGetErrorString(status)
                 : "there is no GPU " + std::to_string(device) + "; " + std::to_string(count) + " found";
    return kLinspecCudaNoDevice;
  }
  std::unique_ptr<Context> made(new Context());
  made->device_ = device;
  int32_t code = made->Enter();
  if (code == kLinspecCudaOk)
    code = made->Check(cudaGetDeviceProperties(&made->properties_, device), "device properties");
  if (code == kLinspecCudaOk) {
    code = made->Check(cudaStreamCreateWithFlags(&made->stream_, cudaStreamNonBlocking), "stream");
  }
  if (code != kLinspecCudaOk) {
    *error = made->last_error();
    return code;
  }
  made->cublas_ = CublasGemm::Open("", &made->cublas_note_);
  if (made->cublas_ != nullptr) made->cublas_note_ = made->cublas_->path();
  *context = made.release();
  return kLinspecCudaOk;
}

Context::~Context() {
  cublas_.reset();
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

int32_t Context::Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return kLinspecCudaOk;
  cudaGetLastError();  // clears what is not sticky
  std::string message = std::string(what) + ": " + cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation) return Fail(kLinspecCudaOutOfMemory, std::move(message));
  if (error == cudaErrorNoKernelImageForDevice) return Fail(kLinspecCudaNoDevice, std::move(message));
  poisoned_ = true;
  return Fail(kLinspecCudaDeviceError, std::move(message));
}

int32_t Context::Fail(int32_t code, std::string message) {
  last_error_ = std::move(message);
  return code;
}

int32_t Context::Enter() {
  if (poisoned_) return kLinspecCudaDeviceError;
  return Check(cudaSetDevice(device_), "select the GPU");
}

int32_t Context::Alloc(int64_t bytes, void** device) {
  const cudaError_t error = cudaMalloc(device, bytes > 0 ? bytes : 1);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free_bytes = 0, total = 0;
    cudaMemGetInfo(&free_bytes, &total);
    return Fail(kLinspecCudaOutOfMemory, "cannot allocate " + std::to_string(bytes) + " bytes on the GPU: " +
                                             std::to_string(free_bytes) + " of " + std::to_string(total) + " are free");
  }
  return Check(error, "allocate");
}

int32_t Context::AllocPinned(int64_t bytes, void** host) {
  return Check(cudaMallocHost(host, bytes > 0 ? bytes : 1), "allocate pinned memory");
}

Buffer::~Buffer() { Release(); }

void Buffer::Release() {
  if (data_ != nullptr) pinned_ ? cudaFreeHost(data_) : cudaFree(data_);
  data_ = nullptr;
  bytes_ = 0;
}

int32_t Buffer::Reserve(Context* context, int64_t bytes) {
  if (bytes <= bytes_) return kLinspecCudaOk;
  LINSPEC_CUDA_TRY(context->Sync("grow a buffer"));
  void* fresh = nullptr;
  LINSPEC_CUDA_TRY(pinned_ ? context->AllocPinned(bytes, &fresh) : context->Alloc(bytes, &fresh));
  if (data_ != nullptr) pinned_ ? cudaFreeHost(data_) : cudaFree(data_);
  data_ = fresh;
  bytes_ = bytes;
  ++generation_;
  return kLinspecCudaOk;
}

}  // namespace linspec::cuda
