// Decides how many tree nodes each decoding request may draft in a step, so that expected tokens per second are
// highest, and none at all when drafting does not pay.
//
// It knows three things, all measured: what a verify step costs (per row and per request), what a drafter costs (per
// level of its trees, and per token it has to catch up on), and how deep drafts are accepted (per drafter and depth; a
// request's own record, leaning on everybody's while it is short). What is not in use is tried again now and then, with
// at most one percent of the time.
//
// Threads: engine thread only. No clock: times come in as arguments, so tests are exact.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace linspec {

inline constexpr int kMaxTrackedDepth = 16;
inline constexpr int kAnyDrafter = -1;

// Seconds of one verify step, sampled at powers of two of its rows.
class StepCosts {
 public:
  void Calibrate(int rows, double seconds);  // one request
  void CalibratePerRequest(double seconds) { per_request_ = seconds; }
  void Observe(int rows, int requests, double seconds);
  double Estimate(double rows, int requests) const;  // 0 while nothing is known
  bool known() const { return known_ > 0; }

 private:
  static constexpr int kBuckets = 11;  // 1 .. 1024 rows
  double RowCost(double rows) const;
  std::array<double, kBuckets> seconds_{};
  int known_ = 0;  // buckets [0, known_) are filled
  double per_request_ = 0;
};

// What drafting costs: levels are run one after the other, each over all contexts at once.
class DraftCosts {
 public:
  void Observe(int contexts, int levels, int64_t catch_up_tokens, double seconds);
  double PerLevel(int contexts) const;
  double PerCatchUpToken() const { return per_token_; }

 private:
  static constexpr int kBuckets = 11;
  std::array<double, kBuckets> per_level_{};  // [log2 contexts], 0: unknown
  double per_token_ = 0;
};

struct SpeculationRequest {
  uint64_t sequence_id = 0;
  int max_nodes = 1;                     // root included
  int drafter = kAnyDrafter;             // or the only one it may use
  std::vector<int64_t> catch_up_tokens;  // [num_drafters] tokens of the sequence the drafter has not seen
  int64_t tokens_left = 0;               // output tokens it may still produce
};

struct SpeculationChoice {
  int drafter = 0;
  int nodes = 1;  // 1: do not draft
};

class SpeculationController {
 public:
  explicit SpeculationController(int num_drafters) : drafters_(num_drafters), credit_(num_drafters, 0.0) {}

  StepCosts& step_costs() { return step_costs_; }
  DraftCosts& draft_costs(int drafter) { return drafters_[drafter].costs; }

  // One choice per request. max_draft_rows bounds the nodes of all trees, roots not counted.
  std::vector<SpeculationChoice> Choose(std::span<const SpeculationRequest> requests, int max_draft_rows);

  // A request asked for `asked` nodes and got a tree of `nodes` and `depth`, of which `accepted` levels held. rejected:
  // the walk left the tree (false when the request ended inside it).
  struct Outcome {
    uint64_t sequence_id;
    int drafter, asked, nodes, depth, accepted;
    bool rejected;
  };
  void Observe(const Outcome& outcome);
  void Forget(uint64_t sequence_id) { sequences_.erase(sequence_id); }

 private:
  // Decaying counts of tries and hits.
  struct Rate {
    double tries = 0, hits = 0;
    void Add(bool hit, double decay);
    double Mean(double prior, double strength) const { return (hits + prior * strength) / (tries + strength); }
  };
  struct Record {
    Rate drafted;                              // asked -> got more than the root
    std::array<Rate, kMaxTrackedDepth> depth;  // [d] reached depth d -> depth d + 1 accepted
  };
  struct DrafterState {
    DraftCosts costs;
    Record record;
    double depth_per_node = 1, nodes_per_node = 1;  // of trees, per node asked for beyond the root
  };
  struct NodeStep {  // one node more for one request
    int request;
    double tokens;  // expected to come of it
  };
  struct DraftLoad {  // what one drafter is asked for in one step
    int contexts = 0;
    double levels = 0, catch_up_s = 0;
  };
  struct Allocation {
    std::vector<SpeculationChoice> choices;
    double tokens_per_s = 0;
  };

  std::vector<double> NodeGains(const SpeculationRequest& request, int drafter) const;
  Allocation Allocate(std::span<const SpeculationRequest> requests, int any_drafter, int max_draft_rows) const;
  double CatchUpCost(const SpeculationRequest& request, int drafter) const;
  void AddNode(const SpeculationRequest& request, SpeculationChoice* choice, DraftLoad* load) const;
  void Probe(std::span<const SpeculationRequest> requests, int drafter, std::vector<SpeculationChoice>* choices);

  StepCosts step_costs_;
  std::vector<DrafterState> drafters_;
  std::vector<double> credit_;  // [drafter] seconds it may spend on being tried
  int probe_turn_ = 0;
  std::unordered_map<uint64_t, std::vector<Record>> sequences_;
};

}  // namespace linspec
