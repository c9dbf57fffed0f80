// Drafting on the GPU: guesses against the CPU's heads, and speculation that changes no text. A plain program that
// exits 0 only if every check passed.
// usage: cuda_draft_test FOLDER_OF_TINY_MODELS FOLDER_OF_BUNDLED_MODELS [PLUGIN [--quick]]
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "models/cuda_chains.h"
#include "models/cuda_guesser.h"
#include "models/draft_model_drafter.h"
#include "models/head_chain_drafter.h"
#include "models/medusa_drafter.h"
#include "models/ngram_drafter.h"
#include "models/recurrent_head.h"
#include "scheduler/engine.h"
#include "tests/cuda/chain_checks.h"
#include "tests/cuda/model_checks.h"

namespace linspec {
namespace {

// Logits of the CPU's head at one level, from the hidden state [D] and the tokens before: the pending one and a guess
// for each level above.
using ReferenceLogits =
    std::function<std::vector<float>(std::span<const float> hidden, std::span<const int32_t> chain)>;

// Contexts over the rows of one verified tree, whose hidden states the CPU's heads get too.
struct HiddenRows {
  HiddenRows(Model* model, int count) : pool(Must(model->CreatePool(1), "pool")), slot(pool->Acquire()) {
    const int64_t vocab = model->config().vocab_size, dim = model->config().hidden_size;
    const std::vector<int32_t> prompt = Tokens(30, vocab, 5);
    const PrefillChunk chunks[] = {{slot.id(), prompt}};
    Must(model->Prefill(chunks, pool.get()), "prefill");
    std::mt19937 random(11);
    VerifyBatch batch;
    batch.Add(slot.id(), RandomTree(count, vocab, &random));
    const VerifyResult result = Must(model->Verify(batch, *pool), "verify");
    hidden.assign(result.hidden.begin(), result.hidden.end());
    for (int row = 0; row < count; ++row) {
      texts.push_back(Tokens(10 + row, vocab, 100 + row));
      SamplingParams params;
      params.seed = row;
      params.temperature = row % 3 == 0 ? 0.0f : 0.4f + 0.1f * static_cast<float>(row % 8);
      sampling.push_back(params);
    }
    for (int row = 0; row < count; ++row) {
      contexts.push_back({.sequence_id = static_cast<uint64_t>(row),
                          .tokens = texts[row],
                          .num_prompt_tokens = 1,
                          .sampling = &sampling[row],
                          .hidden = std::span(hidden).subspan(row * dim, dim),
                          .hidden_row = row,
                          .max_nodes = 8,
                          .draw = row % 5 == 4 ? DraftDraw::kLikeliest : DraftDraw::kCoupled});
    }
  }
  std::unique_ptr<StatePool> pool;
  StateSlot slot;
  std::vector<float> hidden;
  std::vector<std::vector<int32_t>> texts;
  std::vector<SamplingParams> sampling;
  std::vector<DraftContext> contexts;
};

// The same candidates in the same order up to near-ties, and the same odds: what is left is the rounding of weights and
// activations to bf16.
void GuessesAsTheHost(const std::string& name, Model* target, DraftGuesser* heads, const ReferenceLogits& reference) {
  constexpr int kTopK = 6, kRows = 48;
  constexpr float kNearTie = 0.15f, kOddsTolerance = 0.08f;
  const HiddenRows rows(target, kRows);
  std::vector<const DraftContext*> contexts;
  for (const DraftContext& context : rows.contexts) contexts.push_back(&context);
  const int levels = std::min(heads->max_levels(), 4);
  int compared = 0, same = 0, far = 0;
  float worst_odds = 0;
  for (const int count : {1, 3, kRows}) {
    const auto some = std::span(contexts).first(count);
    for (int repeat = 0; repeat < 3; ++repeat) {  // launched, captured, replayed
      const DraftGuesses guesses = Must(heads->Guess(some, levels, kTopK), "guess");
      for (int r = 0; r < count; ++r) {
        const DraftContext& context = *contexts[r];
        std::vector<int32_t> chain = {context.tokens.back()};
        for (int level = 0; level < levels; ++level) {
          const std::vector<float> logits = reference(context.hidden, chain);
          const bool coupled = context.draw == DraftDraw::kCoupled;
          const int64_t position = std::ssize(context.tokens) + level;
          const auto expected = LikelyChoices(logits, *context.sampling, position, kTopK, coupled);
          const auto more = LikelyChoices(logits, *context.sampling, position, 2 * kTopK, coupled);  // other odds
          const std::span<const DraftCandidate> found = guesses.At(r, level);
          for (size_t i = 0; i < found.size(); ++i) {
            const auto there = std::ranges::find(more, found[i].token, &DraftCandidate::token);
            const auto listed = std::ranges::find(expected, found[i].token, &DraftCandidate::token);
            ++compared;
            same += found[i].token == expected[i].token;
            far += there == more.end() || there->probability < more[i].probability * (1 - kNearTie) - 0.01f;
            if (listed != expected.end()) {
              worst_odds = std::max(worst_odds, std::abs(listed->probability - found[i].probability));
            }
          }
          if (found.size() != kTopK || std::ranges::any_of(found, [&](const DraftCandidate& c) {
                return c.token < 0 || c.token >= target->config().vocab_size;
              })) {
            Report(name + ": candidates are tokens", false);
          }
          chain.push_back(found[0].token);
        }
      }
    }
  }
  Report(name + ": guesses as the host's", far == 0 && same > compared * 8 / 10 && worst_odds < kOddsTolerance,
         fmt::format("{} of {} the same, {} worse than a near-tie, odds differ by {:.3f}", same, compared, far,
                     worst_odds));
}

LoadOptions On(const std::string& path, const std::shared_ptr<CudaDevice>& device, const std::string& dtype = "auto") {
  LoadOptions options;
  options.path = path;
  options.cuda = device;
  options.weight_dtype = dtype;
  options.deterministic = true;
  return options;
}

// A random model whose query heads share keys, of a head size for the tensor cores.
std::unique_ptr<Model> GroupedHeads(const std::shared_ptr<CudaDevice>& device) {
  ModelConfig config;
  config.vocab_size = 512;
  config.hidden_size = 256;
  config.intermediate_size = 320;
  config.num_layers = 3;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  return Must(BuildRandomModel(config, 9, On("", device)), "random model");
}

LoadOptions OnCpu(const std::string& path, const std::shared_ptr<CpuOps>& ops) {
  LoadOptions options;
  options.path = path;
  options.ops = ops;
  options.weight_dtype = "f32";
  return options;
}

void MedusaGuesses(const std::string& name, const std::string& folder, const std::shared_ptr<CudaDevice>& device,
                   const std::shared_ptr<CpuOps>& ops) {
  const auto cpu = Must(LoadModel(OnCpu(folder, ops)), name);
  const auto heads = Must(MedusaHeads::Load(folder, cpu->config(), "f32", ops), name);
  const auto target = Must(LoadModel(On(folder, device)), name);
  const auto guesser = Must(LoadCudaMedusaGuesser(folder, target.get(), "auto"), name);
  const auto vocab = static_cast<size_t>(cpu->config().vocab_size);
  GuessesAsTheHost(name + " medusa", target.get(), guesser.get(),
                   [&](std::span<const float> hidden, std::span<const int32_t> chain) {
                     const int level = static_cast<int>(chain.size());
                     const auto logits = Must(heads->Logits(hidden, level, cpu.get()), "logits").last(vocab);
                     return std::vector<float>(logits.begin(), logits.end());
                   });
}

void RecurrentGuesses(const std::string& name, const std::string& folder, const std::shared_ptr<CudaDevice>& device,
                      const std::shared_ptr<CpuOps>& ops) {
  const auto cpu = Must(LoadModel(OnCpu(folder, ops)), name);
  const auto head = Must(RecurrentHead::Load(folder, cpu->config(), "f32", ops), name);
  const auto target = Must(LoadModel(On(folder, device)), name);
  const auto guesser = Must(LoadCudaRecurrentGuesser(folder, target.get(), "auto"), name);
  GuessesAsTheHost(name + " recurrent", target.get(), guesser.get(),
                   [&](std::span<const float> hidden, std::span<const int32_t> chain) {
                     std::vector<float> state(hidden.begin(), hidden.end()), logits;
                     for (const int32_t token : chain) {
                       const auto step = Must(head->Step(state, {&token, 1}, cpu.get()), "step");
                       logits.assign(step.begin(), step.end());
                     }
                     return logits;
                   });
}

// Up to eight rows of a small head are drafted by one launch, more launch by launch: a row's guesses are the same, to
// the bit, and replayed ones too.
void RecurrentRowsStandAlone(const std::string& folder, const std::shared_ptr<CudaDevice>& device) {
  const auto target = Must(LoadModel(On(folder, device)), folder);
  const auto guesser = Must(LoadCudaRecurrentGuesser(folder, target.get(), "auto"), folder);
  const HiddenRows rows(target.get(), 16);
  std::vector<const DraftContext*> contexts;
  for (const DraftContext& context : rows.contexts) contexts.push_back(&context);
  int compared = 0, different = 0;
  for (const auto& [levels, top_k] : {std::pair{1, 1}, {3, 4}, {5, 16}, {guesser->max_levels(), 2}}) {
    const DraftGuesses all = Must(guesser->Guess(contexts, levels, top_k), "guess");
    for (int count = 1; count <= 8; ++count) {
      for (int repeat = 0; repeat < 3; ++repeat) {
        const auto some = std::span(contexts).subspan(repeat, count);  // other rows by the same graph
        const DraftGuesses guesses = Must(guesser->Guess(some, levels, top_k), "guess");
        for (int r = 0; r < count; ++r) {
          for (int level = 0; level < levels; ++level) {
            ++compared;
            different += !std::ranges::equal(guesses.At(r, level), all.At(repeat + r, level),
                                             [](const DraftCandidate& a, const DraftCandidate& b) {
                                               return a.token == b.token && a.probability == b.probability;
                                             });
          }
        }
      }
    }
  }
  Report("recurrent: a row's guesses do not depend on the rows beside it", different == 0,
         fmt::format("{} of {} levels differ", different, compared));
}

// The tiny head is 24 wide.
void OddWidthIsUnimplemented(const std::string& folder, const std::shared_ptr<CudaDevice>& device) {
  const auto target = Must(LoadModel(On(folder, device)), folder);
  const absl::Status status = LoadCudaRecurrentGuesser(folder, target.get(), "auto").status();
  Report("a recurrent head of a width without kernels is refused", status.code() == absl::StatusCode::kUnimplemented,
         std::string(status.message()).substr(0, 90));
}

using Texts = std::map<uint64_t, std::vector<int32_t>>;

struct Run {
  int requests = 1, tokens = 1;
  bool plain = false;  // no penalties and no logprobs, so that the device chooses everything
};
struct Counts {
  int64_t accepted = 0, ahead = 0;  // drafted tokens that became text; steps with drafts that ran ahead
};

Texts Generate(std::unique_ptr<Model> model, std::vector<std::unique_ptr<Drafter>> drafters, SpeculationMode mode,
               const Run& run, Counts* counts) {
  const int requests = run.requests;
  const int64_t vocab = model->config().vocab_size;
  EngineOptions options;
  options.max_requests = requests;
  options.speculation = mode;
  options.calibrate = false;
  auto engine = Must(Engine::Create(std::move(model), std::move(drafters), options,
                                    [&](const StepStats& step) {
                                      counts->accepted += step.num_accepted_tokens;
                                      counts->ahead += step.ahead && step.num_drafts > 0;
                                    }),
                     "engine");
  Texts texts;
  for (int id = 1; id <= requests; ++id) {
    Request request;
    request.id = id;
    request.prompt_tokens = Tokens(10 + 13 * (id % 9), vocab, id);
    request.sampling.max_tokens = run.tokens;
    request.sampling.ignore_eos = true;
    request.sampling.temperature = id % 2 == 0 ? 0.0f : 0.8f;
    request.sampling.seed = id;
    if (id % 3 == 0) request.sampling.top_p = 0.9f;
    if (id % 4 == 0 && !run.plain) request.sampling.repetition_penalty = 1.2f;
    if (id % 5 == 0 && !run.plain) request.sampling.logprobs = 2;
    request.sink = [&texts, id](RequestOutput&& output) {
      for (const SampledToken& token : output.tokens) texts[id].push_back(token.token);
      if (!output.status.ok()) Report("request failed", false, std::string(output.status.message()));
      return true;
    };
    Must(engine->Submit(std::move(request)), "submit");
  }
  while (engine->Step()) {
  }
  const EngineStats stats = engine->stats();
  if (stats.slots_free != stats.slots_total) Report("slots leaked", false);
  return texts;
}

std::vector<std::unique_ptr<Drafter>> MakeDrafters(const std::string& kind, const std::string& folder,
                                                   const std::shared_ptr<CudaDevice>& device, Model* target,
                                                   int requests) {
  std::vector<std::unique_ptr<Drafter>> drafters;
  if (kind == "draft") {
    auto model = Must(LoadModel(On(folder + "/draft", device)), kind);
    const int64_t vocab = target->config().vocab_size;
    auto chains = MakeCudaChains(*model);
    drafters.push_back(Must(
        DraftModelDrafter::Create(std::move(model), vocab, {.max_sequences = requests, .top_k = 2}, std::move(chains)),
        kind));
  } else if (kind == "recurrent") {
    auto head = Must(LoadCudaRecurrentGuesser(folder + "/target", target, "auto"), kind);
    drafters.push_back(Must(HeadChainDrafter::Create(kind, std::move(head), {}), kind));
  } else if (kind == "medusa") {
    auto heads = Must(LoadCudaMedusaGuesser(folder + "/target", target, "auto"), kind);
    drafters.push_back(Must(MedusaDrafter::Create(std::move(heads), {}), kind));
  } else {
    drafters.push_back(std::make_unique<NgramDrafter>());
  }
  return drafters;
}

void SpeculationChangesNothing(const std::string& folder, const std::shared_ptr<CudaDevice>& device, const Run& run) {
  const auto target = [&] { return Must(LoadModel(On(folder + "/target", device)), "target"); };
  Counts none;
  const Texts plain = Generate(target(), {}, SpeculationMode::kOff, run, &none);
  const std::map<std::string, SpeculationMode> modes = {{"ngram", SpeculationMode::kNgram},
                                                        {"draft", SpeculationMode::kDraft},
                                                        {"medusa", SpeculationMode::kMedusa},
                                                        {"recurrent", SpeculationMode::kRecurrent}};
  for (const auto& [kind, mode] : modes) {
    auto model = target();
    auto drafters = MakeDrafters(kind, folder, device, model.get(), run.requests);
    const bool ahead = run.plain && (kind == "medusa" || kind == "recurrent");
    Counts counts;
    const Texts drafted = Generate(std::move(model), std::move(drafters), mode, run, &counts);
    int different = 0;
    for (const auto& [id, text] : plain) different += drafted.at(id) != text;
    Report(fmt::format("speculation {} at {} requests{}: same text as without", kind, run.requests,
                       run.plain ? " alike" : ""),
           different == 0 && counts.accepted > 0 && (counts.ahead > run.tokens / 10) == ahead,
           fmt::format("{} of {} texts differ, {} drafted tokens accepted, {} steps with drafts ran ahead", different,
                       plain.size(), counts.accepted, counts.ahead));
  }
}

}  // namespace
}  // namespace linspec

int main(int argc, char** argv) {
  using namespace linspec;
  if (argc < 3) {
    fmt::print("usage: cuda_draft_test FOLDER_OF_TINY_MODELS FOLDER_OF_BUNDLED_MODELS [PLUGIN [--quick]]\n");
    return 2;
  }
  const std::string tiny = argv[1], bundled = argv[2];
  const auto device = Must(CudaDevice::Open(argc > 3 ? argv[3] : ""), "GPU");
  const std::shared_ptr<CpuOps> ops = Must(CpuOps::Create({.num_threads = 8}), "CPU");
  for (const char* name : {"full", "paper"}) MedusaGuesses(name, tiny + "/" + name, device, ops);
  MedusaGuesses("bundled", bundled + "/target", device, ops);
  OddWidthIsUnimplemented(tiny + "/full", device);
  RecurrentGuesses("bundled", bundled + "/target", device, ops);
  RecurrentRowsStandAlone(bundled + "/target", device);
  for (const char* name : {"full", "gqa"}) ChainsAsTheHost(name, Must(LoadModel(On(tiny + "/" + name, device)), name));
  ChainsAsTheHost("bundled draft", Must(LoadModel(On(bundled + "/draft", device)), "draft"));
  ChainsAsTheHost("grouped heads", GroupedHeads(device));
  if (argc > 4 && std::string(argv[4]) == "--quick") {  // for the sanitizers
    SpeculationChangesNothing(bundled, device, {.requests = 3, .tokens = 24, .plain = true});
    return Finish("cuda_draft_test");
  }
  for (const int requests : {4, 16}) {
    SpeculationChangesNothing(bundled, device, {requests, requests > 8 ? 60 : 300, /*plain=*/false});
  }
  for (const int requests : {1, 3, 16, 48}) {
    SpeculationChangesNothing(bundled, device, {requests, requests > 8 ? 60 : 300, /*plain=*/true});
  }
  return Finish("cuda_draft_test");
}
