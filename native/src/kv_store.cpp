#include "kv_store.hpp"

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

TL_DECLARE_PER_ISA(KVStoreKernels, kv_store_kernels)
TL_DEFINE_PER_ISA(KVStoreKernels, kv_store_kernels)

namespace tokenloom {

KVTarget kv_target(const KVPool& pool, int64_t layer) {
    const KVLayout& layout = pool.layout;
    if (layout.format != KVFormat::f32 && layout.head_dim % 2)
        throw std::invalid_argument("head_dim is odd");  // pairs of dimensions
    if (layout.head_dim > kMaxHeadDim)
        throw std::invalid_argument("head_dim is above " + std::to_string(kMaxHeadDim));
    return {pool.bytes, layout.format, layout.num_kv_heads, layout.head_dim, static_cast<int32_t>(layout.dim16),
            pool.frame_bytes, pool.pages_per_frame, layout.page_bytes(), layout.k_offset(layer, 0),
            layout.head_bytes(), layout.k_bytes, layout.v_bytes};
}

void check_store(const KVPool& pool, const int32_t* positions, const int64_t* slots, int64_t rows,
                 int64_t max_context) {
    int64_t num_slots = pool.num_pages() * kPageSize;
    for (int64_t row = 0; row < rows; ++row) {
        if (positions[row] < 0 || positions[row] >= max_context)
            throw std::invalid_argument("positions[" + std::to_string(row) + "] " + std::to_string(positions[row]) +
                                        " lies outside the rotation tables");
        if (slots[row] < -1 || slots[row] >= num_slots)
            throw std::invalid_argument("slots[" + std::to_string(row) + "] " + std::to_string(slots[row]) +
                                        " lies outside the pool");
    }
}

void copy_pages(const KVPool& pool, const int32_t* copies, int64_t count) {
    for (int64_t i = 0; i < 2 * count; ++i)
        if (copies[i] < 0 || copies[i] >= pool.num_pages())
            throw std::invalid_argument("page_copies names page " + std::to_string(copies[i]) + " outside the pool");
    size_t bytes = static_cast<size_t>(pool.layout.page_bytes());
    bool overlap = false;
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = i + 1; j < count && !overlap; ++j) overlap = copies[2 * i + 1] == copies[2 * j];
    if (!overlap) {
        for (int64_t i = 0; i < count; ++i)
            if (copies[2 * i] != copies[2 * i + 1])
                std::memcpy(pool.page(copies[2 * i + 1]), pool.page(copies[2 * i]), bytes);
        return;
    }
    std::vector<uint8_t> held(bytes * static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) std::memcpy(&held[bytes * i], pool.page(copies[2 * i]), bytes);
    for (int64_t i = 0; i < count; ++i) std::memcpy(pool.page(copies[2 * i + 1]), &held[bytes * i], bytes);
}

}  // namespace tokenloom
