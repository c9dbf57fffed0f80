// Any bytes as a safetensors file: refused or every view readable.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "models/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto owner = std::make_shared<std::string>(reinterpret_cast<const char*>(data), size);
  const auto tensors = linspec::ParseSafetensors(std::as_bytes(std::span(*owner)), owner, "fuzz");
  if (!tensors.ok()) return 0;
  volatile unsigned sum = 0;
  for (const auto& [name, tensor] : *tensors) {
    for (int64_t i = 0; i < tensor.num_bytes; ++i) sum = sum + static_cast<unsigned>(tensor.data[i]);
  }
  return 0;
}
