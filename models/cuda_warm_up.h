// Which verify steps a GPU keeps a CUDA graph for, so that they can be captured before a request needs them.
// Threads: any.
#pragma once

#include <vector>

#include "models/model.h"

namespace linspec {

// One step for each graph that serves steps of up to max_requests requests with up to max_nodes rows each, max_rows in
// all (kernels/cuda/step_buckets.h). The largest comes first, because what it makes room for serves the others; then
// those of one row a request; then by requests.
std::vector<VerifySize> VerifyGraphSizes(int max_requests, int max_rows, int max_nodes);

}  // namespace linspec
