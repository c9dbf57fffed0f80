// Large matrix products through cuBLASLt, which is found on the machine at run time and never linked: it is 0.5 GB that
// nobody should have to ship, and its static TLS would break threads with small stacks.
//
// One object per device context, used by one thread at a time. It owns its library handle, a cuBLASLt handle and device
// workspaces; they live until destruction, which must come after the last launch has ended.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/cuda/launch.h"

namespace linspec::cuda {

class CublasGemm {
 public:
  // Loads libcublasLt.so.13: `folder` if given, else the dynamic loader's own search (LD_LIBRARY_PATH, ld.so.cache),
  // then the toolkit's and Python packages' usual folders. Null with `why` set, naming what was tried, if none is
  // usable on the current device: callers then use LaunchTiledGemm and say so in their log.
  static std::unique_ptr<CublasGemm> Open(const std::string& folder, std::string* why);
  CublasGemm() = default;
  CublasGemm(const CublasGemm&) = delete;
  CublasGemm& operator=(const CublasGemm&) = delete;
  ~CublasGemm();

  // The product of LaunchStreamingGemm (bf16 operands, fp32 sums; not its bits), except silu_mul. int8 and fp8 weights
  // are widened to bf16 in slices that stay in the L2, with the row scale rounded into them.
  // kLinspecCudaUnsupported: cuBLASLt has no algorithm for this product; last_error() says more. Heuristics are asked
  // once per (bucket of rows, N, K, output), so that a step captured into a graph pays nothing.
  LinspecCudaCode Launch(const GemmParams& params, int rows, cudaStream_t stream);

  const std::string& last_error() const { return last_error_; }
  const std::string& path() const;  // of the library in use

 private:
  struct State;
  LinspecCudaCode Multiply(const GemmParams& params, const void* w, int64_t row_begin, int64_t w_rows, int rows,
                           cudaStream_t stream);
  std::unique_ptr<State> state_;
  std::string last_error_;
};

}  // namespace linspec::cuda
