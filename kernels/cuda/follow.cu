// Acceptance and trees on the device: a warp a task, then one block for all of them. Floor: both launches, 2 us each.
#include "kernels/cuda/follow.h"
#include "kernels/cuda/tensor_core.h"

namespace linspec::cuda {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kWarp = 32, kAcceptThreads = 128, kTreesThreads = 1024;

__device__ LinspecCudaSampling Greedy() {
  LinspecCudaSampling greedy = {};
  greedy.top_p = 1.0f;
  return greedy;
}

// The node above, of which all that a node descends from come before it; -1: none.
__device__ int ParentOf(uint64_t ancestors, int node) {
  return 63 - __clzll(static_cast<long long>(ancestors & ~(uint64_t{1} << node)));
}

__global__ void __launch_bounds__(kAcceptThreads)
    AcceptKernel(const StepArrays step, const int32_t* sampled, int num_tasks, uint32_t call, const Accepted out) {
  const int index = static_cast<int>(blockIdx.x * kAcceptThreads + threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  if (index == 0 && lane == 0) *out.call = call;
  if (index >= num_tasks) return;
  Task task = step.tasks[index];
  if (task.slot < 0) {
    if (lane == 0) out.tasks[index] = task, out.rows[index] = {}, out.roots[index] = Greedy();
    return;
  }
  int32_t tokens[2], parents[2], chosen[2];  // of nodes lane and lane + 32
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int node = lane + half * kWarp, row = task.row_begin + node;
    const bool there = node < task.num_rows;
    tokens[half] = there ? step.tokens[row] : -1;
    parents[half] = there ? ParentOf(step.ancestors[row], node) : -1;
    chosen[half] = there ? sampled[row] : -1;
  }
  int node = 0, length = 0, token = -1;
  while (true) {
    if (lane == 0) out.paths[index * kPathStride + length] = node;
    ++length;
    token = __shfl_sync(kAll, node < kWarp ? chosen[0] : chosen[1], node % kWarp);
    const uint32_t low = __ballot_sync(kAll, parents[0] == node && tokens[0] == token);
    const uint32_t high = __ballot_sync(kAll, parents[1] == node && tokens[1] == token);
    if (token < 0 || (low | high) == 0) break;
    node = low != 0 ? __ffs(static_cast<int>(low)) - 1 : kWarp - 1 + __ffs(static_cast<int>(high));
  }
  if (lane != 0) return;
  LinspecCudaSampling root = step.sampling[task.row_begin];
  root.position += length;
  task.path_begin = index * kPathStride;
  task.path_length = length;
  out.tasks[index] = task;
  out.roots[index] = root;
  out.rows[index] = {.seed = root.seed,
                     .position = root.position,
                     .temperature = root.temperature,
                     .coupled = 1,
                     .token = max(token, 0),
                     .hidden_row = task.row_begin + node};
}

// The trees of all tasks, roots first, likelier nodes before less likely ones; [task][most_nodes].
struct Nodes {
  uint64_t* ancestors;
  float* probabilities;
  int32_t* tokens;
  int8_t *parents, *depths;
  static constexpr int kBytes = 8 + 4 + 4 + 1 + 1;  // of a node

  __device__ Nodes(uint8_t* memory, int count)
      : ancestors(reinterpret_cast<uint64_t*>(memory)),
        probabilities(reinterpret_cast<float*>(ancestors + count)),
        tokens(reinterpret_cast<int32_t*>(probabilities + count)),
        parents(reinterpret_cast<int8_t*>(tokens + count)),
        depths(parents + count) {}
  __device__ void Set(int at, int32_t token, float probability, uint64_t ancestors_of, int parent, int depth) const {
    ancestors[at] = ancestors_of;
    probabilities[at] = probability;
    tokens[at] = token;
    parents[at] = static_cast<int8_t>(parent);
    depths[at] = static_cast<int8_t>(depth);
  }
};

// One task's candidates, and the levels that its tree may have.
struct Guesses {
  const LinspecCudaDraftCandidate* first;
  int64_t level_stride;
  int levels, top_k;
  __device__ LinspecCudaDraftCandidate At(int level, int rank) const {
    const bool there = level < levels && rank < top_k;
    return there ? first[level * level_stride + rank] : LinspecCudaDraftCandidate{-1, 0.0f};
  }
};

// A chain of best guesses, and beside each of its nodes the other guesses of its level. By a warp; returns how many
// nodes there are, the root among them. A lane has candidates lane and lane + 32 in order of levels.
__device__ int GrowChain(const Guesses& guesses, int root, int most_nodes, const Nodes& nodes) {
  const int lane = threadIdx.x % kWarp;
  LinspecCudaDraftCandidate own[2];
  float odds[2];  // of the path to it; -1: it is not there
  int ranks[2] = {0, 0}, levels[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int candidate = lane + half * kWarp;
    levels[half] = candidate / guesses.top_k;
    own[half] = guesses.At(levels[half], candidate % guesses.top_k);
    odds[half] = own[half].token >= 0 ? 1.0f : -1.0f;
  }
  for (int level = 0; level < guesses.levels; ++level) {
    const int best = level * guesses.top_k;
    const int token = __shfl_sync(kAll, best < kWarp ? own[0].token : own[1].token, best % kWarp);
    const float probability = __shfl_sync(kAll, best < kWarp ? own[0].probability : own[1].probability, best % kWarp);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (levels[half] <= level) continue;
      odds[half] = token >= 0 ? odds[half] * probability : -1.0f;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (odds[half] >= 0.0f) odds[half] *= own[half].probability;
  }
  const int count = guesses.levels * guesses.top_k;
  for (int other = 0; other < count; ++other) {
    const float its = __shfl_sync(kAll, other < kWarp ? odds[0] : odds[1], other % kWarp);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ranks[half] += its > odds[half] || (its == odds[half] && other < lane + half * kWarp);
    }
  }
  uint64_t above[2] = {1, 1};  // ancestors; the last of the chain so far
  int parents[2] = {0, 0};
  for (int level = 0; level + 1 < guesses.levels; ++level) {
    const int best = level * guesses.top_k;
    const int rank = __shfl_sync(kAll, best < kWarp ? ranks[0] : ranks[1], best % kWarp);
    if (rank + 1 >= most_nodes) break;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (levels[half] <= level) continue;
      above[half] |= uint64_t{2} << rank;
      parents[half] = rank + 1;
    }
  }
  int grown = 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool taken = odds[half] >= 0.0f && ranks[half] + 1 < most_nodes;
    const int node = ranks[half] + 1;
    if (taken) {
      nodes.Set(root + node, own[half].token, odds[half], above[half] | uint64_t{1} << node, parents[half],
                levels[half] + 1);
    }
    grown += __popc(__ballot_sync(kAll, taken));
  }
  return grown;
}

// Guesses of a level below every node of the level before: best first, whoever is taken offers its first child and its
// next sibling. By a warp, a lane an offer.
__device__ int GrowBestFirst(const Guesses& guesses, int root, int most_nodes, const Nodes& nodes) {
  const int lane = threadIdx.x % kWarp;
  struct Offer {
    float probability = -1.0f;  // of the path; none
    int32_t token = -1;
    int parent = 0, rank = 0, depth = 0;
  } own;
  const auto offer = [&](int parent, float path, int rank, int depth) {
    const LinspecCudaDraftCandidate guess = guesses.At(depth - 1, rank);
    own = {};
    if (guess.token >= 0) own = {path * guess.probability, guess.token, parent, rank, depth};
  };
  if (lane == 0) offer(0, 1.0f, 0, 1);
  int grown = 1;
  for (; grown < most_nodes; ++grown) {
    // The likeliest; of equal ones the one less deep, then the one of lower rank.
    const uint32_t order =
        own.probability < 0.0f ? 0 : ~static_cast<uint32_t>(own.depth * LINSPEC_CUDA_MAX_DRAFT_CANDIDATES + own.rank);
    uint64_t key = own.probability < 0.0f ? 0 : uint64_t{__float_as_uint(own.probability) + 1} << 32 | order;
    uint64_t best = key;
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const uint64_t other = __shfl_xor_sync(kAll, best, step);
      best = other > best ? other : best;
    }
    if (best == 0) break;
    const int winner = __ffs(static_cast<int>(__ballot_sync(kAll, key == best))) - 1;
    const float path = __shfl_sync(kAll, own.probability, winner);
    const int depth = __shfl_sync(kAll, own.depth, winner);
    if (lane == winner) {
      nodes.Set(root + grown, own.token, path, nodes.ancestors[root + own.parent] | uint64_t{1} << grown, own.parent,
                own.depth);
      offer(own.parent, own.parent == 0 ? 1.0f : nodes.probabilities[root + own.parent], own.rank + 1, own.depth);
    }
    __syncwarp();
    if (lane == grown) offer(grown, path, 0, depth + 1);
  }
  return grown;
}

struct TreesBlock {
  const TreesParams& p;
  const Nodes nodes;
  int *const grown, *const rows, *const begins;  // [num_tasks] nodes there are, rows of them that are taken, first row

  __device__ void Grow() const {
    for (int t = threadIdx.x / kWarp; t < p.num_tasks; t += kTreesThreads / kWarp) {
      const Task task = p.accepted.tasks[t];
      const int root = t * p.most_nodes;
      int count = 0;
      if (task.slot >= 0) {
        if (threadIdx.x % kWarp == 0) nodes.Set(root, p.accepted.rows[t].token, 1.0f, 1, -1, 0);
        __syncwarp();
        const auto deepest = static_cast<int>(p.group_size - 1 - (task.length + task.path_length) % p.group_size);
        const Guesses guesses{.first = p.candidates + t * p.top_k,
                              .level_stride = int64_t{p.row_stride} * p.top_k,
                              .levels = min(p.num_levels, deepest),
                              .top_k = p.top_k};
        count =
            p.chain ? GrowChain(guesses, root, p.most_nodes, nodes) : GrowBestFirst(guesses, root, p.most_nodes, nodes);
      }
      if (threadIdx.x % kWarp == 0) grown[t] = count, rows[t] = count > 0;
    }
  }

  // Nodes of a task, its root not counted, that come before node `node` of task `of`.
  __device__ int Before(int task, int of, int node) const {
    if (task == of) return node - 1;
    const float odds = nodes.probabilities[of * p.most_nodes + node];
    int first = 1, end = grown[task];  // the first that does not is in [first, end]
    while (first < end) {
      const int middle = (first + end) / 2;
      const float its = nodes.probabilities[task * p.most_nodes + middle];
      if (its > odds || (its == odds && task < of)) {
        first = middle + 1;
      } else {
        end = middle;
      }
    }
    return first - 1;
  }

  // Rows for the likeliest nodes. A tree's nodes fall in likelihood, so what is taken is its beginning.
  __device__ void Share() const {
    int roots = 0;
    for (int t = 0; t < p.num_tasks; ++t) roots += grown[t] > 0;
    const int others = p.most_rows - roots;
    for (int i = threadIdx.x; i < p.num_tasks * p.most_nodes; i += kTreesThreads) {
      const int task = i / p.most_nodes, node = i % p.most_nodes;
      if (node == 0 || node >= grown[task]) continue;
      int before = 0;
      for (int t = 0; t < p.num_tasks && before < others; ++t) before += grown[t] > 0 ? Before(t, task, node) : 0;
      if (before < others) atomicMax(&rows[task], node + 1);
    }
  }

  __device__ void Write() const {
    int all = 0;
    for (int t = 0; t < p.num_tasks; ++t) all += rows[t];
    for (int t = threadIdx.x; t < p.num_tasks; t += kTreesThreads) {
      int begin = 0;
      for (int other = 0; other < t; ++other) begin += rows[other];
      begins[t] = begin;
      const Task accepted = p.accepted.tasks[t];
      Task task = {.length = 0, .slot = -1, .row_begin = 0, .num_rows = 0, .path_begin = 0, .path_length = 0};
      if (accepted.slot >= 0) {
        task.length = accepted.length + accepted.path_length;
        task.slot = accepted.slot;
        task.row_begin = begin;
        task.num_rows = rows[t];
      }
      p.step.tasks[t] = task;
      task.out_shift = grown[t];
      p.made_tasks[t] = task;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < p.num_tasks * p.most_nodes; i += kTreesThreads) {
      const int task = i / p.most_nodes, node = i % p.most_nodes;
      if (node < grown[task]) {
        p.made_nodes[task * LINSPEC_CUDA_MAX_FOLLOW_NODES + node] = {nodes.tokens[i], nodes.parents[i],
                                                                     nodes.probabilities[i]};
      }
      if (node < rows[task]) WriteRow(task, node, i);
    }
    for (int row = all + static_cast<int>(threadIdx.x); row < p.num_rows; row += kTreesThreads) {
      p.step.tokens[row] = 0;
      p.step.positions[row] = 0;
      p.step.ancestors[row] = 1;
      p.step.sampling[row] = Greedy();
    }
    if (threadIdx.x == 0) *p.step_edits = p.edits;
  }

  __device__ void WriteRow(int task, int node, int at) const {
    const int row = begins[task] + node, depth = nodes.depths[at];
    const Task& accepted = p.accepted.tasks[task];
    LinspecCudaSampling sampling = p.accepted.roots[task];
    sampling.position += depth;
    p.step.tokens[row] = nodes.tokens[at];
    p.step.positions[row] = accepted.length + accepted.path_length + depth;
    p.step.ancestors[row] = nodes.ancestors[at];
    p.step.sampling[row] = sampling;
  }
};

__global__ void __launch_bounds__(kTreesThreads) TreesKernel(const TreesParams p) {
  extern __shared__ __align__(8) uint8_t shared[];
  const int count = p.num_tasks * p.most_nodes;
  int* const lists = reinterpret_cast<int*>(shared + (count * Nodes::kBytes + 3) / 4 * 4);
  const TreesBlock block{p, Nodes(shared, count), lists, lists + p.num_tasks, lists + 2 * p.num_tasks};
  block.Grow();
  __syncthreads();
  block.Share();
  __syncthreads();
  block.Write();
}

}  // namespace

void LaunchAccept(const StepArrays& step, const int32_t* sampled, int num_tasks, uint32_t call, const Accepted& out,
                  cudaStream_t stream) {
  const int blocks = (num_tasks * kWarp + kAcceptThreads - 1) / kAcceptThreads;
  AcceptKernel<<<blocks, kAcceptThreads, 0, stream>>>(step, sampled, num_tasks, call, out);
}

void LaunchTrees(const TreesParams& params, cudaStream_t stream) {
  constexpr int kMostNodes = LINSPEC_CUDA_MAX_FOLLOW_TASKS * LINSPEC_CUDA_MAX_FOLLOW_NODES;
  static_assert(kMostNodes * Nodes::kBytes + 4 + 3 * 4 * LINSPEC_CUDA_MAX_FOLLOW_TASKS <= 48 << 10);
  const int bytes = (params.num_tasks * params.most_nodes * Nodes::kBytes + 3) / 4 * 4 +
                    3 * params.num_tasks * static_cast<int>(sizeof(int));
  TreesKernel<<<1, kTreesThreads, bytes, stream>>>(params);
}

}  // namespace linspec::cuda
