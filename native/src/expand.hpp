// The second half of a low-rank update, in the epilogue of its product (spec.expand). Included once per instruction
// set, after vector_math.hpp.
#pragma once

#include "kernels.hpp"

namespace tokenloom {
namespace TL_ISA {

constexpr int kExpandRows = kMaxTileRows < 4 ? kMaxTileRows : 4;

TL_INLINE F load_update(const uint8_t* p, Dtype dtype, int64_t at) {
    return dtype == Dtype::bf16 ? load_bf16((const uint16_t*)p + at) : load((const float*)p + at);
}

// delta[r][half][16] += sum over j of v[r][j] * b[j][half][16], a chain of fused steps for each block.
template <int ROWS, int HALVES>
TL_NOINLINE void expand_block(const uint8_t* b, Dtype dtype, int64_t rank, const float* v, int64_t stride, float* delta) {
    F sums[ROWS][HALVES];
    for (int r = 0; r < ROWS; ++r)
        for (int h = 0; h < HALVES; ++h) sums[r][h] = zero();
    for (int64_t j = 0; j < rank; ++j) {
        F w[HALVES];
        for (int h = 0; h < HALVES; ++h) w[h] = load_update(b, dtype, (j * HALVES + h) * kLanes);
        for (int r = 0; r < ROWS; ++r) {
            const F x = set(v[r * stride + j]);
            for (int h = 0; h < HALVES; ++h) sums[r][h] = fma(w[h], x, sums[r][h]);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int h = 0; h < HALVES; ++h) {
            float* p = delta + r * kPanel + h * kLanes;
            store(p, add(load(p), sums[r][h]));
        }
}

template <int ROWS>
static void expand_rows(const AdapterRows& adapters, const ProductUpdate& update, int64_t panel, int64_t row,
                        float* delta, bool* found) {
    for (int32_t i = 0; i < update.count; ++i) {
        const AdapterBlock& block = update.blocks[i];
        const int64_t index = panel - block.first_panel;
        if (index < 0 || index >= block.num_panels) continue;
        if (!*found)
            for (int64_t k = 0; k < ROWS * kPanel; k += kLanes) store(delta + k, zero());
        *found = true;
        const float* v = adapters.shrunk + row * adapters.stride + block.first_rank;
        if (index + 1 < block.num_panels) {
            const uint8_t* next = block.b[index + 1];
            const int64_t bytes = block.rank * (block.half < 0 ? kPanel : kLanes) * (adapters.dtype == Dtype::bf16 ? 2 : 4);
            for (int64_t at = 0; at < bytes; at += 64) prefetch(next + at);
        }
        if (block.half < 0)
            expand_block<ROWS, 2>(block.b[index], adapters.dtype, block.rank, v, adapters.stride, delta);
        else
            expand_block<ROWS, 1>(block.b[index], adapters.dtype, block.rank, v, adapters.stride,
                                  delta + block.half * kLanes);
    }
}

// What the adapters of rows [row, row + rows) add to a panel: delta [rows][32], where found[r].
static void expand(const AdapterRows& adapters, int64_t panel, int64_t row, int64_t rows, float* delta, bool* found) {
    for (int64_t r = 0; r < rows;) {
        const int32_t slot = adapters.slots[row + r];
        int64_t same = 1;
        while (same < kExpandRows && r + same < rows && adapters.slots[row + r + same] == slot) ++same;
        if (same < kExpandRows) same = 1;
        found[r] = false;
        if (slot >= 0) {
            const ProductUpdate& update = adapters.tables[slot][adapters.product];
            if (same == kExpandRows)
                expand_rows<kExpandRows>(adapters, update, panel, row + r, delta + r * kPanel, found + r);
            else
                expand_rows<1>(adapters, update, panel, row + r, delta + r * kPanel, found + r);
        }
        for (int64_t i = 1; i < same; ++i) found[r + i] = found[r];
        r += same;
    }
}

}  // namespace TL_ISA
}  // namespace tokenloom
