#include "bind_batch.hpp"

namespace tokenloom {

namespace {

void check_ids(const char* name, const int32_t* ids, int64_t count, int64_t vocab) {
    for (int64_t i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= vocab)
            refuse(std::string(name) + " has the value " + std::to_string(ids[i]) + ", outside [0, " +
                   std::to_string(vocab) + ")");
}

EditsView view(const Edit& edit, int64_t vocab) {
    const auto& [entry, allowed, seen, counts, repetition, frequency, presence, bias_ids, bias] = edit;
    EditsView v{};
    v.num_allowed = -1;
    if (allowed) {
        v.allowed = allowed->data();
        v.num_allowed = static_cast<int64_t>(allowed->size());
        check_ids("allowed_ids", v.allowed, v.num_allowed, vocab);
    }
    if (seen) {
        v.seen = seen->data();
        v.num_seen = static_cast<int64_t>(seen->size());
        check_ids("seen_ids", v.seen, v.num_seen, vocab);
        if (counts) v.counts = of_length("output_counts", *counts, v.num_seen);
    }
    v.repetition = repetition;
    v.frequency = frequency;
    v.presence = presence;
    if (bias_ids && bias) {
        v.bias_ids = bias_ids->data();
        v.num_bias = static_cast<int64_t>(bias_ids->size());
        check_ids("bias_ids", v.bias_ids, v.num_bias, vocab);
        v.bias = of_length("bias", *bias, v.num_bias);
    }
    return v;
}

}  // namespace

Batch view(const BatchArrays& a) {
    Batch b{};
    if (a.token_ids.ndim() != 1 || a.starts.ndim() != 1 || a.starts.shape(0) < 2 || a.page_tables.ndim() != 2)
        refuse("token_ids and starts must have one dimension, page_tables two");
    b.rows = static_cast<int64_t>(a.token_ids.shape(0));
    b.segments = static_cast<int64_t>(a.starts.shape(0)) - 1;
    b.token_ids = a.token_ids.data();
    b.positions = of_length("positions", a.positions, b.rows);
    b.logical = of_length("logical", a.logical, b.rows);
    b.slots = of_length("slots", a.slots, b.rows);
    b.parents = of_length("parents", a.parents, b.rows);
    b.starts = a.starts.data();
    b.page_tables = a.page_tables.data();
    b.table_width = static_cast<int64_t>(a.page_tables.shape(1));
    if (static_cast<int64_t>(a.page_tables.shape(0)) != b.segments) refuse("page_tables must have a row per segment");
    b.adapter_slots = of_length("adapter_slots", a.adapter_slots, b.segments);
    return b;
}

int64_t num_copies(const BatchArrays& a) {
    if (a.page_copies.ndim() != 2 || (a.page_copies.shape(0) && a.page_copies.shape(1) != 2))
        refuse("page_copies must be [C, 2]");
    return static_cast<int64_t>(a.page_copies.shape(0));
}

void fill_samples(Entries& entries, const EntryArrays& a, const std::vector<Edit>& edits, int64_t vocab) {
    if (a.rows.ndim() != 1) refuse("logit_rows.rows must have one dimension");
    int64_t count = static_cast<int64_t>(a.rows.shape(0));
    entries.count = count;
    entries.rows = a.rows.data();
    const int32_t* targets = of_length("targets", a.targets, count);
    const float* temperatures = of_length("temperatures", a.temperatures, count);
    const int32_t* top_k = of_length("top_k", a.top_k, count);
    const float* top_p = of_length("top_p", a.top_p, count);
    const float* min_p = of_length("min_p", a.min_p, count);
    const uint64_t* seeds = of_length("seeds", a.seeds, count);
    const uint32_t* samples = of_length("sample_index", a.sample_index, count);
    const int64_t* positions = of_length("logit_rows.positions", a.positions, count);
    const int32_t* wanted = of_length("num_logprobs", a.num_logprobs, count);
    entries.samples.resize(static_cast<size_t>(count));
    entries.edits.clear();
    entries.edits.reserve(edits.size());
    for (int64_t i = 0; i < count; ++i) {
        if (targets[i] < -1 || targets[i] >= vocab) refuse("logit_rows.targets lies outside the vocabulary");
        if (wanted[i] < -1 || wanted[i] > vocab) refuse("logit_rows.num_logprobs lies outside the vocabulary");
        entries.samples[static_cast<size_t>(i)] = SampleEntry{targets[i], temperatures[i], top_k[i], top_p[i], min_p[i],
                                                              seeds[i], samples[i], positions[i], wanted[i], nullptr};
    }
    for (const Edit& edit : edits) {
        int64_t entry = std::get<0>(edit);
        if (entry < 0 || entry >= count) refuse("edits name an entry that does not exist");
        entries.edits.push_back(view(edit, vocab));
        entries.samples[static_cast<size_t>(entry)].edits = &entries.edits.back();
    }
}

void bind_batch(nb::module_& m) {
    nb::class_<BatchArrays>(m, "BatchArrays")
        .def(nb::init<Array<int32_t>, Array<int32_t>, Array<int32_t>, Array<int64_t>, Array<int32_t>, Array<int32_t>,
                      Array<int32_t>, Array<int32_t>, Array<int32_t>>(),
             exactly("token_ids"), exactly("positions"), exactly("logical"), exactly("slots"), exactly("parents"),
             exactly("starts"), exactly("page_tables"), exactly("adapter_slots"),
             exactly("page_copies"));
    nb::class_<EntryArrays>(m, "EntryArrays")
        .def(nb::init<Array<int32_t>, Array<int32_t>, Array<float>, Array<int32_t>, Array<float>, Array<float>,
                      Array<uint64_t>, Array<uint32_t>, Array<int64_t>, Array<int32_t>>(),
             exactly("rows"), exactly("targets"), exactly("temperatures"), exactly("top_k"), exactly("top_p"),
             exactly("min_p"), exactly("seeds"), exactly("sample_index"), exactly("positions"),
             exactly("num_logprobs"));
}

}  // namespace tokenloom
