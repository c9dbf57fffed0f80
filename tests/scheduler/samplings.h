// Every sampling parameter, alone and together, for tests that hold for all of them. Vocabulary of 12 or more.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "models/sampling_params.h"

namespace linspec {

struct NamedSampling {
  std::string name;
  std::function<void(SamplingParams*)> set;
};

inline std::vector<NamedSampling> Samplings() {
  return {
      {"greedy", [](SamplingParams* p) { p->temperature = 0; }},
      {"seeded", [](SamplingParams*) {}},
      {"top_p", [](SamplingParams* p) { p->top_p = 0.8f; }},
      {"top_k", [](SamplingParams* p) { p->top_k = 3; }},
      {"min_p", [](SamplingParams* p) { p->min_p = 0.1f; }},
      {"typical_p", [](SamplingParams* p) { p->typical_p = 0.7f; }},
      {"penalties",
       [](SamplingParams* p) {
         p->repetition_penalty = 1.3f;
         p->frequency_penalty = 0.4f;
         p->presence_penalty = 0.7f;
       }},
      {"greedy_penalties",
       [](SamplingParams* p) {
         p->temperature = 0;
         p->frequency_penalty = 1.5f;
       }},
      {"logit_bias", [](SamplingParams* p) { p->logit_bias = {{3, 2.5f}, {4, -100.0f}}; }},
      {"allowed_token_ids", [](SamplingParams* p) { p->allowed_token_ids = {9, 2, 4, 7, 1}; }},
      {"banned_sequences",
       [](SamplingParams* p) {
         p->banned_sequences = {{3}, {5, 6}, {6, 5}, {1, 8, 1}};
         p->presence_penalty = 0.5f;
       }},
      {"min_tokens_stop_ids",
       [](SamplingParams* p) {
         p->min_tokens = 9;
         p->stop_token_ids = {2, 5};
       }},
      {"stop_ids", [](SamplingParams* p) { p->stop_token_ids = {7}; }},
      {"logprobs", [](SamplingParams* p) { p->logprobs = 3; }},
      {"all_that_devices_know",
       [](SamplingParams* p) {
         p->temperature = 0.8f;
         p->top_p = 0.9f;
         p->top_k = 9;
         p->min_p = 0.02f;
         p->repetition_penalty = 1.2f;
         p->frequency_penalty = 0.3f;
         p->logit_bias = {{1, 1.5f}, {8, -3.0f}};
         p->min_tokens = 7;
         p->stop_token_ids = {11, 4};
       }},
      {"everything",
       [](SamplingParams* p) {
         p->temperature = 0.7f;
         p->top_p = 0.95f;
         p->top_k = 8;
         p->min_p = 0.01f;
         p->typical_p = 0.98f;
         p->repetition_penalty = 1.1f;
         p->presence_penalty = 0.2f;
         p->logit_bias = {{1, 1.0f}};
         p->min_tokens = 5;
         p->stop_token_ids = {11};
         p->allowed_token_ids = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11};
         p->banned_sequences = {{2, 2}, {4, 1, 2}};
         p->logprobs = 1;
       }},
  };
}

}  // namespace linspec
