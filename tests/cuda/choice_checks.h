// The choice of drafts and of tokens from rows of logits, against models/draft_candidates.h and models/sampler.h:
// vocabularies of one and of several blocks, rows with less to choose from than is asked for, and logits that no token
// may come from.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/draft_kernels.h"
#include "kernels/cuda/sampling.h"
#include "models/draft_candidates.h"
#include "models/sampler.h"
#include "tests/cuda/device_buffers.h"
#include "tests/cuda/report.h"

namespace linspec::cuda {

inline constexpr int kChoiceVocabs[] = {7, 1000, 8192, 33'001};
inline constexpr float kNever = -std::numeric_limits<float>::infinity();

// Rows in all ways of drawing; the last offers two tokens only.
inline std::vector<LinspecCudaDraftRow> DraftRows(int rows) {
  std::vector<LinspecCudaDraftRow> made;
  for (int r = 0; r < rows; ++r) {
    made.push_back({.seed = 77ULL + r,
                    .position = 1000 + 3 * r,
                    .temperature = r % 3 == 0 ? 0.0f : 0.3f + 0.2f * static_cast<float>(r),
                    .coupled = r % 3 == 1,
                    .token = 0,
                    .hidden_row = -1});
  }
  return made;
}

inline std::vector<float> DraftLogits(std::mt19937& random, int rows, int vocab) {
  std::vector<float> logits = Normal(random, static_cast<size_t>(rows) * vocab, 3.0f);
  for (int r = 0; r < rows; ++r) logits[r * vocab + random() % vocab] = std::nanf("");
  std::fill(logits.end() - vocab + 2, logits.end(), kNever);
  std::fill_n(logits.end() - vocab, 2, 1.0f);
  return logits;
}

// Candidates [levels, rows, top_k] of these logits that are not the host's, and the largest difference of their odds.
struct DraftErrors {
  double tokens = 0, odds = 0;
  void Compare(const std::vector<DraftCandidate>& expected, const LinspecCudaDraftCandidate* found, int top_k) {
    for (int i = 0; i < top_k; ++i) {
      const bool there = i < static_cast<int>(expected.size());
      tokens += found[i].token != (there ? expected[i].token : -1);
      const double difference = std::abs(found[i].probability - (there ? expected[i].probability : 0.0f));
      odds = std::isnan(difference) ? difference : std::max(odds, difference);
    }
  }
};

// The host's, with exact odds where it estimates the sum over the vocabulary.
inline std::vector<DraftCandidate> HostsChoices(const std::vector<float>& logits, int64_t at, int vocab,
                                                const LinspecCudaDraftRow& row, int level, int top_k) {
  SamplingParams params;
  params.seed = row.seed;
  params.temperature = row.temperature;
  const std::span<const float> of_row = std::span(logits).subspan(at * vocab, vocab);
  std::vector<DraftCandidate> choices = LikelyChoices(of_row, params, row.position + level, top_k, row.coupled != 0);
  if (row.coupled != 0 && row.temperature > 0) return choices;
  const double scale = row.temperature > 0 ? 1.0 / row.temperature : 1.0, max = of_row[choices[0].token];
  double sum = 0;
  for (const float logit : of_row) sum += std::isnan(logit) ? 0 : std::exp((logit - max) * scale);
  for (DraftCandidate& choice : choices) {
    choice.probability = static_cast<float>(std::exp((of_row[choice.token] - max) * scale) / sum);
  }
  return choices;
}

inline void TestChooseDraft(int vocab, int top_k) {
  constexpr int kRows = 7, kLevels = 2, kFirstLevel = 3;
  std::mt19937 random(vocab);
  std::vector<LinspecCudaDraftRow> rows = DraftRows(kRows);
  const std::vector<float> logits = DraftLogits(random, kRows * kLevels, vocab);
  const DeviceArray<LinspecCudaDraftRow> device_rows(rows);
  const DeviceArray<float> device_logits(logits);
  const DeviceArray<LinspecCudaDraftCandidate> candidates(static_cast<size_t>(kRows) * kLevels * top_k);
  LaunchChooseDraft({.input = {.rows = device_rows.get(), .hidden = nullptr, .num_rows = kRows},
                     .logits = device_logits.get(),
                     .vocab = vocab,
                     .first_level = kFirstLevel,
                     .num_levels = kLevels,
                     .top_k = top_k,
                     .candidates = candidates.get(),
                     .next_tokens = nullptr},
                    nullptr);
  Sync();
  DraftErrors errors;
  const std::vector<LinspecCudaDraftCandidate> found = candidates.Read();
  for (int i = 0; i < kRows * kLevels; ++i) {
    errors.Compare(HostsChoices(logits, i, vocab, rows[i % kRows], kFirstLevel + i / kRows, top_k),
                   &found[static_cast<size_t>(i) * top_k], top_k);
  }
  const std::string size = " vocab " + std::to_string(vocab) + " top " + std::to_string(top_k);
  Report("choice of drafts" + size, errors.tokens, 0);
  Report("odds of drafts" + size, errors.odds, 1e-3);
}

// One level whose logits stand at hidden_row, as a draft model's first; the last request is padding.
inline void TestChooseDraftAtRows(int vocab) {
  constexpr int kRows = 5, kTopK = 4;
  std::mt19937 random(vocab + 1);
  std::vector<LinspecCudaDraftRow> rows = DraftRows(kRows);
  for (int r = 0; r + 1 < kRows; ++r) rows[r].hidden_row = 2 * kRows - 3 * r / 2;
  const std::vector<float> logits = DraftLogits(random, 2 * kRows + 1, vocab);
  const DeviceArray<LinspecCudaDraftRow> device_rows(rows);
  const DeviceArray<float> device_logits(logits);
  const DeviceArray<LinspecCudaDraftCandidate> candidates(static_cast<size_t>(kRows) * kTopK);
  const DeviceArray<int32_t> next(kRows);
  LaunchChooseDraft({.input = {.rows = device_rows.get(), .hidden = nullptr, .num_rows = kRows},
                     .logits = device_logits.get(),
                     .vocab = vocab,
                     .first_level = 0,
                     .num_levels = 1,
                     .top_k = kTopK,
                     .candidates = candidates.get(),
                     .next_tokens = next.get(),
                     .at_hidden_row = true},
                    nullptr);
  Sync();
  DraftErrors errors;
  const std::vector<LinspecCudaDraftCandidate> found = candidates.Read();
  const std::vector<int32_t> tokens = next.Read();
  for (int r = 0; r + 1 < kRows; ++r) {
    const std::vector<DraftCandidate> expected = HostsChoices(logits, rows[r].hidden_row, vocab, rows[r], 0, kTopK);
    errors.Compare(expected, &found[static_cast<size_t>(r) * kTopK], kTopK);
    errors.tokens += tokens[r] != expected[0].token;
  }
  errors.tokens += tokens[kRows - 1] != 0;
  Report("choice of drafts at rows, vocab " + std::to_string(vocab), errors.tokens, 0);
}

// Parameters of one row, for the device and for the host, and its edits, which the host's logits already have.
struct ChosenRow {
  LinspecCudaSampling device;
  SamplingParams host;
};

inline ChosenRow MakeChosenRow(std::mt19937& random, int row, std::span<float> logits,
                               std::vector<LinspecCudaLogitEdit>* edits) {
  const auto uniform = [&] { return static_cast<float>(random() % 10000) / 10000.0f; };
  ChosenRow made{.device = {}, .host = {}};
  SamplingParams& p = made.host;
  p.seed = random();
  p.temperature = row % 5 == 0 ? 0.0f : 0.3f + uniform();
  if (row % 2 == 0) p.top_p = 0.05f + 0.9f * uniform();
  if (row % 3 == 0) p.top_k = 1 + static_cast<int32_t>(random() % 60);
  if (row % 4 == 1) p.min_p = 0.2f * uniform();
  made.device = {.seed = p.seed,
                 .position = 40 + row,
                 .temperature = p.temperature,
                 .top_p = p.top_p,
                 .min_p = p.min_p,
                 .top_k = p.top_k,
                 .edits_begin = static_cast<int32_t>(edits->size()),
                 .edits_count = row % 4};
  for (int i = 0; i < made.device.edits_count; ++i) {
    const LinspecCudaLogitEdit edit{.token = static_cast<int32_t>(random() % ((logits.size() + 3 - i) / 4)) * 4 + i,
                                    .bias = 4 * uniform() - 2,
                                    .repetition = 0.5f + uniform(),
                                    .subtract = i == 2 ? INFINITY : uniform()};
    float logit = logits[edit.token] + edit.bias;
    logit = logit < 0 ? logit * edit.repetition : logit / edit.repetition;
    logits[edit.token] = logit - edit.subtract;
    edits->push_back(edit);
  }
  return made;
}

inline void TestSample(int vocab) {
  constexpr int kRows = 40;
  std::mt19937 random(vocab + 2);
  const std::vector<float> logits = [&] {
    std::vector<float> made = Normal(random, static_cast<size_t>(kRows) * vocab, 3.0f);
    made[random() % vocab] = std::nanf("");                  // row 0
    made[vocab + random() % vocab] = INFINITY;               // row 1
    std::fill_n(made.begin() + 2 * vocab, vocab, kNever);    // row 2
    std::fill_n(made.begin() + 4 * vocab, vocab / 2, 5.0f);  // row 4: equals, of which truncation keeps the lowest ids
    return made;
  }();
  std::vector<float> edited = logits;
  std::vector<LinspecCudaLogitEdit> edits;
  std::vector<ChosenRow> chosen;
  std::vector<LinspecCudaSampling> sampling;
  for (int row = 0; row < kRows; ++row) {
    chosen.push_back(MakeChosenRow(random, row, std::span(edited).subspan(int64_t{row} * vocab, vocab), &edits));
    sampling.push_back(chosen.back().device);
  }
  const DeviceArray<float> device_logits(logits);
  const DeviceArray<LinspecCudaSampling> device_sampling(sampling);
  const DeviceArray<LinspecCudaLogitEdit> device_edits(edits);
  const DeviceArray<const LinspecCudaLogitEdit*> edits_at(std::vector<const LinspecCudaLogitEdit*>{device_edits.get()});
  const DeviceArray<int32_t> sampled(kRows);
  LaunchSample({.logits = device_logits.get(),
                .sampling = device_sampling.get(),
                .edits = edits_at.get(),
                .sampled = sampled.get(),
                .vocab = vocab},
               kRows, nullptr);
  Sync();
  const std::vector<int32_t> found = sampled.Read();
  const PenaltyHistory none({});
  int wrong = 0;
  for (int row = 0; row < kRows; ++row) {
    const SampleResult expected =
        SampleToken(std::span(edited).subspan(int64_t{row} * vocab, vocab),
                    {.params = &chosen[row].host, .history = &none, .banned = {}, .position = 40 + row});
    wrong += found[row] != (expected.ok ? expected.token.token : -1);
  }
  Report("choice of tokens, vocab " + std::to_string(vocab), wrong, 0);
}

inline void TestChoices() {
  for (const int vocab : kChoiceVocabs) {
    for (const int top_k : {1, 4, 16}) TestChooseDraft(vocab, top_k);
    TestChooseDraftAtRows(vocab);
    TestSample(vocab);
  }
}

}  // namespace linspec::cuda
