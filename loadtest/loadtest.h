// `linspec loadtest`: load against an OpenAI-compatible server, measured as `vllm bench serve` measures it.
#pragma once

namespace linspec {

// argv[0] is the subcommand's name. Returns the exit status: 0 when every request ended well, 1 otherwise, 2 for a flag
// it does not understand.
int LoadTestMain(int argc, char** argv);

}  // namespace linspec
