// What the instruction sets have in common: plain structs, and the table of functions that each one fills.
//
// Every kernel is written once, over vectors of 16 lanes (simd/*.hpp), and compiled once per instruction set
// in a namespace of its own. Translation units of an instruction set use no templates or inline functions of
// the standard library: the linker keeps one copy of those, and it might be the one with the wrong
// instructions. The bits are those of tokenloom/kernels/spec.py on every path.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenloom {

constexpr int kLanes = 16;
constexpr int kPanel = 32;       // output columns of one packed panel
constexpr int kPageSize = 16;    // slots of a KV page
constexpr int kSplit = 128;      // keys of a split of attention
constexpr int kTileRows = 64;    // rows of a tile of logits
constexpr int kVocabTile = 1024; // tokens of a tile of a reduction over the vocabulary
constexpr int kAlign = 64;
constexpr int kMaxExperts = 1024, kMaxChosen = 64;  // of kernels/program.py

enum class Format : int32_t { f32 = 0, bf16 = 1, i8 = 2, i4 = 3 };
enum class Epilogue : int32_t {
    none = 0, silu_mul = 1, residual = 2, gelu_mul = 3, gelu = 4, relu = 5, gelu_erf = 6
};

// Of a gate and an up column each.
inline bool is_paired(Epilogue e) { return e == Epilogue::silu_mul || e == Epilogue::gelu_mul; }
enum class Dtype : int32_t { f32 = 0, bf16 = 1 };

// A weight [N, K] cut into panels of 32 output columns; within a panel K runs slowest, so that a product
// streams through it once. Columns past N are zero, and so is K past its end (to 2, 4 or a group).
//   f32   [K][32] float
//   bf16  [K/2][32][2] uint16
//   i8    [K/4][32][4] uint8 = q + 128        scales: float [panels * 32]
//   i4    per group of G: [G/8][32][4] uint8 (low nibble: k = 8j + i, high: 8j + 4 + i), then 32 fp16
//         scales, then 32 uint8 zero points, then nothing up to a multiple of 64 bytes
// With `paired` (the silu_mul and gelu_mul epilogues), panel p holds gate columns 16p..16p+15, then up columns likewise.
// The transposed product (out[k] = sum over n of x[n] W[n, k]) reads the same bytes: a panel gives 32
// consecutive n for each k.
struct PackedMatrix {
    Format format;
    int32_t paired;
    int64_t n;            // output columns in all
    int64_t k;            // depth
    int64_t group;        // i4: weights that share a scale, else 0
    int64_t panels;       // ceil(n / 32); paired: ceil(n / 2 / 16)
    int64_t panel_bytes;  // a multiple of 64
    const uint8_t* data;  // 64-byte aligned, panels * panel_bytes
    const float* scales;  // i8 only
};

inline bool is_quantized(const PackedMatrix& m) { return m.format == Format::i8 || m.format == Format::i4; }

// Rows quantised on the fly: q = round-half-even(x / scale) in [-127, 127], scale = max|x| / 127 (1 where the
// row is zero). Rows lie `stride` bytes apart, zero from k to stride.
struct QuantizedRows {
    int8_t* values;
    int64_t stride;
    float* scales;   // [rows]
    int32_t* sums;   // i8: [rows] sum of q. i4: [rows][groups] sums of q per group
    int64_t groups;  // sums per row
};

// Low-rank updates (adapters.hpp). Of some columns of a product: b[p] is for panel first_panel + p, [rank][32], or
// for one half of a paired panel [rank][16]. Its ranks are those from `first_rank` on of what all blocks shrink to.
struct AdapterBlock {
    int64_t first_panel, num_panels;
    int32_t half;             // -1: both
    int32_t rank, first_rank;
    const uint8_t* const* b;
};
// All updates of a product by one adapter.
struct ProductUpdate {
    const AdapterBlock* blocks = nullptr;
    int32_t count = 0, ranks = 0;
    const uint8_t* const* a = nullptr;  // [ranks]
    const float* scales = nullptr;
};
struct AdapterRows {
    const int32_t* slots;                 // of each row; -1: no adapter
    const ProductUpdate* const* tables;   // by slot: by product
    int64_t product;
    const float* shrunk;                  // [row][stride]
    int64_t stride;
    Dtype dtype;
};

struct LinearCall {
    const PackedMatrix* weight;
    const void* source;     // float or bf16 rows (not read for i8 and i4)
    int64_t source_stride;  // in elements
    QuantizedRows quantized;
    int64_t rows;
    const float* bias;      // [n] in the order of the columns, or null
    const AdapterRows* adapters;  // or null
    void* out;
    int64_t out_stride;     // in elements
    Dtype out_dtype;
    Epilogue epilogue;
    float scale;            // of a residual; 1: none
    // Of a residual, or null: where each row of the call is added, and what it is multiplied by.
    const int32_t* out_rows;
    const float* out_weights;
};

}  // namespace tokenloom
