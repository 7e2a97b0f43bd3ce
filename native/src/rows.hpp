// Work on single rows: norms and the embedding.
#pragma once

#include "isa.hpp"
#include "kernels.hpp"

namespace tokenloom {

struct RMSNormCall {
    float* source;        // fp32 rows; with `add`, source += add comes first
    int64_t source_stride;
    const float* add;     // or null
    int64_t add_stride;
    const float* weight;  // [width]
    void* out;
    int64_t out_stride;
    Dtype out_dtype;
    int64_t width;
    float epsilon;
};

struct LayerNormCall {
    const float* source;
    int64_t source_stride;
    const float* weight;  // [width]
    const float* bias;    // [width] or null
    void* out;
    int64_t out_stride;
    Dtype out_dtype;
    int64_t width;
    float epsilon;
};

struct RouteCall {
    const float* source;  // [experts] a row
    int64_t source_stride;
    float* out;           // [top_k weights, top_k numbers]
    int64_t out_stride;
    int64_t experts;      // up to kMaxExperts
    int64_t top_k;        // up to kMaxChosen
    bool normalized;
};

enum class TableDtype : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

struct RowKernels {
    void (*rms_norm)(const RMSNormCall& call, int64_t begin, int64_t end);
    void (*layer_norm)(const LayerNormCall& call, int64_t begin, int64_t end);
    void (*route)(const RouteCall& call, int64_t begin, int64_t end);
    // One row of an embedding table as fp32; `rounded`: through bfloat16.
    void (*widen)(const void* source, TableDtype dtype, int64_t width, bool rounded, float* out);
    // fp32 to the type of an activation buffer, in one row.
    void (*narrow)(const float* source, int64_t width, Dtype dtype, void* out);
};

const RowKernels& row_kernels_for(Isa isa);

}  // namespace tokenloom
