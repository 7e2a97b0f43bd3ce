// Python's view of the loop of a draft model.
#include "bind_batch.hpp"
#include "draft.hpp"

namespace tokenloom {

namespace {

// Tokens, parents, ranks and confidences of the nodes of a sequence.
using Proposal = std::tuple<std::vector<int32_t>, std::vector<int32_t>, std::vector<int32_t>, std::vector<double>>;

std::vector<Proposal> run(DraftLoop& self, Model& model, const BatchArrays& arrays, const EntryArrays& entry_arrays,
                          const std::vector<Edit>& edits, const Array<int32_t>& depths, const Array<int32_t>& widths,
                          const Array<int32_t>& scratch) {
    Entries entries;
    fill_samples(entries, entry_arrays, edits, model.vocab());
    DraftWork work{};
    work.batch = view(arrays);
    work.num_copies = num_copies(arrays);
    work.copies = arrays.page_copies.data();
    work.entries = &entries;
    const int64_t count = work.batch.segments;
    work.depths = of_length("depths", depths, count);
    work.widths = of_length("widths", widths, count);
    if (scratch.ndim() != 3 || static_cast<int64_t>(scratch.shape(0)) != count)
        refuse("scratch must be [sequences, beams, pages]");
    work.scratch = scratch.data();
    work.num_beams = static_cast<int64_t>(scratch.shape(1));
    work.num_pages = static_cast<int64_t>(scratch.shape(2));
    {
        nb::gil_scoped_release release;
        self.run(model, work);
    }
    std::vector<Proposal> proposals(static_cast<size_t>(count));
    for (int64_t s = 0; s < count; ++s) {
        auto& [tokens, parents, ranks, confidences] = proposals[static_cast<size_t>(s)];
        for (const DraftNode& node : self.nodes(s)) {
            tokens.push_back(node.token);
            parents.push_back(node.parent);
            ranks.push_back(node.rank);
            confidences.push_back(node.confidence);
        }
    }
    return proposals;
}

}  // namespace

void bind_draft(nb::module_& m) {
    nb::class_<DraftLoop>(m, "DraftLoop")
        .def(nb::init<>())
        .def("run", &run, nb::arg("model"), nb::arg("batch"), nb::arg("entries"), nb::arg("edits"), exactly("depths"),
             exactly("widths"), exactly("scratch"));
}

}  // namespace tokenloom
