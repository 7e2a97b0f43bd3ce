// Attention and the KV pool for tests and tools, from numpy arrays.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "attention.hpp"
#include "attention_plan.hpp"
#include "kv_store.hpp"
#include "memory.hpp"
#include "refuse.hpp"

namespace nb = nanobind;

namespace tokenloom {

namespace {

template <class T, int N>
using Array = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Numpy = nb::ndarray<nb::numpy, float, nb::ndim<2>>;

void expect(bool ok, const char* name, const char* why) {
    if (!ok) refuse(std::string(name) + " " + why);
}

KVFormat find_format(const std::string& name) {
    if (name == "float32") return KVFormat::f32;
    if (name == "bfloat16") return KVFormat::bf16;
    if (name == "int8") return KVFormat::i8;
    refuse("format " + name + " is none of float32, bfloat16, int8");
}

// A pool with pages of its own.
class OwnedKVPool {
  public:
    OwnedKVPool(int64_t num_frames, int64_t frame_bytes, int64_t pages_per_frame, int32_t num_layers,
                int32_t num_kv_heads, int32_t head_dim, const std::string& format)
        : pool_{layout(num_layers, num_kv_heads, head_dim, format), nullptr, num_frames, frame_bytes, pages_per_frame} {
        expect(num_frames >= 0 && num_frames <= INT32_MAX, "num_frames", "is out of range");
        expect(pages_per_frame >= 1 && pages_per_frame <= INT32_MAX, "pages_per_frame", "is out of range");
        int64_t most = INT64_MAX / 4;
        expect(pool_.layout.page_bytes() <= most / pages_per_frame, "pages_per_frame", "is out of range");
        expect(frame_bytes % kAlign == 0, "frame_bytes", "is not a multiple of 64");
        expect(frame_bytes >= pages_per_frame * pool_.layout.page_bytes(), "frame_bytes",
               "is less than the pages take");
        expect(num_frames == 0 || frame_bytes <= most / num_frames, "frame_bytes", "is out of range");
        expect(num_frames * pages_per_frame <= INT32_MAX, "num_frames", "gives more pages than an int32 can name");
        memory_ = Memory(static_cast<size_t>(num_frames * frame_bytes));
        pool_.bytes = memory_.data();
    }

    const KVPool& pool() const { return pool_; }

  private:
    static KVLayout layout(int32_t num_layers, int32_t num_kv_heads, int32_t head_dim, const std::string& format) {
        expect(num_layers >= 1 && num_layers <= 4096, "num_layers", "is out of range");
        expect(num_kv_heads >= 1 && num_kv_heads <= 4096, "num_kv_heads", "is out of range");
        expect(head_dim >= 2 && head_dim <= kMaxHeadDim && head_dim % 2 == 0, "head_dim",
               "is odd or out of range");
        return {find_format(format), num_layers, num_kv_heads, head_dim};
    }

    KVPool pool_;
    Memory memory_;
};

int64_t check_layer(const OwnedKVPool& owner, int64_t layer) {
    expect(layer >= 0 && layer < owner.pool().layout.num_layers, "layer", "lies outside the pool");
    return layer;
}

nb::tuple read(const OwnedKVPool& owner, int64_t layer, int64_t slot) {
    const KVPool& pool = owner.pool();
    check_layer(owner, layer);
    expect(slot >= 0 && slot < pool.num_pages() * kPageSize, "slot", "lies outside the pool");
    size_t heads = static_cast<size_t>(pool.layout.num_kv_heads), dim = static_cast<size_t>(pool.layout.head_dim);
    float* data = new float[2 * heads * dim];
    nb::capsule capsule(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    kv_store_kernels_for(Isa::portable).read_slot(kv_target(pool, layer), slot, data, data + heads * dim);
    return nb::make_tuple(Numpy(data, {heads, dim}, capsule), Numpy(data + heads * dim, {heads, dim}, capsule));
}

void kv_store(const OwnedKVPool& owner, int64_t layer, Out<float, 2> source, Out<float, 2> out,
              Array<int32_t, 1> positions, Array<int64_t, 1> slots, Array<float, 2> cos, Array<float, 2> sin,
              std::optional<Array<float, 1>> q_norm, std::optional<Array<float, 1>> k_norm, float epsilon,
              const std::string& isa) {
    const KVPool& pool = owner.pool();
    const KVLayout& layout = pool.layout;
    check_layer(owner, layer);
    size_t rows = source.shape(0), dim = static_cast<size_t>(layout.head_dim);
    size_t kv_width = 2 * static_cast<size_t>(layout.num_kv_heads) * dim;
    expect(source.shape(1) > kv_width && source.shape(1) % dim == 0, "source", "is no [q heads | k heads | v heads]");
    size_t q_width = source.shape(1) - kv_width;
    expect(out.shape(0) == rows && out.shape(1) == q_width, "out", "has another shape than q");
    expect(positions.shape(0) == rows, "positions", "has another length than source");
    expect(slots.shape(0) == rows, "slots", "has another length than source");
    expect(cos.shape(1) <= dim / 2, "cos", "rotates more than head_dim");
    expect(sin.shape(0) == cos.shape(0) && sin.shape(1) == cos.shape(1), "sin", "has another shape than cos");
    expect(!q_norm || q_norm->shape(0) == dim, "q_norm", "has another length than head_dim");
    expect(!k_norm || k_norm->shape(0) == dim, "k_norm", "has another length than head_dim");
    check_store(pool, positions.data(), slots.data(), static_cast<int64_t>(rows), static_cast<int64_t>(cos.shape(0)));
    RopeStoreCall call{};
    call.target = kv_target(pool, layer);
    call.source = source.data();
    call.source_stride = static_cast<int64_t>(source.shape(1));
    call.out = out.data();
    call.out_stride = static_cast<int64_t>(q_width);
    call.positions = positions.data();
    call.slots = slots.data();
    call.cos = cos.data();
    call.sin = sin.data();
    call.q_norm = q_norm ? q_norm->data() : nullptr;
    call.k_norm = k_norm ? k_norm->data() : nullptr;
    call.epsilon = epsilon;
    call.num_heads = static_cast<int32_t>(q_width / dim);
    call.rotary_dim = static_cast<int32_t>(2 * cos.shape(1));
    kv_store_kernels_for(find_isa(isa)).store_rows(call, 0, static_cast<int64_t>(rows));
}

// One layer's attention, task after task in the order of a plan for `num_threads` threads. `out` is fp32, or
// uint16 for bf16. Returns (tasks, merges).
nb::tuple attention(const OwnedKVPool& owner, int64_t layer, Array<float, 2> q,
                    nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu> out, float scale, int32_t window,
                    Array<int32_t, 1> logical, Array<int64_t, 1> slots, Array<int32_t, 1> parents,
                    Array<int32_t, 1> starts, Array<int32_t, 2> page_tables, int num_threads,
                    const std::string& isa) {
    const KVPool& pool = owner.pool();
    check_layer(owner, layer);
    size_t rows = q.shape(0), dim = static_cast<size_t>(pool.layout.head_dim);
    expect(q.shape(1) >= dim && q.shape(1) % dim == 0 && q.shape(1) / dim <= 65536, "q",
           "is no [rows, heads * head_dim]");
    expect(out.shape(0) == rows && out.shape(1) == q.shape(1), "out", "has another shape than q");
    bool wide = out.dtype() == nb::dtype<float>();
    expect(wide || out.dtype() == nb::dtype<uint16_t>(), "out", "is neither float32 nor uint16 (bfloat16)");
    expect(logical.shape(0) == rows, "logical", "has another length than q");
    expect(slots.shape(0) == rows, "slots", "has another length than q");
    expect(parents.shape(0) == rows, "parents", "has another length than q");
    expect(starts.shape(0) >= 1 && page_tables.shape(0) == starts.shape(0) - 1, "page_tables",
           "has another number of segments than starts");
    expect(window >= 0, "window", "is negative");
    expect(num_threads >= 1 && num_threads <= 1024, "num_threads", "is out of range");
    Batch batch{};
    batch.rows = static_cast<int64_t>(rows);
    batch.segments = static_cast<int64_t>(page_tables.shape(0));
    batch.logical = logical.data();
    batch.slots = slots.data();
    batch.parents = parents.data();
    batch.starts = starts.data();
    batch.page_tables = page_tables.data();
    batch.table_width = static_cast<int64_t>(page_tables.shape(1));
    AttentionShape shape{static_cast<int32_t>(q.shape(1) / dim), pool.layout.num_kv_heads, pool.layout.head_dim,
                         scale, window, static_cast<int32_t>(layer), 0.0f};
    AttentionPlan plan;
    plan.build(batch, pool, shape, num_threads);
    // From the heap, where a sanitizer sees its end.
    std::unique_ptr<uint8_t, decltype(&std::free)> scratch(
        static_cast<uint8_t*>(std::aligned_alloc(kAlign, static_cast<size_t>(plan.scratch_bytes()))), &std::free);
    if (!scratch) throw std::bad_alloc();
    const AttentionKernels& kernels = attention_kernels_for(find_isa(isa));
    int64_t stride = static_cast<int64_t>(q.shape(1));
    Dtype dtype = wide ? Dtype::f32 : Dtype::bf16;
    for (int64_t i = 0; i < plan.num_tasks(); ++i)
        kernels.run(plan, shape, i, std::min(i + 1, plan.num_tasks() - 1), q.data(), stride, out.data(), stride, dtype, scratch.get());
    for (int64_t i = 0; i < plan.num_merges(); ++i)
        kernels.merge(plan, shape, i, out.data(), stride, dtype, scratch.get());
    return nb::make_tuple(plan.num_tasks(), plan.num_merges());
}

void copy(const OwnedKVPool& owner, Array<int32_t, 2> copies) {
    expect(copies.shape(1) == 2, "copies", "is no [count, 2]");
    copy_pages(owner.pool(), copies.data(), static_cast<int64_t>(copies.shape(0)));
}

void move(const OwnedKVPool& owner, Array<int64_t, 2> moves) {
    expect(moves.shape(1) == 2, "moves", "is no [count, 2]");
    const int64_t count = static_cast<int64_t>(moves.shape(0));
    check_moves(owner.pool(), moves.data(), count);
    const KVLayout& layout = owner.pool().layout;
    move_slots(owner.pool(), moves.data(), count, 0, int64_t{layout.num_layers} * layout.num_kv_heads);
}

}  // namespace

void bind_attention(nb::module_& m) {
    nb::class_<OwnedKVPool>(m, "KVPool")
        .def(nb::init<int64_t, int64_t, int64_t, int32_t, int32_t, int32_t, const std::string&>(), nb::kw_only(),
             nb::arg("num_frames"), nb::arg("frame_bytes"), nb::arg("pages_per_frame"), nb::arg("num_layers"),
             nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::arg("format"))
        .def_prop_ro("num_pages", [](const OwnedKVPool& owner) { return owner.pool().num_pages(); })
        .def_prop_ro("page_bytes", [](const OwnedKVPool& owner) { return owner.pool().layout.page_bytes(); })
        .def("read", &read, nb::arg("layer"), nb::arg("slot"))
        .def("copy_pages", &copy, nb::arg("copies"))
        .def("move_slots", &move, nb::arg("moves").noconvert());
    m.def("kv_store", &kv_store, nb::arg("pool"), nb::arg("layer"), nb::arg("source"), nb::arg("out"),
          nb::arg("positions"), nb::arg("slots"), nb::arg("cos"), nb::arg("sin"), nb::arg("q_norm").none() = nb::none(),
          nb::arg("k_norm").none() = nb::none(), nb::arg("epsilon") = 0.0f, nb::arg("isa") = "");
    m.def("attention", &attention, nb::arg("pool"), nb::arg("layer"), nb::arg("q"), nb::arg("out"), nb::arg("scale"),
          nb::arg("window"), nb::arg("logical"), nb::arg("slots"), nb::arg("parents"), nb::arg("starts"),
          nb::arg("page_tables"), nb::arg("num_threads") = 1, nb::arg("isa") = "");
}

}  // namespace tokenloom
