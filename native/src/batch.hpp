// The token batch as C++ sees it: views of the arrays of tokenloom.engine.batch.TokenBatch.
#pragma once

#include <cstdint>

namespace tokenloom {

struct Batch {
    int64_t rows;      // T
    int64_t segments;  // S
    const int32_t* token_ids;    // [T]
    const int32_t* positions;    // [T]
    const int32_t* logical;      // [T] keys before the row that it sees
    const int64_t* slots;        // [T] page * 16 + offset, -1: K and V are in the page already
    const int32_t* parents;      // [T] row of the tree parent, -1: the committed context
    const int32_t* starts;       // [S + 1]
    const int32_t* page_tables;  // [S, table_width]
    int64_t table_width;
    const int32_t* adapter_slots;  // [S] -1: none
};

}  // namespace tokenloom
