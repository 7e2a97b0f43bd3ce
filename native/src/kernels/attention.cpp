// Attention over pages of K and V (kernels/spec.py: attention, attention_bf16, attention_int8).
//
// A split of 128 keys is worked on by a tile of up to 12 query vectors at a time: scores by a register tile of
// query vectors x keys, softmax per vector, products by a register tile of query vectors x dimensions. A key
// is one lane of scores and one step of products whatever page it lies in.
#include TL_SIMD

#include "attention.hpp"
#include "vector_math.hpp"

namespace tokenloom {
namespace TL_ISA {

namespace {

// Register tiles of query vectors x vectors of keys or dimensions: 12 x 2 and 6 x 4 where there are 32
// registers of 16 lanes. Elsewhere one vector is several registers, and bf16 needs some for halves of pairs.
constexpr bool kWide = kMaxTileRows >= 12;
template <bool kPairs>
struct Registers {
    static constexpr int kScoreRows = kWide ? 12 : kPairs ? 4 : 6;
    static constexpr int kScoreVectors = kWide ? 24 : kScoreRows;  // in all
    static constexpr int kProductRows = kWide ? 6 : kScoreRows;
    static constexpr int kProductColumns = kWide ? 4 : 1;
};

// Scores are subtracted from at least this, so that a vector that sees nothing of a split gives zeros.
constexpr float kLowest = -3.0e38f;

struct Partial {   // of one tile and split; the running state of a tile looks the same
    float* best;      // [16]
    float* total;     // [16]
    float* weighted;  // [12][dim16]
};

struct Scratch {
    uint8_t* queries;    // [tiles][steps][12] pairs of bf16, or fp32
    float* states;       // [tiles] Partial
    float* partial;      // Partial
    float* scores;       // [12][128]
    float* shares;       // [12][128] fp32, or bf16 in the first half of a row
    uint8_t* expanded;   // i8: the pages of a split as bf16
    uint8_t* tree;       // copies of pages with a row's ancestors in place
};

TL_INLINE int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
TL_INLINE int smaller(int a, int b) { return a < b ? a : b; }
TL_INLINE int larger(int a, int b) { return a > b ? a : b; }
TL_INLINE int64_t tile_floats(const AttentionTables& plan) { return 2 * kLanes + kQueryTile * plan.dim16; }
TL_INLINE int64_t depth_steps(const AttentionTables& plan) {
    return plan.format == KVFormat::f32 ? plan.head_dim : plan.head_dim / 2;
}
TL_INLINE int64_t query_bytes(const AttentionTables& plan) { return depth_steps(plan) * kQueryTile * 4; }
TL_INLINE int64_t expanded_k_bytes(const AttentionTables& plan) { return rounded(plan.head_dim * 32); }
TL_INLINE int64_t expanded_bytes(const AttentionTables& plan) {
    return expanded_k_bytes(plan) + rounded(plan.dim16 * 32);
}

TL_INLINE Scratch lay_out(const AttentionTables& plan, uint8_t* memory) {
    Scratch s;
    s.queries = memory;
    memory += rounded(plan.max_tiles * query_bytes(plan));
    s.states = (float*)memory;
    memory += plan.max_tiles * tile_floats(plan) * 4;
    s.partial = (float*)memory;
    memory += tile_floats(plan) * 4;
    s.scores = (float*)memory;
    memory += rounded(kQueryTile * kSplit * 4);
    s.shares = (float*)memory;
    memory += rounded(kQueryTile * kSplit * 4);
    s.expanded = memory;
    if (plan.format == KVFormat::i8) memory += kSplitPages * expanded_bytes(plan);
    s.tree = memory;
    return s;
}

TL_INLINE Partial partial_at(float* p) { return {p, p + kLanes, p + 2 * kLanes}; }

// --- the tiles of a block ---------------------------------------------------------------------------------

// Query vector v of a block is head v % group of row v / group.
struct Tile {
    int begin, end;
};

TL_INLINE int count_vectors(const AttentionTables& plan, const AttentionBlock& block) {
    return (block.row_end - block.row_begin) * plan.group;
}
TL_INLINE int count_tiles(const AttentionTables& plan, const AttentionBlock& block) {
    return (count_vectors(plan, block) + kQueryTile - 1) / kQueryTile;
}
TL_INLINE Tile tile_at(const AttentionTables& plan, const AttentionBlock& block, int tile) {
    return {tile * kQueryTile, smaller((tile + 1) * kQueryTile, count_vectors(plan, block))};
}

// Keys [first, last] of a split that a row sees, counted from the split's start.
struct Seen {
    int first, last;
};

TL_INLINE Seen seen_keys(const AttentionTables& plan, int row, int split) {
    int last = plan.logical[row] - split * kSplit;
    int first = plan.window ? last - plan.window + 1 : 0;
    return {larger(first, 0), smaller(last, kSplit - 1)};
}

// Pages [begin, end) of a split that some vector of the tile sees a key of; empty: none.
struct Pages {
    int begin, end;
};

TL_INLINE Pages seen_pages(const AttentionTables& plan, const AttentionBlock& block, Tile tile, int split) {
    Pages pages = {kSplitPages, 0};
    for (int row = tile.begin / plan.group; row <= (tile.end - 1) / plan.group; ++row) {
        Seen seen = seen_keys(plan, block.row_begin + row, split);
        if (seen.first > seen.last) continue;
        pages.begin = smaller(pages.begin, seen.first / kPageSize);
        pages.end = larger(pages.end, seen.last / kPageSize + 1);
    }
    return pages;
}

// --- queries --------------------------------------------------------------------------------------------

// q * scale, rounded, and then rounded to bf16 (not for f32): [steps][12], so that a step of a product
// broadcasts from neighbouring places.
TL_NOINLINE void pack_queries(const AttentionTables& plan, const AttentionBlock& block, const AttentionShape& shape,
                              int kv_head, const float* q, int64_t q_stride, const Scratch& s) {
    const int tiles = count_tiles(plan, block), dim = plan.head_dim;
    const F scale = set(shape.scale);
    for (int t = 0; t < tiles; ++t) {
        Tile tile = tile_at(plan, block, t);
        uint32_t* out = (uint32_t*)(s.queries + t * query_bytes(plan));
        for (int v = tile.begin; v < tile.end; ++v) {
            const float* from = q + (block.row_begin + v / plan.group) * q_stride +
                                (int64_t)(kv_head * plan.group + v % plan.group) * dim;
            uint32_t* to = out + (v - tile.begin);
            for (int d = 0; d < dim; d += kLanes) {
                int n = smaller(dim - d, kLanes);
                F x = mul(n == kLanes ? load(from + d) : load(from + d, n), scale);
                uint32_t lanes[kLanes];
                if (plan.format == KVFormat::f32) {
                    istore(lanes, as_int(x));
                    for (int i = 0; i < n; ++i) to[(d + i) * kQueryTile] = lanes[i];
                } else {
                    store_bf16((uint16_t*)lanes, x);
                    for (int i = 0; i < n / 2; ++i) to[(d / 2 + i) * kQueryTile] = lanes[i];
                }
            }
        }
    }
}

// --- scores ---------------------------------------------------------------------------------------------

template <bool kPairs, int R, int P>
TL_INLINE void score_tile(const uint32_t* q, int64_t steps, const uint8_t* const* k, const uint8_t* const* ahead,
                          float* scores) {
    F acc[R][P];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) acc[r][p] = zero();
    for (int64_t step = 0; step < steps; ++step) {
        I keys[P];
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) {
            keys[p] = iload(k[p] + step * 64);
            prefetch(ahead[p] + step * 64);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            I query = iset((int32_t)q[step * kQueryTile + r]);
#pragma GCC unroll 16
            for (int p = 0; p < P; ++p)
                acc[r][p] = kPairs ? dot_bf16(acc[r][p], query, keys[p])
                                   : fma(as_float(query), as_float(keys[p]), acc[r][p]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int p = 0; p < P; ++p) store(scores + r * kSplit + p * kPageSize, acc[r][p]);
}

// As many pages at a time as there are registers for.
template <bool kPairs, int R>
TL_INLINE void score_rows(const uint32_t* q, int64_t steps, const uint8_t* const* k, const uint8_t* const* ahead,
                          Pages pages, float* scores) {
    constexpr int kScoreVectors = Registers<kPairs>::kScoreVectors;
    constexpr int kMost = kScoreVectors / R >= 8 ? 8 : kScoreVectors / R >= 4 ? 4 : kScoreVectors / R >= 2 ? 2 : 1;
    int p = pages.begin;
    if constexpr (kMost >= 8)
        for (; pages.end - p >= 8; p += 8) score_tile<kPairs, R, 8>(q, steps, k + p, ahead + p, scores + p * kPageSize);
    if constexpr (kMost >= 4)
        for (; pages.end - p >= 4; p += 4) score_tile<kPairs, R, 4>(q, steps, k + p, ahead + p, scores + p * kPageSize);
    if constexpr (kMost >= 2)
        for (; pages.end - p >= 2; p += 2) score_tile<kPairs, R, 2>(q, steps, k + p, ahead + p, scores + p * kPageSize);
    for (; p < pages.end; ++p) score_tile<kPairs, R, 1>(q, steps, k + p, ahead + p, scores + p * kPageSize);
}

template <bool kPairs>
TL_NOINLINE void score(int rows, const uint32_t* q, int64_t steps, const uint8_t* const* k, const uint8_t* const* ahead,
                       Pages pages, float* scores) {
    constexpr int kScoreRows = Registers<kPairs>::kScoreRows;
    for (int r = 0; r < rows; r += kScoreRows, q += kScoreRows, scores += kScoreRows * kSplit) {
        int n = smaller(rows - r, kScoreRows);
#define TL_ROWS(N)                                                                                              \
    case N:                                                                                                     \
        if constexpr (N <= kScoreRows) score_rows<kPairs, N>(q, steps, k, ahead, pages, scores);                \
        break;
        switch (n) {
            TL_ROWS(1) TL_ROWS(2) TL_ROWS(3) TL_ROWS(4) TL_ROWS(5) TL_ROWS(6)
            TL_ROWS(7) TL_ROWS(8) TL_ROWS(9) TL_ROWS(10) TL_ROWS(11) TL_ROWS(12)
        }
#undef TL_ROWS
    }
}

// --- softmax --------------------------------------------------------------------------------------------

// exp of what is not above zero (spec.exp), in one factor of 2^n: n is -126 at least. NaN stays.
TL_INLINE F exp_of_negative(F x) {
    const F low = set(kExpLow);
    F n, y = exp_fraction(max(low, x), n);
    return select(lt(x, low), zero(), scale_by_power(y, n));
}

// Scores of keys that a query vector does not see become -infinity, in pages [begin, end).
TL_INLINE void mask_row(float* scores, Seen seen, Pages pages) {
    const F never = set(-__builtin_inff());
    for (int p = pages.begin; p < pages.end; ++p) {
        const int before = seen.first - p * kPageSize, after = seen.last + 1 - p * kPageSize;
        if (before <= 0 && after >= kPageSize) continue;
        float* at = scores + p * kPageSize;
        F x = select(first(larger(after, 0)), load(at), never);
        store(at, select(first(larger(before, 0)), never, x));
    }
}

TL_INLINE void scale_scores(int rows, Pages pages, const float* const* scales, const Scratch& s) {
    for (int p = pages.begin; p < pages.end; ++p) {
        const F scale = load(scales[p]);
        for (int r = 0; r < rows; ++r) {
            float* at = s.scores + r * kSplit + p * kPageSize;
            store(at, mul(load(at), scale));
        }
    }
}

TL_INLINE void cap_scores(int rows, Pages pages, float softcap, const Scratch& s) {
    const F cap = set(softcap);
    for (int r = 0; r < rows; ++r) {
        for (int p = pages.begin; p < pages.end; ++p) {
            float* at = s.scores + r * kSplit + p * kPageSize;
            store(at, mul(tanh(div(load(at), cap)), cap));
        }
    }
}

// Scores [rows][128] -> shares, their maxima and sums, over n pages from `begin` on.
template <KVFormat kFormat>
TL_INLINE void softmax_pages(int rows, int begin, int n, const float* const* scales, const Scratch& s, Partial out) {
    const F lowest = set(kLowest);
    float* scores = s.scores + begin * kPageSize;
    for (int r = 0; r < rows; ++r) {
        const float* row = scores + r * kSplit;
        F high = load(row);
        for (int p = 1; p < n; ++p) high = max(high, load(row + p * kPageSize));
        out.best[r] = max_lane(high);
    }
    for (int r = 0; r < rows; ++r) {
        const float* row = scores + r * kSplit;
        const F shift = max(set(out.best[r]), lowest);
        F lanes = zero();
        for (int p = 0; p < n; ++p) {
            F share = exp_of_negative(sub(load(row + p * kPageSize), shift));
            lanes = add(lanes, share);
            const int at = (begin + p) * kPageSize;
            if constexpr (kFormat == KVFormat::f32)
                store(s.shares + r * kSplit + at, share);
            else if constexpr (kFormat == KVFormat::bf16)
                store_bf16_flushed((uint16_t*)(s.shares + r * kSplit) + at, share);
            else
                store_bf16_flushed((uint16_t*)(s.shares + r * kSplit) + at,
                                   mul(share, load(scales[begin + p] + kPageSize)));
        }
        out.total[r] = sum(lanes);
    }
}

template <KVFormat kFormat>
TL_NOINLINE void softmax(const AttentionTables& plan, const AttentionBlock& block, Tile tile, int split, Pages pages,
                         const float* const* scales, const Scratch& s, Partial out) {
    const int rows = tile.end - tile.begin, n = pages.end - pages.begin;
    if constexpr (kFormat == KVFormat::i8) scale_scores(rows, pages, scales, s);
    if (plan.softcap != 0) cap_scores(rows, pages, plan.softcap, s);
    int row = tile.begin / plan.group, head = tile.begin % plan.group;
    Seen seen = seen_keys(plan, block.row_begin + row, split);
    for (int r = 0; r < rows; ++r) {
        if (seen.first > pages.begin * kPageSize || seen.last < pages.end * kPageSize - 1)
            mask_row(s.scores + r * kSplit, seen, pages);
        if (++head == plan.group && r + 1 < rows) {
            head = 0;
            seen = seen_keys(plan, block.row_begin + ++row, split);
        }
    }
    if (n == kSplitPages) softmax_pages<kFormat>(rows, 0, kSplitPages, scales, s, out);
    else softmax_pages<kFormat>(rows, pages.begin, n, scales, s, out);
}

// --- products -------------------------------------------------------------------------------------------

template <bool kPairs, int R, int C>
TL_INLINE void product_tile(const float* shares, const uint8_t* const* v, const uint8_t* const* ahead,
                            int64_t v_stride, Pages pages, float* out, int64_t out_stride) {
    constexpr int kSteps = kPairs ? kPageSize / 2 : kPageSize;
    F acc[R][C];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) acc[r][c] = zero();
    for (int p = pages.begin; p < pages.end; ++p) {
        const uint8_t* values = v[p];
        const int64_t next = ahead[p] - values;
        const uint32_t* share = (const uint32_t*)shares + p * kSteps;
        for (int step = 0; step < kSteps; ++step, values += v_stride) {
            I value[C];
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) {
                value[c] = iload(values + c * 64);
                prefetch(values + next + c * 64);
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                I x = iset((int32_t)share[r * kSplit + step]);
#pragma GCC unroll 16
                for (int c = 0; c < C; ++c)
                    acc[r][c] = kPairs ? dot_bf16(acc[r][c], x, value[c])
                                       : fma(as_float(x), as_float(value[c]), acc[r][c]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < C; ++c) store(out + r * out_stride + c * kLanes, acc[r][c]);
}

template <bool kPairs, int C>
TL_INLINE void product_rows(int rows, const float* shares, const uint8_t* const* v, const uint8_t* const* ahead,
                            int64_t v_stride, Pages pages, float* out, int64_t out_stride) {
    constexpr int kProductRows = Registers<kPairs>::kProductRows;
    while (rows > 0) {
        // 7 vectors as 4 and 3, not as 6 and 1: a short tile waits for its own sums.
        int n = rows > kProductRows && rows < 2 * kProductRows ? (rows + 1) / 2 : smaller(rows, kProductRows);
#define TL_ROWS(N)                                                                                              \
    case N:                                                                                                     \
        if constexpr (N <= kProductRows)                                                                        \
            product_tile<kPairs, N, C>(shares, v, ahead, v_stride, pages, out, out_stride);                     \
        break;
        switch (n) { TL_ROWS(1) TL_ROWS(2) TL_ROWS(3) TL_ROWS(4) TL_ROWS(5) TL_ROWS(6) }
#undef TL_ROWS
        rows -= n;
        shares += n * kSplit;
        out += n * out_stride;
    }
}

template <bool kPairs>
TL_NOINLINE void product(int rows, const float* shares, const uint8_t* const* v, const uint8_t* const* ahead, int dim16,
                         Pages pages, float* out) {
    constexpr int kProductColumns = Registers<kPairs>::kProductColumns;
    const int64_t v_stride = dim16 * 4;
    int left = dim16 / kLanes;
    const uint8_t* values[kSplitPages];
    const uint8_t* next[kSplitPages];
    for (int p = pages.begin; p < pages.end; ++p) {
        values[p] = v[p];
        next[p] = ahead[p];
    }
    while (left) {
        int n = left > kProductColumns && left < 2 * kProductColumns ? (left + 1) / 2 : smaller(left, kProductColumns);
#define TL_VECTORS(N)                                                                            \
    case N:                                                                                      \
        if constexpr (N <= kProductColumns)                                                      \
            product_rows<kPairs, N>(rows, shares, values, next, v_stride, pages, out, dim16);    \
        break;
        switch (n) { TL_VECTORS(1) TL_VECTORS(2) TL_VECTORS(3) TL_VECTORS(4) }
#undef TL_VECTORS
        left -= n;
        out += n * kLanes;
        for (int p = pages.begin; p < pages.end; ++p) {
            values[p] += n * 64;
            next[p] += n * 64;
        }
    }
}

// --- merging --------------------------------------------------------------------------------------------

// One split into the running state, in place.
TL_NOINLINE void merge_split(int rows, int dim16, Partial state, Partial part) {
    const F lowest = set(kLowest);
    F best = load(state.best), high = load(part.best);
    F merged = max(best, high);
    F floor = max(merged, lowest);
    F keep = exp_of_negative(sub(best, floor)), take = exp_of_negative(sub(high, floor));
    store(state.best, merged);
    store(state.total, add(mul(load(state.total), keep), mul(load(part.total), take)));
    float keeps[kLanes], takes[kLanes];
    store(keeps, keep);
    store(takes, take);
    for (int r = 0; r < rows; ++r) {
        const F k = set(keeps[r]), t = set(takes[r]);
        float* to = state.weighted + r * dim16;
        const float* from = part.weighted + r * dim16;
        for (int d = 0; d < dim16; d += kLanes) store(to + d, add(mul(load(to + d), k), mul(load(from + d), t)));
    }
}

// What has seen no key.
TL_INLINE void clear_sums(Partial state) {
    store(state.best, set(-__builtin_inff()));
    store(state.total, zero());
}
TL_INLINE void clear_weighted(int rows, int dim16, Partial state) {
    for (int d = 0; d < rows * dim16; d += kLanes) store(state.weighted + d, zero());
}

// out = weighted / total; adding zero makes -0 into +0.
TL_NOINLINE void finish(const AttentionTables& plan, const AttentionBlock& block, int kv_head, Tile tile, Partial state,
                        void* out, int64_t out_stride, Dtype dtype) {
    const int dim = plan.head_dim;
    for (int v = tile.begin; v < tile.end; ++v) {
        const int r = v - tile.begin;
        const F total = set(state.total[r]);
        int64_t at = (block.row_begin + v / plan.group) * out_stride +
                     (int64_t)(kv_head * plan.group + v % plan.group) * dim;
        for (int d = 0; d < dim; d += kLanes) {
            F x = add(div(load(state.weighted + r * plan.dim16 + d), total), zero());
            int n = smaller(dim - d, kLanes);
            if (dtype == Dtype::f32) {
                if (n == kLanes) store((float*)out + at + d, x);
                else store((float*)out + at + d, x, n);
            } else {
                if (n == kLanes) store_bf16((uint16_t*)out + at + d, x);
                else store_bf16((uint16_t*)out + at + d, x, n);
            }
        }
    }
}

// --- pages ----------------------------------------------------------------------------------------------

// 16 pairs of int8 as pairs of bf16: a byte + 128 in the fraction of 2^15 or 2^23, less what it stands for.
TL_INLINE I widen_pairs(const uint8_t* p) {
    const I byte = iset(0xff), upper = iset((int32_t)0xffff0000u);
    const I x = ixor(load_u16((const uint16_t*)p), iset(0x8080));
    F odd = sub(as_float(ior(iand(x, shl<8>(byte)), iset(0x47000000))), set(32768.0f + 128.0f));
    F even = sub(as_float(ior(iand(x, byte), iset(0x4b000000))), set(8388608.0f + 128.0f));
    return ior(iand(as_int(odd), upper), shr<16>(as_int(even)));
}

TL_NOINLINE void expand_page(const AttentionTables& plan, const uint8_t* page, uint8_t* out) {
    const int64_t k = plan.head_dim / 2, v = plan.dim16 / 2;
    uint8_t* values = out + expanded_k_bytes(plan);
    for (int64_t i = 0; i < k; ++i) istore(out + i * 64, widen_pairs(page + i * 32));
    for (int64_t i = 0; i < v; ++i) istore(values + i * 64, widen_pairs(page + plan.k_bytes + i * 32));
}

TL_INLINE void copy_bytes(uint8_t* to, const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) istore(to + i, iload(from + i));
}

template <class T>
TL_INLINE void copy_strided(uint8_t* to, const uint8_t* from, int64_t n, int64_t stride) {
    for (int64_t i = 0; i < n; ++i) *(T*)(to + i * stride) = *(const T*)(from + i * stride);
}

// K, V and scales of one key from slot to slot of pages of one head.
TL_NOINLINE void copy_key(const AttentionTables& plan, uint8_t* to, int to_slot, const uint8_t* from, int from_slot) {
    const int dim = plan.head_dim;
    const int64_t v = plan.k_bytes, s = plan.k_bytes + plan.v_bytes, row = plan.dim16;
    if (plan.format == KVFormat::f32) {
        copy_strided<uint32_t>(to + to_slot * 4, from + from_slot * 4, dim, 64);
        copy_strided<uint32_t>(to + v + to_slot * row * 4, from + v + from_slot * row * 4, dim, 4);
    } else if (plan.format == KVFormat::bf16) {
        copy_strided<uint32_t>(to + to_slot * 4, from + from_slot * 4, dim / 2, 64);
        copy_strided<uint16_t>(to + v + to_slot / 2 * row * 4 + to_slot % 2 * 2,
                               from + v + from_slot / 2 * row * 4 + from_slot % 2 * 2, dim, 4);
    } else {
        copy_strided<uint16_t>(to + to_slot * 2, from + from_slot * 2, dim / 2, 32);
        copy_strided<uint8_t>(to + v + to_slot / 2 * row * 2 + to_slot % 2,
                              from + v + from_slot / 2 * row * 2 + from_slot % 2, dim, 2);
        copy_strided<uint32_t>(to + s + to_slot * 4, from + s + from_slot * 4, 2, 64);
    }
}

// The pages of a split: K, V and (i8) scales.
struct Split {
    const uint8_t* pages[kSplitPages];
    const uint8_t* keys[kSplitPages];
    const uint8_t* values[kSplitPages];
    const float* scales[kSplitPages];
    const uint8_t* ahead[kSplitPages];  // what will be read after V: the keys of the next split
    int count;
};

TL_INLINE int count_pages(const AttentionBlock& block, int split) {
    int64_t left = block.num_pages - (int64_t)split * kSplitPages;
    return left < kSplitPages ? (int)left : kSplitPages;
}

TL_INLINE void find_pages(const AttentionTables& plan, const AttentionBlock& block, int64_t head_offset, int split,
                          Split* out) {
    const uint8_t* const* pages = plan.pages + block.first_page + (int64_t)split * kSplitPages;
    out->count = count_pages(block, split);
    for (int p = 0; p < out->count; ++p) out->pages[p] = pages[p] + head_offset;
}

// The next split's pages, or those that the next task of this thread will likely begin with.
TL_INLINE void look_ahead(const AttentionTables& plan, const AttentionShape& shape, int64_t index, int64_t next,
                          int split, Split* out) {
    const AttentionTask* task = plan.tasks + index;
    if (++split == task->split_end) {
        task = plan.tasks + next;
        split = task->split_begin;
    }
    const AttentionBlock& block = plan.blocks[task->block];
    const int64_t head_offset = shape.layer * plan.layer_bytes + task->kv_head * plan.head_bytes;
    const uint8_t* const* pages = plan.pages + block.first_page + (int64_t)split * kSplitPages;
    const int last = count_pages(block, split) - 1;
    for (int p = 0; p < kSplitPages; ++p) out->ahead[p] = pages[smaller(p, last)] + head_offset;
}

// Replaces pages by copies that hold the row's tree keys.
TL_NOINLINE void place_tree_keys(const AttentionTables& plan, int row, int64_t head_offset, int split, const Scratch& s,
                                 Split* out) {
    int copies = 0;
    uint8_t* copy_of[kSplitPages];
    for (int p = 0; p < kSplitPages; ++p) copy_of[p] = 0;
    for (int64_t i = plan.tree_starts[row]; i < plan.tree_starts[row + 1]; ++i) {
        const TreeKey& key = plan.tree_keys[i];
        if (key.logical / kSplit != split) continue;
        int p = key.logical % kSplit / kPageSize;
        if (!copy_of[p]) {
            copy_of[p] = s.tree + copies++ * plan.head_bytes;
            copy_bytes(copy_of[p], out->pages[p], plan.head_bytes);
            out->pages[p] = copy_of[p];
        }
        copy_key(plan, copy_of[p], key.logical % kPageSize, key.page + head_offset, key.offset);
    }
}

TL_INLINE void point_into_pages(const AttentionTables& plan, const Scratch& s, Pages used, Split* split) {
    for (int p = used.begin; p < used.end; ++p) {
        const uint8_t* page = split->pages[p];
        if (plan.format == KVFormat::i8) {
            uint8_t* wide = s.expanded + p * expanded_bytes(plan);
            expand_page(plan, page, wide);
            split->keys[p] = wide;
            split->values[p] = wide + expanded_k_bytes(plan);
            split->scales[p] = (const float*)(page + plan.k_bytes + plan.v_bytes);
        } else {
            split->keys[p] = page;
            split->values[p] = page + plan.k_bytes;
        }
    }
}

// --- tasks ----------------------------------------------------------------------------------------------

// Query vectors [tile.begin, tile.end), whose queries are `q`, over some pages of a split.
template <KVFormat kFormat>
TL_INLINE void attend_pages(const AttentionTables& plan, const AttentionBlock& block, Tile tile, const uint32_t* q,
                            int split, Pages pages, const Split& found, const Scratch& s, Partial out) {
    constexpr bool kPairs = kFormat != KVFormat::f32;
    const int rows = tile.end - tile.begin;
    if constexpr (kPairs) {
        FlushDenormals guard;
        score<kPairs>(rows, q, depth_steps(plan), found.keys, found.values, pages, s.scores);
    } else {
        score<kPairs>(rows, q, depth_steps(plan), found.keys, found.values, pages, s.scores);
    }
    softmax<kFormat>(plan, block, tile, split, pages, found.scales, s, out);
    if constexpr (kPairs) {
        FlushDenormals guard;
        product<kPairs>(rows, s.shares, found.values, found.ahead, plan.dim16, pages, out.weighted);
    } else {
        product<kPairs>(rows, s.shares, found.values, found.ahead, plan.dim16, pages, out.weighted);
    }
}

// One tile whose rows find their keys on different pages: row by row. False: no key was seen.
template <KVFormat kFormat>
TL_NOINLINE bool attend_by_row(const AttentionTables& plan, const AttentionBlock& block, Tile tile, const uint32_t* q,
                               int split, int64_t head_offset, Split* found, const Scratch& s, Partial part) {
    bool any = false;
    for (int row = tile.begin / plan.group; row <= (tile.end - 1) / plan.group; ++row) {
        Tile own = {larger(tile.begin, row * plan.group), smaller(tile.end, (row + 1) * plan.group)};
        const int at = own.begin - tile.begin;
        Partial out = {part.best + at, part.total + at, part.weighted + at * plan.dim16};
        Pages pages = seen_pages(plan, block, own, split);
        if (pages.begin >= pages.end) {
            clear_weighted(own.end - own.begin, plan.dim16, out);
            continue;
        }
        any = true;
        find_pages(plan, block, head_offset, split, found);
        place_tree_keys(plan, block.row_begin + row, head_offset, split, s, found);
        point_into_pages(plan, s, pages, found);
        attend_pages<kFormat>(plan, block, own, q + at, split, pages, *found, s, out);
    }
    return any;
}

// All tiles of a block over one split: into `partials`, or into the running states.
template <KVFormat kFormat>
TL_INLINE void attend_split(const AttentionTables& plan, const AttentionBlock& block, int split, int64_t head_offset,
                            Split* found, const Scratch& s, float* partials) {
    const int tiles = count_tiles(plan, block);
    const bool shared = split < block.shared_end;
    if (shared) {
        find_pages(plan, block, head_offset, split, found);
        point_into_pages(plan, s, seen_pages(plan, block, {0, count_vectors(plan, block)}, split), found);
    }
    for (int t = 0; t < tiles; ++t) {
        const Tile tile = tile_at(plan, block, t);
        const int rows = tile.end - tile.begin;
        const uint32_t* q = (const uint32_t*)(s.queries + t * query_bytes(plan));
        Partial part = partial_at(partials ? partials + t * tile_floats(plan) : s.partial);
        clear_sums(part);
        bool any;
        if (shared) {
            Pages pages = seen_pages(plan, block, tile, split);
            any = pages.begin < pages.end;
            if (any) attend_pages<kFormat>(plan, block, tile, q, split, pages, *found, s, part);
        } else {
            any = attend_by_row<kFormat>(plan, block, tile, q, split, head_offset, found, s, part);
        }
        if (partials) {
            if (!any) clear_weighted(rows, plan.dim16, part);
        } else if (any) {
            merge_split(rows, plan.dim16, partial_at(s.states + t * tile_floats(plan)), part);
        }
    }
}

template <KVFormat kFormat>
TL_NOINLINE void run_task(const AttentionTables& plan, const AttentionShape& shape, int64_t index, int64_t next,
                          const float* q, int64_t q_stride, void* out, int64_t out_stride, Dtype dtype, const Scratch& s) {
    const AttentionTask& task = plan.tasks[index];
    const AttentionBlock& block = plan.blocks[task.block];
    const int64_t head_offset = shape.layer * plan.layer_bytes + task.kv_head * plan.head_bytes;
    const int tiles = count_tiles(plan, block);
    const bool whole = task.partial < 0;
    pack_queries(plan, block, shape, task.kv_head, q, q_stride, s);
    for (int t = 0; t < tiles && whole; ++t) {
        Partial state = partial_at(s.states + t * tile_floats(plan));
        clear_sums(state);
        clear_weighted(kQueryTile, plan.dim16, state);
    }
    for (int split = task.split_begin; split < task.split_end; ++split) {
        const int64_t done = (int64_t)(split - task.split_begin) * tiles * tile_floats(plan);
        Split found;
        look_ahead(plan, shape, index, next, split, &found);
        float* partials = whole ? 0 : plan.partials + task.partial + done;
        attend_split<kFormat>(plan, block, split, head_offset, &found, s, partials);
    }
    for (int t = 0; t < tiles && whole; ++t)
        finish(plan, block, task.kv_head, tile_at(plan, block, t), partial_at(s.states + t * tile_floats(plan)), out,
               out_stride, dtype);
}

void run(const AttentionTables& plan, const AttentionShape& shape, int64_t task, int64_t next, const float* q,
         int64_t q_stride, void* out, int64_t out_stride, Dtype out_dtype, uint8_t* scratch) {
    const Scratch s = lay_out(plan, scratch);
    if (plan.format == KVFormat::f32)
        run_task<KVFormat::f32>(plan, shape, task, next, q, q_stride, out, out_stride, out_dtype, s);
    else if (plan.format == KVFormat::bf16)
        run_task<KVFormat::bf16>(plan, shape, task, next, q, q_stride, out, out_stride, out_dtype, s);
    else
        run_task<KVFormat::i8>(plan, shape, task, next, q, q_stride, out, out_stride, out_dtype, s);
}

void merge(const AttentionTables& plan, const AttentionShape&, int64_t merge, void* out, int64_t out_stride,
           Dtype out_dtype, uint8_t* scratch) {
    const Scratch s = lay_out(plan, scratch);
    const AttentionMerge& found = plan.merges[merge];
    const AttentionBlock& block = plan.blocks[found.block];
    const int tiles = count_tiles(plan, block);
    for (int t = 0; t < tiles; ++t) {
        Tile tile = tile_at(plan, block, t);
        const int rows = tile.end - tile.begin;
        Partial state = partial_at(s.partial);
        clear_sums(state);
        clear_weighted(rows, plan.dim16, state);
        for (int split = 0; split < block.split_end - block.split_begin; ++split)
            merge_split(rows, plan.dim16, state,
                        partial_at(plan.partials + found.partial + ((int64_t)split * tiles + t) * tile_floats(plan)));
        finish(plan, block, found.kv_head, tile, state, out, out_stride, out_dtype);
    }
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {&run, &merge};

}  // namespace TL_ISA
}  // namespace tokenloom
