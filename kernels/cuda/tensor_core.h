// fp32-grade products on the tensor cores, and asynchronous copies to shared memory. sm_80 and newer.
//
// x = hi + lo with hi the 11 leading bits; x y ~ hi hi' + hi lo' + lo hi' on tf32 m16n8k8 with fp32 sums: relative
// error of a product about 2^-21. An element of the result depends on its row of A and its column of B only, so its
// bits do not depend on what else shares the instruction. Lane 4 g + c of a warp holds A rows g, g + 8 and
// columns c, c + 4; B rows c, c + 4 and column g; C rows g, g + 8 and columns 2 c, 2 c + 1.
#pragma once

#include <cstdint>

namespace linspec::cuda {

__device__ __forceinline__ void MmaTf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The tensor cores ignore the low bits, and the assembler knows: with a constant mask it drops the masking, feeds x
// itself as hi, and copies x into the order of an operand, for values in flight right where they were loaded. So the
// mask comes from memory. kPinned: the splitting stays where it is written; else the compiler moves it ahead of loops.
static __constant__ uint32_t high_mask = 0xFFFFE000u;

template <int kSize, bool kPinned = false>
struct Split {
  uint32_t hi[kSize], lo[kSize];

  __device__ __forceinline__ explicit Split(const float (&x)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (kPinned) {
        asm volatile("and.b32 %0, %2, %3; sub.f32 %1, %2, %0;"
                     : "=&r"(hi[i]), "=r"(lo[i])
                     : "r"(__float_as_uint(x[i])), "r"(high_mask));
      } else {
        hi[i] = __float_as_uint(x[i]) & high_mask;
        lo[i] = __float_as_uint(x[i] - __uint_as_float(hi[i]));
      }
    }
  }
};

__device__ __forceinline__ void MmaProduct(float (&c)[4], const Split<4>& a, const Split<2>& b) {
  MmaTf32(c, a.lo, b.hi);
  MmaTf32(c, a.hi, b.lo);
  MmaTf32(c, a.hi, b.hi);
}

// One product of operands rounded to tf32: relative error 2^-12 each.
template <int kSize>
struct Rounded {
  uint32_t x[kSize];

  __device__ __forceinline__ explicit Rounded(const float (&values)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = __float_as_uint(values[i]) + 0x1000u;  // to nearest; the rest is ignored
  }
};
__device__ __forceinline__ void MmaProduct(float (&c)[4], const Rounded<4>& a, const Rounded<2>& b) {
  MmaTf32(c, a.x, b.x);
}

struct Accumulators {  // two chains of dependent instructions instead of one
  float main[4] = {0, 0, 0, 0}, rest[4] = {0, 0, 0, 0};

  template <bool kPinned>
  __device__ __forceinline__ void Add(const Split<4, kPinned>& a, const Split<2>& b) {
    MmaTf32(rest, a.lo, b.hi);
    MmaTf32(main, a.hi, b.hi);
    MmaTf32(rest, a.hi, b.lo);
  }
  __device__ __forceinline__ float operator[](int i) const { return main[i] + rest[i]; }
};

// Pairs of bf16 as an A operand, exact in tf32. Pinned like Split.
struct ExactOperand {
  uint32_t x[4];
};
__device__ __forceinline__ void WidenPair(uint32_t pair, uint32_t& low, uint32_t& high) {
  asm volatile("shl.b32 %0, %2, 16; and.b32 %1, %2, 0xFFFF0000;" : "=&r"(low), "=r"(high) : "r"(pair));
}
// A pair is rows g and g + 8; the pairs are columns c and c + 4.
__device__ __forceinline__ ExactOperand OfRowPairs(uint32_t left, uint32_t right) {
  ExactOperand a;
  WidenPair(left, a.x[0], a.x[1]);
  WidenPair(right, a.x[2], a.x[3]);
  return a;
}
// A pair is columns c and c + 4; the pairs are rows g and g + 8.
__device__ __forceinline__ ExactOperand OfColumnPairs(uint32_t upper, uint32_t lower) {
  ExactOperand a;
  WidenPair(upper, a.x[0], a.x[2]);
  WidenPair(lower, a.x[1], a.x[3]);
  return a;
}

struct PreciseSums {  // three chains: shorter, for warps that have nothing else to do meanwhile
  float main[4] = {0, 0, 0, 0}, left[4] = {0, 0, 0, 0}, right[4] = {0, 0, 0, 0};

  template <bool kPinned>
  __device__ __forceinline__ void Add(const Split<4, kPinned>& a, const Split<2>& b) {
    MmaTf32(main, a.hi, b.hi);
    MmaTf32(left, a.lo, b.hi);
    MmaTf32(right, a.hi, b.lo);
  }
  __device__ __forceinline__ void Add(const ExactOperand& a, const Split<2>& b) {
    MmaTf32(main, a.x, b.hi);
    MmaTf32(right, a.x, b.lo);
  }
  __device__ __forceinline__ float operator[](int i) const { return main[i] + (left[i] + right[i]); }
};

// 16 bytes of global memory to shared memory; both aligned to 16.
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void CopyAsync8(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void CopyAsync4(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Bulk copies to shared memory after this come after what was stored there before.
__device__ __forceinline__ void OrderAfterStores() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Barrier for copies, sm_90 and newer (kernels that use it are launched there only). One thread makes it and, for each
// round, announces the bytes of bulk copies; any thread of its warp may then copy. Further arrivals are of
// ArriveAfterCopies, or of Arrive where it says that something has been read.
struct CopyBarrier {
  uint64_t word;

  __device__ __forceinline__ uint32_t Address() const { return static_cast<uint32_t>(__cvta_generic_to_shared(&word)); }
  __device__ __forceinline__ void Make(int arrivals) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(Address()), "r"(arrivals) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void Expect(uint32_t bytes) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(Address()), "r"(bytes) : "memory");
#endif
  }
  // Makes the thread's reads and writes before this those of the past for who waits.
  __device__ __forceinline__ void Arrive() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(Address()) : "memory");
#endif
  }
  // Arrives once the thread's CopyAsync before this have landed.
  __device__ __forceinline__ void ArriveAfterCopies() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(Address()) : "memory");
#endif
  }
  // 16-byte aligned ends, a multiple of 16 bytes; 0: nothing.
  __device__ __forceinline__ void Copy(void* shared, const void* global, uint32_t bytes) {
    if (bytes == 0) return;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
        "l"(global), "r"(bytes), "r"(Address())
        : "memory");
#endif
  }
  // Round 0, 1, ...: only its parity counts.
  __device__ __forceinline__ void Wait(int round) const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile(
        "{.reg .pred done; RETRY%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra DONE%=;"
        "bra RETRY%=; DONE%=:}" ::"r"(Address()),
        "r"(round & 1)
        : "memory");
#endif
  }
};

// Issued early, used late. Unconditional: a branch or a predicate would make the compiler copy, hence wait for, the
// data. kOffset, in bytes, is part of the instruction: an address made for each load would be kept in registers.
template <int kOffset = 0>
__device__ __forceinline__ void LoadEarly(float (&x)[4], const float* global) {
  asm volatile("ld.global.L1::no_allocate.v4.f32 {%0,%1,%2,%3}, [%4 + %5];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "l"(global), "n"(kOffset));
}

template <int kOffset = 0>
__device__ __forceinline__ void LoadEarly(uint32_t (&x)[2], const uint16_t* global) {
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2 + %3];"
               : "=r"(x[0]), "=r"(x[1])
               : "l"(global), "n"(kOffset));
}

// Until x, on its way from memory, is there: something depends on it that can neither be dropped nor be done without a
// branch, which would make those wait who go around it. For grids of one row: that blockIdx.y is 0 the compiler does
// not know.
__device__ __forceinline__ void AwaitLoad(float x) {
  uint32_t now;
  do {
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
  } while ((__float_as_uint(x) & blockIdx.y) > now);
}

}  // namespace linspec::cuda
