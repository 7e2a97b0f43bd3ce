// The native executor of a program: the whole list of op records as one call per step.
#pragma once

#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "adapters.hpp"
#include "attention_plan.hpp"
#include "batch.hpp"
#include "isa.hpp"
#include "kernels.hpp"
#include "kv.hpp"
#include "kv_store.hpp"
#include "linear.hpp"
#include "memory.hpp"
#include "pack.hpp"
#include "pool.hpp"
#include "rows.hpp"
#include "sampler.hpp"
#include "tail.hpp"
#include "weight.hpp"

namespace tokenloom {

inline int64_t item_bytes(Dtype dtype) { return dtype == Dtype::bf16 ? 2 : 4; }

// One array per buffer of the program; rows are padded so that vector loads past the width stay inside.
struct Activation {
    int64_t width;
    int64_t stride;  // elements
    Dtype dtype;
    Memory memory;

    int64_t row_bytes() const { return stride * item_bytes(dtype); }
    float* f32() { return reinterpret_cast<float*>(memory.data()); }
};

using Vector = std::shared_ptr<const std::vector<float>>;
using Order = std::shared_ptr<const std::vector<int32_t>>;
using Weight = std::shared_ptr<const PackedWeight>;

struct EmbedOp {
    Weight packed;                // a table that is also the head, or
    std::vector<uint8_t> table;   // rows as stored
    TableDtype dtype;
    int64_t vocab;
    int out;
    float scale;
};
struct PositionsOp {
    Vector table;  // [positions, width]
    int64_t offset;
    int out;
};
struct CastOp {
    int source, add, out;  // add -1: none
};
struct LayerNormOp {
    int source, out;
    Vector weight, bias;
    float epsilon;
};
struct NormOp {
    int source, add, out;  // add -1: none
    Vector weight;
    float epsilon;
};
struct LinearOp {
    int source, out;
    Weight weight;
    Vector bias;
    Epilogue epilogue;
    float scale;
    int64_t product = 0;  // its number among the ops, by which adapters know it
    bool in_tail = false;
};
struct GatherOp {
    int source, out;
    Order order;
};
struct RopeOp {
    int source, out;
    int layer, num_heads, rotary_dim;
    Vector q_norm, k_norm;
    float epsilon;
    int table;
};
struct AttentionOp {
    int source, out, plan;
    bool in_tail;
    AttentionShape shape;
};
struct RouteOp {
    int source, out;
    int64_t top_k;
    bool normalized;
};
struct ExpertsOp {
    int source, routes, out;
    std::vector<Weight> gate_up, down;  // of each expert, all alike
    Epilogue epilogue;
    int64_t top_k, hidden;

    int64_t hidden_stride() const { return (hidden + 63) / 64 * 64; }
};
using Op = std::variant<EmbedOp, NormOp, LinearOp, RopeOp, AttentionOp, PositionsOp, CastOp, LayerNormOp, RouteOp,
                        ExpertsOp, GatherOp>;

// Entries of a step that want a token or a score, and where their results go.
struct Entries {
    int64_t count = 0;
    const int32_t* rows = nullptr;
    std::vector<SampleEntry> samples;
    std::vector<EditsView> edits;
    std::vector<SampleResult> results;
    // Where not null, the candidates of each entry are wanted instead, kMaxCandidates apart, and how many there are.
    Candidate* candidates = nullptr;
    int32_t* num_candidates = nullptr;
};

// Rows of a step (distinct, rising) of which what the head reads is wanted, and not the logits.
struct HiddenRows {
    int64_t count = 0;
    const int32_t* rows = nullptr;
    float* out = nullptr;  // [count, width of what the head reads]
};

class Model {
  public:
    // `activations` is the type of "activation" buffers.
    Model(std::shared_ptr<ThreadPool> pool, Isa isa, Dtype activations);

    // --- building; each throws std::invalid_argument for what does not fit ---
    int add_buffer(int64_t width, bool activation);
    // `frames_of`: a model of which this one cuts the very frames into pages of its own, or null.
    void set_kv(KVFormat format, int layers, int heads, int dim, int64_t frames, int64_t frame_bytes,
                int64_t pages_per_frame, const Model* frames_of = nullptr);
    // [tables * positions, half]
    void set_rope(std::vector<float> cos, std::vector<float> sin, int64_t positions, int64_t half, int64_t tables);
    void add_embed_packed(Weight weight, int out, float scale);
    void add_embed_table(std::vector<uint8_t> table, TableDtype dtype, int64_t vocab, int out, float scale);
    void add_positions(Vector table, int64_t offset, int out);
    void add_cast(int source, int add, int out);
    void add_layer_norm(int source, Vector weight, Vector bias, int out, float epsilon);
    void add_norm(int source, int add, Vector weight, int out, float epsilon);
    void add_linear(int source, Weight weight, int out, Vector bias, Epilogue epilogue, float scale);
    void add_gather(int source, Order order, int out);
    void add_rope(int source, int out, int layer, int num_heads, int rotary_dim, Vector q_norm, Vector k_norm,
                  float epsilon, int table);
    void add_attention(int source, int out, int layer, int num_heads, float scale, int window, float softcap);
    void add_route(int source, int out, int64_t top_k, bool normalized);
    void add_experts(int source, int routes, int out, std::vector<Weight> gate_up, std::vector<Weight> down,
                     Epilogue epilogue);
    void set_head(int source, Weight weight, float softcap, float divisor);
    // After this, `step` may be called. Throws if parts are missing.
    void finish();

    // --- the KV pool between steps ---
    // See kv_store.hpp. Throws std::invalid_argument for a slot outside the pool, before anything is copied.
    void move_slots(const int64_t* moves, int64_t count);
    // Zeroes pages. Throws std::invalid_argument for a page outside the pool, before anything is written.
    void clear_kv_pages(const int32_t* pages, int64_t count);

    // --- adapters; not during a step ---
    // Pages of `page_bytes` bytes, a whole number of them to a frame of the pool.
    void write_pages(const int32_t* pages, int64_t count, int64_t page_bytes, const uint8_t* data);
    void clear_pages(const int32_t* pages, int64_t count, int64_t page_bytes);
    // Offsets count from the start of the first page as if the pages were one run. Throws std::invalid_argument for
    // what does not fit the model or crosses the end of a page.
    struct AdapterLayout {
        std::vector<BlockShape> blocks;
        std::vector<int64_t> a, b;
        int64_t embedding_rank = 0;
        float embedding_scale = 0;
        std::vector<int64_t> embedding_a, embedding_b;
    };
    void bind_adapter(int64_t slot, const int32_t* pages, int64_t count, int64_t page_bytes, const AdapterLayout& layout);
    void unbind_adapter(int64_t slot);

    // --- running ---
    // Throws std::invalid_argument for a batch that names what does not exist, before anything is written.
    void step(const Batch& batch, const int32_t* copies, int64_t num_copies, Entries& entries, const HiddenRows& hidden);
    // fp32 logits of the rows of the last step that `rows` names, [count, vocab] (tests and reports).
    void logits(const int32_t* rows, int64_t count, float* out);

    int64_t vocab() const { return head_.weight ? head_.weight->matrix.n : 0; }
    int64_t max_positions() const { return max_positions_; }
    int64_t hidden_width() const { return head_.weight ? head_.weight->matrix.k : 0; }
    int64_t num_ops() const { return static_cast<int64_t>(ops_.size()); }
    void set_profiling(bool on) { profiling_ = on; }
    const std::vector<double>& op_seconds() const { return op_seconds_; }
    std::string op_name(int64_t index) const;
    const KVPool& pool() const { return *kv_; }

  private:
    struct Head {
        int source = -1;
        Weight weight;
        float softcap = 0, divisor = 1;
    };

    Activation& buffer(int index) { return buffers_[static_cast<size_t>(index)]; }
    void check(const Batch& batch, const int32_t* copies, int64_t num_copies, const Entries& entries,
               const HiddenRows& hidden) const;
    void reserve(int64_t rows);
    void find_tail();
    void plan(const Batch& batch, const HiddenRows& hidden);
    void walk(int thread);
    void add_seconds();
    void run_head(int thread);
    void copy_hidden(const HiddenRows& hidden);
    void sample_rows(int64_t begin, int64_t end, int64_t tile, int thread);
    void make_tiles();

    // `rows`: of the batch, or of its tail.
    void run(const EmbedOp& op, int64_t rows, int thread);
    void run(const NormOp& op, int64_t rows, int thread);
    void run(const LinearOp& op, int64_t rows, int thread);
    void run(const PositionsOp& op, int64_t rows, int thread);
    void run(const CastOp& op, int64_t rows, int thread);
    void run(const LayerNormOp& op, int64_t rows, int thread);
    void run(const GatherOp& op, int64_t rows, int thread);
    void run(const RopeOp& op, int64_t rows, int thread);
    void run(const AttentionOp& op, int64_t rows, int thread);
    void run(const RouteOp& op, int64_t rows, int thread);
    void run(const ExpertsOp& op, int64_t rows, int thread);
    void group_by_expert(const ExpertsOp& op, int64_t rows);
    void gather(const ExpertsOp& op, int64_t members, int thread);
    QuantizedRows quantized_for(const PackedMatrix& m, int64_t row);
    void compact(int thread);
    void multiply(const PackedWeight& weight, LinearCall call, int thread, int64_t product, const AdapterPlan* plan);
    bool shrink(const LinearCall& call, AdapterRows& rows, const AdapterPlan& plan, int thread);
    void plan_adapters(const Batch& batch);
    void add_embedding(int64_t row, int64_t token, int64_t width, float* to);

    // Items [0, count) over all threads, then a barrier; every thread makes the same calls in the same order.
    template <class Work>
    void phase(int thread, int64_t count, int64_t parts, Work&& work);
    int64_t place(int32_t row) const { return tail_.cut() ? tail_.place(row) : row; }
    int64_t shares() const { return threads_->size() * 2; }

    std::shared_ptr<ThreadPool> threads_;
    const Isa isa_;
    const Dtype activations_;
    const RowKernels& rows_;
    const LinearKernels& linear_;
    const AttentionKernels& attention_;
    const KVStoreKernels& store_;
    const SamplingKernels& sampling_;

    std::vector<Activation> buffers_;
    std::vector<Op> ops_;
    Head head_;
    std::shared_ptr<Memory> kv_memory_;  // of all models in the same frames
    std::unique_ptr<KVPool> kv_;
    std::vector<float> cos_, sin_;
    int64_t max_positions_ = 0, rotary_half_ = 0, num_tables_ = 0;
    std::vector<AttentionShape> plan_shapes_;  // one for each pair of heads and window
    std::vector<std::unique_ptr<AttentionPlan>> plans_, tail_plans_;
    // Ops from here on may run on the tail of the batch alone; the buffers that they find filled.
    size_t tail_begin_ = 0;
    std::vector<int> carried_;
    int64_t capacity_ = 0, num_rows_ = 0;  // rows that there is room for, and those of the last step
    size_t num_experts_ops_ = 0;
    bool finished_ = false;

    // The step in flight.
    const Batch* batch_ = nullptr;
    Entries* entries_ = nullptr;
    std::vector<int32_t> logit_rows_, wanted_rows_;  // distinct rows, rising; those with logits, or hidden as well
    Tail tail_;                                    // outlives the step
    std::vector<int64_t> entry_order_, row_starts_;  // entries of logit row i: entry_order_[row_starts_[i]...]
    const AdapterKernels& adapter_;
    std::vector<std::unique_ptr<BoundAdapter>> adapters_;  // by slot
    std::vector<const ProductUpdate*> tables_;             // by slot
    AdapterPlan rows_plan_, tail_plan_;
    std::vector<AdapterPlan> head_plans_;                  // by tile of logits
    Memory shrunk_;
    int64_t shrunk_stride_ = 0;
    RowGroups experts_;
    std::vector<int32_t> expert_rows_;      // by member of the groups
    std::vector<float> expert_weights_;
    Memory gathered_, hidden_;  // rows of experts: their source, and what lies between their two products
    Memory logits_, tile_source_, quantized_, quantized_scales_, quantized_sums_;
    std::vector<Memory> scratch_;
    std::vector<SamplerScratch> sampler_scratch_;
    std::vector<WorkCounter> counters_;
    std::vector<int> phase_;  // per thread: the next counter (spaced apart)
    bool profiling_ = false;
    std::vector<double> op_seconds_, stamps_;  // stamps: [threads, ops + 2]
};

}  // namespace tokenloom
