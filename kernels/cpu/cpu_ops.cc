// CpuOps: packing, blocking and threads around the tables of isa_table.h.
#include "kernels/cpu/cpu_ops.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <thread>

#include "absl/status/status.h"
#include "fmt/core.h"
#include "kernels/check.h"

namespace linspec {

namespace {

#if defined(__x86_64__)
// Linux gives a process the tile registers, 8 KiB that every thread then saves, only when it asks.
bool AmxPermitted() {
  constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25;  // CPUID leaf 7, edx
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  if ((edx & kAmxTile) == 0 || (edx & kAmxInt8) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

Isa DetectIsa() {
#if defined(__x86_64__)
  static const bool amx = AmxPermitted();
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma")) {
    return amx ? Isa::kAmx : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kScalar;
}

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAmx:
      return "amx";
  }
  LINSPEC_CHECK(false);
}

absl::StatusOr<std::unique_ptr<CpuOps>> CpuOps::Create(Options options) {
  if (options.num_threads < 0 || options.num_threads > 1024) {
    return absl::InvalidArgumentError(fmt::format("threads must be between 0 and 1024, got {}", options.num_threads));
  }
  if (static_cast<int>(options.isa) > static_cast<int>(DetectIsa())) {
    return absl::InvalidArgumentError(fmt::format("this machine cannot run {} code; the best it runs is {}",
                                                  IsaName(options.isa), IsaName(DetectIsa())));
  }
  int threads = options.num_threads;
  if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
  return std::make_unique<cpu::CpuOpsImpl>(options.isa, threads);
}

namespace cpu {
namespace {

const IsaTable& TableFor(Isa isa) {
  if (isa == Isa::kAmx) return AmxTable();
  if (isa == Isa::kAvx512) return Avx512Table();
  if (isa == Isa::kAvx2) return Avx2Table();
  return ScalarTable();
}

float SourceElement(const void* source, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<const float*>(source)[index];
    case DType::kF16:
      return HalfToFloat(static_cast<const uint16_t*>(source)[index]);
    case DType::kBF16:
      return BFloat16ToFloat(static_cast<const uint16_t*>(source)[index]);
    case DType::kI8:
      return static_cast<const int8_t*>(source)[index];
    default:
      LINSPEC_CHECK(false);
  }
}

// Pieces of a matmul are whole register tiles of the widest table.
constexpr int64_t kBlockGrain = 4;

int64_t PaddedRows(int64_t rows) { return (rows + kLanes - 1) / kLanes * kLanes; }
int64_t PaddedCols(int64_t cols) { return (cols + 3) / 4 * 4; }

}  // namespace

CpuWeight::CpuWeight(int64_t rows, int64_t cols, DType dtype, WeightArena* arena)
    : rows_(rows), cols_(cols), dtype_(dtype) {
  const int64_t elements = PaddedRows(rows) * (dtype == DType::kI8 ? PaddedCols(cols) : cols);
  data_bytes_ = elements * static_cast<int64_t>(DTypeSize(dtype));
  data_ = arena->Allocate(data_bytes_);
  if (dtype == DType::kI8) {
    scales_.resize(PaddedRows(rows), 0.0f);
    row_sums_.resize(PaddedRows(rows), 0);
  }
}

void CpuWeight::Fill(const void* source, DType source_dtype, const float* row_scales) {
  for (int64_t n = 0; n < rows_; ++n) {
    const int64_t block = n / kLanes, lane = n % kLanes;
    if (dtype_ == DType::kI8) {
      FillInt8Row(source, source_dtype, row_scales, n);
      continue;
    }
    for (int64_t k = 0; k < cols_; ++k) {
      float value = SourceElement(source, source_dtype, n * cols_ + k);
      if (source_dtype == DType::kI8) value *= row_scales[n];
      const int64_t target = (block * cols_ + k) * kLanes + lane;
      if (dtype_ == DType::kF32) {
        reinterpret_cast<float*>(data_.get())[target] = value;
      } else {
        reinterpret_cast<uint16_t*>(data_.get())[target] = FloatToBFloat16(value);
      }
    }
  }
}

void CpuWeight::FillInt8Row(const void* source, DType source_dtype, const float* row_scales, int64_t n) {
  float scale = 1.0f;
  if (source_dtype == DType::kI8) {
    scale = row_scales[n];
  } else {
    float max_abs = 0;
    for (int64_t k = 0; k < cols_; ++k)
      max_abs = std::max(max_abs, std::fabs(SourceElement(source, source_dtype, n * cols_ + k)));
    scale = max_abs / 127.0f;
  }
  scales_[n] = scale;
  const float inverse = source_dtype == DType::kI8 ? 1.0f : (scale > 0 ? 1.0f / scale : 0.0f);
  const int64_t stride = PaddedCols(cols_), block = n / kLanes, lane = n % kLanes;
  auto* out = reinterpret_cast<int8_t*>(data_.get());
  for (int64_t k = 0; k < cols_; ++k) {
    const float value = SourceElement(source, source_dtype, n * cols_ + k) * inverse;
    // -128 becomes -127: the AVX2 dot needs |w| <= 127, and symmetric quantisers never produce it.
    const auto quantized = static_cast<int8_t>(std::clamp(std::nearbyint(value), -127.0f, 127.0f));
    out[(block * stride + k / 4 * 4) * kLanes + lane * 4 + k % 4] = quantized;
    row_sums_[n] += quantized;
  }
}

PackedMatrix CpuWeight::matrix() const { return {data_.get(), scales_.data(), row_sums_.data(), rows_, cols_}; }

int64_t CpuWeight::bytes() const { return data_bytes_ + static_cast<int64_t>(scales_.size()) * 8; }

CpuOpsImpl::CpuOpsImpl(Isa isa, int num_threads)
    : isa_(isa), table_(TableFor(isa)), pool_(num_threads), inputs_(&table_, &pool_), attention_(num_threads) {}

std::unique_ptr<PackedWeight> CpuOpsImpl::Pack(const void* source, DType source_dtype, const float* row_scales,
                                               int64_t rows, int64_t cols, DType target) {
  LINSPEC_CHECK(rows > 0 && cols > 0 && (source_dtype != DType::kI8 || row_scales != nullptr));
  LINSPEC_CHECK(target == DType::kF32 || target == DType::kBF16 || target == DType::kI8);
  auto weight = std::make_unique<CpuWeight>(rows, cols, target, &arena_);
  weight->Fill(source, source_dtype, row_scales);
  return weight;
}

void CpuOpsImpl::MultiplyBlocks(const MatmulParams& p, const ProductInput& x, int64_t block_begin, int64_t block_end) {
  const PackedMatrix w = static_cast<const CpuWeight&>(*p.w).matrix();
  if (p.w->dtype() == DType::kI8) {
    table_.matmul_i8(w, x.quantized, p.y, p.num_rows, block_begin, block_end, p.accumulate);
  } else {
    const auto matmul = p.w->dtype() == DType::kF32 ? table_.matmul_f32 : table_.matmul_bf16;
    matmul(w, x.rows, p.y, p.num_rows, block_begin, block_end, p.accumulate);
  }
}

void CpuOpsImpl::Matmul(const MatmulParams& p) {
  inputs_.Begin(p);
  pool_.ParallelForThreads(PaddedRows(p.w->rows()) / kLanes, kBlockGrain, [&](int thread, int64_t begin, int64_t end) {
    MultiplyBlocks(p, inputs_.Get(thread), begin, end);
  });
}

// A piece is a number of whole heads, which the thread that computed them turns while they are in its cache.
void CpuOpsImpl::ProjectQkv(const MatmulParams& product, const RopeNormalizeParams& rope) {
  LINSPEC_CHECK(rope.qkv == product.y && rope.num_rows == product.num_rows && !product.accumulate);
  UpdateRopeTable(rope);
  inputs_.Begin(product);
  const int64_t d = rope.head_dim, grain = std::lcm(kBlockGrain * kLanes, d) / kLanes;
  const int64_t turned = rope.num_heads + rope.num_kv_heads;
  pool_.ParallelForThreads(PaddedRows(product.w->rows()) / kLanes, grain, [&](int thread, int64_t begin, int64_t end) {
    MultiplyBlocks(product, inputs_.Get(thread), begin, end);
    const int64_t first = begin * kLanes / d, last = std::min(turned, end * kLanes / d);
    for (int64_t m = 0; m < product.num_rows; ++m) RopeHeads(rope, m, first, last);
  });
}

void CpuOpsImpl::GatedMatmul(const GatedMatmulParams& p) {
  const MatmulParams& product = p.product;
  const int64_t dim = product.w->rows() / 2, num_rows = product.num_rows;
  LINSPEC_CHECK(product.w->rows() == 2 * dim && !product.accumulate);
  if (dim % kLanes != 0) {  // gate and up share a block
    Matmul(product);
    SiluMul({.gate_up = product.y, .out = p.out, .num_rows = num_rows, .dim = dim});
    return;
  }
  inputs_.Begin(product);
  const int64_t blocks = dim / kLanes;
  pool_.ParallelForThreads(blocks, kBlockGrain, [&](int thread, int64_t begin, int64_t end) {
    const ProductInput x = inputs_.Get(thread);
    MultiplyBlocks(product, x, begin, end);
    MultiplyBlocks(product, x, blocks + begin, blocks + end);
    for (int64_t m = 0; m < num_rows; ++m) {
      const float* gate = product.y + m * 2 * dim + begin * kLanes;
      table_.silu_mul(gate, gate + dim, p.out + m * dim + begin * kLanes, (end - begin) * kLanes);
    }
  });
}

void CpuOpsImpl::RmsNorm(const RmsNormParams& p) {
  ForRows(p.num_rows, p.dim,
          [&](int64_t m) { table_.rms_norm(p.x + m * p.dim, p.weight, p.out + m * p.dim, p.dim, p.eps); });
}

void CpuOpsImpl::SiluMul(const SiluMulParams& p) {
  ForRows(p.num_rows, p.dim * 4, [&](int64_t m) {
    const float* gate = p.gate_up + m * 2 * p.dim;
    table_.silu_mul(gate, gate + p.dim, p.out + m * p.dim, p.dim);
  });
}

void CpuOpsImpl::RopeNormalize(const RopeNormalizeParams& p) {
  UpdateRopeTable(p);
  const int64_t heads = p.num_heads + p.num_kv_heads;
  ForRows(p.num_rows, heads * p.head_dim * 3, [&](int64_t m) { RopeHeads(p, m, 0, heads); });
}

void CpuOpsImpl::RopeHeads(const RopeNormalizeParams& p, int64_t m, int64_t begin, int64_t end) {
  const int64_t half = p.head_dim / 2, stride = int64_t{p.num_heads + 2 * p.num_kv_heads} * p.head_dim;
  for (int64_t h = begin; h < end; ++h) {
    table_.rope_normalize(p.qkv + m * stride + h * p.head_dim, &rope_.cosines[m * half], &rope_.sines[m * half],
                          p.head_dim, p.qk_norm_eps);
  }
}

// The angles of a batch are the same in every layer: recomputed only when the positions change. In double, because
// position * frequency has to stay exact over millions of tokens.
void CpuOpsImpl::UpdateRopeTable(const RopeNormalizeParams& p) {
  const bool same = rope_.head_dim == p.head_dim && rope_.theta == p.rope_theta &&
                    static_cast<int64_t>(rope_.positions.size()) == p.num_rows &&
                    std::equal(rope_.positions.begin(), rope_.positions.end(), p.positions);
  if (same) return;
  const int half = p.head_dim / 2;
  rope_.head_dim = p.head_dim;
  rope_.theta = p.rope_theta;
  rope_.positions.assign(p.positions, p.positions + p.num_rows);
  rope_.cosines.resize(p.num_rows * half);
  rope_.sines.resize(p.num_rows * half);
  std::vector<double> frequencies(half);
  for (int i = 0; i < half; ++i) frequencies[i] = std::pow(static_cast<double>(p.rope_theta), -2.0 * i / p.head_dim);
  ForRows(p.num_rows, half * 64, [&](int64_t m) {
    for (int i = 0; i < half; ++i) {
      const double angle = static_cast<double>(p.positions[m]) * frequencies[i];
      rope_.cosines[m * half + i] = static_cast<float>(std::cos(angle));
      rope_.sines[m * half + i] = static_cast<float>(std::sin(angle));
    }
  });
}

void CpuOpsImpl::VerifyAttention(const VerifyAttentionParams& p) {
  const int num_kv_heads = p.layer->num_kv_heads;
  pool_.ParallelForThreads(std::ssize(p.requests) * num_kv_heads, 1, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + 1 < end) {
        PrefetchKvHead(*p.layer, p.requests[(i + 1) / num_kv_heads], static_cast<int>((i + 1) % num_kv_heads));
      }
      VerifyKvHead(table_, *p.layer, p.requests[i / num_kv_heads], p.qkv, p.out, static_cast<int>(i % num_kv_heads),
                   &attention_[thread]);
    }
  });
}

void CpuOpsImpl::CommitAttention(std::span<const CommitAttentionParams> layers) {
  if (layers.empty()) return;
  const int64_t num_kv_heads = layers[0].layer->num_kv_heads, num_requests = std::ssize(layers[0].requests);
  const int64_t per_layer = num_requests * num_kv_heads;
  for (const CommitAttentionParams& p : layers) {
    LINSPEC_CHECK(p.layer->num_kv_heads == num_kv_heads && std::ssize(p.requests) == num_requests);
  }
  pool_.ParallelForThreads(std::ssize(layers) * per_layer, 1, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const CommitAttentionParams& p = layers[i / per_layer];
      CommitKvHead(table_, *p.layer, p.requests[i % per_layer / num_kv_heads], p.qkv,
                   static_cast<int>(i % num_kv_heads), &attention_[thread]);
    }
  });
}

void CpuOpsImpl::PrefillAttention(const PrefillAttentionParams& p) {
  const int num_kv_heads = p.layer->num_kv_heads;
  pool_.ParallelForThreads(std::ssize(p.requests) * num_kv_heads, 1, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      PrefillKvHead(table_, *p.layer, p.requests[i / num_kv_heads], p.qkv, p.out, static_cast<int>(i % num_kv_heads),
                    &attention_[thread]);
    }
  });
}

}  // namespace cpu
}  // namespace linspec
