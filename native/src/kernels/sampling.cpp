// Loops over a vocabulary; see sampler.hpp.
#include TL_SIMD

#include "kernels.hpp"
#include "sampler.hpp"
#include "vector_math.hpp"

namespace tokenloom {
namespace TL_ISA {

static constexpr float kInfinity = __builtin_inff();
static constexpr float kLargest = 3.402823466e+38f;

TL_INLINE int lanes_left(int64_t i, int64_t n) { return n - i < kLanes ? static_cast<int>(n - i) : kLanes; }

// Lanes past the end are -inf: they are never the best and have no mass.
TL_INLINE F load_or_lowest(const float* p, int n) {
    return n == kLanes ? load(p) : select(first(n), load(p, n), set(-kInfinity));
}

static void finish(float* logits, int64_t n, float softcap, float divisor) {
    const F cap = set(softcap), by = set(divisor), lowest = set(-kInfinity), largest = set(kLargest);
    for (int64_t i = 0; i < n; i += kLanes) {
        int lanes = lanes_left(i, n);
        F x = load(logits + i, lanes);
        if (divisor != 1) x = div(x, by);
        if (softcap != 0) x = mul(tanh(div(x, cap)), cap);
        // max and min give their second operand where the first is NaN.
        store(logits + i, min(max(x, lowest), largest), lanes);
    }
}

// The maximum of a tile, which may end with part of a vector.
TL_INLINE float tile_max(const float* p, int64_t n) {
    F a = set(-kInfinity), b = a, c = a, d = a;
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        a = max(load(p + i), a);
        b = max(load(p + i + kLanes), b);
        c = max(load(p + i + 2 * kLanes), c);
        d = max(load(p + i + 3 * kLanes), d);
    }
    for (; i < n; i += kLanes) a = max(load_or_lowest(p + i, lanes_left(i, n)), a);
    return max_lane(max(max(a, b), max(c, d)));
}

static int64_t argmax(const float* logits, int64_t n) {
    float best = -kInfinity;
    int64_t tile = 0;
    for (int64_t start = 0; start < n; start += kVocabTile) {
        float highest = tile_max(logits + start, n - start < kVocabTile ? n - start : kVocabTile);
        if (highest > best) {
            best = highest;
            tile = start;
        }
    }
    for (int64_t i = tile; i < n && i < tile + kVocabTile; i += kLanes) {
        uint32_t found = bits(eq(load_or_lowest(logits + i, lanes_left(i, n)), set(best)));
        if (found) return i + __builtin_ctz(found);
    }
    return 0;
}

static void scores(const float* logits, int64_t n, float best, float temperature, float lowest, float* out) {
    const F top = set(best), scale = set(temperature), bound = set(lowest), none = set(-kInfinity);
    for (int64_t i = 0; i < n; i += kLanes) {
        int lanes = lanes_left(i, n);
        // + 0 turns -0 into 0, so that equal scores have equal bits.
        F score = add(div(sub(load(logits + i, lanes), top), scale), zero());
        store(out + i, select(ge(score, bound), score, none), lanes);
    }
}

static void log_softmax(const float* logits, int64_t n, LogSum sum, float* out) {
    const F best = set(sum.best), log_total = set(sum.log_total);
    for (int64_t i = 0; i < n; i += kLanes) {
        int lanes = lanes_left(i, n);
        store(out + i, sub(sub(load(logits + i, lanes), best), log_total), lanes);
    }
}

static float exp_one(float x) {
    float lanes[kLanes];
    store(lanes, exp(set(x)));
    return lanes[0];
}

static LogSum log_sum_exp(const float* logits, int64_t n) {
    float best = -kInfinity, total = 0;
    for (int64_t start = 0; start < n; start += kVocabTile) {
        const float* tile = logits + start;
        const int64_t size = n - start < kVocabTile ? n - start : kVocabTile;
        const float highest = tile_max(tile, size);
        if (highest == -kInfinity) continue;
        const F top = set(highest);
        F sums = zero();
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) sums = add(sums, exp(sub(load(tile + i), top)));
        if (i < size) sums = add(sums, exp(sub(load_or_lowest(tile + i, lanes_left(i, size)), top)));
        const float merged = highest > best ? highest : best;
        total = total * exp_one(best - merged) + sum(sums) * exp_one(highest - merged);
        best = merged;
    }
    return {best, best == -kInfinity ? 0.0f : static_cast<float>(fdlibm_log(static_cast<double>(total)))};
}

// exp(score) in units of 2^-34, rounded to the nearest: `high` counts 2^-17, and `low` 2^-34.
struct Mass { I high, low; };

TL_INLINE Mass mass_of(F score) {
    F share = exp(score);
    I high = to_int(mul(share, set(0x1p17f)));
    F rest = sub(share, mul(to_float(high), set(0x1p-17f)));  // exact
    return {high, to_int(mul(rest, set(0x1p34f)))};
}

TL_INLINE I where(M m, I yes) { return as_int(select(m, as_float(yes), zero())); }

// Sums of a lane are below 2^32: kMaxVocabulary / 16 times 2^17.
TL_INLINE int64_t unsigned_sum(I lanes) {
    uint32_t wide[kLanes];
    istore(wide, lanes);
    int64_t total = 0;
    for (int i = 0; i < kLanes; ++i) total += wide[i];
    return total;
}

TL_INLINE int64_t signed_sum(I lanes) {
    int32_t wide[kLanes];
    istore(wide, lanes);
    int64_t total = 0;
    for (int i = 0; i < kLanes; ++i) total += wide[i];
    return total;
}

template <bool WithMasses>
TL_NOINLINE void split_at(const float* scores, int64_t n, const float* thresholds, Split* out) {
    F bound[kThresholds];
    I counts[kThresholds], high[kThresholds], low[kThresholds];
    for (int t = 0; t < kThresholds; ++t) {
        bound[t] = set(thresholds[t]);
        counts[t] = high[t] = low[t] = izero();
    }
    for (int64_t i = 0; i < n; i += kLanes) {
        int lanes = lanes_left(i, n);
        F score = load_or_lowest(scores + i, lanes);
        Mass m{};
        if (WithMasses) m = mass_of(score);
        for (int t = 0; t < kThresholds; ++t) {
            M reached = ge(score, bound[t]);
            counts[t] = iadd(counts[t], where(reached, iset(1)));
            if (WithMasses) {
                high[t] = iadd(high[t], where(reached, m.high));
                low[t] = iadd(low[t], where(reached, m.low));
            }
        }
    }
    for (int t = 0; t < kThresholds; ++t) {
        out->count[t] = unsigned_sum(counts[t]);
        out->mass[t] = unsigned_sum(high[t]) * (int64_t{1} << 17) + signed_sum(low[t]);
    }
}

static int64_t total_mass(const float* scores, int64_t n) {
    I high = izero(), low = izero();
    for (int64_t i = 0; i < n; i += kLanes) {
        Mass m = mass_of(load_or_lowest(scores + i, lanes_left(i, n)));
        high = iadd(high, m.high);
        low = iadd(low, m.low);
    }
    return unsigned_sum(high) * (int64_t{1} << 17) + signed_sum(low);
}

static void split(const float* scores, int64_t n, const float* thresholds, bool with_masses, Split* out) {
    if (with_masses) {
        split_at<true>(scores, n, thresholds, out);
    } else {
        split_at<false>(scores, n, thresholds, out);
    }
}

TL_INLINE uint64_t key_of(float score, int64_t id) {
    uint32_t b;
    memcpy(&b, &score, 4);
    return static_cast<uint64_t>(b & 0x7fffffffu) << 32 | static_cast<uint64_t>(id);
}

static int64_t collect(const float* scores, int64_t n, float low, float high, uint64_t* keys) {
    const F from = set(low), to = set(high);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
        F score = load(scores + i, lanes_left(i, n));
        uint32_t found = bits(ge(score, from)) & bits(lt(score, to)) & bits(first(lanes_left(i, n)));
        for (; found; found &= found - 1) {
            int64_t id = i + __builtin_ctz(found);
            keys[count++] = key_of(scores[id], id);
        }
    }
    return count;
}

static int64_t count_before(const float* scores, int64_t n, float score, int64_t id) {
    const F own = set(score);
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
        F other = load(scores + i, lanes_left(i, n));
        uint32_t present = bits(first(lanes_left(i, n)));
        uint32_t lower = id >= i + kLanes ? 0xffffu : id > i ? (1u << (id - i)) - 1u : 0u;
        count += __builtin_popcount(present & (bits(gt(other, own)) | (bits(eq(other, own)) & lower)));
    }
    return count;
}

static void masses(const uint64_t* keys, int64_t n, int64_t* out) {
    for (int64_t i = 0; i < n; i += kLanes) {
        int lanes = lanes_left(i, n);
        float score[kLanes];
        int32_t high[kLanes], low[kLanes];
        for (int j = 0; j < kLanes; ++j) {
            uint32_t b = j < lanes ? static_cast<uint32_t>(keys[i + j] >> 32) | 0x80000000u : 0;
            memcpy(&score[j], &b, 4);
        }
        Mass m = mass_of(load(score));
        istore(high, m.high);
        istore(low, m.low);
        for (int j = 0; j < lanes; ++j) out[i + j] = static_cast<int64_t>(high[j]) * (1 << 17) + low[j];
    }
}

// Noise bits of the 64 tokens from 4 * block on, in order. Lane 4i + j of the counters holds block 4j + i, so
// that transposing groups of four lanes puts neighbours side by side.
TL_INLINE void noise64(const NoiseKey& key, uint32_t block, I words[4]) {
    I lane = iota();
    I place = ior(shl<2>(iand(lane, iset(3))), shr<2>(lane));
    I c0 = iadd(place, iset(static_cast<int32_t>(block)));
    I c1 = iset(static_cast<int32_t>(key.counter1)), c2 = iset(static_cast<int32_t>(key.counter2));
    I c3 = iset(static_cast<int32_t>(key.counter3));
    uint32_t k0 = key.key0, k1 = key.key1;
    for (int round = 0; round < kPhiloxRounds; ++round) {
        Wide high = mul_wide(c0, kPhiloxMultiplier0), low = mul_wide(c2, kPhiloxMultiplier1);
        c0 = ixor(ixor(low.high, c1), iset(static_cast<int32_t>(k0)));
        c2 = ixor(ixor(high.high, c3), iset(static_cast<int32_t>(k1)));
        c1 = low.low;
        c3 = high.low;
        k0 += kPhiloxWeyl0;
        k1 += kPhiloxWeyl1;
    }
    transpose4(c0, c1, c2, c3);
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

// The exact value of the best token so far, and the test that a better one must pass.
//
// score + noise > value needs -log(u) < exp(score - value), hence 1 - u below that. 2^x is at most
// 2^floor(x) * (1 + x - floor(x)), which is what the bits of a float say when x is written to exponent and
// fraction. `offset` holds -value, 24 (1 - u is counted in 2^-24, rounded down) and a slack for the rounding.
struct Leader {
    double value;
    int64_t token;
    float offset;
};

static constexpr float kUnits = 12102203.161561485f;  // 2^23 / ln 2

TL_INLINE void lead(Leader& leader, double value, int64_t token) {
    leader.value = value;
    leader.token = token;
    leader.offset = static_cast<float>((127 + 24) * 8388608.0 + 4096.0 - value * static_cast<double>(kUnits));
}

TL_INLINE M may_win(F score, I noise, F offset) {
    F limit = as_float(to_int(max(fma(score, set(kUnits), offset), zero())));
    I missing = shr<8>(ixor(noise, iset(-1)));
    return ge(limit, to_float(missing));
}

static void try_tokens(Leader& leader, const float* scores, const uint32_t* noise, uint64_t found, int64_t begin,
                       LastToken last) {
    for (; found; found &= found - 1) {
        int place = __builtin_ctzll(found);
        int64_t token = begin + place;
        float score = scores[place];
        if (score < last.score || (score == last.score && token > last.id)) continue;
        double value = static_cast<double>(score) + gumbel(noise[place]);
        if (value > leader.value || (value == leader.value && token < leader.token)) lead(leader, value, token);
    }
}

static int64_t draw(const float* scores, int64_t n, LastToken last, int64_t start, const NoiseKey& key) {
    constexpr int kGroup = 4 * kLanes;
    const F bound = set(last.score);
    Leader leader;
    lead(leader, static_cast<double>(scores[start]) + gumbel(noise_bits(key, static_cast<uint32_t>(start))), start);
    for (int64_t i = 0; i < n; i += kGroup) {
        float tail[kGroup];
        const float* group = scores + i;
        if (n - i < kGroup) {
            for (int j = 0; j < kGroup; ++j) tail[j] = i + j < n ? scores[i + j] : -kInfinity;
            group = tail;
        }
        F score[4];
        for (int j = 0; j < 4; ++j) score[j] = load(group + j * kLanes);
        if (!bits(ge(max(max(score[0], score[1]), max(score[2], score[3])), bound))) continue;
        I words[4];
        noise64(key, static_cast<uint32_t>(i / 4), words);
        const F offset = set(leader.offset);
        uint64_t found = 0;
        for (int j = 0; j < 4; ++j) {
            found |= static_cast<uint64_t>(bits(may_win(score[j], words[j], offset))) << (j * kLanes);
        }
        if (!found) continue;
        uint32_t noise[kGroup];
        for (int j = 0; j < 4; ++j) istore(noise + j * kLanes, words[j]);
        try_tokens(leader, group, noise, found, i, last);
    }
    return leader.token;
}

static int64_t best(const float* scores, int64_t n, LastToken last, const NoiseKey* key, Candidate* out) {
    constexpr int kGroup = 4 * kLanes;
    constexpr double kFar = -60;  // below it `may_win` would leave the range of its integers
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kGroup) {
        float tail[kGroup];
        const float* group = scores + i;
        if (n - i < kGroup) {
            for (int j = 0; j < kGroup; ++j) tail[j] = i + j < n ? scores[i + j] : -kInfinity;
            group = tail;
        }
        const bool is_full = count == kMaxCandidates;
        const double weakest = is_full ? out[count - 1].score : -__builtin_inf();
        // What no noise lifts to the weakest one is left aside; the slack covers the rounding to fp32.
        const double reach = key ? weakest - kMaxGumbel - 0.1 + 1e-6 * weakest : weakest;
        const float low = static_cast<float>(reach);
        const F bound = set(low > last.score ? low : last.score);
        uint64_t found = 0;
        for (int j = 0; j < 4; ++j)
            found |= static_cast<uint64_t>(bits(ge(load(group + j * kLanes), bound))) << (j * kLanes);
        if (!found) continue;
        uint32_t noise[kGroup];
        if (key) {
            I words[4];
            noise64(*key, static_cast<uint32_t>(i / 4), words);
            if (is_full && weakest > kFar) {
                Leader leader;
                lead(leader, weakest, 0);
                for (int j = 0; j < 4; ++j) {
                    const uint64_t may = bits(may_win(load(group + j * kLanes), words[j], set(leader.offset)));
                    found &= ~(uint64_t{0xffff} << (j * kLanes)) | may << (j * kLanes);
                }
            }
            for (int j = 0; j < 4; ++j) istore(noise + j * kLanes, words[j]);
        }
        for (; found; found &= found - 1) {
            const int place = __builtin_ctzll(found);
            const float score = group[place];
            if (score < last.score || (score == last.score && i + place > last.id)) continue;
            const double value = static_cast<double>(score) + (key ? gumbel(noise[place]) : 0.0);
            if (count == kMaxCandidates && !(value > out[count - 1].score)) continue;
            // Equal ones stay in the order of their ids, in which they come.
            int64_t at = count < kMaxCandidates ? count++ : kMaxCandidates - 1;
            for (; at > 0 && out[at - 1].score < value; --at) out[at] = out[at - 1];
            out[at] = Candidate{value, static_cast<int32_t>(i + place)};
        }
    }
    return count;
}

extern const SamplingKernels sampling_kernels;
const SamplingKernels sampling_kernels = {&finish, &argmax, &scores, &log_softmax, &log_sum_exp, &total_mass,
                                          &split, &collect, &count_before, &masses, &draw, &best};

}  // namespace TL_ISA
}  // namespace tokenloom
