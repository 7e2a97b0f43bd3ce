// Adapters in the pages of the frame pool.
#include <cstring>

#include "model.hpp"
#include "refuse.hpp"

namespace tokenloom {

namespace {

// Where page `id` of `page_bytes` bytes begins.
uint8_t* page_at(const KVPool& pool, int64_t id, int64_t page_bytes) {
    if (page_bytes < kAlign || page_bytes % kAlign || pool.frame_bytes % page_bytes)
        refuse("adapter pages of " + number(page_bytes) + " bytes: a frame has " + number(pool.frame_bytes));
    const int64_t per_frame = pool.frame_bytes / page_bytes;
    if (id < 0 || id >= pool.num_frames * per_frame) refuse("adapter page " + number(id) + " lies outside the pool");
    return pool.bytes + id / per_frame * pool.frame_bytes + id % per_frame * page_bytes;
}

}  // namespace

void Model::write_pages(const int32_t* pages, int64_t count, int64_t page_bytes, const uint8_t* data) {
    for (int64_t i = 0; i < count; ++i) page_at(*kv_, pages[i], page_bytes);
    for (int64_t i = 0; i < count; ++i)
        std::memcpy(page_at(*kv_, pages[i], page_bytes), data + i * page_bytes, static_cast<size_t>(page_bytes));
}

void Model::clear_pages(const int32_t* pages, int64_t count, int64_t page_bytes) {
    for (int64_t i = 0; i < count; ++i)
        std::memset(page_at(*kv_, pages[i], page_bytes), 0, static_cast<size_t>(page_bytes));
}

void Model::bind_adapter(int64_t slot, const int32_t* pages, int64_t count, int64_t page_bytes,
                         const AdapterLayout& layout) {
    if (!finished_) refuse("the model is not finished");
    if (slot < 0 || slot >= kMaxAdapters) refuse("adapter slot " + number(slot));
    if (slot < static_cast<int64_t>(tables_.size()) && tables_[static_cast<size_t>(slot)])
        refuse("adapter slot " + number(slot) + " is taken");
    auto address = [&](int64_t offset, int64_t bytes) -> const uint8_t* {
        if (offset < 0 || offset % kAlign || offset / page_bytes >= count || offset % page_bytes + bytes > page_bytes)
            refuse("adapter: " + number(bytes) + " bytes at " + number(offset) + " do not lie in one of its pages");
        return page_at(*kv_, pages[offset / page_bytes], page_bytes) + offset % page_bytes;
    };
    if (count) page_at(*kv_, pages[0], page_bytes);
    std::vector<int64_t> depths(ops_.size() + 1);
    int64_t ranks = 0, panels = 0, last = -1;
    for (const BlockShape& shape : layout.blocks) {
        const bool is_head = shape.product == num_ops();
        const LinearOp* op = shape.product >= 0 && shape.product < num_ops()
                                 ? std::get_if<LinearOp>(&ops_[static_cast<size_t>(shape.product)])
                                 : nullptr;
        if (!op && !is_head) refuse("adapter: op " + number(shape.product) + " is no product");
        const PackedMatrix& m = is_head ? head_.weight->matrix : op->weight->matrix;
        const bool half_fits = m.paired ? shape.half == 0 || shape.half == 1 : shape.half == -1;
        if (shape.product < last || !half_fits || shape.rank < 1 || shape.rank > kMaxRank || shape.first_panel < 0 ||
            shape.num_panels < 1 || shape.first_panel + shape.num_panels > m.panels)
            refuse("adapter: a block of op " + number(shape.product) + " does not fit it");
        last = shape.product;
        depths[static_cast<size_t>(shape.product)] = m.k;
        ranks += shape.rank;
        panels += shape.num_panels;
    }
    if (static_cast<int64_t>(layout.a.size()) != ranks || static_cast<int64_t>(layout.b.size()) != panels)
        refuse("adapter: an address for each rank and panel is needed");
    auto bound = std::make_unique<BoundAdapter>(layout.blocks, depths, layout.a.data(), layout.b.data(), activations_,
                                                address);
    if (layout.embedding_rank) {
        const EmbedOp* embed = nullptr;
        for (const Op& op : ops_)
            if (!embed) embed = std::get_if<EmbedOp>(&op);
        BoundAdapter::Embedding& e = bound->embedding;
        e.rank = layout.embedding_rank;
        e.scale = layout.embedding_scale;
        if (!embed || e.rank < 1 || e.rank > kMaxRank || static_cast<int64_t>(layout.embedding_b.size()) != e.rank)
            refuse("adapter: an embedding of rank " + number(e.rank));
        e.rows_per_chunk = page_bytes / (e.rank * item_bytes(activations_));
        if (e.rows_per_chunk < 1 ||
            static_cast<int64_t>(layout.embedding_a.size()) != (embed->vocab + e.rows_per_chunk - 1) / e.rows_per_chunk)
            refuse("adapter: the embedding has another number of chunks");
        for (size_t i = 0; i < layout.embedding_a.size(); ++i) {
            const int64_t rows = std::min(e.rows_per_chunk, embed->vocab - static_cast<int64_t>(i) * e.rows_per_chunk);
            e.a.push_back(address(layout.embedding_a[i], rows * e.rank * item_bytes(activations_)));
        }
        for (int64_t offset : layout.embedding_b)
            e.b.push_back(address(offset, a_row_bytes(buffer(embed->out).width, activations_)));
    }
    const size_t index = static_cast<size_t>(slot);
    if (index >= tables_.size()) {
        tables_.resize(index + 1);
        adapters_.resize(index + 1);
    }
    tables_[index] = bound->updates();
    adapters_[index] = std::move(bound);
}

void Model::unbind_adapter(int64_t slot) {
    if (slot < 0 || slot >= static_cast<int64_t>(tables_.size()) || !tables_[static_cast<size_t>(slot)])
        refuse("adapter slot " + number(slot) + " is empty");
    tables_[static_cast<size_t>(slot)] = nullptr;
    adapters_[static_cast<size_t>(slot)].reset();
    // Logits of the last step may no longer be asked for: they might need it.
    num_rows_ = 0;
}

}  // namespace tokenloom
