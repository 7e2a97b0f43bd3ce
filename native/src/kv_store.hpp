// What follows the projection to q, k and v: norms over heads, rotation, and the KV pool.
#pragma once

#include "isa.hpp"
#include "kernels.hpp"
#include "kv.hpp"

namespace tokenloom {

constexpr int kMaxHeadDim = 1024;

// The pages of one layer as plain numbers.
struct KVTarget {
    uint8_t* bytes;
    KVFormat format;
    int32_t num_kv_heads, head_dim, dim16;
    int64_t frame_bytes, pages_per_frame, page_bytes;
    int64_t layer_offset;  // in a page
    int64_t head_bytes, k_bytes, v_bytes;
};

KVTarget kv_target(const KVPool& pool, int64_t layer);

// source [q heads | k heads | v heads] is fp32 and is overwritten; q goes to out, fp32 [num_heads * head_dim].
// k and v are rounded to the KV format; NaN becomes 0 and what is too large the largest number.
struct RopeStoreCall {
    KVTarget target;
    float* source;
    int64_t source_stride;   // in elements
    float* out;
    int64_t out_stride;
    const int32_t* positions;  // [rows]
    const int64_t* slots;      // [rows] page * 16 + offset, -1: nowhere
    const float* cos;          // [max_context, rotary_dim / 2]
    const float* sin;
    const float* q_norm;       // [head_dim], or of all heads, or null
    const float* k_norm;
    bool whole_q, whole_k;     // the norm is over all heads together
    float epsilon;
    int32_t num_heads;
    int32_t rotary_dim;
};

struct KVStoreKernels {
    void (*store_rows)(const RopeStoreCall& call, int64_t begin, int64_t end);
    // K and V of one slot, as stored, as fp32 [num_kv_heads, head_dim] each (tests and tools).
    void (*read_slot)(const KVTarget& target, int64_t slot, float* k, float* v);
};

const KVStoreKernels& kv_store_kernels_for(Isa isa);

// Throws std::invalid_argument where a position lies outside the tables or a slot outside the pool.
void check_store(const KVPool& pool, const int32_t* positions, const int64_t* slots, int64_t rows,
                 int64_t max_context);

// Pages int32 [count, 2] (source, destination); all sources are read before any page is overwritten. Throws
// std::invalid_argument for a page outside the pool, before anything is copied.
void copy_pages(const KVPool& pool, const int32_t* copies, int64_t count);

// Throws std::invalid_argument for a slot outside the pool.
void check_moves(const KVPool& pool, const int64_t* moves, int64_t count);

// Slots int64 [count, 2] (source, destination), copied one after the other: a source may be what an earlier move left
// there. Of heads [begin, end), which count layers * num_kv_heads.
void move_slots(const KVPool& pool, const int64_t* moves, int64_t count, int64_t begin, int64_t end);

}  // namespace tokenloom
