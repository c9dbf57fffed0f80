// The C ABI between the server and liblinspec_cuda.so, which alone holds CUDA code. Plain data only; loaded by dlopen.
//
// Every function returns a LinspecCudaCode; last_error(context) says more. After kLinspecCudaDeviceError the context is
// poisoned: every later call returns the same code, and the process must make a new context or stop. Work is queued on
// the context's stream in call order; only verify_finish, draft, draft_chains, download and measure wait for it.
// Threads: one at a time per context. Pointers marked "host" are read before the function returns.
#pragma once

#include <stdint.h>

#define LINSPEC_CUDA_ABI_VERSION 6
#define LINSPEC_CUDA_ENTRY "linspec_cuda_api"

#ifdef __cplusplus
extern "C" {
#endif

enum LinspecCudaCode {
  kLinspecCudaOk = 0,
  kLinspecCudaNoDevice = 1,     // no driver, no GPU, or one that the plugin holds no code for
  kLinspecCudaOutOfMemory = 2,  // the context stays usable
  kLinspecCudaDeviceError = 3,  // poisoned
  kLinspecCudaUnsupported = 4,  // a shape or type without a kernel
  kLinspecCudaInvalid = 5,      // an argument breaks the contract
};

enum LinspecCudaType {
  kLinspecCudaF32 = 0,
  kLinspecCudaF16 = 1,
  kLinspecCudaBf16 = 2,
  kLinspecCudaI8 = 3,   // with one fp32 scale per row; in a matrix that was packed, columns in an order of its own
  kLinspecCudaFp8 = 4,  // e4m3, likewise
};

typedef struct LinspecCudaContext LinspecCudaContext;
typedef struct LinspecCudaModel LinspecCudaModel;
typedef struct LinspecCudaDrafter LinspecCudaDrafter;

typedef struct LinspecCudaMatrix {  // row-major, device memory
  const void* data;
  const float* scales;  // [rows] or null
  int64_t rows, cols;
  int32_t type;  // LinspecCudaType
  int32_t reserved;
} LinspecCudaMatrix;

typedef struct LinspecCudaDeviceInfo {
  char name[128];
  char cublas[512];  // the library for large products, or why there is none: own kernels then
  int64_t total_bytes, free_bytes;
  int32_t major, minor, num_sms, has_cublas;
} LinspecCudaDeviceInfo;

typedef struct LinspecCudaCeilings {  // measured when asked, about 0.2 s
  double read_bytes_per_s;            // device memory, a plain sum over 2 GiB
  double bf16_flops_per_s;            // 8192^3 product through cuBLASLt; 0 where it is not there
} LinspecCudaCeilings;

// Rows of a matrix that is being filled: row i of the source is row_begin + i, or with interleave
// row_begin + i / 8 * 16 + i % 8 (gate and up rows in turn, as launch.h wants them).
typedef struct LinspecCudaSource {
  const void* data;     // host, row-major in `type`; null: random, see below
  const float* scales;  // host [rows] for kLinspecCudaI8
  int64_t rows, cols, row_begin;
  int32_t type;
  int32_t interleave;
  // data == null: element i is center + spread * u(i), u uniform in [-1, 1): Philox4x32-10 with the counter
  // (i / 4, stream) and the key seed, word i % 4 (kernels/philox.h, models/random_weights.cc).
  uint64_t seed, stream;
  float center, spread;
} LinspecCudaSource;

typedef struct LinspecCudaShape {
  int64_t hidden_size, intermediate_size, vocab_size;
  int32_t num_layers, num_heads, num_kv_heads, head_dim, group_size, conv_kernel, local, global;
  float rms_norm_eps, rope_theta, qk_norm_eps, global_norm_eps;
  int32_t state_type;  // kLinspecCudaF32 or kLinspecCudaBf16, of S and rings
  int32_t reserved;
} LinspecCudaShape;

typedef struct LinspecCudaLayer {  // device pointers; null where the shape has no such branch
  const float *attention_norm, *mlp_norm, *global_gain, *decay, *conv_taps;
  LinspecCudaMatrix qkv, o, gate_up, down;
  float global_factor;
  int32_t reserved;
} LinspecCudaLayer;

typedef struct LinspecCudaWeights {
  LinspecCudaMatrix embedding, lm_head;
  const float* final_norm;
  const LinspecCudaLayer* layers;  // host [num_layers]
} LinspecCudaWeights;

typedef struct LinspecCudaTask {  // host; the layout of linspec::cuda::Task
  int64_t length;                 // tokens committed to the slot
  int32_t slot, row_begin, num_rows, path_begin, path_length, reserved;
} LinspecCudaTask;

typedef struct LinspecCudaStates {  // device memory of all slots: [slot][layer][S | ring_k | ring_v] in the state type
  void* base;
  int64_t bytes_per_slot, bytes_per_layer;
} LinspecCudaStates;

// logit = (logit + bias), divided by repetition where positive and multiplied where negative, less subtract: the order
// of models/sampler.h. subtract = +inf bans the token.
typedef struct LinspecCudaLogitEdit {
  int32_t token;
  float bias, repetition, subtract;
} LinspecCudaLogitEdit;

// How the token after a row is chosen: the contract of models/sampler.h, less typical_p and logprobs.
typedef struct LinspecCudaSampling {
  uint64_t seed;
  int64_t position;                         // of the token to choose
  float temperature, top_p, min_p;          // temperature 0: argmax
  int32_t top_k, edits_begin, edits_count;  // edits: into LinspecCudaStep::edits, each token once
} LinspecCudaSampling;

typedef struct LinspecCudaStep {  // host arrays
  LinspecCudaStates states;
  const LinspecCudaTask* tasks;  // [num_tasks]
  const int32_t* tokens;         // [num_rows]
  const int64_t* positions;      // [num_rows]
  const uint64_t* ancestors;     // [num_rows] bit j: node j of the request is the row or above it; null in prefill
  const LinspecCudaSampling* sampling;  // [num_rows], or null: nothing is chosen
  const LinspecCudaLogitEdit* edits;    // [num_edits]
  int32_t num_tasks, num_rows, num_edits;
  int32_t want_logits, want_hidden;
} LinspecCudaStep;

typedef struct LinspecCudaStepSize {  // the largest steps that a model has to have memory for
  int32_t verify_rows, prefill_rows;
  int64_t prefill_groups;  // that the tasks of a prefill touch
} LinspecCudaStepSize;

typedef struct LinspecCudaTreeNode {
  int32_t token, parent;  // parent: of the same tree; -1: none
  float probability;      // of the path to it, as the draft heads see it
} LinspecCudaTreeNode;

typedef struct LinspecCudaVerifyResult {  // host memory of the model, valid until another step is started
  const int32_t* sampled;                 // [num_rows]; -1: no token can be chosen. null without sampling
  const float* logits;                    // [num_rows, V] after the edits, or null
  const float* hidden;                    // [num_rows, D] after the final norm, or null
  // Of a step of verify_follow, else null: [num_tasks] lengths that acceptance gave, and rows; in `reserved` how many
  // nodes were drafted; [num_tasks][LINSPEC_CUDA_MAX_FOLLOW_NODES] these, likelier ones first: num_rows were verified.
  const LinspecCudaTask* tasks;
  const LinspecCudaTreeNode* nodes;
  float verify_ms, prefill_ms;  // device time of this step, and of the prefills since the verify before it
} LinspecCudaVerifyResult;

// Draft heads beside a target model, whose embedding and unembedding they use and whose hidden states they start from.
// All pointers are device memory and outlive the drafter.

// A recurrent head, its state s [D] beginning with the target's hidden state; token x_1 is the root of the draft:
//   u = [RMSNorm(s; state_norm), RMSNorm(E[x_i]; token_norm)],  s += down (silu(gate u) * (up u)),  logits = unembed s
typedef struct LinspecCudaRecurrentHead {
  const float *state_norm, *token_norm;  // [D]
  LinspecCudaMatrix gate_up;             // [2 M, 2 D], interleaved as for a layer
  LinspecCudaMatrix down;                // [D, M]
  float rms_norm_eps;
  int32_t reserved;
} LinspecCudaRecurrentHead;

typedef struct LinspecCudaMedusaBlock {  // x += silu(weight x + bias)
  LinspecCudaMatrix weight;              // [D, D]
  const float* bias;                     // [D]
} LinspecCudaMedusaBlock;
typedef struct LinspecCudaMedusaHeads {
  const LinspecCudaMedusaBlock* blocks;   // host [num_heads][num_blocks]
  const LinspecCudaMatrix* unembeddings;  // host [num_heads] of [V, D], or null: the target's
  int32_t num_heads, num_blocks;
} LinspecCudaMedusaHeads;

typedef struct LinspecCudaDraftRow {  // one request
  uint64_t seed;
  int64_t position;  // of the token that level 0 guesses; level n guesses the one n further
  float temperature;
  int32_t coupled;     // guesses by the target's noise (models/draft_candidates.h)
  int32_t token;       // the pending one, root of the draft
  int32_t hidden_row;  // of the target's last verify: the hidden state that the pending token was chosen from
} LinspecCudaDraftRow;

// The trees of a step that the device makes itself.
typedef struct LinspecCudaFollow {
  int32_t num_levels, top_k;  // that the heads guess; their product is at most LINSPEC_CUDA_MAX_FOLLOW_CANDIDATES
  int32_t num_rows;           // of all trees, at least one each
  int32_t max_nodes;          // of a tree, 2 to LINSPEC_CUDA_MAX_FOLLOW_NODES
} LinspecCudaFollow;

#define LINSPEC_CUDA_MAX_FOLLOW_TASKS 128
#define LINSPEC_CUDA_MAX_FOLLOW_NODES 16
#define LINSPEC_CUDA_MAX_FOLLOW_CANDIDATES 64

#define LINSPEC_CUDA_MAX_DRAFT_CANDIDATES 16
#define LINSPEC_CUDA_MAX_DRAFT_LEVELS 16  // of a recurrent head

typedef struct LinspecCudaDraftCandidate {
  int32_t token;      // -1: there are no more
  float probability;  // that the target chooses it, as models/draft_candidates.h estimates it
} LinspecCudaDraftCandidate;

typedef struct LinspecCudaDraftStep {
  const LinspecCudaDraftRow* rows;  // host [num_rows]
  int32_t num_rows, num_levels, top_k;
} LinspecCudaDraftStep;

// A draft model's chains: after the known tokens of each task, num_levels tokens that it chooses itself, each the best
// candidate of the level before. Nothing is written to the states. Commit then takes the same tasks and reads their
// rows in order: those of task r begin after the num_rows + num_levels - 1 rows of each task before it (the last token
// chosen was never looked at).
typedef struct LinspecCudaChainStep {
  LinspecCudaStates states;
  const LinspecCudaTask*
      tasks;              // host [num_tasks]; of it length, slot and num_rows: known tokens, the pending one last
  const int32_t* tokens;  // host [sum of num_rows]
  const LinspecCudaDraftRow* rows;  // host [num_tasks]; of it seed, position, temperature and coupled
  int32_t num_tasks, num_levels, top_k, reserved;
} LinspecCudaChainStep;

typedef struct LinspecCudaDraftResult {         // host memory of the drafter, valid until its next draft
  const LinspecCudaDraftCandidate* candidates;  // [num_levels][row_stride][top_k], best first
  int32_t row_stride, reserved;
} LinspecCudaDraftResult;

typedef struct LinspecCudaApi {
  uint32_t abi_version, size;
  int32_t (*create)(int32_t device, LinspecCudaContext** context);
  void (*destroy)(LinspecCudaContext*);
  const char* (*last_error)(LinspecCudaContext*);  // null context: why create failed
  int32_t (*device_info)(LinspecCudaContext*, LinspecCudaDeviceInfo*);
  int32_t (*measure)(LinspecCudaContext*, LinspecCudaCeilings*);

  int32_t (*alloc)(LinspecCudaContext*, int64_t bytes, void** device);
  int32_t (*release)(LinspecCudaContext*, void* device);
  int32_t (*zero)(LinspecCudaContext*, void* device, int64_t bytes);
  int32_t (*copy)(LinspecCudaContext*, void* to, const void* from, int64_t bytes);  // device to device
  int32_t (*upload)(LinspecCudaContext*, void* device, const void* host, int64_t bytes);
  int32_t (*download)(LinspecCudaContext*, void* host, const void* device, int64_t bytes);
  // Converts a source to matrix->type (bf16, i8, fp8; f32 and f16 as they are) and stores it; narrower types get one
  // scale per row, from the largest magnitude. The matrix' memory is the caller's.
  int32_t (*pack)(LinspecCudaContext*, const LinspecCudaSource*, const LinspecCudaMatrix* matrix);

  // deterministic: no row's bits depend on the number of rows beside it, at any number.
  int32_t (*create_model)(LinspecCudaContext*, const LinspecCudaShape*, const LinspecCudaWeights*,
                          int32_t deterministic, LinspecCudaModel**);
  void (*destroy_model)(LinspecCudaModel*);
  // Device memory that steps of up to this size take beyond what the model holds; and taking it, so that none of them
  // can run out. Larger steps take more when they come.
  int32_t (*scratch_bytes)(LinspecCudaModel*, const LinspecCudaStepSize*, int64_t* bytes);
  int32_t (*reserve)(LinspecCudaModel*, const LinspecCudaStepSize*);
  int32_t (*prefill)(LinspecCudaModel*, const LinspecCudaStep*);
  int32_t (*verify_start)(LinspecCudaModel*, const LinspecCudaStep*);
  // While one step is started and not finished, of one row a task, each with a slot of its own, with sampling and
  // without logits and hidden states: commits its rows, and starts what follows, in which every row is the token that
  // is chosen after it (0 where none can be), at the next position. Nothing is uploaded and nothing waited for; no
  // other call but verify_finish may come before both are finished, or, after the first, verify_next again.
  int32_t (*verify_next)(LinspecCudaModel*);
  // Likewise, for any trees with sampling and without logits, of at most LINSPEC_CUDA_MAX_FOLLOW_TASKS tasks: walks
  // each tree along the tokens that were chosen, commits what that accepts, drafts behind it with heads of this model,
  // and starts a step of the trees that come of it, whose tasks and rows its result tells. All rows of a task are
  // chosen like its first row was, by the same edits. A tree ends with the slot's open group. May be followed again.
  int32_t (*verify_follow)(LinspecCudaModel*, LinspecCudaDrafter*, const LinspecCudaFollow*);
  // Of the step that was started first.
  int32_t (*verify_finish)(LinspecCudaModel*, LinspecCudaVerifyResult*);
  // tasks as given to the last verify, with paths filled in; reads the k and v which that verify kept.
  int32_t (*commit)(LinspecCudaModel*, const LinspecCudaStates*, const LinspecCudaTask* tasks, int32_t num_tasks,
                    const int32_t* paths, int32_t num_paths);
  // logits [rows, V] = lm_head * hidden [rows, D], both host: Medusa heads share the unembedding.
  int32_t (*unembed)(LinspecCudaModel*, const float* hidden, int32_t rows, float* logits);

  // Drafters end before their target.
  int32_t (*create_recurrent_drafter)(LinspecCudaModel* target, const LinspecCudaRecurrentHead*, LinspecCudaDrafter**);
  int32_t (*create_medusa_drafter)(LinspecCudaModel* target, const LinspecCudaMedusaHeads*, LinspecCudaDrafter**);
  void (*destroy_drafter)(LinspecCudaDrafter*);
  // Guesses for all rows and levels in one launch. A recurrent head follows its best guess from level to level; the
  // guesses of Medusa heads do not depend on each other. Not between verify_start and verify_finish of the target.
  int32_t (*draft)(LinspecCudaDrafter*, const LinspecCudaDraftStep*, LinspecCudaDraftResult*);
  // All levels of all chains in one launch; not between verify_start and verify_finish of the same model.
  int32_t (*draft_chains)(LinspecCudaModel* draft, const LinspecCudaChainStep*, LinspecCudaDraftResult*);
} LinspecCudaApi;

// Null if the plugin does not speak abi_version.
typedef const LinspecCudaApi* (*LinspecCudaEntry)(uint32_t abi_version);

#ifdef __cplusplus
}
#endif
