// What a simulated machine and its drafters cost, and how often drafts are right. Milliseconds.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

namespace linspec {

struct SimulatedDrafter {
  std::string name;
  double first_ms = 0, level_ms = 0;  // of one context
  double more_contexts = 0;           // share of that for each further context
  double catch_up_ms = 0;             // of a token
  double decay = 0.85;                // acceptance of a level beside that of the level above
  int siblings = 0;                   // tokens beside each of the chain, as the second guess
  int depth = 6;
  bool own_heads = false;  // of the model, which can draft with them ahead of its results
  bool free = false;       // asked before the others, for what it promises
  double stated = 0;       // of each token, whatever the truth; 0: somewhat more than the truth

  double Ms(int contexts, int levels) const {
    return (first_ms + level_ms * (levels - 1)) * (1 + more_contexts * (contexts - 1));
  }
};

struct SimulatedMachine {
  std::vector<double> row_ms;           // at 1, 2, 4, ... rows of one request
  double request_ms = 0;                // each further request
  double any_draft = 1;                 // factor on steps with more rows than requests
  std::function<int(int)> padded = {};  // rows that a step of so many rows computes
  double ahead = 1;                     // factor on plain steps that are started ahead; 1: none is
  double drafts_ahead = 1;              // factor on steps with drafts of own heads that are; 1: none is
  double noise = 0.05;                  // standard deviation of the logarithm of a step's time
  double interruptions = 0.01;          // share of steps that take three times as long
  double hidden_ms = 0;                 // of each request drafted for, which no observation of a draft shows
  double drift = 0.002;                 // per step, of the logarithm of the machine's speed
  double prompt_ms = 0;                 // of reading a token of a prompt, which delays the step beside it
  double draft_surprise = 1;            // what drafts take beside what was measured at start-up
  std::vector<SimulatedDrafter> drafters;

  double VerifyMs(int rows, int requests) const {
    const double computed = padded ? padded(rows) : rows;
    const int below = std::clamp(static_cast<int>(std::log2(computed)), 0, static_cast<int>(row_ms.size()) - 2);
    const double share = computed / std::ldexp(1.0, below) - 1;
    const double ms = row_ms[below] + share * (row_ms[below + 1] - row_ms[below]) + request_ms * (requests - 1);
    return rows > requests ? ms * any_draft : ms;
  }
};

// [drafter] how often the best child of the root is right, for the text of a request.
using SimulatedText = std::vector<double>;

}  // namespace linspec
