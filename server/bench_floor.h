// What a step of a model has to do at least, and what the machine it runs on could do it with.
//
// Threads: any; measuring starts threads of its own and takes up to 0.2 s.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "models/model_config.h"
#include "server/model_files.h"

namespace linspec {

// Of one step; bytes and multiply-adds.
struct Work {
  double bytes;        // read: weights, and of each request S and its window, averaged over the positions of a group
  double weight_macs;  // products with weights
  double float_macs;   // attention, in fp32
};
// `batch` requests with `rows` tree nodes each.
Work StepWork(const ModelConfig& config, double weight_bytes, int batch, int rows);

// The ceilings of the machine that the model runs on.
class Machinery {
 public:
  // weights: the type of the matrices. Errors: the device's.
  static absl::StatusOr<Machinery> Measure(const Machine& machine, DType weights);

  // Bytes/s that a step of `bytes` could read: from cache or memory on a CPU, measured anew; from memory on a GPU.
  double ReadBandwidth(double bytes) const;
  double ArithmeticSeconds(const Work& work) const;  // 0: not measured
  std::string Describe() const;                      // members of a JSON object

 private:
  bool cuda_ = false;
  Isa isa_ = Isa::kScalar;
  int threads_ = 0;
  double bytes_per_s_ = 0;                               // GPU only
  double weight_macs_per_s_ = 0, float_macs_per_s_ = 0;  // 0: not measured
};

}  // namespace linspec
