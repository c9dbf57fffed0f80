// Warpgroup matrix instructions (wgmma, sm_90a): 64 weight rows from shared memory times kTokens tokens from shared
// memory, 16 of k, bf16 with fp32 sums. Both operands lie with k innermost in the copy engine's 128-byte swizzle: rows
// of 128 bytes, 8 of them 1,024 bytes. A thread's sums[j] are rows g, g + 8 of its warp's 16 and tokens 8 j + 2 c, + 1:
// what OutputTile (gemm_tile.h) takes.
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

// sums = (add ? sums : 0) + a b^T, asynchronously. All threads of the four warps.
template <int kTokens>
__device__ void Wgmma(float (&sums)[kTokens / 8][4], uint64_t a, uint64_t b, int add);

#define LINSPEC_SUMS(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])

template <>
__device__ __forceinline__ void Wgmma<8>(float (&d)[1][4], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %6, 0;"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3"
      "}, %4, %5, p, 1, 1, 0, 0;}"
      : LINSPEC_SUMS(0)
      : "l"(a), "l"(b), "r"(add));
}

template <>
__device__ __forceinline__ void Wgmma<16>(float (&d)[2][4], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %10, 0;"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7"
      "}, %8, %9, p, 1, 1, 0, 0;}"
      : LINSPEC_SUMS(0), LINSPEC_SUMS(1)
      : "l"(a), "l"(b), "r"(add));
}

template <>
__device__ __forceinline__ void Wgmma<32>(float (&d)[4][4], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %18, 0;"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
      "}, %16, %17, p, 1, 1, 0, 0;}"
      : LINSPEC_SUMS(0), LINSPEC_SUMS(1), LINSPEC_SUMS(2), LINSPEC_SUMS(3)
      : "l"(a), "l"(b), "r"(add));
}

template <>
__device__ __forceinline__ void Wgmma<64>(float (&d)[8][4], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %34, 0;"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
      "%26,%27,%28,%29,%30,%31"
      "}, %32, %33, p, 1, 1, 0, 0;}"
      : LINSPEC_SUMS(0), LINSPEC_SUMS(1), LINSPEC_SUMS(2), LINSPEC_SUMS(3), LINSPEC_SUMS(4), LINSPEC_SUMS(5),
        LINSPEC_SUMS(6), LINSPEC_SUMS(7)
      : "l"(a), "l"(b), "r"(add));
}

template <>
__device__ __forceinline__ void Wgmma<128>(float (&d)[16][4], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %66, 0;"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
      "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,"
      "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
      "}, %64, %65, p, 1, 1, 0, 0;}"
      : LINSPEC_SUMS(0), LINSPEC_SUMS(1), LINSPEC_SUMS(2), LINSPEC_SUMS(3), LINSPEC_SUMS(4), LINSPEC_SUMS(5),
        LINSPEC_SUMS(6), LINSPEC_SUMS(7), LINSPEC_SUMS(8), LINSPEC_SUMS(9), LINSPEC_SUMS(10), LINSPEC_SUMS(11),
        LINSPEC_SUMS(12), LINSPEC_SUMS(13), LINSPEC_SUMS(14), LINSPEC_SUMS(15)
      : "l"(a), "l"(b), "r"(add));
}

#undef LINSPEC_SUMS

#endif

}  // namespace linspec::cuda
