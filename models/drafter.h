// Proposes token trees. Whatever a drafter returns changes speed only: acceptance keeps the output exact.
//
// Threads: engine thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "models/draft_tree.h"
#include "models/sampling_params.h"

namespace linspec {

// How a drafter picks the tokens of a sampled request.
enum class DraftDraw : uint8_t {
  kCoupled,      // with the target's noise, so that both tend to pick the same
  kIndependent,  // for rejection sampling: drawn with NoiseStream::kDraft from DraftTree::distributions, or no noise
  kLikeliest,    // the likeliest tokens, without noise
};

// View of one decoding sequence. tokens = prompt and output, the pending token last (it is not in the target's state).
struct DraftContext {
  uint64_t sequence_id;  // stable for the sequence's life
  std::span<const int32_t> tokens;
  int64_t num_prompt_tokens;
  const SamplingParams* sampling;
  std::span<const float> hidden;    // [D] target's hidden state at the last committed token; empty if unknown
  int hidden_row = -1;              // the row of the target's last Verify that has it; -1: none
  int max_nodes;                    // root included; 1 means "do not draft"
  int max_levels = kMaxTreeNodes;   // of the tree below the root that are computed
  float min_probability = 0;        // paths that the drafter holds less likely are not worth verifying
  float min_level_probability = 0;  // nor are those worth verifying and, before that, computing a level for
  DraftDraw draw = DraftDraw::kCoupled;
};

class DraftGuesser;

// What makes a drafter's trees, for a model that makes such trees itself.
struct DraftHeads {
  DraftGuesser* heads = nullptr;
  int num_levels = 0, top_k = 0;  // to ask for
};

class Drafter {
 public:
  virtual ~Drafter() = default;
  virtual std::string_view name() const = 0;  // "draft", "medusa", "recurrent", "ngram"
  // One tree per context, root = its pending token; a one-node tree is "no draft".
  virtual absl::StatusOr<std::vector<DraftTree>> Propose(std::span<const DraftContext> contexts) = 0;
  // Levels that the last Propose computed, where they can be more than its trees are deep.
  virtual int levels_computed() const { return 0; }
  virtual void Forget(uint64_t sequence_id) = 0;  // the sequence ended: free what was kept for it
  virtual int64_t bytes_per_request() const { return 0; }
  // Has to read a sequence's tokens before it can draft for it.
  virtual bool catches_up() const { return false; }
  // Uses DraftContext::hidden. The engine asks the target for it only when a drafter does.
  virtual bool reads_hidden() const { return false; }
  // A model drafted with them itself; the deepest tree that was verified is so deep.
  virtual void NoteDepth(int /*depth*/) {}
  virtual DraftHeads heads() const { return {}; }       // null: there are none, or its trees are of another kind
  virtual bool costs_nothing() const { return false; }  // beside a verify step: may be asked for drafts that go unused
};

}  // namespace linspec
