// Rounding of a run of numbers to codes: to nearest, or stochastic with counter-based noise.
//
// Notation: x real value, S scale, t = x / S, u noise.
#pragma once

#include <cmath>
#include <cstdint>

#include "runs.h"

namespace lowbit {
namespace {

// Correctly rounded x / S: two corrections of x times the rounded 1 / S (Markstein 1990). What is far beyond any grid
// needs none: they would make nan of a product that overflowed.
inline float divide(float x, float scale, float reciprocal) {
    const float first = x * reciprocal;
    const float second = std::fma(std::fma(-first, scale, x), reciprocal, first);
    const float third = std::fma(std::fma(-second, scale, x), reciprocal, second);
    return std::fabs(first) < 0x1p40f ? third : first;
}

// Halves to even for |t| < 2**22, which clamping saw to.
inline float round_even(float t) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2**23
    return (t + kMagic) - kMagic;
}

// The noise of an element in [0, 1), of its number and the first word of the key, mixed, and the second word.
inline float uniform(uint32_t h, uint32_t key1) {
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= key1;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    h ^= h >> 16;
    return static_cast<float>(static_cast<int32_t>(h >> 8)) * 0x1p-24f;
}

// Scales and zeros of a run: one for all numbers of it, or one for each.
struct Run {
    const float *scale, *reciprocal, *zero;
    float low, high;
    uint32_t first, key1;     // hashed number of the first element of the noise field
    const uint32_t* numbers;  // what each number of the run adds to it
};

// Codes of x as floats, without the zero point: q - z, or q with an offset.
template <bool per_number, bool by_reciprocal, bool offset, bool stochastic>
void quantize_run(const float* x, int64_t count, const Run& r, float* q) {
    const float one_scale = *r.scale, one_reciprocal = *r.reciprocal, one_zero = r.zero ? *r.zero : 0.0f;
    const float low = r.low, high = r.high;
    const uint32_t first = r.first, key1 = r.key1;
    const uint32_t* numbers = r.numbers;
    const float *scales = r.scale, *reciprocals = r.reciprocal, *zeros = r.zero;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float scale = per_number ? scales[i] : one_scale;
        const float zero = per_number ? zeros[i] : one_zero;
        const float v = offset ? x[i] - zero : x[i];
        float t = by_reciprocal ? divide(v, scale, per_number ? reciprocals[i] : one_reciprocal) : v / scale;
        const float bottom = offset ? low : low - zero, top = offset ? high : high - zero;
        t = t < bottom ? bottom : t;
        t = t > top ? top : t;
        float whole = round_even(t);
        if (stochastic) {
            whole -= whole > t ? 1.0f : 0.0f;
            whole += t - whole > uniform(first + numbers[i], key1) ? 1.0f : 0.0f;
        }
        q[i] = whole;
    }
}

using QuantizeRun = void (*)(const float*, int64_t, const Run&, float*);

template <bool per_number, bool by_reciprocal>
QuantizeRun run_quantizer(bool offset, bool stochastic) {
    if (offset)
        return stochastic ? quantize_run<per_number, by_reciprocal, true, true>
                          : quantize_run<per_number, by_reciprocal, true, false>;
    return stochastic ? quantize_run<per_number, by_reciprocal, false, true>
                      : quantize_run<per_number, by_reciprocal, false, false>;
}

#ifdef __FMA__
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

// Whether `divide` is faster than a division, and its corrections stay among normal numbers.
inline bool has_plain_reciprocal(float scale) { return kHasFma && scale > 0x1p-60f && scale < 0x1p20f; }

inline QuantizeRun run_quantizer(bool per_number, bool by_reciprocal, bool offset, bool stochastic) {
    if (per_number)
        return by_reciprocal ? run_quantizer<true, true>(offset, stochastic)
                             : run_quantizer<true, false>(offset, stochastic);
    return by_reciprocal ? run_quantizer<false, true>(offset, stochastic)
                         : run_quantizer<false, false>(offset, stochastic);
}

}  // namespace
}  // namespace lowbit
