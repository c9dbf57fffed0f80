// What this machine reaches at best, in multiplication and in reading: the floors of benchmarks.
//
// Threads: any; each function starts num_threads of its own and joins them, and takes 50 to 100 ms. The machine must be
// able to run isa.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/ops.h"

namespace linspec {

// Multiply-adds per second of num_threads >= 1 threads together, on registers alone, with the instructions that isa
// uses for products with weights of `dtype` (kI8: 8-bit integers; else fp32).
double MeasureMultiplyAddPeak(Isa isa, DType dtype, int num_threads);

// Bytes/s that the threads together read, each going over its share of `bytes` again and again, on the pages that
// weights lie on: what an op with that working set could reach, be it in cache or in memory.
double MeasureReadBandwidth(Isa isa, int num_threads, int64_t bytes);

}  // namespace linspec
