// Code books: blocks of numbers to codes of 256 sorted numbers with a scale, and back.
//
// Notation: x real value, S the largest magnitude in a block, t = x / S, u noise. `lowbit.numerics.codebooks` is the
// definition, and says what the tables hold.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "passes.h"
#include "ranges.h"
#include "rounding.h"
#include "runs.h"

namespace lowbit {
namespace {

// The code of t: the table by its upper 16 bits has that of the smallest number with these bits, and among those with
// the same bits at most one limit lies.
template <bool stochastic>
void encode_run(const float* x, int64_t count, float scale, const Book& book, int64_t row, uint32_t first,
                uint8_t* codes) {
    const float *values = book.values + row * 256, *limits = book.limits + row * 256;
    const int32_t* starts = book.starts + row * 65536;
    const uint32_t key1 = book.key1;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float t = x[i] / scale;
        const float number = t == t ? t : 0.0f;
        uint32_t bits;
        std::memcpy(&bits, &number, 4);
        int32_t code = starts[bits >> 16];
        code += stochastic ? number >= limits[code] : number > limits[code];
        if (stochastic) {
            const float low = values[code], high = values[code + 1];
            code += uniform(first + static_cast<uint32_t>(i) * kGolden, key1) < (t - low) / (high - low);
        }
        codes[i] = static_cast<uint8_t>(code);
    }
}

void encode_book(const void* x, Type type, int64_t count, int64_t block, const Book& book, uint8_t* codes,
                 float* scales) {
    const int64_t blocks = ceil_div(count, block);
#pragma omp parallel for schedule(static) if (count > kAlone)
    for (int64_t b = 0; b < blocks; b++) {
        float lo, hi, buffer[kRun];
        const int64_t begin = b * block, end = std::min(begin + block, count);
        run_extremes(x, type, begin, end - begin).write(&lo, &hi);
        const float largest = -lo > hi ? -lo : hi;
        // A value that is not finite leaves nothing to scale: the block becomes nan.
        const float kept = std::isfinite(lo) && std::isfinite(hi) ? largest : std::numeric_limits<float>::quiet_NaN();
        const bool without_sign = lo >= 0.0f;
        scales[b] = without_sign ? -kept : kept;
        const float scale = kept == 0.0f ? 1.0f : kept;
        for (int64_t i = begin; i < end; i += kRun) {
            const int64_t now = std::min(kRun, end - i);
            const float* from = load(x, type, i, now, buffer);
            const uint32_t first = static_cast<uint32_t>(i) * kGolden + book.key0;
            if (book.stochastic)
                encode_run<true>(from, now, scale, book, without_sign, first, codes + i);
            else
                encode_run<false>(from, now, scale, book, without_sign, first, codes + i);
        }
    }
}

void decode_book(const uint8_t* codes, const float* scales, int64_t count, int64_t block, const float* values,
                 float* y) {
    const int64_t blocks = ceil_div(count, block);
#pragma omp parallel for schedule(static) if (count > kAlone)
    for (int64_t b = 0; b < blocks; b++) {
        const float* numbers = values + (std::signbit(scales[b]) ? 256 : 0);
        const float scale = std::fabs(scales[b]);
        const int64_t end = std::min((b + 1) * block, count);
#pragma omp simd
        for (int64_t i = b * block; i < end; i++) y[i] = numbers[codes[i]] * scale;
    }
}

}  // namespace
}  // namespace lowbit
