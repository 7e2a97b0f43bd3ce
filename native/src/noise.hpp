// The noise of sampling (tokenloom/kernels/noise.py): Philox4x32-10, the logarithm of fdlibm, Gumbel noise.
// Everything has internal linkage, so each instruction set keeps its own copy.
#pragma once

#include <cstdint>
#include <cstring>

namespace tokenloom {

constexpr double kMinGumbel = -3.13;
constexpr double kMaxGumbel = 22.88;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// What a draw is for (noise.Purpose).
enum class Purpose : uint32_t { token = 0 };

// The words of key and counter that all tokens of a draw share; the first counter word is token / 4.
struct NoiseKey {
    uint32_t key0, key1, counter1, counter2, counter3;
};

static inline NoiseKey noise_key(uint64_t seed, uint32_t sample_index, int64_t position, Purpose purpose) {
    uint64_t place = static_cast<uint64_t>(position);
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(place),
            sample_index, static_cast<uint32_t>(place >> 32) | static_cast<uint32_t>(purpose) << 24};
}

static inline uint32_t noise_bits(const NoiseKey& key, uint32_t token) {
    uint32_t c[4] = {token / 4, key.counter1, key.counter2, key.counter3};
    uint32_t k0 = key.key0, k1 = key.key1;
    for (int round = 0; round < kPhiloxRounds; ++round) {
        uint64_t high = static_cast<uint64_t>(c[0]) * kPhiloxMultiplier0;
        uint64_t low = static_cast<uint64_t>(c[2]) * kPhiloxMultiplier1;
        c[0] = static_cast<uint32_t>(low >> 32) ^ c[1] ^ k0;
        c[2] = static_cast<uint32_t>(high >> 32) ^ c[3] ^ k1;
        c[1] = static_cast<uint32_t>(low);
        c[3] = static_cast<uint32_t>(high);
        k0 += kPhiloxWeyl0;
        k1 += kPhiloxWeyl1;
    }
    return c[token % 4];
}

// Natural logarithm of positive normal numbers; every operation is rounded by itself (noise.log).
static inline double fdlibm_log(double x) {
    constexpr int64_t sqrt_half = 0x3FE6A09E00000000, one = 0x3FF0000000000000, mantissa = 0x000FFFFFFFFFFFFF;
    int64_t bits;
    memcpy(&bits, &x, 8);
    bits = static_cast<int64_t>(static_cast<uint64_t>(bits) + static_cast<uint64_t>(one - sqrt_half));
    double k = static_cast<double>((bits >> 52) - 0x3FF);
    bits = (bits & mantissa) + sqrt_half;
    double f;
    memcpy(&f, &bits, 8);
    f -= 1.0;
    double half_square = 0.5 * f * f;
    double s = f / (2.0 + f);
    double z = s * s;
    double w = z * z;
    double even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
    double odd = z * (6.666666666666735130e-01 +
                      w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
    double series = odd + even;
    return s * (half_square + series) + k * 1.90821492927058770002e-10 - half_square + f +
           k * 6.93147180369123816490e-01;
}

static inline double gumbel(uint32_t bits) {
    double uniform = (static_cast<double>(bits) + 0.5) * 0x1p-32;
    return -fdlibm_log(-fdlibm_log(uniform));
}

}  // namespace tokenloom
