// The loops are assembly: a compiler would fold arithmetic whose inputs never change, and drop loads nobody uses.
#include "kernels/cpu/peak.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "kernels/check.h"
#include "kernels/cpu/weight_arena.h"

namespace linspec {
namespace {

using Clock = std::chrono::steady_clock;

// Runs `steps` rounds of independent multiply-adds; returns how many there were.
using Loop = int64_t (*)(int64_t steps);

int64_t ScalarLoop(int64_t steps) {
  constexpr int kChains = 8;
  float sums[kChains] = {};
  for (int64_t i = 0; i < steps; ++i) {
    for (float& sum : sums) {
      sum += sum * 0.5f;
      asm volatile("" : "+m"(sum));
    }
  }
  return steps * kChains;
}

#if defined(__x86_64__)

// Twelve accumulators hide a latency of up to six cycles at two instructions per cycle.
#define LINSPEC_TWELVE(STEP) \
  STEP("4")                  \
  STEP("5") STEP("6") STEP("7") STEP("8") STEP("9") STEP("10") STEP("11") STEP("12") STEP("13") STEP("14") STEP("15")

#define LINSPEC_CLOBBERS                                                                                              \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"

#define LINSPEC_VNNI_512(R) "vpdpbusd %%zmm1, %%zmm0, %%zmm" R "\n"
#define LINSPEC_FMA_512(R) "vfmadd231ps %%zmm1, %%zmm0, %%zmm" R "\n"
#define LINSPEC_FMA_256(R) "vfmadd231ps %%ymm1, %%ymm0, %%ymm" R "\n"
#define LINSPEC_MADD_256(R)             \
  "vpmaddubsw %%ymm1, %%ymm0, %%ymm2\n" \
  "vpmaddwd %%ymm1, %%ymm2, %%ymm2\n"   \
  "vpaddd %%ymm2, %%ymm" R ", %%ymm" R "\n"

#define LINSPEC_LOOP(NAME, TARGET, STEP, LANES)                                                 \
  __attribute__((target(TARGET))) int64_t NAME(int64_t steps) {                                 \
    asm volatile("vzeroall" ::: LINSPEC_CLOBBERS);                                              \
    for (int64_t i = 0; i < steps; ++i) asm volatile(LINSPEC_TWELVE(STEP)::: LINSPEC_CLOBBERS); \
    asm volatile("vzeroupper");                                                                 \
    return steps * 12 * (LANES);                                                                \
  }

LINSPEC_LOOP(Vnni512Loop, "avx512f,avx512vnni", LINSPEC_VNNI_512, 64)
LINSPEC_LOOP(Fma512Loop, "avx512f", LINSPEC_FMA_512, 16)
LINSPEC_LOOP(Madd256Loop, "avx2", LINSPEC_MADD_256, 32)
LINSPEC_LOOP(Fma256Loop, "avx2,fma", LINSPEC_FMA_256, 8)

// Four accumulators of 16 by 16 sums, each of 64 products.
__attribute__((target("amx-tile,amx-int8"))) int64_t TileLoop(int64_t steps) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
  } config;
  uint8_t values[16 * 64];
  std::iota(std::begin(values), std::end(values), uint8_t{1});
  asm volatile(
      "ldtilecfg %0\n"
      "tileloadd (%1, %2, 1), %%tmm4\n"
      "tileloadd (%1, %2, 1), %%tmm5\n" ::"m"(config),
      "r"(values), "r"(int64_t{64})
      : "memory");
  for (int64_t i = 0; i < steps; ++i) {
    asm volatile(
        "tdpbusd %%tmm5, %%tmm4, %%tmm0\n"
        "tdpbusd %%tmm5, %%tmm4, %%tmm1\n"
        "tdpbusd %%tmm5, %%tmm4, %%tmm2\n"
        "tdpbusd %%tmm5, %%tmm4, %%tmm3\n" ::);
  }
  asm volatile("tilerelease");
  return steps * 4 * 16 * 16 * 64;
}

#endif

// Reads [begin, begin + bytes) as four streams, which is how the processor's own prefetching works best; bytes is a
// multiple of 256.
using Reader = void (*)(const uint8_t* begin, int64_t bytes);

#define LINSPEC_READ(NAME, TARGET, LOAD, WIDTH)                                    \
  __attribute__((target(TARGET))) void NAME(const uint8_t* begin, int64_t bytes) { \
    const int64_t quarter = bytes / 4;                                             \
    for (int64_t i = 0; i < quarter; i += (WIDTH)) {                               \
      for (int stream = 0; stream < 4; ++stream) {                                 \
        asm volatile(LOAD ::"r"(begin + stream * quarter + i) : "xmm0", "memory"); \
      }                                                                            \
    }                                                                              \
  }

LINSPEC_READ(Read128, "sse2", "movups (%0), %%xmm0", 16)
#if defined(__x86_64__)
LINSPEC_READ(Read256, "avx2", "vmovups (%0), %%ymm0", 32)
LINSPEC_READ(Read512, "avx512f", "vmovups (%0), %%zmm0", 64)
#endif

Reader ReaderFor(Isa isa) {
  if (isa >= Isa::kAvx512) return Read512;
  if (isa == Isa::kAvx2) return Read256;
  return Read128;
}

Loop LoopFor(Isa isa, DType dtype) {
#if defined(__x86_64__)
  if (isa == Isa::kAmx && dtype == DType::kI8) return TileLoop;
  if (isa >= Isa::kAvx512) return dtype == DType::kI8 ? Vnni512Loop : Fma512Loop;
  if (isa == Isa::kAvx2) return dtype == DType::kI8 ? Madd256Loop : Fma256Loop;
#endif
  return ScalarLoop;
}

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

// Runs rate(thread) on threads of their own at the same time.
template <typename Rate>
double SumOverThreads(Isa isa, int num_threads, Rate rate) {
  LINSPEC_CHECK(num_threads >= 1 && isa <= DetectIsa());
  std::vector<double> rates(num_threads);
  std::vector<std::thread> threads;
  for (int t = 0; t < num_threads; ++t) threads.emplace_back([&rates, &rate, t] { rates[t] = rate(t); });
  for (std::thread& thread : threads) thread.join();
  return std::accumulate(rates.begin(), rates.end(), 0.0);
}

}  // namespace

double MeasureMultiplyAddPeak(Isa isa, DType dtype, int num_threads) {
  constexpr auto kDuration = std::chrono::milliseconds(50);
  constexpr int64_t kSteps = 2000;  // a few microseconds
  const Loop loop = LoopFor(isa, dtype);
  // Of each thread the fastest stretch counts: a peak, not what a busy machine leaves of it.
  return SumOverThreads(isa, num_threads, [loop, kDuration](int) {
    double best = 0;
    const auto end = Clock::now() + kDuration;
    for (auto now = Clock::now(); now < end;) {
      const int64_t done = loop(kSteps);
      const auto after = Clock::now();
      best = std::max(best, static_cast<double>(done) / Seconds(after - now));
      now = after;
    }
    return best;
  });
}

double MeasureReadBandwidth(Isa isa, int num_threads, int64_t bytes) {
  constexpr auto kDuration = std::chrono::milliseconds(100);
  const Reader reader = ReaderFor(isa);
  const int64_t share = std::max<int64_t>(256, bytes / num_threads / 256 * 256);
  return SumOverThreads(isa, num_threads, [reader, share, kDuration](int thread) {
    cpu::WeightArena arena;  // on the same pages as weights
    const std::shared_ptr<uint8_t> buffer = arena.Allocate(share);
    std::memset(buffer.get(), thread + 1, share);
    int64_t read = 0;
    const auto begin = Clock::now();
    while (Clock::now() - begin < kDuration) {
      reader(buffer.get(), share);
      read += share;
    }
    return static_cast<double>(read) / Seconds(Clock::now() - begin);
  });
}

}  // namespace linspec
