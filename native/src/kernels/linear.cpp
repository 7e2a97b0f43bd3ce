// Products of activations and packed weights; see linear.hpp and spec.linear_*.
//
// One step of the depth is 128 bytes of a panel (32 columns of 4 bytes) and 4 bytes of each row, in every
// format: one fp32, a pair of bf16, a quad of bytes. A register tile of rows by 32 columns keeps one sum per
// output element from the first step to the last; where the depth is cut into blocks for the caches, the sums
// are stored and continued.
#include TL_SIMD

#include "linear.hpp"
#include "vector_math.hpp"

namespace tokenloom {
namespace TL_ISA {

#define TL_UNROLL _Pragma("GCC unroll 16")

constexpr int64_t kStepBytes = 128;
constexpr int kBlockRows = 40 * kMaxTileRows;  // rows whose sums lie in the scratch of one call
constexpr int kPairRows = 3;                   // up to here two panels run side by side
constexpr int64_t kPrefetch = 4096;            // bytes ahead in the stream of weights

struct Nothing { Nothing() {} ~Nothing() {} };

struct StepF32 {
    typedef Nothing Mode;
    typedef F Sum;
    typedef F Weight;
    TL_INLINE F none() { return zero(); }
    TL_INLINE F from(const float* p) { return load(p); }
    TL_INLINE void to(float* p, F sum) { store(p, sum); }
    TL_INLINE F weight(const uint8_t* p) { return load((const float*)p); }
    TL_INLINE F source(const uint8_t* p) { return set(*(const float*)p); }
    TL_INLINE F last(const uint8_t* p) { return source(p); }
    TL_INLINE F step(F sum, F weight, F source) { return fma(source, weight, sum); }
};

struct StepBF16 {
    typedef FlushDenormals Mode;
    typedef F Sum;
    typedef I Weight;
    TL_INLINE F none() { return zero(); }
    TL_INLINE F from(const float* p) { return load(p); }
    TL_INLINE void to(float* p, F sum) { store(p, sum); }
    TL_INLINE I weight(const uint8_t* p) { return iload(p); }
    TL_INLINE I source(const uint8_t* p) { return iset(*(const int32_t*)p); }
    // What lies behind an odd depth may be anything.
    TL_INLINE I last(const uint8_t* p) { return iset(*(const uint16_t*)p); }
    TL_INLINE F step(F sum, I weight, I source) { return dot_bf16(sum, weight, source); }
};

// A run of steps for one register tile.
struct Run {
    const uint8_t* weight;  // of the first panel
    int64_t panel_bytes;
    const uint8_t* source;  // of the first row
    int64_t stride;         // bytes between rows
    int64_t steps;
    bool odd;               // one more step, of which only the first half of the source counts
    bool first;             // sums start at zero, else they go on
    float* sums;            // [row][32], the second panel `panel_sums` later
    int64_t panel_sums;
    const uint8_t* ahead;   // what to fetch meanwhile: `lines` cache lines every 4 steps
    int lines;
};

// Keeps the compiler from turning a pointer into an offset from another: a tile has more rows than the
// machine has addresses, so three rows share a pointer.
TL_INLINE const uint8_t* opaque(const uint8_t* p) {
    __asm__("" : "+r"(p));
    return p;
}

template <class Step, int ROWS, int PANELS>
TL_NOINLINE void multiply(const Run& run) {
    constexpr int kVectors = 2 * PANELS, kBases = (ROWS + 2) / 3;
    typename Step::Sum sums[ROWS][kVectors];
    TL_UNROLL for (int r = 0; r < ROWS; ++r) {
        TL_UNROLL for (int v = 0; v < kVectors; ++v) {
            const float* p = run.sums + v / 2 * run.panel_sums + r * kPanel + v % 2 * kLanes;
            sums[r][v] = run.first ? Step::none() : Step::from(p);
        }
    }
    const int64_t stride = run.stride, panel_bytes = run.panel_bytes;
    const uint8_t* weight = run.weight;
    const uint8_t* base[kBases];
    TL_UNROLL for (int b = 0; b < kBases; ++b) base[b] = opaque(run.source + 3 * b * stride);
    const uint8_t* ahead = run.ahead;
    const int lines = run.lines;
    auto step = [&](int64_t u, auto source) __attribute__((always_inline)) {
        typename Step::Weight w[kVectors];
        TL_UNROLL for (int v = 0; v < kVectors; ++v)
            w[v] = Step::weight(weight + v / 2 * panel_bytes + u * kStepBytes + v % 2 * 64);
        TL_UNROLL for (int r = 0; r < ROWS; ++r) {
            typename Step::Weight x = source(base[r / 3] + r % 3 * stride + 4 * u);
            TL_UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = Step::step(sums[r][v], w[v], x);
        }
    };
    auto whole = [](const uint8_t* p) __attribute__((always_inline)) { return Step::source(p); };
    auto half = [](const uint8_t* p) __attribute__((always_inline)) { return Step::last(p); };
    int64_t left = run.steps;
    for (; left >= 4; left -= 4) {
        for (int i = 0; i < lines; ++i) {
            prefetch(ahead);
            if (PANELS == 2) prefetch(ahead + panel_bytes);
            ahead += 64;
        }
        TL_UNROLL for (int u = 0; u < 4; ++u) step(u, whole);
        weight += 4 * kStepBytes;
        TL_UNROLL for (int b = 0; b < kBases; ++b) base[b] = opaque(base[b] + 16);
    }
    for (; left > 0; --left) {
        step(0, whole);
        weight += kStepBytes;
        TL_UNROLL for (int b = 0; b < kBases; ++b) base[b] = opaque(base[b] + 4);
    }
    if (run.odd) step(0, half);
    TL_UNROLL for (int r = 0; r < ROWS; ++r) {
        TL_UNROLL for (int v = 0; v < kVectors; ++v)
            Step::to(run.sums + v / 2 * run.panel_sums + r * kPanel + v % 2 * kLanes, sums[r][v]);
    }
}

template <class Step, int PANELS>
static void multiply_rows(const Run& run, int rows) {
    static_assert(kMaxTileRows <= 12, "more tile heights");
#define TL_HEIGHT(n) \
    case n: multiply<Step, (n < kMaxTileRows ? n : kMaxTileRows), PANELS>(run); break;
    switch (rows) {
        TL_HEIGHT(1) TL_HEIGHT(2) TL_HEIGHT(3) TL_HEIGHT(4) TL_HEIGHT(5) TL_HEIGHT(6)
        TL_HEIGHT(7) TL_HEIGHT(8) TL_HEIGHT(9) TL_HEIGHT(10) TL_HEIGHT(11) TL_HEIGHT(12)
    }
#undef TL_HEIGHT
}
template <class Step>
static void multiply_pair(const Run& run, int rows) {
    switch (rows) {
        case 1: multiply<Step, 1, 2>(run); break;
        case 2: multiply<Step, 2, 2>(run); break;
        default: multiply<Step, 3, 2>(run); break;
    }
}

// --- what happens to the sums ---------------------------------------------------------------------------
// Where 16 columns of a panel lie in the result, and how many of them exist.
struct Columns {
    int64_t at;
    int count;
};
TL_INLINE Columns columns_of(const PackedMatrix& weight, int64_t panel, int half) {
    int64_t at, end;
    if (weight.paired) {
        at = panel * kLanes + half * (weight.n / 2);
        end = half ? weight.n : weight.n / 2;
    } else {
        at = panel * kPanel + half * kLanes;
        end = weight.n;
    }
    int64_t count = end - at;
    return {at, count <= 0 ? 0 : count < kLanes ? (int)count : kLanes};
}

TL_INLINE void put(const LinearCall& call, int64_t row, Columns at, F y) {
    if (call.out_dtype == Dtype::bf16) {
        uint16_t* p = (uint16_t*)call.out + row * call.out_stride + at.at;
        if (at.count == kLanes) store_bf16(p, y); else store_bf16(p, y, at.count);
        return;
    }
    float* p = (float*)call.out + row * call.out_stride + at.at;
    if (call.epilogue == Epilogue::residual) y = add(load(p, at.count), y);
    store(p, y, at.count);
}

// Adds bias and delta and writes rows [row, row + rows) of a panel whose sums are [row][32].
TL_NOINLINE void finish(const LinearCall& call, int64_t panel, int64_t row, int64_t rows, const float* sums) {
    const Columns at[2] = {columns_of(*call.weight, panel, 0), columns_of(*call.weight, panel, 1)};
    F bias[2] = {zero(), zero()};
    for (int half = 0; half < 2; ++half)
        if (call.bias && at[half].count) bias[half] = load(call.bias + at[half].at, at[half].count);
    for (int64_t r = row; r < row + rows; ++r, sums += kPanel) {
        F y[2];
        for (int half = 0; half < 2; ++half) {
            y[half] = load(sums + half * kLanes);
            if (call.bias) y[half] = add(y[half], bias[half]);
            if (call.delta && at[half].count)
                y[half] = add(y[half], load(call.delta + r * call.delta_stride + at[half].at, at[half].count));
        }
        if (call.epilogue == Epilogue::silu_mul) {
            put(call, r, at[0], silu_mul(y[0], y[1]));
        } else {
            for (int half = 0; half < 2; ++half)
                if (at[half].count) put(call, r, at[half], y[half]);
        }
    }
}

// --- the loops over panels, depth and rows ----------------------------------------------------------------
TL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Steps of the depth whose weights stay in the first cache while all row tiles pass.
#ifndef TL_BLOCK_STEPS
#define TL_BLOCK_STEPS 256
#endif
constexpr int64_t kBlockSteps = TL_BLOCK_STEPS;

template <class Step>
static void product(const LinearCall& call, int64_t begin, int64_t end, int64_t steps, bool odd, int64_t item) {
    alignas(64) float sums[kBlockRows * kPanel];
    const PackedMatrix& weight = *call.weight;
    const uint8_t* source = (const uint8_t*)call.source;
    const int64_t stride = call.source_stride * item;
    for (int64_t row = 0; row < call.rows; row += kBlockRows) {
        const int64_t rows = least(call.rows - row, kBlockRows);
        const int64_t tiles = (rows + kMaxTileRows - 1) / kMaxTileRows;
        const bool pair = rows <= kPairRows;
        for (int64_t panel = begin; panel < end;) {
            const int panels = pair && panel + 1 < end ? 2 : 1;
            const uint8_t* data = weight.data + panel * weight.panel_bytes;
            const int64_t block = tiles > 1 || steps < 1 ? kBlockSteps : steps;
            for (int64_t first = 0; first == 0 || first < steps; first += block) {
                Run run;
                run.weight = data + first * kStepBytes;
                run.panel_bytes = weight.panel_bytes;
                run.stride = stride;
                run.steps = least(block, steps - first);
                run.odd = odd && first + run.steps == steps;
                run.first = first == 0;
                run.panel_sums = kPairRows * kPanel;
                run.lines = tiles >= 8 ? 1 : tiles >= 3 ? 2 : tiles == 2 ? 4 : 8;
                typename Step::Mode mode;
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const int64_t r0 = rows * tile / tiles, r1 = rows * (tile + 1) / tiles;
                    run.source = source + (row + r0) * stride + first * 4;
                    run.sums = sums + r0 * kPanel;
                    // One tile: some way ahead in the same stream. Several: a share of the next panel each.
                    run.ahead = tiles == 1 ? run.weight + kPrefetch
                                           : data + weight.panel_bytes + first * kStepBytes +
                                                 tile * (run.steps / 4) * run.lines * 64;
                    if (panels == 2) multiply_pair<Step>(run, (int)(r1 - r0));
                    else multiply_rows<Step, 1>(run, (int)(r1 - r0));
                }
            }
            for (int p = 0; p < panels; ++p) finish(call, panel + p, row, rows, sums + p * kPairRows * kPanel);
            panel += panels;
        }
    }
}

TL_NOINLINE void product_bf16(const LinearCall& call, int64_t begin, int64_t end) {
    product<StepBF16>(call, begin, end, call.weight->k / 2, call.weight->k % 2 != 0, 2);
}
TL_NOINLINE void product_f32(const LinearCall& call, int64_t begin, int64_t end) {
    product<StepF32>(call, begin, end, call.weight->k, false, 4);
}

static void linear(const LinearCall& call, int64_t begin, int64_t end) {
    if (call.weight->format == Format::f32) product_f32(call, begin, end);
    else product_bf16(call, begin, end);
}

static void quantize_rows(const void*, Dtype, int64_t, const PackedMatrix&, const QuantizedRows&, int64_t, int64_t) {}

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {&linear, &quantize_rows};

}  // namespace TL_ISA
}  // namespace tokenloom
