// The last part of a step. What follows the last store of keys and values matters only where logits or final rows
// are wanted: the rows of a prompt that is read in need no attention and no MLP in the last layer.
#pragma once

#include <cstdint>
#include <vector>

#include "batch.hpp"

namespace tokenloom {

class Tail {
  public:
    // Keeps the rows that are wanted (distinct, rising), and trees whole. Holds copies, so that it outlives `batch`.
    void choose(const Batch& batch, const std::vector<int32_t>& wanted_rows);

    // Whether rows are dropped; if not, the rest means nothing.
    bool cut() const { return cut_; }
    // The rows kept, rising.
    const std::vector<int32_t>& rows() const { return rows_; }
    // Their batch, without token ids and positions.
    const Batch& batch() const { return batch_; }
    // Where a row of the batch is now; -1: it was dropped.
    int64_t place(int32_t row) const;

  private:
    bool cut_ = false;
    Batch batch_{};
    std::vector<int32_t> rows_, logical_, parents_, starts_, page_tables_;
    std::vector<int64_t> slots_;
};

}  // namespace tokenloom
