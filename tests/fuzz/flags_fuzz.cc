// A configuration file: applied, or refused with a message that names the file.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "server/config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  linspec::ServerConfig config;
  const std::string yaml(reinterpret_cast<const char*>(data), size);
  const absl::Status status = linspec::ApplyYaml(yaml, "fuzz.yaml", &config);
  if (!status.ok() && status.message().find("fuzz.yaml") == absl::string_view::npos) std::abort();
  if (status.ok() && linspec::DescribeConfig(config).empty()) std::abort();
  return 0;
}
