// Device memory, events and comparisons for the device test and benchmark. Any CUDA error ends the program with code 2.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <utility>
#include <vector>

namespace linspec::cuda {

inline void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

inline void Sync() {
  Check(cudaGetLastError(), "launch");
  Check(cudaDeviceSynchronize(), "kernel");
}

// Filled with NaN patterns when made, so that an element that no kernel wrote is seen.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t size) : size_(size) {
    Check(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(size, 1) * sizeof(T)), "cudaMalloc");
    Check(cudaMemset(data_, 0xFF, std::max<size_t>(size, 1) * sizeof(T)), "cudaMemset");
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    Check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "upload");
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }
  T* get() const { return data_; }
  size_t size() const { return size_; }
  std::vector<T> Read() const {
    std::vector<T> values(size_);
    Check(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "download");
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

inline std::vector<float> Normal(std::mt19937& generator, size_t size, float scale) {
  std::normal_distribution<float> normal;
  std::vector<float> values(size);
  for (float& x : values) x = normal(generator) * scale;
  return values;
}

// ||a - b|| / ||b||; infinite if a holds a NaN.
inline double RelativeError(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    if (!std::isfinite(a[i])) return INFINITY;
    difference += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    norm += double{b[i]} * b[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-30));
}

// Median device time of work in microseconds; `batch` runs between two events amortise the event cost.
inline double MedianMicroseconds(const std::function<void(int)>& work, int repeats = 15, int batch = 8) {
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin), "event");
  Check(cudaEventCreate(&end), "event");
  for (int i = 0; i < batch; ++i) work(i);
  Sync();
  std::vector<float> times;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    Check(cudaEventRecord(begin), "record");
    for (int i = 0; i < batch; ++i) work(i);
    Check(cudaEventRecord(end), "record");
    Sync();
    float milliseconds = 0;
    Check(cudaEventElapsedTime(&milliseconds, begin, end), "elapsed");
    times.push_back(milliseconds * 1000.0f / static_cast<float>(batch));
  }
  std::sort(times.begin(), times.end());
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return times[times.size() / 2];
}

}  // namespace linspec::cuda
