// Element types of stored tensors. Arithmetic is fp32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace linspec {

// kF8: e4m3 with one fp32 scale per row; weights on a GPU only.
enum class DType : uint8_t { kF32, kF16, kBF16, kI8, kI32, kI64, kF8 };

size_t DTypeSize(DType dtype);       // bytes per element
const char* DTypeName(DType dtype);  // safetensors' spelling: "F32", "BF16", ...
float HalfToFloat(uint16_t bits);    // IEEE binary16
float BFloat16ToFloat(uint16_t bits);
uint16_t FloatToBFloat16(float value);  // round to nearest even

}  // namespace linspec
