// States in bf16: verify, commit and prefill against the CPU reference with bf16 states, which rounds at the same
// places. Sums differ by fp32 rounding, so now and then a fold takes an element of S to its other neighbour; everything
// else of a state is equal bit for bit. After such a flip the two go on from different values, and a later fold that
// nearly cancels the element leaves a difference of any relative size. So folds are checked one by one, each from the
// GPU's S. A plain program: prints one line per check, a summary last, and exits 0 only if all passed.
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/cuda/launch.h"
#include "kernels/dtype.h"
#include "kernels/ops.h"
#include "tests/cuda/attention_shape.h"
#include "tests/cuda/device_buffers.h"
#include "tests/cuda/report.h"

namespace linspec::cuda {
namespace {

constexpr Shape kShapes[] = {{2, 2, 128, 64, 32, true, 2, true},
                             {4, 2, 64, 64, 32, true, 1, false},
                             {2, 1, 128, 16, 7, false, 1, true},
                             {12, 1, 64, 64, 32, true, 2, true}};
constexpr int kLayerIndex = 5;

std::vector<uint16_t> Narrow(const std::vector<float>& values) {
  std::vector<uint16_t> result;
  for (const float value : values) result.push_back(FloatToBFloat16(value));
  return result;
}

// One request, its state on the CPU and a copy on the GPU.
class Fixture {
 public:
  Fixture(CpuOps* ops, const Shape& shape, uint32_t seed)
      : ops_(ops),
        shape_(shape),
        random_(seed),
        gain_(Normal(random_, shape.heads, 1.0f)),
        decay_(shape.kv_heads, 0.9f),
        taps_(Normal(random_, static_cast<size_t>(shape.heads) * shape.conv, 1.0f)),
        device_gain_(gain_),
        device_decay_(decay_),
        device_taps_(taps_),
        cpu_(StateSize(), 0),
        gpu_(cpu_) {
    layer_ = {.num_heads = shape.heads,
              .num_kv_heads = shape.kv_heads,
              .head_dim = shape.d,
              .group_size = shape.group,
              .conv_kernel = shape.conv,
              .local = shape.local,
              .global = static_cast<GlobalBranch>(shape.global),
              .global_factor = 0.37f,
              .global_gain = gain_.data(),
              .global_norm_eps = 1e-6f,
              .decay = shape.decay ? decay_.data() : nullptr,
              .conv_taps = taps_.data(),
              .index = kLayerIndex};
  }

  std::vector<float> Rows(int count) {
    return Normal(random_, int64_t{count} * Width(), 1.0f / std::sqrt(static_cast<float>(shape_.d)));
  }
  int64_t length() const { return length_; }
  std::vector<uint16_t> gpu() const { return gpu_.Read(); }
  const std::vector<uint16_t>& cpu() const { return cpu_; }
  void CopyToGpu() {
    Check(cudaMemcpy(gpu_.get(), cpu_.data(), cpu_.size() * sizeof(uint16_t), cudaMemcpyHostToDevice), "upload");
  }
  void CopyToCpu() { cpu_ = gpu_.Read(); }

  std::vector<float> CpuPrefill(const std::vector<float>& rows) {
    const int count = static_cast<int>(rows.size() / Width());
    std::vector<float> out(int64_t{count} * shape_.heads * shape_.d);
    const WindowRequest request{CpuState(), length_, 0, count, nullptr};
    ops_->PrefillAttention({&layer_, rows.data(), out.data(), {&request, 1}});
    return out;
  }
  std::vector<float> CpuVerify(const std::vector<float>& rows, const std::vector<int32_t>& parents) {
    std::vector<float> out(parents.size() * shape_.heads * shape_.d);
    const WindowRequest request{CpuState(), length_, 0, static_cast<int>(parents.size()), parents.data()};
    ops_->VerifyAttention({&layer_, rows.data(), out.data(), {&request, 1}});
    return out;
  }
  void CpuCommit(const std::vector<float>& rows, const std::vector<int32_t>& path) {
    const CommitRequest request{CpuState(), length_, 0, path};
    const CommitAttentionParams params{&layer_, rows.data(), {&request, 1}};
    ops_->CommitAttention({&params, 1});
  }
  void Advance(int64_t tokens) { length_ += tokens; }

  std::vector<float> GpuPrefill(std::vector<float> rows) {
    const int count = static_cast<int>(rows.size() / Width());
    for (size_t i = 0; i < rows.size(); ++i) {  // k and v as the ring will hold them
      if (static_cast<int>(i % Width()) >= shape_.heads * shape_.d) {
        rows[i] = BFloat16ToFloat(FloatToBFloat16(rows[i]));
      }
    }
    AttentionParams params = Params();
    const DeviceArray<float> qkv(rows), out(int64_t{count} * shape_.heads * shape_.d);
    const DeviceArray<Task> tasks(std::vector<Task>{{length_, 0, 0, count, 0, 0}});
    params.num_groups = static_cast<int32_t>(PrefillGroups(length_, count, shape_.group));
    const DeviceArray<float> scratch(PrefillScratchFloats(params.layer, params.num_groups));
    params.tasks = tasks.get();
    params.qkv = qkv.get();
    params.out = out.get();
    params.scratch = scratch.get();
    params.exact_prefill = true;
    LaunchPrefill(params, 1, nullptr);
    Sync();
    return out.Read();
  }
  // Verify if `path` is empty, else commit.
  std::vector<float> GpuStep(const std::vector<float>& rows, const std::vector<int32_t>& parents,
                             const std::vector<int32_t>& path) {
    const auto count = static_cast<int32_t>(parents.size());
    std::vector<uint64_t> ancestors;
    std::vector<float> kv;
    for (int32_t i = 0; i < count; ++i) {
      ancestors.push_back((parents[i] < 0 ? 0 : ancestors[parents[i]]) | uint64_t{1} << i);
      kv.insert(kv.end(), rows.begin() + int64_t{i} * Width() + shape_.heads * shape_.d,
                rows.begin() + int64_t{i + 1} * Width());
    }
    AttentionParams params = Params();
    const DeviceArray<float> qkv(rows), out(int64_t{count} * shape_.heads * shape_.d);
    const DeviceArray<uint16_t> narrow(Narrow(kv));
    const DeviceArray<uint64_t> device_ancestors(ancestors);
    const DeviceArray<int32_t> paths(path);
    const DeviceArray<Task> tasks(
        std::vector<Task>{{length_, 0, 0, count, 0, static_cast<int32_t>(path.size())}, {0, -1, 0, 1, 0, 1}});
    params.tasks = tasks.get();
    params.qkv = qkv.get();
    params.kv = narrow.get();
    params.ancestors = device_ancestors.get();
    params.paths = paths.get();
    params.out = out.get();
    params.max_rows = count;
    (path.empty() ? LaunchVerify : LaunchCommit)(params, 2, nullptr);
    Sync();
    return out.Read();
  }

 private:
  int Width() const { return (shape_.heads + 2 * shape_.kv_heads) * shape_.d; }
  int64_t StateSize() const { return int64_t{shape_.kv_heads} * shape_.d * (shape_.d + 2 * shape_.group); }
  LayerState CpuState() {
    uint16_t* ring = cpu_.data() + int64_t{shape_.kv_heads} * shape_.d * shape_.d;
    return {cpu_.data(), ring, ring + int64_t{shape_.kv_heads} * shape_.group * shape_.d, DType::kBF16};
  }
  AttentionParams Params() const {
    AttentionParams params{};
    params.layer = {shape_.heads,
                    shape_.kv_heads,
                    shape_.d,
                    shape_.group,
                    shape_.conv,
                    shape_.local,
                    static_cast<Global>(shape_.global),
                    0.37f,
                    1e-6f,
                    device_gain_.get(),
                    shape_.decay ? device_decay_.get() : nullptr,
                    device_taps_.get(),
                    kLayerIndex};
    params.states = {gpu_.get(), StateSize(), 0, true};
    return params;
  }

  CpuOps* const ops_;
  const Shape shape_;
  std::mt19937 random_;
  std::vector<float> gain_, decay_, taps_;
  DeviceArray<float> device_gain_, device_decay_, device_taps_;
  AttentionLayer layer_;
  int64_t length_ = 0;
  std::vector<uint16_t> cpu_;
  DeviceArray<uint16_t> gpu_;
};

bool Neighbours(uint16_t a, uint16_t b) {
  // Near zero a sum of large terms keeps few of their bits, and neighbours are closer than its error.
  constexpr float kSumError = 1e-6f;
  return ((a ^ b) < 0x8000 && std::abs(int{a} - int{b}) <= 1) ||
         std::abs(BFloat16ToFloat(a) - BFloat16ToFloat(b)) <= kSumError;
}

// Elements of S that are not equal after one fold of the same S, as a share; 1 if one is not even the neighbour of its
// counterpart or the rings differ.
double Unequal(const std::vector<uint16_t>& a, const std::vector<uint16_t>& b, const Shape& shape) {
  const int64_t matrices = int64_t{shape.kv_heads} * shape.d * shape.d;
  int64_t unequal = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(a.size()); ++i) {
    if (a[i] == b[i]) continue;
    if (i >= matrices || !Neighbours(a[i], b[i])) return 1;
    ++unequal;
  }
  return static_cast<double>(unequal) / static_cast<double>(matrices);
}

struct Errors {  // the largest of a shape's requests
  double prefill = 0, decoded = 0, fold = 0, verify = 0, wrote = 0, commit_state = 0;
};

// A prompt in two pieces, then token by token: the GPU gets the same bits, by folds that are the CPU's.
void TestPrefill(Fixture* f, Fixture* single, const Shape& shape, int first, Errors* errors) {
  std::vector<float> all;
  for (const int count : {first, 3 * shape.group + 1}) {
    const std::vector<float> rows = f->Rows(count);
    errors->prefill = std::max(errors->prefill, RelativeError(f->GpuPrefill(rows), f->CpuPrefill(rows)));
    f->Advance(count);
    all.insert(all.end(), rows.begin(), rows.end());
  }
  const int64_t width = static_cast<int64_t>(all.size()) / f->length();
  for (int64_t i = 0; i < f->length(); ++i) {
    const std::vector<float> row(all.begin() + i * width, all.begin() + (i + 1) * width);
    single->CopyToCpu();
    single->GpuStep(row, {-1}, {0});
    single->CpuCommit(row, {0});
    errors->fold = std::max(errors->fold, Unequal(single->gpu(), single->cpu(), shape));
    single->Advance(1);
  }
  errors->decoded = std::max(errors->decoded, single->gpu() == f->gpu() ? 0.0 : 1.0);
}

// A tree verified, then a chain of a group's length committed: across the end of a group.
void TestVerify(Fixture* f, const Shape& shape, Errors* errors) {
  f->CopyToGpu();
  const int nodes = std::min<int>(24, shape.group - static_cast<int>(f->length() % shape.group));
  std::vector<int32_t> parents = {-1};
  for (int i = 1; i < nodes; ++i) parents.push_back((i - 1) / 2);
  const std::vector<float> tree = f->Rows(nodes);
  errors->verify = std::max(errors->verify, RelativeError(f->GpuStep(tree, parents, {}), f->CpuVerify(tree, parents)));
  errors->wrote = std::max(errors->wrote, f->gpu() == f->cpu() ? 0.0 : 1.0);
  std::vector<int32_t> chain, path;
  for (int i = 0; i < shape.group; ++i) {
    chain.push_back(i - 1);
    path.push_back(i);
  }
  const std::vector<float> rows = f->Rows(shape.group);
  f->GpuStep(rows, chain, path);
  f->CpuCommit(rows, path);
  errors->commit_state = std::max(errors->commit_state, Unequal(f->gpu(), f->cpu(), shape));
}

void TestShape(CpuOps* ops, const Shape& shape) {
  constexpr double kFlips = 1e-3;  // share of S that one fold may round to the other neighbour
  const std::string name = " heads " + std::to_string(shape.heads) + "/" + std::to_string(shape.kv_heads) + " d " +
                           std::to_string(shape.d) + " group " + std::to_string(shape.group);
  Errors errors;
  for (const int first : {1, shape.group - 1, shape.group, 2 * shape.group + 5}) {
    Fixture f(ops, shape, static_cast<uint32_t>(first)), single(ops, shape, static_cast<uint32_t>(first));
    TestPrefill(&f, &single, shape, first, &errors);
    TestVerify(&f, shape, &errors);
  }
  Report("bf16 prefill" + name, errors.prefill, 1e-4);
  Report("bf16 prefill" + name + ": state of decoding", errors.decoded, 0.0);
  Report("bf16 decode" + name + ": every fold", errors.fold, kFlips);
  Report("bf16 verify" + name, errors.verify, 1e-5);
  Report("bf16 verify" + name + ": state untouched", errors.wrote, 0.0);
  Report("bf16 commit" + name + ": state", errors.commit_state, kFlips);
}

}  // namespace
}  // namespace linspec::cuda

int main() {
  using namespace linspec;
  cuda::Check(cudaSetDevice(0), "no usable GPU");
  auto ops = std::move(*CpuOps::Create({.isa = Isa::kScalar, .num_threads = 8}));
  for (const cuda::Shape& shape : cuda::kShapes) cuda::TestShape(ops.get(), shape);
  return cuda::Summary("state_test");
}
