// A GPU, its stream and its error state: what every call of the plugin goes through.
//
// Errors are LinspecCudaCode; the text of the last one stays in last_error(). A device error (a fault in a kernel, a
// lost GPU) poisons the context: CUDA answers every later call with the same error, and so does this class.
// Threads: one at a time. Ownership: whoever allocates frees; the context must outlive what was made on it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/cuda/cublas_gemm.h"
#include "kernels/cuda/plugin_api.h"

namespace linspec::cuda {

class Context {
 public:
  // On kLinspecCudaNoDevice and others *error says why and *context stays null.
  static int32_t Create(int device, Context** context, std::string* error);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  cudaStream_t stream() const { return stream_; }
  // Null where cuBLASLt is not installed: cublas_note() says what was tried, else which one it is.
  CublasGemm* cublas() const { return cublas_.get(); }
  const std::string& cublas_note() const { return cublas_note_; }
  const cudaDeviceProp& properties() const { return properties_; }
  const std::string& last_error() const { return last_error_; }

  // Turns the outcome of a CUDA call into a code and keeps its text.
  int32_t Check(cudaError_t error, const char* what);
  int32_t Fail(int32_t code, std::string message);
  int32_t CheckLaunch(const char* what) { return Check(cudaPeekAtLastError(), what); }
  // kLinspecCudaOk, or the device error that poisoned the context. Makes the device current for this thread.
  int32_t Enter();

  int32_t Alloc(int64_t bytes, void** device);
  int32_t AllocPinned(int64_t bytes, void** host);
  int32_t Sync(const char* what) { return Check(cudaStreamSynchronize(stream_), what); }

 private:
  Context() = default;
  int device_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaDeviceProp properties_ = {};
  std::string last_error_, cublas_note_;
  bool poisoned_ = false;
  std::unique_ptr<CublasGemm> cublas_;
};

// Device (or pinned host) memory that grows to the largest size asked for. Growing frees the old block: call when
// nothing in flight uses it. `generation` counts the growths, so that captured graphs know when they are stale.
class Buffer {
 public:
  explicit Buffer(bool pinned = false) : pinned_(pinned) {}
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  int32_t Reserve(Context* context, int64_t bytes);
  void Release();
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  int64_t bytes() const { return bytes_; }
  int generation() const { return generation_; }

 private:
  const bool pinned_;
  void* data_ = nullptr;
  int64_t bytes_ = 0;
  int generation_ = 0;
};

// Parts of a buffer begin at multiples of `unit` bytes.
constexpr int64_t Align(int64_t bytes, int64_t unit = 256) { return (bytes + unit - 1) / unit * unit; }
template <typename T>
constexpr int64_t AlignedBytes(int64_t count) {
  return Align(count * static_cast<int64_t>(sizeof(T)));
}

// Leaves the function with the code of a call that failed.
#define LINSPEC_CUDA_TRY(call)                                                                    \
  do {                                                                                            \
    if (const int32_t linspec_code = (call); linspec_code != kLinspecCudaOk) return linspec_code; \
  } while (false)

}  // namespace linspec::cuda
