// Low-rank updates of products (LoRA, Hu et al. 2021), many at once (Punica, S-LoRA).
//
// An adapter lies in pages of the frame pool as vectors, none of which crosses the end of a page: a row of A for
// each rank, [depth] padded with zeros to 64 bytes, and for each panel of the product [rank][32] of B (of a paired
// product [rank][16], the gate's or the up's half). All are of the type of activations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "isa.hpp"
#include "kernels.hpp"
#include "row_groups.hpp"

namespace tokenloom {

struct ShrinkCall {
    const void* source;       // activation rows
    int64_t source_stride;    // in elements
    Dtype dtype;
    int64_t depth;
    const int32_t* rows;      // which of them
    int64_t count;
    const uint8_t* const* a;  // [ranks]
    const float* scales;      // [ranks]
    int64_t ranks;
    float* out;               // [row][...]
    int64_t out_stride;
};

struct AdapterKernels {
    // out[row][i] = scales[i] * (source[row] . a[i]), in 16 lanes along the depth (spec.shrink).
    void (*shrink)(const ShrinkCall& call);
    // out[n] += sum over j of (a[j] * scale) * b[j][n], a chain of fused steps (spec.expand).
    void (*embed)(const uint8_t* a, const uint8_t* const* b, Dtype dtype, int64_t rank, float scale, int64_t width,
                  float* out);
};

const AdapterKernels& adapter_kernels_for(Isa isa);

constexpr int64_t kMaxAdapters = 1 << 16, kMaxRank = 1024;
constexpr int64_t kShrinkRows = 64;   // rows and ranks of one piece of work
constexpr int64_t kShrinkRanks = 8;

// What an update of some columns of a product needs, before its vectors have addresses.
struct BlockShape {
    int64_t product, first_panel, num_panels;
    int32_t half;  // of a paired product: 0 gate, 1 up; else -1
    int32_t rank;
    float scale;
};

// One adapter, bound to the pages where it lies.
class BoundAdapter {
  public:
    // `address(offset, bytes)` finds and checks a vector. Throws what it throws.
    template <class Address>
    BoundAdapter(const std::vector<BlockShape>& shapes, const std::vector<int64_t>& depths, const int64_t* a,
                 const int64_t* b, Dtype dtype, Address&& address);

    const ProductUpdate* updates() const { return updates_.data(); }
    int64_t most_ranks() const { return most_ranks_; }

    // Of the embedding; rank 0: none.
    struct Embedding {
        int64_t rank = 0, rows_per_chunk = 0;
        float scale = 0;
        std::vector<const uint8_t*> a, b;  // [chunks], [rank]
    };
    Embedding embedding;

  private:
    std::vector<ProductUpdate> updates_;  // by product
    std::vector<AdapterBlock> blocks_;
    std::vector<const uint8_t*> a_, b_;
    std::vector<float> scales_;
    int64_t most_ranks_ = 0;
};

// Bytes of a row of A, and of a panel of B.
inline int64_t a_row_bytes(int64_t depth, Dtype dtype) {
    return (depth * (dtype == Dtype::bf16 ? 2 : 4) + 63) / 64 * 64;
}
inline int64_t b_panel_bytes(int64_t rank, int32_t half, Dtype dtype) {
    return rank * (half < 0 ? kPanel : kLanes) * (dtype == Dtype::bf16 ? 2 : 4);
}

template <class Address>
BoundAdapter::BoundAdapter(const std::vector<BlockShape>& shapes, const std::vector<int64_t>& depths, const int64_t* a,
                           const int64_t* b, Dtype dtype, Address&& address)
    : updates_(depths.size()) {
    // By product, as all addresses of a product lie together; what is appended must not move.
    int64_t ranks = 0, panels = 0;
    for (const BlockShape& shape : shapes) {
        ranks += shape.rank;
        panels += shape.num_panels;
    }
    a_.reserve(static_cast<size_t>(ranks));
    scales_.reserve(static_cast<size_t>(ranks));
    b_.reserve(static_cast<size_t>(panels));
    blocks_.reserve(shapes.size());
    for (size_t i = 0; i < shapes.size(); ++i) {
        const BlockShape& shape = shapes[i];
        ProductUpdate& update = updates_[static_cast<size_t>(shape.product)];
        if (!update.count) {
            update.blocks = blocks_.data() + blocks_.size();
            update.a = a_.data() + a_.size();
            update.scales = scales_.data() + scales_.size();
        }
        AdapterBlock block{shape.first_panel, shape.num_panels, shape.half, shape.rank, update.ranks,
                           b_.data() + b_.size()};
        const int64_t row = a_row_bytes(depths[static_cast<size_t>(shape.product)], dtype);
        for (int32_t j = 0; j < shape.rank; ++j) {
            a_.push_back(address(*a++, row));
            scales_.push_back(shape.scale);
        }
        for (int64_t p = 0; p < shape.num_panels; ++p)
            b_.push_back(address(*b++, b_panel_bytes(shape.rank, shape.half, dtype)));
        blocks_.push_back(block);
        ++update.count;
        update.ranks += shape.rank;
        most_ranks_ = std::max<int64_t>(most_ranks_, update.ranks);
    }
}

// Which rows of a product have which adapter.
struct AdapterPlan {
    bool active = false;
    std::vector<int32_t> slots;  // by row, -1: none
    RowGroups groups;            // by slot
    struct Piece {
        int32_t slot;
        int64_t begin, end;  // members of the groups
    };
    std::vector<Piece> pieces;

    // `slots` are set; `tables` has one entry a slot.
    void build(int64_t num_slots);
};

}  // namespace tokenloom
