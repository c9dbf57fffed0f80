// What a step of a model has to do at least, and what this machine could do it with.
//
// Threads: any; MeasurePeaks starts threads of its own and takes 0.1 s.
#pragma once

#include "kernels/ops.h"
#include "models/model_config.h"

namespace linspec {

// Of one step; bytes and multiply-adds.
struct Work {
  double bytes;        // read: weights, and of each request S and its window, averaged over the positions of a group
  double weight_macs;  // products with weights
  double float_macs;   // attention, in fp32
};
// `batch` requests with `rows` tree nodes each.
Work StepWork(const ModelConfig& config, double weight_bytes, int batch, int rows);

struct Peaks {  // multiply-adds per second of all threads together
  double weights, floats;
};
Peaks MeasurePeaks(Isa isa, DType weight_dtype, int num_threads);
double ArithmeticSeconds(const Work& work, const Peaks& peaks);

}  // namespace linspec
