// The shape of an attention layer, as the device tests list them.
#pragma once

namespace linspec::cuda {

struct Shape {
  int heads, kv_heads, d, group, conv;
  bool local;
  int global;  // as GlobalBranch: 0 none, 1 scaled, 2 RMS norm
  bool decay;
};

}  // namespace linspec::cuda
