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

void check_moves(const KVPool& pool, const int64_t* moves, int64_t count) {
    const int64_t num_slots = pool.num_pages() * kPageSize;
    for (int64_t i = 0; i < 2 * count; ++i)
        if (moves[i] < 0 || moves[i] >= num_slots)
            throw std::invalid_argument("moves names slot " + std::to_string(moves[i]) + ", outside [0, " +
                                        std::to_string(num_slots) + ")");
}

namespace {

template <class T>
void copy_strided(uint8_t* to, const uint8_t* from, int64_t count, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * stride, from + i * stride, sizeof(T));
}

// K, V and scales of one head, from key `i` of its blocks at `from` to key `j` of those at `to`.
void copy_key(const KVLayout& layout, uint8_t* to, int64_t j, const uint8_t* from, int64_t i) {
    const int64_t dim = layout.head_dim, row = layout.dim16;
    uint8_t* to_values = to + layout.k_bytes;
    const uint8_t* values = from + layout.k_bytes;
    switch (layout.format) {
        case KVFormat::f32:
            copy_strided<float>(to + j * 4, from + i * 4, dim, 64);
            std::memcpy(to_values + j * row * 4, values + i * row * 4, static_cast<size_t>(dim) * 4);
            break;
        case KVFormat::bf16:
            copy_strided<uint32_t>(to + j * 4, from + i * 4, dim / 2, 64);
            copy_strided<uint16_t>(to_values + j / 2 * row * 4 + j % 2 * 2, values + i / 2 * row * 4 + i % 2 * 2, dim,
                                   4);
            break;
        case KVFormat::i8:
            copy_strided<uint16_t>(to + j * 2, from + i * 2, dim / 2, 32);
            copy_strided<uint8_t>(to_values + j / 2 * row * 2 + j % 2, values + i / 2 * row * 2 + i % 2, dim, 2);
            to_values += layout.v_bytes;
            values += layout.v_bytes;
            for (int64_t side = 0; side < 2; ++side)
                std::memcpy(to_values + (side * kPageSize + j) * 4, values + (side * kPageSize + i) * 4, 4);
            break;
    }
}

}  // namespace

void move_slots(const KVPool& pool, const int64_t* moves, int64_t count, int64_t begin, int64_t end) {
    int64_t last;
    for (int64_t first = 0; first < count; first = last) {
        // Moves into one page, mostly within it, go head by head: keys of a head share their cache lines.
        const int64_t page = moves[2 * first + 1] / kPageSize;
        for (last = first + 1; last < count && moves[2 * last + 1] / kPageSize == page;) ++last;
        for (int64_t head = begin; head < end; ++head)
            for (int64_t move = first; move < last; ++move) {
                const int64_t source = moves[2 * move], destination = moves[2 * move + 1];
                const int64_t offset = head * pool.layout.head_bytes();
                if (source != destination)
                    copy_key(pool.layout, pool.page(page) + offset, destination % kPageSize,
                             pool.page(source / kPageSize) + offset, source % kPageSize);
            }
    }
}

}  // namespace tokenloom
