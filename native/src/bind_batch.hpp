// The arrays of a step as Python hands them over: views of tokenloom.engine.batch.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "model.hpp"
#include "refuse.hpp"

namespace tokenloom {

namespace nb = nanobind;

template <class T>
using Array = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T>
using Out = nb::ndarray<T, nb::c_contig, nb::device::cpu>;

template <class Arr>
auto* of_length(const char* name, const Arr& array, int64_t length) {
    if (array.ndim() != 1 || static_cast<int64_t>(array.shape(0)) != length)
        refuse(std::string(name) + " must have " + std::to_string(length) + " entries");
    return array.data();
}

// The arrays of a batch, kept alive while the step runs.
struct BatchArrays {
    Array<int32_t> token_ids, positions, logical;
    Array<int64_t> slots;
    Array<int32_t> parents, starts, page_tables, adapter_slots, page_copies;
};

struct EntryArrays {
    Array<int32_t> rows, targets;
    Array<float> temperatures;
    Array<int32_t> top_k;
    Array<float> top_p, min_p;
    Array<uint64_t> seeds;
    Array<uint32_t> sample_index;
    Array<int64_t> positions;
    Array<int32_t> num_logprobs;
};

// (entry, allowed ids, seen ids, output counts, repetition, frequency, presence, bias ids, bias)
using Edit = std::tuple<int64_t, std::optional<Array<int32_t>>, std::optional<Array<int32_t>>,
                        std::optional<Array<int32_t>>, float, float, float, std::optional<Array<int32_t>>,
                        std::optional<Array<float>>>;

// An array of another type or order is refused: a converted copy would lose what is written to it, and floats
// would become indices.
inline auto exactly(const char* name) { return nb::arg(name).noconvert(); }

Batch view(const BatchArrays& arrays);
// How many page copies there are.
int64_t num_copies(const BatchArrays& arrays);

// Rows, samples and edits of `entries`; views of the arrays.
void fill_samples(Entries& entries, const EntryArrays& arrays, const std::vector<Edit>& edits, int64_t vocab);

}  // namespace tokenloom
