// The sampler on its own, for tests: tokenloom.kernels.native._native.sample.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "sampler.hpp"

namespace nb = nanobind;

namespace tokenloom {

namespace {

template <typename T>
using Array = nb::ndarray<const T, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::numpy, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

[[noreturn]] void refuse(const std::string& name, const std::string& why) {
    throw std::invalid_argument(name + " " + why);
}

template <typename T>
Array<T> array_of(nb::handle owner, const char* name) {
    Array<T> array;
    if (!nb::try_cast(nb::getattr(owner, name), array, false)) refuse(name, "has the wrong type, dtype or shape");
    return array;
}

template <typename T>
Array<T> column(nb::handle entries, const char* name, size_t size) {
    Array<T> array = array_of<T>(entries, name);
    if (array.shape(0) != size) refuse(name, "has another length than rows");
    return array;
}

void check_ids(const Array<int32_t>& ids, int64_t vocab, const char* name) {
    for (size_t i = 0; i < ids.shape(0); ++i) {
        if (ids.data()[i] < 0 || ids.data()[i] >= vocab) refuse(name, "has an id outside the vocabulary");
    }
}

// Keeps the arrays that its view points to.
class Edits {
  public:
    Edits(nb::handle edits, int64_t vocab) {
        view_.num_allowed = -1;
        if (has(edits, "allowed_ids")) {
            allowed_ = ids(edits, "allowed_ids", vocab);
            view_.allowed = allowed_.data();
            view_.num_allowed = static_cast<int64_t>(allowed_.shape(0));
        }
        if (has(edits, "seen_ids")) take_penalties(edits, vocab);
        if (has(edits, "bias_ids") && has(edits, "bias")) {
            bias_ids_ = ids(edits, "bias_ids", vocab);
            bias_ = array_of<float>(edits, "bias");
            if (bias_.shape(0) != bias_ids_.shape(0)) refuse("bias", "has another length than bias_ids");
            view_.bias_ids = bias_ids_.data();
            view_.bias = bias_.data();
            view_.num_bias = static_cast<int64_t>(bias_.shape(0));
        }
    }
    const EditsView& view() const { return view_; }

  private:
    static bool has(nb::handle edits, const char* name) { return !nb::getattr(edits, name).is_none(); }
    static Array<int32_t> ids(nb::handle edits, const char* name, int64_t vocab) {
        Array<int32_t> array = array_of<int32_t>(edits, name);
        check_ids(array, vocab, name);
        return array;
    }
    void take_penalties(nb::handle edits, int64_t vocab) {
        seen_ = ids(edits, "seen_ids", vocab);
        view_.seen = seen_.data();
        view_.num_seen = static_cast<int64_t>(seen_.shape(0));
        view_.repetition = static_cast<float>(nb::cast<double>(nb::getattr(edits, "repetition_penalty")));
        view_.frequency = static_cast<float>(nb::cast<double>(nb::getattr(edits, "frequency_penalty")));
        view_.presence = static_cast<float>(nb::cast<double>(nb::getattr(edits, "presence_penalty")));
        if (!has(edits, "output_counts")) return;
        counts_ = array_of<int32_t>(edits, "output_counts");
        if (counts_.shape(0) != seen_.shape(0)) refuse("output_counts", "has another length than seen_ids");
        for (size_t i = 0; i < counts_.shape(0); ++i) {
            if (counts_.data()[i] < 0) refuse("output_counts", "has a negative count");
        }
        view_.counts = counts_.data();
    }

    EditsView view_{};
    Array<int32_t> allowed_, seen_, counts_, bias_ids_;
    Array<float> bias_;
};

// The columns of engine.batch.LogitRows, checked.
struct Entries {
    Array<int32_t> rows, targets, top_k, num_logprobs;
    Array<float> temperatures, top_p, min_p;
    Array<uint64_t> seeds;
    Array<uint32_t> sample_index;
    Array<int64_t> positions;

    Entries(nb::handle entries, int64_t num_rows, int64_t vocab)
        : rows(array_of<int32_t>(entries, "rows")),
          targets(column<int32_t>(entries, "targets", size())),
          top_k(column<int32_t>(entries, "top_k", size())),
          num_logprobs(column<int32_t>(entries, "num_logprobs", size())),
          temperatures(column<float>(entries, "temperatures", size())),
          top_p(column<float>(entries, "top_p", size())),
          min_p(column<float>(entries, "min_p", size())),
          seeds(column<uint64_t>(entries, "seeds", size())),
          sample_index(column<uint32_t>(entries, "sample_index", size())),
          positions(column<int64_t>(entries, "positions", size())) {
        for (size_t i = 0; i < size(); ++i) check(i, num_rows, vocab);
    }
    size_t size() const { return rows.shape(0); }
    SampleEntry at(size_t i, const EditsView* edits) const {
        return {targets.data()[i], temperatures.data()[i], top_k.data()[i], top_p.data()[i],
                min_p.data()[i], seeds.data()[i], sample_index.data()[i], positions.data()[i],
                num_logprobs.data()[i], edits};
    }

  private:
    void check(size_t i, int64_t num_rows, int64_t vocab) const {
        if (rows.data()[i] < 0 || rows.data()[i] >= num_rows) refuse("rows", "has a row that is not there");
        if (targets.data()[i] < -1 || targets.data()[i] >= vocab) refuse("targets", "has an id outside the vocabulary");
        float temperature = temperatures.data()[i], p = top_p.data()[i], m = min_p.data()[i];
        if (!(temperature >= 0) || std::isinf(temperature)) refuse("temperatures", "must be finite and at least 0");
        if (top_k.data()[i] < 0) refuse("top_k", "must be at least 0");
        if (!(p >= 0 && p <= 1)) refuse("top_p", "must be in [0, 1]");
        if (!(m >= 0 && m <= 1)) refuse("min_p", "must be in [0, 1]");
        if (positions.data()[i] < 0 || positions.data()[i] >> 56) refuse("positions", "must be in [0, 2^56)");
        if (num_logprobs.data()[i] < -1) refuse("num_logprobs", "must be at least -1");
    }
};

template <typename T>
nb::object vector_array(const std::vector<T>& values) {
    T* data = new T[values.size() + 1];
    std::copy(values.begin(), values.end(), data);
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<T*>(p); });
    return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<1>>(data, {values.size()}, owner));
}

nb::tuple sample(const Rows& logits, nb::handle entries, const std::string& isa, std::optional<float> softcap) {
    const SamplingKernels& kernels = sampling_kernels_for(find_isa(isa));
    int64_t num_rows = static_cast<int64_t>(logits.shape(0)), vocab = static_cast<int64_t>(logits.shape(1));
    if (vocab < 1 || vocab > kMaxVocabulary) refuse("logits", "has a vocabulary outside [1, 2^19 - 16]");
    if (softcap && !(*softcap > 0)) refuse("softcap", "must be above 0");
    Entries columns(entries, num_rows, vocab);
    std::vector<float> rows(logits.data(), logits.data() + num_rows * vocab);
    for (int64_t row = 0; row < num_rows; ++row) {
        finish_logits(kernels, rows.data() + row * vocab, vocab, softcap.value_or(0.0f));
    }
    nb::object edits = nb::getattr(entries, "edits");
    std::vector<int32_t> tokens(columns.size()), top_ids;
    std::vector<float> logprobs(columns.size()), top_logprobs;
    nb::dict top;
    SamplerScratch scratch;
    for (size_t i = 0; i < columns.size(); ++i) {
        nb::object edit = edits.attr("get")(i);
        std::optional<Edits> own;
        if (!edit.is_none()) own.emplace(edit, vocab);
        SampleEntry entry = columns.at(i, own ? &own->view() : nullptr);
        // Nobody gets more than the vocabulary.
        entry.num_logprobs = static_cast<int32_t>(std::min<int64_t>(entry.num_logprobs, vocab));
        size_t count = entry.num_logprobs > 0 ? static_cast<size_t>(entry.num_logprobs) : 0;
        top_ids.assign(count, -1);
        top_logprobs.assign(count, 0);
        SampleResult result{};
        result.top_ids = top_ids.data();
        result.top_logprobs = top_logprobs.data();
        sample_row(kernels, rows.data() + columns.rows.data()[i] * vocab, vocab, entry, scratch, result);
        tokens[i] = result.token;
        logprobs[i] = result.logprob;
        if (entry.num_logprobs >= 0) {
            top[nb::int_(i)] = nb::make_tuple(vector_array(top_ids), vector_array(top_logprobs), result.rank);
        }
    }
    return nb::make_tuple(vector_array(tokens), vector_array(logprobs), top);
}

// (tokens, scores) of each entry.
nb::list candidates(const Rows& logits, nb::handle entries, const std::string& isa) {
    const SamplingKernels& kernels = sampling_kernels_for(find_isa(isa));
    int64_t num_rows = static_cast<int64_t>(logits.shape(0)), vocab = static_cast<int64_t>(logits.shape(1));
    if (vocab < 1 || vocab > kMaxVocabulary) refuse("logits", "has a vocabulary outside [1, 2^19 - 16]");
    Entries columns(entries, num_rows, vocab);
    std::vector<float> rows(logits.data(), logits.data() + num_rows * vocab);
    for (int64_t row = 0; row < num_rows; ++row) finish_logits(kernels, rows.data() + row * vocab, vocab, 0.0f);
    nb::object edits = nb::getattr(entries, "edits");
    SamplerScratch scratch;
    nb::list found;
    for (size_t i = 0; i < columns.size(); ++i) {
        nb::object edit = edits.attr("get")(i);
        std::optional<Edits> own;
        if (!edit.is_none()) own.emplace(edit, vocab);
        Candidate best[kMaxCandidates];
        int64_t count = find_candidates(kernels, rows.data() + columns.rows.data()[i] * vocab, vocab,
                                        columns.at(i, own ? &own->view() : nullptr), scratch, best);
        std::vector<int32_t> tokens;
        std::vector<double> scores;
        for (int64_t j = 0; j < count; ++j) {
            tokens.push_back(best[j].token);
            scores.push_back(best[j].score);
        }
        found.append(nb::make_tuple(vector_array(tokens), vector_array(scores)));
    }
    return found;
}

}  // namespace

void bind_sampler(nb::module_& m) {
    m.attr("max_vocabulary") = kMaxVocabulary;
    m.def("sample", &sample, nb::arg("logits").noconvert(), nb::arg("entries"), nb::arg("isa") = "",
          nb::arg("softcap") = nb::none(),
          "Tokens of fp32 logits [n, V]: (token_ids, logprobs, {entry: (ids, logprobs, rank)}). `entries` are the\n"
          "columns of engine.batch.LogitRows, whose `rows` are rows of `logits`. For tests.");
    m.attr("max_candidates") = kMaxCandidates;
    m.def("candidates", &candidates, nb::arg("logits").noconvert(), nb::arg("entries"), nb::arg("isa") = "",
          "Of each entry, as `sample` takes them: the best tokens that it may draw, and their scores. For tests.");
}

}  // namespace tokenloom
