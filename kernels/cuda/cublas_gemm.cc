#include "kernels/cuda/cublas_gemm.h"

#include <cublasLt.h>
#include <dlfcn.h>
#include <glob.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <map>
#include <tuple>
#include <vector>

namespace linspec::cuda {
namespace {

constexpr char kLibrary[] = "libcublasLt.so.13";
constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;
constexpr int64_t kWidenedBytes = int64_t{32} << 20;  // a slice of widened weights: half of an H200's L2

// cuBLASLt's results for fp32 alpha and beta in host memory.
constexpr float kOne = 1.0f, kZero = 0.0f;

std::vector<std::string> Candidates(const std::string& folder) {
  if (!folder.empty()) return {folder + "/" + kLibrary};
  std::vector<std::string> paths = {kLibrary, std::string("/usr/local/cuda/lib64/") + kLibrary,
                                    std::string("/usr/local/cuda-13.0/lib64/") + kLibrary,
                                    std::string("/usr/lib/x86_64-linux-gnu/") + kLibrary};
  std::vector<std::string> patterns = {"/usr/lib/python3*/*-packages", "/usr/local/lib/python3*/*-packages",
                                       "/opt/*/lib/python3*/site-packages", "/opt/*/.venv/lib/python3*/site-packages"};
  for (const char* variable : {"VIRTUAL_ENV", "CONDA_PREFIX"}) {
    if (const char* prefix = std::getenv(variable))
      patterns.push_back(std::string(prefix) + "/lib/python3*/site-packages");
  }
  if (const char* home = std::getenv("HOME"))
    patterns.push_back(std::string(home) + "/.local/lib/python3*/site-packages");
  for (const std::string& pattern : patterns) {
    glob_t found{};
    if (glob((pattern + "/nvidia/*/lib/" + kLibrary).c_str(), 0, nullptr, &found) == 0) {
      paths.insert(paths.end(), found.gl_pathv, found.gl_pathv + found.gl_pathc);
    }
    globfree(&found);
  }
  return paths;
}

struct Api {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtDestroy) destroy;
  decltype(&cublasLtMatmul) matmul;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmulDescCreate) desc_create;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&cublasLtGetStatusString) status_string;
};

template <typename Function>
bool Find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

bool FindAll(void* library, Api* api) {
  return Find(library, "cublasLtCreate", &api->create) && Find(library, "cublasLtDestroy", &api->destroy) &&
         Find(library, "cublasLtMatmul", &api->matmul) &&
         Find(library, "cublasLtMatmulAlgoGetHeuristic", &api->heuristic) &&
         Find(library, "cublasLtMatmulDescCreate", &api->desc_create) &&
         Find(library, "cublasLtMatmulDescDestroy", &api->desc_destroy) &&
         Find(library, "cublasLtMatmulDescSetAttribute", &api->desc_set) &&
         Find(library, "cublasLtMatrixLayoutCreate", &api->layout_create) &&
         Find(library, "cublasLtMatrixLayoutDestroy", &api->layout_destroy) &&
         Find(library, "cublasLtMatmulPreferenceCreate", &api->preference_create) &&
         Find(library, "cublasLtMatmulPreferenceDestroy", &api->preference_destroy) &&
         Find(library, "cublasLtMatmulPreferenceSetAttribute", &api->preference_set) &&
         Find(library, "cublasLtGetStatusString", &api->status_string);
}

// (bucket of rows, N, row stride of y, K, bf16 output, accumulate)
using Key = std::tuple<int, int64_t, int64_t, int64_t, bool, bool>;

// Algorithms depend little on the number of rows: powers of two, and multiples of 256 from there on.
int Bucket(int rows) {
  return rows <= 256 ? static_cast<int>(std::bit_ceil(static_cast<unsigned>(rows))) : (rows + 255) / 256 * 256;
}

}  // namespace

struct CublasGemm::State {
  void* library = nullptr;
  std::string path;
  Api api{};
  cublasLtHandle_t handle = nullptr;
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;
  void* workspace = nullptr;
  void* widened = nullptr;
  std::map<Key, cublasLtMatmulAlgo_t> algorithms;

  ~State() {
    cudaFree(workspace);
    cudaFree(widened);
    if (preference != nullptr) api.preference_destroy(preference);
    if (desc != nullptr) api.desc_destroy(desc);
    if (handle != nullptr) api.destroy(handle);
    if (library != nullptr) dlclose(library);
  }

  // Handle, descriptors and workspaces; false with `why`.
  bool Start(std::string* why);
};

bool CublasGemm::State::Start(std::string* why) {
  const cublasOperation_t transpose = CUBLAS_OP_T;
  const uint64_t bytes = kWorkspaceBytes;
  cublasStatus_t status = api.create(&handle);
  if (status == CUBLAS_STATUS_SUCCESS) status = api.desc_create(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  if (status == CUBLAS_STATUS_SUCCESS) {
    status = api.desc_set(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof(transpose));
  }
  if (status == CUBLAS_STATUS_SUCCESS) status = api.preference_create(&preference);
  if (status == CUBLAS_STATUS_SUCCESS) {
    status = api.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes));
  }
  if (status != CUBLAS_STATUS_SUCCESS) {
    *why = path + ": " + api.status_string(status);
    return false;
  }
  for (void** memory : {&workspace, &widened}) {
    const cudaError_t error = cudaMalloc(memory, memory == &workspace ? kWorkspaceBytes : kWidenedBytes);
    if (error != cudaSuccess) {
      cudaGetLastError();  // reported here, not to the next launch
      *why = path + ": workspace: " + cudaGetErrorString(error);
      return false;
    }
  }
  return true;
}

std::unique_ptr<CublasGemm> CublasGemm::Open(const std::string& folder, std::string* why) {
  std::string tried;
  for (const std::string& path : Candidates(folder)) {
    auto state = std::make_unique<State>();
    state->library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (state->library == nullptr) {
      tried += (tried.empty() ? "" : ", ") + path;
      continue;
    }
    state->path = path;
    if (!FindAll(state->library, &state->api)) {
      *why = path + ": not a cuBLASLt 13 library";
      return nullptr;
    }
    if (!state->Start(why)) return nullptr;
    auto gemm = std::make_unique<CublasGemm>();
    gemm->state_ = std::move(state);
    return gemm;
  }
  *why = std::string(kLibrary) + " not found; tried " + tried;
  return nullptr;
}

CublasGemm::~CublasGemm() = default;

const std::string& CublasGemm::path() const { return state_->path; }

LinspecCudaCode CublasGemm::Multiply(const GemmParams& params, const void* w, int64_t row_begin, int64_t w_rows,
                                     int rows, cudaStream_t stream) {
  // Column-major: y^T [w_rows, rows] = w (stored [K, w_rows], transposed) times x (stored [K, rows]).
  State& s = *state_;
  const bool bf16 = params.y_bf16 != nullptr;
  const int64_t depth = params.w.cols, stride = params.w.rows;
  void* y = bf16 ? static_cast<void*>(params.y_bf16 + row_begin) : static_cast<void*>(params.y + row_begin);
  const cudaDataType_t type = bf16 ? CUDA_R_16BF : CUDA_R_32F;
  const int bucket = Bucket(rows);
  const Key key{bucket, w_rows, stride, depth, bf16, params.accumulate};
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
  cublasStatus_t status = s.api.layout_create(&a, CUDA_R_16BF, depth, w_rows, depth);
  if (status == CUBLAS_STATUS_SUCCESS) status = s.api.layout_create(&b, CUDA_R_16BF, depth, rows, depth);
  if (status == CUBLAS_STATUS_SUCCESS) status = s.api.layout_create(&d, type, w_rows, rows, stride);
  auto found = s.algorithms.find(key);
  if (status == CUBLAS_STATUS_SUCCESS && found == s.algorithms.end()) {
    cublasLtMatmulHeuristicResult_t result{};
    int count = 0;
    status = s.api.heuristic(s.handle, s.desc, a, b, d, d, s.preference, 1, &result, &count);
    if (status == CUBLAS_STATUS_SUCCESS && count == 0) status = CUBLAS_STATUS_NOT_SUPPORTED;
    if (status == CUBLAS_STATUS_SUCCESS) found = s.algorithms.emplace(key, result.algo).first;
  }
  if (status == CUBLAS_STATUS_SUCCESS) {
    status = s.api.matmul(s.handle, s.desc, &kOne, w, a, params.x, b, params.accumulate ? &kOne : &kZero, y, d, y, d,
                          &found->second, s.workspace, kWorkspaceBytes, stream);
  }
  for (const cublasLtMatrixLayout_t layout : {a, b, d}) {
    if (layout != nullptr) s.api.layout_destroy(layout);
  }
  if (status == CUBLAS_STATUS_SUCCESS) return kLinspecCudaOk;
  last_error_ = "cublasLtMatmul of " + std::to_string(rows) + " rows by [" + std::to_string(w_rows) + ", " +
                std::to_string(depth) + "]: " + s.api.status_string(status);
  const bool unsupported = status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE;
  return unsupported ? kLinspecCudaUnsupported : kLinspecCudaDeviceError;
}

LinspecCudaCode CublasGemm::Launch(const GemmParams& params, int rows, cudaStream_t stream) {
  const LinspecCudaMatrix& w = params.w;
  if (params.silu_mul) {
    last_error_ = "silu_mul is not an epilogue of cuBLASLt";
    return kLinspecCudaUnsupported;
  }
  if (w.type == kLinspecCudaBf16) return Multiply(params, w.data, 0, w.rows, rows, stream);
  const int64_t slice = std::max<int64_t>(kWidenedBytes / (2 * w.cols) / 16 * 16, 16);
  for (int64_t row = 0; row < w.rows; row += slice) {
    const int64_t count = std::min(slice, w.rows - row);
    LaunchWidenWeights(w, row, count, static_cast<uint16_t*>(state_->widened), stream);
    if (const LinspecCudaCode code = Multiply(params, state_->widened, row, count, rows, stream);
        code != kLinspecCudaOk) {
      return code;
    }
  }
  return kLinspecCudaOk;
}

}  // namespace linspec::cuda
