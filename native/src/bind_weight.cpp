// Packing weights on all threads, and the packed bytes for the cache on disk.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "pack.hpp"
#include "pool.hpp"
#include "refuse.hpp"
#include "weight.hpp"

namespace nb = nanobind;

namespace tokenloom {

namespace {

using Anything = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

Format format_of(const std::string& name) {
    if (name == "float32") return Format::f32;
    if (name == "bfloat16") return Format::bf16;
    if (name == "int8") return Format::i8;
    if (name == "int4") return Format::i4;
    refuse("weight format " + name);
}

const char* format_name(Format format) {
    switch (format) {
        case Format::f32: return "float32";
        case Format::bf16: return "bfloat16";
        case Format::i8: return "int8";
        default: return "int4";
    }
}

SourceType float_type(const std::string& name) {
    if (name == "float32") return SourceType::f32;
    if (name == "bfloat16") return SourceType::bf16;
    if (name == "float16") return SourceType::f16;
    refuse("dtype " + name + " of a weight");
}

void of_bytes(const Anything& array, size_t item, size_t ndim, const char* what) {
    if (array.itemsize() != item || array.ndim() != ndim) refuse(std::string(what) + " has another type or shape");
}

std::shared_ptr<PackedWeight> empty_weight(Format format, bool paired, int64_t n, int64_t k, int64_t group) {
    auto weight = std::make_shared<PackedWeight>();
    weight->matrix = packed_shape(format, paired, n, k, group);
    weight->data = Memory(static_cast<size_t>(packed_bytes(weight->matrix)) + kAlign);
    weight->scales.resize(static_cast<size_t>(count_scales(weight->matrix)));
    weight->matrix.data = weight->data.data();
    weight->matrix.scales = weight->scales.data();
    return weight;
}

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A weight whose bytes lie elsewhere and stay there.
std::shared_ptr<PackedWeight> view_weight(const std::string& format, bool paired, int64_t n, int64_t k, int64_t group,
                                          const Bytes& data, const Bytes& scales) {
    auto weight = std::make_shared<PackedWeight>();
    PackedMatrix& m = weight->matrix;
    m = packed_shape(format_of(format), paired, n, k, group);
    if (static_cast<int64_t>(data.size()) != packed_bytes(m) ||
        static_cast<int64_t>(scales.size()) != count_scales(m) * 4)
        refuse("view_weight: data or scales of another size");
    if (reinterpret_cast<uintptr_t>(data.data()) % kAlign || reinterpret_cast<uintptr_t>(scales.data()) % 4)
        refuse("view_weight: data must begin at a multiple of 64 bytes");
    m.data = data.data();
    m.scales = reinterpret_cast<const float*>(scales.data());
    weight->owner = std::make_shared<std::pair<Bytes, Bytes>>(data, scales);
    return weight;
}

std::shared_ptr<PackedWeight> packed(ThreadPool& pool, Format format, const std::vector<SourceRows>& sources, bool paired,
                                     int64_t k, int64_t group) {
    int64_t n = 0;
    for (const SourceRows& source : sources) n += source.rows;
    auto weight = empty_weight(format, paired, n, k, group);
    check_sources(weight->matrix, sources);
    nb::gil_scoped_release release;
    WorkCounter counter;
    counter.reset();
    int64_t panels = weight->matrix.panels;
    std::atomic<const char*> wrong{nullptr};  // jobs of the pool must not throw
    pool.run([&](int thread) {
        int64_t begin, end;
        while (!wrong.load(std::memory_order_relaxed) && counter.take(thread, panels, kOneByOne, begin, end)) {
            const char* found =
                pack_panels(weight->matrix, sources, weight->data.data(), weight->scales.data(), begin, end);
            if (found) wrong.store(found, std::memory_order_relaxed);
        }
    });
    if (const char* found = wrong.load(std::memory_order_relaxed)) refuse(found);
    return weight;
}

std::shared_ptr<PackedWeight> pack(ThreadPool& pool, const std::vector<Anything>& sources,
                                   const std::vector<std::string>& types, const std::string& format, bool paired,
                                   int64_t group) {
    if (sources.empty() || sources.size() != types.size()) refuse("pack: one type for each source, at least one");
    std::vector<SourceRows> rows;
    for (size_t i = 0; i < sources.size(); ++i) {
        SourceType type = float_type(types[i]);
        of_bytes(sources[i], type == SourceType::f32 ? 4 : 2, 2, "a source");
        int64_t k = static_cast<int64_t>(sources[i].shape(1));
        if (k != static_cast<int64_t>(sources[0].shape(1))) refuse("pack: sources of different depths");
        rows.push_back({sources[i].data(), type, static_cast<int64_t>(sources[i].shape(0)), k, 1, nullptr, nullptr});
    }
    return packed(pool, format_of(format), rows, paired, static_cast<int64_t>(sources[0].shape(1)), group);
}

std::shared_ptr<PackedWeight> pack_quantized(ThreadPool& pool, const std::vector<Anything>& values,
                                             const std::vector<Anything>& scales,
                                             const std::vector<std::optional<Anything>>& zeros, bool paired,
                                             int64_t group) {
    if (values.empty() || values.size() != scales.size() || values.size() != zeros.size())
        refuse("pack_quantized: values, scales and zeros belong together");
    std::vector<SourceRows> rows;
    Format format = zeros[0] ? Format::i4 : Format::i8;
    for (size_t i = 0; i < values.size(); ++i) {
        of_bytes(values[i], 1, 2, "values");
        size_t n = values[i].shape(0), k = values[i].shape(1);
        if (k != values[0].shape(1)) refuse("pack_quantized: sources of different depths");
        SourceRows source{values[i].data(), SourceType::i8, static_cast<int64_t>(n), static_cast<int64_t>(k), 1,
                          scales[i].data(), nullptr};
        if (format == Format::i8) {
            of_bytes(scales[i], 4, 1, "scales");
            if (scales[i].shape(0) != n || zeros[i]) refuse("pack_quantized: scales of another shape");
        } else {
            if (!zeros[i] || group < 1) refuse("pack_quantized: int4 has zeros and a group");
            size_t groups = (k + static_cast<size_t>(group) - 1) / static_cast<size_t>(group);
            of_bytes(scales[i], 2, 2, "scales");
            of_bytes(*zeros[i], 1, 2, "zeros");
            if (scales[i].shape(0) != n || scales[i].shape(1) != groups || zeros[i]->shape(0) != n ||
                zeros[i]->shape(1) != groups)
                refuse("pack_quantized: scales or zeros of another shape");
            source.type = SourceType::i4;
            source.zeros = static_cast<const uint8_t*>(zeros[i]->data());
        }
        rows.push_back(source);
    }
    return packed(pool, format, rows, paired, static_cast<int64_t>(values[0].shape(1)), group);
}

// Eight independent multiply-and-add lanes over 64-byte blocks, so that checking costs less than reading.
uint64_t hash_block(const uint8_t* data, size_t bytes, uint64_t seed) {
    uint64_t lane[8];
    for (int i = 0; i < 8; ++i) lane[i] = seed + 0x9E3779B97F4A7C15ull * static_cast<uint64_t>(i + 1);
    auto mix = [](uint64_t h, uint64_t word) {
        h = (h ^ word) * 0xD6E8FEB86659FD93ull;
        return h ^ (h >> 32);
    };
    size_t i = 0;
    for (; i + 64 <= bytes; i += 64)
        for (int j = 0; j < 8; ++j) {
            uint64_t word;
            __builtin_memcpy(&word, data + i + 8 * j, 8);
            lane[j] = mix(lane[j], word);
        }
    uint64_t total = mix(seed, bytes);
    for (; i < bytes; ++i) total = mix(total, data[i]);
    for (uint64_t one : lane) total = mix(total, one);
    return total;
}

// A digest of bytes (for noticing damage, not forgery): blocks of 4 MiB are hashed apart, on all threads.
uint64_t digest(ThreadPool& pool, const Anything& array) {
    constexpr size_t block = size_t{4} << 20;
    const uint8_t* data = static_cast<const uint8_t*>(array.data());
    size_t bytes = array.nbytes(), blocks = (bytes + block - 1) / block;
    std::vector<uint64_t> parts(blocks);
    nb::gil_scoped_release release;
    WorkCounter counter;
    counter.reset();
    pool.run([&](int thread) {
        int64_t begin, end;
        while (counter.take(thread, static_cast<int64_t>(blocks), kOneByOne, begin, end)) {
            size_t at = static_cast<size_t>(begin) * block;
            parts[static_cast<size_t>(begin)] = hash_block(data + at, std::min(block, bytes - at), 1);
        }
    });
    return hash_block(reinterpret_cast<const uint8_t*>(parts.data()), parts.size() * 8, bytes);
}

}  // namespace

void bind_weight(nb::module_& m) {
    nb::class_<PackedWeight>(m, "PackedWeight")
        .def_prop_ro("format", [](const PackedWeight& w) { return format_name(w.matrix.format); })
        .def_prop_ro("paired", [](const PackedWeight& w) { return w.matrix.paired != 0; })
        .def_prop_ro("shape", [](const PackedWeight& w) { return std::make_pair(w.matrix.n, w.matrix.k); })
        .def_prop_ro("group", [](const PackedWeight& w) { return w.matrix.group; })
        .def_prop_ro("nbytes", [](const PackedWeight& w) {
            return packed_bytes(w.matrix) + kAlign + count_scales(w.matrix) * 4;
        })
        .def_prop_ro("data",
                     [](PackedWeight& w) {
                         size_t bytes = static_cast<size_t>(packed_bytes(w.matrix));
                         return nb::ndarray<const uint8_t, nb::numpy, nb::ndim<1>>(w.matrix.data, {bytes}, nb::find(w));
                     },
                     nb::rv_policy::reference_internal)
        .def_prop_ro("scales", [](PackedWeight& w) {
            size_t count = static_cast<size_t>(count_scales(w.matrix));
            return nb::ndarray<const float, nb::numpy, nb::ndim<1>>(w.matrix.scales, {count}, nb::find(w));
        })
        .def("row", [](const PackedWeight& w, int64_t n, nb::ndarray<float, nb::ndim<1>, nb::c_contig> out) {
            if (n < 0 || n >= w.matrix.n || static_cast<int64_t>(out.shape(0)) != w.matrix.k)
                refuse("row: out of range, or out is not as long as the depth");
            unpack_row(w.matrix, n, out.data());
        });
    m.def("pack", &pack, nb::arg("pool"), nb::arg("sources"), nb::arg("types"), nb::arg("format"), nb::arg("paired"),
          nb::arg("group"));
    m.def("pack_quantized", &pack_quantized, nb::arg("pool"), nb::arg("values"), nb::arg("scales"), nb::arg("zeros"),
          nb::arg("paired"), nb::arg("group"));
    m.def("view_weight", &view_weight, nb::arg("format"), nb::arg("paired"), nb::arg("n"), nb::arg("k"), nb::arg("group"),
          nb::arg("data").noconvert(), nb::arg("scales").noconvert());
    m.def("digest", &digest, nb::arg("pool"), nb::arg("array"));
}

}  // namespace tokenloom
