#include "draft.hpp"

#include <algorithm>
#include <cmath>

#include "refuse.hpp"

namespace tokenloom {

namespace {

// Scratch pages that `tokens` tokens behind the context reach.
int64_t pages_behind(int64_t context, int64_t tokens) {
    return tokens > 0 ? (context % kPageSize + tokens + kPageSize - 1) / kPageSize : 0;
}

// A candidate of a beam.
struct Option {
    double reach;
    int32_t beam, rank;

    bool operator<(const Option& other) const {
        if (reach != other.reach) return reach > other.reach;
        return beam != other.beam ? beam < other.beam : rank < other.rank;
    }
};

void check(const Model& model, const DraftWork& work, int64_t s) {
    const int64_t depth = work.depths[s], width = work.widths[s], last = int64_t{work.batch.starts[s + 1]} - 1;
    if (depth < 0) refuse("depths has the value " + number(depth));
    if (width < 1 || width > kMaxCandidates)
        refuse("widths has the value " + number(width) + ", outside 1 to " + number(kMaxCandidates));
    if (last < 0 || last >= work.batch.rows) refuse("starts do not cover the rows");
    if (work.entries->rows[s] != last || work.entries->samples[static_cast<size_t>(s)].target >= 0)
        refuse("the logit entries are not one draw at the last row of each segment");
    const int64_t place = work.batch.logical[last], behind = depth - 1;
    if (place < 0 || place >= work.batch.table_width * kPageSize) refuse("logical names a key outside the page table");
    if (depth < 2) return;
    if (place + behind >= model.max_positions())
        refuse("depths has the value " + number(depth) + ", beyond the last position of the draft");
    const int64_t pages = pages_behind(place + 1, behind);
    if (width > work.num_beams || pages > work.num_pages)
        refuse("scratch has " + number(work.num_beams) + " beams of " + number(work.num_pages) + " pages; sequence " +
               number(s) + " has " + number(width) + " of " + number(pages));
    for (int64_t beam = 0; beam < width; ++beam)
        for (int64_t page = 0; page < pages; ++page) {
            const int32_t id = work.scratch[(s * work.num_beams + beam) * work.num_pages + page];
            if (id < 0 || id >= model.pool().num_pages())
                refuse("scratch names page " + number(id) + " outside the pool");
        }
}

}  // namespace

void DraftLoop::run(Model& model, const DraftWork& work) {
    begin(model, work);
    catch_up(model, work);
    for (int32_t level = 1;; ++level) {
        bool is_growing = false;
        for (Tree& tree : trees_) {
            tree.is_growing = tree.is_growing && tree.depth > level && tree.num_beams;
            is_growing = is_growing || tree.is_growing;
        }
        if (!is_growing) return;
        compute_level(model, work, level);
    }
}

void DraftLoop::begin(const Model& model, const DraftWork& work) {
    const Batch& batch = work.batch;
    if (work.entries->count != batch.segments) refuse("the logit entries are not one for each segment");
    for (int64_t s = 0; s < batch.segments; ++s) check(model, work, s);
    trees_.resize(static_cast<size_t>(batch.segments));
    table_width_ = 1;
    for (int64_t s = 0; s < batch.segments; ++s) {
        Tree& tree = trees_[static_cast<size_t>(s)];
        tree.context = batch.logical[batch.starts[s + 1] - 1] + 1;
        tree.depth = work.depths[s];
        tree.width = work.widths[s];
        tree.is_growing = tree.depth > 0;
        tree.nodes.clear();
        tree.nodes.reserve(static_cast<size_t>(tree.depth) * static_cast<size_t>(tree.width));
        tree.num_beams = 1;
        tree.beams[0] = Beam{-1, 1.0, 0};
        const int64_t pages = pages_behind(tree.context, tree.depth - 1);
        if (pages) table_width_ = std::max(table_width_, tree.context / kPageSize + pages);
    }
}

void DraftLoop::want_candidates() {
    const size_t count = static_cast<size_t>(entries_.count);
    if (num_candidates_.size() < count) {
        num_candidates_.resize(count);
        candidates_.resize(count * kMaxCandidates);
    }
    entries_.rows = entry_rows_.data();
    entries_.candidates = candidates_.data();
    entries_.num_candidates = num_candidates_.data();
}

void DraftLoop::catch_up(Model& model, const DraftWork& work) {
    entry_rows_.clear();
    entries_.samples.clear();
    for (size_t s = 0; s < trees_.size(); ++s) {
        if (!trees_[s].is_growing) continue;
        entry_rows_.push_back(work.batch.starts[s + 1] - 1);
        entries_.samples.push_back(work.entries->samples[s]);
    }
    entries_.count = static_cast<int64_t>(entry_rows_.size());
    want_candidates();
    model.step(work.batch, work.copies, work.num_copies, entries_, HiddenRows{});
    int64_t row = 0;
    for (Tree& tree : trees_)
        if (tree.is_growing) grow(tree, row++);
}

// The nodes of the frontiers, which are at depth `level`.
void DraftLoop::compute_level(Model& model, const DraftWork& work, int32_t level) {
    token_ids_.clear();
    places_.clear();
    slots_.clear();
    page_tables_.clear();
    adapter_slots_.clear();
    copies_.clear();
    entries_.samples.clear();
    for (int64_t s = 0; s < work.batch.segments; ++s)
        if (trees_[static_cast<size_t>(s)].is_growing) add_rows(work, s, level);
    const size_t count = token_ids_.size();
    parents_.assign(count, -1);
    while (starts_.size() <= count) starts_.push_back(static_cast<int32_t>(starts_.size()));
    while (entry_rows_.size() < count) entry_rows_.push_back(0);
    for (size_t i = 0; i < count; ++i) entry_rows_[i] = static_cast<int32_t>(i);
    const Batch batch{static_cast<int64_t>(count), static_cast<int64_t>(count), token_ids_.data(), places_.data(),
                      places_.data(), slots_.data(), parents_.data(), starts_.data(), page_tables_.data(), table_width_,
                      adapter_slots_.data()};
    entries_.count = static_cast<int64_t>(count);
    want_candidates();
    model.step(batch, copies_.data(), static_cast<int64_t>(copies_.size()) / 2, entries_, HiddenRows{});
    int64_t row = 0;
    for (Tree& tree : trees_)
        if (tree.is_growing) {
            const int64_t first = row;
            row += tree.num_beams;
            grow(tree, first);
        }
}

void DraftLoop::add_rows(const DraftWork& work, int64_t sequence, int32_t level) {
    Tree& tree = trees_[static_cast<size_t>(sequence)];
    const int32_t* committed = work.batch.page_tables + sequence * work.batch.table_width;
    const int32_t* scratch = work.scratch + sequence * work.num_beams * work.num_pages;
    settle(tree, level, committed, scratch, work.num_pages);
    const int32_t place = tree.context + level - 1, full = tree.context / kPageSize, last = place / kPageSize - full;
    for (int32_t beam = 0; beam < tree.num_beams; ++beam) {
        const int32_t* pages = scratch + tree.beams[beam].home * work.num_pages;
        token_ids_.push_back(tree.nodes[static_cast<size_t>(tree.beams[beam].node)].token);
        places_.push_back(place);
        slots_.push_back(int64_t{pages[last]} * kPageSize + place % kPageSize);
        page_tables_.insert(page_tables_.end(), committed, committed + full);
        page_tables_.insert(page_tables_.end(), pages, pages + last + 1);
        page_tables_.resize(static_cast<size_t>(table_width_) * token_ids_.size());
        adapter_slots_.push_back(work.batch.adapter_slots[sequence]);
        entries_.samples.push_back(work.entries->samples[static_cast<size_t>(sequence)]);
        entries_.samples.back().position += level;
    }
}

// Gives each beam of a new frontier its scratch pages, with what its path has there. The first child of a beam goes on
// in its pages and the others take those of beams without children, so that no copy writes what another one reads.
void DraftLoop::settle(Tree& tree, int32_t level, const int32_t* committed, const int32_t* scratch, int64_t num_pages) {
    const int32_t used = tree.context % kPageSize;
    bool taken[kMaxCandidates] = {}, is_first[kMaxCandidates] = {};
    int32_t sources[kMaxCandidates];
    for (int32_t beam = 0; beam < tree.num_beams; ++beam) {
        Beam& b = tree.beams[beam];
        sources[beam] = b.home;
        is_first[beam] = level > 1 && !taken[b.home];
        if (is_first[beam]) taken[b.home] = true;
    }
    const int64_t written = level > 1 ? pages_behind(tree.context, level - 1) : used > 0;
    int32_t free = 0;
    for (int32_t beam = 0; beam < tree.num_beams; ++beam) {
        if (is_first[beam]) continue;
        while (taken[free]) ++free;
        taken[free] = true;
        tree.beams[beam].home = free;
        const int32_t* from = level > 1 ? scratch + sources[beam] * num_pages : committed + tree.context / kPageSize;
        for (int64_t page = 0; page < written; ++page) {
            copies_.push_back(from[page]);
            copies_.push_back(scratch[free * num_pages + page]);
        }
    }
}

// Adds a level: the best of what the beams, whose candidates begin at those of row `first_row`, go on with.
void DraftLoop::grow(Tree& tree, int64_t first_row) {
    Option options[kMaxCandidates * kMaxCandidates];
    double confidences[kMaxCandidates * kMaxCandidates];
    int64_t count = 0;
    for (int32_t beam = 0; beam < tree.num_beams; ++beam) {
        const size_t row = static_cast<size_t>(first_row + beam);
        const Candidate* found = &candidates_[row * kMaxCandidates];
        double* own = confidences + beam * kMaxCandidates;
        double total = 0;
        for (int32_t rank = 0; rank < num_candidates_[row]; ++rank) {
            own[rank] = std::exp(found[rank].score - found[0].score);
            total += own[rank];
        }
        for (int32_t rank = 0; rank < num_candidates_[row]; ++rank) {
            own[rank] /= total;
            options[count++] = Option{tree.beams[beam].reach * own[rank], beam, rank};
        }
    }
    const int32_t kept = static_cast<int32_t>(std::min<int64_t>(tree.width, count));
    std::partial_sort(options, options + kept, options + count);
    Beam beams[kMaxCandidates];
    for (int32_t i = 0; i < kept; ++i) {
        const Option& option = options[i];
        const Beam& parent = tree.beams[option.beam];
        beams[i] = Beam{static_cast<int32_t>(tree.nodes.size()), option.reach, parent.home};
        const size_t row = static_cast<size_t>(first_row + option.beam);
        tree.nodes.push_back({candidates_[row * kMaxCandidates + static_cast<size_t>(option.rank)].token, parent.node,
                              option.rank, confidences[option.beam * kMaxCandidates + option.rank]});
    }
    std::copy(beams, beams + kept, tree.beams);
    tree.num_beams = kept;
}

}  // namespace tokenloom
