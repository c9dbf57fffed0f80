// Warpgroup matrix instructions (wgmma, sm_90a): 64 weight rows times kTokens tokens, 16 of k, bf16 with fp32 sums.
// Tokens, and weights that need no widening, lie in shared memory with k innermost in the copy engine's 128-byte
// swizzle: rows of 128 bytes, 8 of them 1,024 bytes. Weights from registers: lane 4 g + c of the group's warp w brings
// rows 16 w + g and + 8, k = 2 c, 2 c + 1 (words 0 and 1) and 8 further (words 2 and 3). A thread's sums[j] are rows g,
// g + 8 of its warp's 16 and tokens 8 j + 2 c, + 1: what OutputTile (gemm_tile.h) takes.
#pragma once

#include <cstdint>

namespace linspec::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Of a tile that starts at a shared-memory address, a multiple of 1,024. 16 of k further: + kWgmmaNextK.
__device__ __forceinline__ uint64_t WgmmaOperand(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32,
                     kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kEightRows | kUnused | (address >> 4 & 0x3FFF);
}
inline constexpr int kWgmmaNextK = 32 >> 4;

__device__ __forceinline__ void WgmmaBegin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void WgmmaCommit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// sums += a b^T, asynchronously. All threads of the four warps. Words of a, and sums, must stay as they are until a
// wait.
template <int kTokens>
__device__ void Wgmma(float (&sums)[kTokens / 8][4], uint64_t a, uint64_t b);
template <int kTokens>
__device__ void Wgmma(float (&sums)[kTokens / 8][4], const uint32_t (&a)[4], uint64_t b);

// Both forms for one number of tokens; d: its sums as asm operands %0 to %(count - 1), the numbers after those follow.
#define LINSPEC_SUMS(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define LINSPEC_WGMMA(tokens, list, n0, n1, n2, n3, n4, ...)                                                         \
  template <>                                                                                                        \
  __device__ __forceinline__ void Wgmma<tokens>(float(&d)[tokens / 8][4], uint64_t a, uint64_t b) {                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32.bf16.bf16 {" list "}, %" n0 ", %" n1           \
                 ", 1, 1, 1, 0, 0;"                                                                                  \
                 : __VA_ARGS__                                                                                       \
                 : "l"(a), "l"(b));                                                                                  \
  }                                                                                                                  \
  template <>                                                                                                        \
  __device__ __forceinline__ void Wgmma<tokens>(float(&d)[tokens / 8][4], const uint32_t(&a)[4], uint64_t b) {       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32.bf16.bf16 {" list "}, {%" n0 ", %" n1 ", %" n2 \
                 ", %" n3 "}, %" n4 ", 1, 1, 1, 0;"                                                                  \
                 : __VA_ARGS__                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                              \
  }

#define LINSPEC_LIST_8 "%0,%1,%2,%3"
#define LINSPEC_SUMS_8 LINSPEC_SUMS(0)
LINSPEC_WGMMA(8, LINSPEC_LIST_8, "4", "5", "6", "7", "8", LINSPEC_SUMS_8)

#define LINSPEC_LIST_16 \
  LINSPEC_LIST_8        \
  ",%4,%5,%6,%7"
#define LINSPEC_SUMS_16 LINSPEC_SUMS_8, LINSPEC_SUMS(1)
LINSPEC_WGMMA(16, LINSPEC_LIST_16, "8", "9", "10", "11", "12", LINSPEC_SUMS_16)

#define LINSPEC_LIST_32 \
  LINSPEC_LIST_16       \
  ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LINSPEC_SUMS_32 LINSPEC_SUMS_16, LINSPEC_SUMS(2), LINSPEC_SUMS(3)
LINSPEC_WGMMA(32, LINSPEC_LIST_32, "16", "17", "18", "19", "20", LINSPEC_SUMS_32)

#define LINSPEC_LIST_64 \
  LINSPEC_LIST_32       \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LINSPEC_SUMS_64 LINSPEC_SUMS_32, LINSPEC_SUMS(4), LINSPEC_SUMS(5), LINSPEC_SUMS(6), LINSPEC_SUMS(7)
LINSPEC_WGMMA(64, LINSPEC_LIST_64, "32", "33", "34", "35", "36", LINSPEC_SUMS_64)

#define LINSPEC_LIST_128                                                                             \
  LINSPEC_LIST_64                                                                                    \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55" \
  ",%56,%57,%58,%59,%60,%61,%62,%63"
#define LINSPEC_SUMS_128                                                                                   \
  LINSPEC_SUMS_64, LINSPEC_SUMS(8), LINSPEC_SUMS(9), LINSPEC_SUMS(10), LINSPEC_SUMS(11), LINSPEC_SUMS(12), \
      LINSPEC_SUMS(13), LINSPEC_SUMS(14), LINSPEC_SUMS(15)
LINSPEC_WGMMA(128, LINSPEC_LIST_128, "64", "65", "66", "67", "68", LINSPEC_SUMS_128)

#undef LINSPEC_LIST_8
#undef LINSPEC_SUMS_8
#undef LINSPEC_LIST_16
#undef LINSPEC_SUMS_16
#undef LINSPEC_LIST_32
#undef LINSPEC_SUMS_32
#undef LINSPEC_LIST_64
#undef LINSPEC_SUMS_64
#undef LINSPEC_LIST_128
#undef LINSPEC_SUMS_128
#undef LINSPEC_WGMMA
#undef LINSPEC_SUMS

#endif

}  // namespace linspec::cuda
