#include "server/commands.h"

#include <fmt/format.h>

#include <cstdio>
#include <string_view>
#include <vector>

#include "server/config.h"
#include "server/service.h"

#if __has_include("loadtest/loadtest.h")
#include "loadtest/loadtest.h"
#define LINSPEC_HAS_LOADTEST 1
#else
#define LINSPEC_HAS_LOADTEST 0
#endif

namespace linspec {
namespace {

constexpr char kHelp[] = R"(linspec: serves linearized language models; memory per request does not grow with context

  linspec serve [flags]                 REST on port 8000, gRPC on port 50051
  linspec generate [flags] PROMPT       continues a text on this terminal
  linspec eval [flags] --text FILE      perplexity and bits per byte of a text
  linspec bench [flags]                 tokens/s beside the memory-bandwidth floor, as JSON
  linspec bench-speculation [flags]     what each drafter brings, beside plain decoding of the same prompts
  linspec loadtest [flags]              open-loop load against a running server
  linspec version
  linspec help [serve|generate|eval|bench|bench-speculation]
)";

constexpr char kGenerateHelp[] = R"(linspec generate [flags of serve] PROMPT
  --max-tokens N     default 128
  --temperature T    default 0.8; 0 is greedy
  --top-p P          default 0.95
  --seed N           default: drawn
  --chat true        PROMPT is a user message, put through the model's chat template
)";

constexpr char kEvalHelp[] = R"(linspec eval [flags of serve] --text FILE
  --context N        tokens per window; the state starts empty at each (default: what the model was trained at)
  --max-tokens N     stop after so many tokens of the file (default: all)
  --reference-state-dtype f32|bf16
                     run beside it with such states: divergence of the distributions and how often the first choice
                     is the same
)";

constexpr char kBenchHelp[] = R"(linspec bench [--model FOLDER | --shape 7b|13b|CONFIG.JSON] [flags]
  --shape NAME       random weights in the shape of LLaMA-2 7b or 13b, or of this config.json, instead of a model
  --device D         auto, cpu, cuda
  --weight-dtype T   auto, f32, bf16, int8, fp8 (GPU)
  --state-dtype T    f32, bf16
  --batch LIST       default 1,4,16
  --context LIST     default 128,4096,65536
  --prefill LIST     prompt lengths, default 512,2048; in pieces of --max-step-tokens
  --draft-nodes LIST rows that each request brings to a step, default 1; more: a chain of drafts, of which
  --acceptance LIST  are accepted at depth 1, 2, ..., each given those before it (default 0.7, the last one goes on)
  --seconds S        per measurement, default 2
  --warm-up-requests N  at last, what a server of so many requests captures before the first one (GPU)
  --run-ahead false  start each plain step only when the one ahead of it is read (GPU)
  --threads N, --isa NAME
)";

constexpr char kBenchSpeculationHelp[] = R"(linspec bench-speculation [flags of serve] [flags]
  --prompts FILE     JSON lines with set, and prompt or messages (default tests/data/prompts/speculation.jsonl)
  --prompts-per-set N  only the first N of each set
  --drafters LIST    default draft,medusa,recurrent,ngram,auto; plain decoding comes first in any case. "off" among
                     them measures plain decoding again: what it gains or loses is the noise of this machine
  --batch LIST       requests kept running, default 1,2,4,8,16
  --temperature LIST whole numbers, default 0,1
  --max-tokens N     per request, default 128
  --repeats N        of everything, each starting with the next drafter and other seeds; default 1
  --min-seconds S    go on until each drafter was measured this long on each set; default -1: 0 on a CPU, 1 on a GPU
  --warm-up N        loads (four requests a slot) of each set first that are not measured; default 1
  --expectations 1   a second table: what steps took and brought beside what the controller expected
  --json FILE        all figures
)";

int Report(const absl::Status& status, const char* command) {
  if (status.ok()) return 0;
  fmt::print(stderr, "linspec {}: {}\n", command, std::string(status.message()));
  return status.code() == absl::StatusCode::kInvalidArgument ? 2 : 1;
}

int Help(std::string_view topic) {
  if (topic == "serve")
    fmt::print("{}", ServerHelp());
  else if (topic == "generate")
    fmt::print("{}", kGenerateHelp);
  else if (topic == "eval")
    fmt::print("{}", kEvalHelp);
  else if (topic == "bench")
    fmt::print("{}", kBenchHelp);
  else if (topic == "bench-speculation")
    fmt::print("{}", kBenchSpeculationHelp);
  else
    fmt::print("{}", kHelp);
  return 0;
}

}  // namespace

int RunCommand(int argc, char** argv) {
  const std::string_view command = argc > 1 ? argv[1] : "help";
  const std::vector<std::string> args(argv + std::min(argc, 2), argv + argc);
  for (const std::string& arg : args) {
    if ((arg == "--help" || arg == "-h") && command != "loadtest") return Help(command);
  }
  if (command == "serve") return Report(Serve(args), "serve");
  if (command == "generate") return Report(Generate(args), "generate");
  if (command == "eval") return Report(Eval(args), "eval");
  if (command == "bench") return Report(Bench(args), "bench");
  if (command == "bench-speculation") return Report(BenchSpeculation(args), "bench-speculation");
#if LINSPEC_HAS_LOADTEST
  if (command == "loadtest") return LoadTestMain(argc - 1, argv + 1);
#endif
  if (command == "version" || command == "--version") {
    fmt::print("linspec {}\n", kVersion);
    return 0;
  }
  if (command == "help" || command == "--help" || command == "-h") return Help(args.empty() ? "" : args[0]);
  fmt::print(stderr, "linspec: unknown command '{}'\n\n{}", command, kHelp);
  return 2;
}

}  // namespace linspec
