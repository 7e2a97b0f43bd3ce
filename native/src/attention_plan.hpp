// The plan of attention for one step: built once for each window, run by all layers that have it.
#pragma once

#include <vector>

#include "attention.hpp"
#include "batch.hpp"
#include "memory.hpp"

namespace tokenloom {

// Arrays keep their capacity from step to step. Reads nothing of the batch after `build`.
class AttentionPlan : public AttentionTables {
  public:
    AttentionPlan() : AttentionTables{} {}
    AttentionPlan(const AttentionPlan&) = delete;
    AttentionPlan& operator=(const AttentionPlan&) = delete;

    // `shape.layer` and `shape.scale` do not matter. Throws std::invalid_argument for a batch that is not legal.
    void build(const Batch& batch, const KVPool& pool, const AttentionShape& shape, int num_threads);

    // The tasks of a layer, to be run in any order, best from both ends.
    int64_t num_tasks() const { return static_cast<int64_t>(tasks_.size()); }
    // To be run when all tasks of a layer are done.
    int64_t num_merges() const { return static_cast<int64_t>(merges_.size()); }
    int64_t scratch_bytes() const { return scratch_bytes_; }

  private:
    void add_segment(const Batch& batch, const KVPool& pool, int64_t segment);
    void add_tree_keys(const Batch& batch, const KVPool& pool, int64_t segment);
    void add_block(int64_t begin, int64_t end, int64_t first_page, bool tree);
    void add_tasks(int num_kv_heads, int num_threads);
    double cost(const AttentionBlock& block, int split_begin, int split_end) const;
    int64_t num_tiles(const AttentionBlock& block) const;

    std::vector<AttentionTask> tasks_;
    std::vector<AttentionMerge> merges_;
    std::vector<AttentionBlock> blocks_;
    std::vector<const uint8_t*> pages_;
    std::vector<int32_t> logical_;
    std::vector<int64_t> tree_starts_;
    std::vector<TreeKey> tree_keys_;
    std::vector<std::pair<double, AttentionTask>> ordered_;
    Memory partials_;
    int64_t partial_floats_ = 0;
    int64_t scratch_bytes_ = 0;
};

}  // namespace tokenloom
