// Any bytes as config.json: refused, or a shape whose sizes can be computed without overflow.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "models/model_config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto config = linspec::ParseModelConfig(std::string_view(reinterpret_cast<const char*>(data), size));
  if (config.ok() && (config->NumParameters() <= 0 || config->StateBytes(linspec::DType::kF32) <= 0)) std::abort();
  return 0;
}
