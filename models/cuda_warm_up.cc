#include "models/cuda_warm_up.h"

#include <algorithm>
#include <optional>

#include "kernels/cuda/step_buckets.h"

namespace linspec {
namespace {

// A bucket and the one before it: sizes in (above, to].
struct Range {
  int above, to;
};

// Up to the bucket of `most`.
std::vector<Range> Buckets(int (*bucket)(int), int most) {
  std::vector<Range> ranges;
  for (int above = 0; above < most;) {
    ranges.push_back({above, bucket(above + 1)});
    above = ranges.back().to;
  }
  return ranges;
}

// A step with as many requests and rows as the buckets allow, the largest of its trees in `nodes`.
std::optional<VerifySize> Fit(Range requests, Range rows, Range nodes, const VerifySize& most) {
  const int largest = std::min(nodes.to, most.largest_tree), smallest = nodes.above + 1;
  for (const int n : {std::min(requests.to, most.requests), requests.above + 1}) {
    const int fit = std::min({rows.to, most.rows, n * largest});
    if (fit > rows.above && fit >= n - 1 + smallest) {
      return VerifySize{.requests = n, .rows = fit, .largest_tree = std::min(largest, fit - (n - 1))};
    }
  }
  return std::nullopt;
}

}  // namespace

std::vector<VerifySize> VerifyGraphSizes(int max_requests, int max_rows, int max_nodes) {
  VerifySize most{.requests = max_requests, .rows = std::min(max_rows, cuda::kMaxGraphRows), .largest_tree = max_nodes};
  most.requests = std::min(most.requests, most.rows);
  std::vector<VerifySize> sizes;
  for (const Range& nodes : Buckets(cuda::TreeBucket, most.largest_tree)) {
    for (const Range& requests : Buckets(cuda::PowerOfTwo, most.requests)) {
      for (const Range& rows : Buckets(cuda::RowBucket, most.rows)) {
        if (const auto size = Fit(requests, rows, nodes, most)) sizes.push_back(*size);
      }
    }
  }
  const auto largest = std::max_element(sizes.begin(), sizes.end(),
                                        [](const VerifySize& a, const VerifySize& b) { return a.rows < b.rows; });
  if (largest != sizes.end()) std::rotate(sizes.begin(), largest, largest + 1);
  return sizes;
}

}  // namespace linspec
