// From rows of logits to tokens, log-probabilities and top lists; the oracle is tokenloom/kernels/spec_sampling.py.
#pragma once

#include <memory>
#include <cstddef>

#include "isa.hpp"
#include "noise.hpp"

namespace tokenloom {

// Sums of masses are exact up to here (spec_sampling.MAX_VOCABULARY).
constexpr int64_t kMaxVocabulary = (int64_t{1} << 19) - 16;
constexpr int kThresholds = 8;
constexpr double kMassOne = 0x1p34;
constexpr int kMaxCandidates = 8;  // draft_work.MAX_CANDIDATES

// How many scores reach each of falling thresholds, and how much mass they have together.
struct Split {
    int64_t count[kThresholds], mass[kThresholds];
};

// The best tokens by (-score, id) down to this one.
struct LastToken {
    float score;
    int32_t id;
};

// A token that a draft may go on with.
struct Candidate {
    double score;
    int32_t token;
};

struct LogSum {
    float best, log_total;
};

// Loops over a vocabulary. Scores are at most 0 and never NaN. A key orders tokens by (-score, id): the bits of
// |score| above the id.
struct SamplingKernels {
    // Softcap (0: none), then NaN to -inf and +inf to the largest number; in place.
    void (*finish)(float* logits, int64_t n, float softcap, float divisor);
    // The lowest id of the highest logit; 0 where all are -inf.
    int64_t (*argmax)(const float* logits, int64_t n);
    // (logit - best) / temperature; what is below `lowest` becomes -inf.
    void (*scores)(const float* logits, int64_t n, float best, float temperature, float lowest, float* out);
    // (logit - best) - log_total.
    void (*log_softmax)(const float* logits, int64_t n, LogSum sum, float* out);
    LogSum (*log_sum_exp)(const float* logits, int64_t n);
    // The masses of all scores: exp(score) in units of 2^-34, to the nearest.
    int64_t (*total_mass)(const float* scores, int64_t n);
    void (*split)(const float* scores, int64_t n, const float* thresholds, bool with_masses, Split* out);
    // The keys of scores in [low, high), in the order of their ids; returns how many.
    int64_t (*collect)(const float* scores, int64_t n, float low, float high, uint64_t* keys);
    // How many scores are above `score`, or equal to it with a lower id than `id`.
    int64_t (*count_before)(const float* scores, int64_t n, float score, int64_t id);
    // The mass of each key.
    void (*masses)(const uint64_t* keys, int64_t n, int64_t* out);
    // argmax of score + noise over tokens up to `last`; `start` is one of them, with a score of 0.
    int64_t (*draw)(const float* scores, int64_t n, LastToken last, int64_t start, const NoiseKey& key);
    // The best of score + noise (without noise where `key` is null) over tokens up to `last`, by (-score, id), at most
    // kMaxCandidates; returns how many. With noise, scores are at most 0.
    int64_t (*best)(const float* scores, int64_t n, LastToken last, const NoiseKey* key, Candidate* out);
};

const SamplingKernels& sampling_kernels_for(Isa isa);

// engine.batch.LogitEdits; ids lie within the vocabulary.
struct EditsView {
    const int32_t* allowed;
    int64_t num_allowed;  // -1: all tokens are allowed
    const int32_t* seen;
    const int32_t* counts;  // or null
    int64_t num_seen;
    float repetition, frequency, presence;
    const int32_t* bias_ids;
    const float* bias;
    int64_t num_bias;
};

// One entry of engine.batch.LogitRows.
struct SampleEntry {
    int32_t target;  // -1: sample
    float temperature;
    int32_t top_k;
    float top_p, min_p;
    uint64_t seed;
    uint32_t sample_index;
    int64_t position;
    int32_t num_logprobs;
    const EditsView* edits;  // null: none
};

struct SampleResult {
    int32_t token;
    float logprob;  // NaN where none was asked
    int32_t rank;   // from 1; 0 where num_logprobs < 0
    int32_t num_top;  // min(num_logprobs, vocabulary), or 0
    int32_t* top_ids;    // the caller's, num_logprobs long
    float* top_logprobs;
};

// Arrays of one vocabulary for one thread; they keep their capacity.
class SamplerScratch {
  public:
    void reserve(int64_t vocab);
    float* edited() { return edited_.get(); }
    float* scores() { return scores_.get(); }
    uint64_t* keys() { return keys_.get(); }

  private:
    int64_t capacity_ = 0;
    std::unique_ptr<float[]> edited_, scores_;
    std::unique_ptr<uint64_t[]> keys_;
};

// Prepares a freshly computed row, in place.
void finish_logits(const SamplingKernels& kernels, float* logits, int64_t vocab, float softcap, float divisor = 1);

// One entry over a finished row of logits, which it leaves as it is. Needs 1 <= vocab <= kMaxVocabulary.
void sample_row(const SamplingKernels& kernels, const float* logits, int64_t vocab, const SampleEntry& entry,
                SamplerScratch& scratch, SampleResult& result);

// The tokens that `entry` would most likely draw, given its noise, by falling score; see speculation/draft_loop.py.
// At most kMaxCandidates; returns how many.
int64_t find_candidates(const SamplingKernels& kernels, const float* logits, int64_t vocab, const SampleEntry& entry,
                        SamplerScratch& scratch, Candidate* out);

}  // namespace tokenloom
