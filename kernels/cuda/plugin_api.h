// The C ABI between the server and liblinspec_cuda.so, which alone holds CUDA code. Plain data only; loaded by dlopen.
//
// Every function returns a LinspecCudaCode; last_error(context) says more. After kLinspecCudaDeviceError the context is
// poisoned: every later call returns the same code, and the process must make a new context or stop. Threads: one at a
// time per context. Pointers marked "host" are read before the function returns.
#pragma once

#include <stdint.h>

#define LINSPEC_CUDA_ABI_VERSION 1
#define LINSPEC_CUDA_ENTRY "linspec_cuda_api"

#ifdef __cplusplus
extern "C" {
#endif

enum LinspecCudaCode {
  kLinspecCudaOk = 0,
  kLinspecCudaNoDevice = 1,     // no driver, no GPU, or one that the plugin holds no code for
  kLinspecCudaOutOfMemory = 2,  // the context stays usable
  kLinspecCudaDeviceError = 3,  // poisoned
  kLinspecCudaUnsupported = 4,  // a shape or type without a kernel
  kLinspecCudaInvalid = 5,      // an argument breaks the contract
};

enum LinspecCudaType {
  kLinspecCudaF32 = 0,
  kLinspecCudaF16 = 1,
  kLinspecCudaBf16 = 2,
  kLinspecCudaI8 = 3,   // with one fp32 scale per row
  kLinspecCudaFp8 = 4,  // e4m3, with one fp32 scale per row
};

typedef struct LinspecCudaContext LinspecCudaContext;
typedef struct LinspecCudaModel LinspecCudaModel;

typedef struct LinspecCudaMatrix {  // row-major, device memory
  const void* data;
  const float* scales;  // [rows] or null
  int64_t rows, cols;
  int32_t type;  // LinspecCudaType
  int32_t reserved;
} LinspecCudaMatrix;

typedef struct LinspecCudaDeviceInfo {
  char name[128];
  int64_t total_bytes, free_bytes;
  int32_t major, minor, num_sms, reserved;
} LinspecCudaDeviceInfo;

typedef struct LinspecCudaShape {
  int64_t hidden_size, intermediate_size, vocab_size;
  int32_t num_layers, num_heads, num_kv_heads, head_dim, group_size, conv_kernel, local, global;
  float rms_norm_eps, rope_theta, qk_norm_eps, global_norm_eps;
} LinspecCudaShape;

typedef struct LinspecCudaLayer {  // device pointers; null where the shape has no such branch
  const float *attention_norm, *mlp_norm, *global_gain, *decay, *conv_taps;
  LinspecCudaMatrix qkv, o, gate_up, down;
  float global_factor;
  int32_t reserved;
} LinspecCudaLayer;

typedef struct LinspecCudaWeights {
  LinspecCudaMatrix embedding, lm_head;
  const float* final_norm;
  const LinspecCudaLayer* layers;  // host [num_layers]
} LinspecCudaWeights;

typedef struct LinspecCudaTask {  // host; the layout of linspec::cuda::Task
  int64_t length;
  int32_t slot, row_begin, num_rows, path_begin, path_length, reserved;
} LinspecCudaTask;

typedef struct LinspecCudaStates {  // device memory of all slots: [slot][layer][S | ring_k | ring_v]
  float* base;
  int64_t floats_per_slot, floats_per_layer;
} LinspecCudaStates;

typedef struct LinspecCudaBatch {  // host arrays
  LinspecCudaStates states;
  const LinspecCudaTask* tasks;
  const int32_t* tokens;      // [num_rows]
  const int64_t* positions;   // [num_rows]
  const uint64_t* ancestors;  // [num_rows], null in prefill
  int32_t num_tasks, num_rows;
} LinspecCudaBatch;

typedef struct LinspecCudaApi {
  uint32_t abi_version, size;
  int32_t (*create)(int32_t device, LinspecCudaContext** context);
  void (*destroy)(LinspecCudaContext*);
  const char* (*last_error)(LinspecCudaContext*);  // null context: why create failed
  int32_t (*device_info)(LinspecCudaContext*, LinspecCudaDeviceInfo*);

  int32_t (*alloc)(LinspecCudaContext*, int64_t bytes, void** device);
  int32_t (*release)(LinspecCudaContext*, void* device);
  int32_t (*zero)(LinspecCudaContext*, void* device, int64_t bytes);
  int32_t (*copy)(LinspecCudaContext*, void* to, const void* from, int64_t bytes);  // device to device
  int32_t (*upload)(LinspecCudaContext*, void* device, const void* host, int64_t bytes);
  int32_t (*download)(LinspecCudaContext*, void* host, const void* device, int64_t bytes);

  int32_t (*create_model)(LinspecCudaContext*, const LinspecCudaShape*, const LinspecCudaWeights*, LinspecCudaModel**);
  void (*destroy_model)(LinspecCudaModel*);
  // logits [num_rows, V] and hidden [num_rows, D] are host memory of the model, valid until its next call.
  int32_t (*verify)(LinspecCudaModel*, const LinspecCudaBatch*, const float** logits, const float** hidden);
  int32_t (*prefill)(LinspecCudaModel*, const LinspecCudaBatch*);
  // tasks as given to the last verify, with paths filled in.
  int32_t (*commit)(LinspecCudaModel*, const LinspecCudaBatch*, const int32_t* paths, int32_t num_paths);
} LinspecCudaApi;

// Null if the plugin does not speak abi_version.
typedef const LinspecCudaApi* (*LinspecCudaEntry)(uint32_t abi_version);

#ifdef __cplusplus
}
#endif
