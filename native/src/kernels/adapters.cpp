// The first half of a low-rank update, and those of the embedding; see adapters.hpp. The second half of a product's
// update is part of its epilogue (expand.hpp).
#include TL_SIMD

#include "adapters.hpp"
#include "vector_math.hpp"

namespace tokenloom {
namespace TL_ISA {

#define TL_UNROLL _Pragma("GCC unroll 16")

struct Nothing { Nothing() {} ~Nothing() {} };

// 64 bytes of a row at a time.
struct DotF32 {
    typedef Nothing Mode;
    typedef float Item;
    TL_INLINE F step(F sum, const float* x, const float* a) { return fma(load(x), load(a), sum); }
};
struct DotBF16 {
    typedef FlushDenormals Mode;
    typedef uint16_t Item;
    TL_INLINE F step(F sum, const uint16_t* x, const uint16_t* a) { return dot_bf16(sum, iload(a), iload(x)); }
};

// sums[r][i] for ROWS rows of the source and RANKS rows of A. What lies behind the depth of a source may be anything.
template <class Dot, int ROWS, int RANKS>
TL_NOINLINE void dot_tile(const typename Dot::Item* const* x, const uint8_t* const* a, int64_t depth, F* out,
                          const uint8_t* const* ahead) {
    typedef typename Dot::Item Item;
    constexpr int64_t kItems = 64 / sizeof(Item);
    const Item* rows[ROWS];
    const Item* ranks[RANKS];
    F sums[ROWS][RANKS];
    TL_UNROLL for (int r = 0; r < ROWS; ++r) rows[r] = x[r];
    TL_UNROLL for (int j = 0; j < RANKS; ++j) ranks[j] = (const Item*)a[j];
    TL_UNROLL for (int r = 0; r < ROWS; ++r) {
        TL_UNROLL for (int j = 0; j < RANKS; ++j) sums[r][j] = zero();
    }
    int64_t k = 0;
    for (; k + kItems <= depth; k += kItems) {
        if (ahead) {
            TL_UNROLL for (int j = 0; j < RANKS; ++j) prefetch((const Item*)ahead[j] + k);
        }
        TL_UNROLL for (int j = 0; j < RANKS; ++j) {
            TL_UNROLL for (int r = 0; r < ROWS; ++r) sums[r][j] = Dot::step(sums[r][j], rows[r] + k, ranks[j] + k);
        }
    }
    if (k < depth) {
        TL_UNROLL for (int r = 0; r < ROWS; ++r) {
            alignas(64) Item rest[kItems] = {0};
            for (int64_t i = k; i < depth; ++i) rest[i - k] = rows[r][i];
            TL_UNROLL for (int j = 0; j < RANKS; ++j) sums[r][j] = Dot::step(sums[r][j], rest, ranks[j] + k);
        }
    }
    TL_UNROLL for (int r = 0; r < ROWS; ++r) {
        TL_UNROLL for (int j = 0; j < RANKS; ++j) out[r * RANKS + j] = sums[r][j];
    }
}

template <class Dot, int ROWS, int RANKS>
static void tile(const ShrinkCall& call, int64_t row, int64_t rank) {
    const typename Dot::Item* x[ROWS];
    for (int r = 0; r < ROWS; ++r)
        x[r] = (const typename Dot::Item*)call.source + call.rows[row + r] * call.source_stride;
    F sums[ROWS * RANKS];
    const bool more = row == 0 && rank + 2 * RANKS <= call.ranks;
    {
        typename Dot::Mode mode;
        dot_tile<Dot, ROWS, RANKS>(x, call.a + rank, call.depth, sums, more ? call.a + rank + RANKS : nullptr);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < RANKS; ++j)
            call.out[call.rows[row + r] * call.out_stride + rank + j] =
                sum(sums[r * RANKS + j]) * call.scales[rank + j];
}

template <class Dot, int RANKS>
static void all_rows(const ShrinkCall& call, int64_t rank) {
    constexpr int kRows = RANKS >= 8 ? 2 : 4;
    int64_t row = 0;
    for (; row + kRows <= call.count; row += kRows) tile<Dot, kRows, RANKS>(call, row, rank);
    for (; row < call.count; ++row) tile<Dot, 1, RANKS>(call, row, rank);
}

template <class Dot>
static void shrink_all(const ShrinkCall& call) {
    int64_t rank = 0;
    if (call.count == 1)
        for (; rank + 8 <= call.ranks; rank += 8) all_rows<Dot, 8>(call, rank);
    for (; rank + 4 <= call.ranks; rank += 4) all_rows<Dot, 4>(call, rank);
    for (; rank < call.ranks; ++rank) all_rows<Dot, 1>(call, rank);
}

static void shrink(const ShrinkCall& call) {
    if (call.dtype == Dtype::bf16) shrink_all<DotBF16>(call); else shrink_all<DotF32>(call);
}

static void embed(const uint8_t* a, const uint8_t* const* b, Dtype dtype, int64_t rank, float scale, int64_t width,
                  float* out) {
    for (int64_t n = 0; n < width; n += kLanes) {
        const int count = width - n < kLanes ? (int)(width - n) : kLanes;
        F total = zero();
        for (int64_t j = 0; j < rank; ++j) {
            float v;
            if (dtype == Dtype::bf16) {
                const uint32_t bits = (uint32_t)((const uint16_t*)a)[j] << 16;
                __builtin_memcpy(&v, &bits, 4);
                total = fma(load_bf16((const uint16_t*)b[j] + n, count), set(v * scale), total);
            } else {
                v = ((const float*)a)[j];
                total = fma(load((const float*)b[j] + n, count), set(v * scale), total);
            }
        }
        store(out + n, add(load(out + n, count), total), count);
    }
}

extern const AdapterKernels adapter_kernels;
const AdapterKernels adapter_kernels = {&shrink, &embed};

}  // namespace TL_ISA
}  // namespace tokenloom
