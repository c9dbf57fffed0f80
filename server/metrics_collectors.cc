// Values that this process does not count itself: read from the kernel and from a device backend.
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "server/metrics.h"

namespace linspec {
namespace {

// Fields of /proc/self/stat after the command, which may hold blanks and parentheses; [0] is field 3 of proc(5).
std::vector<std::string> StatFields() {
  std::ifstream file("/proc/self/stat");
  std::string line;
  std::getline(file, line);
  std::vector<std::string> fields;
  const size_t end = line.rfind(')');
  if (end == std::string::npos) return fields;
  std::istringstream rest(line.substr(end + 1));
  for (std::string field; rest >> field;) fields.push_back(field);
  return fields;
}

double BootTime() {
  std::ifstream file("/proc/stat");
  for (std::string word; file >> word;) {
    double seconds = 0;
    if (word == "btime" && file >> seconds) return seconds;
  }
  return 0;
}

}  // namespace

std::vector<MetricSample> ProcessSamples() {
  // Indices into StatFields of proc(5)'s utime, stime, starttime, vsize and rss.
  constexpr size_t kUser = 11, kSystem = 12, kStart = 19, kVirtual = 20, kResident = 21;
  const std::vector<std::string> fields = StatFields();
  if (fields.size() <= kResident) return {};  // no /proc
  const auto number = [&](size_t index) { return std::strtod(fields[index].c_str(), nullptr); };
  const double ticks = static_cast<double>(sysconf(_SC_CLK_TCK)), page = static_cast<double>(sysconf(_SC_PAGESIZE));
  std::error_code error;
  double open_files = 0;
  for (auto it = std::filesystem::directory_iterator("/proc/self/fd", error); !error && it != end(it);
       it.increment(error))
    ++open_files;
  std::vector<MetricSample> samples = {
      {"process_cpu_seconds_total", "User and system time", true, {}, (number(kUser) + number(kSystem)) / ticks},
      {"process_resident_memory_bytes", "Resident memory", false, {}, number(kResident) * page},
      {"process_virtual_memory_bytes", "Virtual memory", false, {}, number(kVirtual)},
      {"process_open_fds", "Open file descriptors", false, {}, open_files},
  };
  // ProcSubset=pid of the systemd unit hides /proc/stat, and with it the time of boot.
  if (const double boot = BootTime(); boot > 0) {
    samples.push_back(
        {"process_start_time_seconds", "Start, seconds since 1970", false, {}, boot + number(kStart) / ticks});
  }
  return samples;
}

std::vector<MetricSample> DeviceSamples(std::span<const DeviceStats> devices) {
  std::vector<MetricSample> samples;
  for (const DeviceStats& device : devices) {
    samples.push_back({"linspec_gpu_info",
                       "Constant 1; the device is a label",
                       false,
                       {{"gpu", device.device}, {"name", device.name}},
                       1});
  }
  for (const DeviceStats& device : devices) {
    for (const auto& [kind, bytes] : device.memory_bytes) {
      samples.push_back({"linspec_gpu_memory_bytes",
                         "Device memory, by what it holds",
                         false,
                         {{"gpu", device.device}, {"kind", kind}},
                         static_cast<double>(bytes)});
    }
  }
  for (const DeviceStats& device : devices) {
    for (const auto& [kind, seconds] : device.busy_seconds) {
      samples.push_back({"linspec_gpu_time_seconds_total",
                         "Time the device was busy, by stage",
                         true,
                         {{"gpu", device.device}, {"stage", kind}},
                         seconds});
    }
  }
  return samples;
}

}  // namespace linspec
