// Weights as they arrive (f32, f16, bf16, int8 with scales, or drawn at random) to weights as the kernels read them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/plugin_api.h"

namespace linspec::cuda {

// Converts `rows` rows of source to rows [source.row_begin, ...) of matrix. staged is the same part of source.data in
// device memory (null when source.data is null: the values are drawn); staged_scales likewise. Types without a scale
// are rounded to nearest even; int8 and fp8 get scale = max |row| / 127 or / 448. int8 to int8 keeps bits and scales.
// Columns of int8 and fp8 lie as stored_column.h says, and their number is a multiple of 16.
// kLinspecCudaUnsupported for a pair of types that has no conversion.
int32_t LaunchPack(const LinspecCudaSource& source, const void* staged, const float* staged_scales, int64_t row,
                   int64_t rows, const LinspecCudaMatrix& matrix, cudaStream_t stream);

int64_t TypeBytes(int32_t type);  // of one element

// A sum over [0, floats) of data, one partial sum a block: the read-bandwidth ceiling. floats % 1024 == 0.
void LaunchReadSum(const float* data, int64_t floats, float* out, int blocks, cudaStream_t stream);

}  // namespace linspec::cuda
