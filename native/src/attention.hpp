// Ragged paged attention: what the plan of a step (attention_plan.hpp) hands to the kernels.
//
// A task is a block of query rows of one segment under one KV head: rows x group query vectors that share all
// loads of K and V. It walks the splits of 128 keys in order. Where one context is too long for one thread,
// several tasks take a run of splits each and leave (max, sum, products) per split behind; a merge folds these
// in order afterwards, which gives the same bits.
#pragma once

#include "isa.hpp"
#include "kernels.hpp"
#include "kv.hpp"

namespace tokenloom {

constexpr int kQueryTile = 12;        // query vectors that are worked on together
constexpr int kTreePages = 6;         // pages that 64 ancestors and the row itself can touch
constexpr int kMaxAncestors = 64;
constexpr int kSplitPages = kSplit / kPageSize;

struct AttentionShape {
    int32_t num_heads, num_kv_heads, head_dim;
    float scale;
    int32_t window;  // a row sees its last `window` keys, itself included; 0: all
    int32_t layer;
    float softcap;   // c: a score s becomes c * tanh(s / c); 0: none
};

// Keys of a tree row that do not lie where the page table says.
struct TreeKey {
    int32_t logical;
    int32_t offset;        // in the page
    const uint8_t* page;
};

// Query rows [row_begin, row_end) of one segment.
struct AttentionBlock {
    int32_t row_begin, row_end;
    int32_t split_begin, split_end;
    int32_t shared_end;    // splits from here on are gathered row by row (trees); split_end without trees
    int64_t first_page;    // of the segment, in `pages`
    int64_t num_pages;     // that the last row sees
};

struct AttentionTask {
    int32_t block, kv_head;
    int32_t split_begin, split_end;
    int64_t partial;       // in floats, where the first split goes; -1: the task finishes its rows
};

// One block and KV head whose splits were several tasks.
struct AttentionMerge {
    int32_t block, kv_head;
    int64_t partial;
};

// What a plan holds, as plain arrays. Valid until the plan is built again.
struct AttentionTables {
    AttentionTask* tasks;
    AttentionMerge* merges;
    const AttentionBlock* blocks;
    const uint8_t* const* pages;     // pages of all segments in path order
    const int32_t* logical;          // [rows]
    const int64_t* tree_starts;      // [rows + 1] into tree_keys; null without trees
    const TreeKey* tree_keys;
    float* partials;
    KVFormat format;
    int32_t group;                   // query heads per KV head
    int32_t head_dim, dim16;
    int32_t window;
    float softcap;
    int64_t head_bytes, layer_bytes; // from head to head and from layer to layer of a page
    int64_t k_bytes, v_bytes;
    int64_t max_tiles;               // of any block
};

struct AttentionKernels {
    // q is fp32 [rows, num_heads * head_dim], out likewise of `out_dtype`; strides count elements. `scratch`
    // is 64-byte aligned, AttentionPlan::scratch_bytes() long, and the thread's own. `next` is the task that the
    // thread will likely run next: its first pages are fetched.
    void (*run)(const AttentionTables& plan, const AttentionShape& shape, int64_t task, int64_t next, const float* q,
                int64_t q_stride, void* out, int64_t out_stride, Dtype out_dtype, uint8_t* scratch);
    void (*merge)(const AttentionTables& plan, const AttentionShape& shape, int64_t merge, void* out,
                  int64_t out_stride, Dtype out_dtype, uint8_t* scratch);
};

const AttentionKernels& attention_kernels_for(Isa isa);

}  // namespace tokenloom
