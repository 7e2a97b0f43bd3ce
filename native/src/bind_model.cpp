// Python's view of the thread pool and the model.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "bind_batch.hpp"

namespace tokenloom {

namespace {

using Anything = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

struct Results {
    Out<int32_t> tokens;
    Out<float> logprobs;
    Out<int32_t> ranks;
    Out<int32_t> top_ids;      // one after the other, num_logprobs of each entry
    Out<float> top_logprobs;
};

Vector vector_of(const Array<float>& values) {
    if (values.ndim() != 1) refuse("a vector of weights must have one dimension");
    return std::make_shared<const std::vector<float>>(values.data(), values.data() + values.shape(0));
}

Vector vector_of(const std::optional<Array<float>>& values) { return values ? vector_of(*values) : nullptr; }

TableDtype table_dtype(const std::string& name) {
    if (name == "float32") return TableDtype::f32;
    if (name == "bfloat16") return TableDtype::bf16;
    if (name == "float16") return TableDtype::f16;
    refuse("dtype " + name);
}

Dtype activation_dtype(const std::string& name) {
    if (name == "float32") return Dtype::f32;
    if (name == "bfloat16") return Dtype::bf16;
    refuse("dtype " + name + " of activations; there are float32 and bfloat16");
}

KVFormat kv_format(const std::string& name) {
    if (name == "float32") return KVFormat::f32;
    if (name == "bfloat16") return KVFormat::bf16;
    if (name == "int8") return KVFormat::i8;
    refuse("KV dtype " + name + "; there are float32, bfloat16 and int8");
}

void fill_results(Entries& entries, const Results& out) {
    of_length("tokens", out.tokens, entries.count);
    of_length("logprobs", out.logprobs, entries.count);
    of_length("ranks", out.ranks, entries.count);
    int64_t room = static_cast<int64_t>(out.top_ids.size()), used = 0;
    of_length("top_logprobs", out.top_logprobs, room);
    entries.results.resize(static_cast<size_t>(entries.count));
    for (int64_t i = 0; i < entries.count; ++i) {
        int64_t tops = std::max(entries.samples[static_cast<size_t>(i)].num_logprobs, 0);
        if (used + tops > room) refuse("top_ids is too short for num_logprobs");
        SampleResult& result = entries.results[static_cast<size_t>(i)];
        result = SampleResult{};
        result.top_ids = out.top_ids.data() + used;
        result.top_logprobs = out.top_logprobs.data() + used;
        used += tops;
    }
}

void step(Model& model, const BatchArrays& arrays, const EntryArrays& entry_arrays, const std::vector<Edit>& edits,
          Results results, const Array<int32_t>& hidden_rows, Out<float> hidden) {
    Batch batch = view(arrays);
    const int64_t copies = num_copies(arrays);
    if (hidden_rows.ndim() != 1 || hidden.ndim() != 2 || hidden.shape(0) != hidden_rows.shape(0) ||
        static_cast<int64_t>(hidden.shape(1)) != model.hidden_width())
        refuse("hidden must be [hidden_rows, width of what the head reads]");
    const HiddenRows wanted{static_cast<int64_t>(hidden_rows.shape(0)), hidden_rows.data(), hidden.data()};
    Entries entries;
    fill_samples(entries, entry_arrays, edits, model.vocab());
    fill_results(entries, results);
    {
        nb::gil_scoped_release release;
        model.step(batch, arrays.page_copies.data(), copies, entries, wanted);
    }
    for (int64_t i = 0; i < entries.count; ++i) {
        const SampleResult& result = entries.results[static_cast<size_t>(i)];
        results.tokens.data()[i] = result.token;
        results.logprobs.data()[i] = result.logprob;
        results.ranks.data()[i] = result.rank;
    }
}

// (product, first panel, panels, half, rank) of each block.
Model::AdapterLayout adapter_layout(const Array<int64_t>& shapes, const Array<float>& scales, const Array<int64_t>& a,
                                    const Array<int64_t>& b, int64_t embedding_rank, float embedding_scale,
                                    const Array<int64_t>& embedding_a, const Array<int64_t>& embedding_b) {
    if (shapes.ndim() != 2 || shapes.shape(1) != 5) refuse("blocks must be [B, 5]");
    const int64_t count = static_cast<int64_t>(shapes.shape(0));
    of_length("scales", scales, count);
    Model::AdapterLayout layout;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t* s = shapes.data() + i * 5;
        if (s[3] < -1 || s[3] > 1 || s[4] < 1 || s[4] > kMaxRank) refuse("a block of rank " + std::to_string(s[4]));
        layout.blocks.push_back(
            {s[0], s[1], s[2], static_cast<int32_t>(s[3]), static_cast<int32_t>(s[4]), scales.data()[i]});
    }
    auto copy = [](const Array<int64_t>& from) { return std::vector<int64_t>(from.data(), from.data() + from.size()); };
    layout.a = copy(a);
    layout.b = copy(b);
    layout.embedding_rank = embedding_rank;
    layout.embedding_scale = embedding_scale;
    layout.embedding_a = copy(embedding_a);
    layout.embedding_b = copy(embedding_b);
    return layout;
}

const int32_t* page_ids(const Array<int32_t>& pages) {
    return of_length("pages", pages, static_cast<int64_t>(pages.size()));
}

void bind_adapters(nb::class_<Model>& model) {
    model
        .def("write_pages",
             [](Model& self, const Array<int32_t>& pages, int64_t page_bytes, const Array<uint8_t>& data) {
                 if (page_bytes < 1 || static_cast<int64_t>(data.size()) != static_cast<int64_t>(pages.size()) * page_bytes)
                     refuse("data must be the bytes of all pages");
                 const int32_t* ids = page_ids(pages);
                 nb::gil_scoped_release release;
                 self.write_pages(ids, static_cast<int64_t>(pages.size()), page_bytes, data.data());
             },
             exactly("pages"), nb::arg("page_bytes"), exactly("data"))
        .def("clear_pages",
             [](Model& self, const Array<int32_t>& pages, int64_t page_bytes) {
                 self.clear_pages(page_ids(pages), static_cast<int64_t>(pages.size()), page_bytes);
             },
             exactly("pages"), nb::arg("page_bytes"))
        .def("bind_adapter",
             [](Model& self, int64_t slot, const Array<int32_t>& pages, int64_t page_bytes, const Array<int64_t>& blocks,
                const Array<float>& scales, const Array<int64_t>& a, const Array<int64_t>& b, int64_t embedding_rank,
                float embedding_scale, const Array<int64_t>& embedding_a, const Array<int64_t>& embedding_b) {
                 if (page_bytes < 1) refuse("page_bytes must be above 0");
                 self.bind_adapter(slot, page_ids(pages), static_cast<int64_t>(pages.size()), page_bytes,
                                   adapter_layout(blocks, scales, a, b, embedding_rank, embedding_scale, embedding_a,
                                                  embedding_b));
             },
             nb::arg("slot"), exactly("pages"), nb::arg("page_bytes"), exactly("blocks"), exactly("scales"), exactly("a"),
             exactly("b"), nb::arg("embedding_rank"), nb::arg("embedding_scale"), exactly("embedding_a"),
             exactly("embedding_b"))
        .def("unbind_adapter", &Model::unbind_adapter, nb::arg("slot"));
}

}  // namespace

void bind_model(nb::module_& m) {
    nb::class_<ThreadPool>(m, "ThreadPool")
        .def(nb::init<int>(), nb::arg("threads"))
        .def_prop_ro("size", &ThreadPool::size);
    nb::class_<Results>(m, "Results")
        .def(nb::init<Out<int32_t>, Out<float>, Out<int32_t>, Out<int32_t>, Out<float>>(), exactly("tokens"),
             exactly("logprobs"), exactly("ranks"), exactly("top_ids"), exactly("top_logprobs"));
    auto model = nb::class_<Model>(m, "Model");
    bind_adapters(model);
    model
        .def("__init__",
             [](Model* self, std::shared_ptr<ThreadPool> pool, const std::string& isa, const std::string& activations) {
                 new (self) Model(std::move(pool), find_isa(isa), activation_dtype(activations));
             },
             nb::arg("pool"), nb::arg("isa"), nb::arg("activations"))
        .def("buffer", &Model::add_buffer, nb::arg("width"), nb::arg("activation"))
        .def("kv",
             [](Model& self, const std::string& format, int layers, int heads, int dim, int64_t frames,
                int64_t frame_bytes, int64_t pages_per_frame, const Model* frames_of) {
                 self.set_kv(kv_format(format), layers, heads, dim, frames, frame_bytes, pages_per_frame, frames_of);
             },
             nb::arg("format"), nb::arg("layers"), nb::arg("heads"), nb::arg("dim"), nb::arg("frames"),
             nb::arg("frame_bytes"), nb::arg("pages_per_frame"), nb::arg("frames_of").none() = nb::none())
        .def("rope",
             [](Model& self, Array<float> cos, Array<float> sin, int64_t tables) {
                 if (cos.ndim() != 2 || sin.ndim() != 2 || tables < 1 || cos.shape(0) % static_cast<size_t>(tables))
                     refuse("rope tables must have two dimensions, of which the first is all tables'");
                 self.set_rope(std::vector<float>(cos.data(), cos.data() + cos.size()),
                               std::vector<float>(sin.data(), sin.data() + sin.size()),
                               static_cast<int64_t>(cos.shape(0)) / tables, static_cast<int64_t>(cos.shape(1)), tables);
             })
        .def("embed", &Model::add_embed_packed, nb::arg("weight"), nb::arg("out"), nb::arg("scale"))
        .def("embed_table",
             [](Model& self, Anything table, const std::string& dtype, int out, float scale) {
                 if (table.ndim() != 2) refuse("an embedding table must have two dimensions");
                 const uint8_t* bytes = static_cast<const uint8_t*>(table.data());
                 self.add_embed_table(std::vector<uint8_t>(bytes, bytes + table.nbytes()), table_dtype(dtype),
                                      static_cast<int64_t>(table.shape(0)), out, scale);
             })
        .def("embed_positions",
             [](Model& self, Array<float> table, int64_t offset, int out) {
                 if (table.ndim() != 2) refuse("a table of positions must have two dimensions");
                 self.add_positions(std::make_shared<const std::vector<float>>(table.data(), table.data() + table.size()),
                                    offset, out);
             },
             nb::arg("table"), nb::arg("offset"), nb::arg("out"))
        .def("cast", &Model::add_cast, nb::arg("source"), nb::arg("add"), nb::arg("out"))
        .def("layer_norm",
             [](Model& self, int source, Array<float> weight, std::optional<Array<float>> bias, int out, float epsilon) {
                 self.add_layer_norm(source, vector_of(weight), vector_of(bias), out, epsilon);
             },
             nb::arg("source"), nb::arg("weight"), nb::arg("bias").none(), nb::arg("out"), nb::arg("epsilon"))
        .def("rms_norm",
             [](Model& self, int source, int add, Array<float> weight, int out, float epsilon) {
                 self.add_norm(source, add, vector_of(weight), out, epsilon);
             })
        .def("linear",
             [](Model& self, int source, Weight weight, int out, std::optional<Array<float>> bias,
                const std::string& epilogue, float scale) {
                 self.add_linear(source, std::move(weight), out, vector_of(bias), find_epilogue(epilogue), scale);
             },
             nb::arg("source"), nb::arg("weight"), nb::arg("out"), nb::arg("bias").none(), nb::arg("epilogue"),
             nb::arg("scale"))
        .def("gather",
             [](Model& self, int source, Array<int32_t> order, int out) {
                 if (order.ndim() != 1) refuse("an order must have one dimension");
                 self.add_gather(source, std::make_shared<const std::vector<int32_t>>(order.data(), order.data() + order.size()),
                                 out);
             },
             nb::arg("source"), nb::arg("order").noconvert(), nb::arg("out"))
        .def("rope_store",
             [](Model& self, int source, int out, int layer, int num_heads, int rotary_dim,
                std::optional<Array<float>> q_norm, std::optional<Array<float>> k_norm, float epsilon, int table) {
                 self.add_rope(source, out, layer, num_heads, rotary_dim, vector_of(q_norm), vector_of(k_norm), epsilon,
                               table);
             },
             nb::arg("source"), nb::arg("out"), nb::arg("layer"), nb::arg("num_heads"), nb::arg("rotary_dim"),
             nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("epsilon"), nb::arg("table"))
        .def("attention", &Model::add_attention, nb::arg("source"), nb::arg("out"), nb::arg("layer"),
             nb::arg("num_heads"), nb::arg("scale"), nb::arg("window"), nb::arg("softcap"))
        .def("route", &Model::add_route, nb::arg("source"), nb::arg("out"), nb::arg("top_k"), nb::arg("normalized"))
        .def("experts",
             [](Model& self, int source, int routes, int out, const std::vector<Weight>& gate_up,
                const std::vector<Weight>& down, const std::string& epilogue) {
                 self.add_experts(source, routes, out, gate_up, down, find_epilogue(epilogue));
             },
             nb::arg("source"), nb::arg("routes"), nb::arg("out"), nb::arg("gate_up"), nb::arg("down"),
             nb::arg("epilogue"))
        .def("head", &Model::set_head, nb::arg("source"), nb::arg("weight"), nb::arg("softcap"), nb::arg("divisor"))
        .def("finish", &Model::finish)
        .def("step", &step, nb::arg("batch"), nb::arg("entries"), nb::arg("edits"), nb::arg("results"),
             exactly("hidden_rows"), exactly("hidden"))
        .def("move_slots",
             [](Model& self, const Array<int64_t>& moves) {
                 if (moves.ndim() != 2 || moves.shape(1) != 2) refuse("moves must be [C, 2]");
                 nb::gil_scoped_release release;
                 self.move_slots(moves.data(), static_cast<int64_t>(moves.shape(0)));
             },
             exactly("moves"))
        .def("clear_kv_pages",
             [](Model& self, const Array<int32_t>& pages) {
                 self.clear_kv_pages(page_ids(pages), static_cast<int64_t>(pages.size()));
             },
             exactly("pages"))
        .def("logits",
             [](Model& self, Array<int32_t> rows, Out<float> out) {
                 if (rows.ndim() != 1 || out.ndim() != 2 || out.shape(0) != rows.shape(0) ||
                     static_cast<int64_t>(out.shape(1)) != self.vocab())
                     refuse("logits: out must be [rows, vocabulary]");
                 nb::gil_scoped_release release;
                 self.logits(rows.data(), static_cast<int64_t>(rows.shape(0)), out.data());
             },
             exactly("rows"), exactly("out"))
        .def("profile", &Model::set_profiling, nb::arg("on"))
        .def("op_seconds", [](const Model& self) {
            std::vector<std::tuple<std::string, double>> found;
            for (size_t i = 0; i < self.op_seconds().size(); ++i)
                found.emplace_back(self.op_name(static_cast<int64_t>(i)), self.op_seconds()[i]);
            return found;
        });
    m.def("kv_page_bytes", [](const std::string& format, int layers, int heads, int dim) {
        if (layers < 1 || heads < 1 || dim < 1) refuse("kv_page_bytes: layers, heads and head_dim must be positive");
        return KVLayout(kv_format(format), layers, heads, dim).page_bytes();
    }, nb::arg("format"), nb::arg("num_layers"), nb::arg("num_kv_heads"), nb::arg("head_dim"));
}

}  // namespace tokenloom
