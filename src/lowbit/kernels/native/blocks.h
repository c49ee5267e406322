// Codes of a matrix in blocks that share a scale.
//
// A block is so many rows by so many columns, the last ones being shorter: 1 x 32 and 32 x 1 along either axis of a
// product's sum, 32 x 32 in squares. Every code and scale equals that of the torch twin bit for bit.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "codes.h"
#include "parallel.h"
#include "passes.h"
#include "rounding.h"
#include "runs.h"

namespace lowbit {
namespace {

// The exponent of a number more than 0.
inline int exponent_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits >> 23 ? static_cast<int>(bits >> 23) - 127 : std::ilogb(x);
}

// The scale of a block whose largest magnitude is `most`, as `lowbit.numerics.scales.Scale.step` makes it.
inline float block_scale(const BlockRule& rule, float most) {
    float scale = most / rule.levels;
    if (rule.floor_power && scale > 0.0f && std::isfinite(scale))
        scale = std::ldexp(1.0f, std::max(exponent_of(most) - exponent_of(rule.levels), -127));
    if (rule.floor > 0.0f) return scale < rule.floor ? rule.floor : scale;
    return scale == 0.0f ? 1.0f : scale;
}

template <class Encoder>
void encode_blocks(const void* x, Type type, int64_t rows, int64_t width, const BlockRule& rule, uint8_t* codes,
                   float* scales) {
    const int64_t strips = ceil_div(rows, rule.rows), across = ceil_div(width, rule.columns);
    Guard guard;
#pragma omp parallel for schedule(static) if (rows * width > kAlone)
    for (int64_t strip = 0; strip < strips; strip++)
        guard([&] {
            const int64_t top = strip * rule.rows, bottom = std::min(top + rule.rows, rows);
            std::vector<float> scale(width), reciprocal(width), zero(width, 0.0f),
                buffer(type == Type::f32 ? 0 : width);
            std::vector<uint32_t> numbers(width);
            std::vector<uint8_t> bytes(width + kRun);  // an encoder writes whole vectors
            // The largest magnitude of each column of the strip, then of each block; nan stays nan.
            float* most = scale.data();
            for (int64_t r = top; r < bottom; r++) {
                const float* row = load(x, type, r * width, width, buffer.data());
#pragma omp simd
                for (int64_t i = 0; i < width; i++) {
                    const float a = std::fabs(row[i]);
                    most[i] = a > most[i] || a != a ? a : most[i];
                }
            }
            bool plain = true;
            for (int64_t b = 0; b < across; b++) {
                const int64_t left = b * rule.columns, right = std::min(left + rule.columns, width);
                float largest = 0.0f;
                bool bad = false;
                for (int64_t i = left; i < right; i++) {
                    largest = most[i] > largest ? most[i] : largest;
                    bad |= most[i] != most[i];
                }
                const float s = block_scale(rule, bad ? std::nanf("") : largest), inverse = 1.0f / s;
                scales[strip * across + b] = s;
                plain = plain && has_plain_reciprocal(s);
                std::fill(scale.begin() + left, scale.begin() + right, s);
                std::fill(reciprocal.begin() + left, reciprocal.begin() + right, inverse);
            }
            for (int64_t i = 0; i < width; i++) numbers[i] = static_cast<uint32_t>(i) * kGolden;
            for (int64_t r = top; r < bottom; r++) {
                for (int64_t from = 0; from < width; from += kRun) {
                    const int64_t count = std::min(kRun, width - from);
                    const Run run{&scale[from], &reciprocal[from],
                                  &zero[from],  -rule.levels,
                                  rule.levels,  static_cast<uint32_t>(r * width) * kGolden + rule.key0,
                                  rule.key1,    &numbers[from]};
                    Encoder::encode_run(x, type, r * width + from, count, run, true, plain, rule.stochastic,
                                        &bytes[from]);
                }
                std::memcpy(codes + r * width, bytes.data(), width);
            }
        });
    guard.rethrow();
}

}  // namespace
}  // namespace lowbit
