// PackedLinear: a packed weight and its products on one thread, for tests.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <stdexcept>

#include "linear.hpp"
#include "memory.hpp"
#include "pack.hpp"
#include "weight.hpp"
#include "refuse.hpp"

namespace nb = nanobind;

namespace tokenloom {
namespace {

using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Format find_format(const std::string& name) {
    if (name == "f32") return Format::f32;
    if (name == "bf16") return Format::bf16;
    if (name == "i8") return Format::i8;
    if (name == "i4") return Format::i4;
    refuse("format " + name + " is none of f32, bf16, i8, i4");
}

template <class A>
bool is(const A& array, nb::dlpack::dtype_code code, int bits) {
    return array.dtype() == nb::dlpack::dtype{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
}

template <class T, class A>
const T* pointer(const A& array) {
    return static_cast<const T*>(array.data());
}

constexpr auto kFloat = nb::dlpack::dtype_code::Float;
constexpr auto kInt = nb::dlpack::dtype_code::Int;
constexpr auto kUInt = nb::dlpack::dtype_code::UInt;

class PackedLinear {
  public:
    // Sources: 2-d arrays [rows, k] stacked along the rows; float32, float16, uint16 (bits of bfloat16), int8
    // with float32 scales [rows], or uint8 with float16 scales [rows, groups] and uint8 zeros alike.
    PackedLinear(const std::vector<Array>& arrays, const std::string& format, bool paired, int64_t group,
                 const std::vector<Array>& scales, const std::vector<Array>& zeros) {
        if (arrays.empty()) refuse("sources is empty");
        std::vector<SourceRows> sources;
        int64_t n = 0, k = 0;
        for (size_t i = 0; i < arrays.size(); ++i) {
            const Array& array = arrays[i];
            if (array.ndim() != 2 || array.shape(0) < 1 || array.shape(1) < 1) refuse("sources must be matrices");
            if (i && static_cast<int64_t>(array.shape(1)) != k) refuse("sources differ in depth");
            k = static_cast<int64_t>(array.shape(1));
            n += static_cast<int64_t>(array.shape(0));
            sources.push_back(source_of(array));
        }
        weight_.matrix = packed_shape(find_format(format), paired, n, k, group);
        for (size_t i = 0; i < arrays.size(); ++i) attach(sources[i], i, k, scales, zeros);
        check_sources(weight_.matrix, sources);
        weight_.data = Memory(static_cast<size_t>(packed_bytes(weight_.matrix)));
        if (weight_.matrix.format == Format::i8)
            weight_.scales.resize(static_cast<size_t>(weight_.matrix.panels * kPanel));
        pack_panels(weight_.matrix, sources, weight_.data.data(), weight_.scales.data(), 0, weight_.matrix.panels);
        weight_.matrix.data = weight_.data.data();
        weight_.matrix.scales = weight_.scales.data();
    }

    const PackedMatrix& matrix() const { return weight_.matrix; }

    // The product of x (float32 or uint16 [rows, k]) and the panels [begin, end), written into `out`.
    void linear(const Array& x, const Output& out, const std::string& isa, std::optional<Vector> bias,
                const std::string& epilogue, float scale, int64_t begin, std::optional<int64_t> end) const {
        const PackedMatrix& m = weight_.matrix;
        const LinearKernels& kernels = linear_kernels_for(find_isa(isa));
        LinearCall call{};
        call.weight = &m;
        call.epilogue = find_epilogue(epilogue);
        if (is_paired(call.epilogue) && !m.paired) refuse("epilogue " + epilogue + " needs a paired weight");
        call.scale = scale;
        Source source(x, m.k);
        if (m.format == Format::f32 && source.dtype != Dtype::f32) refuse("x must be float32 for an f32 weight");
        if (m.format == Format::bf16 && source.dtype != Dtype::bf16) refuse("x must be uint16 for a bf16 weight");
        call.rows = source.rows;
        call.source = source.memory.data();
        call.source_stride = source.stride;
        const int64_t width = is_paired(call.epilogue) ? m.n / 2 : m.n;
        if (out.ndim() != 2 || static_cast<int64_t>(out.shape(0)) != call.rows ||
            static_cast<int64_t>(out.shape(1)) != width || out.stride(1) != 1 || out.stride(0) < width)
            refuse("out must be a matrix of a row per row of x and a column per result, rows contiguous");
        if (is(out, kFloat, 32)) call.out_dtype = Dtype::f32;
        else if (is(out, kUInt, 16)) call.out_dtype = Dtype::bf16;
        else refuse("out must be float32 or uint16");
        if (call.epilogue == Epilogue::residual && call.out_dtype != Dtype::f32)
            refuse("out must be float32: residual");
        call.out = out.data();
        call.out_stride = out.stride(0);
        if (bias) {
            if (static_cast<int64_t>(bias->shape(0)) != m.n) refuse("bias must have a value per row of the weight");
            call.bias = bias->data();
        }
        int64_t last = end.value_or(m.panels);
        if (begin < 0 || last < begin || last > m.panels) refuse("begin and end must lie within the panels");
        Quantized quantized(m, call.rows);
        if (m.format == Format::i8 || m.format == Format::i4) {
            kernels.quantize_rows(call.source, source.dtype, source.stride, m, quantized.rows, 0, call.rows);
            call.quantized = quantized.rows;
            call.source = nullptr;
        }
        kernels.linear(call, begin, last);
    }

    // (int8 [rows, k], float32 scales [rows], int32 sums [rows, groups]) of x, as the product would see them.
    nb::tuple quantize(const Array& x, const std::string& isa) const {
        const PackedMatrix& m = weight_.matrix;
        if (m.format != Format::i8 && m.format != Format::i4) refuse("only i8 and i4 weights quantise their source");
        Source source(x, m.k);
        Quantized quantized(m, source.rows);
        linear_kernels_for(find_isa(isa))
            .quantize_rows(source.memory.data(), source.dtype, source.stride, m, quantized.rows, 0, source.rows);
        int8_t* values = new int8_t[static_cast<size_t>(source.rows * m.k)];
        nb::capsule own_values(values, [](void* p) noexcept { delete[] static_cast<int8_t*>(p); });
        for (int64_t r = 0; r < source.rows; ++r)
            std::memcpy(values + r * m.k, quantized.rows.values + r * quantized.rows.stride, static_cast<size_t>(m.k));
        float* scales = new float[static_cast<size_t>(source.rows)];
        nb::capsule own_scales(scales, [](void* p) noexcept { delete[] static_cast<float*>(p); });
        std::memcpy(scales, quantized.rows.scales, static_cast<size_t>(source.rows) * 4);
        const size_t count = static_cast<size_t>(source.rows * quantized.rows.groups);
        int32_t* sums = new int32_t[count];
        nb::capsule own_sums(sums, [](void* p) noexcept { delete[] static_cast<int32_t*>(p); });
        std::memcpy(sums, quantized.rows.sums, count * 4);
        const size_t rows = static_cast<size_t>(source.rows), groups = static_cast<size_t>(quantized.rows.groups);
        return nb::make_tuple(
            nb::ndarray<nb::numpy, int8_t>(values, {rows, static_cast<size_t>(m.k)}, own_values),
            nb::ndarray<nb::numpy, float>(scales, {rows}, own_scales),
            nb::ndarray<nb::numpy, int32_t>(sums, {rows, groups}, own_sums));
    }

    nb::ndarray<nb::numpy, float> unpack(int64_t row) const {
        const PackedMatrix& m = weight_.matrix;
        if (row < 0 || row >= m.n) refuse("row lies outside the weight");
        float* values = new float[static_cast<size_t>(m.k)];
        nb::capsule own(values, [](void* p) noexcept { delete[] static_cast<float*>(p); });
        unpack_row(m, row, values);
        return nb::ndarray<nb::numpy, float>(values, {static_cast<size_t>(m.k)}, own);
    }

  private:
    // x copied to rows that the kernels may read past the end of, with NaN there.
    struct Source {
        Source(const Array& x, int64_t k) {
            if (x.ndim() != 2 || static_cast<int64_t>(x.shape(1)) != k) refuse("x must be [rows, k]");
            if (is(x, kFloat, 32)) dtype = Dtype::f32;
            else if (is(x, kUInt, 16)) dtype = Dtype::bf16;
            else refuse("x must be float32 or uint16");
            rows = static_cast<int64_t>(x.shape(0));
            if (rows > int64_t{1} << 20) refuse("x has too many rows");
            stride = (k + 63) / 64 * 64;
            const int64_t item = dtype == Dtype::f32 ? 4 : 2;
            memory = Memory(static_cast<size_t>(rows * stride * item));
            if (rows) std::memset(memory.data(), 0xff, memory.size());
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < k; ++i)
                    std::memcpy(memory.data() + (r * stride + i) * item,
                                static_cast<const uint8_t*>(x.data()) + (r * x.stride(0) + i * x.stride(1)) * item,
                                static_cast<size_t>(item));
        }
        Dtype dtype;
        int64_t rows, stride;
        Memory memory;
    };

    struct Quantized {
        Quantized(const PackedMatrix& m, int64_t count)
            : values(static_cast<size_t>(quantized_stride(m) * count)), scales(static_cast<size_t>(count)),
              sums(static_cast<size_t>(count * quantized_groups(m))) {
            rows = {values.data(), quantized_stride(m), scales.data(), sums.data(), quantized_groups(m)};
        }
        std::vector<int8_t> values;
        std::vector<float> scales;
        std::vector<int32_t> sums;
        QuantizedRows rows;
    };

    static SourceRows source_of(const Array& array) {
        SourceRows source{};
        source.data = array.data();
        source.rows = static_cast<int64_t>(array.shape(0));
        source.row_stride = array.stride(0);
        source.k_stride = array.stride(1);
        if (is(array, kFloat, 32)) source.type = SourceType::f32;
        else if (is(array, kFloat, 16)) source.type = SourceType::f16;
        else if (is(array, kUInt, 16)) source.type = SourceType::bf16;
        else if (is(array, kInt, 8)) source.type = SourceType::i8;
        else if (is(array, kUInt, 8)) source.type = SourceType::i4;
        else refuse("sources must be float32, float16, uint16 (bfloat16), int8 or uint8");
        return source;
    }

    void attach(SourceRows& source, size_t index, int64_t k, const std::vector<Array>& scales,
                const std::vector<Array>& zeros) const {
        const bool i8 = source.type == SourceType::i8, i4 = source.type == SourceType::i4;
        if (!i8 && !i4) return;
        if (index >= scales.size()) refuse("scales must have an array per source");
        const Array& scale = scales[index];
        const size_t rows = static_cast<size_t>(source.rows);
        if (i8 && (!is(scale, kFloat, 32) || scale.ndim() != 1 || scale.shape(0) != rows || scale.stride(0) != 1))
            refuse("scales must be float32 [rows]");
        source.scales = scale.data();
        if (i8 || weight_.matrix.format != Format::i4) return;
        const size_t groups = static_cast<size_t>(quantized_groups(weight_.matrix));
        auto fits = [&](const Array& a) {
            return a.ndim() == 2 && a.shape(0) == rows && a.shape(1) == groups &&
                   (groups == 1 || a.stride(1) == 1) && (rows == 1 || a.stride(0) == static_cast<int64_t>(groups));
        };
        if (!is(scale, kFloat, 16) || !fits(scale)) refuse("scales must be float16 [rows, groups]");
        if (index >= zeros.size()) refuse("zeros must have an array per source");
        const Array& zero = zeros[index];
        if (!is(zero, kUInt, 8) || !fits(zero)) refuse("zeros must be uint8 [rows, groups]");
        for (size_t i = 0; i < rows * groups; ++i)
            if (pointer<uint8_t>(zero)[i] > 16) refuse("zeros must be at most 16");
        for (int64_t r = 0; r < source.rows; ++r)
            for (int64_t i = 0; i < k; ++i)
                if (static_cast<const uint8_t*>(source.data)[r * source.row_stride + i * source.k_stride] > 15)
                    refuse("sources must be at most 15");
        source.zeros = pointer<uint8_t>(zero);
    }

    PackedWeight weight_;
};

}  // namespace

void bind_linear(nb::module_& m) {
    nb::class_<PackedLinear>(m, "PackedLinear")
        .def(nb::init<const std::vector<Array>&, const std::string&, bool, int64_t, const std::vector<Array>&,
                      const std::vector<Array>&>(),
             nb::arg("sources"), nb::arg("format"), nb::arg("paired") = false, nb::arg("group") = 0,
             nb::arg("scales") = std::vector<Array>(), nb::arg("zeros") = std::vector<Array>())
        .def_prop_ro("n", [](const PackedLinear& p) { return p.matrix().n; })
        .def_prop_ro("k", [](const PackedLinear& p) { return p.matrix().k; })
        .def_prop_ro("panels", [](const PackedLinear& p) { return p.matrix().panels; })
        .def_prop_ro("nbytes", [](const PackedLinear& p) { return packed_bytes(p.matrix()); })
        .def("linear", &PackedLinear::linear, nb::arg("x"), nb::arg("out"), nb::arg("isa") = "",
             nb::arg("bias") = nb::none(), nb::arg("epilogue") = "none", nb::arg("scale") = 1.0f,
             nb::arg("begin") = 0, nb::arg("end") = nb::none())
        .def("quantize", &PackedLinear::quantize, nb::arg("x"), nb::arg("isa") = "")
        .def("unpack", &PackedLinear::unpack, nb::arg("row"));
}

}  // namespace tokenloom
