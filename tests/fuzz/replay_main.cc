// Runs a fuzz target over every file of the folders named, without libFuzzer: the corpus as an ordinary test. A target
// that finds something aborts.
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

int Replay(const char* folder) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    std::ifstream file(entry.path(), std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    std::printf("%s\n", entry.path().c_str());  // before it runs: the last line names what broke
    std::fflush(stdout);
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    ++count;
  }
  std::printf("%d inputs of %s\n", count, folder);
  return count;
}

}  // namespace

int main(int argc, char** argv) {
  bool every_folder_has_inputs = argc > 1;
  for (int i = 1; i < argc; ++i) {
    if (!std::filesystem::is_directory(argv[i])) {
      std::fprintf(stderr, "usage: %s FOLDER...; '%s' is no folder\n", argv[0], argv[i]);
      return 2;
    }
    every_folder_has_inputs &= Replay(argv[i]) > 0;
  }
  return every_folder_has_inputs ? 0 : 1;
}
