// Programmatic dependent launch: a kernel starts while the one before it in the stream still runs, and does what does
// not depend on it, such as filling its shared memory with weights. Works under graph capture. Below sm_90 the device
// functions do nothing and the launch is an ordinary one.
//
// The rule for every kernel launched with LaunchOverlapped: each thread calls GridWait before it reads what an earlier
// kernel wrote or writes what an earlier kernel reads. GridWait returns when all earlier kernels have ended and their
// writes are visible. GridLaunchDependents lets the next kernel start; called first thing it costs nothing, since the
// next one waits for itself, and blocks of it only take what room the running blocks leave.
#pragma once

#include <cuda_runtime.h>

namespace linspec::cuda {

__device__ __forceinline__ void GridWait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void GridLaunchDependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

struct Device {
  int id = -1, major = 0, processors = 1;
  int shared_per_processor = 0, shared_per_block = 0;  // bytes; the latter with the kernel's consent
};

// Of the current device, asked once per thread and device.
inline const Device& CurrentDevice() {
  thread_local Device device;
  int id = 0;
  if (cudaGetDevice(&id) != cudaSuccess || id == device.id) return device;
  cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, id);
  cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, id);
  cudaDeviceGetAttribute(&device.shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
  cudaDeviceGetAttribute(&device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  device.id = id;
  return device;
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...) that may start before its predecessor has ended.
// cluster > 1: thread block clusters of that many blocks along x (sm_90 and later).
template <typename... Parameters, typename... Arguments>
cudaError_t LaunchOverlapped(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                             cudaStream_t stream, unsigned cluster, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = CurrentDevice().major < 9 ? 0 : cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace linspec::cuda
