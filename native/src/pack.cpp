#include "pack.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace tokenloom {
namespace {

constexpr int64_t kStepBytes = 4 * kPanel;
constexpr int kMaxZero = 16;

float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

float float_of_f16(uint16_t half) {
    float x = float_of(static_cast<uint32_t>(half & 0x7fff) << 13) * 0x1p112f;  // exact, denormals too
    uint32_t bits = bits_of(x);
    if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
    return float_of(bits | static_cast<uint32_t>(half & 0x8000) << 16);
}

uint16_t f16_of_float(float x) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
    if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above
    if (size < 0x38800000u) {  // below 2^-14: the addition rounds to multiples of 2^-24
        return static_cast<uint16_t>(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));
    }
    return static_cast<uint16_t>(sign | ((size + 0xfff + (size >> 13 & 1) - 0x38000000u) >> 13));
}

uint16_t bf16_of_float(float x) {
    uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Nearest even for |x| below 2^22, without a call into the mathematics library.
float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }
// NaN becomes `low`.
float clip(float x, float low, float high) { return x > low ? (x < high ? x : high) : low; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; }

int64_t group_bytes(int64_t group) { return aligned(group / 2 * kPanel + 3 * kPanel); }

// The row of the weight in column `column` of a panel, or -1.
int64_t row_of(const PackedMatrix& shape, int64_t panel, int64_t column) {
    if (!shape.paired) {
        int64_t n = panel * kPanel + column;
        return n < shape.n ? n : -1;
    }
    int64_t n = panel * kLanes + column % kLanes;
    return n >= shape.n / 2 ? -1 : column < kLanes ? n : n + shape.n / 2;
}
// Its inverse.
void place_of(const PackedMatrix& shape, int64_t n, int64_t& panel, int64_t& column) {
    if (!shape.paired) {
        panel = n / kPanel;
        column = n % kPanel;
    } else {
        int64_t half = shape.n / 2, up = n >= half;
        panel = (n - up * half) / kLanes;
        column = (n - up * half) % kLanes + up * kLanes;
    }
}

struct Row {
    const SourceRows* source;
    int64_t index;
};
Row find_row(const std::vector<SourceRows>& sources, int64_t n) {
    for (const SourceRows& source : sources) {
        if (n < source.rows) return {&source, n};
        n -= source.rows;
    }
    throw std::invalid_argument("sources have fewer rows than the weight");
}

template <class T>
const T* element(const Row& row, int64_t k) {
    const SourceRows& s = *row.source;
    return static_cast<const T*>(s.data) + row.index * s.row_stride + k * s.k_stride;
}

void read_floats(const Row& row, int64_t begin, int64_t end, float* out) {
    const int64_t stride = row.source->k_stride, count = end - begin;
    switch (row.source->type) {
        case SourceType::f32: {
            const float* p = element<float>(row, begin);
            for (int64_t k = 0; k < count; ++k) out[k] = p[k * stride];
            break;
        }
        case SourceType::bf16: {
            const uint16_t* p = element<uint16_t>(row, begin);
            for (int64_t k = 0; k < count; ++k) out[k] = float_of(static_cast<uint32_t>(p[k * stride]) << 16);
            break;
        }
        case SourceType::f16: {
            const uint16_t* p = element<uint16_t>(row, begin);
            for (int64_t k = 0; k < count; ++k) out[k] = float_of_f16(p[k * stride]);
            break;
        }
        default:
            throw std::invalid_argument("integers are no source of this format");
    }
}

constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kInfiniteBf16 = 0x7f7f8000u;  // from here on a float rounds to infinity

// The bits of the largest |x|. They are in the order of the numbers, with infinity and then NaN at the end.
uint32_t largest_bits(const float* x, int64_t count) {
    uint32_t best = 0;
    for (int64_t k = 0; k < count; ++k) best = std::max(best, bits_of(x[k]) & 0x7fffffffu);
    return best;
}

bool is_finite_f16(uint16_t half) { return (half & 0x7c00) != 0x7c00; }

// --- one column of a panel ------------------------------------------------------------------------------
// Every column is cut into steps of 4 bytes, 128 bytes apart. `scratch` holds `depth` floats. All but the first
// return what is wrong with a number, or null.

constexpr char kNotFinite[] = "a value is not finite";
constexpr char kTooWide[] = "a group of values is too wide for a scale in float16";
constexpr char kOverflow[] = "a value is too large for bfloat16";
constexpr char kOutside[] = "an integer lies outside the range of its format";
constexpr char kBadScale[] = "a scale is not finite";

void pack_f32(const Row& row, int64_t k, uint8_t* column, float* scratch) {
    read_floats(row, 0, k, scratch);
    for (int64_t i = 0; i < k; ++i) std::memcpy(column + i * kStepBytes, scratch + i, 4);
}

const char* pack_bf16(const Row& row, int64_t k, uint8_t* column, float* scratch) {
    read_floats(row, 0, k, scratch);
    if (k % 2) scratch[k] = 0;
    uint32_t overflows = 0;  // a NaN or an infinity stays what it was
    for (int64_t i = 0; i < k; ++i)
        overflows |= (bits_of(scratch[i]) & 0x7fffffffu) - kInfiniteBf16 < kInfinity - kInfiniteBf16;
    for (int64_t i = 0; i < k; i += 2) {
        uint32_t pair = bf16_of_float(scratch[i]) | static_cast<uint32_t>(bf16_of_float(scratch[i + 1])) << 16;
        std::memcpy(column + i / 2 * kStepBytes, &pair, 4);
    }
    return overflows ? kOverflow : nullptr;
}

const char* pack_i8(const Row& row, int64_t k, uint8_t* column, float& scale, float* scratch) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch);  // behind the reader, which has floats there
    if (row.source->type == SourceType::i8) {
        scale = static_cast<const float*>(row.source->scales)[row.index];
        if ((bits_of(scale) & 0x7fffffffu) >= kInfinity) return kBadScale;
        const int8_t* p = element<int8_t>(row, 0);
        for (int64_t i = 0; i < k; ++i) bytes[i] = static_cast<uint8_t>(p[i * row.source->k_stride] + 128);
    } else {
        read_floats(row, 0, k, scratch);
        const uint32_t largest = largest_bits(scratch, k);
        if (largest >= kInfinity) return kNotFinite;
        scale = float_of(largest) / 127.0f;
        if (scale < 0x1p-126f) scale = 1;
        for (int64_t i = 0; i < k; ++i) {
            int q = static_cast<int>(clip(round_even(clip(scratch[i] / scale, -1000, 1000)), -127, 127));
            bytes[i] = static_cast<uint8_t>(q + 128);
        }
    }
    for (int64_t i = k; i % 4; ++i) bytes[i] = 128;
    for (int64_t i = 0; i < k; i += 4) std::memcpy(column + i / 4 * kStepBytes, bytes + i, 4);
    return nullptr;
}

// One column of one group: `count` weights, packed as `group`.
struct Group {
    uint16_t scale;
    uint8_t zero;
    uint8_t* q;  // [group]
};
const char* quantize_group(const float* w, int64_t count, Group& out) {
    if (largest_bits(w, count) >= kInfinity) return kNotFinite;
    float low = 0, high = 0;
    for (int64_t i = 0; i < count; ++i) {
        low = w[i] < low ? w[i] : low;
        high = w[i] > high ? w[i] : high;
    }
    out.scale = f16_of_float((high - low) / 15.0f);
    if (!is_finite_f16(out.scale)) return kTooWide;
    float scale = float_of_f16(out.scale);
    if (scale == 0) {
        scale = 1;
        out.scale = 0x3c00;
    }
    float zero = clip(round_even(clip(-low / scale, -1000, 1000)), 0, 15);
    out.zero = static_cast<uint8_t>(zero);
    for (int64_t i = 0; i < count; ++i) {
        float q = round_even(clip(w[i] / scale, -1000, 1000)) + zero;
        out.q[i] = static_cast<uint8_t>(clip(q, 0, 15));
    }
    return nullptr;
}

// The group of the row that begins at `first`, as somebody quantised it.
const char* copy_group(const Row& row, int64_t groups, int64_t g, int64_t first, int64_t count, Group& out) {
    const SourceRows& s = *row.source;
    out.scale = static_cast<const uint16_t*>(s.scales)[row.index * groups + g];
    out.zero = s.zeros[row.index * groups + g];
    if (!is_finite_f16(out.scale)) return kBadScale;
    const uint8_t* p = element<uint8_t>(row, first);
    uint8_t bits = 0;
    for (int64_t i = 0; i < count; ++i) {
        out.q[i] = p[i * s.k_stride];
        bits |= out.q[i];
    }
    return bits > 15 || out.zero > kMaxZero ? kOutside : nullptr;
}

const char* pack_i4(const Row& row, const PackedMatrix& shape, uint8_t* panel, int64_t column, float* scratch) {
    const int64_t groups = quantized_groups(shape), size = shape.group, bytes = group_bytes(size);
    std::vector<uint8_t> q(static_cast<size_t>(size));
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * size, count = std::min(size, shape.k - first);
        Group out{0, 0, q.data()};
        std::fill(q.begin(), q.end(), uint8_t{0});
        const char* wrong;
        if (row.source->type == SourceType::i4) {
            wrong = copy_group(row, groups, g, first, count, out);
        } else {
            read_floats(row, first, first + count, scratch);
            wrong = quantize_group(scratch, count, out);
        }
        if (wrong) return wrong;
        uint8_t* block = panel + g * bytes;
        for (int64_t j = 0; j < size / 8; ++j)
            for (int64_t i = 0; i < 4; ++i)
                block[j * kStepBytes + column * 4 + i] = static_cast<uint8_t>(q[8 * j + i] | q[8 * j + 4 + i] << 4);
        uint8_t* tail = block + size / 2 * kPanel;
        std::memcpy(tail + 2 * column, &out.scale, 2);
        tail[2 * kPanel + column] = out.zero;
    }
    return nullptr;
}

int64_t panel_bytes(Format format, int64_t k, int64_t group) {
    switch (format) {
        case Format::f32: return k * kStepBytes;
        case Format::bf16: return ceil_div(k, 2) * kStepBytes;
        case Format::i8: return ceil_div(k, 4) * kStepBytes;
        default: return ceil_div(k, group) * group_bytes(group);
    }
}

}  // namespace

PackedMatrix packed_shape(Format format, bool paired, int64_t n, int64_t k, int64_t group) {
    constexpr int64_t most = int64_t{1} << 31;
    if (n < 1 || k < 1 || n > most || k > most) throw std::invalid_argument("a weight needs positive sizes");
    if (paired && n % 2) throw std::invalid_argument("a paired weight needs an even number of rows");
    if (format == Format::i8 && k > kMaxDepthI8) throw std::invalid_argument("an i8 weight is at most 65536 deep");
    if (format == Format::i4 && (group < 8 || group % 8 || group > kMaxDepthI8))
        throw std::invalid_argument("the group of an i4 weight is a multiple of 8 up to 65536");
    PackedMatrix shape{};
    shape.format = format;
    shape.paired = paired;
    shape.n = n;
    shape.k = k;
    shape.group = format == Format::i4 ? group : 0;
    shape.panels = paired ? ceil_div(n / 2, kLanes) : ceil_div(n, kPanel);
    shape.panel_bytes = panel_bytes(format, k, group);
    return shape;
}

int64_t quantized_groups(const PackedMatrix& shape) {
    return shape.format == Format::i4 ? ceil_div(shape.k, shape.group) : 1;
}

int64_t quantized_stride(const PackedMatrix& shape) {
    return aligned(shape.format == Format::i4 ? quantized_groups(shape) * shape.group : shape.k);
}

void check_sources(const PackedMatrix& shape, const std::vector<SourceRows>& sources) {
    int64_t rows = 0;
    for (const SourceRows& source : sources) {
        bool integers = source.type == SourceType::i8 || source.type == SourceType::i4;
        Format natural = source.type == SourceType::i8 ? Format::i8 : Format::i4;
        if (integers && shape.format != natural) throw std::invalid_argument("integers are no source of this format");
        if (integers && !source.scales) throw std::invalid_argument("quantised sources need scales");
        if (source.type == SourceType::i4 && !source.zeros) throw std::invalid_argument("i4 sources need zero points");
        if (!source.data || source.rows < 1) throw std::invalid_argument("a source is empty");
        rows += source.rows;
    }
    if (rows != shape.n) throw std::invalid_argument("the sources do not have as many rows as the weight");
}

const char* pack_panels(const PackedMatrix& shape, const std::vector<SourceRows>& sources, uint8_t* data,
                        float* scales, int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(shape.k + 4));
    const char* wrong = nullptr;
    for (int64_t p = begin; p < end; ++p) {
        uint8_t* panel = data + p * shape.panel_bytes;
        std::memset(panel, shape.format == Format::i8 ? 128 : 0, static_cast<size_t>(shape.panel_bytes));
        for (int64_t c = 0; c < kPanel; ++c) {
            const int64_t n = row_of(shape, p, c);
            if (shape.format == Format::i8) scales[p * kPanel + c] = 0;
            if (n < 0) continue;
            const Row row = find_row(sources, n);
            uint8_t* column = panel + 4 * c;
            switch (shape.format) {
                case Format::f32: pack_f32(row, shape.k, column, scratch.data()); break;
                case Format::bf16: wrong = pack_bf16(row, shape.k, column, scratch.data()); break;
                case Format::i8: wrong = pack_i8(row, shape.k, column, scales[p * kPanel + c], scratch.data()); break;
                case Format::i4: wrong = pack_i4(row, shape, panel, c, scratch.data()); break;
            }
            if (wrong) return wrong;
        }
    }
    return nullptr;
}

void unpack_row(const PackedMatrix& weight, int64_t n, float* out) {
    int64_t panel, column;
    place_of(weight, n, panel, column);
    const uint8_t* data = weight.data + panel * weight.panel_bytes;
    const uint8_t* p = data + 4 * column;
    switch (weight.format) {
        case Format::f32:
            for (int64_t k = 0; k < weight.k; ++k) std::memcpy(out + k, p + k * kStepBytes, 4);
            break;
        case Format::bf16:
            for (int64_t k = 0; k < weight.k; k += 2) {
                uint32_t pair;
                std::memcpy(&pair, p + k / 2 * kStepBytes, 4);
                out[k] = float_of(pair << 16);
                if (k + 1 < weight.k) out[k + 1] = float_of(pair & 0xffff0000u);
            }
            break;
        case Format::i8: {
            const float scale = weight.scales[panel * kPanel + column];
            for (int64_t k = 0; k < weight.k; ++k)
                out[k] = static_cast<float>(p[k / 4 * kStepBytes + k % 4] - 128) * scale;
            break;
        }
        case Format::i4: {
            const int64_t bytes = group_bytes(weight.group);
            for (int64_t first = 0; first < weight.k; first += weight.group, data += bytes, p += bytes) {
                const uint8_t* tail = data + weight.group / 2 * kPanel;
                uint16_t half;
                std::memcpy(&half, tail + 2 * column, 2);
                const float scale = float_of_f16(half);
                const int zero = tail[2 * kPanel + column];
                const int64_t count = std::min(weight.group, weight.k - first);
                for (int64_t i = 0; i < count; ++i) {
                    const int byte = p[i / 8 * kStepBytes + i % 4];
                    out[first + i] = static_cast<float>((i % 8 < 4 ? byte & 15 : byte >> 4) - zero) * scale;
                }
            }
            break;
        }
    }
}

}  // namespace tokenloom
