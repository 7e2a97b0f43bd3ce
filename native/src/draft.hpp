// The loop of a draft model: catch up with the committed tokens, then grow token trees level by level
// (tokenloom/speculation/draft_loop.py is its definition).
#pragma once

#include <cstdint>
#include <vector>

#include "batch.hpp"
#include "model.hpp"
#include "sampler.hpp"

namespace tokenloom {

// kernels.draft_work.DraftWork of S sequences.
struct DraftWork {
    Batch batch;                  // a segment per sequence
    const int32_t* copies;        // [num_copies, 2]
    int64_t num_copies;
    const Entries* entries;       // of the last row of each segment
    const int32_t* depths;        // [S]
    const int32_t* widths;        // [S]
    const int32_t* scratch;       // [S, num_beams, num_pages]
    int64_t num_beams, num_pages;
};

struct DraftNode {
    int32_t token, parent, rank;  // parent: index in the tree, -1: the root
    double confidence;            // that it is right where its parent is
};

// Arrays keep their capacity from call to call.
class DraftLoop {
  public:
    // Throws std::invalid_argument for work that is not legal, before anything is computed.
    void run(Model& model, const DraftWork& work);

    // The tree of a sequence, of the last call.
    const std::vector<DraftNode>& nodes(int64_t sequence) const { return trees_[static_cast<size_t>(sequence)].nodes; }

  private:
    // A node of the frontier: its scratch pages are those of beam `home`.
    struct Beam {
        int32_t node;
        double reach;  // product of the confidences of its path
        int32_t home;
    };
    struct Tree {
        int32_t context = 0, depth = 0, width = 0;
        bool is_growing = false;
        std::vector<DraftNode> nodes;
        int32_t num_beams = 0;
        Beam beams[kMaxCandidates];
    };

    void begin(const Model& model, const DraftWork& work);
    void catch_up(Model& model, const DraftWork& work);
    void compute_level(Model& model, const DraftWork& work, int32_t level);
    void add_rows(const DraftWork& work, int64_t sequence, int32_t level);
    void settle(Tree& tree, int32_t level, const int32_t* committed, const int32_t* scratch, int64_t num_pages);
    void grow(Tree& tree, int64_t first_row);
    // Makes room for the candidates of the entries.
    void want_candidates();

    std::vector<Tree> trees_;
    Entries entries_;
    std::vector<int32_t> entry_rows_;
    std::vector<Candidate> candidates_;
    std::vector<int32_t> num_candidates_;
    // The batch of a level.
    int64_t table_width_ = 0;
    std::vector<int32_t> token_ids_, places_, parents_, starts_, page_tables_, adapter_slots_, copies_;
    std::vector<int64_t> slots_;
};

}  // namespace tokenloom
