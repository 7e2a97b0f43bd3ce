// Products of activations and packed weights; see linear.hpp and spec.linear_*.
//
// One step of the depth is 128 bytes of a panel (32 columns of 4 bytes) and 4 bytes of each row, in every
// format: one fp32, a pair of bf16, a quad of bytes. A register tile of rows by 32 columns keeps one sum per
// output element from the first step to the last; where the depth is cut into blocks for the caches, the sums
// are stored and continued.
#include TL_SIMD

#include "linear.hpp"
#include "vector_math.hpp"
#include "expand.hpp"

namespace tokenloom {
namespace TL_ISA {

#define TL_UNROLL _Pragma("GCC unroll 16")

constexpr int64_t kStepBytes = 128;
constexpr int kVectors = 2;                    // of a step
// Rows that share one pass over the panels at most: their sums lie in the scratch of the call, their source in
// the second cache.
constexpr int kBlockRows = 22 * kMaxTileRows;
constexpr int64_t kPrefetch = 8192;            // bytes ahead in the stream of weights

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

struct StepI8 {
    typedef Nothing Mode;
    typedef I Sum;
    typedef I Weight;
    TL_INLINE I none() { return izero(); }
    TL_INLINE I from(const float* p) { return iload(p); }
    TL_INLINE void to(float* p, I sum) { istore(p, sum); }
    TL_INLINE I weight(const uint8_t* p) { return iload(p); }
    TL_INLINE I source(const uint8_t* p) { return iset(*(const int32_t*)p); }
    TL_INLINE I last(const uint8_t* p) { return source(p); }
    TL_INLINE I step(I sum, I weight, I source) { return dot_u8s8(sum, weight, source); }
};

// A run of steps for one register tile.
struct Run {
    const uint8_t* weight;
    const uint8_t* source;  // of the first row
    int64_t stride;         // bytes between rows
    int64_t steps;
    bool odd;               // one more step, of which only the first half of the source counts
    bool first;             // sums start at zero, else they go on
    float* sums;            // [row][32]
    const uint8_t* ahead;   // what to fetch meanwhile: `lines` cache lines every 4 steps (i4: 2)
    int lines;
};

// Keeps the compiler from turning a pointer into an offset from another: a tile has more rows than the
// machine has addresses, so three rows share a pointer.
TL_INLINE const uint8_t* opaque(const uint8_t* p) {
    __asm__("" : "+r"(p));
    return p;
}

template <class Step, int ROWS>
TL_NOINLINE void multiply(const Run& run) {
    constexpr int kBases = (ROWS + 2) / 3;
    typename Step::Sum sums[ROWS][kVectors];
    TL_UNROLL for (int r = 0; r < ROWS; ++r) {
        TL_UNROLL for (int v = 0; v < kVectors; ++v) {
            const float* p = run.sums + r * kPanel + v * kLanes;
            sums[r][v] = run.first ? Step::none() : Step::from(p);
        }
    }
    const int64_t stride = run.stride;
    const uint8_t* weight = run.weight;
    const uint8_t* base[kBases];
    TL_UNROLL for (int b = 0; b < kBases; ++b) base[b] = opaque(run.source + 3 * b * stride);
    const uint8_t* ahead = run.ahead;
    const int lines = run.lines;
    auto step = [&](int64_t u, auto source) __attribute__((always_inline)) {
        typename Step::Weight w[kVectors];
        TL_UNROLL for (int v = 0; v < kVectors; ++v)
            w[v] = Step::weight(weight + u * kStepBytes + v * 64);
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
            Step::to(run.sums + r * kPanel + v * kLanes, sums[r][v]);
    }
}

// work(At<0>), work(At<1>), ... in place: with constant indices from the start, arrays of vectors become registers.
template <int N> struct At { static constexpr int value = N; };
template <int FIRST, int COUNT, class Work> TL_INLINE void each_from(const Work& work) {
    if constexpr (FIRST < COUNT) {
        work(At<FIRST>());
        each_from<FIRST + 1, COUNT>(work);
    }
}
template <int COUNT, class Work> TL_INLINE void each(const Work& work) { each_from<0, COUNT>(work); }
#define TL_EACH(name, count) each<count>([&](auto name) __attribute__((always_inline))

// What an i4 product needs beyond a run: the sums of the quantised rows, per group.
struct Groups {
    int64_t count;
    int64_t pairs;         // steps of 8 weights in a group
    int64_t bytes;         // of a group
    const int32_t* sums;   // of the first row
};

// 16 of the 32 scales or zero points behind the weights of a group.
TL_INLINE F group_scale(const uint8_t* tail, int half) { return load_f16((const uint16_t*)tail + half * kLanes); }
TL_INLINE I group_zero(const uint8_t* tail, int half) { return load_u8(tail + 2 * kPanel + half * kLanes); }

// A vector of weights holds two steps, low and high nibbles. The sums of a group are exact; the running totals
// stay in memory and take one fused step per group.
template <int ROWS>
TL_NOINLINE void multiply_i4(const Run& run, const Groups& groups) {
    constexpr int kBases = (ROWS + 2) / 3;
    const I low_bits = iset(0x0f0f0f0f);
    const int64_t stride = run.stride;
    const uint8_t* weight = run.weight;
    const uint8_t* base[kBases];
    TL_EACH(b, kBases) { base[b.value] = opaque(run.source + 3 * b.value * stride); });
    const uint8_t* ahead = run.ahead;
    const int lines = run.lines;
    for (int64_t g = 0; g < groups.count; ++g, weight += groups.bytes) {
        I sums[ROWS][kVectors];
        TL_EACH(r, ROWS) { TL_EACH(v, kVectors) { sums[r.value][v.value] = izero(); }); });
        const uint8_t* p = weight;
        for (int64_t left = groups.pairs; left > 0; --left) {
            for (int i = 0; i < lines; ++i) {
                prefetch(ahead);
                ahead += 64;
            }
            TL_EACH(nibble, 2) {
                I w[kVectors];
                TL_EACH(v, kVectors) {
                    I both = iload(p + v.value * 64);
                    w[v.value] = iand(nibble.value ? shr<4>(both) : both, low_bits);
                });
                TL_EACH(r, ROWS) {
                    const I x = iset(*(const int32_t*)(base[r.value / 3] + r.value % 3 * stride + 4 * nibble.value));
                    TL_EACH(v, kVectors) {
                        sums[r.value][v.value] = dot_u8s8(sums[r.value][v.value], w[v.value], x);
                    });
                });
            });
            p += kStepBytes;
            TL_EACH(b, kBases) { base[b.value] = opaque(base[b.value] + 8); });
        }
        TL_EACH(v, kVectors) {
            const F scale = group_scale(p, v.value);
            const I zeros = group_zero(p, v.value);
            TL_EACH(r, ROWS) {
                float* total = run.sums + r.value * kPanel + v.value * kLanes;
                const I shift = imul(zeros, iset(groups.sums[r.value * groups.count + g]));
                const I exact = isub(sums[r.value][v.value], shift);
                store(total, fma(to_float(exact), scale, load(total)));
            });
        });
    }
}

// A tile as high as it must be; TILE(height) is the statement that runs it.
#define TL_FOR_HEIGHT(rows, TILE)                                                  \
    switch (rows) {                                                                \
        case 1: TILE(1); break;                                                    \
        case 2: TILE(2); break;                                                    \
        case 3: TILE(3); break;                                                    \
        case 4: TILE(4); break;                                                    \
        case 5: TILE(5); break;                                                    \
        case 6: TILE(6); break;                                                    \
        case 7: TILE(7); break;                                                    \
        case 8: TILE(8); break;                                                    \
        case 9: TILE(9); break;                                                    \
        case 10: TILE(10); break;                                                  \
        case 11: TILE(11); break;                                                  \
        case 12: TILE(12); break;                                                  \
    }
static_assert(kMaxTileRows <= 12, "more tile heights");
constexpr int capped(int rows) { return rows < kMaxTileRows ? rows : kMaxTileRows; }

template <class Step>
static void multiply_tile(const Run& run, int rows) {
#define TL_TILE(n) multiply<Step, capped(n)>(run)
    TL_FOR_HEIGHT(rows, TL_TILE)
#undef TL_TILE
}
static void multiply_tile_i4(const Run& run, const Groups& groups, int rows) {
#define TL_TILE(n) multiply_i4<capped(n)>(run, groups)
    TL_FOR_HEIGHT(rows, TL_TILE)
#undef TL_TILE
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
    float* p = (float*)call.out + (call.out_rows ? call.out_rows[row] : row) * call.out_stride + at.at;
    if (call.epilogue == Epilogue::residual) {
        if (call.scale != 1.0f) y = mul(y, set(call.scale));
        if (call.out_weights) y = mul(y, set(call.out_weights[row]));
        y = add(load(p, at.count), y);
    }
    store(p, y, at.count);
}

// Adds bias and the updates of adapters and writes rows [row, row + rows) of a panel whose sums are [row][32].
TL_NOINLINE void finish(const LinearCall& call, int64_t panel, int64_t row, int64_t rows, const float* sums) {
    const Columns at[2] = {columns_of(*call.weight, panel, 0), columns_of(*call.weight, panel, 1)};
    F bias[2] = {zero(), zero()};
    for (int half = 0; half < 2; ++half)
        if (call.bias && at[half].count) bias[half] = load(call.bias + at[half].at, at[half].count);
    alignas(64) float delta[kMaxTileRows * kPanel];
    bool found[kMaxTileRows] = {false};
    if (call.adapters) expand(*call.adapters, panel, row, rows, delta, found);
    for (int64_t r = row; r < row + rows; ++r, sums += kPanel) {
        F y[2];
        for (int half = 0; half < 2; ++half) {
            y[half] = load(sums + half * kLanes);
            if (call.bias) y[half] = add(y[half], bias[half]);
            if (found[r - row]) y[half] = add(y[half], load(delta + (r - row) * kPanel + half * kLanes));
        }
        if (call.epilogue == Epilogue::silu_mul) {
            put(call, r, at[0], silu_mul(y[0], y[1]));
        } else if (call.epilogue == Epilogue::gelu_mul) {
            put(call, r, at[0], mul(gelu(y[0]), y[1]));
        } else {
            for (int half = 0; half < 2; ++half) {
                if (call.epilogue == Epilogue::gelu) y[half] = gelu(y[half]);
                if (call.epilogue == Epilogue::gelu_erf) y[half] = gelu_erf(y[half]);
                if (call.epilogue == Epilogue::relu) y[half] = max(y[half], zero());
                if (at[half].count) put(call, r, at[half], y[half]);
            }
        }
    }
}

// Sums of integer products become floats in place.
TL_NOINLINE void scale_i8(const LinearCall& call, int64_t panel, int64_t row, int64_t rows, float* sums) {
    for (int half = 0; half < 2; ++half) {
        const F scale = load(call.weight->scales + panel * kPanel + half * kLanes);
        for (int64_t r = 0; r < rows; ++r) {
            float* p = sums + r * kPanel + half * kLanes;
            // Weights are stored with 128 added.
            const I exact = isub(iload(p), shl<7>(iset(call.quantized.sums[row + r])));
            store(p, mul(mul(to_float(exact), scale), set(call.quantized.scales[row + r])));
        }
    }
}
TL_NOINLINE void scale_i4(const LinearCall& call, int64_t row, int64_t rows, float* sums) {
    for (int64_t r = 0; r < rows; ++r) {
        const F scale = set(call.quantized.scales[row + r]);
        for (int half = 0; half < 2; ++half) {
            float* p = sums + r * kPanel + half * kLanes;
            store(p, mul(load(p), scale));
        }
    }
}

// The sums of some rows become results.
static void deliver(const LinearCall& call, int64_t panel, int64_t row, int64_t rows, float* sums) {
    if (call.weight->format == Format::i8) scale_i8(call, panel, row, rows, sums);
    if (call.weight->format == Format::i4) scale_i4(call, row, rows, sums);
    finish(call, panel, row, rows, sums);
}

// --- the loops over panels, depth and rows ----------------------------------------------------------------
TL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The part of a call that one pass over the panels takes: rows [row, row + rows), cut into balanced tiles.
struct Block {
    const LinearCall* call;
    int64_t row, rows, tiles;
    const uint8_t* source;  // of the first row
    int64_t stride;         // bytes
    float* sums;            // [rows][32]
};

// Steps of the depth that all row tiles share before the next ones: their weights stay in the second cache.
constexpr int64_t kBlockSteps = 1024;

// Fetching ahead: a single tile some way ahead in its own stream, several tiles a share each of what lies
// `panel_bytes` ahead. `lines` of them cover `total` lines per iteration.
TL_INLINE void plan_fetch(Run& run, int64_t tile, int64_t tiles, int64_t iterations, int total,
                          int64_t panel_bytes) {
    if (tiles == 1) {
        run.lines = total;
        run.ahead = run.weight + kPrefetch;
        return;
    }
    const int lines = tiles >= total ? 1 : (int)((total + tiles - 1) / tiles);
    run.lines = tile * lines < total ? lines : 0;
    run.ahead = run.weight + panel_bytes + tile * lines * iterations * 64;
}

// `steps` of the depth, and if `odd` half a step more.
template <class Step>
static void run_panel(const Block& block, int64_t panel, int64_t steps, bool odd) {
    const PackedMatrix& weight = *block.call->weight;
    const int64_t length = block.tiles > 1 || steps < 1 ? kBlockSteps : steps;
    for (int64_t first = 0; first == 0 || first < steps; first += length) {
        Run run;
        run.weight = weight.data + panel * weight.panel_bytes + first * kStepBytes;
        run.stride = block.stride;
        run.steps = least(length, steps - first);
        run.first = first == 0;
        const bool last = first + run.steps == steps;
        run.odd = odd && last;
        for (int64_t tile = 0; tile < block.tiles; ++tile) {
            const int64_t begin = block.rows * tile / block.tiles, end = block.rows * (tile + 1) / block.tiles;
            run.source = block.source + begin * block.stride + first * 4;
            run.sums = block.sums + begin * kPanel;
            plan_fetch(run, tile, block.tiles, run.steps / 4, 8, weight.panel_bytes);
            {
                typename Step::Mode mode;
                multiply_tile<Step>(run, (int)(end - begin));
            }
            if (last) deliver(*block.call, panel, block.row + begin, end - begin, run.sums);
        }
    }
}

static void run_panel_i4(const Block& block, int64_t panel) {
    const PackedMatrix& weight = *block.call->weight;
    Groups groups;
    groups.count = (weight.k + weight.group - 1) / weight.group;
    groups.pairs = weight.group / 8;
    groups.bytes = weight.panel_bytes / groups.count;
    Run run;
    run.weight = weight.data + panel * weight.panel_bytes;
    run.stride = block.stride;
    for (int64_t tile = 0; tile < block.tiles; ++tile) {
        const int64_t begin = block.rows * tile / block.tiles, end = block.rows * (tile + 1) / block.tiles;
        run.source = block.source + begin * block.stride;
        run.sums = block.sums;
        for (int64_t i = 0; i < (end - begin) * kPanel; i += kLanes) store(run.sums + i, zero());
        groups.sums = block.call->quantized.sums + (block.row + begin) * groups.count;
        plan_fetch(run, tile, block.tiles, groups.count * groups.pairs, 2, weight.panel_bytes);
        multiply_tile_i4(run, groups, (int)(end - begin));
        deliver(*block.call, panel, block.row + begin, end - begin, run.sums);
    }
}

static void linear(const LinearCall& call, int64_t begin, int64_t end) {
    alignas(64) float sums[kBlockRows * kPanel];
    const PackedMatrix& weight = *call.weight;
    const bool quantized = is_quantized(weight);
    const int64_t stride = quantized ? call.quantized.stride
                                     : call.source_stride * (weight.format == Format::f32 ? 4 : 2);
    const uint8_t* source = quantized ? (const uint8_t*)call.quantized.values : (const uint8_t*)call.source;
    const int64_t blocks = (call.rows + kBlockRows - 1) / kBlockRows;
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t row = call.rows * i / blocks, rows = call.rows * (i + 1) / blocks - row;
        const int64_t tiles = (rows + kMaxTileRows - 1) / kMaxTileRows;
        const Block block = {&call, row, rows, tiles, source + row * stride, stride, sums};
        for (int64_t panel = begin; panel < end; ++panel) {
            switch (weight.format) {
                case Format::f32: run_panel<StepF32>(block, panel, weight.k, false); break;
                case Format::bf16: run_panel<StepBF16>(block, panel, weight.k / 2, weight.k % 2 != 0); break;
                case Format::i8: run_panel<StepI8>(block, panel, (weight.k + 3) / 4, false); break;
                case Format::i4: run_panel_i4(block, panel); break;
            }
        }
    }
}

// --- quantised rows ---------------------------------------------------------------------------------------
TL_INLINE F load_source(const void* row, Dtype dtype, int64_t at, int64_t k) {
    const int count = (int)least(k - at, kLanes);
    if (dtype == Dtype::f32) return load((const float*)row + at, count);
    const uint16_t* p = (const uint16_t*)row + at;
    return count == kLanes ? load_bf16(p) : load_bf16(p, count);
}

TL_INLINE int32_t sum_bytes(const int8_t* p, int64_t count) {
    I total = izero();
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) total = dot_u8s8(total, iset(0x01010101), iload(p + i));
    int32_t rest = 0;
    for (; i < count; ++i) rest += p[i];
    return rest + isum(total);
}

// spec.quantize_row. A maximum and a clip that compare in this order never give NaN, so that a broken row is
// garbage within [-127, 127].
static void quantize_rows(const void* source, Dtype dtype, int64_t stride, const PackedMatrix& weight,
                          const QuantizedRows& out, int64_t begin, int64_t end) {
    const int64_t k = weight.k, group = weight.format == Format::i4 ? weight.group : out.stride;
    const F low = set(-127.0f), high = set(127.0f);
    for (int64_t row = begin; row < end; ++row) {
        const void* x = (const uint8_t*)source + row * stride * (dtype == Dtype::f32 ? 4 : 2);
        int8_t* values = out.values + row * out.stride;
        F largest = zero();
        for (int64_t i = 0; i < k; i += kLanes) {
            const F v = load_source(x, dtype, i, k);
            largest = max(as_float(iand(as_int(v), iset(0x7fffffff))), largest);
        }
        float scale = max_lane(largest) / 127.0f;
        if (scale < 0x1p-126f) scale = 1.0f;
        int64_t i = 0;
        for (; i < k; i += kLanes) {
            const F v = round_even(div(load_source(x, dtype, i, k), set(scale)));
            store_i8(values + i, to_int(min(max(v, low), high)));
        }
        for (; i < out.stride; ++i) values[i] = 0;
        out.scales[row] = scale;
        int32_t* sums = out.sums + row * out.groups;
        for (int64_t g = 0; g < out.groups; ++g)
            sums[g] = sum_bytes(values + g * group, least(group, out.stride - g * group));
    }
}

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {&linear, &quantize_rows};

}  // namespace TL_ISA
}  // namespace tokenloom
