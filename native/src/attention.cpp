#include "attention.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "attention_plan.hpp"

TL_DECLARE_PER_ISA(AttentionKernels, attention_kernels)
TL_DEFINE_PER_ISA(AttentionKernels, attention_kernels)

namespace tokenloom {

namespace {

constexpr int kBlockVectors = 192;      // query vectors of a block: their state should stay in the L2 cache
constexpr int kMaxBlockRows = 128;
constexpr int kMinSplitsPerTask = 4;
constexpr int kTasksPerThread = 4;      // pieces that a step too poor in tasks is cut into

[[noreturn]] void refuse(const char* name, int64_t index, const std::string& why) {
    throw std::invalid_argument(std::string(name) + "[" + std::to_string(index) + "] " + why);
}

int64_t rounded(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

void check(const Batch& batch, const KVPool& pool) {
    if (batch.rows < 0 || batch.rows > INT32_MAX) throw std::invalid_argument("too many rows");
    if (batch.segments && (batch.starts[0] != 0 || batch.starts[batch.segments] != batch.rows))
        throw std::invalid_argument("starts do not cover the rows");
    if (!batch.segments && batch.rows) throw std::invalid_argument("rows without a segment");
    for (int64_t s = 0; s < batch.segments; ++s)
        if (batch.starts[s + 1] <= batch.starts[s]) refuse("starts", s + 1, "does not rise");
    int64_t slots = pool.num_pages() * kPageSize;
    for (int64_t row = 0; row < batch.rows; ++row) {
        if (batch.logical[row] < 0 || batch.logical[row] / kPageSize >= batch.table_width)
            refuse("logical", row, std::to_string(batch.logical[row]) + " lies outside the page table");
        if (batch.slots[row] < -1 || batch.slots[row] >= slots)
            refuse("slots", row, std::to_string(batch.slots[row]) + " lies outside the pool");
        if (batch.parents[row] < -1 || batch.parents[row] >= row)
            refuse("parents", row, std::to_string(batch.parents[row]) + " is not an earlier row");
    }
}

}  // namespace

void AttentionPlan::build(const Batch& batch, const KVPool& pool, const AttentionShape& shape, int num_threads) {
    const KVLayout& layout = pool.layout;
    if (shape.num_kv_heads != layout.num_kv_heads || shape.head_dim != layout.head_dim)
        throw std::invalid_argument("the KV pool has other heads");
    if (shape.num_heads < 1 || shape.num_heads % shape.num_kv_heads)
        throw std::invalid_argument("the heads cannot share the KV heads");
    if (shape.window < 0) throw std::invalid_argument("the window is negative");
    if (layout.format != KVFormat::f32 && layout.head_dim % 2)
        throw std::invalid_argument("head_dim is odd");  // pairs of dimensions
    check(batch, pool);

    format = layout.format;
    group = shape.num_heads / shape.num_kv_heads;
    head_dim = layout.head_dim;
    dim16 = static_cast<int32_t>(layout.dim16);
    window = shape.window;
    softcap = shape.softcap;
    head_bytes = layout.head_bytes();
    layer_bytes = head_bytes * layout.num_kv_heads;
    k_bytes = layout.k_bytes;
    v_bytes = layout.v_bytes;

    tasks_.clear();
    merges_.clear();
    blocks_.clear();
    pages_.clear();
    tree_keys_.clear();
    tree_starts_.assign(static_cast<size_t>(batch.rows) + 1, 0);
    logical_.assign(batch.logical, batch.logical + batch.rows);
    for (int64_t s = 0; s < batch.segments; ++s) add_segment(batch, pool, s);

    max_tiles = 0;
    for (const AttentionBlock& block : blocks_) max_tiles = std::max(max_tiles, num_tiles(block));
    add_tasks(shape.num_kv_heads, num_threads);

    // See `Scratch` in kernels/attention.cpp.
    int64_t steps = format == KVFormat::f32 ? head_dim : head_dim / 2;
    int64_t tile_floats = 2 * kLanes + kQueryTile * dim16;
    scratch_bytes_ = rounded(max_tiles * steps * kQueryTile * 4) + (max_tiles + 1) * tile_floats * 4 +
                     2 * rounded(kQueryTile * kSplit * 4);
    if (format == KVFormat::i8) scratch_bytes_ += kSplitPages * (rounded(head_dim * 32) + rounded(dim16 * 32));
    if (!tree_keys_.empty()) scratch_bytes_ += kTreePages * head_bytes;

    tasks = tasks_.data();
    merges = merges_.data();
    blocks = blocks_.data();
    pages = pages_.data();
    logical = logical_.data();
    tree_starts = tree_keys_.empty() ? nullptr : tree_starts_.data();
    tree_keys = tree_keys_.data();
}

void AttentionPlan::add_segment(const Batch& batch, const KVPool& pool, int64_t segment) {
    int64_t begin = batch.starts[segment], end = batch.starts[segment + 1];
    int32_t last = *std::max_element(batch.logical + begin, batch.logical + end);
    const int32_t* table = batch.page_tables + segment * batch.table_width;
    int64_t first_page = static_cast<int64_t>(pages_.size());
    for (int64_t i = 0; i <= last / kPageSize; ++i) {
        if (table[i] < 0 || table[i] >= pool.num_pages())
            refuse("page_tables", segment, "names page " + std::to_string(table[i]) + " outside the pool");
        pages_.push_back(pool.page(table[i]));
    }
    bool tree = std::any_of(batch.parents + begin, batch.parents + end, [](int32_t parent) { return parent >= 0; });
    if (tree) {
        add_tree_keys(batch, pool, segment);
    } else {
        for (int64_t row = begin; row < end; ++row) tree_starts_[row + 1] = tree_starts_[row];
    }
    int64_t block_rows = std::clamp(kBlockVectors / group, 1, kMaxBlockRows);
    for (int64_t row = begin; row < end; row += block_rows)
        add_block(row, std::min(row + block_rows, end), first_page, tree);
}

// For each row the keys of its ancestors and its own that do not lie where the page table says.
void AttentionPlan::add_tree_keys(const Batch& batch, const KVPool& pool, int64_t segment) {
    const int32_t* table = batch.page_tables + segment * batch.table_width;
    for (int64_t row = batch.starts[segment]; row < batch.starts[segment + 1]; ++row) {
        int depth = 0;
        for (int64_t node = row; node >= 0; node = batch.parents[node]) {
            int64_t parent = batch.parents[node];
            if (parent >= 0 && parent < batch.starts[segment]) refuse("parents", node, "is a row of another segment");
            if (parent >= 0 && batch.logical[parent] != batch.logical[node] - 1)
                refuse("logical", node, "is not one more than that of its parent");
            if (++depth > kMaxAncestors + 1) refuse("parents", row, "has more than 64 ancestors");
            int32_t place = batch.logical[node];
            int64_t slot = batch.slots[node];
            int64_t own = static_cast<int64_t>(table[place / kPageSize]) * kPageSize + place % kPageSize;
            if (slot < 0 || slot == own) continue;
            tree_keys_.push_back({place, static_cast<int32_t>(slot % kPageSize), pool.page(slot / kPageSize)});
        }
        tree_starts_[row + 1] = static_cast<int64_t>(tree_keys_.size());
    }
}

void AttentionPlan::add_block(int64_t begin, int64_t end, int64_t first_page, bool tree) {
    int32_t lowest = *std::min_element(logical_.begin() + begin, logical_.begin() + end);
    int32_t highest = *std::max_element(logical_.begin() + begin, logical_.begin() + end);
    AttentionBlock block{};
    block.row_begin = static_cast<int32_t>(begin);
    block.row_end = static_cast<int32_t>(end);
    block.split_begin = window ? std::max(lowest - window + 1, 0) / kSplit : 0;
    block.split_end = highest / kSplit + 1;
    block.shared_end = block.split_end;
    block.first_page = first_page;
    block.num_pages = highest / kPageSize + 1;
    if (tree) {
        int32_t moved = INT32_MAX;
        for (int64_t i = tree_starts_[begin]; i < tree_starts_[end]; ++i)
            moved = std::min(moved, tree_keys_[i].logical);
        block.shared_end = std::clamp(moved / kSplit, block.split_begin, block.split_end);
    }
    blocks_.push_back(block);
}

// Query vectors times keys that they see in some splits, more or less.
double AttentionPlan::cost(const AttentionBlock& block, int split_begin, int split_end) const {
    double total = 0;
    for (int64_t row = block.row_begin; row < block.row_end; ++row) {
        int64_t end = std::min<int64_t>(logical_[row] + 1, int64_t{split_end} * kSplit);
        int64_t begin = int64_t{split_begin} * kSplit;
        if (window) begin = std::max<int64_t>(begin, int64_t{logical_[row]} - window + 1);
        total += static_cast<double>(std::max<int64_t>(end - begin, 0));
    }
    return total * group;
}

int64_t AttentionPlan::num_tiles(const AttentionBlock& block) const {
    int64_t vectors = static_cast<int64_t>(block.row_end - block.row_begin) * group;
    return (vectors + kQueryTile - 1) / kQueryTile;
}

void AttentionPlan::add_tasks(int num_kv_heads, int num_threads) {
    double total = 0;
    for (const AttentionBlock& block : blocks_) total += cost(block, block.split_begin, block.split_end);
    double piece = total * num_kv_heads / (kTasksPerThread * std::max(num_threads, 1));

    ordered_.clear();
    partial_floats_ = 0;
    int64_t tile_floats = 2 * kLanes + kQueryTile * dim16;
    for (size_t b = 0; b < blocks_.size(); ++b) {
        const AttentionBlock& block = blocks_[b];
        double all = cost(block, block.split_begin, block.split_end);
        int splits = block.split_end - block.split_begin, per_task = splits;
        if (num_threads > 1 && all > 2 * piece)
            per_task = std::max(static_cast<int>(splits * piece / all), kMinSplitsPerTask);
        int64_t split_floats = num_tiles(block) * tile_floats;
        for (int32_t head = 0; head < num_kv_heads; ++head) {
            bool cut = per_task < splits;
            if (cut) merges_.push_back({static_cast<int32_t>(b), head, partial_floats_});
            for (int split = block.split_begin; split < block.split_end; split += per_task) {
                int end = std::min(split + per_task, block.split_end);
                AttentionTask task{static_cast<int32_t>(b), head, split, end, cut ? partial_floats_ : -1};
                ordered_.push_back({cost(block, split, end), task});
                if (cut) partial_floats_ += split_floats * (end - split);
            }
        }
    }
    // Threads take from both ends: the rows of one half lie at the front, those of the other at the back, the
    // longest tasks outermost. Ties in the order of the batch: neighbours find each other's pages in the cache.
    std::sort(ordered_.begin(), ordered_.end(), [](const auto& a, const auto& b) {
        if (a.first != b.first) return a.first > b.first;
        if (a.second.block != b.second.block) return a.second.block < b.second.block;
        if (a.second.kv_head != b.second.kv_head) return a.second.kv_head < b.second.kv_head;
        return a.second.split_begin < b.second.split_begin;
    });
    const int64_t half = static_cast<int64_t>(logical_.size()) / 2;
    auto lies_behind = [&](const AttentionTask& task) { return blocks_[static_cast<size_t>(task.block)].row_begin >= half; };
    for (const auto& [_, task] : ordered_)
        if (!lies_behind(task)) tasks_.push_back(task);
    for (auto task = ordered_.rbegin(); task != ordered_.rend(); ++task)
        if (lies_behind(task->second)) tasks_.push_back(task->second);
    if (partials_.size() < static_cast<size_t>(partial_floats_) * 4)
        partials_ = Memory(static_cast<size_t>(partial_floats_) * 4 * 3 / 2);
    partials = reinterpret_cast<float*>(partials_.data());
}

}  // namespace tokenloom
