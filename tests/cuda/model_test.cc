// The CUDA model against the CPU's, and against itself: a plain program that exits 0 only if every check passed.
// usage: cuda_model_test FOLDER_OF_TINY_MODELS FOLDER_OF_BUNDLED_MODELS [PLUGIN [--quick]]
// --quick: steps ahead of their results only, for compute-sanitizer
#include "models/model.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "models/sampler.h"
#include "tests/cuda/crowd_checks.h"
#include "tests/cuda/model_checks.h"
#include "tests/cuda/run_ahead_checks.h"

namespace linspec {
namespace {

// A model, its pool and one slot.
struct Session {
  explicit Session(Model* m) : model(m), pool(Must(m->CreatePool(2), "pool")), slot(pool->Acquire()) {}
  void Prefill(std::span<const int32_t> tokens) {
    const PrefillChunk chunks[] = {{slot.id(), tokens}};
    Must(model->Prefill(chunks, pool.get()), "prefill");
  }
  // Logits of every node, copied.
  std::vector<float> Verify(const DraftTree& tree) {
    batch = {};
    batch.Add(slot.id(), tree);
    const VerifyResult result = Must(model->Verify(batch, *pool), "verify");
    return {result.logits.begin(), result.logits.end()};
  }
  void Commit(std::vector<int32_t> path) {
    const std::vector<std::vector<int32_t>> paths = {std::move(path)};
    Must(model->Commit(batch, paths, pool.get()), "commit");
  }
  Model* model;
  std::unique_ptr<StatePool> pool;
  StateSlot slot;
  VerifyBatch batch;
};

double RelativeError(std::span<const float> a, std::span<const float> b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    if (!std::isfinite(a[i])) return INFINITY;
    difference += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
    norm += double{b[i]} * b[i];
  }
  return std::sqrt(difference / std::max(norm, 1e-30));
}

void AgreesWithCpu(const std::string& name, Model* cuda, Model* cpu, double tolerance) {
  double worst = 0;
  for (const int length : {1, 2, 7, 8, 31, 63, 64, 65, 127, 130, 200}) {
    const std::vector<int32_t> tokens = Tokens(length, cpu->config().vocab_size, 7);
    Session a(cuda), b(cpu);
    a.Prefill(std::span(tokens).first(length - 1));
    b.Prefill(std::span(tokens).first(length - 1));
    worst = std::max(worst,
                     RelativeError(a.Verify(DraftTree::Root(tokens.back())), b.Verify(DraftTree::Root(tokens.back()))));
  }
  Report(name + ": logits as the CPU's", worst <= tolerance, fmt::format("worst {:.1e} of {:.0e}", worst, tolerance));
}

std::vector<int> PathTo(const DraftTree& tree, int node) {
  std::vector<int> path;
  for (; node >= 0; node = tree.parents[node]) path.push_back(node);
  std::reverse(path.begin(), path.end());
  return path;
}

// A node's logits in a tree equal those of feeding its path token by token: bit for bit up to a group's end. Past it a
// fold rounds differently from the terms it replaces, and now and then a bf16 activation falls the other way; the
// engine cuts trees there.
void TreeEqualsSequence(const std::string& name, Model* model) {
  const int group = model->config().linear_attention.group_size;
  const auto vocab = static_cast<size_t>(model->config().vocab_size);
  std::mt19937 random(3);
  int different = 0, rows = 0;
  double worst = 0;
  for (int i = 0; i < 9; ++i) {
    const int phase = i < 8 ? i * std::max(1, group / 8) : group - 3;  // the last: most of the tree is past a boundary
    const std::vector<int32_t> prompt = Tokens(group + phase, model->config().vocab_size, phase);
    const DraftTree tree = RandomTree(24, model->config().vocab_size, &random);
    Session whole(model);
    whole.Prefill(prompt);
    const std::vector<float> logits = whole.Verify(tree);
    for (int node = 0; node < tree.num_nodes(); node += 5) {
      Session single(model);
      single.Prefill(prompt);
      std::vector<float> last;
      const std::vector<int> path = PathTo(tree, node);
      for (const int step : path) {
        last = single.Verify(DraftTree::Root(tree.tokens[step]));
        single.Commit({0});
      }
      const std::span<const float> row = std::span(logits).subspan(node * vocab, vocab);
      const bool crossed = phase + static_cast<int>(path.size()) > group;
      if (!crossed) different += !std::equal(row.begin(), row.end(), last.begin());
      worst = std::max(worst, RelativeError(row, last));
      ++rows;
    }
  }
  Report(name + ": a tree's rows as token by token", different == 0 && worst < 1e-2,
         fmt::format("{} rows, {} differ before a boundary, worst {:.1e}", rows, different, worst));
}

void ChunksAgree(const std::string& name, Model* model) {
  const std::vector<int32_t> prompt = Tokens(300, model->config().vocab_size, 5);
  Session whole(model);
  whole.Prefill(prompt);
  const std::vector<float> expected = whole.Verify(DraftTree::Root(1));
  int different = 0;
  for (const int chunk : {1, 7, 64, 100}) {
    Session cut(model);
    for (size_t at = 0; at < prompt.size(); at += chunk) {
      cut.Prefill(std::span(prompt).subspan(at, std::min<size_t>(chunk, prompt.size() - at)));
    }
    different += cut.Verify(DraftTree::Root(1)) != expected;
  }
  Report(name + ": prefill in any chunks", different == 0, fmt::format("{} of 4 chunkings differ", different));
}

// Whatever shares the batch, a row has the same bits.
void NeighboursDoNotMatter(const std::string& name, Model* model, int max_requests) {
  const auto pool = Must(model->CreatePool(max_requests), "pool");
  std::vector<StateSlot> slots;
  for (int i = 0; i < max_requests; ++i) {
    slots.push_back(pool->Acquire());
    const std::vector<int32_t> prompt = Tokens(i == 0 ? 50 : 20 + i % 90, model->config().vocab_size, i);
    const PrefillChunk chunks[] = {{slots.back().id(), prompt}};
    Must(model->Prefill(chunks, pool.get()), "prefill");
  }
  std::vector<float> alone;
  int different = 0;
  const auto vocab = static_cast<size_t>(model->config().vocab_size);
  for (int count = 1; count <= max_requests; count = count < 8 ? count + 1 : count * 2) {
    VerifyBatch batch;
    for (int i = 0; i < count; ++i) batch.Add(slots[(i + count - 1) % count].id(), DraftTree::Root(5));
    const VerifyResult result = Must(model->Verify(batch, *pool), "verify");
    const int row =
        static_cast<int>(std::find(batch.slots.begin(), batch.slots.end(), slots[0].id()) - batch.slots.begin());
    const std::span<const float> logits = result.logits.subspan(row * vocab, vocab);
    if (count == 1) alone.assign(logits.begin(), logits.end());
    different += !std::equal(alone.begin(), alone.end(), logits.begin());
  }
  Report(fmt::format("{}: alone as among up to {} requests", name, max_requests), different == 0,
         fmt::format("{} batch sizes differ", different));
}

// The device's choice against models/sampler.h on the same logits.
void SamplesAsTheHost(const std::string& name, Model* model) {
  const auto vocab = static_cast<size_t>(model->config().vocab_size);
  std::mt19937 random(17);
  const auto uniform = [&] { return static_cast<float>(random() % 10000) / 10000.0f; };
  Session session(model);
  session.Prefill(Tokens(40, model->config().vocab_size, 2));
  int rows = 0, different = 0;
  for (int round = 0; round < 40; ++round) {
    VerifyBatch batch;
    batch.Add(session.slot.id(), RandomTree(16, model->config().vocab_size, &random));
    std::vector<SamplingParams> params(16);
    for (int row = 0; row < 16; ++row) {
      SamplingParams& p = params[row];
      p.seed = random();
      p.temperature = row % 5 == 0 ? 0.0f : 0.3f + uniform();
      if (row % 2 == 0) p.top_p = 0.05f + 0.9f * uniform();
      if (row % 3 == 0) p.top_k = 1 + static_cast<int32_t>(random() % 60);
      if (row % 4 == 1) p.min_p = 0.2f * uniform();
      RowSampling how{.seed = p.seed,
                      .position = 40 + row,
                      .temperature = p.temperature,
                      .top_p = p.top_p,
                      .min_p = p.min_p,
                      .top_k = p.top_k,
                      .edits_begin = static_cast<int32_t>(batch.edits.size()),
                      .edits_count = row % 4};
      for (int i = 0; i < how.edits_count; ++i) {
        batch.edits.push_back({.token = static_cast<int32_t>(random() % (vocab / 4)) * 4 + i,
                               .bias = 4 * uniform() - 2,
                               .repetition = 0.5f + uniform(),
                               .subtract = i == 2 ? INFINITY : uniform()});
      }
      batch.sampling.push_back(how);
    }
    const VerifyResult result = Must(model->Verify(batch, *session.pool), "verify");
    const PenaltyHistory none({});
    for (int row = 0; row < 16; ++row) {
      const SampleResult expected =
          SampleToken(result.logits.subspan(row * vocab, vocab),
                      {.params = &params[row], .history = &none, .banned = {}, .position = 40 + row});
      ++rows;
      different += expected.token.token != result.sampled[row];
    }
  }
  // Sums of probabilities are rounded in another order, which can move a top_p cut by a token once in a long while.
  Report(name + ": tokens chosen as on the host", different <= rows / 200,
         fmt::format("{} of {} differ", different, rows));
}

// Greedy text of the bundled target on both machines; where they part, how close the choice was on the CPU.
void GreedyTextAsTheCpus(const std::string& folder, const std::shared_ptr<CudaDevice>& device,
                         const std::shared_ptr<CpuOps>& ops) {
  LoadOptions options;
  options.path = folder + "/target";
  options.ops = ops;
  options.weight_dtype = "f32";  // the same 8-bit values, but fp32 activations: the CPU's int8 products round them
  const auto cpu = Must(LoadModel(options), "target on the CPU");
  options.cuda = device;
  options.weight_dtype = "auto";
  const auto cuda = Must(LoadModel(options), "target on the GPU");
  int same = 0, near_ties = 0, prompts = 12;
  double widest = 0;
  for (int p = 0; p < prompts; ++p) {
    const std::vector<int32_t> prompt = Tokens(30 + p, cpu->config().vocab_size, 100 + p);
    Session a(cuda.get()), b(cpu.get());
    a.Prefill(prompt);
    b.Prefill(prompt);
    int32_t next = 1;
    int step = 0;
    for (; step < 80; ++step) {
      const std::vector<float> on_gpu = a.Verify(DraftTree::Root(next)), on_cpu = b.Verify(DraftTree::Root(next));
      a.Commit({0});
      b.Commit({0});
      const auto best = std::max_element(on_cpu.begin(), on_cpu.end()) - on_cpu.begin();
      const auto other = std::max_element(on_gpu.begin(), on_gpu.end()) - on_gpu.begin();
      if (best != other) {
        const double gap = on_cpu[best] - on_cpu[other];
        widest = std::max(widest, gap);
        near_ties += gap < 0.1;
        break;
      }
      next = static_cast<int32_t>(best);
    }
    same += step == 80;
  }
  Report("bundled target: greedy text as the CPU's up to near-ties", same + near_ties == prompts,
         fmt::format("{} of {} texts of 80 tokens equal, {} part at a gap below 0.1 (widest {:.3f})", same, prompts,
                     near_ties, widest));
}

// A layer of LLaMA-2-7B, whose products take the forms that large matrices have.
void LargeLayer(const std::shared_ptr<CudaDevice>& device, const std::shared_ptr<CpuOps>& ops) {
  ModelConfig config;
  config.hidden_size = 4096;
  config.intermediate_size = 11008;
  config.num_layers = 1;
  config.num_heads = config.num_kv_heads = 32;
  config.head_dim = 128;
  config.vocab_size = 512;
  LoadOptions options;
  options.ops = ops;
  options.weight_dtype = "f32";
  const auto cpu = Must(BuildRandomModel(config, 1, options), "a large layer on the CPU");
  options.cuda = device;
  options.deterministic = true;
  for (const char* dtype : {"bf16", "fp8"}) {
    options.weight_dtype = dtype;
    const auto cuda = Must(BuildRandomModel(config, 1, options), "a large layer on the GPU");
    const std::string name = fmt::format("7B layer {}", dtype);
    AgreesWithCpu(name, cuda.get(), cpu.get(), std::string(dtype) == "fp8" ? 0.2 : 0.03);
    NeighboursDoNotMatter(name, cuda.get(), 128);
    TreesDoNotMindNeighbours(name, cuda.get());
  }
}

// Matrices beyond the kernel of small ones, which all other models here fit: warpgroup products, and norms that ride on
// them (sm_90). Random weights, the same on both machines.
void WideModel(const std::shared_ptr<CudaDevice>& device, const std::shared_ptr<CpuOps>& ops) {
  const ModelConfig config = Must(ParseModelConfig(R"({"model_type": "llama", "hidden_size": 2304,
      "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 18, "num_key_value_heads": 18,
      "head_dim": 128, "vocab_size": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
      "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096, "linear_attention": {"version": 1,
      "group_size": 64, "conv_kernel": 32, "local": "relu_squared", "global": "rms_norm", "decay": true,
      "qk_norm_eps": 1e-6, "global_norm_eps": 1e-6}})"),
                                  "the wide shape");
  LoadOptions options;
  options.ops = ops;
  options.weight_dtype = "f32";
  const auto cpu = Must(BuildRandomModel(config, 1, options), "wide on the CPU");
  options.cuda = device;
  for (const bool deterministic : {true, false}) {
    options.deterministic = deterministic;
    for (const char* dtype : {"bf16", "int8", "fp8"}) {
      options.weight_dtype = dtype;
      const auto cuda = Must(BuildRandomModel(config, 1, options), "wide on the GPU");
      const double tolerance = std::string(dtype) == "fp8" ? 0.2 : std::string(dtype) == "int8" ? 0.05 : 0.03;
      const std::string name = fmt::format("wide {}{}", dtype, deterministic ? " deterministic" : "");
      AgreesWithCpu(name, cuda.get(), cpu.get(), tolerance);
      RunsAhead(name, cuda.get());
      if (!deterministic) continue;
      ChunksAgree(name, cuda.get());
      NeighboursDoNotMatter(name, cuda.get(), 128);
    }
  }
}

void OutOfMemoryIsAnError(Model* model) {
  const auto pool = model->CreatePool(1 << 20);
  const bool refused = pool.status().code() == absl::StatusCode::kResourceExhausted;
  Session after(model);
  after.Prefill(Tokens(10, model->config().vocab_size, 1));
  const std::vector<float> logits = after.Verify(DraftTree::Root(1));
  Report("a pool larger than the GPU is refused, and the model goes on", refused && std::isfinite(logits[0]),
         std::string(pool.status().message()).substr(0, 90));
}

}  // namespace
}  // namespace linspec

int main(int argc, char** argv) {
  using namespace linspec;
  if (argc < 3) {
    fmt::print("usage: cuda_model_test FOLDER_OF_TINY_MODELS FOLDER_OF_BUNDLED_MODELS [PLUGIN [--quick]]\n");
    return 2;
  }
  const std::string tiny = argv[1], bundled = argv[2];
  const auto device = Must(CudaDevice::Open(argc > 3 ? argv[3] : ""), "GPU");
  if (argc > 4) {
    for (const char* name : {"full64", "paper"}) {
      LoadOptions options;
      options.path = tiny + "/" + name;
      options.cuda = device;
      options.weight_dtype = "bf16";
      RunsAhead(name, Must(LoadModel(options), name).get());
    }
    return Finish("cuda_model_test");
  }
  const std::shared_ptr<CpuOps> ops = Must(CpuOps::Create({.num_threads = 8}), "CPU");
  for (const char* name : {"full", "full64", "gqa", "paper"}) {
    LoadOptions options;
    options.path = tiny + "/" + name;
    options.ops = ops;
    options.weight_dtype = "f32";
    const auto cpu = Must(LoadModel(options), name);
    options.cuda = device;
    for (const char* dtype : {"bf16", "int8", "fp8"}) {
      options.weight_dtype = dtype;
      options.deterministic = std::string(dtype) == "bf16";  // the others: as most people will run it
      const auto cuda = Must(LoadModel(options), name);
      // Against fp32 weights: what is left is the rounding of the weights (8, 7 and 3 bits) and of the activations.
      const double tolerance = std::string(dtype) == "fp8" ? 0.2 : std::string(dtype) == "int8" ? 0.05 : 0.03;
      AgreesWithCpu(fmt::format("{} {}", name, dtype), cuda.get(), cpu.get(), tolerance);
      if (std::string(dtype) != "bf16") continue;
      TreeEqualsSequence(name, cuda.get());
      ChunksAgree(name, cuda.get());
      NeighboursDoNotMatter(name, cuda.get(), 64);
      SamplesAsTheHost(name, cuda.get());
      RunsAhead(name, cuda.get());
    }
  }
  {
    LoadOptions options;
    options.path = bundled + "/target";
    options.cuda = device;
    options.deterministic = true;
    const auto target = Must(LoadModel(options), "target");
    TreeEqualsSequence("bundled", target.get());
    NeighboursDoNotMatter("bundled, deterministic", target.get(), 256);
    SamplesAsTheHost("bundled", target.get());
    RunsAhead("bundled", target.get());
    TreesDoNotMindNeighbours("bundled", target.get());
    OutOfMemoryIsAnError(target.get());
  }
  WideModel(device, ops);
  LargeLayer(device, ops);
  GreedyTextAsTheCpus(bundled, device, ops);
  return Finish("cuda_model_test");
}
