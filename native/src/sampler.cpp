#include "sampler.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

TL_DECLARE_PER_ISA(SamplingKernels, sampling_kernels)
TL_DEFINE_PER_ISA(SamplingKernels, sampling_kernels)

namespace tokenloom {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int32_t kAnyId = std::numeric_limits<int32_t>::max();
constexpr float kAnyScore = -FLT_MAX;  // of all tokens that are not excluded

// A token with a lower score cannot win: its noise is below kMaxGumbel, that of the best token above kMinGumbel.
// Its mass is 0, too, so it may be excluded before top_k and top_p, which keep a prefix of the order.
constexpr float kLowestScore = static_cast<float>(kMinGumbel - kMaxGumbel - 1);

// A shell of scores that is no larger than this is sorted out as a list.
constexpr int64_t kListSize = 512;
constexpr int64_t kListShare = 16;  // and this part of the vocabulary, where masses would be added in each round
constexpr int kMaxRounds = 8;

float sanitized(float logit) { return std::isnan(logit) ? -kInfinity : std::min(logit, FLT_MAX); }

void apply_edits(const float* logits, int64_t vocab, const EditsView& edits, float* row) {
    if (edits.num_allowed < 0) {
        std::copy(logits, logits + vocab, row);
    } else {
        std::fill(row, row + vocab, -kInfinity);
        for (int64_t i = 0; i < edits.num_allowed; ++i) row[edits.allowed[i]] = logits[edits.allowed[i]];
    }
    for (int64_t i = 0; i < edits.num_seen; ++i) {
        float value = row[edits.seen[i]];
        value = value > 0 ? value / edits.repetition : value * edits.repetition;
        if (edits.counts) {
            value = value - edits.frequency * static_cast<float>(edits.counts[i]);
            value = value - edits.presence * (edits.counts[i] > 0 ? 1.0f : 0.0f);
        }
        row[edits.seen[i]] = value;
    }
    for (int64_t i = 0; i < edits.num_bias; ++i) row[edits.bias_ids[i]] += edits.bias[i];
    for (int64_t i = 0; i < edits.num_seen; ++i) row[edits.seen[i]] = sanitized(row[edits.seen[i]]);
    for (int64_t i = 0; i < edits.num_bias; ++i) row[edits.bias_ids[i]] = sanitized(row[edits.bias_ids[i]]);
}

// The token of a row that excludes everything.
int32_t lowest_allowed(const EditsView* edits) {
    if (!edits || edits->num_allowed <= 0) return 0;
    return *std::min_element(edits->allowed, edits->allowed + edits->num_allowed);
}

// Scores of one vocabulary: at most `top`; none that matters is below `lowest`.
struct Scores {
    const SamplingKernels& kernels;
    const float* values;
    int64_t size;
    float top, lowest;
};

int64_t longest_list(const Scores& scores) { return std::max(kListSize, scores.size / kListShare); }

// Scores in [low, high), and what is above them.
struct Shell {
    float low, high;
    int64_t count, count_above, mass_above;
};

void first_thresholds(const Scores& scores, float* thresholds) {
    constexpr float below_top[kThresholds - 1] = {0.5f, 1.5f, 3, 5, 8, 12, 20};
    for (int i = 0; i < kThresholds - 1; ++i) thresholds[i] = std::max(scores.top - below_top[i], scores.lowest);
    thresholds[kThresholds - 1] = scores.lowest;
}

// Thresholds that cut a shell, in equal steps, or in growing ones where it has no end. False: it cannot be cut.
bool cut(const Scores& scores, const Shell& shell, float* thresholds) {
    float high = std::min(shell.high, scores.top);
    if (!(std::nextafter(shell.low, kInfinity) < high)) return false;
    const bool is_open = shell.low <= kAnyScore;
    float step = is_open ? std::max(1.0f, -high) : (high - shell.low) / kThresholds;
    for (int i = 0; i < kThresholds - 1; ++i) {
        float distance = is_open ? step * static_cast<float>(1 << i) : step * static_cast<float>(i + 1);
        thresholds[i] = std::max(high - distance, shell.low);
    }
    thresholds[kThresholds - 1] = shell.low;
    return true;
}

void take_shell(const float* thresholds, const Split& split, int chosen, Shell& shell) {
    if (chosen > 0) {
        shell.high = thresholds[chosen - 1];
        shell.count_above = split.count[chosen - 1];
        shell.mass_above = split.mass[chosen - 1];
    }
    shell.low = thresholds[chosen];
    shell.count = split.count[chosen] - shell.count_above;
}

// The shell of the token with which the best ones first reach what is wanted. `split` is of `thresholds`.
template <typename Reaches>
Shell find_shell(const Scores& scores, float* thresholds, Split& split, bool with_masses, Reaches reaches) {
    Shell shell{scores.lowest, kInfinity, 0, 0, 0};
    const int64_t longest = with_masses ? longest_list(scores) : kListSize;
    for (int round = 0;; ++round) {
        int chosen = 0;
        while (chosen < kThresholds - 1 && !reaches(split, chosen)) ++chosen;
        take_shell(thresholds, split, chosen, shell);
        if (shell.count <= longest || round == kMaxRounds || !cut(scores, shell, thresholds)) return shell;
        scores.kernels.split(scores.values, scores.size, thresholds, with_masses, &split);
    }
}

float score_of(uint64_t key) {
    uint32_t bits = static_cast<uint32_t>(key >> 32) | 0x80000000u;
    float score;
    memcpy(&score, &bits, 4);
    return score + 0.0f;
}

int32_t id_of(uint64_t key) { return static_cast<int32_t>(static_cast<uint32_t>(key)); }

// The shell of the token at place `count` of the order, or of the last one.
Shell shell_at(const Scores& scores, int64_t count) {
    float thresholds[kThresholds];
    Split split;
    first_thresholds(scores, thresholds);
    scores.kernels.split(scores.values, scores.size, thresholds, false, &split);
    return find_shell(scores, thresholds, split, false, [count](const Split& s, int i) { return s.count[i] >= count; });
}

// Keys of the `count` best tokens, in any order but with the last one at the end; fewer if there are fewer.
int64_t best_keys(const Scores& scores, int64_t count, uint64_t* keys) {
    int64_t found = scores.kernels.collect(scores.values, scores.size, shell_at(scores, count).low, kInfinity, keys);
    count = std::min(count, found);
    if (count) std::nth_element(keys, keys + count - 1, keys + found);
    return count;
}

LastToken last_token(uint64_t key) { return {score_of(key), id_of(key)}; }

LastToken top_k_end(const Scores& scores, int64_t count, uint64_t* keys) {
    Shell shell = shell_at(scores, count);
    int64_t found = scores.kernels.collect(scores.values, scores.size, shell.low, shell.high, keys);
    int64_t place = count - 1 - shell.count_above;
    if (place >= found) return {scores.lowest, kAnyId};
    std::nth_element(keys, keys + place, keys + found);
    return last_token(keys[place]);
}

int64_t list_mass(const SamplingKernels& kernels, const uint64_t* keys, int64_t count) {
    constexpr int64_t part = 64;
    int64_t masses[part], total = 0;
    for (int64_t i = 0; i < count; i += part) {
        int64_t size = std::min(part, count - i);
        kernels.masses(keys + i, size, masses);
        for (int64_t j = 0; j < size; ++j) total += masses[j];
    }
    return total;
}

// The key with which the masses of the best keys, after `above`, first reach `wanted`. Quickselect, by mass.
uint64_t key_at_mass(const SamplingKernels& kernels, uint64_t* keys, int64_t count, int64_t above, double wanted) {
    constexpr int64_t sorted_size = 64;
    while (count > sorted_size) {
        int64_t half = count / 2;
        std::nth_element(keys, keys + half, keys + count);
        int64_t mass = list_mass(kernels, keys, half);
        if (static_cast<double>(above + mass) >= wanted) {
            count = half;
        } else {
            above += mass;
            keys += half;
            count -= half;
        }
    }
    std::sort(keys, keys + count);
    int64_t masses[sorted_size];
    kernels.masses(keys, count, masses);
    for (int64_t i = 0; i < count; ++i) {
        above += masses[i];
        if (static_cast<double>(above) >= wanted) return keys[i];
    }
    return keys[count - 1];
}

// The best tokens as lists, shell by shell, while these are short: most nuclei are. False: it ends further down.
bool find_in_lists(const Scores& scores, const float* thresholds, const Split& split, double wanted, uint64_t* keys,
                   LastToken& last) {
    const int64_t longest = longest_list(scores);
    int64_t above = 0, count_above = 0;
    float high = kInfinity;
    for (int i = 0; i < kThresholds; ++i) {
        int64_t count = split.count[i] - count_above;
        if (count > longest) return false;
        if (!count) continue;
        scores.kernels.collect(scores.values, scores.size, thresholds[i], high, keys);
        int64_t mass = list_mass(scores.kernels, keys, count);
        if (static_cast<double>(above + mass) >= wanted) {
            last = last_token(key_at_mass(scores.kernels, keys, count, above, wanted));
            return true;
        }
        above += mass;
        count_above = split.count[i];
        high = thresholds[i];
    }
    return false;
}

LastToken nucleus_end(const Scores& scores, float top_p, uint64_t* keys) {
    float thresholds[kThresholds];
    Split split;
    LastToken last{scores.lowest, kAnyId};
    double wanted = static_cast<double>(top_p) *
                    static_cast<double>(scores.kernels.total_mass(scores.values, scores.size));
    first_thresholds(scores, thresholds);
    scores.kernels.split(scores.values, scores.size, thresholds, false, &split);
    if (find_in_lists(scores, thresholds, split, wanted, keys, last)) return last;
    scores.kernels.split(scores.values, scores.size, thresholds, true, &split);
    Shell shell = find_shell(scores, thresholds, split, true, [wanted](const Split& s, int i) {
        return static_cast<double>(s.mass[i]) >= wanted;
    });
    int64_t found = scores.kernels.collect(scores.values, scores.size, shell.low, shell.high, keys);
    return found ? last_token(key_at_mass(scores.kernels, keys, found, shell.mass_above, wanted)) : last;
}

// The end of the nucleus of the `count` best tokens.
LastToken nucleus_end(const Scores& scores, int64_t count, float top_p, uint64_t* keys) {
    count = best_keys(scores, count, keys);
    if (!count) return {scores.lowest, kAnyId};
    double wanted = static_cast<double>(top_p) * static_cast<double>(list_mass(scores.kernels, keys, count));
    return last_token(key_at_mass(scores.kernels, keys, count, 0, wanted));
}

// Where top_k and then top_p end the order; min_p has its part in scores.lowest.
LastToken truncate(const Scores& scores, const SampleEntry& entry, uint64_t* keys) {
    bool has_nucleus = entry.top_p < 1;
    if (entry.top_k > 0 && entry.top_k < scores.size) {
        return has_nucleus ? nucleus_end(scores, entry.top_k, entry.top_p, keys) : top_k_end(scores, entry.top_k, keys);
    }
    return has_nucleus ? nucleus_end(scores, entry.top_p, keys) : LastToken{scores.lowest, kAnyId};
}

// The lowest score that min_p keeps, not below `least`. The best token stays whatever min_p is.
float lowest_score(float min_p, float least) {
    if (!(min_p > 0)) return least;
    double bound = fdlibm_log(static_cast<double>(min_p));
    float lowest = static_cast<float>(bound);
    if (static_cast<double>(lowest) < bound) lowest = std::nextafter(lowest, kInfinity);
    return std::min(std::max(lowest, least), 0.0f);
}

int32_t draw_token(const SamplingKernels& kernels, const float* row, int64_t vocab, int64_t best,
                   const SampleEntry& entry, SamplerScratch& scratch) {
    Scores scores{kernels, scratch.scores(), vocab, 0, lowest_score(entry.min_p, kLowestScore)};
    kernels.scores(row, vocab, row[best], entry.temperature, scores.lowest, scratch.scores());
    LastToken last = truncate(scores, entry, scratch.keys());
    // Where only ties of the best score are left, the best logit may be past the last of them.
    if (last.score == 0 && best > last.id) best = last.id;
    NoiseKey key = noise_key(entry.seed, entry.sample_index, entry.position, Purpose::token);
    return static_cast<int32_t>(kernels.draw(scratch.scores(), vocab, last, best, key));
}

const float* edited(const float* logits, int64_t vocab, const SampleEntry& entry, SamplerScratch& scratch) {
    if (!entry.edits) return logits;
    apply_edits(logits, vocab, *entry.edits, scratch.edited());
    return scratch.edited();
}

int32_t choose(const SamplingKernels& kernels, const float* logits, int64_t vocab, const SampleEntry& entry,
               SamplerScratch& scratch) {
    const float* row = edited(logits, vocab, entry, scratch);
    int64_t best = kernels.argmax(row, vocab);
    if (!(row[best] > -kInfinity)) return lowest_allowed(entry.edits);
    if (!(entry.temperature > 0)) return static_cast<int32_t>(best);
    return draw_token(kernels, row, vocab, best, entry, scratch);
}

void top_logprobs(const SamplingKernels& kernels, int64_t vocab, int32_t count, SamplerScratch& scratch,
                  SampleResult& result) {
    const float* values = scratch.scores();
    Scores scores{kernels, values, vocab, values[kernels.argmax(values, vocab)], -kInfinity};
    uint64_t* keys = scratch.keys();
    int64_t found = best_keys(scores, count, keys);
    std::sort(keys, keys + found);
    result.num_top = static_cast<int32_t>(found);
    for (int64_t i = 0; i < found; ++i) {
        result.top_ids[i] = id_of(keys[i]);
        result.top_logprobs[i] = values[result.top_ids[i]];
    }
}

// result.token's log-probability, rank and rivals in the raw distribution.
void score_token(const SamplingKernels& kernels, const float* logits, int64_t vocab, int32_t num_logprobs,
                 SamplerScratch& scratch, SampleResult& result) {
    LogSum sum = kernels.log_sum_exp(logits, vocab);
    // A row of -inf has no distribution.
    bool is_broken = sum.best == -kInfinity;
    result.logprob = is_broken ? 0.0f : (logits[result.token] - sum.best) - sum.log_total;
    if (num_logprobs < 0) return;
    float* values = scratch.scores();
    if (is_broken) {
        std::fill(values, values + vocab, 0.0f);
    } else {
        kernels.log_softmax(logits, vocab, sum, values);
    }
    result.rank = static_cast<int32_t>(1 + kernels.count_before(values, vocab, result.logprob, result.token));
    if (num_logprobs > 0) top_logprobs(kernels, vocab, num_logprobs, scratch, result);
}

}  // namespace

void SamplerScratch::reserve(int64_t vocab) {
    if (vocab <= capacity_) return;
    edited_.reset(new float[static_cast<size_t>(vocab)]);
    scores_.reset(new float[static_cast<size_t>(vocab)]);
    keys_.reset(new uint64_t[static_cast<size_t>(vocab)]);
    capacity_ = vocab;
}

void finish_logits(const SamplingKernels& kernels, float* logits, int64_t vocab, float softcap, float divisor) {
    kernels.finish(logits, vocab, softcap, divisor);
}

void sample_row(const SamplingKernels& kernels, const float* logits, int64_t vocab, const SampleEntry& entry,
                SamplerScratch& scratch, SampleResult& result) {
    scratch.reserve(vocab);
    bool is_target = entry.target >= 0;
    result.token = is_target ? entry.target : choose(kernels, logits, vocab, entry, scratch);
    result.logprob = std::numeric_limits<float>::quiet_NaN();
    result.rank = 0;
    result.num_top = 0;
    if (is_target || entry.num_logprobs >= 0) {
        score_token(kernels, logits, vocab, entry.num_logprobs, scratch, result);
    }
}

int64_t find_candidates(const SamplingKernels& kernels, const float* logits, int64_t vocab, const SampleEntry& entry,
                        SamplerScratch& scratch, Candidate* out) {
    scratch.reserve(vocab);
    const float* row = edited(logits, vocab, entry, scratch);
    if (!(entry.temperature > 0)) return kernels.best(row, vocab, LastToken{kAnyScore, kAnyId}, nullptr, out);
    const int64_t best = kernels.argmax(row, vocab);
    if (!(row[best] > -kInfinity)) return 0;
    // Tokens far behind the best one cannot be drawn, but may well be the eighth.
    Scores scores{kernels, scratch.scores(), vocab, 0, lowest_score(entry.min_p, kAnyScore)};
    kernels.scores(row, vocab, row[best], entry.temperature, scores.lowest, scratch.scores());
    const LastToken last = truncate(scores, entry, scratch.keys());
    const NoiseKey key = noise_key(entry.seed, entry.sample_index, entry.position, Purpose::token);
    return kernels.best(scratch.scores(), vocab, last, &key, out);
}

}  // namespace tokenloom
