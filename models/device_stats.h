// What a device backend tells the metrics. Values only.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace linspec {

struct DeviceStats {
  std::string device;  // which one, e.g. "0"
  std::string name;    // what it is, e.g. "NVIDIA H100 80GB HBM3"
  // By kind: "weights", "states", "scratch" (ours), "used", "total" (the whole device's). Kinds are a short fixed list.
  std::vector<std::pair<std::string, int64_t>> memory_bytes;
  // Seconds the device was busy since the start, by what for: "prefill", "draft", "verify", "commit".
  std::vector<std::pair<std::string, double>> busy_seconds;
};

}  // namespace linspec
