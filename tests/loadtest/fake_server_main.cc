// loadtest_fake_server GAP_MS [PORT]: prints its port, serves until standard input ends.
#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "tests/loadtest/fake_openai_server.h"

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s GAP_MS [PORT]\n", argv[0]);
    return 2;
  }
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
  const auto gap = std::chrono::microseconds(static_cast<int64_t>(std::atof(argv[1]) * 1000));
  const linspec::loadtest::FakeOpenAiServer server(gap, argc > 2 ? std::atoi(argv[2]) : 0);
  std::printf("%d\n", server.port());
  std::fflush(stdout);
  while (std::getchar() != EOF) {
  }
  std::fprintf(stderr, "most streams at once: %lld\n", static_cast<long long>(server.max_streams()));
  return 0;
}
